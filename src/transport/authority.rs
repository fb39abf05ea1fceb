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
    KeyPair, KeyUsagePurpose, PKCS_ED25519, SubjectPublicKeyInfo, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use super::identity::NodeKey;
use super::ids::PublicKey;

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

impl Authority {
    pub fn create() -> Result<Authority, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(AuthorityError::Create)?;
        let mut params = named("tinydc cluster");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).map_err(AuthorityError::Create)?;
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
            let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key)?;
            let key = SubjectPublicKeyInfo::from_der(&[&ED25519_SPKI_HEAD[..], &key.0].concat())?;
            params.signed_by(&key, &issuer)
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
    let not_after = validity_end(certificate).ok_or(ReadCertificateError::Validity)?;
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

/// One DER element: its tag, its content, and what follows it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81 => (usize::from(*rest.first()?), rest.get(1..)?),
        0x82 => (usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?])), rest.get(2..)?),
        _ => return None,
    };
    Some((tag, rest.get(..length)?, rest.get(length..)?))
}

/// Seconds since 1970 at which a certificate ends. webpki checks this field but doesn't show it.
fn validity_end(certificate: &[u8]) -> Option<u64> {
    let (_, body, _) = element(certificate)?;
    let (_, mut fields, _) = element(body)?;
    // TBSCertificate (RFC 5280 4.1): [0] version, serial, signature, issuer, then validity.
    for _ in 0..4 {
        fields = element(fields)?.2;
    }
    let (_, validity, _) = element(fields)?;
    let (_, _, end) = element(validity)?;
    let (tag, text, _) = element(end)?;
    let text = std::str::from_utf8(text).ok()?;
    let number = |range: std::ops::Range<usize>| text.get(range)?.parse::<u64>().ok();
    // UTCTime has two digits of the year and means 1950 to 2049; GeneralizedTime has four.
    let (year, at) = match tag {
        0x17 => (number(0..2).map(|year| if year < 50 { 2000 + year } else { 1900 + year })?, 2),
        0x18 => (number(0..4)?, 4),
        _ => return None,
    };
    let (month, day) = (number(at..at + 2)?, number(at + 2..at + 4)?);
    let (hour, minute, second) = (number(at + 4..at + 6)?, number(at + 6..at + 8)?, number(at + 8..at + 10)?);
    let days = days_since_1970(year, month, day)?;
    Some(days * 86_400 + hour * 3600 + minute * 60 + second)
}

fn days_since_1970(year: u64, month: u64, day: u64) -> Option<u64> {
    const BEFORE_MONTH: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let is_leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let leap_years = |year: u64| year / 4 - year / 100 + year / 400;
    let whole_years = (year.checked_sub(1970)?) * 365 + leap_years(year - 1) - leap_years(1969);
    let month_start = BEFORE_MONTH.get(usize::try_from(month.checked_sub(1)?).ok()?)?;
    Some(whole_years + month_start + u64::from(is_leap && month > 2) + day.checked_sub(1)?)
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

    #[test]
    fn days_are_counted_as_the_calendar_does() {
        let cases =
            [(1970, 1, 1, 0), (2000, 2, 29, 11_016), (2026, 11, 24, 20_781), (9999, 12, 31, 2_932_896)];
        for (year, month, day, days) in cases {
            assert_eq!(days_since_1970(year, month, day), Some(days), "{year}-{month}-{day}");
        }
        assert_eq!(days_since_1970(2026, 13, 1), None);
    }
}
