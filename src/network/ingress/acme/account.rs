//! The key that is an account with an authority, and what is signed with it (RFC 7515, ES256).

use super::AcmeError;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use serde_json::{Value, json};
use std::fmt;

pub struct AccountKey {
    pkcs8: Vec<u8>,
    pair: EcdsaKeyPair,
}

impl fmt::Debug for AccountKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("AccountKey")
    }
}

pub fn base64url(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Who signs: an account's URL, or before there is one the key itself.
#[derive(Clone, Copy, Debug)]
pub enum Signer<'a> {
    Key,
    Account(&'a str),
}

impl AccountKey {
    pub fn generate() -> Result<AccountKey, AcmeError> {
        let random = SystemRandom::new();
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random);
        AccountKey::from_pkcs8(document.map_err(|_| AcmeError::Key)?.as_ref())
    }

    /// As `pkcs8` gave it.
    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<AccountKey, AcmeError> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8, &SystemRandom::new());
        Ok(AccountKey { pkcs8: pkcs8.to_vec(), pair: pair.map_err(|_| AcmeError::Key)? })
    }

    /// A secret; to be kept sealed.
    pub fn pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    /// Both coordinates, as base64url.
    fn point(&self) -> (String, String) {
        // One byte says that they follow uncompressed.
        let point = &self.pair.public_key().as_ref()[1..];
        let (x, y) = point.split_at(point.len() / 2);
        (base64url(x), base64url(y))
    }

    fn jwk(&self) -> Value {
        let (x, y) = self.point();
        json!({ "crv": "P-256", "kty": "EC", "x": x, "y": y })
    }

    /// RFC 7638: the hash of exactly these bytes.
    pub fn thumbprint(&self) -> String {
        let (x, y) = self.point();
        let canonical = format!(r#"{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}"#);
        base64url(ring::digest::digest(&ring::digest::SHA256, canonical.as_bytes()))
    }

    /// What is answered to a challenge's token (RFC 8555 8.1).
    pub fn key_authorization(&self, token: &str) -> String {
        format!("{token}.{}", self.thumbprint())
    }

    /// A signed request; without a payload it asks for what lies at `url`.
    pub fn sign(
        &self,
        url: &str,
        nonce: &str,
        signer: Signer<'_>,
        payload: Option<&Value>,
    ) -> Result<Value, AcmeError> {
        let mut protected = json!({ "alg": "ES256", "nonce": nonce, "url": url });
        match signer {
            Signer::Key => protected["jwk"] = self.jwk(),
            Signer::Account(account) => protected["kid"] = account.into(),
        }
        let protected = base64url(protected.to_string());
        let payload = payload.map(|payload| base64url(payload.to_string())).unwrap_or_default();
        let signed = format!("{protected}.{payload}");
        let signature =
            self.pair.sign(&SystemRandom::new(), signed.as_bytes()).map_err(|_| AcmeError::Key)?;
        Ok(json!({ "protected": protected, "payload": payload, "signature": base64url(signature) }))
    }
}
