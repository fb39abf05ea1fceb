//! `/etc/tinydc.toml`: what belongs to one machine. An unknown key is an error with its line.

use crate::model::NodeDisk;
use crate::transport::operators::OperatorKey;
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

pub const DEFAULT_PATH: &str = "/etc/tinydc.toml";
pub const DEFAULT_DATA_DIR: &str = "/var/lib/tinydc";

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Of the node; the host's name unless given.
    pub name: Option<String>,
    pub data_dir: Option<PathBuf>,
    /// UDP, for peers; `0.0.0.0:7400` unless given.
    pub listen: Option<SocketAddr>,
    /// TCP, for clients; the address of `listen` unless given.
    pub api_listen: Option<SocketAddr>,
    /// Found a cluster if this machine belongs to none.
    #[serde(default)]
    pub bootstrap: bool,
    /// A token: join its cluster if this machine belongs to none.
    pub join: Option<String>,
    /// Public keys of people, in OpenSSH's form, who get an operator's context from this node.
    #[serde(default)]
    pub operators: Vec<OperatorKey>,
    /// Names or addresses of peers, tried while no quorum is connected.
    #[serde(default)]
    pub peers: Vec<String>,
    /// Container and VIP range for `bootstrap`: `10.77.0.0/16 10.78.0.0/16`.
    pub network: Option<String>,
    /// Used on a board, where tinydc keeps the clock.
    #[serde(default)]
    pub ntp: Vec<String>,
    /// `LABEL=media:/mnt/media`: mounted by a board's first process, elsewhere by whoever does it. Services that bind one
    /// don't run here while it is absent.
    #[serde(default, deserialize_with = "read_disks")]
    pub disks: Vec<NodeDisk>,
    /// `error`, `warn`, `info` (the default), `debug`.
    pub log: Option<String>,
}

fn read_disks<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<NodeDisk>, D::Error> {
    use serde::de::Error;
    let texts = Vec::<String>::deserialize(from)?;
    let disks: Result<Vec<NodeDisk>, String> = texts.iter().map(|text| NodeDisk::parse(text)).collect();
    let disks = disks.map_err(D::Error::custom)?;
    match NodeDisk::conflict(&disks) {
        Some((_, why)) => Err(D::Error::custom(why)),
        None => Ok(disks),
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path}:{line}: {message}")]
    Parse { path: PathBuf, line: usize, message: String },
}

impl Config {
    /// The named file, which must exist, or the usual one, which need not.
    pub fn load(path: Option<&Path>) -> Result<Config, ConfigError> {
        let (path, must_exist) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        match std::fs::read_to_string(path) {
            Ok(text) => Config::parse(path, &text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_exist => {
                Ok(Config::default())
            }
            Err(source) => Err(ConfigError::Read { path: path.into(), source }),
        }
    }

    fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let line =
                error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            ConfigError::Parse { path: path.into(), line, message: error.message().replace('\n', " ") }
        })
    }

    pub fn data_dir(&self) -> PathBuf {
        self.data_dir.clone().unwrap_or_else(|| DEFAULT_DATA_DIR.into())
    }

    /// `/run/tinydc` for the usual data directory; a second node on a machine keeps its own beside its data.
    pub fn run_dir(&self) -> PathBuf {
        let data_dir = self.data_dir();
        if data_dir == Path::new(DEFAULT_DATA_DIR) { "/run/tinydc".into() } else { data_dir.join("run") }
    }

    pub fn listen(&self) -> SocketAddr {
        self.listen.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 7400)))
    }

    pub fn api_listen(&self) -> SocketAddr {
        self.api_listen.unwrap_or_else(|| self.listen())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_an_error_with_its_line() {
        let error = Config::parse(Path::new("x.toml"), "name = \"pi1\"\n\ncolour = \"red\"\n").unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("x.toml:3: ") && text.contains("colour"), "{text}");
        let error = Config::parse(Path::new("x.toml"), "name = \"pi1\"\nlisten = \"nowhere\"\n").unwrap_err();
        assert!(error.to_string().starts_with("x.toml:2: "), "{error}");
        let text = "name = \"pi1\"\n\noperators = [\"ssh-rsa AAAA ann\"]\n";
        let error = Config::parse(Path::new("x.toml"), text).unwrap_err().to_string();
        assert!(error.starts_with("x.toml:3: ") && error.contains("only ssh-ed25519"), "{error}");
        let text = "name = \"pi1\"\ndisks = [\n  \"LABEL=a:/mnt/a\",\n  \"LABEL=\\u001b[2J:/mnt/b\"\n]\n";
        let error = Config::parse(Path::new("x.toml"), text).unwrap_err().to_string();
        assert!(error.starts_with("x.toml:2: ") && !error.contains('\u{1b}'), "{error}");
        let text = "name = \"pi1\"\n\ndisks = [\"LABEL=a:/mnt/a\", \"b:/mnt/b\"]\n";
        let error = Config::parse(Path::new("x.toml"), text).unwrap_err().to_string();
        assert!(error.starts_with("x.toml:3: ") && error.contains("is no disk"), "{error}");
    }

    #[test]
    fn a_data_directory_of_its_own_has_a_run_directory_of_its_own() {
        let config = Config { data_dir: Some("/tmp/n1".into()), ..Config::default() };
        assert_eq!(config.run_dir(), Path::new("/tmp/n1/run"));
        assert_eq!(Config::default().run_dir(), Path::new("/run/tinydc"));
    }
}
