//! The cluster's certificate authority: makes it, signs with it, and reads what it signed.
//!
//! Public keys → certificates; a peer's certificate → key, role and end of validity. Certificates carry a role and a
//! key, no id and no host name. CA and node certificates run from 1970 to 9999, so that a board without a clock, or one
//! out of a drawer, is never "not yet valid"; removal revokes (protocol 6). Operators' end after a year.
//!
//! Invariant: a certificate has exactly one role, and a node's never reads as an operator's
//! (`a_certificate_has_exactly_one_role`).

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ED25519, PublicKeyData, SignatureAlgorithm, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use super::identity::NodeKey;
use super::ids::PublicKey;
use crate::certificate::validity;

/// The name that every node certificate carries and that diallers expect.
pub const NODE_NAME: &str = "node.tinydc";
const OPERATOR_SUFFIX: &str = ".operator.tinydc";
const VIEWER_SUFFIX: &str = ".viewer.tinydc";
/// One year.
pub const OPERATOR_SECONDS: u64 = 365 * 24 * 3600;
/// Chains are checked as of this moment, which lies in every certificate's validity: dates don't count between nodes.
const CHECKED_AT: Duration = Duration::from_secs(24 * 3600);
/// DER of `SubjectPublicKeyInfo { algorithm: Ed25519 (1.3.101.112), subjectPublicKey }` up to the 32 key bytes (RFC 8410).
const ED25519_SPKI_HEAD: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("make the cluster's CA")]
    Create(#[source] rcgen::Error),
    #[error("read the cluster's CA")]
    Load(#[source] rcgen::Error),
    #[error("sign a certificate for {subject}")]
    Sign {
        subject: String,
        #[source]
        source: rcgen::Error,
    },
    #[error("`{name}` can't be an operator's name: use 1 to 32 of a-z, 0-9 and -, not at an end")]
    Name { name: String },
}

#[derive(Debug, thiserror::Error)]
pub enum ReadCertificateError {
    #[error("the certificate can't be parsed")]
    Parse(#[source] webpki::Error),
    #[error("the certificate is not of this cluster")]
    Chain(#[source] webpki::Error),
    #[error("the certificate's key is not Ed25519")]
    KeyKind,
    #[error("the certificate carries no role of tinydc")]
    Role,
    #[error("the certificate's validity can't be parsed")]
    Validity,
}

/// What a certificate allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    Node,
    Operator { name: String },
    Viewer { name: String },
}

/// A certificate of this cluster, read and its chain checked. Its dates are not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub public_key: PublicKey,
    pub role: Role,
    /// Seconds since 1970. Operators: hold it against cluster time.
    pub not_after: u64,
}

/// The CA with its key. Lives in a voter's memory while it signs; sealed in the state.
pub struct Authority {
    certificate: CertificateDer<'static>,
    key: KeyPair,
}

fn named(common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = date_time_ymd(1970, 1, 1);
    params.not_after = date_time_ymd(9999, 12, 31);
    params
}

/// What every cluster's authority says of itself; certificates name it as their issuer.
fn of_authority() -> CertificateParams {
    let mut params = named("tinydc cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

/// Whom a certificate is for, as rcgen asks.
struct Subject(PublicKey);

impl PublicKeyData for Subject {
    fn der_bytes(&self) -> &[u8] {
        &self.0.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ED25519
    }
}

impl Authority {
    pub fn create() -> Result<Authority, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(AuthorityError::Create)?;
        let certificate = of_authority().self_signed(&key).map_err(AuthorityError::Create)?;
        Ok(Authority { certificate: certificate.der().clone(), key })
    }

    /// From what `certificate()` and `key_bytes()` gave.
    pub fn load(certificate: CertificateDer<'static>, key: &[u8]) -> Result<Authority, AuthorityError> {
        let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(key)).map_err(AuthorityError::Load)?;
        Ok(Authority { certificate, key })
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// PKCS#8; seal it before it is stored anywhere.
    pub fn key_bytes(&self) -> &[u8] {
        self.key.serialized_der()
    }

    fn sign(
        &self,
        params: CertificateParams,
        key: PublicKey,
        subject: &str,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        let sign = || {
            let issuer = Issuer::new(of_authority(), &self.key);
            params.signed_by(&Subject(key), &issuer)
        };
        let certificate =
            sign().map_err(|source| AuthorityError::Sign { subject: subject.into(), source })?;
        Ok(certificate.der().clone())
    }

    /// The same key gives the same bytes: a repeated join gets the same certificate.
    pub fn sign_node(&self, key: PublicKey) -> Result<CertificateDer<'static>, AuthorityError> {
        let mut params = with_role("tinydc node", NODE_NAME)?;
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, key, "a node")
    }

    /// `now` is cluster time in seconds since 1970; the certificate ends a year later.
    pub fn sign_operator(
        &self,
        key: PublicKey,
        name: &str,
        now: u64,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        self.sign_person(key, name, OPERATOR_SUFFIX, now)
    }

    /// As `sign_operator`, for someone who may only look.
    pub fn sign_viewer(
        &self,
        key: PublicKey,
        name: &str,
        now: u64,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        self.sign_person(key, name, VIEWER_SUFFIX, now)
    }

    fn sign_person(
        &self,
        key: PublicKey,
        name: &str,
        suffix: &str,
        now: u64,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        if !is_person_name(name) {
            return Err(AuthorityError::Name { name: name.into() });
        }
        let mut params = with_role(name, &format!("{name}{suffix}"))?;
        params.not_after = params.not_before + Duration::from_secs(now.saturating_add(OPERATOR_SECONDS));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, key, name)
    }
}

/// What a machine without a cluster shows for its key; nobody trusts it.
pub(super) fn self_signed(key: &NodeKey) -> Result<CertificateDer<'static>, AuthorityError> {
    let pair = KeyPair::try_from(&PrivatePkcs8KeyDer::from(key.as_pkcs8())).map_err(AuthorityError::Load)?;
    let params = with_role("tinydc", NODE_NAME)?;
    let certificate = params.self_signed(&pair).map_err(AuthorityError::Create)?;
    Ok(certificate.der().clone())
}

fn with_role(common_name: &str, role: &str) -> Result<CertificateParams, AuthorityError> {
    let source = |source| AuthorityError::Sign { subject: common_name.into(), source };
    let mut params = CertificateParams::new(vec![role.to_owned()]).map_err(source)?;
    let dated = named(common_name);
    params.distinguished_name = dated.distinguished_name;
    params.not_before = dated.not_before;
    params.not_after = dated.not_after;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    Ok(params)
}

/// 1 to 32 of a-z, 0-9 and dashes inside: what a DNS label and a table column both bear.
pub fn is_person_name(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=32).contains(&name.len())
        && name.bytes().all(is_plain)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// Checks that `authority` signed `certificate` for this usage, at no particular date, and reads it.
pub(super) fn read_certificate(
    certificate: &CertificateDer<'_>,
    authority: &CertificateDer<'_>,
    usage: KeyUsage,
) -> Result<Peer, ReadCertificateError> {
    let parsed = EndEntityCert::try_from(certificate).map_err(ReadCertificateError::Parse)?;
    let anchor = webpki::anchor_from_trusted_cert(authority).map_err(ReadCertificateError::Parse)?;
    parsed
        .verify_for_usage(
            &[webpki::ring::ED25519],
            &[anchor],
            &[],
            UnixTime::since_unix_epoch(CHECKED_AT),
            usage,
            None,
            None,
        )
        .map_err(ReadCertificateError::Chain)?;
    let information = parsed.subject_public_key_info();
    let key = information.strip_prefix(&ED25519_SPKI_HEAD[..]).ok_or(ReadCertificateError::KeyKind)?;
    let key = key.try_into().map_err(|_| ReadCertificateError::KeyKind)?;
    let names: Vec<&str> = parsed.valid_dns_names().collect();
    let [name] = names[..] else { return Err(ReadCertificateError::Role) };
    let not_after = validity(certificate).ok_or(ReadCertificateError::Validity)?.not_after;
    Ok(Peer { public_key: PublicKey(key), role: read_role(name)?, not_after })
}

/// A client's certificate, as an operator's, a viewer's or a node's.
pub fn read_client(
    certificate: &CertificateDer<'_>,
    authority: &CertificateDer<'_>,
) -> Result<Peer, ReadCertificateError> {
    read_certificate(certificate, authority, KeyUsage::client_auth())
}

fn read_role(name: &str) -> Result<Role, ReadCertificateError> {
    if name == NODE_NAME {
        return Ok(Role::Node);
    }
    let person = |suffix: &str| name.strip_suffix(suffix).filter(|name| is_person_name(name));
    match (person(OPERATOR_SUFFIX), person(VIEWER_SUFFIX)) {
        (Some(name), None) => Ok(Role::Operator { name: name.into() }),
        (None, Some(name)) => Ok(Role::Viewer { name: name.into() }),
        _ => Err(ReadCertificateError::Role),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::identity::NodeKey;

    const NOW: u64 = 1_795_000_000;

    #[test]
    fn a_certificate_has_exactly_one_role() {
        let authority = Authority::create().unwrap();
        let key = NodeKey::create().unwrap().public_key();
        let read = |certificate| read_client(&certificate, authority.certificate()).unwrap();
        let node = read(authority.sign_node(key).unwrap());
        assert_eq!(node, Peer { public_key: key, role: Role::Node, not_after: 253_402_214_400 });
        let operator = read(authority.sign_operator(key, "node", NOW).unwrap());
        assert_eq!(operator.role, Role::Operator { name: "node".into() });
        assert_eq!(operator.not_after, NOW + OPERATOR_SECONDS);
        let viewer = read(authority.sign_viewer(key, "ann", NOW).unwrap());
        assert_eq!(viewer.role, Role::Viewer { name: "ann".into() });
        for name in ["", "-a", "a.operator", "A", "a b", "node.tinydc", &"a".repeat(33)] {
            assert!(authority.sign_operator(key, name, NOW).is_err(), "{name}");
        }
    }

    #[test]
    fn a_person_never_passes_as_a_server() {
        let authority = Authority::create().unwrap();
        let key = NodeKey::create().unwrap().public_key();
        let operator = authority.sign_operator(key, "ann", NOW).unwrap();
        let read = read_certificate(&operator, authority.certificate(), KeyUsage::server_auth());
        assert!(matches!(read, Err(ReadCertificateError::Chain(_))));
    }

    #[test]
    fn another_cluster_s_certificate_is_refused() {
        let (ours, theirs) = (Authority::create().unwrap(), Authority::create().unwrap());
        let certificate = theirs.sign_node(NodeKey::create().unwrap().public_key()).unwrap();
        let read = read_client(&certificate, ours.certificate());
        assert!(matches!(read, Err(ReadCertificateError::Chain(_))));
    }

    #[test]
    fn a_loaded_authority_signs_the_same_bytes() {
        let authority = Authority::create().unwrap();
        let key = NodeKey::create().unwrap().public_key();
        let loaded = Authority::load(authority.certificate().clone(), authority.key_bytes()).unwrap();
        assert_eq!(loaded.sign_node(key).unwrap(), authority.sign_node(key).unwrap());
    }
}
