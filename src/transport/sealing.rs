//! The cluster key and the recovery key: what seals the CA key and secrets in the replicated state.
//!
//! Bytes and a purpose → sealed bytes (version, nonce, AES-256-GCM), and back. The key of each purpose is derived with
//! HKDF-SHA256, so one kind of sealed value can't be passed off as another. It never stores anything.
//!
//! Invariant: a changed byte, another key or another purpose doesn't unseal (`only_the_same_bytes_unseal`).

use std::fmt;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

use super::codeword::{self, CodewordError};

const VERSION: u8 = 1;
const CLUSTER_KEY_PREFIX: &str = "tdc-clusterkey-";
const RECOVERY_PREFIX: &str = "tdc-recovery-";
const RECOVERY_PURPOSE: &str = "recovery";
/// 160 bits: 39 characters to write down, and nothing that can be guessed.
const RECOVERY_BYTES: usize = 20;

#[derive(Debug, thiserror::Error)]
pub enum SealError {
    #[error("the system gave no random bytes")]
    Random,
    #[error("seal {purpose}")]
    Encrypt { purpose: String },
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnsealError {
    #[error("sealed {purpose} has format {version}, this tinydc knows {VERSION}")]
    Version { purpose: String, version: u8 },
    #[error("sealed {purpose} is {length} bytes, too short")]
    Short { purpose: String, length: usize },
    #[error("{purpose} doesn't unseal: another key sealed it, or it was changed")]
    Authenticity { purpose: String },
}

/// Seals what the cluster replicates; voters hold it (protocol 7).
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey([u8; 32]);

impl fmt::Debug for ClusterKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ClusterKey(…)")
    }
}

struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF-SHA256 of `secret` for one purpose.
pub(super) fn derive_key(secret: &[u8], purpose: &str) -> [u8; 32] {
    let mut key = [0; 32];
    Salt::new(HKDF_SHA256, b"tinydc")
        .extract(secret)
        .expand(&[purpose.as_bytes()], Length(32))
        .and_then(|output| output.fill(&mut key))
        .expect("HKDF gives 32 bytes when asked for 32");
    key
}

/// Random bytes of the operating system.
pub fn random_bytes<const LENGTH: usize>() -> Result<[u8; LENGTH], SealError> {
    let mut bytes = [0; LENGTH];
    SystemRandom::new().fill(&mut bytes).map_err(|_| SealError::Random)?;
    Ok(bytes)
}

impl ClusterKey {
    pub fn create() -> Result<ClusterKey, SealError> {
        Ok(ClusterKey(random_bytes()?))
    }

    pub fn from_bytes(bytes: [u8; 32]) -> ClusterKey {
        ClusterKey(bytes)
    }

    /// For sending it to an intended voter over mTLS.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// How `cluster.key` holds it: text with a checksum.
    pub fn to_text(&self) -> String {
        codeword::encode(CLUSTER_KEY_PREFIX, &self.0)
    }

    pub fn from_text(text: &str) -> Result<ClusterKey, CodewordError> {
        let bytes = codeword::decode(CLUSTER_KEY_PREFIX, text)?;
        Ok(ClusterKey(bytes.try_into().map_err(|_| CodewordError::Checksum)?))
    }

    fn cipher(&self, purpose: &str) -> LessSafeKey {
        let key = derive_key(&self.0, &format!("seal {purpose}"));
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).expect("AES-256 takes 32 bytes"))
    }

    pub fn seal(&self, purpose: &str, bytes: &[u8]) -> Result<Vec<u8>, SealError> {
        let nonce: [u8; NONCE_LEN] = random_bytes()?;
        let mut sealed = bytes.to_vec();
        self.cipher(purpose)
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(purpose.as_bytes()),
                &mut sealed,
            )
            .map_err(|_| SealError::Encrypt { purpose: purpose.into() })?;
        Ok([&[VERSION][..], &nonce, &sealed].concat())
    }

    /// Tells whether two values of one purpose are the same, to whoever holds the key only.
    pub fn fingerprint(&self, purpose: &str, bytes: &[u8]) -> [u8; 32] {
        let key = derive_key(&self.0, &format!("fingerprint {purpose}"));
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key), bytes);
        tag.as_ref().try_into().expect("HMAC-SHA256 gives 32 bytes")
    }

    pub fn unseal(&self, purpose: &str, sealed: &[u8]) -> Result<Vec<u8>, UnsealError> {
        let short = || UnsealError::Short { purpose: purpose.into(), length: sealed.len() };
        let (version, rest) = sealed.split_first().ok_or_else(short)?;
        if *version != VERSION {
            return Err(UnsealError::Version { purpose: purpose.into(), version: *version });
        }
        let (nonce, body) = rest.split_first_chunk::<NONCE_LEN>().ok_or_else(short)?;
        let mut bytes = body.to_vec();
        let length = self
            .cipher(purpose)
            .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(purpose.as_bytes()), &mut bytes)
            .map_err(|_| UnsealError::Authenticity { purpose: purpose.into() })?
            .len();
        bytes.truncate(length);
        Ok(bytes)
    }
}

/// Printed once by `init`: opens the sealed copy of the cluster key when every voter's card is lost.
#[derive(Clone, PartialEq, Eq)]
pub struct RecoveryKey([u8; RECOVERY_BYTES]);

impl fmt::Debug for RecoveryKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("RecoveryKey(…)")
    }
}

impl RecoveryKey {
    pub fn create() -> Result<RecoveryKey, SealError> {
        Ok(RecoveryKey(random_bytes()?))
    }

    pub fn to_text(&self) -> String {
        codeword::encode(RECOVERY_PREFIX, &self.0)
    }

    pub fn from_text(text: &str) -> Result<RecoveryKey, CodewordError> {
        let bytes = codeword::decode(RECOVERY_PREFIX, text)?;
        Ok(RecoveryKey(bytes.try_into().map_err(|_| CodewordError::Checksum)?))
    }

    fn key(&self) -> ClusterKey {
        ClusterKey(derive_key(&self.0, "recovery key"))
    }

    /// The sealed copy that the state keeps.
    pub fn seal(&self, cluster_key: &ClusterKey) -> Result<Vec<u8>, SealError> {
        self.key().seal(RECOVERY_PURPOSE, &cluster_key.0)
    }

    pub fn unseal(&self, sealed: &[u8]) -> Result<ClusterKey, UnsealError> {
        let bytes = self.key().unseal(RECOVERY_PURPOSE, sealed)?;
        let length = bytes.len();
        let bytes =
            bytes.try_into().map_err(|_| UnsealError::Short { purpose: RECOVERY_PURPOSE.into(), length })?;
        Ok(ClusterKey(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_bytes_unseal() {
        let key = ClusterKey::create().unwrap();
        let sealed = key.seal("secret/db", b"hunter2").unwrap();
        assert_eq!(key.unseal("secret/db", &sealed).unwrap(), b"hunter2");
        assert_ne!(sealed, key.seal("secret/db", b"hunter2").unwrap(), "the nonce is fresh");
        for position in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[position] ^= 1;
            assert!(key.unseal("secret/db", &changed).is_err(), "byte {position}");
            assert!(key.unseal("secret/db", &sealed[..position]).is_err(), "length {position}");
        }
        assert!(key.unseal("secret/web", &sealed).is_err());
        assert!(ClusterKey::create().unwrap().unseal("secret/db", &sealed).is_err());
    }

    #[test]
    fn a_fingerprint_is_the_same_for_the_same_key_purpose_and_bytes_only() {
        let (key, other) = (ClusterKey::create().unwrap(), ClusterKey::create().unwrap());
        let print = key.fingerprint("secret/db", b"hunter2");
        assert_eq!(print, key.fingerprint("secret/db", b"hunter2"));
        assert_ne!(print, key.fingerprint("secret/db", b"hunter3"));
        assert_ne!(print, key.fingerprint("secret/web", b"hunter2"));
        assert_ne!(print, other.fingerprint("secret/db", b"hunter2"));
    }

    #[test]
    fn a_recovery_key_opens_the_copy_of_the_cluster_key() {
        let (cluster, recovery) = (ClusterKey::create().unwrap(), RecoveryKey::create().unwrap());
        let sealed = recovery.seal(&cluster).unwrap();
        let typed = RecoveryKey::from_text(&recovery.to_text().to_ascii_uppercase()).unwrap();
        assert_eq!(typed.unseal(&sealed).unwrap(), cluster);
        assert!(RecoveryKey::create().unwrap().unseal(&sealed).is_err());
        assert_eq!(ClusterKey::from_text(&cluster.to_text()).unwrap(), cluster);
    }
}
