//! Peers that must be refused, and what they are told.

use futures_lite::future;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, ConnectionError};

use super::*;
use crate::transport::authority::{NODE_NAME, Role};
use crate::transport::executor::TaskGroup;
use crate::transport::hello::{HELLO_BYTES_MAX, HELLO_LIMIT, Hello};
use crate::transport::https::{HandshakeError, HttpsClient, HttpsServer};
use crate::transport::identity::NodeKey;
use crate::transport::ids::StoreId;
use crate::transport::{join, tls};

#[test]
fn a_cloned_card_is_refused_and_both_sides_are_told() {
    let site = Site::create();
    let nodes = site.cluster(2);
    let clone = site.start(&nodes[1].identity, 99, "127.0.0.1:0", Folder::create());
    let members = BTreeMap::from([(NodeId(1), nodes[0].identity.node_key.public_key())]);
    clone.transport.set_members(members);
    clone.transport.hint(NodeId(1), nodes[0].address());
    let (refusal, by) = nodes[0].wait_refused();
    assert_eq!((refusal.code, by), (RefusalCode::ClonedIdentity, RefusedBy::Us));
    let (refusal, by) = clone.wait_refused();
    assert_eq!((refusal.code, by), (RefusalCode::ClonedIdentity, RefusedBy::Peer));
    assert!(refusal.sentence.contains("copy of its card"), "{refusal}");
    assert!(clone.transport.connections().is_empty());
    assert_eq!(nodes[0].transport.connections()[&NodeId(2)].claim.hello.start_id, StartId(2));
    drop(clone.stop());
    nodes.into_iter().for_each(|node| drop(node.stop()));
}

#[test]
fn a_removed_member_is_closed_and_refused_with_a_sentence() {
    let site = Site::create();
    let nodes = site.cluster(2);
    let key = nodes[1].identity.node_key.public_key();
    lock(&nodes[0].removed).insert(key);
    nodes[0].transport.set_members(BTreeMap::new());
    let (refusal, by) = nodes[1].wait_refused();
    assert_eq!((refusal.code, by), (RefusalCode::Removed, RefusedBy::Peer));
    let (refusal, by) = nodes[0].wait_refused();
    assert_eq!((refusal.code, by), (RefusalCode::Removed, RefusedBy::Us));
    until("no connection", || nodes.iter().all(|node| node.transport.connections().is_empty()));
    nodes.into_iter().for_each(|node| drop(node.stop()));
}

/// A hostile client: its own endpoint and any TLS configuration.
pub(super) struct Stranger {
    tasks: Arc<TaskGroup>,
    endpoint: quinn::Endpoint,
}

impl Stranger {
    pub fn create(site: &Site) -> Stranger {
        let tasks = TaskGroup::new(site.runner.executor.clone());
        let endpoint = join::client_endpoint(&tasks, ([127, 0, 0, 1], 0).into()).unwrap();
        Stranger { tasks, endpoint }
    }

    pub async fn dial(
        &self,
        config: rustls::ClientConfig,
        to: SocketAddr,
    ) -> Result<Connection, ConnectionError> {
        let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap()));
        self.endpoint.connect_with(config, to, NODE_NAME).unwrap().await
    }

    /// What it is told when it greets as node 2, and how many bytes of streams reached it.
    async fn greeted(&self, config: rustls::ClientConfig, to: SocketAddr) -> (ConnectionError, usize) {
        let connection = match self.dial(config, to).await {
            Ok(connection) => connection,
            Err(error) => return (error, 0),
        };
        let hello = Hello {
            protocol: 1,
            feature_level: 1,
            node_id: NodeId(2),
            store_id: StoreId(2),
            start_id: StartId(77),
            fingerprint: 1,
            term: 0,
            last_index: 0,
            listen_port: 1,
        };
        let mut heard = 0;
        if let Ok((mut send, mut receive)) = connection.open_bi().await {
            let _ = frames::write_value(&mut send, &hello, HELLO_BYTES_MAX, HELLO_LIMIT).await;
            let mut buffer = [0; 4096];
            while let Ok(Some(length)) = receive.read(&mut buffer).await {
                heard += length;
            }
        }
        (connection.closed().await, heard)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.endpoint.close(0u32.into(), b"");
        async_io::block_on(self.tasks.stop());
    }
}

pub(super) fn refusal_in(error: &ConnectionError) -> RefusalCode {
    match error {
        ConnectionError::ApplicationClosed(close) => Refusal::read(close).unwrap().code,
        other => panic!("no refusal: {other}"),
    }
}

#[test]
fn a_peer_without_a_certificate_is_told_nothing() {
    let site = Site::create();
    let node = site.start(&site.identity(1), 1, "127.0.0.1:0", Folder::create());
    let stranger = Stranger::create(&site);
    let config = tls::hostile::peer_client(site.authority.certificate().clone(), None);
    let (error, heard) = site.run(stranger.greeted(config, node.address()));
    assert_eq!((refusal_in(&error), heard), (RefusalCode::NoCertificate, 0));
    assert_eq!(node.wait_refused().0.code, RefusalCode::NoCertificate);
    drop(node.stop());
}

#[test]
fn an_operator_s_certificate_makes_no_node() {
    let site = Site::create();
    let node = site.start(&site.identity(1), 1, "127.0.0.1:0", Folder::create());
    let stranger = Stranger::create(&site);
    let key = NodeKey::create().unwrap();
    for certificate in [
        site.authority.sign_operator(key.public_key(), "ann", 1_795_000_000).unwrap(),
        site.authority.sign_viewer(key.public_key(), "bob", 1_795_000_000).unwrap(),
    ] {
        let authority = site.authority.certificate().clone();
        let config = tls::hostile::peer_client(authority, Some((certificate, &key)));
        let (error, heard) = site.run(stranger.greeted(config, node.address()));
        assert_eq!((refusal_in(&error), heard), (RefusalCode::WrongRole, 0));
    }
    drop(node.stop());
}

#[test]
fn a_foreign_ca_is_refused() {
    let site = Site::create();
    let node = site.start(&site.identity(1), 1, "127.0.0.1:0", Folder::create());
    let stranger = Stranger::create(&site);
    let (foreign, key) = (Authority::create().unwrap(), NodeKey::create().unwrap());
    let certificate = foreign.sign_node(key.public_key()).unwrap();
    let authority = site.authority.certificate().clone();
    let config = tls::hostile::peer_client(authority, Some((certificate.clone(), &key)));
    let (error, heard) = site.run(stranger.greeted(config, node.address()));
    assert!(matches!(error, ConnectionError::ConnectionClosed(_)), "{error}");
    assert_eq!(heard, 0);
    assert_eq!(node.wait_refused().0.code, RefusalCode::UnknownKey);
    // And the other way: we don't talk to a server of another CA.
    let config = tls::hostile::peer_client(foreign.certificate().clone(), Some((certificate, &key)));
    let (error, _) = site.run(stranger.greeted(config, node.address()));
    assert!(matches!(error, ConnectionError::TransportError(_)), "{error}");
    drop(node.stop());
}

#[test]
fn an_oversize_frame_closes_the_connection() {
    let site = Site::create();
    let nodes = site.cluster(2);
    let link = nodes[0].transport.shared().link(NodeId(2)).unwrap();
    site.run(async {
        let mut send = link.connection.open_uni().await.unwrap();
        send.write_all(&[1]).await.unwrap();
        send.write_all(&(FRAME_BYTES_MAX as u32 + 1).to_le_bytes()).await.unwrap();
        let error = link.connection.closed().await;
        assert_eq!(refusal_in(&error), RefusalCode::Malformed);
    });
    nodes.into_iter().for_each(|node| drop(node.stop()));
}

#[test]
fn https_tells_who_the_client_is_and_refuses_a_foreign_certificate() {
    let site = Site::create();
    let identity = site.identity(1);
    let server = HttpsServer::new(&identity.node_key, identity.membership.as_ref().unwrap()).unwrap();
    let key = NodeKey::create().unwrap();
    let ours = site.authority.sign_operator(key.public_key(), "ann", 1_795_000_000).unwrap();
    let foreign = Authority::create().unwrap().sign_operator(key.public_key(), "ann", 0).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let listener = async_io::Async::new(listener).unwrap();
    for (certificate, is_let_in, role) in [
        (Some(ours), true, Some(Role::Operator { name: "ann".into() })),
        (None, true, None),
        (Some(foreign), false, None),
    ] {
        let pair = certificate.map(|certificate| (certificate, &key));
        let client = HttpsClient::new(site.authority.certificate().clone(), pair).unwrap();
        let calling = async {
            let stream = async_io::Async::<std::net::TcpStream>::connect(address).await.unwrap();
            let mut stream = client.connect(stream).await?;
            let mut greeting = [0; 2];
            // With TLS 1.3 a refused certificate shows at the first read.
            let read = stream.read_exact(&mut greeting).await;
            Ok::<bool, HandshakeError>(read.is_ok() && &greeting == b"hi")
        };
        let serving = async {
            let (stream, _) = listener.accept().await.unwrap();
            let (mut stream, peer) = server.accept(stream).await?;
            stream.write_all(b"hi").await.unwrap();
            stream.flush().await.unwrap();
            Ok::<_, HandshakeError>(peer)
        };
        let (called, served) = site.run(future::zip(calling, serving));
        assert_eq!(called.unwrap_or(false), is_let_in);
        assert_eq!(served.is_ok(), is_let_in);
        assert_eq!(served.ok().flatten().map(|peer| peer.role), role);
    }
}
