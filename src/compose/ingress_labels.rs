//! Labels of a service → the routes by which HTTP comes to it, and what of them has no effect here.
//!
//! `tinydc.http.host|path|port|tls|redirect|body_max`, and the labels that people have for Traefik 2: router rules of
//! `Host`, `PathPrefix`, `&&` and `||`, server ports, TLS, and the middleware that redirects to HTTPS. Pure.
//!
//! Invariant: a rule of which a part can't be kept gives no route, for a wider one would show what was meant to be hidden
//! (`a_rule_that_cannot_be_kept_gives_no_route`).

use super::problem::Severity;
use super::quantity::parse_bytes;
use crate::model::SecretName;
use std::collections::BTreeMap;

const OWN: &str = "tinydc.http.";
const TRAEFIK: &str = "traefik.";
const ROUTES_MAX: usize = 64;
/// Without these middlewares an answer is slower or plainer, but the same people get it from the same place.
const DISPENSABLE: [&str; 9] = [
    "buffering",
    "circuitbreaker",
    "compress",
    "contenttype",
    "errors",
    "headers",
    "inflightreq",
    "ratelimit",
    "retry",
];
const TLS_HINT: &str =
    "write cluster, acme, or the name of a secret that holds certificate and key; each is for a host";
const OWN_HINT: &str = "tinydc reads tinydc.http.host, path, port, tls, redirect and body_max";

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteSpec {
    /// `shop.example.org` or `*.example.org`, in lower case; `None`: any.
    pub host: Option<String>,
    /// Begins with `/`; `/` is all.
    pub path_prefix: String,
    /// In the container; `None`: the only TCP target that the service publishes, else 80.
    pub port: Option<u16>,
    pub redirects_to_https: bool,
    pub request_bytes_max: Option<u64>,
    pub tls: Option<TlsSource>,
}

/// Where a host's certificate comes from. Of two that are wished for one host the first in this order is taken.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsSource {
    /// A secret of the app or of the cluster: chain and key as PEM.
    Secret(String),
    /// An authority that browsers trust.
    Acme,
    /// The cluster's own CA.
    Cluster,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelProblem {
    pub severity: Severity,
    pub label: String,
    pub message: String,
    pub hint: Option<String>,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct IngressLabels {
    /// Sorted, without repeats.
    pub routes: Vec<RouteSpec>,
    pub problems: Vec<LabelProblem>,
}

pub fn read_ingress_labels(labels: &BTreeMap<String, String>) -> IngressLabels {
    let mut reader = Reader { labels, problems: Vec::new() };
    let mut routes = reader.own_routes();
    routes.extend(reader.traefik_routes());
    let mut routes = merged(routes);
    if routes.len() > ROUTES_MAX {
        let message = format!("the labels make {} routes, at most {ROUTES_MAX} are served", routes.len());
        reader.problem(Severity::Error, "labels", message, None);
        routes.clear();
    }
    IngressLabels { routes, problems: reader.problems }
}

/// One route for each host, path and port: Traefik's labels often name one for HTTP and one for HTTPS.
fn merged(routes: Vec<RouteSpec>) -> Vec<RouteSpec> {
    let mut by_place: BTreeMap<(Option<String>, String, Option<u16>), RouteSpec> = BTreeMap::new();
    for route in routes {
        let place = (route.host.clone(), route.path_prefix.clone(), route.port);
        let Some(known) = by_place.get_mut(&place) else {
            by_place.insert(place, route);
            continue;
        };
        known.redirects_to_https |= route.redirects_to_https;
        known.request_bytes_max = known.request_bytes_max.into_iter().chain(route.request_bytes_max).min();
        known.tls = known.tls.take().into_iter().chain(route.tls).min();
    }
    by_place.into_values().collect()
}

struct Reader<'l> {
    labels: &'l BTreeMap<String, String>,
    problems: Vec<LabelProblem>,
}

impl<'l> Reader<'l> {
    fn problem(&mut self, severity: Severity, label: &str, message: impl Into<String>, hint: Option<&str>) {
        self.problems.push(LabelProblem {
            severity,
            label: label.into(),
            message: message.into(),
            hint: hint.map(Into::into),
        });
    }

    /// Label's name without `prefix`, and its value.
    fn below(&self, prefix: &'static str) -> Vec<(&'l str, &'l str)> {
        let labels = self.labels.iter();
        labels.filter_map(|(key, value)| Some((key.strip_prefix(prefix)?, value.trim()))).collect()
    }

    fn own_routes(&mut self) -> Vec<RouteSpec> {
        let mut route = RouteSpec { path_prefix: "/".into(), ..RouteSpec::default() };
        let mut hosts = Vec::new();
        let (mut is_routed, mut is_fine) = (false, true);
        let mut redirects = None;
        for (key, value) in self.below(OWN) {
            is_routed |= matches!(key, "host" | "path");
            let outcome = match key {
                "host" => value
                    .split(',')
                    .map(|host| read_host(host.trim()))
                    .collect::<Result<_, _>>()
                    .map(|all| hosts = all),
                "path" => read_path(value).map(|path| route.path_prefix = path),
                "port" => read_port(value).map(|port| route.port = Some(port)),
                "tls" => read_tls(value).map(|tls| route.tls = Some(tls)),
                "redirect" => read_switch(value).map(|value| redirects = Some(value)),
                "body_max" => read_bytes(value).map(|bytes| route.request_bytes_max = Some(bytes)),
                _ => Err("has no meaning".to_string()),
            };
            if let Err(message) = outcome {
                is_fine = false;
                self.problem(Severity::Error, &format!("{OWN}{key}"), message, Some(OWN_HINT));
            }
        }
        if !is_fine {
            return Vec::new();
        }
        if !is_routed {
            if !self.below(OWN).is_empty() {
                let message = "makes no route by itself";
                self.problem(
                    Severity::Error,
                    OWN.trim_end_matches('.'),
                    message,
                    Some("add tinydc.http.host or path"),
                );
            }
            return Vec::new();
        }
        route.redirects_to_https = redirects.unwrap_or(route.tls.is_some());
        let all = if hosts.is_empty() { vec![None] } else { hosts.iter().map(Some).collect() };
        if let Some(message) = all.iter().find_map(|host| unprovable(host.map(String::as_str), &route.tls)) {
            self.problem(Severity::Error, &format!("{OWN}tls"), message, Some(TLS_HINT));
            return Vec::new();
        }
        if hosts.is_empty() {
            return vec![route];
        }
        hosts.into_iter().map(|host| RouteSpec { host: Some(host), ..route.clone() }).collect()
    }

    fn traefik_routes(&mut self) -> Vec<RouteSpec> {
        let mut routers: BTreeMap<&str, Router<'_>> = BTreeMap::new();
        let mut found = Found::default();
        for (key, value) in self.below(TRAEFIK) {
            let label = format!("{TRAEFIK}{key}");
            if key == "enable" {
                match read_switch(value) {
                    Ok(true) => {}
                    Ok(false) => return Vec::new(),
                    Err(message) => self.problem(Severity::Error, &label, message, None),
                }
                continue;
            }
            match key.split('.').collect::<Vec<_>>().as_slice() {
                ["http", "routers", router, "rule"] => routers.entry(router).or_default().rule = Some(value),
                ["http", "routers", router, "service"] => {
                    routers.entry(router).or_default().service = Some(value)
                }
                ["http", "routers", router, "entrypoints"] => {
                    let is_secure = value.split(',').any(|name| name.trim() == "websecure");
                    routers.entry(router).or_default().is_secure |= is_secure;
                }
                ["http", "routers", router, "tls"] => match read_switch(value) {
                    Ok(is_secure) => routers.entry(router).or_default().is_secure |= is_secure,
                    Err(message) => self.problem(Severity::Error, &label, message, None),
                },
                ["http", "routers", router, "tls", "certresolver"] => {
                    routers.entry(router).or_default().has_resolver = !value.is_empty();
                }
                ["http", "routers", router, "middlewares"] => {
                    routers.entry(router).or_default().middlewares =
                        value.split(',').map(str::trim).collect();
                }
                ["http", "services", service, "loadbalancer", "server", "port"] => match read_port(value) {
                    Ok(port) => drop(found.ports.insert(service, port)),
                    Err(message) => self.problem(Severity::Error, &label, message, None),
                },
                ["http", "middlewares", name, kind, rest @ ..] => {
                    found.add_middleware(name, kind, rest, value)
                }
                ["docker", "network"] => {}
                rest => self.without_effect(&label, rest),
            }
        }
        routers.iter().flat_map(|(name, router)| self.traefik_route(name, router, &found)).collect()
    }

    fn without_effect(&mut self, label: &str, key: &[&str]) {
        let (severity, message) = match key {
            ["http", "routers", _, "priority"] => (Severity::Ignored, "the most exact route comes first"),
            ["http", "routers", _, "tls", ..] => {
                (Severity::Ignored, "certificates are for the hosts that the rule names")
            }
            ["tcp" | "udp", ..] => (Severity::Warning, "only HTTP is routed by names; publish the port"),
            _ => (Severity::Ignored, "nothing here reads it"),
        };
        self.problem(severity, label, message, None);
    }

    fn traefik_route(&mut self, name: &str, router: &Router<'_>, found: &Found<'_>) -> Vec<RouteSpec> {
        let label = format!("traefik.http.routers.{name}.rule");
        let Some(rule) = router.rule else {
            self.problem(Severity::Error, &label, "is missing", Some("write Host(`name`)"));
            return Vec::new();
        };
        let conditions = match parse_rule(rule) {
            Ok(conditions) => conditions,
            Err(message) => {
                let hint = "tinydc knows Host, PathPrefix, && and ||";
                self.problem(Severity::Error, &label, message, Some(hint));
                return Vec::new();
            }
        };
        let Some(redirects_to_https) = self.apply_middlewares(name, router, found) else { return Vec::new() };
        let tls = match (router.has_resolver, router.is_secure) {
            (true, _) => Some(TlsSource::Acme),
            (false, true) => Some(TlsSource::Cluster),
            (false, false) => None,
        };
        let unproved = conditions.iter().find_map(|condition| unprovable(condition.host.as_deref(), &tls));
        if let Some(message) = unproved {
            let label = format!("traefik.http.routers.{name}.tls");
            self.problem(Severity::Error, &label, message, Some("name the hosts in the rule: Host(`name`)"));
            return Vec::new();
        }
        let port = match router.service {
            Some(service) => found.ports.get(service.split('@').next().unwrap_or_default()),
            None => found
                .ports
                .get(name)
                .or_else(|| found.ports.values().next().filter(|_| found.ports.len() == 1)),
        };
        let route = |condition: Condition| RouteSpec {
            host: condition.host,
            path_prefix: condition.path.unwrap_or_else(|| "/".into()),
            port: port.copied(),
            redirects_to_https: redirects_to_https || tls.is_some(),
            request_bytes_max: None,
            tls: tls.clone(),
        };
        conditions.into_iter().map(route).collect()
    }

    /// Whether they redirect to HTTPS. `None`: one of them can't be done without, such as a login.
    fn apply_middlewares(&mut self, name: &str, router: &Router<'_>, found: &Found<'_>) -> Option<bool> {
        let label = format!("traefik.http.routers.{name}.middlewares");
        let (mut redirects_to_https, mut is_fine) = (false, true);
        for middleware in router.middlewares.iter().filter(|middleware| !middleware.is_empty()) {
            // `name@docker` names the provider.
            let plain = middleware.split('@').next().unwrap_or_default();
            match found.middlewares.get(plain) {
                Some(Middleware::RedirectsToHttps) => redirects_to_https = true,
                Some(Middleware::IsDispensable) => {
                    let message = format!("the middleware {plain} is not applied; requests pass as they are");
                    self.problem(Severity::Warning, &label, message, None);
                }
                _ => {
                    let message = format!("the middleware {plain} is not supported");
                    self.problem(
                        Severity::Error,
                        &label,
                        message,
                        Some("let the service do it, and remove it here"),
                    );
                    is_fine = false;
                }
            }
        }
        is_fine.then_some(redirects_to_https)
    }
}

#[derive(Default)]
struct Router<'l> {
    rule: Option<&'l str>,
    service: Option<&'l str>,
    middlewares: Vec<&'l str>,
    is_secure: bool,
    has_resolver: bool,
}

#[derive(Default)]
struct Found<'l> {
    ports: BTreeMap<&'l str, u16>,
    middlewares: BTreeMap<&'l str, Middleware>,
}

#[derive(Clone, Copy)]
enum Middleware {
    RedirectsToHttps,
    IsDispensable,
    IsUnknown,
}

impl<'l> Found<'l> {
    fn add_middleware(&mut self, name: &'l str, kind: &str, rest: &[&str], value: &str) {
        let kind = kind.to_ascii_lowercase();
        let new = match (kind.as_str(), rest) {
            ("redirectscheme", ["scheme"]) if value == "https" => Middleware::RedirectsToHttps,
            // `permanent` and `port`.
            ("redirectscheme", _) => return,
            (kind, _) if DISPENSABLE.contains(&kind) => Middleware::IsDispensable,
            _ => Middleware::IsUnknown,
        };
        self.middlewares.insert(name, new);
    }
}

/// All of it must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Condition {
    host: Option<String>,
    path: Option<String>,
}

impl Condition {
    /// `None`: they never hold together.
    fn and(&self, other: &Condition) -> Option<Condition> {
        let host = match (&self.host, &other.host) {
            (Some(one), Some(two)) if one != two => return None,
            (one, two) => one.clone().or_else(|| two.clone()),
        };
        let path = match (&self.path, &other.path) {
            (Some(one), Some(two)) if one.starts_with(two.as_str()) => Some(one.clone()),
            (Some(one), Some(two)) if two.starts_with(one.as_str()) => Some(two.clone()),
            (Some(_), Some(_)) => return None,
            (one, two) => one.clone().or_else(|| two.clone()),
        };
        Some(Condition { host, path })
    }
}

/// The alternatives of a rule.
fn parse_rule(rule: &str) -> Result<Vec<Condition>, String> {
    let mut parser = Rule { rest: rule.trim(), depth: 0 };
    let conditions = parser.any()?;
    if !parser.rest.is_empty() {
        return Err(format!("what is meant by {:?}?", parser.rest));
    }
    if conditions.is_empty() {
        return Err("no request fits all of it".into());
    }
    Ok(conditions)
}

struct Rule<'r> {
    rest: &'r str,
    depth: u8,
}

impl<'r> Rule<'r> {
    fn takes(&mut self, token: &str) -> bool {
        let Some(rest) = self.rest.strip_prefix(token) else { return false };
        self.rest = rest.trim_start();
        true
    }

    fn any(&mut self) -> Result<Vec<Condition>, String> {
        let mut conditions = self.all()?;
        while self.takes("||") {
            conditions.extend(self.all()?);
            bound(&conditions)?;
        }
        Ok(conditions)
    }

    fn all(&mut self) -> Result<Vec<Condition>, String> {
        let mut conditions = self.one()?;
        while self.takes("&&") {
            let others = self.one()?;
            let pairs = conditions.iter().flat_map(|one| others.iter().filter_map(|other| one.and(other)));
            conditions = pairs.collect();
            bound(&conditions)?;
        }
        Ok(conditions)
    }

    fn one(&mut self) -> Result<Vec<Condition>, String> {
        if self.takes("(") {
            self.depth += 1;
            if self.depth > 8 {
                return Err("the parentheses are too deep".into());
            }
            let inside = self.any()?;
            self.depth -= 1;
            return if self.takes(")") { Ok(inside) } else { Err("a ) is missing".into()) };
        }
        let end = self.rest.find(|letter: char| !letter.is_ascii_alphanumeric()).unwrap_or(self.rest.len());
        let name = &self.rest[..end];
        if name.is_empty() {
            return Err(match self.rest.chars().next() {
                Some('!') => "negation with ! is not supported".into(),
                Some(_) => format!("what is meant by {:?}?", self.rest),
                None => "the rule ends early".into(),
            });
        }
        self.rest = self.rest[end..].trim_start();
        let values = self.values(name)?;
        let each =
            |read: fn(&str) -> Result<String, String>| values.iter().map(|value| read(value)).collect();
        match name.to_ascii_lowercase().as_str() {
            "host" | "hostheader" => {
                let hosts: Vec<String> = Result::from_iter::<Vec<_>>(each(read_host))?;
                Ok(hosts.into_iter().map(|host| Condition { host: Some(host), path: None }).collect())
            }
            "pathprefix" => {
                let paths: Vec<String> = Result::from_iter::<Vec<_>>(each(read_path))?;
                Ok(paths.into_iter().map(|path| Condition { host: None, path: Some(path) }).collect())
            }
            _ => Err(format!("{name} is not supported")),
        }
    }

    /// Quoted texts in parentheses.
    fn values(&mut self, name: &str) -> Result<Vec<&'r str>, String> {
        if !self.takes("(") {
            return Err(format!("{name} needs a value in parentheses"));
        }
        let mut values = Vec::new();
        loop {
            let quote = self.rest.chars().next().filter(|letter| "`\"'".contains(*letter));
            let quote = quote.ok_or_else(|| format!("the value of {name} needs quotes"))?;
            let inside = &self.rest[1..];
            let end = inside.find(quote).ok_or_else(|| format!("a quote of {name} is not closed"))?;
            values.push(&inside[..end]);
            self.rest = inside[end + 1..].trim_start();
            if self.takes(")") {
                return Ok(values);
            }
            if !self.takes(",") {
                return Err(format!("a ) of {name} is missing"));
            }
        }
    }
}

fn bound(conditions: &[Condition]) -> Result<(), String> {
    if conditions.len() > ROUTES_MAX { Err("the rule has too many alternatives".into()) } else { Ok(()) }
}

fn read_host(text: &str) -> Result<String, String> {
    let name = text.strip_prefix("*.").unwrap_or(text);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    if name.len() > 253 || !name.split('.').all(is_label) {
        return Err(format!("{text:?} is no host name"));
    }
    Ok(text.to_ascii_lowercase())
}

fn read_path(text: &str) -> Result<String, String> {
    let is_fine = text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'{');
    if is_fine { Ok(text.into()) } else { Err(format!("{text:?} is no path; it begins with /")) }
}

fn read_port(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|port| *port > 0).ok_or_else(|| format!("{text:?} is no port"))
}

fn read_tls(text: &str) -> Result<TlsSource, String> {
    match text {
        "cluster" => Ok(TlsSource::Cluster),
        "acme" => Ok(TlsSource::Acme),
        _ if SecretName::new(text).is_ok() && !text.contains('/') => Ok(TlsSource::Secret(text.into())),
        _ => Err(format!("{text:?} can't name a secret")),
    }
}

/// Why there can be no certificate for a route.
fn unprovable(host: Option<&str>, tls: &Option<TlsSource>) -> Option<String> {
    match (host, tls) {
        (None, Some(_)) => Some("needs a host: certificates are for names".into()),
        (Some(host), Some(TlsSource::Acme)) if host.starts_with('*') => {
            Some(format!("{host} is a wildcard, which can't be proved by HTTP"))
        }
        _ => None,
    }
}

fn read_switch(text: &str) -> Result<bool, String> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(format!("{text:?} is neither true nor false")),
    }
}

fn read_bytes(text: &str) -> Result<u64, String> {
    parse_bytes(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(labels: &[(&str, &str)]) -> IngressLabels {
        read_ingress_labels(&labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect())
    }

    /// `host path port`, one a line.
    fn short(found: &IngressLabels) -> Vec<String> {
        let show = |route: &RouteSpec| {
            let host = route.host.as_deref().unwrap_or("*");
            let port = route.port.map_or("-".to_string(), |port| port.to_string());
            let tls = match &route.tls {
                None => String::new(),
                Some(TlsSource::Secret(name)) => format!(" by {name}"),
                Some(TlsSource::Acme) => " by acme".into(),
                Some(TlsSource::Cluster) => " by cluster".into(),
            };
            let redirect = if route.redirects_to_https { " https" } else { "" };
            format!("{host} {} {port}{redirect}{tls}", route.path_prefix)
        };
        found.routes.iter().map(show).collect()
    }

    #[test]
    fn own_labels_make_routes() {
        for (labels, wanted) in [
            (vec![], vec![]),
            (vec![("com.example", "x")], vec![]),
            (vec![("tinydc.http.host", "Shop.example.org")], vec!["shop.example.org / -"]),
            (
                vec![
                    ("tinydc.http.host", "a.test, *.b.test"),
                    ("tinydc.http.path", "/api"),
                    ("tinydc.http.port", "8080"),
                    ("tinydc.http.redirect", "true"),
                ],
                vec!["*.b.test /api 8080 https", "a.test /api 8080 https"],
            ),
            (vec![("tinydc.http.path", "/")], vec!["* / -"]),
        ] {
            let found = read(&labels);
            assert_eq!(short(&found), wanted, "{labels:?}");
            assert_eq!(found.problems, [], "{labels:?}");
        }
        let limited = read(&[("tinydc.http.path", "/"), ("tinydc.http.body_max", "10m")]);
        assert_eq!(limited.routes[0].request_bytes_max, Some(10 << 20));
    }

    #[test]
    fn a_certificate_s_source_follows_from_the_labels() {
        let host = ("tinydc.http.host", "a.test");
        for (labels, wanted) in [
            (vec![host, ("tinydc.http.tls", "cluster")], "a.test / - https by cluster"),
            (vec![host, ("tinydc.http.tls", "acme")], "a.test / - https by acme"),
            (vec![host, ("tinydc.http.tls", "my-cert")], "a.test / - https by my-cert"),
            (
                vec![host, ("tinydc.http.tls", "acme"), ("tinydc.http.redirect", "false")],
                "a.test / - by acme",
            ),
            (
                vec![("tinydc.http.host", "*.a.test"), ("tinydc.http.tls", "cluster")],
                "*.a.test / - https by cluster",
            ),
        ] {
            let found = read(&labels);
            assert_eq!((short(&found), found.problems.len()), (vec![wanted.to_string()], 0), "{labels:?}");
        }
        let wildcard = read(&[("tinydc.http.host", "*.a.test"), ("tinydc.http.tls", "acme")]);
        assert!(wildcard.routes.is_empty() && wildcard.problems[0].message.contains("wildcard"));
        let rule = |router: &str| format!("traefik.http.routers.{router}.rule");
        for (key, value, wanted) in [
            ("traefik.http.routers.w.tls", "true", "a.test / - https by cluster"),
            ("traefik.http.routers.w.entrypoints", "web,websecure", "a.test / - https by cluster"),
            ("traefik.http.routers.w.entrypoints", "web", "a.test / -"),
            ("traefik.http.routers.w.tls.certresolver", "le", "a.test / - https by acme"),
        ] {
            assert_eq!(short(&read(&[(&rule("w"), "Host(`a.test`)"), (key, value)])), [wanted], "{key}");
        }
        // One router for HTTP, one for HTTPS.
        let two = read(&[
            (&rule("plain"), "Host(`a.test`)"),
            (&rule("secure"), "Host(`a.test`)"),
            ("traefik.http.routers.secure.tls", "true"),
        ]);
        assert_eq!(short(&two), ["a.test / - https by cluster"]);
        let any = read(&[(&rule("w"), "PathPrefix(`/`)"), ("traefik.http.routers.w.tls", "true")]);
        assert_eq!((any.routes.len(), any.problems[0].severity), (0, Severity::Error));
    }

    #[test]
    fn a_wrong_own_label_is_an_error_and_gives_no_route() {
        for (key, value) in [
            ("host", "a b"),
            ("host", ""),
            ("path", "api"),
            ("port", "0"),
            ("port", "http"),
            ("redirect", "yes"),
            ("body_max", "much"),
            ("tls", "a b"),
            // Without a host.
            ("tls", "cluster"),
            ("hosts", "a.test"),
        ] {
            let label = format!("tinydc.http.{key}");
            let mut labels = BTreeMap::from([("tinydc.http.path".to_string(), "/".to_string())]);
            labels.insert(label.clone(), value.to_string());
            let found = read_ingress_labels(&labels);
            assert_eq!(found.routes, [], "{label}={value}");
            assert_eq!((found.problems[0].severity, &found.problems[0].label), (Severity::Error, &label));
        }
        assert_eq!(read(&[("tinydc.http.port", "80")]).problems.len(), 1);
    }

    #[test]
    fn traefik_rules_make_routes() {
        for (rule, wanted) in [
            ("Host(`a.test`)", vec!["a.test / -"]),
            ("Host(`a.test`,`b.test`) && PathPrefix(`/x`)", vec!["a.test /x -", "b.test /x -"]),
            ("Host(\"a.test\") || Host('b.test')", vec!["a.test / -", "b.test / -"]),
            (
                "(Host(`a.test`) || Host(`b.test`)) && PathPrefix(`/x`, `/y`)",
                vec!["a.test /x -", "a.test /y -", "b.test /x -", "b.test /y -"],
            ),
            ("PathPrefix(`/a`) && PathPrefix(`/a/b`)", vec!["* /a/b -"]),
            ("Host(`A.test`)&&(PathPrefix(`/`))", vec!["a.test / -"]),
        ] {
            let found = read(&[("traefik.http.routers.web.rule", rule)]);
            assert_eq!(short(&found), wanted, "{rule}: {:?}", found.problems);
            assert_eq!(found.problems, [], "{rule}");
        }
    }

    #[test]
    fn a_rule_that_cannot_be_kept_gives_no_route() {
        for (rule, word) in [
            ("Host(`a.test`) && Method(`GET`)", "Method is not supported"),
            ("HostRegexp(`{x:.*}`)", "HostRegexp"),
            ("Path(`/x`)", "Path is not supported"),
            ("!Host(`a.test`)", "negation"),
            ("Host(`a.test`) && !PathPrefix(`/admin`)", "negation"),
            ("Host(`a.test`) && Host(`b.test`)", "no request fits"),
            ("Host(`a.test`", "a ) of Host is missing"),
            ("Host(a.test)", "needs quotes"),
            ("Host(`a.test", "not closed"),
            ("Host(`a.test`) Host(`b.test`)", "what is meant"),
            ("(Host(`a.test`)", "a ) is missing"),
            ("Host(`a.test`) &&", "ends early"),
            ("", "ends early"),
            ("((((((((((Host(`a.test`))))))))))", "too deep"),
            ("Host(`ä`)", "no host name"),
            ("PathPrefix(`/{id:[0-9]+}`)", "no path"),
        ] {
            let found = read(&[("traefik.http.routers.web.rule", rule)]);
            assert_eq!(found.routes, [], "{rule}");
            assert!(found.problems[0].message.contains(word), "{rule}: {:?}", found.problems);
            assert_eq!(found.problems[0].severity, Severity::Error);
        }
    }

    /// Else a login would be gone without a word.
    #[test]
    fn a_middleware_that_matters_gives_no_route() {
        for kind in
            ["basicauth.users", "forwardauth.address", "ipallowlist.sourcerange", "stripprefix.prefixes"]
        {
            let found = read(&[
                ("traefik.http.routers.web.rule", "Host(`a.test`)"),
                ("traefik.http.routers.web.middlewares", "mine"),
                (&format!("traefik.http.middlewares.mine.{kind}"), "x"),
            ]);
            assert_eq!((found.routes.len(), found.problems[0].severity), (0, Severity::Error), "{kind}");
        }
        let elsewhere = read(&[
            ("traefik.http.routers.web.rule", "Host(`a.test`)"),
            ("traefik.http.routers.web.middlewares", "auth@file"),
        ]);
        assert_eq!(elsewhere.routes, []);
    }

    #[test]
    fn traefik_ports_follow_the_router_s_service() {
        let rule = ("traefik.http.routers.web.rule", "Host(`a.test`)");
        let port = |name: &str| format!("traefik.http.services.{name}.loadbalancer.server.port");
        let only = read(&[rule, (&port("any"), "81")]);
        assert_eq!(short(&only), ["a.test / 81"]);
        let two = read(&[rule, (&port("any"), "81"), (&port("web"), "82")]);
        assert_eq!(short(&two), ["a.test / 82"]);
        let named = read(&[
            rule,
            ("traefik.http.routers.web.service", "any@docker"),
            (&port("any"), "81"),
            (&port("web"), "82"),
        ]);
        assert_eq!(short(&named), ["a.test / 81"]);
        assert_eq!(short(&read(&[rule, (&port("one"), "81"), (&port("two"), "82")])), ["a.test / -"]);
    }

    #[test]
    fn what_traefik_would_do_and_tinydc_does_not_is_said() {
        let found = read(&[
            ("traefik.enable", "true"),
            ("traefik.docker.network", "proxy"),
            ("traefik.http.routers.web.rule", "Host(`a.test`)"),
            ("traefik.http.routers.web.entrypoints", "websecure"),
            ("traefik.http.routers.web.tls.certresolver", "le"),
            ("traefik.http.routers.web.tls.domains[0].main", "a.test"),
            ("traefik.http.routers.web.middlewares", "small, secure@docker"),
            ("traefik.http.middlewares.secure.redirectscheme.scheme", "https"),
            ("traefik.http.middlewares.small.compress", "true"),
            ("traefik.tcp.routers.db.rule", "HostSNI(`*`)"),
        ]);
        assert_eq!(short(&found), ["a.test / - https by acme"]);
        let said: Vec<(&str, Severity)> =
            found.problems.iter().map(|problem| (problem.label.as_str(), problem.severity)).collect();
        assert_eq!(
            said,
            [
                ("traefik.http.routers.web.tls.domains[0].main", Severity::Ignored),
                ("traefik.tcp.routers.db.rule", Severity::Warning),
                ("traefik.http.routers.web.middlewares", Severity::Warning),
            ]
        );
        assert!(found.problems[2].message.contains("small"));
        let off = read(&[("traefik.enable", "false"), ("traefik.http.routers.web.rule", "Host(`a.test`)")]);
        assert_eq!(off, IngressLabels::default());
    }
}
