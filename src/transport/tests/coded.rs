//! Asking by a code: right, wrong, by a key, and with a man in the middle.

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};

use super::hostile::Stranger;
use super::*;
use crate::transport::by_code::{self, Answered, CodeReply, CodeRequest, CodedError, Proof};
use crate::transport::codes::{Grant, Lasting, Shown, WRONG_TRIES_MAX};
use crate::transport::door::CodeAsked;
use crate::transport::executor::{QuicRuntime, TaskGroup};
use crate::transport::identity::NodeKey;
use crate::transport::operators::OperatorKey;
use crate::transport::peers::transport_parameters;
use crate::transport::pending::{Pending, PendingConfig};
use crate::transport::{authority, tls};

const CODE: &str = "493112";
const WRONG: &str = "111111";

fn machine(site: &Site) -> (Pending, Receiver<CodeAsked>) {
    let (pending, asked) = Pending::start(PendingConfig {
        executor: site.runner.executor.clone(),
        listen: "127.0.0.1:0".parse().unwrap(),
        key: NodeKey::create().unwrap(),
        name: "pi4".into(),
        architecture: "arm64".into(),
    })
    .unwrap();
    pending.door().show(shown(Grant::Machine, Lasting::Renewed));
    (pending, asked)
}

fn shown(grant: Grant, lasting: Lasting) -> Shown {
    Shown { code: CODE.into(), grant, lasting, until: None, wrong_tries: 0 }
}

fn admit() -> CodeRequest {
    CodeRequest::Admit { token: "tdc-join-x".into() }
}

fn joined() -> CodeReply {
    CodeReply::Joined { cluster: "home".into(), node_id: 4 }
}

fn ask(site: &Site, address: SocketAddr, proof: &Proof<'_>) -> Result<Answered, CodedError> {
    site.run(by_code::ask(site.runner.executor.clone(), address, proof, async { Ok(admit()) }))
}

/// Answers what is asked, and returns what it was.
async fn take(asked: &Receiver<CodeAsked>) -> CodeAsked {
    let one = asked.recv().await.unwrap();
    one.reply.send(joined()).await.unwrap();
    one
}

#[test]
fn a_right_code_brings_the_request_and_both_ends_a_secret() {
    let site = Site::create();
    let (pending, asked) = machine(&site);
    let answering = site.runner.executor.spawn(async move { take(&asked).await });
    let answered = ask(&site, pending.address(), &Proof::Code(CODE)).unwrap();
    let one = site.run(answering);
    assert_eq!((one.request, one.grant, answered.reply), (admit(), Grant::Machine, joined()));
    assert!(one.secret.is_some() && one.secret == answered.secret);
    assert_eq!(pending.door().displayed().unwrap().code, CODE, "a machine waits on until it has joined");
    site.run(pending.stop());
}

#[test]
fn a_wrong_code_reaches_nobody_and_five_make_a_new_one() {
    let site = Site::create();
    let (pending, asked) = machine(&site);
    for _ in 0..WRONG_TRIES_MAX {
        assert_eq!(pending.door().displayed().unwrap().code, CODE);
        let error = ask(&site, pending.address(), &Proof::Code(WRONG)).unwrap_err();
        assert!(error.is_wrong_code(), "{error}");
    }
    assert_ne!(pending.door().displayed().unwrap().code, CODE);
    let error = ask(&site, pending.address(), &Proof::Code(CODE)).unwrap_err();
    let CodedError::Refused { refusal, .. } = error else { panic!("{error}") };
    assert_eq!(refusal.code, RefusalCode::TooManyFailures);
    assert!(asked.is_empty());
    site.run(pending.stop());
}

/// An endpoint that shows a certificate of its own, as a machine without a cluster does.
fn stranger_s_endpoint(tasks: &Arc<TaskGroup>) -> (quinn::Endpoint, SocketAddr) {
    let key = NodeKey::create().unwrap();
    let server = tls::pending_server_config(&key, authority::self_signed(&key).unwrap()).unwrap();
    let server = QuicServerConfig::try_from(server).unwrap();
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
    server.transport_config(transport_parameters());
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let runtime = Arc::new(QuicRuntime(tasks.clone()));
    (quinn::Endpoint::new(Default::default(), Some(server), socket, runtime).unwrap(), address)
}

#[test]
fn a_refusal_after_the_end_of_the_stream_is_still_told() {
    let site = Site::create();
    let tasks = TaskGroup::new(site.runner.executor.clone());
    let (endpoint, address) = stranger_s_endpoint(&tasks);
    tasks.spawn(async move {
        let asker = endpoint.accept().await.unwrap().await.unwrap();
        let (mut send, _receive) = asker.accept_bi().await.unwrap();
        send.finish().unwrap();
        async_io::Timer::after(Duration::from_millis(100)).await;
        Refusal::new(RefusalCode::CodeWrong, "the code is wrong").close(&asker);
        endpoint.wait_idle().await;
    });
    let error = ask(&site, address, &Proof::Code(CODE)).unwrap_err();
    assert!(error.is_wrong_code(), "{error}");
    site.run(tasks.stop());
}

/// Accepts the asker's session as the machine would, dials the machine as the asker would, and passes every byte on.
fn man_in_the_middle(site: &Site, victim: SocketAddr) -> (SocketAddr, Arc<TaskGroup>) {
    let tasks = TaskGroup::new(site.runner.executor.clone());
    let (endpoint, address) = stranger_s_endpoint(&tasks);
    let client = QuicClientConfig::try_from(tls::code_client_config().unwrap()).unwrap();
    let client = quinn::ClientConfig::new(Arc::new(client));
    tasks.spawn(async move {
        let asker = endpoint.accept().await.unwrap().await.unwrap();
        let machine = endpoint.connect_with(client, victim, authority::NODE_NAME).unwrap().await.unwrap();
        let (mut to_asker, mut from_asker) = asker.accept_bi().await.unwrap();
        let (mut to_machine, mut from_machine) = machine.open_bi().await.unwrap();
        let there = relay(&mut from_asker, &mut to_machine);
        let back = relay(&mut from_machine, &mut to_asker);
        futures_lite::future::or(there, back).await;
        let closed = machine.closed().await;
        if let quinn::ConnectionError::ApplicationClosed(close) = closed {
            asker.close(close.error_code, &close.reason);
        }
        endpoint.wait_idle().await;
    });
    (address, tasks)
}

async fn relay(from: &mut quinn::RecvStream, to: &mut quinn::SendStream) {
    let mut buffer = [0; 1024];
    while let Ok(Some(length)) = from.read(&mut buffer).await {
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

#[test]
fn a_man_in_the_middle_is_refused_by_both_sides() {
    let site = Site::create();
    let (pending, asked) = machine(&site);
    let (address, tasks) = man_in_the_middle(&site, pending.address());
    let error = ask(&site, address, &Proof::Code(CODE)).unwrap_err();
    assert!(error.is_wrong_code(), "the asker with the right code: {error}");
    assert!(asked.is_empty(), "the machine was asked nothing");
    assert_eq!(pending.door().displayed().unwrap().wrong_tries, 1, "the machine counted a wrong code");
    // Without him the same code serves.
    let answering = site.runner.executor.spawn(async move { take(&asked).await });
    assert!(ask(&site, pending.address(), &Proof::Code(CODE)).is_ok());
    site.run(answering);
    site.run(tasks.stop());
    site.run(pending.stop());
}

#[test]
fn a_member_lets_a_person_in_by_code_once_and_shows_strangers_no_difference() {
    let site = Site::create();
    let node = site.start(&site.identity(1), 1, "127.0.0.1:0", Folder::create());
    let events = node.events.clone();
    let error = ask(&site, node.address(), &Proof::Code(CODE)).unwrap_err();
    assert!(error.is_wrong_code(), "no code is shown: {error}");
    let grant = Grant::Person { name: "ann".into(), is_viewer: false };
    node.transport.door().show(shown(grant.clone(), Lasting::Asked));
    let answering = site.runner.executor.spawn(async move {
        loop {
            if let Event::Code(asked) = events.recv().await.unwrap() {
                asked.reply.send(joined()).await.unwrap();
                return asked.grant;
            }
        }
    });
    ask(&site, node.address(), &Proof::Code(CODE)).unwrap();
    assert_eq!(site.run(answering), grant);
    assert!(ask(&site, node.address(), &Proof::Code(CODE)).unwrap_err().is_wrong_code());
    drop(node.stop());
}

#[test]
fn an_operator_s_key_is_let_in_and_another_is_not() {
    let site = Site::create();
    let key = NodeKey::create().unwrap();
    let operators = vec![OperatorKey { key: key.public_key(), name: "ann".into() }];
    let node = site.start_for(&site.identity(1), operators);
    let events = node.events.clone();
    let other = NodeKey::create().unwrap();
    let error = ask(&site, node.address(), &Proof::Key(&other)).unwrap_err();
    let CodedError::Refused { refusal, .. } = error else { panic!("{error}") };
    assert_eq!(refusal.code, RefusalCode::KeyUnknown);
    let answering = site.runner.executor.spawn(async move {
        loop {
            if let Event::Code(asked) = events.recv().await.unwrap() {
                asked.reply.send(joined()).await.unwrap();
                return asked.grant;
            }
        }
    });
    let answered = ask(&site, node.address(), &Proof::Key(&key)).unwrap();
    assert_eq!((answered.reply, answered.secret), (joined(), None));
    assert_eq!(site.run(answering), Grant::Person { name: "ann".into(), is_viewer: false });
    drop(node.stop());
}

#[test]
fn one_who_says_nothing_holds_nobody_up() {
    let site = Site::create();
    let (pending, asked) = machine(&site);
    let stranger = Stranger::create(&site);
    let silent = site.run(stranger.dial(tls::code_client_config().unwrap(), pending.address())).unwrap();
    let answering = site.runner.executor.spawn(async move { take(&asked).await });
    ask(&site, pending.address(), &Proof::Code(CODE)).unwrap();
    site.run(answering);
    let closed = site.run(silent.closed());
    assert_eq!(super::hostile::refusal_in(&closed), RefusalCode::Malformed);
    site.run(pending.stop());
}

#[test]
fn a_stopped_machine_frees_its_port() {
    let site = Site::create();
    let (pending, _asked) = machine(&site);
    let address = pending.address();
    site.run(pending.stop());
    assert!(site.runner.executor.is_empty(), "a task is left");
    std::net::UdpSocket::bind(address).unwrap();
}
