//! Secrets of the instances here: opened in memory, shown to containers as files in memory.
//!
//! State and an instance's uses → files in a file system that lives in memory (`tmpfs`, never swapped where the kernel
//! can promise that), to be bound into the container. Opening is the owner's: a node without the cluster key asks one
//! that has it. What was opened is kept in memory while an instance here needs it, so that a restart needs nobody.
//!
//! Never: writes a secret to a disk, a log or an error. Tested by the `secrets` scenario, which searches the disks.

use crate::linux::mount;
use crate::model::{NodeId, SecretName, SecretUse};
use crate::state::State;
use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// In all, of one node: what a hundred of the largest take.
const MEMORY_BYTES_MAX: u64 = 64 << 20;

/// What only the cluster key opens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sealed {
    Secret(SecretName),
    /// The key of the certificate that the ingress shows for a host.
    CertificateKey(String),
}

/// What was sealed, and the version of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Opened {
    pub version: u64,
    pub bytes: Vec<u8>,
}

/// Opens what is sealed, here or by asking. Blocks for some seconds at most.
pub type Open = Box<dyn Fn(&Sealed) -> Result<Opened, Box<dyn Error + Send + Sync>> + Send + Sync>;

#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("open secret {name}")]
    Open {
        name: SecretName,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    #[error("secret {name} changed and its new version is not to be had yet")]
    Late { name: SecretName },
    #[error("open the certificate's key")]
    OpenKey(#[source] Box<dyn Error + Send + Sync>),
    #[error("the newest version is not to be had yet")]
    LateKey,
    #[error("secret {name} is gone")]
    Gone { name: SecretName },
    #[error("keep secrets in memory at {path}")]
    Mount {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("place secret {name} in memory")]
    Place {
        name: SecretName,
        #[source]
        source: io::Error,
    },
}

pub struct Secrets {
    node: NodeId,
    folder: PathBuf,
    open: Open,
    opened: Mutex<BTreeMap<SecretName, Arc<Opened>>>,
    /// The version that lies in each file; unknown after a restart of the daemon.
    placed: Mutex<BTreeMap<PathBuf, u64>>,
}

impl Secrets {
    /// `run_dir`: where the file system in memory is mounted once it is needed.
    pub fn new(node: NodeId, run_dir: &Path, open: Open) -> Secrets {
        Secrets {
            node,
            folder: run_dir.join("secrets"),
            open,
            opened: Mutex::default(),
            placed: Mutex::default(),
        }
    }

    /// Where the secret of this number in an instance's list lies.
    pub fn path(&self, container: &str, number: usize) -> PathBuf {
        self.folder.join(container).join(number.to_string())
    }

    /// Opens what the state has, or what was opened of it before.
    pub fn open(&self, state: &State, name: &SecretName) -> Result<Arc<Opened>, SecretError> {
        let row = state.secrets.find(name).ok_or_else(|| SecretError::Gone { name: name.clone() })?;
        let known = lock(&self.opened).get(name).cloned();
        if let Some(known) = known.filter(|known| known.version >= row.version) {
            return Ok(known);
        }
        let opened = (self.open)(&Sealed::Secret(name.clone()))
            .map_err(|source| SecretError::Open { name: name.clone(), source })?;
        if opened.version < row.version {
            return Err(SecretError::Late { name: name.clone() });
        }
        let opened = Arc::new(opened);
        let mut kept = lock(&self.opened);
        kept.insert(name.clone(), opened.clone());
        kept.retain(|name, _| state.secrets.contains(name) && state.needs_secret(self.node, name));
        Ok(opened)
    }

    /// For the ingress, which keeps what it makes of it.
    pub fn open_sealed(&self, sealed: &Sealed, version: u64) -> Result<Opened, SecretError> {
        let opened = (self.open)(sealed).map_err(SecretError::OpenKey)?;
        if opened.version < version { Err(SecretError::LateKey) } else { Ok(opened) }
    }

    /// Puts an instance's secrets where its container finds them. Before each start: memory forgets at a reboot.
    pub fn place(&self, state: &State, container: &str, uses: &[SecretUse]) -> Result<(), SecretError> {
        if uses.is_empty() {
            return Ok(());
        }
        self.mount()?;
        let folder = self.folder.join(container);
        fs::create_dir_all(&folder).map_err(|source| SecretError::Mount { path: folder.clone(), source })?;
        for (number, used) in uses.iter().enumerate() {
            let path = self.path(container, number);
            let opened = match self.open(state, &used.secret) {
                Ok(opened) => opened,
                // What an earlier run of the daemon placed serves until somebody can open the secret again.
                Err(error) if path.exists() => {
                    tracing::warn!(container, secret = %used.secret, error = super::chain(&error),
                        "started with the secret as it was");
                    continue;
                }
                Err(error) => return Err(error),
            };
            if path.exists() && lock(&self.placed).get(&path) == Some(&opened.version) {
                continue;
            }
            write(&path, &opened.bytes, used)
                .map_err(|source| SecretError::Place { name: used.secret.clone(), source })?;
            lock(&self.placed).insert(path, opened.version);
        }
        Ok(())
    }

    /// Of a container that is gone.
    pub fn forget(&self, container: &str) {
        let folder = self.folder.join(container);
        lock(&self.placed).retain(|path, _| !path.starts_with(&folder));
        // Most containers have none.
        let _ = fs::remove_dir_all(folder);
    }

    /// Nothing of it stays on a machine that leaves.
    pub fn erase(&self) -> io::Result<()> {
        mount::detach(&self.folder)?;
        match fs::remove_dir(&self.folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn mount(&self) -> Result<(), SecretError> {
        let failed = |source| SecretError::Mount { path: self.folder.clone(), source };
        fs::create_dir_all(&self.folder).map_err(failed)?;
        match mount::is_mounted(&self.folder).map_err(failed)? {
            true => Ok(()),
            false => mount::memory(&self.folder, MEMORY_BYTES_MAX).map_err(failed),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Over the old content: the bind of a stopped container is gone, and a file's number must not matter.
fn write(path: &Path, bytes: &[u8], used: &SecretUse) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    std::os::unix::fs::fchown(&file, Some(used.uid), Some(used.gid))?;
    file.set_permissions(fs::Permissions::from_mode(used.mode))
}
