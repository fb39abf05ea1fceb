//! Images and content: what lies on nodes as blobs and is named by a digest.

use super::ids::NodeId;
use super::node::Architecture;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// `sha256:` and 64 lower-case hex digits. Checked where it is made, because it becomes a file's name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a digest: expected sha256: and 64 lower-case hex digits")]
pub struct DigestError(pub String);

impl Digest {
    pub fn new(text: &str) -> Result<Digest, DigestError> {
        let hex = text.strip_prefix("sha256:").unwrap_or("");
        let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if hex.len() == 64 && hex.bytes().all(is_hex) {
            Ok(Digest(text.into()))
        } else {
            Err(DigestError(text.chars().take(80).collect()))
        }
    }

    pub fn of_sha256(hash: &[u8; 32]) -> Digest {
        use std::fmt::Write;
        let mut text = String::with_capacity(71);
        text.push_str("sha256:");
        for byte in hash {
            // Writing to a String can't fail.
            let _ = write!(text, "{byte:02x}");
        }
        Digest(text)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 64 hex digits.
    pub fn hex(&self) -> &str {
        &self.0[7..]
    }

    /// The first 12 hex digits, as tables show them.
    pub fn short(&self) -> &str {
        &self.0[7..19]
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        Digest::new(&text)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ArtifactKind {
    /// Came by `image load`: no registry can give it again.
    LoadedImage,
    /// Can be pulled again by its digest.
    RegistryImage,
    /// A tar of files sent along with a Compose file.
    Content,
}

/// Something that lies on nodes as blobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    pub digest: Digest,
    pub kind: ArtifactKind,
    /// The names under which it was loaded or pulled, such as `docker.io/library/nginx:1.27`.
    pub names: BTreeSet<String>,
    pub bytes: u64,
    /// Architectures the image can run on, as OCI names them (`arm64`), with the manifest of each.
    pub platforms: BTreeMap<String, Digest>,
    /// Nodes that said they hold all of it.
    pub holders: BTreeSet<NodeId>,
    /// Nodes that hold some of its platforms: an archive may have less than another of the same index.
    pub part_holders: BTreeSet<NodeId>,
}

impl Artifact {
    /// Whether it has what such a machine runs. One that does not say what it is built for is tried everywhere.
    pub fn runs_on(&self, architecture: Architecture) -> bool {
        let own = architecture.oci_name();
        let is_own =
            |name: &str| name == own || name.strip_prefix(own).is_some_and(|rest| rest.starts_with('/'));
        self.platforms.is_empty() || self.platforms.keys().any(|name| is_own(name))
    }

    /// Which nodes to ask for it, in this order.
    pub fn sources(&self) -> impl Iterator<Item = NodeId> {
        self.holders.iter().chain(&self.part_holders).copied()
    }

    /// This node holds nothing of it any more.
    pub fn forget_holder(&mut self, node: NodeId) {
        self.holders.remove(&node);
        self.part_holders.remove(&node);
    }

    /// For people: `amd64, arm64/v8`.
    pub fn platform_names(&self) -> String {
        let names: Vec<&str> = self.platforms.keys().map(String::as_str).collect();
        names.join(", ")
    }
}
