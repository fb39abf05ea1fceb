//! What changes in a request and an answer on their way through.
//!
//! Pure. Headers that speak of one connection end here (RFC 9110 7.6.1); who asked, for what and how is told to the
//! service in `X-Forwarded-*`, which a client can't forge. The only protocol that may take the place of HTTP is
//! WebSocket: in any other that an endpoint knows, `h2c` above all, a client could ask it for what no route leads to.
//! Framing is hyper's: what a client says of the body's length counts only as hyper has read it, so that no second
//! request hides in the first.
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

const HOP_BY_HOP: [HeaderName; 7] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("http2-settings"),
    TRANSFER_ENCODING,
    UPGRADE,
    EXPECT,
];
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
/// Compared with what servers make of a header's name.
const FORWARDED_PREFIX: &str = "x-forwarded-";
pub const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");

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

/// Whether a client wants to go on with WebSocket. Other protocols are not told to the endpoint, which then answers by
/// HTTP (RFC 9110 7.8).
pub fn wants_websocket(parts: &Parts) -> bool {
    let is_asked = parts.version == Version::HTTP_11 && has_token(&parts.headers, &CONNECTION, "upgrade");
    is_asked && is_websocket(&parts.headers)
}

pub fn is_websocket(headers: &HeaderMap) -> bool {
    has_token(headers, &UPGRADE, "websocket")
}

fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case(token))
}

/// Removes what speaks of one connection, also what `Connection` names.
fn remove_hop_by_hop(headers: &mut HeaderMap) {
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

/// Removes what a client says in the place of `X-Forwarded-*` (also of those that are not set here), `X-Real-IP` and
/// `Forwarded`. CGI, WSGI and Rack read `X_Forwarded_For` and `X-Forwarded-For` as one variable, some servers any other
/// sign. Other names with underscores pass: applications at home use them, and nothing here vouches for them.
fn remove_forwarded(headers: &mut HeaderMap) {
    let is_ours = |name: &&HeaderName| {
        let sign = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '-' };
        let read: String = name.as_str().chars().map(sign).collect();
        read.starts_with(FORWARDED_PREFIX) || read == REAL_IP.as_str() || read == FORWARDED.as_str()
    };
    let forged: Vec<HeaderName> = headers.keys().filter(is_ours).cloned().collect();
    for name in forged {
        headers.remove(name);
    }
}

/// Makes an endpoint's answer one for a client.
pub fn make_incoming(headers: &mut HeaderMap) {
    if headers.contains_key(TRANSFER_ENCODING) {
        // The body was read as its encoding says; the length beside it is false (RFC 9112 6.3).
        headers.remove(CONTENT_LENGTH);
    }
    remove_hop_by_hop(headers);
}

/// Makes a client's request one for an endpoint. `body_length`: as hyper has read it.
pub fn make_outgoing(
    parts: &mut Parts,
    target: &Target,
    arrival: Arrival,
    body_length: Option<u64>,
) -> Result<(), BadRequest> {
    let is_websocket = wants_websocket(parts);
    remove_hop_by_hop(&mut parts.headers);
    if is_websocket {
        parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        parts.headers.insert(UPGRADE, WEBSOCKET);
    }
    if body_length.is_none() {
        parts.headers.remove(CONTENT_LENGTH);
    }
    let headers = &mut parts.headers;
    remove_forwarded(headers);
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
                ("x-forwarded-prefix", "/evil"),
                ("x-forwarded-user", "root"),
                ("X_Forwarded_For", "10.0.0.1"),
                ("x.forwarded-proto", "http"),
                ("x_real_ip", "10.0.0.1"),
                ("api_key", "1"),
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
        let mut names: Vec<&str> = parts.headers.keys().map(HeaderName::as_str).collect();
        names.retain(|name| name.contains("forwarded") || name.contains('_'));
        names.sort_unstable();
        let own = ["x-forwarded-for", "x-forwarded-host", "x-forwarded-port", "x-forwarded-proto"];
        assert_eq!(names, [&["api_key"], &own[..]].concat());
    }

    #[test]
    fn no_other_protocol_than_websocket_is_told_to_an_endpoint() {
        for protocol in ["h2c", "tcp", "TLS/1.3", "HTTP/2.0"] {
            let connection = ("connection", "Upgrade, HTTP2-Settings");
            let asked =
                outgoing(&[connection, ("upgrade", protocol), ("http2-settings", "AAMAAABk")], Some(0));
            assert!(!asked.headers.contains_key(UPGRADE) && !asked.headers.contains_key(CONNECTION));
        }
        let both = [("connection", "upgrade"), ("upgrade", "h2c, WebSocket"), ("http2-settings", "AAMAAABk")];
        let both = outgoing(&both, Some(0));
        assert_eq!(both.headers[UPGRADE], WEBSOCKET);
        assert!(!both.headers.contains_key("http2-settings"));
    }

    #[test]
    fn a_length_beside_an_encoding_is_not_believed() {
        for (given, wanted) in [
            (vec![("content-length", "5"), ("transfer-encoding", "chunked")], None),
            // To HEAD, or with 304.
            (vec![("content-length", "5")], Some("5")),
        ] {
            let mut headers = parts("/", &given).headers;
            make_incoming(&mut headers);
            let found = headers.get(CONTENT_LENGTH).map(|value| value.to_str().unwrap());
            assert_eq!((found, headers.len()), (wanted, usize::from(wanted.is_some())));
        }
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
