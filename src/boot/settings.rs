//! `tinydc.toml` of a board: what a person edits on the card's FAT partition. Pure.
//!
//! Input: its text. Output: settings and, if the file is wrong, one problem with its line. A wrong file never stops a
//! board: it comes up with the defaults and says what is wrong.
//!
//! Invariant: a token is taken out of the text without touching any other line (`only_the_token_s_line_changes`).

use crate::model::NodeDisk;
use crate::transport::operators::OperatorKey;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::Ipv4Addr;

pub const FILE: &str = "tinydc.toml";
const NAME_BYTES_MAX: usize = 40;

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    name: Option<String>,
    #[serde(default)]
    bootstrap: bool,
    join: Option<String>,
    #[serde(default)]
    peers: Vec<String>,
    network: Option<String>,
    #[serde(default)]
    ntp: Vec<String>,
    log: Option<String>,
    console: Option<bool>,
    #[serde(default)]
    disks: Vec<toml::Spanned<String>>,
    #[serde(default)]
    operators: Vec<toml::Spanned<String>>,
    address: Option<toml::Spanned<String>>,
    gateway: Option<Ipv4Addr>,
    #[serde(default)]
    dns: Vec<Ipv4Addr>,
    #[serde(default)]
    interfaces: BTreeMap<String, Interface>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Interface {
    address: toml::Spanned<String>,
    gateway: Option<Ipv4Addr>,
    #[serde(default)]
    dns: Vec<Ipv4Addr>,
}

/// How one interface gets its address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Addressing {
    #[default]
    Dhcp,
    Static {
        address: Ipv4Addr,
        prefix_length: u8,
        gateway: Option<Ipv4Addr>,
        name_servers: Vec<Ipv4Addr>,
    },
    Off,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub name: Option<String>,
    pub is_founder: bool,
    pub join: Option<String>,
    pub peers: Vec<String>,
    pub network: Option<String>,
    pub ntp: Vec<String>,
    pub log: Option<String>,
    pub has_console: bool,
    /// File systems to mount beside the data.
    pub disks: Vec<NodeDisk>,
    /// Public keys of people, as OpenSSH writes them.
    pub operators: Vec<String>,
    /// For interfaces without an entry of their own.
    pub addressing: Addressing,
    pub interfaces: BTreeMap<String, Addressing>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            name: None,
            is_founder: false,
            join: None,
            peers: Vec::new(),
            network: None,
            ntp: Vec::new(),
            log: None,
            has_console: true,
            disks: Vec::new(),
            operators: Vec::new(),
            addressing: Addressing::Dhcp,
            interfaces: BTreeMap::new(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{FILE}:{line}: {message}")]
pub struct Problem {
    pub line: usize,
    pub message: String,
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at.min(text.len())].matches('\n').count() + 1
}

/// Names without a span: the line that sets the key.
fn line_of_key(text: &str, key: &str) -> usize {
    let sets =
        |line: &str| line.trim_start().strip_prefix(key).is_some_and(|r| r.trim_start().starts_with('='));
    text.lines().position(sets).map_or(1, |index| index + 1)
}

pub fn parse(text: &str) -> Result<Settings, Problem> {
    // Editors on other systems begin a file with a mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let read: Text = toml::from_str(text).map_err(|error| Problem {
        line: error.span().map_or(1, |span| line_of(text, span.start)),
        message: error.message().replace('\n', " "),
    })?;
    let at = |key: &str, message: String| Problem { line: line_of_key(text, key), message };
    if let Some(name) = &read.name
        && !is_host_name(name)
    {
        let message = format!("{name:?} is no host name: use up to {NAME_BYTES_MAX} of a–z, 0–9 and '-'");
        return Err(at("name", message));
    }
    if read.bootstrap && read.join.is_some() {
        let message = "`bootstrap` founds a cluster and `join` joins one: keep one of them".to_string();
        return Err(at("join", message));
    }
    let mut disks = Vec::new();
    for disk in &read.disks {
        let found = NodeDisk::parse(disk.get_ref());
        disks.push(found.map_err(|message| Problem { line: line_of(text, disk.span().start), message })?);
    }
    if let Some((index, message)) = NodeDisk::conflict(&disks) {
        return Err(Problem { line: line_of(text, read.disks[index].span().start), message });
    }
    for key in &read.operators {
        let found = OperatorKey::try_from(key.get_ref().clone());
        found
            .map_err(|error| Problem { line: line_of(text, key.span().start), message: error.to_string() })?;
    }
    let addressing = |address: &toml::Spanned<String>, gateway, dns: &[Ipv4Addr]| {
        let line = line_of(text, address.span().start);
        parse_addressing(address.get_ref(), gateway, dns).map_err(|message| Problem { line, message })
    };
    let general = match &read.address {
        Some(address) => addressing(address, read.gateway, &read.dns)?,
        None if read.gateway.is_some() => {
            return Err(at("gateway", "a gateway goes with a static `address`".into()));
        }
        None => Addressing::Dhcp,
    };
    let mut interfaces = BTreeMap::new();
    for (name, one) in &read.interfaces {
        interfaces.insert(name.clone(), addressing(&one.address, one.gateway, &one.dns)?);
    }
    Ok(Settings {
        name: read.name,
        is_founder: read.bootstrap,
        join: read.join,
        peers: read.peers,
        network: read.network,
        ntp: read.ntp,
        log: read.log,
        has_console: read.console.unwrap_or(true),
        disks,
        operators: read.operators.into_iter().map(toml::Spanned::into_inner).collect(),
        addressing: general,
        interfaces,
    })
}

fn is_host_name(name: &str) -> bool {
    let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name.chars().all(is_part)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// `dhcp`, `off`, or `192.168.1.5/24`.
fn parse_addressing(text: &str, gateway: Option<Ipv4Addr>, dns: &[Ipv4Addr]) -> Result<Addressing, String> {
    match text {
        "dhcp" => return Ok(Addressing::Dhcp),
        "off" => return Ok(Addressing::Off),
        _ => {}
    }
    let bad = || {
        format!("{text:?} is no address: use \"dhcp\", \"off\" or one with its length, \"192.168.1.5/24\"")
    };
    let (address, length) = text.split_once('/').ok_or_else(bad)?;
    let address: Ipv4Addr = address.parse().map_err(|_| bad())?;
    let prefix_length: u8 = length.parse().map_err(|_| bad())?;
    if !(1..=32).contains(&prefix_length) || address.is_unspecified() || address.is_multicast() {
        return Err(bad());
    }
    Ok(Addressing::Static { address, prefix_length, gateway, name_servers: dns.to_vec() })
}

impl Settings {
    /// The daemon's own configuration file on this board.
    pub fn node_config(&self, name: &str) -> String {
        let mut text = format!("name = {}\n", quoted(name));
        // Writing to a String cannot fail.
        if self.is_founder {
            text += "bootstrap = true\n";
        }
        for (key, value) in [("join", &self.join), ("network", &self.network), ("log", &self.log)] {
            if let Some(value) = value {
                let _ = writeln!(text, "{key} = {}", quoted(value));
            }
        }
        if !self.peers.is_empty() {
            let peers: Vec<String> = self.peers.iter().map(|peer| quoted(peer)).collect();
            let _ = writeln!(text, "peers = [{}]", peers.join(", "));
        }
        if !self.operators.is_empty() {
            let keys: Vec<String> = self.operators.iter().map(|key| quoted(key)).collect();
            let _ = writeln!(text, "operators = [{}]", keys.join(", "));
        }
        if !self.disks.is_empty() {
            let word = |disk: &NodeDisk| quoted(&format!("LABEL={}:{}", disk.label, disk.target));
            let disks: Vec<String> = self.disks.iter().map(word).collect();
            let _ = writeln!(text, "disks = [{}]", disks.join(", "));
        }
        text
    }

    pub fn addressing_of(&self, interface: &str) -> &Addressing {
        self.interfaces.get(interface).unwrap_or(&self.addressing)
    }
}

/// A TOML basic string.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

/// The text with its token replaced by a remark; `None` when it has none.
pub fn without_token(text: &str, remark: &str) -> Option<String> {
    parse(text).ok()?.join?;
    let number = line_of_key(text, "join");
    let mut lines: Vec<String> = text.split('\n').map(String::from).collect();
    let line = lines.get_mut(number - 1).filter(|line| line.trim_start().starts_with("join"))?;
    let ending = if line.ends_with('\r') { "\r" } else { "" };
    *line = format!("# join: {remark}{ending}");
    let text = lines.join("\n");
    // A token that is written over several lines is left for a person.
    parse(&text).ok().filter(|settings| settings.join.is_none()).map(|_| text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_file_is_told_with_its_line() {
        for (text, line, word) in [
            ("name = \"pi1\"\n\ncolour = 1\n", 3, "colour"),
            ("name = \"Pi 1\"\n", 1, "host name"),
            ("\nname = \"a\"\naddress = \"192.168.1.300/24\"\n", 3, "no address"),
            ("disks = [\n  \"LABEL=a:/mnt/a\",\n  \"b:/mnt\",\n]\n", 3, "no disk"),
            ("disks = [\"LABEL=a:/etc/x\"]", 1, "below /mnt"),
            ("disks = [\n  \"LABEL=a:/mnt/a\",\n  \"LABEL=b:/mnt/a\",\n]\n", 3, "the place of"),
            ("operators = [\n  \"ssh-rsa AAAA ann\",\n]\n", 2, "only ssh-ed25519"),
            ("bootstrap = true\njoin = \"tdc-join-x\"\n", 2, "keep one"),
            ("gateway = \"10.0.0.1\"\n", 1, "static"),
            ("name = \"a\"\n[interfaces.eth1]\naddress = \"dhpc\"\n", 3, "dhpc"),
            ("ntp = \"a\"", 1, "sequence"),
        ] {
            let problem = parse(text).unwrap_err();
            assert_eq!(problem.line, line, "{text}: {problem}");
            assert!(problem.to_string().contains(word), "{text}: {problem}");
        }
    }

    #[test]
    fn every_interface_finds_its_addressing() {
        let settings = parse(
            "\u{feff}address = \"192.168.1.5/24\"\r\ngateway = \"192.168.1.1\"\r\ndns = [\"9.9.9.9\"]\r\n\
             [interfaces.eth1]\r\naddress = \"dhcp\"\r\n[interfaces.wlan0]\r\naddress = \"off\"\r\n",
        )
        .unwrap();
        assert!(matches!(
            settings.addressing_of("eth0"),
            Addressing::Static { prefix_length: 24, gateway: Some(_), .. }
        ));
        assert_eq!(settings.addressing_of("eth1"), &Addressing::Dhcp);
        assert_eq!(settings.addressing_of("wlan0"), &Addressing::Off);
    }

    #[test]
    fn what_the_daemon_gets_reads_back() {
        let text = "join = 'tdc-join-\"x\\'\npeers = [\"pi1.lan\", \"pi2.lan\"]\nlog = \"debug\"\ndisks = [\"LABEL=a b:/mnt/a\"]\n";
        let settings = parse(text).unwrap();
        let read_back = parse(&settings.node_config("pi3")).unwrap();
        assert_eq!(read_back.name.as_deref(), Some("pi3"));
        assert_eq!((read_back.join, read_back.peers), (settings.join, settings.peers));
        assert_eq!((read_back.disks.len(), read_back.disks), (1, settings.disks));
    }

    #[test]
    fn only_the_token_s_line_changes() {
        let text = "# joins\nname = \"a\"\r\njoin = \"tdc-join-x\"\r\n# end";
        let wiped = without_token(text, "used on 2026-11-24").unwrap();
        assert_eq!(wiped, "# joins\nname = \"a\"\r\n# join: used on 2026-11-24\r\n# end");
        assert_eq!(without_token(&wiped, "x"), None);
        assert_eq!(without_token("join = \"\"\"\ntdc\"\"\"\n", "x"), None, "over several lines");
    }

    #[test]
    fn defaults_are_dhcp_and_a_console() {
        let settings = parse("").unwrap();
        assert_eq!(settings, Settings::default());
    }
}
