//! Which service answers for a host and a path.
//!
//! `Routes`, made by the agent from the state → a `Table`, indexed once. The most exact host that has a fitting path wins
//! (a whole name, then the longest wildcard, then routes for any host), then the longest path. Pure but for counters and
//! turns, which outlive a table.

use super::counts::RouteCounters;
use super::tls::HostCertificate;
use crate::model::{Gather, Order};
use rustls::sign::CertifiedKey;
use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

pub const HTTP_PORT: u16 = 80;
pub const HTTPS_PORT: u16 = 443;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteOptions {
    /// Plain requests are sent to HTTPS if there is a certificate for their host.
    pub redirects_to_https: bool,
    /// A longer body is refused; `None`: any length.
    pub request_bytes_max: Option<u64>,
    /// From the last byte of the request to the head of the answer.
    pub response_limit: Duration,
    /// Between two pieces of an answer's body.
    pub idle_limit: Duration,
}

impl Default for RouteOptions {
    fn default() -> RouteOptions {
        RouteOptions {
            redirects_to_https: false,
            request_bytes_max: None,
            response_limit: Duration::from_secs(60),
            idle_limit: Duration::from_secs(600),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// `shop.example.org`, `*.example.org` (one label or more), or any host.
    pub host: Option<String>,
    /// `/api` holds for `/api` and all below, not for `/apis`; empty or `/`: all.
    pub path_prefix: String,
    pub app: String,
    pub service: String,
    /// Those that serve now.
    pub endpoints: Vec<SocketAddrV4>,
    pub options: RouteOptions,
}

/// What the agent wants to be served.
#[derive(Clone, Debug)]
pub struct Routes {
    pub http_port: u16,
    pub https_port: u16,
    pub routes: Vec<Route>,
    /// Certificates that somebody gave; for other hosts the source of the ingress is asked.
    pub certificates: Vec<HostCertificate>,
    /// Of ACME (RFC 8555 8.3): token → what is answered for it, to anybody on any host.
    pub challenges: BTreeMap<String, String>,
}

impl Default for Routes {
    fn default() -> Routes {
        Routes {
            http_port: HTTP_PORT,
            https_port: HTTPS_PORT,
            routes: Vec::new(),
            certificates: Vec::new(),
            challenges: BTreeMap::new(),
        }
    }
}

/// What stays of a route when the table is replaced.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteKey {
    pub app: String,
    pub service: String,
    pub host: Option<String>,
    pub path_prefix: String,
}

#[derive(Debug)]
pub struct LiveRoute {
    pub route: Route,
    pub key: RouteKey,
    pub counters: Arc<RouteCounters>,
    turn: AtomicUsize,
}

#[derive(Debug, Default)]
pub struct Table {
    exact: BTreeMap<String, Vec<Arc<LiveRoute>>>,
    /// By what follows the `*`: `.example.org`.
    wildcards: BTreeMap<String, Vec<Arc<LiveRoute>>>,
    any: Vec<Arc<LiveRoute>>,
    certificates: BTreeMap<String, Arc<CertifiedKey>>,
    challenges: BTreeMap<String, String>,
    https_port: u16,
}

impl Table {
    /// Counters are taken over from `old`.
    pub fn new(routes: Routes, old: &Table) -> Table {
        let kept: BTreeMap<RouteKey, Arc<RouteCounters>> =
            old.routes().map(|live| (live.key.clone(), live.counters.clone())).gather();
        let mut table = Table {
            certificates: routes
                .certificates
                .into_iter()
                .map(|one| (one.host.to_ascii_lowercase(), one.certificate))
                .gather(),
            challenges: routes.challenges,
            https_port: routes.https_port,
            ..Table::default()
        };
        for route in routes.routes {
            table.add(route, &kept);
        }
        let places = table.exact.values_mut().chain(table.wildcards.values_mut());
        for place in places.chain([&mut table.any]) {
            // Stable: of two alike the first wins.
            place.order_by_key(|live| std::cmp::Reverse(live.route.path_prefix.len()));
        }
        table
    }

    fn add(&mut self, mut route: Route, kept: &BTreeMap<RouteKey, Arc<RouteCounters>>) {
        route.path_prefix.truncate(route.path_prefix.trim_end_matches('/').len());
        route.host = route.host.map(|host| host.to_ascii_lowercase());
        let key = RouteKey {
            app: route.app.clone(),
            service: route.service.clone(),
            host: route.host.clone(),
            path_prefix: route.path_prefix.clone(),
        };
        let place = match route.host.as_deref() {
            None | Some("*") => &mut self.any,
            Some(host) => match host.strip_prefix('*') {
                Some(suffix) => self.wildcards.entry(suffix.into()).or_default(),
                None => self.exact.entry(host.into()).or_default(),
            },
        };
        let counters = kept.get(&key).cloned().unwrap_or_default();
        place.push(Arc::new(LiveRoute { route, key, counters, turn: AtomicUsize::new(0) }));
    }

    /// `host` in lower case, without a port.
    pub fn find(&self, host: &str, path: &str) -> Option<&Arc<LiveRoute>> {
        let fits = |live: &&Arc<LiveRoute>| live.holds_for(path);
        let in_exact = self.exact.get(host).and_then(|place| place.iter().find(fits));
        let suffixes = host.match_indices('.').map(|(at, _)| &host[at..]);
        let mut wildcards = suffixes.filter_map(|suffix| self.wildcards.get(suffix));
        in_exact
            .or_else(|| wildcards.find_map(|place| place.iter().find(fits)))
            .or_else(|| self.any.iter().find(fits))
    }

    pub fn routes(&self) -> impl Iterator<Item = &Arc<LiveRoute>> {
        self.exact.values().chain(self.wildcards.values()).flatten().chain(&self.any)
    }

    /// A certificate for exactly this host, else for its parent's wildcard, which holds for one label (RFC 6125 6.4.3).
    pub fn certificate(&self, host: &str) -> Option<Arc<CertifiedKey>> {
        let wildcard = || host.split_once('.').map(|(_, parent)| format!("*.{parent}"));
        let found = self.certificates.get(host);
        found.or_else(|| self.certificates.get(&wildcard()?)).cloned()
    }

    pub fn challenge(&self, token: &str) -> Option<&String> {
        self.challenges.get(token)
    }

    pub fn https_port(&self) -> u16 {
        self.https_port
    }
}

impl LiveRoute {
    fn holds_for(&self, path: &str) -> bool {
        let prefix = &self.route.path_prefix;
        let rest = path.strip_prefix(prefix.as_str());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || prefix.is_empty())
    }

    /// At most `most` endpoints to try, each request beginning with the next one.
    pub fn endpoints_in_turn(&self, most: usize) -> Vec<SocketAddrV4> {
        let all = &self.route.endpoints;
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        (0..all.len().min(most)).map(|step| all[(first.wrapping_add(step)) % all.len()]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(host: Option<&str>, path_prefix: &str, service: &str) -> Route {
        Route {
            host: host.map(Into::into),
            path_prefix: path_prefix.into(),
            app: "shop".into(),
            service: service.into(),
            endpoints: (1..=3).map(|last| SocketAddrV4::new([10, 77, 1, last].into(), 80)).collect(),
            options: RouteOptions::default(),
        }
    }

    fn table() -> Table {
        let routes = vec![
            route(Some("Shop.example.org"), "/", "shop"),
            route(Some("shop.example.org"), "/api", "api"),
            route(Some("shop.example.org"), "/api/v2/", "api2"),
            route(Some("*.example.org"), "", "wild"),
            route(Some("*.eu.example.org"), "", "europe"),
            route(Some("only.example.org"), "/x", "only"),
            route(None, "/any", "any"),
        ];
        Table::new(Routes { routes, ..Routes::default() }, &Table::default())
    }

    #[test]
    fn the_most_exact_host_then_the_longest_path_wins() {
        let table = table();
        for (host, path, wanted) in [
            ("shop.example.org", "/", Some("shop")),
            ("shop.example.org", "*", Some("shop")),
            ("shop.example.org", "/apis", Some("shop")),
            ("shop.example.org", "/api", Some("api")),
            ("shop.example.org", "/api/v1", Some("api")),
            ("shop.example.org", "/api/v2", Some("api2")),
            ("shop.example.org", "/api/v2/x", Some("api2")),
            ("other.example.org", "/", Some("wild")),
            ("a.b.example.org", "/", Some("wild")),
            ("a.eu.example.org", "/any", Some("europe")),
            ("only.example.org", "/x", Some("only")),
            // The exact host has no such path: a less exact one has.
            ("only.example.org", "/y", Some("wild")),
            ("example.org", "/any/x", Some("any")),
            ("example.org", "/", None),
            ("", "/any", Some("any")),
        ] {
            let found = table.find(host, path).map(|live| live.route.service.as_str());
            assert_eq!(found, wanted, "{host}{path}");
        }
    }

    #[test]
    fn endpoints_take_turns() {
        let table = table();
        let live = table.find("shop.example.org", "/").unwrap();
        let firsts: Vec<u8> = (0..4).map(|_| live.endpoints_in_turn(2)[0].ip().octets()[3]).collect();
        assert_eq!(firsts, [1, 2, 3, 1]);
        assert_eq!(live.endpoints_in_turn(2).len(), 2);
        assert_eq!(live.endpoints_in_turn(9).len(), 3);
    }

    #[test]
    fn counters_outlive_a_table() {
        let old = table();
        old.find("shop.example.org", "/").unwrap().counters.requests.fetch_add(7, Ordering::Relaxed);
        let mut moved = route(Some("shop.example.org"), "", "shop");
        moved.endpoints.clear();
        let new = Table::new(Routes { routes: vec![moved], ..Routes::default() }, &old);
        let live = new.find("shop.example.org", "/").unwrap();
        assert_eq!(live.counters.requests.load(Ordering::Relaxed), 7);
    }
}
