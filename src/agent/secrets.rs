//! Secrets of the instances here: opened in memory, shown to containers as files in memory.
//!
//! State and an instance's uses → files in a file system that lives in memory (`tmpfs`, never swapped where the kernel
//! can promise that), to be bound into the container. Opening is the owner's: a node without the cluster key asks one
//! that has it. What was opened is kept in memory while it lies in a container's folder here, so that a restart needs
//! nobody, and is overwritten when it is dropped.
//!
//! Never: writes a secret to a disk, a log or an error. Tested by the `secrets` scenario, which searches the disks.
//!
//! Invariant: a container gets the version that the state has, or a newer one, when somebody can open it
//! (`a_secret_that_was_removed_and_came_back_is_opened_anew`).

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
use zeroize::Zeroizing;

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
    pub bytes: Zeroizing<Vec<u8>>,
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
    /// What lies in each file, and the version of it; unknown after a restart of the daemon. Locked before `opened`.
    placed: Mutex<BTreeMap<PathBuf, (SecretName, u64)>>,
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
    fn open(&self, state: &State, name: &SecretName) -> Result<Arc<Opened>, SecretError> {
        let row = state.secrets.find(name).ok_or_else(|| SecretError::Gone { name: name.clone() })?;
        let known = lock(&self.opened).get(name).cloned();
        if let Some(known) = known.filter(|known| known.version == row.version) {
            return Ok(known);
        }
        let opened = (self.open)(&Sealed::Secret(name.clone()))
            .map_err(|source| SecretError::Open { name: name.clone(), source })?;
        if opened.version < row.version {
            return Err(SecretError::Late { name: name.clone() });
        }
        let opened = Arc::new(opened);
        lock(&self.opened).insert(name.clone(), opened.clone());
        Ok(opened)
    }

    /// For the ingress, which keeps what it makes of it.
    pub fn open_sealed(&self, sealed: &Sealed, version: u64) -> Result<Opened, SecretError> {
        let opened = (self.open)(sealed).map_err(SecretError::OpenKey)?;
        if opened.version < version { Err(SecretError::LateKey) } else { Ok(opened) }
    }

    /// Puts an instance's secrets where its container finds them. Before each start: memory forgets at a reboot.
    pub fn place(&self, state: &State, container: &str, uses: &[SecretUse]) -> Result<(), SecretError> {
        lock(&self.opened).retain(|name, _| state.needs_secret(self.node, name));
        if uses.is_empty() {
            return Ok(());
        }
        self.mount()?;
        self.fill(state, container, uses)
    }

    fn fill(&self, state: &State, container: &str, uses: &[SecretUse]) -> Result<(), SecretError> {
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
            let content = (used.secret.clone(), opened.version);
            if path.exists() && lock(&self.placed).get(&path) == Some(&content) {
                continue;
            }
            write(&path, &opened.bytes, used)
                .map_err(|source| SecretError::Place { name: used.secret.clone(), source })?;
            lock(&self.placed).insert(path, content);
        }
        Ok(())
    }

    /// Of a container that is gone.
    pub fn forget(&self, container: &str) {
        let folder = self.folder.join(container);
        lock(&self.placed).retain(|path, _| !path.starts_with(&folder));
        {
            let placed = lock(&self.placed);
            lock(&self.opened).retain(|name, _| placed.values().any(|(used, _)| used == name));
        }
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

/// In place of the old file, whole or not at all: what is there after a crash is given to the container. The bind of a
/// stopped container is gone, and its next start binds what the path names then.
fn write(path: &Path, bytes: &[u8], used: &SecretUse) -> io::Result<()> {
    let new = path.with_extension("new");
    let written = write_new(&new, bytes, used).and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        // A piece takes memory, and is of no use.
        let _ = fs::remove_file(new);
    }
    written
}

fn write_new(path: &Path, bytes: &[u8], used: &SecretUse) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    std::os::unix::fs::fchown(&file, Some(used.uid), Some(used.gid))?;
    file.set_permissions(fs::Permissions::from_mode(used.mode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::AppName;
    use crate::runtime::scratch::Scratch;
    use crate::state::testing::{Applier, deploy, spec};
    use crate::state::{Command, PlanStep};

    /// The content of `shop/db`; `None`: nobody can open it.
    type Vault = Arc<Mutex<Option<Opened>>>;

    fn uses() -> Vec<SecretUse> {
        let secret = SecretName::new("shop/db").unwrap();
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        vec![SecretUse { secret, target: "/run/secrets/db".into(), uid, gid, mode: 0o400, version: 0 }]
    }

    /// Sets the secret and deploys an app with one instance on node 1 that uses it.
    fn deploy_with(applier: &mut Applier, vault: &Vault, text: &str) {
        let name = SecretName::new("shop/db").unwrap();
        let fingerprint = [text.len() as u8; 32];
        applier.must(Command::PutSecret { name: name.clone(), sealed: vec![1], fingerprint, bytes: 1 });
        let version = applier.state.secrets.find(&name).unwrap().version;
        *lock(vault) = Some(Opened { version, bytes: Zeroizing::new(text.into()) });
        let mut web = spec("a");
        web.secrets = uses();
        applier.must(deploy("shop", &[("web", web)]));
        let service = applier.state.services.rows().next_back().unwrap().clone();
        applier.must(Command::Plan {
            steps: vec![PlanStep::CreateInstance {
                service: service.id,
                service_version: service.version,
                slot: 1,
                spec_version: service.spec_version,
            }],
        });
        let instance = applier.state.instances.rows().next_back().unwrap().clone();
        let node = applier.state.nodes.find(&NodeId(1)).unwrap().clone();
        applier.must(Command::Plan {
            steps: vec![PlanStep::Assign {
                instance: instance.id,
                instance_version: instance.version,
                node: node.id,
                node_version: node.version,
            }],
        });
    }

    fn secrets(folder: &Scratch, vault: &Vault) -> Secrets {
        let vault = vault.clone();
        let open = move |_: &Sealed| lock(&vault).clone().ok_or_else(|| "nobody can open it".into());
        Secrets::new(NodeId(1), folder.path(), Box::new(open))
    }

    fn text(secrets: &Secrets, container: &str) -> String {
        fs::read_to_string(secrets.path(container, 0)).unwrap()
    }

    #[test]
    fn a_secret_that_was_removed_and_came_back_is_opened_anew() {
        let folder = Scratch::new("secrets-anew");
        let (mut applier, vault) = (Applier::with_nodes(1), Vault::default());
        let secrets = secrets(&folder, &vault);
        deploy_with(&mut applier, &vault, "old");
        secrets.fill(&applier.state, "i1", &uses()).unwrap();
        assert_eq!(text(&secrets, "i1"), "old");
        let app = AppName::new("shop").unwrap();
        applier.must(Command::RemoveApp { app, with_volumes: false });
        deploy_with(&mut applier, &vault, "newer");
        // Before this node has taken the old container away.
        secrets.fill(&applier.state, "i2", &uses()).unwrap();
        assert_eq!(text(&secrets, "i2"), "newer");
    }

    #[test]
    fn what_was_opened_serves_a_restart_and_goes_with_the_last_container() {
        let folder = Scratch::new("secrets-kept");
        let (mut applier, vault) = (Applier::with_nodes(1), Vault::default());
        let secrets = secrets(&folder, &vault);
        deploy_with(&mut applier, &vault, "words");
        for container in ["i1", "i2"] {
            secrets.fill(&applier.state, container, &uses()).unwrap();
        }
        *lock(&vault) = None;
        secrets.forget("i1");
        secrets.fill(&applier.state, "i3", &uses()).expect("nobody needs to be asked");
        secrets.forget("i2");
        secrets.forget("i3");
        assert!(lock(&secrets.opened).is_empty(), "nothing here uses it");
    }

    #[test]
    fn a_secret_is_replaced_whole_or_not_at_all() {
        let folder = Scratch::new("secrets-whole");
        let path = folder.path().join("0");
        let used = &uses()[0];
        write(&path, b"old", used).unwrap();
        let old = fs::File::open(&path).unwrap();
        // A folder in the way of the new file: it can't be written.
        fs::create_dir(folder.path().join("0.new")).unwrap();
        write(&path, b"new", used).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        fs::remove_dir(folder.path().join("0.new")).unwrap();
        write(&path, b"new", used).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        // The old file was not touched: a crash at any moment leaves one or the other.
        assert_eq!(io::read_to_string(old).unwrap(), "old");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o400);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
