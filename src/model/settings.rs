//! What holds for the whole cluster and can be changed with `tinydc settings`: typed, with default and meaning.

use super::secret::SecretName;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TimerProfile {
    /// Tick 100 ms: for SD cards, where one fsync may take seconds.
    #[default]
    Card,
    /// Tick 20 ms: for SSDs.
    Fast,
}

impl TimerProfile {
    pub fn tick_ms(self) -> u64 {
        match self {
            TimerProfile::Card => 100,
            TimerProfile::Fast => 20,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    pub timers: TimerProfile,
    pub default_memory_bytes: u64,
    pub default_cpu_millis: u64,
    /// Registries that may be asked without TLS, `host:port`.
    pub insecure_registries: Vec<String>,
    /// Where HTTP routes are served while there are any.
    pub ingress_http_port: u16,
    pub ingress_https_port: u16,
    /// Traffic between the containers of different nodes goes through WireGuard.
    pub is_encrypted: bool,
    /// How long a node keeps one key for it.
    pub encrypt_rotation_s: u64,
    /// Containers and services have IPv6 addresses, too.
    pub has_ipv6: bool,
    /// Of the authority that certificates are ordered from.
    pub acme_directory: String,
    /// Empty for none.
    pub acme_email: String,
    /// The secret that holds the authority's own root; empty for those that browsers trust.
    pub acme_ca: String,
    /// How many times a disk may be written over.
    pub disk_endurance: u32,
}

/// The production service of Let's Encrypt.
pub const LETS_ENCRYPT: &str = "https://acme-v02.api.letsencrypt.org/directory";
const URL_BYTES_MAX: usize = 1024;

impl Default for Settings {
    fn default() -> Self {
        Settings {
            timers: TimerProfile::Card,
            default_memory_bytes: 64 << 20,
            default_cpu_millis: 100,
            insecure_registries: Vec::new(),
            ingress_http_port: 80,
            ingress_https_port: 443,
            is_encrypted: false,
            encrypt_rotation_s: 7 * 24 * 3600,
            has_ipv6: false,
            acme_directory: LETS_ENCRYPT.into(),
            acme_email: String::new(),
            acme_ca: String::new(),
            disk_endurance: 300,
        }
    }
}

/// One row of `tinydc settings`.
pub struct SettingRow {
    pub key: &'static str,
    pub value: String,
    pub default: String,
    pub meaning: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    #[error("there is no setting {0:?}; `tinydc settings` lists them")]
    Unknown(String),
    #[error("{value:?} is not a value of {key}: {expected}")]
    BadValue { key: String, value: String, expected: &'static str },
}

const KEYS: [(&str, &str); 13] = [
    ("timers", "card: for SD cards; fast: for SSDs, a leader is replaced within a second"),
    ("default_memory", "memory reserved for an instance that reserves none (MiB)"),
    ("default_cpu", "CPU reserved for an instance that reserves none (thousandths of a core)"),
    ("insecure_registries", "registries that may be asked without TLS (host:port, comma-separated)"),
    ("ingress_http_port", "where services with an HTTP route are served"),
    ("ingress_https_port", "the same with TLS"),
    ("encrypt", "true: traffic between containers of different nodes is encrypted, by WireGuard"),
    ("encrypt_rotation", "how long a node keeps one key for that (seconds)"),
    ("ipv6", "true: containers and services have IPv6 addresses, too (dual stack)"),
    ("acme_directory", "the authority that certificates for tls=acme are ordered from"),
    ("acme_email", "where that authority may write to"),
    ("acme_ca", "the secret that holds the root of that authority, if browsers do not trust it"),
    ("disk_endurance", "how many times a card or disk may be written over: its rated terabytes by its size"),
];

impl Settings {
    pub fn rows(&self) -> Vec<SettingRow> {
        let default = Settings::default();
        KEYS.iter()
            .map(|(key, meaning)| SettingRow {
                key,
                value: self.value(key),
                default: default.value(key),
                meaning,
            })
            .collect()
    }

    fn value(&self, key: &str) -> String {
        match key {
            "timers" => match self.timers {
                TimerProfile::Card => "card".into(),
                TimerProfile::Fast => "fast".into(),
            },
            "default_memory" => (self.default_memory_bytes >> 20).to_string(),
            "default_cpu" => self.default_cpu_millis.to_string(),
            "ingress_http_port" => self.ingress_http_port.to_string(),
            "ingress_https_port" => self.ingress_https_port.to_string(),
            "encrypt" => self.is_encrypted.to_string(),
            "encrypt_rotation" => self.encrypt_rotation_s.to_string(),
            "ipv6" => self.has_ipv6.to_string(),
            "acme_directory" => self.acme_directory.clone(),
            "acme_email" => self.acme_email.clone(),
            "acme_ca" => self.acme_ca.clone(),
            "disk_endurance" => self.disk_endurance.to_string(),
            _ => self.insecure_registries.join(","),
        }
    }

    /// Changes one setting; says which values there are when `value` is none of them.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), SettingError> {
        let bad = |expected| SettingError::BadValue { key: key.into(), value: value.into(), expected };
        let number = |range: std::ops::RangeInclusive<u64>, expected| {
            value.parse::<u64>().ok().filter(|n| range.contains(n)).ok_or_else(|| bad(expected))
        };
        match key {
            "timers" => {
                self.timers = match value {
                    "card" => TimerProfile::Card,
                    "fast" => TimerProfile::Fast,
                    _ => return Err(bad("card or fast")),
                }
            }
            "default_memory" => {
                self.default_memory_bytes = number(1..=1 << 20, "MiB, 1 to 1048576")? << 20;
            }
            "default_cpu" => {
                self.default_cpu_millis = number(0..=64_000, "thousandths of a core, 0 to 64000")?;
            }
            "ingress_http_port" => {
                self.ingress_http_port = number(1..=65_535, "a port, 1 to 65535")? as u16;
            }
            "ingress_https_port" => {
                self.ingress_https_port = number(1..=65_535, "a port, 1 to 65535")? as u16;
            }
            "encrypt" => self.is_encrypted = value.parse().map_err(|_| bad("true or false"))?,
            "encrypt_rotation" => {
                self.encrypt_rotation_s = number(10..=31_536_000, "seconds, 10 to 31536000")?;
            }
            "ipv6" => self.has_ipv6 = value.parse().map_err(|_| bad("true or false"))?,
            "disk_endurance" => {
                self.disk_endurance = number(1..=100_000, "times, 1 to 100000")? as u32;
            }
            "acme_directory" | "acme_email" | "acme_ca" => {
                self.set_acme(key, value).map_err(bad)?;
            }
            "insecure_registries" => {
                let hosts: Vec<String> =
                    value.split(',').map(str::trim).filter(|h| !h.is_empty()).map(String::from).collect();
                if hosts.iter().any(|host| host.contains('/') || host.len() > 255) || hosts.len() > 32 {
                    return Err(bad("at most 32 of host or host:port, comma-separated"));
                }
                self.insecure_registries = hosts;
            }
            _ => return Err(SettingError::Unknown(key.into())),
        }
        Ok(())
    }
}

impl Settings {
    /// `Err`: what is expected instead.
    fn set_acme(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        let is_plain = value.bytes().all(|byte| byte.is_ascii_graphic());
        match key {
            "acme_directory"
                if !is_plain || !value.starts_with("https://") || value.len() > URL_BYTES_MAX =>
            {
                Err("the URL of an ACME directory, which begins with https://")
            }
            "acme_email" if !value.is_empty() && (!is_plain || !value.contains('@') || value.len() > 254) => {
                Err("an e-mail address, or nothing")
            }
            "acme_ca" if !value.is_empty() && SecretName::new(value).is_err() => {
                Err("the name of a secret, or nothing")
            }
            _ => {
                match key {
                    "acme_directory" => self.acme_directory = value.into(),
                    "acme_email" => self.acme_email = value.into(),
                    _ => self.acme_ca = value.into(),
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_setting_takes_back_what_it_shows() {
        let mut settings = Settings::default();
        for row in Settings::default().rows() {
            settings.set(row.key, &row.value).expect(row.key);
        }
        assert_eq!(settings, Settings::default());
        assert!(settings.set("timers", "slow").is_err());
        assert!(settings.set("colour", "red").is_err());
    }
}
