//! Strangers with tokens, good and bad.

use quinn::Connection;

use super::hostile::{Stranger, refusal_in};
use super::*;
use crate::transport::identity::NodeKey;
use crate::transport::ids::{AuthorityHash, ClusterId, StoreId};
use crate::transport::join::{
    self, Enrolled, JOIN_BYTES_MAX, JoinError, JoinReply, JoinSubject, Joined, MemberAddresses, NodeFacts,
    SignedRequest,
};
use crate::transport::tls;
use crate::transport::token::{Token, TokenId, TokenKind, TokenSecret};

fn token(site: &Site, node: &Node) -> Token {
    Token {
        id: TokenId(1),
        secret: TokenSecret([7; 16]),
        authority: AuthorityHash::of(site.authority.certificate()),
        cluster_name: "home".into(),
        addresses: vec![node.address()],
    }
}

fn facts() -> JoinSubject {
    JoinSubject::Node(NodeFacts {
        name: "pi4".into(),
        architecture: "arm64".into(),
        cpu_millis: 4000,
        memory_bytes: 1 << 30,
        store_id: StoreId(4),
        replace: None,
        networks: Vec::new(),
    })
}

/// Answers joins as a node layer would: one good secret, expired and used ones by token id.
fn answer_joins(site: &Site, node: &Node) {
    let events = node.events.clone();
    let authority =
        Authority::load(site.authority.certificate().clone(), site.authority.key_bytes()).unwrap();
    let (key, address) = (node.identity.node_key.public_key(), node.address());
    let work = async move {
        while let Ok(event) = events.recv().await {
            let Event::Join(asked) = event else { continue };
            let refused = |code, sentence: &str| JoinReply::Refused {
                refusal: Refusal::new(code, sentence),
                hint: "make a new one with `tinydc token`".into(),
            };
            let certificate = || authority.sign_node(asked.request.public_key).unwrap().to_vec();
            let person = || {
                let certificate = authority.sign_operator(asked.request.public_key, "ann", 0).unwrap();
                Enrolled {
                    certificate: certificate.to_vec(),
                    authority: authority.certificate().to_vec(),
                    cluster_id: ClusterId(7),
                    cluster_name: "home".into(),
                    addresses: vec![address],
                }
            };
            let members =
                BTreeMap::from([(NodeId(1), MemberAddresses { public_key: key, addresses: vec![address] })]);
            let reply = match (&asked.request.token_id, &asked.request.secret, &asked.request.subject) {
                (TokenId(1), TokenSecret(secret), JoinSubject::Node(_)) if *secret == [7; 16] => {
                    JoinReply::Joined(Joined {
                        node_id: NodeId(4),
                        certificate: certificate(),
                        authority: authority.certificate().to_vec(),
                        cluster_id: ClusterId(7),
                        cluster_name: "home".into(),
                        members,
                    })
                }
                (TokenId(1), TokenSecret(secret), JoinSubject::Person { .. }) if *secret == [7; 16] => {
                    JoinReply::Enrolled(person())
                }
                (TokenId(2), ..) => refused(RefusalCode::TokenExpired, "this token has expired"),
                (TokenId(3), ..) => refused(RefusalCode::TokenUsed, "this token was used by another node"),
                _ => refused(RefusalCode::TokenUnknown, "this cluster knows no such token"),
            };
            let _ = asked.reply.send(reply).await;
        }
    };
    site.runner.executor.spawn(work).detach();
}

#[test]
fn a_joined_node_becomes_a_peer_and_a_laptop_gets_its_certificate() {
    let site = Site::create();
    let node = site.start(&site.identity(1), 1, "127.0.0.1:0", Folder::create());
    answer_joins(&site, &node);
    let key = NodeKey::create().unwrap();
    let text = token(&site, &node).to_text(TokenKind::Join);
    let token = Token::from_text(TokenKind::Join, &text).unwrap();
    let begun = Instant::now();
    let reply = site.run(join::join(site.runner.executor.clone(), &token, &key, facts())).unwrap();
    println!("join took {} ms", begun.elapsed().as_millis());
    let again = site.run(join::join(site.runner.executor.clone(), &token, &key, facts())).unwrap();
    assert_eq!(reply, again, "joining is idempotent");
    let JoinReply::Joined(joined) = reply else { panic!("{reply:?}") };
    let mut identity = site.identity(4);
    identity.node_key = key;
    identity.membership.as_mut().unwrap().certificate = joined.certificate.into();
    let joiner = site.start(&identity, 4, "127.0.0.1:0", Folder::create());
    joiner
        .transport
        .set_members(joined.members.iter().map(|(id, member)| (*id, member.public_key)).collect());
    joiner.transport.hint(NodeId(1), joined.members[&NodeId(1)].addresses[0]);
    joiner.wait_up(1);
    node.wait_up(1);
    let laptop = NodeKey::create().unwrap();
    let person = JoinSubject::Person { device: "laptop".into() };
    let reply = site.run(join::join(site.runner.executor.clone(), &token, &laptop, person)).unwrap();
    assert!(matches!(reply, JoinReply::Enrolled(enrolled) if enrolled.addresses == [node.address()]));
    drop((joiner.stop(), node.stop()));
}

#[test]
fn a_wrong_expired_or_used_token_is_refused_with_its_hint() {
    let site = Site::create();
    let node = site.start(&site.identity(1), 1, "127.0.0.1:0", Folder::create());
    answer_joins(&site, &node);
    let cases = [
        (TokenId(1), [8; 16], RefusalCode::TokenUnknown),
        (TokenId(2), [7; 16], RefusalCode::TokenExpired),
        (TokenId(3), [7; 16], RefusalCode::TokenUsed),
    ];
    for (id, secret, code) in cases {
        let token = Token { id, secret: TokenSecret(secret), ..token(&site, &node) };
        let key = NodeKey::create().unwrap();
        let error = site.run(join::join(site.runner.executor.clone(), &token, &key, facts())).unwrap_err();
        let JoinError::Refused { refusal, hint } = error else { panic!("{error}") };
        assert_eq!(refusal.code, code);
        assert!(hint.contains("tinydc token"), "{hint}");
    }
    drop(node.stop());
}

#[test]
fn a_joiner_tells_a_foreign_cluster_nothing() {
    let site = Site::create();
    let node = site.start(&site.identity(1), 1, "127.0.0.1:0", Folder::create());
    let token = Token { authority: AuthorityHash([1; 32]), ..token(&site, &node) };
    let key = NodeKey::create().unwrap();
    let error = site.run(join::join(site.runner.executor.clone(), &token, &key, facts())).unwrap_err();
    assert!(matches!(error, JoinError::Unreachable { .. }), "{error}");
    assert!(!std::iter::from_fn(|| node.events.try_recv().ok()).any(|event| matches!(event, Event::Join(_))));
    drop(node.stop());
}

#[test]
fn a_recorded_request_is_worth_nothing_on_another_connection() {
    let site = Site::create();
    let node = site.start(&site.identity(1), 1, "127.0.0.1:0", Folder::create());
    answer_joins(&site, &node);
    let stranger = Stranger::create(&site);
    let (token, key) = (token(&site, &node), NodeKey::create().unwrap());
    let dial = || stranger.dial(tls::join_client_config(token.authority).unwrap(), node.address());
    let first = site.run(dial()).unwrap();
    let request = join::JoinRequest {
        token_id: token.id,
        secret: token.secret.clone(),
        public_key: key.public_key(),
        subject: facts(),
    };
    let proof = key.sign(&join::proof_message(&first).unwrap());
    let signed = SignedRequest { request, proof };
    let second = site.run(dial()).unwrap();
    assert!(site.run(join::converse(&second, &signed)).is_err());
    assert_eq!(refusal_in(&site.run(second.closed())), RefusalCode::Malformed);
    assert!(matches!(site.run(join::converse(&first, &signed)), Ok(JoinReply::Joined(_))));
    drop(node.stop());
}

#[test]
fn slow_oversize_and_many_joins_are_turned_away() {
    let site = Site::create();
    let node = site.start(&site.identity(1), 1, "127.0.0.1:0", Folder::create());
    let stranger = Stranger::create(&site);
    let authority = AuthorityHash::of(site.authority.certificate());
    let dial = || stranger.dial(tls::join_client_config(authority).unwrap(), node.address());
    // Eight that say nothing, one byte at most; the ninth is told to come back.
    let begun = Instant::now();
    let slow: Vec<Connection> = (0..8).map(|_| site.run(dial()).unwrap()).collect();
    site.run(async {
        let (mut send, _receive) = slow[0].open_bi().await.unwrap();
        send.write_all(&[1]).await.unwrap();
        let ninth = dial().await.unwrap();
        assert_eq!(refusal_in(&ninth.closed().await), RefusalCode::Busy);
        for connection in &slow {
            assert_eq!(refusal_in(&connection.closed().await), RefusalCode::Malformed);
        }
    });
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    // Those were more than five failures of this address.
    let error = site.run(async { dial().await.unwrap().closed().await });
    assert_eq!(refusal_in(&error), RefusalCode::TooManyFailures);
    drop(node.stop());
    let node = site.start(&site.identity(1), 1, "127.0.0.1:0", Folder::create());
    let error = site.run(async {
        let connection =
            stranger.dial(tls::join_client_config(authority).unwrap(), node.address()).await.unwrap();
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(&(JOIN_BYTES_MAX as u32 + 1).to_le_bytes()).await.unwrap();
        connection.closed().await
    });
    assert_eq!(refusal_in(&error), RefusalCode::Malformed);
    drop(node.stop());
}
