//! TLS 1.3 between nodes, for joiners and for laptops: our verifiers and the rustls configurations built from them.
//!
//! An identity → server and client configurations. The chain is checked against the cluster's CA at a fixed date, so an
//! unset clock never locks a board out; who the key belongs to is decided after the handshake. Sessions are never
//! resumed: each connection proves its key again, so a removal holds at once.
//!
//! Invariant: a verifier accepts only what this CA signed for the role it asks for (`tests::hostile::a_foreign_ca_is_refused`).

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
};
use webpki::KeyUsage;

use super::authority::{ReadCertificateError, Role, read_certificate, read_client};
use super::identity::{Membership, NodeKey};
use super::ids::AuthorityHash;

/// Between members; a client certificate is required.
pub const ALPN_PEER: &[u8] = b"tinydc/1";
/// For strangers with a token; no client certificate.
pub const ALPN_JOIN: &[u8] = b"tinydc-join/1";
/// For strangers with a code or an operator's key; no client certificate, and any server's.
pub const ALPN_CODE: &[u8] = b"tinydc-code/1";

#[derive(Debug, thiserror::Error)]
#[error("set up TLS with this identity")]
pub struct TlsError(#[source] rustls::Error);

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificate_error(error: ReadCertificateError) -> rustls::Error {
    let kind = match error {
        ReadCertificateError::Parse(_) | ReadCertificateError::Validity => CertificateError::BadEncoding,
        ReadCertificateError::Chain(_) => CertificateError::UnknownIssuer,
        ReadCertificateError::KeyKind | ReadCertificateError::Role => CertificateError::InvalidPurpose,
    };
    rustls::Error::InvalidCertificate(kind)
}

/// TLS 1.2 is not offered by any configuration here; a peer that gets this far is broken.
fn no_tls12() -> rustls::Error {
    rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls13RequiredForQuic)
}

fn verify_signature(
    provider: &CryptoProvider,
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    verify_tls13_signature(message, certificate, signed, &provider.signature_verification_algorithms)
}

/// How a client knows the cluster it dials.
#[derive(Debug)]
enum Anchor {
    /// A member or a laptop holds the CA.
    Certificate(CertificateDer<'static>),
    /// A joiner holds its hash; the server's chain brings the CA itself.
    Hash(AuthorityHash),
    /// Who knows only a code: the proof that follows finds out who answers.
    Nobody,
}

/// Accepts servers with a node certificate of one CA. The name that was dialled does not count, nor do dates.
#[derive(Debug)]
struct NodeServerVerifier {
    anchor: Anchor,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for NodeServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = match &self.anchor {
            Anchor::Certificate(authority) => authority,
            Anchor::Hash(hash) => intermediates
                .iter()
                .find(|certificate| AuthorityHash::of(certificate) == *hash)
                .ok_or(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer))?,
            Anchor::Nobody => return Ok(ServerCertVerified::assertion()),
        };
        let peer =
            read_certificate(end_entity, authority, KeyUsage::server_auth()).map_err(certificate_error)?;
        match peer.role {
            Role::Node => Ok(ServerCertVerified::assertion()),
            _ => Err(rustls::Error::InvalidCertificate(CertificateError::InvalidPurpose)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(&self.provider, message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// Asks for a client certificate of this CA, takes a client without one too; the caller enforces roles.
#[derive(Debug)]
struct OptionalClientVerifier {
    authority: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for OptionalClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// Empty: naming the CA would tell a stranger something.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        read_client(end_entity, &self.authority).map_err(certificate_error)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(&self.provider, message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// A node's server side; the chain includes the CA so that a joiner can compare its hash.
pub(super) fn server_config(
    key: &NodeKey,
    membership: &Membership,
    protocols: &[&[u8]],
) -> Result<ServerConfig, TlsError> {
    let provider = provider();
    let verifier =
        OptionalClientVerifier { authority: membership.authority.clone(), provider: provider.clone() };
    let chain = vec![membership.certificate.clone(), membership.authority.clone()];
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(chain, key.to_rustls())
        .map_err(TlsError)?;
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client_config(
    anchor: Anchor,
    certificate: Option<(CertificateDer<'static>, &NodeKey)>,
    protocol: &[u8],
) -> Result<ClientConfig, TlsError> {
    let provider = provider();
    let verifier = NodeServerVerifier { anchor, provider: provider.clone() };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match certificate {
        Some((certificate, key)) => {
            builder.with_client_auth_cert(vec![certificate], key.to_rustls()).map_err(TlsError)?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// A member that dials a member.
pub(super) fn peer_client_config(key: &NodeKey, membership: &Membership) -> Result<ClientConfig, TlsError> {
    client_config(
        Anchor::Certificate(membership.authority.clone()),
        Some((membership.certificate.clone(), key)),
        ALPN_PEER,
    )
}

/// A stranger that holds a token.
pub(super) fn join_client_config(authority: AuthorityHash) -> Result<ClientConfig, TlsError> {
    client_config(Anchor::Hash(authority), None, ALPN_JOIN)
}

/// Whoever holds a code or an operator's key.
pub(super) fn code_client_config() -> Result<ClientConfig, TlsError> {
    client_config(Anchor::Nobody, None, ALPN_CODE)
}

/// A machine without a cluster: its own word for its key is all it has.
pub(super) fn pending_server_config(
    key: &NodeKey,
    certificate: CertificateDer<'static>,
) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError)?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key.to_rustls())
        .map_err(TlsError)?;
    config.alpn_protocols = vec![ALPN_CODE.to_vec()];
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// A laptop's context, or any client of the HTTPS API that holds the cluster's CA.
pub(super) fn api_client_config(
    authority: CertificateDer<'static>,
    certificate: Option<(CertificateDer<'static>, &NodeKey)>,
) -> Result<ClientConfig, TlsError> {
    client_config(Anchor::Certificate(authority), certificate, b"http/1.1")
}

#[cfg(test)]
pub(super) mod hostile {
    //! Client configurations that no honest node has.
    use super::*;

    /// Trusts `authority`, shows `certificate` or none, speaks the peers' protocol.
    pub fn peer_client(
        authority: CertificateDer<'static>,
        certificate: Option<(CertificateDer<'static>, &NodeKey)>,
    ) -> ClientConfig {
        client_config(Anchor::Certificate(authority), certificate, ALPN_PEER).unwrap()
    }
}
