//! The client against a server that answers, refuses, breaks off or says nothing.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use super::*;
use crate::api::wire::{EventBody, VersionBody};
use crate::cli::contexts::tests::Folder;

#[derive(Clone, Copy)]
enum Answer {
    Whole(u16, &'static str),
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
    let answers = Box::leak(Box::new([Answer::Whole(200, VERSION), Answer::Whole(409, refusal)]));
    let server = serve(answers);
    let version: VersionBody = run(&server, server.client.read("/v1/version")).unwrap();
    assert_eq!(version.architecture, "arm64");
    let error = run(&server, server.client.post::<()>("/v1/x", &())).unwrap_err();
    let failure = error.downcast_ref::<Failure>().unwrap();
    assert!(failure.is_code("port_taken") && failure.detail.hint.as_deref() == Some("take another"));
    assert_eq!(failure.exit.number(), 1);
}

#[test]
fn a_write_is_sent_again_with_the_same_key() {
    let server = serve(&[Answer::BreakOff, Answer::Whole(200, "{}"), Answer::Whole(200, "{}")]);
    let _: serde_json::Value = run(&server, server.client.post("/v1/x", &1)).unwrap();
    let (first, second) = (server.requests.recv().unwrap(), server.requests.recv().unwrap());
    let key_of_first = key(&first).unwrap().to_owned();
    assert_eq!((key_of_first.len(), key(&second)), (32, Some(key_of_first.as_str())));
    let _: serde_json::Value = run(&server, server.client.post("/v1/x", &1)).unwrap();
    assert_ne!(key(&server.requests.recv().unwrap()), Some(key_of_first.as_str()));
}

#[test]
fn a_lost_answer_is_an_unknown_outcome() {
    let server = serve(&[Answer::BreakOff; 4]);
    let error = run(&server, server.client.post::<()>("/v1/x", &())).unwrap_err();
    assert_eq!(exit(&error), 4, "{error}");
    let server = serve(&[Answer::BreakOff; 4]);
    let error = run(&server, server.client.read::<()>("/v1/x")).unwrap_err();
    assert_eq!(exit(&error), 3, "{error}");
}

#[test]
fn a_silent_daemon_is_not_waited_for_without_end() {
    let ask = |method: Method, key: Option<&'static str>| {
        let server = serve(&[Answer::Silence]);
        let limit = Duration::from_millis(100);
        let asked = Asked { method, path: "/v1/x", body: Bytes::new(), limit };
        run(&server, server.client.send(&asked, key)).unwrap_err().exit.number()
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

#[test]
fn what_stands_for_a_name_in_a_path_is_escaped() {
    assert_eq!(escape("docker.io/a b:1?"), "docker.io%2Fa%20b%3A1%3F");
}
