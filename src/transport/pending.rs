//! A machine without a cluster on the network: it announces itself and takes whoever knows its code.
//!
//! A key and a name → one UDP port, announcements (`pending_announce`) and what strangers ask by the code (`door`). It
//! knows no cluster and trusts nobody; the node layer makes and shows the code.
//!
//! Invariant: after `stop` the port is free and no task is left (`tests::coded::a_stopped_machine_frees_its_port`).

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_channel::Receiver;
use async_executor::Executor;
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicServerConfig};
use tracing::debug;

use super::authority::{self, AuthorityError};
use super::door::{self, CodeAsked, Door};
use super::executor::{QuicRuntime, TaskGroup, endpoint_config, lock, within};
use super::hello::CLOSE_SHUTDOWN;
use super::identity::NodeKey;
use super::operators::OperatorKey;
use super::peers::transport_parameters;
pub use super::pending_announce::{
    KeyHash, Neighbours, Waiting, browse, find_cluster, key_hash, key_hash_text,
};
use super::sealing::derive_key;
use super::serve::Counted;
use super::tls::{self, TlsError};

const HANDSHAKES_MAX: usize = 16;
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(3);
/// Requests that wait for the node layer: it takes one after the other.
const ASKED_MAX: usize = 4;
/// A reply on its way is still heard.
const FINISH_LIMIT: Duration = Duration::from_secs(1);
const CLOSE_LIMIT: Duration = Duration::from_millis(500);

pub struct PendingConfig {
    pub executor: Arc<Executor<'static>>,
    /// UDP: the port of the member that this machine may become.
    pub listen: SocketAddr,
    pub key: NodeKey,
    pub name: String,
    pub architecture: String,
}

#[derive(Debug, thiserror::Error)]
pub enum PendingError {
    #[error("listen on UDP {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("sign a certificate for this machine")]
    Certificate(#[from] AuthorityError),
    #[error("set up TLS")]
    Tls(#[from] TlsError),
    #[error("set up QUIC's encryption")]
    Quic(#[from] NoInitialCipherSuite),
}

pub struct Pending {
    door: Arc<Door>,
    endpoint: quinn::Endpoint,
    address: SocketAddr,
    would_found: Arc<Mutex<Option<String>>>,
    accepting: Arc<TaskGroup>,
    conversations: Arc<TaskGroup>,
    quic_tasks: Arc<TaskGroup>,
}

impl Pending {
    pub fn start(config: PendingConfig) -> Result<(Pending, Receiver<CodeAsked>), PendingError> {
        let certificate = authority::self_signed(&config.key)?;
        let server = tls::pending_server_config(&config.key, certificate)?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server)?));
        server.transport_config(transport_parameters());
        let listen = |source| PendingError::Listen { address: config.listen, source };
        let socket = UdpSocket::bind(config.listen).map_err(listen)?;
        let address = socket.local_addr().map_err(listen)?;
        let groups = || TaskGroup::new(config.executor.clone());
        let (accepting, conversations, quic_tasks) = (groups(), groups(), groups());
        let reset = derive_key(config.key.as_pkcs8(), "stateless reset");
        let runtime = Arc::new(QuicRuntime(quic_tasks.clone()));
        let endpoint =
            quinn::Endpoint::new(endpoint_config(&reset), Some(server), socket, runtime).map_err(listen)?;
        let (sender, asked) = async_channel::bounded(ASKED_MAX);
        // Keys of the configuration are for members; here only the code counts.
        let door = Door::new(Vec::<OperatorKey>::new(), Box::new(move |one| sender.try_send(one).is_ok()));
        accepting.spawn(accept(endpoint.clone(), door.clone(), conversations.clone()));
        let would_found = Arc::new(Mutex::new(None));
        let (founding, begin) = (would_found.clone(), Instant::now());
        let hash = key_hash(&config.key.public_key());
        let own = move || Waiting {
            name: config.name.clone(),
            address,
            architecture: config.architecture.clone(),
            key_hash: hash,
            waits_s: begin.elapsed().as_secs(),
            would_found: lock(&founding).clone(),
        };
        accepting.spawn(super::pending_announce::announce(config.listen.ip(), own));
        let pending = Pending { door, endpoint, address, would_found, accepting, conversations, quic_tasks };
        Ok((pending, asked))
    }

    pub fn door(&self) -> &Arc<Door> {
        &self.door
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Announced from now on, so that of several founders one goes first.
    pub fn set_would_found(&self, cluster: Option<String>) {
        *lock(&self.would_found) = cluster;
    }

    /// Takes nobody any more, lets a reply arrive, and frees the port.
    pub async fn stop(self) {
        self.accepting.stop().await;
        self.conversations.finish(FINISH_LIMIT).await;
        self.endpoint.close(CLOSE_SHUTDOWN, b"this machine belongs to a cluster now");
        self.conversations.stop().await;
        within(CLOSE_LIMIT, self.endpoint.wait_idle()).await;
        self.quic_tasks.stop().await;
    }
}

async fn accept(endpoint: quinn::Endpoint, door: Arc<Door>, conversations: Arc<TaskGroup>) {
    let handshakes = Arc::new(AtomicUsize::new(0));
    while let Some(incoming) = endpoint.accept().await {
        if handshakes.load(Ordering::Relaxed) >= HANDSHAKES_MAX {
            incoming.refuse();
        } else if let Ok(connecting) = incoming.accept() {
            let (door, handshakes) = (door.clone(), handshakes.clone());
            conversations.spawn(async move {
                let Some(entered) = Counted::enter(&handshakes, HANDSHAKES_MAX) else { return };
                let address = connecting.remote_address();
                match within(HANDSHAKE_LIMIT, connecting).await {
                    Some(Ok(connection)) => {
                        drop(entered);
                        door::serve(&door, connection).await;
                    }
                    Some(Err(error)) => debug!(%address, error = %error, "handshake failed"),
                    None => debug!(%address, "handshake timed out"),
                }
            });
        }
    }
}
