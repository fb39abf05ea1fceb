//! A newtype for every id, so that one can't be taken for another.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl std::str::FromStr for $name {
            type Err = std::num::ParseIntError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.strip_prefix($prefix).unwrap_or(text).parse().map($name)
            }
        }
    };
}

macro_rules! wide_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        pub struct $name(pub u128);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl std::str::FromStr for $name {
            type Err = std::num::ParseIntError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                u128::from_str_radix(text, 16).map($name)
            }
        }
    };
}

number_id!(
    /// A node, which is also its id as a Raft member. From a counter in the state, never reused.
    NodeId,
    "n"
);
number_id!(
    /// A service, for as long as its app keeps it. From a counter in the state.
    ServiceId,
    "s"
);
number_id!(
    /// An instance. From a counter in the state, never reused: a dead instance is replaced by another id.
    InstanceId,
    "i"
);
number_id!(
    /// A join or user token, as `token ls` shows it.
    TokenId,
    "t"
);
wide_id!(
    /// Minted by the client of a write, so that a retry is told from a second wish.
    RequestId
);
wide_id!(
    /// One run of one daemon; drawn at its start.
    StartId
);
wide_id!(
    /// One data directory; drawn when the node joins.
    StoreId
);
wide_id!(
    /// One cluster; drawn by `init`.
    ClusterId
);

/// The raw 32 bytes of an Ed25519 public key: what a node or an operator is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PublicKey(pub [u8; 32]);

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

/// The name of an app: a DNS label, `[a-z0-9]([a-z0-9-]*[a-z0-9])?`, at most 40 bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AppName(String);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a name: use 1 to 40 of a–z, 0–9 and '-', not beginning or ending with '-'")]
pub struct NameError(pub String);

/// Whether `text` may name an app or a service: a DNS label of at most 40 bytes.
pub fn is_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=40).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

impl AppName {
    pub fn new(text: &str) -> Result<Self, NameError> {
        if is_label(text) { Ok(AppName(text.into())) } else { Err(NameError(text.into())) }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for AppName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        AppName::new(&text)
    }
}

impl From<AppName> for String {
    fn from(name: AppName) -> String {
        name.0
    }
}

impl fmt::Display for AppName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_app_name_is_a_dns_label() {
        for good in ["web", "a", "my-app-2", &"x".repeat(40)] {
            assert!(AppName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "ä", &"x".repeat(41)] {
            assert!(AppName::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_id_reads_what_it_prints() {
        assert_eq!("n12".parse(), Ok(NodeId(12)));
        assert_eq!(NodeId(12).to_string(), "n12");
        assert_eq!(StartId(255).to_string().parse(), Ok(StartId(255)));
    }
}
