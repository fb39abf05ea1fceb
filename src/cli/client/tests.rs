//! The client against a server that answers, refuses, breaks off or says nothing.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use futures_lite::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::api::wire::{EventBody, VersionBody};
use crate::cli::contexts::tests::Folder;
use crate::cli::contexts::{Context, ContextFile, Store};
use crate::transport::authority::Authority;
use crate::transport::https::HttpsServer;
use crate::transport::identity::{Membership, NodeKey};
use crate::transport::ids::{ClusterId, NodeId, StoreId};

#[derive(Clone, Copy)]
enum Answer {
    Whole(u16, &'static str),
    /// A member's, with the newest entry it may be made of.
    Seen(&'static str),
    /// The connection ends after the request was read.
    BreakOff,
    /// Nothing, until the client goes.
    Silence,
}

struct Server {
    client: Client,
    requests: Receiver<String>,
    _folder: Folder,
}

/// Answers one connection after the other as `answers` say, then no more.
fn serve(answers: &'static [Answer]) -> Server {
    let folder = Folder::create();
    let path = folder.0.join("api.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (sender, requests) = channel();
    thread::spawn(move || {
        for answer in answers {
            let Ok((mut stream, _)) = listener.accept() else { return };
            let _ = sender.send(read_request(&mut stream));
            match answer {
                Answer::Whole(status, body) => {
                    let length = body.len();
                    let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n\r\n");
                    let _ = stream.write_all(format!("{head}{body}").as_bytes());
                }
                Answer::Seen(index) => {
                    let head =
                        format!("HTTP/1.1 200 X\r\napplied-index: {index}\r\ncontent-length: 2\r\n\r\n");
                    let _ = stream.write_all(format!("{head}{{}}").as_bytes());
                }
                Answer::BreakOff => {}
                Answer::Silence => drop(stream.read(&mut [0; 64])),
            }
        }
    });
    let client = Client::new(Rc::new(LocalExecutor::new()), Target::Socket(path), true);
    Server { client, requests, _folder: folder }
}

fn read_request(stream: &mut UnixStream) -> String {
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&request).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if body.len() >= length.map_or(0, |length| length.parse().unwrap()) {
                return text;
            }
        }
        match stream.read(&mut buffer).unwrap_or(0) {
            0 => return text,
            length => request.extend_from_slice(&buffer[..length]),
        }
    }
}

fn run<Output>(server: &Server, work: impl Future<Output = Output>) -> Output {
    let executor = server.client.executor.clone();
    async_io::block_on(executor.run(work))
}

fn exit(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<Failure>().unwrap().exit.number()
}

fn key(request: &str) -> Option<&str> {
    request.lines().find_map(|line| line.strip_prefix("idempotency-key: "))
}

const VERSION: &str = r#"{"version":"1","architecture":"arm64","cluster":null,"node":null}"#;

#[test]
fn an_answer_is_read_and_a_refusal_keeps_its_code_and_hint() {
    let refusal = r#"{"error":{"code":"port_taken","message":"8080 is shop's","hint":"take another"}}"#;
    let answers =
        Box::leak(Box::new([Answer::Seen("1"), Answer::Whole(200, VERSION), Answer::Whole(409, refusal)]));
    let server = serve(answers);
    let _: serde_json::Value = run(&server, server.client.read("/v1/settings")).unwrap();
    let version: VersionBody = run(&server, server.client.read("/v1/version")).unwrap();
    assert_eq!(version.architecture, "arm64");
    let error = run(&server, server.client.post::<()>("/v1/x", &())).unwrap_err();
    let failure = error.downcast_ref::<Failure>().unwrap();
    assert!(failure.is_code("port_taken") && failure.detail.hint.as_deref() == Some("take another"));
    assert_eq!(failure.exit.number(), 1);
}

#[test]
fn a_write_is_sent_again_with_the_same_key() {
    let server = serve(&[Answer::Seen("7"), Answer::BreakOff, Answer::Seen("9"), Answer::Seen("9")]);
    let _: serde_json::Value = run(&server, server.client.post("/v1/x", &1)).unwrap();
    assert!(server.requests.recv().unwrap().starts_with("GET /v1/version "));
    let (first, second) = (server.requests.recv().unwrap(), server.requests.recv().unwrap());
    let key_of_first = key(&first).unwrap().to_owned();
    assert_eq!((key_of_first.len(), key(&second)), (32, Some(key_of_first.as_str())));
    // The age of a key is from before the first attempt.
    let has_age = |request: &str, index| request.contains(&format!("idempotency-index: {index}\r\n"));
    assert!(has_age(&first, 7) && has_age(&second, 7));
    let _: serde_json::Value = run(&server, server.client.post("/v1/x", &1)).unwrap();
    let third = server.requests.recv().unwrap();
    assert!(key(&third) != Some(key_of_first.as_str()) && has_age(&third, 9));
}

#[test]
fn a_lost_answer_is_an_unknown_outcome() {
    let server =
        serve(&[Answer::Seen("1"), Answer::BreakOff, Answer::BreakOff, Answer::BreakOff, Answer::BreakOff]);
    let error = run(&server, server.client.post::<()>("/v1/x", &())).unwrap_err();
    assert_eq!(exit(&error), 4, "{error}");
    let server = serve(&[Answer::BreakOff; 4]);
    let error = run(&server, server.client.read::<()>("/v1/x")).unwrap_err();
    assert_eq!(exit(&error), 3, "{error}");
}

#[test]
fn a_silent_daemon_is_not_waited_for_without_end() {
    let ask = |method: Method, id: Option<&str>| {
        let server = serve(&[Answer::Silence]);
        let limit = Duration::from_millis(100);
        let asked = Asked { method, path: "/v1/x", body: Bytes::new(), limit };
        let key = id.map(|id| Key { id: id.into(), created_index: 0 });
        run(&server, server.client.send(&asked, key.as_ref())).unwrap_err().exit.number()
    };
    assert_eq!(ask(Method::GET, None), 3);
    assert_eq!(ask(Method::POST, Some("1")), 4);
}

#[test]
fn a_daemon_that_is_not_there_is_unreachable_at_once() {
    let folder = Folder::create();
    let target = Target::Socket(folder.0.join("api.sock"));
    let client = Client::new(Rc::new(LocalExecutor::new()), target, true);
    let error = async_io::block_on(client.executor.clone().run(client.post::<()>("/v1/x", &()))).unwrap_err();
    assert_eq!(exit(&error), 3);
    assert!(error.to_string().contains("start it: tinydc node run"), "{error}");
}

#[test]
fn lines_arrive_one_by_one_and_nonsense_is_an_error() {
    let event = r#"{"id":1,"at":"t","kind":"k","subject":"s","text":"x"}"#;
    let body: &'static str = Box::leak(format!("{event}\n\n{event}\nnonsense\n").into_boxed_str());
    let server = serve(Box::leak(Box::new([Answer::Whole(200, body)])));
    run(&server, async {
        let mut lines = server.client.lines("/v1/events").await.unwrap();
        for _ in 0..2 {
            assert_eq!(lines.next::<EventBody>().await.unwrap().unwrap().id, 1);
        }
        assert!(lines.next::<EventBody>().await.is_err());
        assert!(lines.next::<EventBody>().await.unwrap().is_none());
    });
}

/// A node with one HTTPS port, which answers each request with `body`; gives the context that may use it.
fn serve_https(body: String) -> (Context, thread::JoinHandle<Vec<String>>) {
    let authority = Authority::create().unwrap();
    let (node, person) = (NodeKey::create().unwrap(), NodeKey::create().unwrap());
    let membership = Membership {
        node_id: NodeId(1),
        store_id: StoreId(1),
        cluster_id: ClusterId(7),
        cluster_name: "home".into(),
        certificate: authority.sign_node(node.public_key()).unwrap(),
        authority: authority.certificate().clone(),
    };
    let server = HttpsServer::new(&node, &membership).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let served = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        async_io::block_on(async {
            let (mut stream, peer) = server.accept(async_io::Async::new(stream).unwrap()).await.unwrap();
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await.unwrap();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
            stream.flush().await.unwrap();
            vec![
                format!("{:?}", peer.unwrap().role),
                String::from_utf8_lossy(&request[..length]).into_owned(),
            ]
        })
    });
    let file = ContextFile { cluster: "home".into(), cluster_id: "7".into(), addresses: vec![address] };
    let context = Context {
        name: "home".into(),
        file,
        certificate: authority.sign_operator(person.public_key(), "ann", 1_795_000_000).unwrap(),
        authority: authority.certificate().clone(),
        key: person,
    };
    (context, served)
}

#[test]
fn a_context_finds_the_node_that_answers_and_remembers_the_others() {
    let folder = Folder::create();
    let store = Store::at(folder.0.clone());
    let node = r#"{"id":"n2","name":"pi2","state":"up","role":"voter","address":"127.0.0.9","architecture":"arm64",
        "cpu_millis":1,"memory_bytes":1,"memory_available_bytes":null,"reserved_cpu_millis":0,
        "reserved_memory_bytes":0,"instances":0,"labels":{},"software":"1","silent_ms":null,"joined_at":"t",
        "only_copies":[],"troubles":[],"temperature_celsius":null,"disk":null}"#;
    let (mut context, served) = serve_https(format!(r#"{{"applied_index":1,"nodes":[{node}]}}"#));
    let alive = context.file.addresses[0];
    // Nothing listens there: a port that was just given back.
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    context.file.addresses = vec![dead, alive];
    store.save(&context).unwrap();
    let target = Target::of_context(Store::at(folder.0.clone()), store.load("home").unwrap()).unwrap();
    let client = Client::new(Rc::new(LocalExecutor::new()), target, true);
    let nodes = async_io::block_on(client.executor.clone().run(client.nodes())).unwrap();
    assert_eq!(nodes.nodes[0].name, "pi2");
    let served = served.join().unwrap();
    assert!(served[0].contains("Operator") && served[1].starts_with("GET /v1/nodes HTTP/1.1"), "{served:?}");
    let expected = [std::net::SocketAddr::from(([127, 0, 0, 9], alive.port())), alive];
    let remembered = store.load("home").unwrap().file.addresses;
    assert!(expected.iter().all(|address| remembered.contains(address)), "{remembered:?}");
    assert!(!remembered.contains(&dead));
}

#[test]
fn a_node_of_another_cluster_is_told_nothing() {
    let folder = Folder::create();
    let store = Store::at(folder.0.clone());
    let (mut context, served) = serve_https("{}".into());
    let (other, _) = serve_https("{}".into());
    context.authority = other.authority;
    context.certificate = other.certificate;
    context.key = other.key;
    let target = Target::of_context(store, context).unwrap();
    let client = Client::new(Rc::new(LocalExecutor::new()), target, true);
    let error = async_io::block_on(client.executor.clone().run(client.read::<()>("/v1/x"))).unwrap_err();
    assert_eq!(exit(&error), 3, "{error}");
    assert!(served.join().is_err(), "the server saw a request");
}

#[test]
fn what_stands_for_a_name_in_a_path_is_escaped() {
    assert_eq!(escape("docker.io/a b:1?"), "docker.io%2Fa%20b%3A1%3F");
}
