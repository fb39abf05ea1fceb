//! Makes one container from an instance: image, content, volumes, network, bundle; then starts it. Blocks.
//!
//! Input: the instance, its specification, the state it was read from. Output: a running container, or an error
//! that names the step. What was fetched stays; what was half made is made anew at the next try.

use super::artifacts::{Artifacts, FetchArtifactError};
use super::disks::Disks;
use super::lease::Lease;
use super::secrets::{SecretError, Secrets};
use crate::model::*;
use crate::network::{Network, NetworkError};
use crate::runtime::{
    Access, Bind, ContainerError, ContainerId, ContainerSpec, ContainerState, KeepLogs, Runtime, Seed, Tmpfs,
};
use crate::state::{Service, State, VolumeKey};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Beside a container's log: the instance's name.
const NAME_FILE: &str = "of";

#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("get image {image}")]
    Image {
        image: String,
        #[source]
        source: FetchArtifactError,
    },
    #[error("get the files mounted at {target}")]
    Content {
        target: String,
        #[source]
        source: FetchArtifactError,
    },
    #[error("make volume {name}")]
    Volume {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("{path} does not exist on this node")]
    NoHostPath { path: String },
    #[error("connect to the network")]
    Network(#[from] NetworkError),
    #[error("write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("make the container")]
    Create(#[source] ContainerError),
    #[error("start the container")]
    Start(#[source] ContainerError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("the instance has no address yet")]
    NoAddress,
    #[error("the state no longer knows the instance")]
    Gone,
    #[error("{0}")]
    DiskFull(String),
    #[error("{0}")]
    DiskAbsent(String),
    #[error("exclusive, and no leader confirms that this node is the one to run it")]
    NoLease,
}

/// What launching needs of the node.
#[derive(Clone)]
pub struct Ground {
    pub runtime: Arc<Runtime>,
    pub network: Arc<Network>,
    pub artifacts: Arc<Artifacts>,
    pub data_dir: PathBuf,
    pub lease: Arc<Lease>,
    pub secrets: Arc<Secrets>,
    pub disks: Arc<Disks>,
}

/// The container's name on its node.
pub fn container_id(instance: InstanceId) -> ContainerId {
    ContainerId::parse(&instance.to_string()).expect("i and a number is a container's name")
}

/// The instance that a container belongs to; `None` for one that tinydc did not name.
pub fn instance_of(container: &ContainerId) -> Option<InstanceId> {
    container.as_str().strip_prefix('i')?.parse().ok().map(InstanceId)
}

impl Ground {
    pub fn volume_dir(&self, app: &AppName, name: &str) -> PathBuf {
        self.data_dir.join("volumes").join(app.as_str()).join(name)
    }

    /// Fetches, makes and starts. `progress` gets a few words now and then.
    pub fn launch(
        &self,
        state: &State,
        id: InstanceId,
        progress: &mut dyn FnMut(String),
    ) -> Result<(), LaunchError> {
        let instance = state.instances.find(&id).ok_or(LaunchError::Gone)?;
        let service = state.services.find(&instance.service).ok_or(LaunchError::Gone)?;
        let container = container_id(id);
        let is_made = self.runtime.spec(&container).is_ok();
        let address = instance.address.ok_or(LaunchError::NoAddress)?;
        // Also for a container that was made before: its namespace is gone after a reboot.
        let netns = self.network.attach(container.as_str(), address)?;
        if !is_made {
            let made = self
                .container_spec(state, instance, service, netns, progress)
                .and_then(|spec| self.runtime.create(&spec).map_err(LaunchError::Create));
            if let Err(error) = made {
                // Nothing would take these away: there is no container that could be removed.
                self.forget_copies(&container);
                self.network.detach(container.as_str())?;
                return Err(error);
            }
        }
        self.write_files(&container, (service, instance), (address, state.ula_prefix()))?;
        if !matches!(self.runtime.state(&container), ContainerState::Running { .. }) {
            if let Some(why) = self.over_quota(id) {
                return Err(LaunchError::DiskFull(why));
            }
            progress("starting".into());
            let spec = service.spec_of(instance.spec_version);
            self.secrets.place(state, container.as_str(), &spec.secrets)?;
            let name = instance.node.map(|node| state.node_name(node)).unwrap_or_default();
            if let Some(why) = self.disks.lack(spec, self.disks.absent(), &name) {
                return Err(LaunchError::DiskAbsent(why));
            }
            let lease = match spec.is_exclusive {
                true => Some(self.lease.for_start().ok_or(LaunchError::NoLease)?),
                false => None,
            };
            self.runtime.start(&container, lease).map_err(LaunchError::Start)?;
        }
        // The state forgets a dead instance; its log must still say whose it is.
        let name = self.runtime.instance_dir(&container).join("logs").join(NAME_FILE);
        if !name.exists() {
            let _ = fs::write(name, state.instance_name(instance));
        }
        Ok(())
    }

    /// The newest dead instance of a slot (`shop/web.1`) whose log is here.
    pub fn newest_dead(&self, name: &str) -> Option<InstanceId> {
        let kept = self.runtime.kept_logs().ok()?;
        let is_named = |container: &&ContainerId| {
            let path = self.runtime.instance_dir(container).join("logs").join(NAME_FILE);
            fs::read_to_string(path).is_ok_and(|text| text == name)
        };
        kept.iter().filter(is_named).filter_map(instance_of).max()
    }

    /// Of each slot's dead instances the logs of the newest few are kept.
    pub fn prune_logs(&self) -> Result<(), ContainerError> {
        let mut by_name: BTreeMap<String, Vec<(InstanceId, ContainerId)>> = BTreeMap::new();
        for container in self.runtime.kept_logs()? {
            let path = self.runtime.instance_dir(&container).join("logs").join(NAME_FILE);
            let name = fs::read_to_string(path).unwrap_or_default();
            if let Some(instance) = instance_of(&container) {
                by_name.entry(name).or_default().push((instance, container));
            }
        }
        for mut dead in by_name.into_values() {
            dead.order();
            let excess = dead.len().saturating_sub(limits::DEAD_INSTANCES_KEPT);
            for (_, container) in dead.drain(..excess) {
                self.runtime.remove(&container, KeepLogs::No)?;
            }
        }
        Ok(())
    }

    fn container_spec(
        &self,
        state: &State,
        instance: &Instance,
        service: &Service,
        netns: PathBuf,
        progress: &mut dyn FnMut(String),
    ) -> Result<ContainerSpec, LaunchError> {
        let spec = service.spec_of(instance.spec_version);
        let image = &spec.image;
        let failed = |source| LaunchError::Image { image: image.reference.clone(), source };
        let (config, layers) = self.artifacts.image(state, image, progress).map_err(failed)?;
        let mut container = ContainerSpec::new(container_id(instance.id), config, layers);
        container.hostname = spec.hostname.clone().unwrap_or_else(|| hostname(service, instance));
        container.entrypoint = spec.entrypoint.clone();
        container.command = spec.command.clone();
        container.env = spec.environment.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        container.user = spec.user.clone();
        container.working_dir = spec.working_dir.clone();
        container.memory_bytes_max = spec.resources.memory_bytes_max;
        container.cpu_millis_max = spec.resources.cpu_millis_max;
        container.pids_max = spec.resources.pids_max;
        container.is_rootfs_read_only = spec.is_read_only;
        container.has_terminal = spec.has_tty;
        container.has_init = spec.has_init;
        container.netns = Some(netns);
        for mount in &spec.mounts {
            self.add_mount(state, service, mount, &mut container, progress)?;
        }
        for (number, used) in spec.secrets.iter().enumerate() {
            container.binds.push(Bind {
                source: self.secrets.path(container.id.as_str(), number),
                destination: used.target.clone(),
                access: Access::ReadOnly,
                seed: Seed::Never,
            });
        }
        Ok(container)
    }

    fn add_mount(
        &self,
        state: &State,
        service: &Service,
        mount: &MountSpec,
        container: &mut ContainerSpec,
        progress: &mut dyn FnMut(String),
    ) -> Result<(), LaunchError> {
        let access = if mount.is_read_only { Access::ReadOnly } else { Access::ReadWrite };
        let (source, seed) = match &mount.source {
            MountSource::Tmpfs { bytes_max } => {
                container.tmpfs.push(Tmpfs { destination: mount.target.clone(), size_bytes_max: *bytes_max });
                return Ok(());
            }
            MountSource::Content { digest, is_file } => {
                let failed = |source| LaunchError::Content { target: mount.target.clone(), source };
                let shared = self.artifacts.content(state, digest, progress).map_err(failed)?;
                let folder = match mount.is_read_only {
                    true => shared,
                    false => {
                        self.own_copy(container, digest, &shared).map_err(|source| failed(source.into()))?
                    }
                };
                let source = match is_file {
                    true => only_entry(&folder).map_err(|source| failed(source.into()))?,
                    false => folder,
                };
                (source, Seed::Never)
            }
            MountSource::Volume { name } => {
                (self.make_volume(state, service, name, progress)?, Seed::FromImageOnce)
            }
            MountSource::HostPath { path } => {
                if !Path::new(path).exists() {
                    return Err(LaunchError::NoHostPath { path: path.clone() });
                }
                (path.into(), Seed::Never)
            }
        };
        container.binds.push(Bind { source, destination: mount.target.clone(), access, seed });
        Ok(())
    }

    /// Content that a container may write to is its own: other instances share what lies under the digest.
    fn own_copy(&self, container: &ContainerSpec, digest: &Digest, shared: &Path) -> io::Result<PathBuf> {
        let copy = self.copies_dir(&container.id).join(digest.hex());
        if !copy.is_dir() {
            fs::create_dir_all(self.copies_dir(&container.id))?;
            copy_tree(shared, &copy)?;
        }
        Ok(copy)
    }

    fn copies_dir(&self, container: &ContainerId) -> PathBuf {
        self.data_dir.join("copies").join(container.as_str())
    }

    /// What belonged to a container beside its own folder.
    pub fn forget_copies(&self, container: &ContainerId) {
        // Most containers have none.
        let _ = fs::remove_dir_all(self.copies_dir(container));
        self.secrets.forget(container.as_str());
    }

    /// The volume's folder; made and seeded when it is missing, never touched when it is there.
    fn make_volume(
        &self,
        state: &State,
        service: &Service,
        name: &str,
        progress: &mut dyn FnMut(String),
    ) -> Result<PathBuf, LaunchError> {
        let folder = self.volume_dir(&service.app, name);
        if folder.is_dir() {
            return Ok(folder);
        }
        let failed = |source| LaunchError::Volume { name: name.into(), source };
        let seed = state.volumes.find(&VolumeKey::new(&service.app, name)).and_then(|row| row.seed.clone());
        let parent = folder.parent().unwrap_or(&self.data_dir);
        fs::create_dir_all(parent).map_err(failed)?;
        let Some(digest) = seed else {
            fs::create_dir(&folder).map_err(failed)?;
            return Ok(folder);
        };
        let content_failed = |source| LaunchError::Content { target: name.into(), source };
        let content = self.artifacts.content(state, &digest, progress).map_err(content_failed)?;
        // Filled beside its place and renamed, so that a half-filled volume is never taken for the data.
        let filling = parent.join(format!(".filling-{name}"));
        let _ = fs::remove_dir_all(&filling);
        copy_tree(&content, &filling).map_err(failed)?;
        fs::rename(&filling, &folder).map_err(failed)?;
        Ok(folder)
    }

    fn write_files(
        &self,
        container: &ContainerId,
        (service, instance): (&Service, &Instance),
        (address, ula_prefix): (std::net::Ipv4Addr, Option<UlaPrefix>),
    ) -> Result<(), LaunchError> {
        let folder = self.runtime.instance_dir(container);
        let spec = service.spec_of(instance.spec_version);
        let name = spec.hostname.clone().unwrap_or_else(|| hostname(service, instance));
        let mut hosts =
            format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{address}\t{name}\n");
        if let Some(prefix) = ula_prefix {
            hosts.push_str(&format!("{}\t{name}\n", prefix.embed(address)));
        }
        let files = [
            ("hosts", hosts),
            ("hostname", format!("{name}\n")),
            ("resolv.conf", resolv_conf(self.network.bridge_address())),
        ];
        for (file, text) in files {
            let path = folder.join(file);
            // Unchanged files cost no write: a restart must not wear a card.
            if fs::read_to_string(&path).is_ok_and(|old| old == text) {
                continue;
            }
            fs::write(&path, text).map_err(|source| LaunchError::Write { path, source })?;
        }
        Ok(())
    }
}

/// `web-1`: unique within its app, a DNS label.
fn hostname(service: &Service, instance: &Instance) -> String {
    let name: String =
        service.name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(50).collect();
    format!("{name}-{}", instance.slot)
}

/// The node's own name server. A name is asked for as it is: there is no search list, and none is needed.
fn resolv_conf(server: std::net::Ipv4Addr) -> String {
    format!("nameserver {server}\noptions ndots:0\n")
}

/// The file in a folder that holds just one.
fn only_entry(folder: &Path) -> io::Result<PathBuf> {
    let mut entries = fs::read_dir(folder)?;
    let first = entries.next().ok_or_else(|| io::Error::other("the archive is empty"))??;
    Ok(first.path())
}

/// Copies files, folders and links with owner and mode.
fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, lchown};
    let meta = fs::symlink_metadata(from)?;
    if meta.is_dir() {
        fs::create_dir(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            copy_tree(&entry.path(), &to.join(entry.file_name()))?;
        }
        fs::set_permissions(to, meta.permissions())?;
    } else if meta.is_symlink() {
        std::os::unix::fs::symlink(fs::read_link(from)?, to)?;
    } else if meta.is_file() {
        fs::copy(from, to)?;
    } else {
        return Ok(());
    }
    lchown(to, Some(meta.uid()), Some(meta.gid()))
}
