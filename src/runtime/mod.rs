//! Images and containers of one node.
//!
//! Input: what the agent wants to run here. Output: OCI containers, each kept by a shim of its own, so that the
//! daemon may stop, crash or be replaced without them. No network, no cluster: those are its siblings' work.
//!
//! ```text
//! <data>/blobs layers images tmp      images (`images`)
//! <data>/instances/ID/                container.json, rootfs (mount), upper, work, logs, hosts, resolv.conf
//! <run>/shim/ID/                      config.json, processes, exit, control.sock, tail
//! <run>/states/ID/                    libcontainer's own state
//! cgroup tinydc-TAG/ID                one per container
//! ```

pub mod bundle;
mod container;
mod exec;
pub mod images;
pub mod logs;
pub mod reference;
pub mod registry;
pub mod rootfs;
#[cfg(test)]
pub(crate) mod scratch;
pub mod seccomp;
mod shim;
pub mod user;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

pub use bundle::{Access, Bind, ContainerId, ContainerIdError, ContainerSpec, Seed, Tmpfs, parse_signal};
pub use container::{
    ContainerEnd, ContainerError, ContainerState, ContainerStatus, ExitWatch, KeepLogs, Swept,
};
pub use exec::{CheckEnd, CheckResult, ExecError, ExecHandle, ExecRequest, ExecStreams};
pub use shim::{ExitRecord, LeaseEnd, shim_main};

use crate::linux::cgroup::{CgroupError, Cgroups};
use crate::linux::process;
use images::{Collected, Digest, ImageStore, StoreError};

/// The kernel kills containers, then shims, and the daemon last.
const DAEMON_OOM_SCORE: i32 = -999;

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("`{0}` is no node tag of 8 hexadecimal digits")]
    BadTag(String),
    #[error("create {path}")]
    Create {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("open the images")]
    Images(#[from] StoreError),
    #[error("prepare the node's cgroup")]
    Cgroup(#[from] CgroupError),
}

/// Where a node's runtime lives.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// 8 hexadecimal digits of the node's id; they mark its kernel objects.
    pub node_tag: String,
    pub data_dir: PathBuf,
    /// On tmpfs where there is one; gone after a reboot.
    pub run_dir: PathBuf,
    /// The tinydc binary that acts as shim; `None`: this process's own.
    pub program: Option<PathBuf>,
}

/// The runtime of one node. All of it blocks unless it is `async`.
#[derive(Debug)]
pub struct Runtime {
    data_dir: PathBuf,
    run_dir: PathBuf,
    program: PathBuf,
    cgroup_parent: String,
    cgroups: Cgroups,
    images: ImageStore,
}

impl Runtime {
    pub fn open(config: RuntimeConfig) -> Result<Runtime, OpenError> {
        let is_tag =
            config.node_tag.len() == 8 && config.node_tag.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_tag {
            return Err(OpenError::BadTag(config.node_tag));
        }
        create_folder(&config.data_dir, 0o700)?;
        // The API's socket lies there too and has its own mode.
        create_folder(&config.run_dir, 0o755)?;
        let (data_dir, run_dir) = (absolute(config.data_dir)?, absolute(config.run_dir)?);
        for path in [data_dir.join("instances"), run_dir.join("shim"), run_dir.join("states")] {
            create_folder(&path, 0o700)?;
        }
        let cgroups = Cgroups::detect()?;
        let cgroup_parent = format!("tinydc-{}", config.node_tag);
        cgroups.create(&cgroup_parent)?;
        // Not permitted without CAP_SYS_RESOURCE; then the kernel's own choice stands.
        let _ = process::set_oom_score_adj(DAEMON_OOM_SCORE);
        let images = ImageStore::open(&data_dir)?;
        let program = config.program.unwrap_or_else(|| "/proc/self/exe".into());
        Ok(Runtime { data_dir, run_dir, program, cgroup_parent, cgroups, images })
    }

    pub fn images(&self) -> &ImageStore {
        &self.images
    }

    /// Caps the memory of all containers of this node together. `None` lifts the cap.
    pub fn set_total_memory_max(&self, bytes: Option<u64>) -> Result<(), CgroupError> {
        self.cgroups.set_memory_max(&self.cgroup_parent, bytes)
    }

    /// Removes every image that `keep` does not name and whose layers no container here uses.
    pub fn collect_garbage(
        &self,
        keep: impl FnOnce() -> BTreeSet<Digest>,
    ) -> Result<Collected, ContainerError> {
        let mut in_use = BTreeSet::new();
        for status in self.list()? {
            in_use.extend(self.spec(&status.id)?.layers);
        }
        Ok(self.images.collect_garbage(keep, &in_use)?)
    }

    fn states_dir(&self) -> PathBuf {
        self.run_dir.join("states")
    }
}

/// libcontainer and the shims change their folder, so paths must not depend on it.
fn absolute(path: PathBuf) -> Result<PathBuf, OpenError> {
    path.canonicalize().map_err(|source| OpenError::Create { path, source })
}

/// Mode 0700 lets only root look inside: images hold set-uid programs and volumes hold data.
fn create_folder(path: &Path, mode: u32) -> Result<(), OpenError> {
    let result = fs::DirBuilder::new().recursive(true).mode(mode).create(path);
    result.map_err(|source| OpenError::Create { path: path.to_owned(), source })
}
