//! The TLS of the API's TCP port, and of the laptop that calls it.
//!
//! A node's identity → an acceptor that tells who the client is; a context's CA and certificate → a connector. The
//! server shows the node's certificate. It authorises nobody: routes decide by role, and hold `not_after` against
//! cluster time, because a board's clock may be wrong.
//!
//! Invariant: a client whose certificate another CA signed gets no response
//! (`tests::hostile::https_tells_who_the_client_is_and_refuses_a_foreign_certificate`).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_lite::{AsyncRead, AsyncWrite};
use futures_rustls::{TlsAcceptor, TlsConnector, client, server};
use rustls::pki_types::{CertificateDer, ServerName};

use super::authority::{NODE_NAME, Peer, read_client};
use super::executor::within;
use super::identity::{Membership, NodeKey};
use super::tls::{self, TlsError};

/// A client that doesn't finish its handshake in this time is dropped.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    #[error("the TLS handshake took longer than {} s", HANDSHAKE_LIMIT.as_secs())]
    Timeout,
    #[error("TLS handshake")]
    Handshake(#[source] io::Error),
}

/// The server side of TCP 7400.
#[derive(Clone)]
pub struct HttpsServer {
    acceptor: TlsAcceptor,
    authority: CertificateDer<'static>,
}

impl HttpsServer {
    pub fn new(key: &NodeKey, membership: &Membership) -> Result<HttpsServer, TlsError> {
        let config = tls::server_config(key, membership, &[b"http/1.1"])?;
        Ok(HttpsServer {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            authority: membership.authority.clone(),
        })
    }

    /// The encrypted stream, and who the client is if it showed a certificate of this cluster.
    pub async fn accept<Stream>(
        &self,
        stream: Stream,
    ) -> Result<(server::TlsStream<Stream>, Option<Peer>), HandshakeError>
    where
        Stream: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = within(HANDSHAKE_LIMIT, self.acceptor.accept(stream))
            .await
            .ok_or(HandshakeError::Timeout)?
            .map_err(HandshakeError::Handshake)?;
        let (_, session) = stream.get_ref();
        let certificate = session.peer_certificates().and_then(|chain| chain.first());
        let peer = certificate.and_then(|certificate| read_client(certificate, &self.authority).ok());
        Ok((stream, peer))
    }
}

/// The client side: pins the cluster's CA.
#[derive(Clone)]
pub struct HttpsClient {
    connector: TlsConnector,
}

impl HttpsClient {
    pub fn new(
        authority: CertificateDer<'static>,
        certificate: Option<(CertificateDer<'static>, &NodeKey)>,
    ) -> Result<HttpsClient, TlsError> {
        let config = tls::api_client_config(authority, certificate)?;
        Ok(HttpsClient { connector: TlsConnector::from(Arc::new(config)) })
    }

    pub async fn connect<Stream>(&self, stream: Stream) -> Result<client::TlsStream<Stream>, HandshakeError>
    where
        Stream: AsyncRead + AsyncWrite + Unpin,
    {
        let name = ServerName::try_from(NODE_NAME).expect("the constant is a DNS name");
        within(HANDSHAKE_LIMIT, self.connector.connect(name, stream))
            .await
            .ok_or(HandshakeError::Timeout)?
            .map_err(HandshakeError::Handshake)
    }
}
