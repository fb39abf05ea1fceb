//! The names and who sees them, then the server on loopback with upstreams that drop, lie and cut.

use super::encode::encode;
use super::exchange::{read_message, write_message};
use super::resolve::{Answer, Data, TTL_SECONDS, resolve};
use super::wire::{self, Code, Query, Question, class, kind};
use super::zone::{Client, Endpoint, Range, ServiceNames, ServicePort, Zone, ZoneTable};
use super::{DnsConfig, DnsServer, UpstreamSource};
use crate::model::{ClusterId, Protocol, UlaPrefix};
use async_executor::Executor;
use async_io::Async;
use futures_lite::future;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

fn ip(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

fn service(app: &str, name: &str, number: u8, networks: &[(&str, &[&str])]) -> ServiceNames {
    let networks = networks.iter().map(|(network, aliases)| {
        (network.to_string(), aliases.iter().map(|alias| alias.to_string()).collect())
    });
    let endpoint = |slot: u32, is_serving| Endpoint {
        slot,
        address: Ipv4Addr::new(10, 77, number, 10 + slot as u8),
        is_serving,
    };
    ServiceNames {
        app: app.into(),
        service: name.into(),
        vip: Some(Ipv4Addr::new(10, 78, 0, number)),
        networks: networks.collect(),
        container_name: None,
        endpoints: vec![endpoint(1, true), endpoint(2, true), endpoint(3, false)],
        ports: vec![ServicePort { protocol: Protocol::Tcp, port: 8080, name: Some("http".into()) }],
    }
}

const WEB: &str = "10.77.1.11";
const DB: &str = "10.77.2.11";
const INNER: &str = "10.77.1.9";
const BLOG: &str = "10.77.3.11";
const HOST: &str = "10.77.1.1";

/// `shop`: web on front, db on back and on the shared `lan`; `blog`: web and db on its own and on `lan`.
fn zone() -> Zone {
    let mut db = service("shop", "db", 2, &[("shop/back", &["postgres"]), ("lan", &["store"])]);
    db.container_name = Some("Shop-DB".into());
    let mut api = service("shop", "api", 5, &[("shop/front", &[]), ("shop/back", &[])]);
    api.vip = None;
    api.ports.push(ServicePort { protocol: Protocol::Udp, port: 53, name: None });
    let services = vec![
        service("shop", "web", 1, &[("shop/front", &["www"])]),
        db,
        service("blog", "web", 3, &[("blog/default", &[]), ("lan", &["weblog"])]),
        service("blog", "db", 4, &[("blog/default", &[])]),
        api,
        service("blog", "Odd_1.x", 6, &[("lan", &["store"])]),
        service("blog", "tasks.web", 7, &[("blog/default", &[])]),
    ];
    let client = |app: &str, networks: &[&str]| Client {
        app: app.into(),
        networks: networks.iter().map(|network| network.to_string()).collect(),
        is_inner: networks == ["vault"],
    };
    let clients = BTreeMap::from([
        (ip(WEB), client("shop", &["shop/front"])),
        (ip(DB), client("shop", &["shop/back", "lan"])),
        (ip(BLOG), client("blog", &["blog/default", "lan"])),
        (ip(INNER), client("shop", &["vault"])),
    ]);
    let ranges =
        vec![Range { address: ip("10.77.0.0"), bits: 16 }, Range { address: ip("10.78.0.0"), bits: 16 }];
    Zone::new(ZoneTable { clients, services, ranges, bridge: ip(HOST), ula_prefix: None })
}

fn dual_stack_zone() -> Zone {
    let cluster = ClusterId(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10);
    Zone::new(ZoneTable { ula_prefix: Some(UlaPrefix::of(cluster)), ..zone().table().clone() })
}

fn ask(asker: &str, name: &str, kind: u16) -> Answer {
    ask_in(&zone(), asker, name, kind)
}

fn ask_in(zone: &Zone, asker: &str, name: &str, kind: u16) -> Answer {
    resolve(zone, ip(asker), &Question { name: name.into(), kind, class: class::INTERNET })
}

#[test]
fn with_ipv6_each_address_has_another_that_embeds_it() {
    let zone = dual_stack_zone();
    let at = |address: &str| {
        let address = UlaPrefix::of(ClusterId(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10)).embed(ip(address));
        let digits: Vec<String> =
            format!("{:032x}", u128::from(address)).chars().rev().map(String::from).collect();
        format!("{}.ip6.arpa", digits.join("."))
    };
    let vip_name = at("10.78.0.3");
    let endpoint_name = at("10.77.3.11");
    for (asker, name, kind, wanted) in [
        (BLOG, "web", kind::A, "10.78.0.3"),
        (BLOG, "web", kind::AAAA, "fd01:203:405::a4e:3"),
        (BLOG, "tasks.db", kind::AAAA, "fd01:203:405::a4d:40b fd01:203:405::a4d:40c"),
        (BLOG, "3.db", kind::AAAA, "fd01:203:405::a4d:40d"),
        (WEB, "db", kind::AAAA, "none"),
        (BLOG, vip_name.as_str(), kind::PTR, "web.blog.tinydc.internal"),
        (BLOG, endpoint_name.as_str(), kind::PTR, "1.web.blog.tinydc.internal"),
        (WEB, vip_name.as_str(), kind::PTR, "none"),
        (BLOG, at("10.77.9.9").as_str(), kind::PTR, "none"),
        (BLOG, at("192.0.2.1").as_str(), kind::PTR, "up"),
        (BLOG, "1.0.0.2.ip6.arpa", kind::PTR, "up"),
    ] {
        assert_eq!(in_short(ask_in(&zone, asker, name, kind)), wanted, "{name} {kind} by {asker}");
    }
    let Answer::Found { additional, .. } = ask_in(&zone, BLOG, "_http._tcp.web", kind::SRV) else {
        panic!("there is a port");
    };
    let addresses: Vec<String> = additional.iter().map(|target| target.address.to_string()).collect();
    assert_eq!(addresses, ["10.78.0.3", "fd01:203:405::a4e:3"]);
}

/// In one line: addresses, `empty`, `none`, `up` (asked upstream).
fn short(asker: &str, name: &str, kind: u16) -> String {
    in_short(ask(asker, name, kind))
}

fn in_short(answer: Answer) -> String {
    match answer {
        Answer::Found { data, .. } => {
            let show = |data: &Data| match data {
                Data::Address(address) => address.to_string(),
                Data::Service { port, target } => format!("{target}:{port}"),
                Data::Pointer(name) => name.clone(),
                Data::Host => "hinfo".into(),
            };
            data.iter().map(show).collect::<Vec<_>>().join(" ")
        }
        Answer::Empty { .. } => "empty".into(),
        Answer::NoSuchName { .. } => "none".into(),
        Answer::Refused => "refused".into(),
        Answer::TooEarly => "early".into(),
        Answer::Elsewhere => "up".into(),
    }
}

#[test]
fn a_name_means_the_closest_service() {
    for (asker, name, wanted) in [
        // The asker's own app first, though the other's is on a common network too.
        (BLOG, "web", "10.78.0.3"),
        (BLOG, "db", "10.78.0.4"),
        (BLOG, "db.shop", "10.78.0.2"),
        (BLOG, "db.shop.tinydc.internal", "10.78.0.2"),
        (BLOG, "db.blog.tinydc.internal", "10.78.0.4"),
        // Another app's service, by name over the common network.
        (DB, "web", "10.78.0.3"),
        (DB, "weblog", "10.78.0.3"),
        (DB, "odd_1.x", "10.78.0.6"),
        (DB, "odd_1.x.blog.tinydc.internal", "10.78.0.6"),
        // Names of several: the own app's wins, else all.
        (DB, "store", "10.78.0.2"),
        (BLOG, "store", "10.78.0.6"),
        (DB, "postgres", "10.78.0.2"),
        (DB, "shop-db", "10.78.0.2"),
        (BLOG, "shop-db", "10.78.0.2"),
        (BLOG, "store.shop.tinydc.internal", "10.78.0.2"),
        // Without a VIP: those that serve.
        (WEB, "api", "10.77.5.11 10.77.5.12"),
        // A service's whole name before a prefix.
        (BLOG, "tasks.web", "10.78.0.7"),
    ] {
        assert_eq!(short(asker, name, kind::A), wanted, "{asker} asks for {name}");
    }
}

#[test]
fn instances_have_names_of_their_own() {
    for (asker, name, wanted) in [
        (WEB, "tasks.web", "10.77.1.11 10.77.1.12"),
        (WEB, "tasks.www", "10.77.1.11 10.77.1.12"),
        (WEB, "tasks.web.shop", "10.77.1.11 10.77.1.12"),
        (WEB, "tasks.web.shop.tinydc.internal", "10.77.1.11 10.77.1.12"),
        (WEB, "2.web", "10.77.1.12"),
        // One that doesn't serve yet is found by its number only.
        (WEB, "3.web.shop.tinydc.internal", "10.77.1.13"),
        (WEB, "4.web.shop.tinydc.internal", "none"),
        (WEB, "02.web.shop.tinydc.internal", "none"),
        (WEB, "4.web", "up"),
    ] {
        assert_eq!(short(asker, name, kind::A), wanted, "{asker} asks for {name}");
    }
}

#[test]
fn names_are_seen_only_across_a_common_network() {
    for name in ["db", "postgres", "store", "tasks.db", "1.db", "db.shop", "web.blog", "weblog", "shop-db"] {
        let answer = short(WEB, name, kind::A);
        assert!(matches!(answer.as_str(), "none" | "up"), "{name}: {answer}");
        let full = short(WEB, &format!("{name}.shop.tinydc.internal"), kind::A);
        assert_eq!(full, "none", "{name}");
    }
    // An alias holds on its own network only, though another is common.
    assert_eq!(short(BLOG, "postgres", kind::A), "none");
    assert_eq!(short(WEB, "2.0.78.10.in-addr.arpa", kind::PTR), "none");
    assert_eq!(short(WEB, "_http._tcp.db", kind::SRV), "none");
}

#[test]
fn the_node_itself_sees_full_names_of_all() {
    for asker in [HOST, "127.0.0.1", "192.168.1.5"] {
        for (name, wanted) in [
            ("web.shop", "10.78.0.1"),
            ("db.shop.tinydc.internal", "10.78.0.2"),
            ("tasks.db.shop", "10.77.2.11 10.77.2.12"),
            ("web", "none"),
            ("example.org", "up"),
        ] {
            assert_eq!(short(asker, name, kind::A), wanted, "{asker} asks for {name}");
        }
    }
}

/// Its first question may be faster than the table; a lasting "no such name" would be wrong.
#[test]
fn a_container_not_yet_listed_is_asked_to_come_again() {
    for name in ["web", "web.shop.tinydc.internal", "web.shop", "example.org"] {
        assert_eq!(short("10.77.1.99", name, kind::A), "early", "{name}");
    }
}

#[test]
fn a_name_that_exists_is_never_said_not_to() {
    for name in ["web", "tasks.web", "web.shop", "web.shop.tinydc.internal", "1.web"] {
        for kind in [kind::AAAA, 15, 16, 65, 4711] {
            assert_eq!(short(WEB, name, kind), "empty", "{name} {kind}");
        }
        assert_eq!(short(WEB, name, kind::ANY), "hinfo");
    }
    assert_eq!(short(WEB, "tinydc.internal", kind::A), "empty");
    let none = Zone::new(ZoneTable::default());
    let question = Question { name: "x.tinydc.internal".into(), kind: kind::A, class: 1 };
    assert_eq!(resolve(&none, ip(HOST), &question), Answer::NoSuchName { zone: "tinydc.internal".into() });
}

#[test]
fn what_is_not_ours_goes_upstream_and_single_labels_do_not() {
    for (name, kind, wanted) in [
        ("example.org", kind::A, "up"),
        ("metadata.google.internal", kind::A, "up"),
        ("nottinydc.internal", kind::A, "up"),
        ("nas", kind::A, "none"),
        ("_http._tcp.nas", kind::SRV, "none"),
        ("_sip._udp.example.org", kind::SRV, "up"),
        ("org", kind::NS, "up"),
        ("org", kind::DS, "up"),
        ("", kind::NS, "up"),
        ("1.0.168.192.in-addr.arpa", kind::PTR, "up"),
        ("x.y.localhost", kind::A, "127.0.0.1"),
        ("localhost", kind::AAAA, "::1"),
    ] {
        assert_eq!(short(WEB, name, kind), wanted, "{name}");
    }
    let chaos = Question { name: "version.bind".into(), kind: 16, class: 3 };
    assert_eq!(resolve(&zone(), ip(WEB), &chaos), Answer::Refused);
    assert_eq!(short(WEB, "tinydc.internal", 252), "refused");
    assert_eq!(short(INNER, "example.org", kind::A), "refused", "a question is a way out");
}

#[test]
fn services_tell_their_ports_with_targets_that_resolve() {
    for (name, wanted) in [
        ("web", "web.shop.tinydc.internal:8080"),
        ("_http._tcp.web", "web.shop.tinydc.internal:8080"),
        ("_8080._tcp.web.shop.tinydc.internal", "web.shop.tinydc.internal:8080"),
        ("_http._udp.web", "none"),
        ("_https._tcp.web", "none"),
        ("tasks.web", "1.web.shop.tinydc.internal:8080 2.web.shop.tinydc.internal:8080"),
        ("_53._udp.api", "1.api.shop.tinydc.internal:53 2.api.shop.tinydc.internal:53"),
    ] {
        assert_eq!(short(WEB, name, kind::SRV), wanted, "{name}");
        if let Answer::Found { additional, .. } = ask(WEB, name, kind::SRV) {
            assert!(!additional.is_empty());
            for target in additional {
                assert_eq!(short(WEB, &target.name, kind::A), target.address.to_string());
            }
        }
    }
    assert_eq!(short(WEB, "_http._tcp.web", kind::A), "empty");
}

#[test]
fn addresses_lead_back_to_names() {
    for (name, wanted) in [
        ("1.0.78.10.in-addr.arpa", "web.shop.tinydc.internal"),
        ("12.1.77.10.in-addr.arpa", "2.web.shop.tinydc.internal"),
        ("99.1.77.10.in-addr.arpa", "none"),
        ("1.77.10.in-addr.arpa", "up"),
        ("x.0.78.10.in-addr.arpa", "up"),
    ] {
        assert_eq!(short(WEB, name, kind::PTR), wanted, "{name}");
    }
    assert_eq!(short(WEB, "1.0.78.10.in-addr.arpa", kind::A), "empty");
}

fn query(name: &str, kind: u16, edns: bool) -> Vec<u8> {
    let mut message = wire::header(0x1234, 0x0100, 1);
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend_from_slice(label.as_bytes());
    }
    message.push(0);
    message.extend_from_slice(&kind.to_be_bytes());
    message.extend_from_slice(&1_u16.to_be_bytes());
    if edns {
        wire::push_opt(&mut message, false, 0);
    }
    message
}

fn parsed(reply: &[u8]) -> simple_dns::Packet<'_> {
    simple_dns::Packet::parse(reply).unwrap()
}

#[test]
fn an_answer_echoes_the_letters_and_carries_a_short_ttl() {
    let message = query("WeB.shop", kind::A, true);
    let query = Query::parse(&message).unwrap();
    let reply = encode(&query, &resolve(&zone(), ip(WEB), &query.question), 1232).unwrap();
    let packet = parsed(&reply);
    assert_eq!(packet.id(), 0x1234);
    assert!(
        packet.has_flags(simple_dns::PacketFlag::RESPONSE | simple_dns::PacketFlag::AUTHORITATIVE_ANSWER)
    );
    assert_eq!(packet.questions[0].qname.to_string(), "WeB.shop");
    assert_eq!(packet.answers[0].name.to_string(), "WeB.shop");
    assert_eq!(packet.answers[0].ttl, TTL_SECONDS);
    assert_eq!(packet.opt().unwrap().udp_packet_size, 1232);
}

#[test]
fn negative_answers_carry_a_soa_with_a_small_minimum() {
    for (name, code) in [("web", Code::NoError), ("nix", Code::NoSuchName)] {
        // A type that simple-dns doesn't know.
        let message = self::query(name, 4711, false);
        let query = Query::parse(&message).unwrap();
        let reply = encode(&query, &resolve(&zone(), ip(WEB), &query.question), 512).unwrap();
        assert_eq!(wire::code_of(&reply), code as u16);
        assert_eq!(&reply[12..12 + query.question_bytes.len()], query.question_bytes);
        let records = wire::records(&reply, query.question_bytes.len()).unwrap();
        assert_eq!((records.len(), records[0].kind), (1, kind::SOA));
        assert_eq!(wire::soa_minimum(&reply, &records[0]), Some(TTL_SECONDS));
    }
}

fn crowded_zone() -> Zone {
    let mut crowd = service("shop", "crowd", 9, &[("shop/front", &[])]);
    let endpoint =
        |slot: u32| Endpoint { slot, address: Ipv4Addr::from(0x0a4d_0000 + slot), is_serving: true };
    crowd.endpoints = (1..=200).map(endpoint).collect();
    let mut table = zone().table().clone();
    table.services.push(crowd);
    Zone::new(table)
}

#[test]
fn what_does_not_fit_is_cut_and_marked() {
    let zone = crowded_zone();
    for (edns, limit, fits) in [(false, 512, 30), (true, 1232, 74)] {
        let message = self::query("tasks.crowd", kind::A, edns);
        let query = Query::parse(&message).unwrap();
        let answer = resolve(&zone, ip(WEB), &query.question);
        let reply = encode(&query, &answer, query.udp_limit()).unwrap();
        assert!(reply.len() <= limit);
        let packet = parsed(&reply);
        assert!(packet.has_flags(simple_dns::PacketFlag::TRUNCATION));
        assert_eq!(packet.answers.len(), fits);
        assert_eq!(packet.opt().is_some(), edns);
        let whole = encode(&query, &answer, 65_535).unwrap();
        assert_eq!(parsed(&whole).answers.len(), 200);
        assert!(!parsed(&whole).has_flags(simple_dns::PacketFlag::TRUNCATION));
    }
}

// From here on with sockets.

/// A node's DNS server with its own executor thread.
struct Site {
    server: Option<DnsServer>,
    executor: Arc<Executor<'static>>,
    thread: Option<std::thread::JoinHandle<()>>,
    stop: async_channel::Sender<()>,
    address: SocketAddr,
}

impl Site {
    fn start(upstreams: UpstreamSource) -> Site {
        let executor = Arc::new(Executor::new());
        let (stop, stopped) = async_channel::bounded::<()>(1);
        let runner = executor.clone();
        let thread = std::thread::spawn(move || {
            let _ = async_io::block_on(runner.run(stopped.recv()));
        });
        let listen = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
        let deadline = Instant::now() + Duration::from_secs(10);
        // Somebody else may hold the same number for TCP.
        let server = loop {
            let config = DnsConfig { listen, upstreams: upstreams.clone() };
            match DnsServer::start(config, &executor) {
                Ok(server) => break server,
                Err(error) => assert!(Instant::now() < deadline, "{error:?}"),
            }
        };
        let mut table = crowded_zone().table().clone();
        // Loopback is the node itself; one address of it plays a container.
        let client = table.clients[&ip(WEB)].clone();
        table.clients.insert(ip("127.0.0.77"), client);
        server.set_zone(Zone::new(table));
        let address = server.address();
        Site { server: Some(server), executor, thread: Some(thread), stop, address }
    }

    fn ask(&self, name: &str, kind: u16) -> Vec<u8> {
        self.ask_from("127.0.0.1", &query(name, kind, true)).expect("an answer")
    }

    fn ask_from(&self, source: &str, message: &[u8]) -> Option<Vec<u8>> {
        let socket = UdpSocket::bind((source, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(6))).unwrap();
        socket.send_to(message, self.address).unwrap();
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).ok()?;
        Some(buffer[..length].to_vec())
    }

    fn ask_by_tcp(&self, message: &[u8]) -> Vec<u8> {
        let exchange = async {
            let mut stream = Async::<TcpStream>::connect(self.address).await?;
            write_message(&mut stream, message).await?;
            read_message(&mut stream).await
        };
        async_io::block_on(exchange).unwrap()
    }

    fn counts(&self) -> super::DnsCounts {
        self.server.as_ref().unwrap().counts()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        future::block_on(self.server.take().unwrap().stop());
        assert!(UdpSocket::bind(self.address).is_ok(), "a stopped server leaves its port");
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.executor.is_empty() {
            assert!(Instant::now() < deadline, "a stopped server leaves no task");
        }
        self.stop.close();
        self.thread.take().unwrap().join().unwrap();
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Good,
    Drops,
    /// First answers with a wrong id, a wrong question and from a wrong port, all with a wrong address; then well.
    Lies,
    /// Only lies.
    OnlyLies,
    /// Cut by UDP, whole by TCP.
    Cuts,
    Fails,
    NoSuchName,
    RefusesEdns,
}

/// A server of the world: answers 192.0.2.1, TTL 60.
struct Fake {
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
    by_tcp: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Fake {
    fn start(manner: Manner) -> Fake {
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()) {
                break (udp, tcp);
            }
        };
        udp.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let address = udp.local_addr().unwrap();
        let (asked, by_tcp) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let (count, ended) = (asked.clone(), stop.clone());
        let datagrams = std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !ended.load(Ordering::Relaxed) {
                let Ok((length, from)) = udp.recv_from(&mut buffer) else { continue };
                // A probe for loops, which every loopback upstream gets.
                if buffer[..length].windows(4).any(|part| part == b"loop") {
                    continue;
                }
                count.fetch_add(1, Ordering::Relaxed);
                for reply in fake_replies(&buffer[..length], manner) {
                    udp.send_to(&reply, from).unwrap();
                }
            }
        });
        let (count, ended) = (by_tcp.clone(), stop.clone());
        let streams = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                let Ok((mut stream, _)) = tcp.accept() else {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                };
                count.fetch_add(1, Ordering::Relaxed);
                stream.set_nonblocking(false).unwrap();
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
                stream.read_exact(&mut message).unwrap();
                let reply = fake_reply(&message, 40, 0, [192, 0, 2, 1]);
                stream.write_all(&(reply.len() as u16).to_be_bytes()).unwrap();
                stream.write_all(&reply).unwrap();
            }
        });
        Fake { address, asked, by_tcp, stop, threads: vec![datagrams, streams] }
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

fn fake_reply(message: &[u8], answers: u16, code: u16, address: [u8; 4]) -> Vec<u8> {
    let query = Query::parse(message).unwrap();
    let mut reply = wire::header(query.id, 0x8180 | code, 1);
    reply[6..8].copy_from_slice(&answers.to_be_bytes());
    reply.extend_from_slice(query.question_bytes);
    for _ in 0..answers {
        reply.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        reply.extend_from_slice(&address);
    }
    query.add_edns(&mut reply, 0);
    reply
}

fn fake_replies(message: &[u8], manner: Manner) -> Vec<Vec<u8>> {
    let good = fake_reply(message, 1, 0, [192, 0, 2, 1]);
    let has_edns = Query::parse(message).unwrap().edns.is_some();
    let bad = fake_reply(message, 1, 0, [6, 6, 6, 6]);
    let (mut id, mut question) = (bad.clone(), bad.clone());
    id[0] ^= 1;
    question[13] ^= 1;
    // Not a response at all.
    let mut echo = bad;
    echo[2] &= 0x7f;
    match manner {
        Manner::Good => vec![good],
        Manner::Drops => vec![],
        Manner::Lies => vec![id, question, echo, vec![0; 3], good],
        Manner::OnlyLies => vec![id, question, echo, vec![]],
        Manner::Cuts => {
            let mut cut = good;
            cut[2] |= 2;
            vec![cut]
        }
        Manner::Fails => vec![fake_reply(message, 0, 2, [0; 4])],
        Manner::NoSuchName => vec![fake_reply(message, 0, 3, [0; 4])],
        Manner::RefusesEdns if has_edns => vec![fake_reply(message, 0, 1, [0; 4])],
        Manner::RefusesEdns => vec![good],
    }
}

fn site(upstreams: &[&Fake]) -> Site {
    Site::start(UpstreamSource::Fixed(upstreams.iter().map(|fake| fake.address).collect()))
}

fn first_address(reply: &[u8]) -> Option<Ipv4Addr> {
    match parsed(reply).answers.first()?.rdata {
        simple_dns::rdata::RData::A(ref a) => Some(Ipv4Addr::from(a.address)),
        _ => None,
    }
}

const WORLD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

#[test]
fn own_names_are_answered_by_udp_and_tcp() {
    let site = site(&[]);
    assert_eq!(first_address(&site.ask("web.shop", kind::A)), Some(ip("10.78.0.1")));
    assert_eq!(wire::code_of(&site.ask("web", kind::A)), Code::NoSuchName as u16);
    let from_container = site.ask_from("127.0.0.77", &query("web", kind::A, false)).unwrap();
    assert_eq!(first_address(&from_container), Some(ip("10.78.0.1")));
    let cut = site.ask("tasks.crowd.shop", kind::A);
    assert!(parsed(&cut).has_flags(simple_dns::PacketFlag::TRUNCATION));
    let whole = site.ask_by_tcp(&query("tasks.crowd.shop", kind::A, false));
    assert_eq!(parsed(&whole).answers.len(), 200);
    let counts = site.counts();
    assert_eq!((counts.questions, counts.by_tcp, counts.answered_here), (5, 1, 5));
}

#[test]
fn a_new_zone_holds_from_the_next_question_on() {
    let site = site(&[]);
    site.server.as_ref().unwrap().set_zone(Zone::new(ZoneTable::default()));
    assert_eq!(wire::code_of(&site.ask("web.shop.tinydc.internal", kind::A)), Code::NoSuchName as u16);
}

#[test]
fn malformed_messages_get_an_error_and_answers_get_nothing() {
    let site = site(&[]);
    let mut answer = query("web.shop", kind::A, false);
    answer[2] |= 0x80;
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(6))).unwrap();
    // The first three get nothing, so the fourth's answer is the first to come.
    for message in [&[][..], &[1, 2, 3], &answer, &[9, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]] {
        socket.send_to(message, site.address).unwrap();
    }
    let mut buffer = [0; 512];
    let length = socket.recv(&mut buffer).unwrap();
    assert_eq!((&buffer[..2], wire::code_of(&buffer[..length])), (&[9, 9][..], Code::FormatError as u16));
    assert_eq!(site.counts().malformed, 4);
}

#[test]
fn the_rest_is_forwarded_and_remembered() {
    let good = Fake::start(Manner::Good);
    let site = site(&[&good]);
    let reply = site.ask("Example.ORG", kind::A);
    assert_eq!(first_address(&reply), Some(WORLD));
    assert_eq!(parsed(&reply).questions[0].qname.to_string(), "Example.ORG");
    assert!(parsed(&reply).opt().is_some());
    let again = site.ask_from("127.0.0.1", &query("example.org", kind::A, false)).unwrap();
    assert_eq!(first_address(&again), Some(WORLD));
    assert!(parsed(&again).opt().is_none());
    assert!(parsed(&again).answers[0].ttl <= 60);
    assert_eq!(good.asked(), 1);
    let counts = site.counts();
    assert_eq!((counts.forwarded, counts.from_cache, counts.cache_entries), (1, 1, 1));
}

#[test]
fn an_upstream_that_drops_is_passed_by_and_goes_last() {
    let (drops, good) = (Fake::start(Manner::Drops), Fake::start(Manner::Good));
    let site = site(&[&drops, &good]);
    assert_eq!(first_address(&site.ask("a.example", kind::A)), Some(WORLD));
    let started = Instant::now();
    assert_eq!(first_address(&site.ask("b.example", kind::A)), Some(WORLD));
    assert!(started.elapsed() < Duration::from_millis(1400), "the failed one was asked first again");
    assert_eq!((drops.asked(), good.asked()), (1, 2));
}

#[test]
fn a_lying_upstream_is_not_believed() {
    let (lies, only_lies) = (Fake::start(Manner::Lies), Fake::start(Manner::OnlyLies));
    assert_eq!(first_address(&site(&[&lies]).ask("a.example", kind::A)), Some(WORLD));
    let site = site(&[&only_lies]);
    assert_eq!(wire::code_of(&site.ask("a.example", kind::A)), Code::ServerFailure as u16);
    assert_eq!(only_lies.asked(), 2, "a lone upstream is asked twice");
}

#[test]
fn a_cut_answer_is_fetched_by_tcp() {
    let cuts = Fake::start(Manner::Cuts);
    let site = site(&[&cuts]);
    let small = site.ask_from("127.0.0.1", &query("big.example", kind::A, false)).unwrap();
    assert!(parsed(&small).has_flags(simple_dns::PacketFlag::TRUNCATION) && small.len() <= 512);
    assert_eq!(parsed(&site.ask("big.example", kind::A)).answers.len(), 40);
    let by_tcp = site.ask_by_tcp(&query("other.example", kind::A, false));
    assert_eq!(parsed(&by_tcp).answers.len(), 40);
    assert_eq!((cuts.asked(), cuts.by_tcp.load(Ordering::Relaxed)), (1, 2));
}

#[test]
fn a_failing_upstream_has_the_last_word_only_if_none_knows_better() {
    let (fails, good, none) =
        (Fake::start(Manner::Fails), Fake::start(Manner::Good), Fake::start(Manner::NoSuchName));
    assert_eq!(first_address(&site(&[&fails, &good]).ask("a.example", kind::A)), Some(WORLD));
    assert_eq!(wire::code_of(&site(&[&fails]).ask("a.example", kind::A)), Code::ServerFailure as u16);
    let site = site(&[&none, &good]);
    assert_eq!(wire::code_of(&site.ask("a.example", kind::A)), Code::NoSuchName as u16);
    assert_eq!(wire::code_of(&self::site(&[]).ask("a.example", kind::A)), Code::ServerFailure as u16);
}

#[test]
fn an_upstream_without_edns_is_asked_without() {
    let old = Fake::start(Manner::RefusesEdns);
    assert_eq!(first_address(&site(&[&old]).ask("a.example", kind::A)), Some(WORLD));
    assert_eq!(old.asked(), 2);
}

#[test]
fn the_same_question_is_asked_once() {
    let (drops, good) = (Fake::start(Manner::Drops), Fake::start(Manner::Good));
    let site = site(&[&drops, &good]);
    let sockets: Vec<UdpSocket> = (0..50).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    for socket in &sockets {
        socket.set_read_timeout(Some(Duration::from_secs(6))).unwrap();
        socket.send_to(&query("a.example", kind::A, true), site.address).unwrap();
    }
    for socket in &sockets {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        assert_eq!(first_address(&buffer[..length]), Some(WORLD));
    }
    assert_eq!((drops.asked(), good.asked(), site.counts().forwarded), (1, 1, 1));
}

#[test]
fn one_container_with_a_silent_zone_does_not_stop_the_others() {
    let drops = Fake::start(Manner::Drops);
    let site = site(&[&drops]);
    let container = UdpSocket::bind("127.0.0.77:0").unwrap();
    for number in 0..40 {
        container.send_to(&query(&format!("{number}.silent.example"), kind::A, true), site.address).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    let forwarded = |wanted: u64, overloaded: u64| {
        while (site.counts().forwarded, site.counts().overloaded) != (wanted, overloaded) {
            assert!(Instant::now() < deadline, "{:?}", site.counts());
        }
    };
    forwarded(32, 8);
    let other = UdpSocket::bind("127.0.0.1:0").unwrap();
    other.send_to(&query("other.example", kind::A, true), site.address).unwrap();
    forwarded(33, 8);
}

#[test]
fn a_changed_resolv_conf_is_followed() {
    let folder = std::env::temp_dir().join(format!("tinydc-dns-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("resolv.conf");
    std::fs::write(&path, "nameserver 192.0.2.53\n").unwrap();
    let site = Site::start(UpstreamSource::ResolvConf(path.clone()));
    let listed = || site.counts().upstreams.iter().map(|view| view.address.ip()).collect::<BTreeSet<_>>();
    let deadline = Instant::now() + Duration::from_secs(20);
    let changes = [("192.0.2.53", "nameserver 192.0.2.53\n"), ("192.0.2.54", "nameserver 192.0.2.54\n")];
    for (number, (wanted, text)) in changes.into_iter().enumerate() {
        std::fs::write(&path, text).unwrap();
        while listed() != BTreeSet::from([wanted.parse().unwrap()]) {
            assert!(Instant::now() < deadline, "{:?}", listed());
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.send_to(&query(&format!("{number}.example"), kind::A, false), site.address).unwrap();
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    drop(site);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn the_server_never_asks_itself() {
    let own: SocketAddr = "10.77.1.1:53".parse().unwrap();
    let other: SocketAddr = "10.77.1.2:53".parse().unwrap();
    let forwarder =
        super::forward::Forwarder::new(UpstreamSource::Fixed(vec![own, other]), own, Arc::default());
    assert_eq!(forwarder.upstreams().iter().map(|view| view.address).collect::<Vec<_>>(), [other]);
}

/// A stub that forwards everything back to the server under test.
#[test]
fn a_stub_that_asks_back_is_found_and_left_alone() {
    let stub = UdpSocket::bind("127.0.0.1:0").unwrap();
    stub.set_read_timeout(Some(Duration::from_secs(6))).unwrap();
    let site = Site::start(UpstreamSource::Fixed(vec![stub.local_addr().unwrap()]));
    let mut buffer = [0; 512];
    let (length, _) = stub.recv_from(&mut buffer).unwrap();
    assert_eq!(wire::code_of(&site.ask_from("127.0.0.1", &buffer[..length]).unwrap()), 3);
    assert!(site.counts().upstreams[0].is_loop);
    let started = Instant::now();
    assert_eq!(wire::code_of(&site.ask("a.example", kind::A)), Code::ServerFailure as u16);
    assert!(started.elapsed() < Duration::from_secs(1), "a loop was asked");
}
