//! Names of secrets: of the whole cluster (`web-cert`), or of one app (`shop/db-password`).

use super::ids::AppName;
use serde::{Deserialize, Serialize};
use std::fmt;

const OWN_NAME_BYTES_MAX: usize = 63;

/// `NAME`, or `APP/NAME` for one that belongs to an app and goes with it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretName(String);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} can't name a secret: write NAME or APP/NAME with letters, digits, '-', '_' and '.', at most 63"
)]
pub struct SecretNameError(pub String);

fn is_own_name(text: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=OWN_NAME_BYTES_MAX).contains(&text.len())
        && text.bytes().all(is_inner)
        && !text.starts_with(['-', '.'])
}

impl SecretName {
    pub fn new(text: &str) -> Result<SecretName, SecretNameError> {
        let is_fine = match text.split_once('/') {
            Some((app, own)) => AppName::new(app).is_ok() && is_own_name(own),
            None => is_own_name(text),
        };
        if is_fine { Ok(SecretName(text.into())) } else { Err(SecretNameError(text.into())) }
    }

    pub fn of_app(app: &AppName, own: &str) -> Result<SecretName, SecretNameError> {
        SecretName::new(&format!("{app}/{own}"))
    }

    /// The app that it belongs to; `None`: the cluster's.
    pub fn app(&self) -> Option<&str> {
        self.0.split_once('/').map(|(app, _)| app)
    }

    /// Without the app.
    pub fn own(&self) -> &str {
        self.0.split_once('/').map_or(&self.0, |(_, own)| own)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for SecretName {
    type Error = SecretNameError;

    fn try_from(text: String) -> Result<Self, SecretNameError> {
        SecretName::new(&text)
    }
}

impl From<SecretName> for String {
    fn from(name: SecretName) -> String {
        name.0
    }
}

impl fmt::Display for SecretName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_the_cluster_s_or_an_app_s() {
        let own = SecretName::new("shop/db.password").unwrap();
        assert_eq!((own.app(), own.own()), (Some("shop"), "db.password"));
        let shared = SecretName::new("web_cert").unwrap();
        assert_eq!((shared.app(), shared.own()), (None, "web_cert"));
        for bad in ["", "/", "a/", "/b", "a/b/c", "Shop/b", ".x", "a b", "a/..", &"x".repeat(64)] {
            assert!(SecretName::new(bad).is_err(), "{bad}");
        }
    }
}
