//! An app whose files are not packed yet.
//!
//! Input: what the Compose file asks for, then the digest of each packed path. Output: the specification.
//! Packing itself is the caller's: it needs the file system.

use crate::model::{AppSpec, Digest, MountSource, MountSpec, Order, SecretName};
use std::collections::BTreeMap;
use std::fmt;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    /// Complete but for the mounts and seeds that `content` lists.
    pub app: AppSpec,
    /// What to send along, in the order of the services.
    pub content: Vec<ContentWish>,
    /// What to send along before the app.
    pub secrets: Vec<SecretWish>,
}

/// A secret or config that the file brings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretWish {
    pub name: SecretName,
    pub source: SecretSource,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// Relative to the Compose file's directory, or absolute, on the machine that deploys.
    File(String),
    Text(SecretText),
}

/// Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretText(pub String);

impl fmt::Debug for SecretText {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("SecretText(…)")
    }
}

/// A file or directory beside the Compose file that goes along with the app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentWish {
    pub service: String,
    /// Where it stands in the container.
    pub target: String,
    /// From the Compose file's directory, beginning with `./` or `../`, or `.` itself.
    pub path: String,
    pub kind: ContentKind,
    pub is_read_only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContentKind {
    /// One file; the tar holds just it.
    File,
    /// The contents of the directory, without the directory itself.
    ReadOnlyDirectory,
    /// As the read-only directory, but it fills the volume when that is made.
    SeedOfVolume { volume: String },
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path} was not packed")]
pub struct FinishError {
    pub path: String,
}

impl Draft {
    /// The specification, with `digests` by the wishes' paths.
    ///
    /// Mounts stand in the order of their targets, so that a parent comes before what is mounted inside it and the
    /// order in the file makes no difference.
    pub fn finish(self, digests: &BTreeMap<String, Digest>) -> Result<AppSpec, FinishError> {
        let mut app = self.app;
        for wish in self.content {
            let Some(digest) = digests.get(&wish.path).cloned() else {
                return Err(FinishError { path: wish.path });
            };
            match &wish.kind {
                ContentKind::SeedOfVolume { volume } => {
                    app.volumes.entry(volume.clone()).or_default().seed = Some(digest);
                }
                ContentKind::File | ContentKind::ReadOnlyDirectory => {
                    let is_file = wish.kind == ContentKind::File;
                    let source = MountSource::Content { digest, is_file };
                    let mount = MountSpec { target: wish.target, is_read_only: wish.is_read_only, source };
                    if let Some(service) = app.services.get_mut(&wish.service) {
                        service.mounts.push(mount);
                    }
                }
            }
        }
        for service in app.services.values_mut() {
            service.mounts.order_by(|a, b| a.target.cmp(&b.target));
        }
        Ok(app)
    }
}
