//! HTTPS: which certificate, which version, and the way there.

use super::kit::{Client, Endpoint, LIMIT, Site, any_port, header, route, until};
use crate::network::ingress::{
    CertificateError, HostCertificate, IngressConfig, Routes, certificate_from_pem, covers,
};
use crate::tasks::within;
use async_executor::Executor;
use async_io::Async;
use bytes::Bytes;
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use futures_rustls::TlsConnector;
use http_body_util::{BodyExt, Empty, Full};
use hyper::client::conn::http2::SendRequest;
use hyper::{Request, Version};
use rustls::pki_types::{CertificateDer, ServerName};
use smol_hyper::rt::{FuturesIo, SmolExecutor};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

struct Pair {
    chain: String,
    key: String,
    der: CertificateDer<'static>,
}

fn pair(host: &str) -> Pair {
    let made = rcgen::generate_simple_self_signed([host.to_string()]).unwrap();
    Pair { chain: made.cert.pem(), key: made.signing_key.serialize_pem(), der: made.cert.der().clone() }
}

fn given(host: &str, pair: &Pair) -> HostCertificate {
    HostCertificate { host: host.into(), certificate: certificate_from_pem(&pair.chain, &pair.key).unwrap() }
}

type Tls = futures_rustls::client::TlsStream<Async<TcpStream>>;

/// A handshake that trusts only this certificate.
async fn connect(port: u16, host: &str, trusted: &Pair, alpn: &[&[u8]]) -> std::io::Result<Tls> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.der.clone()).map_err(std::io::Error::other)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(std::io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let stream = Async::<TcpStream>::connect(SocketAddr::from(([127, 0, 0, 1], port))).await?;
    let name = ServerName::try_from(host.to_string()).map_err(std::io::Error::other)?;
    let handshake = TlsConnector::from(Arc::new(config)).connect(name, stream);
    within(LIMIT, handshake).await.expect("a handshake in time")
}

#[test]
fn each_host_shows_its_own_certificate() {
    let (shop, wild, other) = (pair("shop.test"), pair("x.wild.test"), pair("other.test"));
    let endpoint = Endpoint::start("web");
    let certificates =
        vec![given("Shop.test", &shop), given("*.wild.test", &wild), given("other.test", &other)];
    let routes = vec![route("/", &[endpoint.address])];
    let site = Site::start(Default::default(), Routes { routes, certificates, ..any_port() });
    let port = site.port(true);
    async_io::block_on(async {
        for (host, trusted) in [("shop.test", &shop), ("x.wild.test", &wild), ("other.test", &other)] {
            assert!(connect(port, host, trusted, &[]).await.is_ok(), "{host}");
        }
        assert!(
            connect(port, "shop.test", &other, &[]).await.is_err(),
            "another host's certificate was shown"
        );
        assert!(connect(port, "nobody.test", &shop, &[]).await.is_err());
        assert!(connect(port, "127.0.0.1", &other, &[]).await.is_err(), "an address names no host");
    });
    assert!(site.counts().failed_handshakes >= 1);
}

#[test]
fn http2_carries_many_requests_at_once() {
    let shop = pair("shop.test");
    let endpoint = Endpoint::start("web");
    let certificates = vec![given("shop.test", &shop)];
    let routes = vec![route("/", &[endpoint.address])];
    let site = Site::start(Default::default(), Routes { routes, certificates, ..any_port() });
    let executor = Arc::new(async_executor::Executor::new());
    let work = async {
        let stream = connect(site.port(true), "shop.test", &shop, &[b"h2", b"http/1.1"]).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let (sender, connection) = hyper::client::conn::http2::handshake::<_, _, Full<Bytes>>(
            SmolExecutor::new(executor.clone()),
            FuturesIo::new(stream),
        )
        .await
        .unwrap();
        executor.spawn(connection).detach();
        let text = "x".repeat(100_000);
        let tasks: Vec<_> = (0..20)
            .map(|_| {
                let (mut sender, text) = (sender.clone(), text.clone());
                executor.spawn(async move {
                    let request = Request::post("https://shop.test/echo").body(Full::from(text)).unwrap();
                    let response = sender.send_request(request).await.unwrap();
                    assert_eq!(
                        (response.status(), response.version()),
                        (200.try_into().unwrap(), Version::HTTP_2)
                    );
                    response.into_body().collect().await.unwrap().to_bytes()
                })
            })
            .collect();
        for task in tasks {
            assert_eq!(task.await, text);
        }
        let request = Request::get("https://shop.test/head").header("cookie", "a=1").header("cookie", "b=2");
        let response = sender.clone().send_request(request.body(Full::default()).unwrap()).await.unwrap();
        let seen = response.into_body().collect().await.unwrap().to_bytes();
        let seen = String::from_utf8_lossy(&seen).to_lowercase();
        for line in ["host: shop.test\r\n", "x-forwarded-proto: https", "cookie: a=1; b=2"] {
            assert!(seen.contains(line), "{line} in {seen}");
        }
    };
    async_io::block_on(executor.run(within(LIMIT, work))).expect("in time");
}

/// A site with one route and a certificate, and a client's executor.
fn http2_site(config: IngressConfig, endpoint: &Endpoint, shop: &Pair) -> (Site, Arc<Executor<'static>>) {
    let certificates = vec![given("shop.test", shop)];
    let routes = vec![route("/", &[endpoint.address])];
    (Site::start(config, Routes { routes, certificates, ..any_port() }), Arc::default())
}

/// A connection whose streams have a window of so many bytes.
async fn http2(
    site: &Site,
    shop: &Pair,
    executor: &Arc<Executor<'static>>,
    window: u32,
) -> SendRequest<Full<Bytes>> {
    let stream = connect(site.port(true), "shop.test", shop, &[b"h2"]).await.unwrap();
    let (sender, connection) = hyper::client::conn::http2::Builder::new(SmolExecutor::new(executor.clone()))
        .initial_stream_window_size(window)
        .handshake(FuturesIo::new(stream))
        .await
        .unwrap();
    executor.spawn(connection).detach();
    sender
}

fn get(path: &str) -> Request<Full<Bytes>> {
    Request::get(format!("https://shop.test{path}")).body(Full::default()).unwrap()
}

#[test]
fn many_streams_of_one_client_do_not_take_all_connections_to_endpoints() {
    let (shop, endpoint) = (pair("shop.test"), Endpoint::start("web"));
    let (site, executor) = http2_site(Default::default(), &endpoint, &shop);
    let work = async {
        let mut asked = Vec::new();
        for _ in 0..5 {
            let mut sender = http2(&site, &shop, &executor, 65_535).await;
            for _ in 0..60 {
                let answer = sender.send_request(get("/wait"));
                asked.push(executor.spawn(async move { answer.await.unwrap().status().as_u16() }));
            }
        }
        let refused = || asked.iter().filter(|task| task.is_finished()).count();
        while refused() < 44 {
            async_io::Timer::after(Duration::from_millis(5)).await;
        }
        assert_eq!(site.counts().routes[0].in_flight, 256);
        assert!(endpoint.connections.load(Ordering::Relaxed) <= 256);
        endpoint.open_gate();
        let mut statuses = Vec::new();
        for task in asked {
            statuses.push(task.await);
        }
        let count = |wanted: u16| statuses.iter().filter(|status| **status == wanted).count();
        assert_eq!((count(200), count(503), site.counts().refused), (256, 44, 44));
    };
    async_io::block_on(executor.run(within(LIMIT, work))).expect("in time");
    until("places are free again", || site.counts().routes[0].in_flight == 0);
}

#[test]
fn a_stream_whose_client_takes_nothing_is_ended_and_its_connection_goes_on() {
    let (shop, endpoint) = (pair("shop.test"), Endpoint::start("web"));
    let config = IngressConfig { stalled_limit: Duration::from_millis(600), ..Default::default() };
    let (site, executor) = http2_site(config, &endpoint, &shop);
    let work = async {
        let mut closed = http2(&site, &shop, &executor, 0).await;
        let stalled = closed.send_request(get("/x")).await.unwrap();
        assert_eq!((stalled.status(), site.counts().routes[0].in_flight), (200.try_into().unwrap(), 1));
        let reset = stalled.into_body().collect().await.unwrap_err();
        assert!(format!("{reset:?}").contains("CANCEL"), "{reset:?}");
        assert_eq!(site.counts().routes[0].in_flight, 0);
        assert_eq!(closed.send_request(get("/x")).await.unwrap().status(), 200);
        // An endpoint that takes its time is another matter.
        let slow = http2(&site, &shop, &executor, 65_535).await.send_request(get("/stream")).await.unwrap();
        async_io::Timer::after(Duration::from_secs(2)).await;
        endpoint.open_gate();
        assert_eq!(slow.into_body().collect().await.unwrap().to_bytes(), "first\nlast\n");
    };
    async_io::block_on(executor.run(within(LIMIT, work))).expect("in time");
}

#[test]
fn http1_passes_by_tls_too() {
    let shop = pair("shop.test");
    let endpoint = Endpoint::start("web");
    let certificates = vec![given("shop.test", &shop)];
    let routes = vec![route("/", &[endpoint.address])];
    let site = Site::start(Default::default(), Routes { routes, certificates, ..any_port() });
    let executor = Arc::new(async_executor::Executor::new());
    let work = async {
        let stream = connect(site.port(true), "shop.test", &shop, &[b"http/1.1"]).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(FuturesIo::new(stream)).await.unwrap();
        executor.spawn(connection).detach();
        let request = Request::get("/x").header("host", "shop.test").body(Empty::<Bytes>::new()).unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "web");
    };
    async_io::block_on(executor.run(within(LIMIT, work))).expect("in time");
}

#[test]
fn a_websocket_passes_by_tls_too() {
    let shop = pair("shop.test");
    let endpoint = Endpoint::start("web");
    let certificates = vec![given("shop.test", &shop)];
    let routes = vec![route("/", &[endpoint.address])];
    let site = Site::start(Default::default(), Routes { routes, certificates, ..any_port() });
    let work = async {
        let mut stream = connect(site.port(true), "shop.test", &shop, &[b"http/1.1"]).await.unwrap();
        let ask = "GET /ws HTTP/1.1\r\nhost: shop.test\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
        stream.write_all(ask.as_bytes()).await.unwrap();
        let mut seen = Vec::new();
        for (sent, wanted) in [("", "\r\n\r\n"), ("ping\n", "ping\n"), ("pong\n", "pong\n")] {
            stream.write_all(sent.as_bytes()).await.unwrap();
            while !seen.ends_with(wanted.as_bytes()) {
                let mut byte = [0];
                stream.read_exact(&mut byte).await.unwrap();
                seen.push(byte[0]);
            }
        }
        assert!(seen.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&seen));
    };
    async_io::block_on(within(LIMIT, work)).expect("in time");
}

#[test]
fn a_certificate_is_for_the_hosts_that_it_names() {
    let certificate = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        certificate_from_pem(&made.cert.pem(), &made.signing_key.serialize_pem()).unwrap()
    };
    let shop = certificate(&["shop.test", "*.wild.test"]);
    let about = covers(&shop, "shop.test").unwrap();
    assert_eq!(about.names, ["shop.test", "*.wild.test"]);
    assert!(about.not_before < about.not_after);
    assert!(covers(&shop, "*.wild.test").is_ok() && covers(&shop, "x.wild.test").is_ok());
    for other in ["other.test", "*.shop.test", "wild.test"] {
        let refused = covers(&shop, other).unwrap_err();
        assert_eq!(refused.to_string(), "it is for shop.test, *.wild.test", "{other}");
    }
}

#[test]
fn plain_requests_are_sent_to_https_where_there_is_a_certificate() {
    let shop = pair("shop.test");
    let endpoint = Endpoint::start("web");
    let mut redirecting = route("/", &[endpoint.address]);
    redirecting.options.redirects_to_https = true;
    let routes = Routes {
        routes: vec![redirecting],
        certificates: vec![given("shop.test", &shop)],
        https_port: 443,
        ..any_port()
    };
    // Port 443 isn't ours in a test; the table holds all the same.
    let site = Site::start(Default::default(), any_port());
    site.set_anyway(routes);
    let ask = |host: &str, path: &str| {
        Client::new(site.port(false)).ask(&format!("GET {path} HTTP/1.1\r\nhost: {host}:8080\r\n\r\n"))
    };
    let answer = ask("shop.test", "/a?b");
    assert_eq!((answer.status, header(&answer.head, "location")), (307, Some("https://shop.test/a?b")));
    assert_eq!(ask("other.test", "/a?b").status, 200);
}

#[test]
fn a_certificate_that_is_none_is_refused_with_its_reason() {
    let (one, two) = (pair("one.test"), pair("two.test"));
    assert!(certificate_from_pem(&one.chain, &one.key).is_ok());
    assert!(matches!(certificate_from_pem("", &one.key), Err(CertificateError::NoCertificate)));
    assert!(matches!(certificate_from_pem(&one.chain, "x"), Err(CertificateError::Key(_))));
    assert!(matches!(certificate_from_pem(&one.chain, &two.key), Err(CertificateError::Pair(_))));
}
