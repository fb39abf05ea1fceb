//! What an authority says (RFC 8555 7.1). Unknown fields are passed over.

use serde::Deserialize;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Directory {
    pub new_nonce: String,
    pub new_account: String,
    pub new_order: String,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub enum Status {
    Pending,
    Ready,
    Processing,
    Valid,
    Invalid,
    Deactivated,
    Expired,
    Revoked,
}

#[derive(Debug, Deserialize)]
pub struct Order {
    pub status: Status,
    #[serde(default)]
    pub authorizations: Vec<String>,
    pub finalize: String,
    pub certificate: Option<String>,
    pub error: Option<Problem>,
}

#[derive(Debug, Deserialize)]
pub struct Authorization {
    pub identifier: Identifier,
    pub status: Status,
    #[serde(default)]
    pub challenges: Vec<Challenge>,
}

#[derive(Debug, Deserialize)]
pub struct Identifier {
    pub value: String,
}

#[derive(Debug, Deserialize)]
pub struct Challenge {
    #[serde(rename = "type")]
    pub kind: String,
    pub url: String,
    #[serde(default)]
    pub token: String,
    pub error: Option<Problem>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct Problem {
    #[serde(rename = "type", default)]
    pub kind: String,
    #[serde(default)]
    pub detail: String,
}

impl Problem {
    /// `urn:ietf:params:acme:error:badNonce` → `badNonce`
    pub fn name(&self) -> &str {
        self.kind.rsplit(':').next().unwrap_or_default()
    }
}
