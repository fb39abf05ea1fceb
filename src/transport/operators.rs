//! Keys of people in OpenSSH's form: the public line of the configuration, and the private file of a laptop.
//!
//! Text → key and name, or what is wrong with it and what to do. Ed25519 only, without a passphrase: this program asks
//! for none and speaks to no agent.
//!
//! Invariant: a private key reads as the one that OpenSSH wrote (`a_key_as_openssh_writes_it_is_read`).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::authority::is_person_name;
use super::identity::NodeKey;
use super::ids::PublicKey;

const KIND: &str = "ssh-ed25519";
const HEAD: &str = "-----BEGIN OPENSSH PRIVATE KEY-----";
const FOOT: &str = "-----END OPENSSH PRIVATE KEY-----";
const MAGIC: &[u8] = b"openssh-key-v1\0";
/// DER of a PKCS#8 private key of Ed25519 up to the 32 bytes of its seed (RFC 8410 7).
const PKCS8_HEAD: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
/// Who has a key whose line names nobody.
const NAMELESS: &str = "operator";

/// `ssh-ed25519 AAAA… ann@laptop`: ann may do everything.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct OperatorKey {
    pub key: PublicKey,
    /// As a person's name: of the comment what stands before `@`.
    pub name: String,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OperatorKeyError {
    #[error(
        "a key of an operator is a line such as: ssh-ed25519 AAAA… ann@laptop (ssh-keygen -t ed25519 makes one)"
    )]
    Line,
    #[error("this is a key of {kind}; only ssh-ed25519 is taken: ssh-keygen -t ed25519")]
    Kind { kind: String },
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrivateKeyError {
    #[error("it is not a private key of OpenSSH")]
    Format,
    #[error("it has a passphrase, which tinydc doesn't ask for")]
    Encrypted,
    #[error("it is not an Ed25519 key")]
    Kind,
}

/// Cuts length-prefixed strings (RFC 4251 5).
struct Cutter<'a>(&'a [u8]);

impl<'a> Cutter<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn string(&mut self) -> Option<&'a [u8]> {
        let length = self.number()?;
        self.take(length as usize)
    }
}

impl TryFrom<String> for OperatorKey {
    type Error = OperatorKeyError;

    fn try_from(line: String) -> Result<OperatorKey, OperatorKeyError> {
        let mut words = line.split_whitespace();
        let kind = words.next().ok_or(OperatorKeyError::Line)?;
        if kind != KIND {
            return Err(match kind.starts_with("ssh-") || kind.starts_with("ecdsa-") {
                true => OperatorKeyError::Kind { kind: kind.into() },
                false => OperatorKeyError::Line,
            });
        }
        let bytes = words.next().and_then(|text| STANDARD.decode(text).ok()).ok_or(OperatorKeyError::Line)?;
        let mut cutter = Cutter(&bytes);
        let (kind, key) = (cutter.string(), cutter.string());
        let key = key.filter(|_| kind == Some(KIND.as_bytes()) && cutter.0.is_empty());
        let key = key.and_then(|key| key.try_into().ok()).ok_or(OperatorKeyError::Line)?;
        Ok(OperatorKey { key: PublicKey(key), name: name_in(words.next().unwrap_or_default()) })
    }
}

/// `Ann.Lee@laptop` is `ann-lee`.
fn name_in(comment: &str) -> String {
    let before = comment.split('@').next().unwrap_or_default().to_ascii_lowercase();
    let plain: String =
        before.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(32).collect();
    let name = plain.trim_matches('-');
    if is_person_name(name) { name.into() } else { NAMELESS.into() }
}

/// The key in a file such as `~/.ssh/id_ed25519`.
pub fn read_private_key(text: &str) -> Result<NodeKey, PrivateKeyError> {
    let body = text.trim().strip_prefix(HEAD).and_then(|rest| rest.strip_suffix(FOOT));
    let body: String = body.ok_or(PrivateKeyError::Format)?.split_whitespace().collect();
    let bytes = STANDARD.decode(body).map_err(|_| PrivateKeyError::Format)?;
    let seed = seed_in(&bytes)?;
    NodeKey::from_pkcs8(&[&PKCS8_HEAD[..], &seed].concat()).map_err(|_| PrivateKeyError::Format)
}

fn seed_in(bytes: &[u8]) -> Result<[u8; 32], PrivateKeyError> {
    let format = || PrivateKeyError::Format;
    let mut file = Cutter(bytes.strip_prefix(MAGIC).ok_or_else(format)?);
    let cipher = file.string().ok_or_else(format)?;
    if cipher != b"none" {
        return Err(PrivateKeyError::Encrypted);
    }
    // How the passphrase would be used, twice nothing; the number of keys; the public one.
    let (_, _, keys) = (file.string(), file.string(), file.number());
    let _public = file.string().filter(|_| keys == Some(1)).ok_or_else(format)?;
    let mut private = Cutter(file.string().ok_or_else(format)?);
    let (first, second) = (private.number().ok_or_else(format)?, private.number().ok_or_else(format)?);
    if first != second {
        return Err(format());
    }
    if private.string().ok_or_else(format)? != KIND.as_bytes() {
        return Err(PrivateKeyError::Kind);
    }
    private.string().ok_or_else(format)?;
    // The seed, then the public key again.
    let both = private.string().filter(|both| both.len() == 64).ok_or_else(format)?;
    both[..32].try_into().map_err(|_| format())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn string(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
    }

    fn line(key: &NodeKey, comment: &str) -> String {
        let body = [string(KIND.as_bytes()), string(&key.public_key().0)].concat();
        format!("{KIND} {} {comment}", STANDARD.encode(body))
    }

    /// As PROTOCOL.key of OpenSSH says.
    fn file(seed: &[u8; 32], cipher: &str, kind: &str) -> String {
        let key = NodeKey::from_pkcs8(&[&PKCS8_HEAD[..], seed].concat()).unwrap().public_key();
        let public = [string(kind.as_bytes()), string(&key.0)].concat();
        let both = [&seed[..], &key.0].concat();
        let private = [
            vec![1, 2, 3, 4, 1, 2, 3, 4],
            string(kind.as_bytes()),
            string(&key.0),
            string(&both),
            string(b"ann@laptop"),
            vec![1, 2, 3],
        ]
        .concat();
        let whole = [
            MAGIC.to_vec(),
            string(cipher.as_bytes()),
            string(b"none"),
            string(b""),
            vec![0, 0, 0, 1],
            string(&public),
            string(&private),
        ]
        .concat();
        let text = STANDARD.encode(whole);
        let lines: Vec<&str> =
            text.as_bytes().chunks(70).map(|line| std::str::from_utf8(line).unwrap()).collect();
        format!("{HEAD}\n{}\n{FOOT}\n", lines.join("\n"))
    }

    #[test]
    fn a_key_as_openssh_writes_it_is_read() {
        let seed = [7; 32];
        let key = read_private_key(&file(&seed, "none", KIND)).unwrap();
        let public = OperatorKey::try_from(line(&key, "Ann.Lee@laptop")).unwrap();
        assert_eq!(public.name, "ann-lee");
        assert!(public.key.verifies(b"challenge", &key.sign(b"challenge")));
    }

    #[test]
    fn what_is_no_usable_key_is_told_apart() {
        assert_eq!(
            read_private_key(&file(&[7; 32], "aes256-ctr", KIND)).err(),
            Some(PrivateKeyError::Encrypted)
        );
        assert_eq!(read_private_key(&file(&[7; 32], "none", "ssh-rsa")).err(), Some(PrivateKeyError::Kind));
        for bad in ["", "hello", &format!("{HEAD}\n{FOOT}\n"), &format!("{HEAD}\nAAAA\n{FOOT}\n")] {
            assert_eq!(read_private_key(bad).err(), Some(PrivateKeyError::Format), "{bad}");
        }
        let whole = file(&[7; 32], "none", KIND);
        let cut = format!("{HEAD}\n{}\n{FOOT}", whole.lines().nth(1).unwrap());
        assert!(read_private_key(&cut).is_err());
    }

    #[test]
    fn a_line_of_the_configuration_is_a_key_and_a_name() {
        let key = NodeKey::create().unwrap();
        let name = |comment: &str| OperatorKey::try_from(line(&key, comment)).unwrap().name;
        assert_eq!(
            (name("ann@laptop"), name(""), name("@@")),
            ("ann".into(), NAMELESS.into(), NAMELESS.into())
        );
        let error = |line: &str| OperatorKey::try_from(line.to_string()).unwrap_err();
        assert_eq!(error("ssh-rsa AAAA ann"), OperatorKeyError::Kind { kind: "ssh-rsa".into() });
        for bad in ["", "ann", "ssh-ed25519", "ssh-ed25519 AAAA ann", "ssh-ed25519 !!! ann"] {
            assert_eq!(error(bad), OperatorKeyError::Line, "{bad}");
        }
    }
}
