//! What changes in a request and an answer on their way through.
//!
//! Pure. Headers that speak of one connection end here (RFC 9110 7.6.1); who asked, for what and how is told to the
//! service in `X-Forwarded-*`, which a client can't forge. Framing is hyper's: what a client says of the body's length
//! counts only as hyper has read it, so that no second request hides in the first.
//!
//! Invariant: no header of one connection reaches the other side (`headers_of_one_connection_end_here`).

use hyper::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue, TE,
    TRANSFER_ENCODING, UPGRADE,
};
use hyper::http::request::Parts;
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Uri, Version};
use std::net::IpAddr;

const HOP_BY_HOP: [HeaderName; 6] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    TRANSFER_ENCODING,
    UPGRADE,
    EXPECT,
];
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");

/// Whom a request names: as it was written, and its host for the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub authority: HeaderValue,
    pub host: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadRequest {
    NoHost,
    TwoHosts,
    BadHost,
    /// CONNECT, which asks for a tunnel to anywhere.
    Tunnel,
}

impl BadRequest {
    pub fn text(self) -> &'static str {
        match self {
            BadRequest::NoHost => "the request names no host",
            BadRequest::TwoHosts => "the request names two hosts",
            BadRequest::BadHost => "the request's host is no name",
            BadRequest::Tunnel => "this server makes no tunnels",
        }
    }
}

/// From the request line if it names one (HTTP/2 does), else from `Host` (RFC 9112 3.2).
pub fn target_of(parts: &Parts) -> Result<Target, BadRequest> {
    if parts.method == Method::CONNECT {
        return Err(BadRequest::Tunnel);
    }
    let mut hosts = parts.headers.get_all(HOST).iter();
    let (first, second) = (hosts.next(), hosts.next());
    if second.is_some() {
        return Err(BadRequest::TwoHosts);
    }
    let authority = match parts.uri.authority() {
        Some(authority) => HeaderValue::from_str(authority.as_str()).map_err(|_| BadRequest::BadHost)?,
        None => first.cloned().ok_or(BadRequest::NoHost)?,
    };
    let text = authority.to_str().map_err(|_| BadRequest::BadHost)?;
    let host = host_of(text).ok_or(BadRequest::BadHost)?;
    Ok(Target { authority, host })
}

/// Lower case, without port and without the dot of the root.
fn host_of(authority: &str) -> Option<String> {
    if authority.contains(['@', '/', ' ', ',', '\\']) {
        return None;
    }
    let host = match authority.strip_prefix('[') {
        Some(address) => address.split_once(']')?.0,
        None => authority.split_once(':').map_or(authority, |(host, _)| host),
    };
    Some(host.trim_end_matches('.').to_ascii_lowercase())
}

/// Where a request came in.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    pub client: IpAddr,
    pub is_tls: bool,
    pub port: u16,
}

/// The protocol that a client wants to switch to.
pub fn wanted_upgrade(parts: &Parts) -> Option<HeaderValue> {
    let is_asked = parts.version == Version::HTTP_11 && has_token(&parts.headers, &CONNECTION, "upgrade");
    parts.headers.get(UPGRADE).filter(|_| is_asked).cloned()
}

fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case(token))
}

/// Removes what speaks of one connection, also what `Connection` names.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
    let takes_trailers = has_token(headers, &TE, "trailers");
    headers.remove(TE);
    if takes_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Makes a client's request one for an endpoint. `body_length`: as hyper has read it.
pub fn make_outgoing(
    parts: &mut Parts,
    target: &Target,
    arrival: Arrival,
    body_length: Option<u64>,
) -> Result<(), BadRequest> {
    let upgrade = wanted_upgrade(parts);
    remove_hop_by_hop(&mut parts.headers);
    if let Some(protocol) = upgrade {
        parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        parts.headers.insert(UPGRADE, protocol);
    }
    if body_length.is_none() {
        parts.headers.remove(CONTENT_LENGTH);
    }
    let headers = &mut parts.headers;
    headers.remove(FORWARDED);
    let client = HeaderValue::from_str(&arrival.client.to_string()).map_err(|_| BadRequest::BadHost)?;
    headers.insert(FORWARDED_FOR, client.clone());
    headers.insert(REAL_IP, client);
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static(if arrival.is_tls { "https" } else { "http" }));
    headers.insert(FORWARDED_HOST, target.authority.clone());
    headers.insert(FORWARDED_PORT, HeaderValue::from(arrival.port));
    headers.insert(HOST, target.authority.clone());
    join_cookies(headers);
    let path = parts.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    parts.uri = Uri::from(path);
    parts.version = Version::HTTP_11;
    Ok(())
}

/// HTTP/2 may send each cookie by itself (RFC 9113 8.2.3), which HTTP/1.1 forbids.
fn join_cookies(headers: &mut HeaderMap) {
    let name = hyper::header::COOKIE;
    let crumbs: Vec<&[u8]> = headers.get_all(&name).iter().map(HeaderValue::as_bytes).collect();
    if crumbs.len() > 1
        && let Ok(whole) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]))
    {
        headers.insert(name, whole);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::Request;

    fn parts(uri: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn the_host_is_read_from_where_the_version_puts_it() {
        for (uri, headers, wanted) in [
            ("/x", vec![("host", "Shop.Example.org:8080")], Ok("shop.example.org")),
            ("/x", vec![("host", "shop.example.org.")], Ok("shop.example.org")),
            ("http://a.example/x", vec![("host", "b.example")], Ok("a.example")),
            ("/x", vec![("host", "[2001:DB8::1]:80")], Ok("2001:db8::1")),
            ("/x", vec![("host", "10.0.0.1")], Ok("10.0.0.1")),
            ("/x", vec![], Err(BadRequest::NoHost)),
            ("/x", vec![("host", "a"), ("host", "b")], Err(BadRequest::TwoHosts)),
            ("/x", vec![("host", "a@b")], Err(BadRequest::BadHost)),
            ("/x", vec![("host", "a, b")], Err(BadRequest::BadHost)),
        ] {
            let found = target_of(&parts(uri, &headers)).map(|target| target.host);
            assert_eq!(found, wanted.map(String::from), "{uri} {headers:?}");
        }
    }

    fn outgoing(headers: &[(&str, &str)], body_length: Option<u64>) -> Parts {
        let mut parts = parts("http://shop.example/a?b=c", headers);
        let target = target_of(&parts).unwrap();
        let arrival = Arrival { client: "192.0.2.7".parse().unwrap(), is_tls: true, port: 443 };
        make_outgoing(&mut parts, &target, arrival, body_length).unwrap();
        parts
    }

    #[test]
    fn headers_of_one_connection_end_here() {
        let parts = outgoing(
            &[
                ("connection", "close, X-Secret"),
                ("x-secret", "1"),
                ("keep-alive", "timeout=5"),
                ("proxy-connection", "x"),
                ("te", "gzip, trailers"),
                ("transfer-encoding", "chunked"),
                ("content-length", "5"),
                ("upgrade", "h2c"),
                ("expect", "100-continue"),
                ("accept", "a"),
            ],
            None,
        );
        let mut left: Vec<&str> = parts.headers.keys().map(HeaderName::as_str).collect();
        left.retain(|name| !name.starts_with("x-forwarded") && *name != "x-real-ip");
        left.sort_unstable();
        assert_eq!(left, ["accept", "host", "te"]);
        assert_eq!(parts.headers[TE], "trailers");
        assert_eq!(parts.uri, "/a?b=c");
    }

    #[test]
    fn a_client_cannot_say_who_it_is() {
        let parts = outgoing(
            &[
                ("x-forwarded-for", "10.0.0.1"),
                ("x-forwarded-proto", "http"),
                ("x-forwarded-host", "evil"),
                ("x-real-ip", "10.0.0.1"),
                ("forwarded", "for=10.0.0.1"),
            ],
            Some(0),
        );
        for (name, wanted) in [
            ("x-forwarded-for", "192.0.2.7"),
            ("x-real-ip", "192.0.2.7"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "shop.example"),
            ("x-forwarded-port", "443"),
            ("host", "shop.example"),
        ] {
            let all: Vec<_> = parts.headers.get_all(name).iter().collect();
            assert_eq!(all, [wanted], "{name}");
        }
        assert!(!parts.headers.contains_key("forwarded"));
    }

    #[test]
    fn an_upgrade_passes_only_if_the_connection_asks_for_it() {
        let asked = outgoing(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")], Some(0));
        assert_eq!(
            (&asked.headers[CONNECTION], &asked.headers[UPGRADE]),
            (&"upgrade".parse().unwrap(), &"websocket".parse().unwrap())
        );
        let not_asked = outgoing(&[("upgrade", "websocket")], Some(0));
        assert!(!not_asked.headers.contains_key(UPGRADE));
    }

    #[test]
    fn cookies_in_pieces_become_one() {
        assert_eq!(outgoing(&[("cookie", "a=1"), ("cookie", "b=2")], Some(0)).headers["cookie"], "a=1; b=2");
    }
}
