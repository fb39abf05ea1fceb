//! What passes, and how.

use super::kit::{Endpoint, LIMIT, Site, any_port, dead, header, route, until};
use crate::network::ingress::Routes;
use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

#[test]
fn a_request_reaches_its_service_and_says_who_asked() {
    let (web, api) = (Endpoint::start("web"), Endpoint::start("api"));
    let site = Site::plain(vec![route("/", &[web.address]), route("/api", &[api.address])]);
    let mut client = site.connect();
    let request = "GET /head?q=1 HTTP/1.1\r\nhost: Shop.test:99\r\nx-forwarded-for: 6.6.6.6\r\n\r\n";
    assert_eq!(client.ask(request).body, "web");
    let seen = web.seen().remove(0).to_lowercase();
    assert!(seen.starts_with("get /head?q=1 http/1.1"), "{seen}");
    for line in [
        "host: shop.test:99",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-proto: http",
        "x-forwarded-host: shop.test:99",
    ] {
        assert_eq!(seen.matches(&format!("\r\n{line}\r\n")).count(), 1, "{line} in {seen}");
    }
    assert!(!seen.contains("6.6.6.6"));
    // On the same connection, to another service.
    let answer = client.ask("GET /api/x HTTP/1.1\r\nhost: shop.test\r\n\r\n");
    assert_eq!((answer.status, answer.body.as_str()), (200, "api"));
    let counts = site.counts();
    let web = counts.routes.iter().find(|route| route.key.path_prefix.is_empty()).unwrap();
    assert_eq!((web.requests, web.answers, web.bytes_out), (1, [0, 1, 0, 0, 0], 3));
}

#[test]
fn why_there_is_no_answer_is_said_to_people_and_programs() {
    let endpoint = Endpoint::start("web");
    let mut slow = route("/slow", &[endpoint.address]);
    slow.options.response_limit = Duration::from_millis(200);
    let mut wait = route("/wait", &[endpoint.address]);
    wait.options.response_limit = Duration::from_millis(200);
    let routes = vec![
        route("/none", &[]),
        route("/dead", &[dead()]),
        wait,
        slow,
        route("/garbage", &[endpoint.address]),
    ];
    let site = Site::plain(routes);
    for (path, status, word) in [
        ("/nowhere", 404, "no service answers for shop.test/nowhere"),
        ("/none", 503, "no instance of web of app shop is ready"),
        ("/dead", 502, "can't be reached"),
        ("/garbage", 502, "broke off"),
        ("/wait", 504, "no answer in time"),
    ] {
        let answer = site.get(path);
        assert_eq!(answer.status, status, "{path}");
        assert!(answer.body.contains(word) && !answer.body.contains('<'), "{path}: {}", answer.body);
        let request = format!("GET {path} HTTP/1.1\r\nhost: shop.test\r\naccept: text/html\r\n\r\n");
        let page = site.connect().ask(&request);
        assert!(
            page.body.contains(word) && page.body.starts_with("<!doctype html>"),
            "{path}: {}",
            page.body
        );
    }
    assert_eq!(site.counts().unrouted, 2);
}

#[test]
fn connections_to_endpoints_are_used_again() {
    let endpoint = Endpoint::start("web");
    let site = Site::plain(vec![route("/", &[endpoint.address])]);
    for _ in 0..20 {
        assert_eq!(site.get("/x").body, "web");
        until("the connection waits", || site.counts().idle_connections == 1);
    }
    assert_eq!(endpoint.connections.load(Ordering::Relaxed), 1);
    until("idle connections are closed", || site.counts().idle_connections == 0);
}

#[test]
fn bodies_pass_whole_whatever_their_framing() {
    let endpoint = Endpoint::start("web");
    let site = Site::plain(vec![route("/", &[endpoint.address])]);
    let text: String = (0..400_000).map(|number| char::from(b'a' + (number % 23) as u8)).collect();
    let mut client = site.connect();
    let sized =
        format!("POST /echo HTTP/1.1\r\nhost: shop.test\r\ncontent-length: {}\r\n\r\n{text}", text.len());
    let answer = client.ask(&sized);
    assert!(answer.status == 200 && answer.body == text);
    let (one, two) = text.split_at(1000);
    let chunked = format!(
        "PUT /echo HTTP/1.1\r\nhost: shop.test\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{one}\r\n{:x}\r\n{two}\r\n0\r\n\r\n",
        one.len(),
        two.len()
    );
    let answer = client.ask(&chunked);
    assert!(answer.status == 200 && answer.body == text);
    let route = &site.counts().routes[0];
    assert_eq!((route.bytes_in, route.bytes_out), (800_000, 800_000));
}

#[test]
fn an_answer_streams_while_it_is_made() {
    let endpoint = Endpoint::start("web");
    let site = Site::plain(vec![route("/", &[endpoint.address])]);
    let mut client = site.connect();
    client.send("GET /stream HTTP/1.1\r\nhost: shop.test\r\n\r\n");
    while client.line() != "first\n" {}
    endpoint.open_gate();
    assert!(
        String::from_utf8_lossy(&{
            client.send("GET /x HTTP/1.1\r\nhost: shop.test\r\nconnection: close\r\n\r\n");
            client.rest()
        })
        .contains("last\n")
    );
}

#[test]
fn a_body_over_its_limit_is_refused() {
    let endpoint = Endpoint::start("web");
    let mut limited = route("/", &[endpoint.address]);
    limited.options.request_bytes_max = Some(10);
    let site = Site::plain(vec![limited]);
    let post = |framing: &str| format!("POST /echo HTTP/1.1\r\nhost: shop.test\r\n{framing}");
    let fits = site.connect().ask(&post("content-length: 10\r\n\r\n0123456789"));
    assert_eq!((fits.status, fits.body.as_str()), (200, "0123456789"));
    assert_eq!(site.connect().ask(&post("content-length: 11\r\n\r\n")).status, 413);
    assert_eq!(endpoint.seen().len(), 1);
    let chunked = post("transfer-encoding: chunked\r\n\r\n6\r\n012345\r\n6\r\n012345\r\n0\r\n\r\n");
    assert_eq!(site.connect().ask(&chunked).status, 413);
}

#[test]
fn a_websocket_passes_both_ways_until_both_have_ended() {
    let endpoint = Endpoint::start("web");
    let site = Site::plain(vec![route("/", &[endpoint.address])]);
    let mut client = site.connect();
    let answer = client.ask(
        "GET /ws HTTP/1.1\r\nhost: shop.test\r\nconnection: keep-alive, Upgrade\r\nupgrade: websocket\r\n\r\n",
    );
    assert_eq!((answer.status, header(&answer.head, "upgrade")), (101, Some("websocket")));
    for _ in 0..3 {
        client.send("ping\n");
        assert_eq!(client.line(), "ping\n");
    }
    assert_eq!(site.counts().connections, 1);
    client.stream.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.rest(), b"bye");
    until("the tunnel's place is free", || site.counts().connections == 0);
    // Nobody asked for another protocol here.
    assert_eq!(site.get("/ws").status, 502);
    let upgrade = "host: shop.test\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
    assert_eq!(site.connect().ask(&format!("GET /h2c HTTP/1.1\r\n{upgrade}")).status, 502, "not that one");
}

#[test]
fn an_answer_with_two_lengths_passes_whole() {
    let endpoint = Endpoint::start("web");
    let site = Site::plain(vec![route("/", &[endpoint.address])]);
    let answer = site.get("/two-lengths");
    assert_eq!((answer.body.as_str(), header(&answer.head, "content-length")), ("whole", None));
}

/// Two readings of where a request ends would let a client put words into the next one's mouth.
#[test]
fn a_request_hidden_in_another_is_not_passed_on() {
    let endpoint = Endpoint::start("web");
    let site = Site::plain(vec![route("/", &[endpoint.address])]);
    for framing in [
        "content-length: 4\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 4\r\n",
        "content-length: 4\r\ncontent-length: 60\r\n",
        "transfer-encoding: xchunked\r\n",
        "transfer-encoding: chunked, identity\r\n",
        "transfer-encoding : chunked\r\n",
        "content-length: +4\r\n",
    ] {
        let mut client = site.connect();
        client.send(format!(
            "POST /x HTTP/1.1\r\nhost: shop.test\r\n{framing}connection: close\r\n\r\n\
             0\r\n\r\nGET /hidden HTTP/1.1\r\nhost: shop.test\r\n\r\n"
        ));
        client.rest();
        for seen in endpoint.seen() {
            assert!(!seen.contains("/hidden"), "{framing}: {seen}");
            let framings =
                ["content-length", "transfer-encoding"].map(|name| seen.to_lowercase().contains(name));
            assert_ne!(framings, [true, true], "{framing}: {seen}");
        }
    }
}

#[test]
fn garbage_ends_its_own_connection_only() {
    let endpoint = Endpoint::start("web");
    let site = Site::plain(vec![route("/", &[endpoint.address])]);
    for garbage in [
        &b"\x16\x03\x01\x02\x00\x01\x00"[..],
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"CONNECT shop.test:443 HTTP/1.1\r\nhost: shop.test\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[b'x'; 100_000],
    ] {
        let mut client = site.connect();
        // It may be closed before all is written.
        let _ = client.stream.get_mut().write_all(garbage);
        let _ = client.stream.get_mut().shutdown(std::net::Shutdown::Write);
        let rest = client.rest();
        let reply = String::from_utf8_lossy(&rest);
        assert!(reply.is_empty() || reply.starts_with("HTTP/1.1 4"), "{reply}");
    }
    assert_eq!(site.get("/x").body, "web");
    assert_eq!(endpoint.seen().len(), 1);
}

#[test]
fn a_head_that_never_ends_is_an_error_of_the_endpoint() {
    let endpoint = Endpoint::start("web");
    let site = Site::plain(vec![route("/", &[endpoint.address])]);
    assert_eq!(site.get("/huge-head").status, 502);
}

#[test]
fn one_address_has_so_many_connections_and_no_more() {
    let endpoint = Endpoint::start("web");
    let site = Site::plain(vec![route("/", &[endpoint.address])]);
    let mut held: Vec<_> = (0..256).map(|_| site.connect()).collect();
    until("all are accepted", || site.counts().connections == 256);
    let refusal = site.connect().answer();
    assert_eq!((refusal.status, site.counts().refused), (503, 1));
    assert_eq!(held[0].ask("GET /x HTTP/1.1\r\nhost: shop.test\r\n\r\n").body, "web");
    held.truncate(10);
    until("places are free again", || site.counts().connections == 10);
    assert_eq!(site.get("/x").status, 200);
}

#[test]
fn challenges_are_answered_on_any_host() {
    let routes =
        Routes { challenges: [("token".to_string(), "token.thumb".to_string())].into(), ..any_port() };
    let site = Site::start(Default::default(), routes);
    assert_eq!(site.get("/.well-known/acme-challenge/token").body, "token.thumb");
    assert_eq!(site.get("/.well-known/acme-challenge/other").status, 404);
}

#[test]
fn an_upload_may_take_longer_than_the_answer() {
    let endpoint = Endpoint::start("web");
    let mut patient = route("/", &[endpoint.address]);
    patient.options.response_limit = Duration::from_millis(400);
    let site = Site::plain(vec![patient]);
    let mut client = site.connect();
    client.send("POST /echo HTTP/1.1\r\nhost: shop.test\r\ncontent-length: 8\r\n\r\n");
    let begin = Instant::now();
    for letter in ["a", "b", "c", "d", "e", "f", "g", "h"] {
        std::thread::sleep(Duration::from_millis(100));
        client.send(letter);
    }
    assert!(begin.elapsed() > Duration::from_millis(400));
    assert_eq!(client.answer().body, "abcdefgh");
    // One that stalls is given up.
    client.send("POST /echo HTTP/1.1\r\nhost: shop.test\r\ncontent-length: 8\r\n\r\na");
    client.stream.get_ref().set_read_timeout(Some(LIMIT)).unwrap();
    let mut byte = [0];
    client.stream.read_exact(&mut byte).unwrap();
    assert!(begin.elapsed() < LIMIT);
}
