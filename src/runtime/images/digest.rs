//! Content digests. Input: untrusted text or bytes. Output: a `Digest`, safe as a file name.
//!
//! Invariant: a `Digest` holds exactly 64 lower-case hex digits (`only_whole_sha256_digests_parse`).

use std::fmt;
use std::io::{self, Read};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A SHA-256 digest, written `sha256:` and 64 hex digits. Other algorithms are refused.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest {
    hex: String,
}

#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no sha256 digest")]
pub struct DigestError(pub String);

impl Digest {
    pub fn parse(text: &str) -> Result<Digest, DigestError> {
        let hex = text.strip_prefix("sha256:").ok_or_else(|| DigestError(shortened(text)))?;
        Digest::from_hex(hex).ok_or_else(|| DigestError(shortened(text)))
    }

    pub fn from_hex(hex: &str) -> Option<Digest> {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        (hex.len() == 64 && hex.bytes().all(is_digit)).then(|| Digest { hex: hex.to_owned() })
    }

    pub fn of(bytes: &[u8]) -> Digest {
        Digest::from_hash(Sha256::new_with_prefix(bytes))
    }

    pub fn from_hash(hash: Sha256) -> Digest {
        let hex = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Digest { hex }
    }

    /// The 64 digits: a safe file name.
    pub fn hex(&self) -> &str {
        &self.hex
    }
}

/// Untrusted text in an error stays short.
fn shortened(text: &str) -> String {
    text.chars().take(100).collect()
}

impl fmt::Display for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "sha256:{}", self.hex)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Digest, DigestError> {
        Digest::parse(&text)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

/// Hashes and counts what is read through it; more than `bytes_max` is an error.
pub struct HashingReader<R> {
    inner: R,
    hash: Sha256,
    bytes: u64,
    bytes_max: u64,
}

impl<R: Read> HashingReader<R> {
    pub fn new(inner: R, bytes_max: u64) -> HashingReader<R> {
        HashingReader { inner, hash: Sha256::new(), bytes: 0, bytes_max }
    }

    /// Reads what is left, then gives the digest and the number of bytes of the whole.
    pub fn finish(mut self) -> io::Result<(Digest, u64)> {
        io::copy(&mut self, &mut io::sink())?;
        Ok((Digest::from_hash(self.hash), self.bytes))
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.bytes += count as u64;
        if self.bytes > self.bytes_max {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("more than the {} bytes allowed", self.bytes_max),
            ));
        }
        self.hash.update(&buffer[..count]);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_sha256_digests_parse() {
        let good = format!("sha256:{}", "a0".repeat(32));
        assert_eq!(Digest::parse(&good).unwrap().to_string(), good);
        let bad = [
            "".to_owned(),
            "sha256:".to_owned(),
            "a0".repeat(32),
            format!("sha512:{}", "a0".repeat(32)),
            format!("sha256:{}", "A0".repeat(32)),
            format!("sha256:{}", "a0".repeat(33)),
            format!("sha256:{}", "../".repeat(21) + "a"),
        ];
        for text in bad {
            assert!(Digest::parse(&text).is_err(), "{text}");
        }
    }

    #[test]
    fn reading_past_the_bound_fails() {
        let mut reader = HashingReader::new(&b"hello"[..], 4);
        assert!(io::copy(&mut reader, &mut io::sink()).is_err());
        let (digest, bytes) = HashingReader::new(&b"hello"[..], 5).finish().unwrap();
        assert_eq!((digest, bytes), (Digest::of(b"hello"), 5));
    }
}
