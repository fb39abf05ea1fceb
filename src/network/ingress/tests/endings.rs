//! Endpoints that die, routes that go, sockets that close.

use super::kit::{Endpoint, Site, any_port, dead, route, until};
use crate::network::ingress::Routes;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

#[test]
fn a_dead_endpoint_is_passed_by() {
    let endpoint = Endpoint::start("web");
    let site = Site::plain(vec![route("/", &[dead(), endpoint.address, dead()])]);
    for _ in 0..6 {
        assert_eq!(site.get("/x").body, "web");
        // Nothing was sent, so a request with a body may go elsewhere too.
        let answer =
            site.connect().ask("POST /echo HTTP/1.1\r\nhost: shop.test\r\ncontent-length: 4\r\n\r\nbody");
        assert_eq!(answer.body, "body");
    }
}

#[test]
fn a_request_that_may_have_worked_is_not_sent_again() {
    let (one, two) = (Endpoint::start("one"), Endpoint::start("two"));
    let site = Site::plain(vec![route("/", &[one.address, two.address])]);
    let seen = || one.seen().len() + two.seen().len();
    for request in [
        "POST /close HTTP/1.1\r\nhost: shop.test\r\ncontent-length: 0\r\n\r\n",
        "PUT /close HTTP/1.1\r\nhost: shop.test\r\ncontent-length: 4\r\n\r\nbody",
    ] {
        let before = seen();
        assert_eq!(site.connect().ask(request).status, 502);
        assert_eq!(seen(), before + 1, "{request}");
    }
    // A question may be asked again.
    let before = seen();
    assert_eq!(site.get("/close").status, 502);
    assert_eq!(seen(), before + 2);
}

#[test]
fn a_connection_that_closed_while_it_waited_costs_no_request() {
    let endpoint = Endpoint::start("web");
    let site = Site::plain(vec![route("/", &[endpoint.address])]);
    for _ in 0..30 {
        assert_eq!(site.get("/once").status, 200);
        assert_eq!(site.get("/x").status, 200);
    }
}

/// The endpoint had decided to close before the request came.
#[test]
fn a_question_on_a_tired_connection_is_asked_again_on_a_fresh_one() {
    let endpoint = Endpoint::start("web");
    let site = Site::plain(vec![route("/", &[endpoint.address])]);
    assert_eq!(site.get("/x").status, 200);
    until("the connection waits", || site.counts().idle_connections == 1);
    assert_eq!(site.get("/fresh").body, "web");
    assert_eq!(endpoint.seen().len(), 3);
    assert_eq!(site.counts().routes[0].retries, 1);
}

#[test]
fn a_removed_endpoint_ends_what_it_began() {
    let (old, new) = (Endpoint::start("old"), Endpoint::start("new"));
    let site = Site::plain(vec![route("/", &[old.address])]);
    let mut client = site.connect();
    client.send("GET /wait HTTP/1.1\r\nhost: shop.test\r\n\r\n");
    until("it has the request", || old.seen().len() == 1);
    site.set(Routes { routes: vec![route("/", &[new.address])], ..any_port() });
    assert_eq!(site.get("/x").body, "new");
    old.open_gate();
    assert_eq!(client.answer().body, "old");
    assert_eq!(client.ask("GET /x HTTP/1.1\r\nhost: shop.test\r\n\r\n").body, "new");
    until("no connection to the old one is kept", || site.counts().idle_connections <= 1);
}

#[test]
fn the_ports_are_open_only_while_there_is_a_route() {
    let endpoint = Endpoint::start("web");
    let site = Site::start(Default::default(), any_port());
    assert!(!site.is_listening());
    site.set(Routes { routes: vec![route("/", &[endpoint.address])], ..any_port() });
    let port = site.port(false);
    let mut busy = site.connect();
    busy.send("GET /wait HTTP/1.1\r\nhost: shop.test\r\n\r\n");
    until("it has the request", || endpoint.seen().len() == 1);
    let mut idle = site.connect();
    assert_eq!(idle.ask("GET /x HTTP/1.1\r\nhost: shop.test\r\n\r\n").status, 200);
    site.set(any_port());
    until("nothing is accepted", || std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
    assert!(idle.rest().is_empty(), "a connection without a request is closed");
    endpoint.open_gate();
    assert_eq!(busy.answer().body, "web");
    assert!(busy.rest().is_empty());
}

#[test]
fn an_endpoint_that_stalls_in_its_answer_is_given_up() {
    let endpoint = Endpoint::start("web");
    let mut impatient = route("/", &[endpoint.address]);
    impatient.options.idle_limit = Duration::from_millis(200);
    let site = Site::plain(vec![impatient]);
    let mut client = site.connect();
    client.send("GET /half HTTP/1.1\r\nhost: shop.test\r\n\r\n");
    let begin = Instant::now();
    assert!(client.rest().ends_with(b"half"));
    assert!(begin.elapsed() < Duration::from_secs(5));
    until("nothing is on its way", || site.counts().routes[0].in_flight == 0);
}

#[test]
fn a_client_that_goes_takes_its_request_along() {
    let endpoint = Endpoint::start("web");
    let site = Site::plain(vec![route("/", &[endpoint.address])]);
    let mut client = site.connect();
    client.send("GET /wait HTTP/1.1\r\nhost: shop.test\r\n\r\n");
    until("it has the request", || endpoint.seen().len() == 1);
    drop(client);
    until("nothing is on its way", || site.counts().routes[0].in_flight == 0);
    assert_eq!(site.counts().connections, 0);
    assert_eq!(endpoint.connections.load(Ordering::Relaxed), 1);
}
