//! Certificates for the hosts that clients name, and TLS with them.
//!
//! The name in the handshake (SNI) → a certificate of the table, else the handshake fails. TLS 1.3 only, HTTP/2 or
//! HTTP/1.1 by ALPN. Nobody is asked for a certificate.

use super::routes::Table;
use crate::certificate::{Validity, validity};
use futures_rustls::TlsAcceptor;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ClientHello, ResolvesServerCert};
pub use rustls::sign::CertifiedKey;
use std::fmt;
use std::sync::{Arc, RwLock};

pub const ALPN_HTTP2: &[u8] = b"h2";
const ALPN_HTTP1: &[u8] = b"http/1.1";
const SESSIONS_MAX: usize = 256;

#[derive(Clone)]
pub struct HostCertificate {
    /// `shop.example.org` or `*.example.org`.
    pub host: String,
    pub certificate: Arc<CertifiedKey>,
}

impl fmt::Debug for HostCertificate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("HostCertificate").field("host", &self.host).finish_non_exhaustive()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("read the certificates; they begin with -----BEGIN CERTIFICATE-----")]
    Chain(#[source] rustls::pki_types::pem::Error),
    #[error("there is no certificate")]
    NoCertificate,
    #[error("read the private key; it begins with -----BEGIN PRIVATE KEY-----, or EC or RSA before PRIVATE")]
    Key(#[source] rustls::pki_types::pem::Error),
    #[error("use the key with the certificate")]
    Pair(#[source] rustls::Error),
    #[error("it is for {names}")]
    OtherHost { names: String },
    #[error("the certificate can't be parsed")]
    Parse,
    #[error("set up TLS")]
    Versions(#[source] rustls::Error),
}

/// A chain, the host's own certificate first, and its key.
pub fn certificate_from_pem(chain: &str, key: &str) -> Result<Arc<CertifiedKey>, CertificateError> {
    let chain = CertificateDer::pem_slice_iter(chain.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(CertificateError::Chain)?;
    if chain.is_empty() {
        return Err(CertificateError::NoCertificate);
    }
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(CertificateError::Key)?;
    let certified = CertifiedKey::from_der(chain, key, &ring::default_provider());
    certified.map(Arc::new).map_err(CertificateError::Pair)
}

/// What a certificate says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateAbout {
    pub names: Vec<String>,
    /// Seconds since 1970.
    pub not_before: u64,
    pub not_after: u64,
}

/// What the first certificate of a chain says, if it holds for `host` (`*.example.org`: for all hosts that the wildcard
/// means). Whether it has ended is the reader's to judge.
pub fn covers(certificate: &CertifiedKey, host: &str) -> Result<CertificateAbout, CertificateError> {
    let first = certificate.cert.first().ok_or(CertificateError::NoCertificate)?;
    let leaf = webpki::EndEntityCert::try_from(first).map_err(|_| CertificateError::Parse)?;
    let names: Vec<String> = leaf.valid_dns_names().map(String::from).collect();
    let visited = host.replacen('*', "any", 1);
    let name = ServerName::try_from(visited).map_err(|_| CertificateError::Parse)?;
    if leaf.verify_is_valid_for_subject_name(&name).is_err() {
        let names = if names.is_empty() { "no name".into() } else { names.join(", ") };
        return Err(CertificateError::OtherHost { names });
    }
    let Validity { not_before, not_after } = validity(first).ok_or(CertificateError::Parse)?;
    Ok(CertificateAbout { names, not_before, not_after })
}

pub struct Resolver {
    pub table: Arc<RwLock<Arc<Table>>>,
}

impl Resolver {
    pub fn certificate(&self, host: &str) -> Option<Arc<CertifiedKey>> {
        let table = self.table.read().unwrap_or_else(|poison| poison.into_inner()).clone();
        table.certificate(host)
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Resolver")
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.certificate(&hello.server_name().unwrap_or_default().to_ascii_lowercase())
    }
}

pub fn acceptor(resolver: Arc<Resolver>) -> Result<TlsAcceptor, CertificateError> {
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(CertificateError::Versions)?
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec(), ALPN_HTTP1.to_vec()];
    config.session_storage = rustls::server::ServerSessionMemoryCache::new(SESSIONS_MAX);
    Ok(TlsAcceptor::from(Arc::new(config)))
}
