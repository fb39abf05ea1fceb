//! The cluster's second certificate authority: for hosts that browsers visit.
//!
//! Host → a certificate and its key. ECDSA P-256, because browsers and many clients refuse Ed25519, which the first
//! authority uses between nodes. Neither can sign what the other is trusted for: they share no key, and nodes trust only
//! the first. People download this one's certificate and tell their machines to trust it.
//!
//! Invariant: a certificate lives no longer than browsers accept and holds for its host (`a_host_s_certificate_is_accepted`).

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use std::time::Duration;

const DAY_SECONDS: u64 = 24 * 3600;
/// Browsers accept 398 days (CA/Browser Forum, Baseline Requirements 6.3.2).
const LIFE_SECONDS: u64 = 397 * DAY_SECONDS;
/// Clocks of visitors may be slow.
const EARLIER_SECONDS: u64 = DAY_SECONDS;

#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    #[error("make the authority for hosts")]
    Create(#[source] rcgen::Error),
    #[error("read the authority for hosts")]
    Load(#[source] rcgen::Error),
    #[error("sign a certificate for {host}")]
    Sign {
        host: String,
        #[source]
        source: rcgen::Error,
    },
}

pub struct ServingAuthority {
    cluster: String,
    certificate: CertificateDer<'static>,
    key: KeyPair,
}

/// A host's certificate and the key that was made for it.
pub struct Signed {
    pub chain_pem: String,
    /// A secret.
    pub key_pem: String,
    /// Seconds since 1970.
    pub not_before: u64,
    pub not_after: u64,
}

/// What the authority of a cluster says of itself; certificates name it as their issuer.
fn of_authority(cluster: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "tinydc");
    params.distinguished_name.push(DnType::CommonName, format!("tinydc {cluster} CA"));
    // A board out of a drawer must not find it ended, nor one without a clock not yet begun.
    params.not_before = date_time_ymd(2000, 1, 1);
    params.not_after = date_time_ymd(2099, 12, 31);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl ServingAuthority {
    pub fn create(cluster: &str) -> Result<ServingAuthority, ServingError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(ServingError::Create)?;
        let certificate = of_authority(cluster).self_signed(&key).map_err(ServingError::Create)?;
        Ok(ServingAuthority { cluster: cluster.into(), certificate: certificate.der().clone(), key })
    }

    /// From what `certificate()` and `key_bytes()` gave.
    pub fn load(cluster: &str, certificate: &[u8], key: &[u8]) -> Result<ServingAuthority, ServingError> {
        let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(key)).map_err(ServingError::Load)?;
        let certificate = CertificateDer::from(certificate.to_vec());
        Ok(ServingAuthority { cluster: cluster.into(), certificate, key })
    }

    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// PKCS#8; seal it before it is stored anywhere.
    pub fn key_bytes(&self) -> &[u8] {
        self.key.serialized_der()
    }

    /// `host` may begin with `*.`; `now` is cluster time in seconds since 1970.
    pub fn sign(&self, host: &str, now: u64) -> Result<Signed, ServingError> {
        let not_before = now.saturating_sub(EARLIER_SECONDS);
        let not_after = not_before + LIFE_SECONDS;
        let sign = || {
            let issuer = Issuer::new(of_authority(&self.cluster), &self.key);
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
            let mut params = CertificateParams::new(vec![host.to_owned()])?;
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, host);
            let epoch = date_time_ymd(1970, 1, 1);
            params.not_before = epoch + Duration::from_secs(not_before);
            params.not_after = epoch + Duration::from_secs(not_after);
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            params.use_authority_key_identifier_extension = true;
            Ok((params.signed_by(&key, &issuer)?.pem(), key.serialize_pem()))
        };
        let (chain_pem, key_pem) =
            sign().map_err(|source| ServingError::Sign { host: host.into(), source })?;
        Ok(Signed { chain_pem, key_pem, not_before, not_after })
    }
}

/// DER as text, as programs import it.
pub fn to_pem(certificate: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(certificate);
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{ServerName, UnixTime};
    use webpki::{EndEntityCert, KeyUsage};

    const NOW: u64 = 1_800_000_000;

    #[test]
    fn a_host_s_certificate_is_accepted() {
        let made = ServingAuthority::create("home").unwrap();
        let authority = ServingAuthority::load("home", made.certificate(), made.key_bytes()).unwrap();
        let pem = to_pem(authority.certificate());
        let root = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        let anchor = webpki::anchor_from_trusted_cert(&root).unwrap();
        for (host, visited) in [("shop.test", "shop.test"), ("*.shop.test", "a.shop.test")] {
            let signed = authority.sign(host, NOW).unwrap();
            assert!(signed.not_after - signed.not_before <= 397 * DAY_SECONDS && signed.not_before < NOW);
            let der = CertificateDer::from_pem_slice(signed.chain_pem.as_bytes()).unwrap();
            let leaf = EndEntityCert::try_from(&der).unwrap();
            let verify = |now: u64| {
                let now = UnixTime::since_unix_epoch(Duration::from_secs(now));
                let algorithms = [webpki::ring::ECDSA_P256_SHA256];
                let usage = KeyUsage::server_auth();
                leaf.verify_for_usage(&algorithms, std::slice::from_ref(&anchor), &[], now, usage, None, None)
                    .is_ok()
            };
            assert!(verify(NOW) && verify(signed.not_after - 1) && !verify(signed.not_after + 1), "{host}");
            let name = |name: &str| ServerName::try_from(name.to_string()).unwrap();
            assert!(leaf.verify_is_valid_for_subject_name(&name(visited)).is_ok());
            assert!(leaf.verify_is_valid_for_subject_name(&name("other.test")).is_err());
        }
    }
}
