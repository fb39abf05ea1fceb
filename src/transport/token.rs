//! Join and operator tokens: one line that a person copies.
//!
//! Token id, secret, the CA's hash, the cluster's name and up to six addresses → `tdc-join-…` or `tdc-user-…`, and back.
//! A mistyped line is told as such before anything is dialled. The state keeps `secret_hash()` only.
//!
//! Invariant: a token reads back as it was written, as its own kind only (`a_token_reads_back_as_its_own_kind`).

use std::fmt;
use std::net::SocketAddr;

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use super::codeword::{self, CodewordError};
use super::identity::NodeKey;
use super::ids::AuthorityHash;
use super::sealing::{SealError, derive_key, random_bytes};
use crate::model::RequestId;
pub use crate::model::TokenId;

pub const TOKEN_ADDRESSES_MAX: usize = 6;

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// Lets nodes join.
    Join,
    /// Makes an operator's context on a laptop.
    User,
}

impl TokenKind {
    fn prefix(self) -> &'static str {
        match self {
            TokenKind::Join => "tdc-join-",
            TokenKind::User => "tdc-user-",
        }
    }
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("this is not a token for that: {0}")]
    Text(#[from] CodewordError),
    #[error("this token is of a newer tinydc")]
    Content,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenSecret(pub [u8; 16]);

impl fmt::Debug for TokenSecret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("TokenSecret(…)")
    }
}

impl TokenSecret {
    pub fn create() -> Result<TokenSecret, SealError> {
        Ok(TokenSecret(random_bytes()?))
    }

    /// The same for the same request at the same node, so that a retry gets the token that the first try made; nobody
    /// who knows the request alone can tell it.
    pub fn derive(node_key: &NodeKey, request: RequestId) -> TokenSecret {
        let bytes = derive_key(node_key.as_pkcs8(), &format!("token {request}"));
        let mut secret = [0; 16];
        secret.copy_from_slice(&bytes[..16]);
        TokenSecret(secret)
    }

    /// What the state keeps. A plain hash is enough: the secret is 128 random bits.
    pub fn hash(&self) -> [u8; 32] {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, &self.0).as_ref());
        hash
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    pub id: TokenId,
    pub secret: TokenSecret,
    pub authority: AuthorityHash,
    pub cluster_name: String,
    /// Of nodes that may be dialled, best first; more than six are cut off.
    pub addresses: Vec<SocketAddr>,
}

impl Token {
    pub fn to_text(&self, kind: TokenKind) -> String {
        let mut token = self.clone();
        token.addresses.truncate(TOKEN_ADDRESSES_MAX);
        let bytes = postcard::to_allocvec(&token).expect("numbers, strings and addresses always encode");
        codeword::encode(kind.prefix(), &bytes)
    }

    pub fn from_text(kind: TokenKind, text: &str) -> Result<Token, TokenError> {
        let bytes = codeword::decode(kind.prefix(), text)?;
        postcard::from_bytes(&bytes).map_err(|_| TokenError::Content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_request_has_the_same_secret_at_the_same_node_only() {
        let (here, there) = (NodeKey::create().unwrap(), NodeKey::create().unwrap());
        let secret = TokenSecret::derive(&here, RequestId(1));
        assert!(secret == TokenSecret::derive(&here, RequestId(1)));
        assert!(secret != TokenSecret::derive(&here, RequestId(2)));
        assert!(secret != TokenSecret::derive(&there, RequestId(1)));
    }

    #[test]
    fn a_token_reads_back_as_its_own_kind() {
        let address = |last| SocketAddr::from(([192, 168, 1, last], 7400));
        let token = Token {
            id: TokenId(5),
            secret: TokenSecret::create().unwrap(),
            authority: AuthorityHash([7; 32]),
            cluster_name: "home".into(),
            addresses: (1..=8).map(address).collect(),
        };
        let text = token.to_text(TokenKind::Join);
        assert!(text.starts_with("tdc-join-") && !text.contains(char::is_whitespace), "{text}");
        let read = Token::from_text(TokenKind::Join, &text).unwrap();
        assert_eq!(read.addresses, token.addresses[..6]);
        assert_eq!((read.id, &read.secret, read.authority), (token.id, &token.secret, token.authority));
        assert!(Token::from_text(TokenKind::User, &text).is_err());
        let mistyped = text.replacen(&text[40..42], if &text[40..42] == "77" { "88" } else { "77" }, 1);
        let error = Token::from_text(TokenKind::Join, &mistyped).unwrap_err();
        assert!(error.to_string().contains("mistyped"), "{error}");
    }
}
