//! The local socket and the lock on the data directory.

use anyhow::{Context, Result, bail};
use async_io::Async;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

pub const FILE: &str = "api.sock";

/// One daemon per data directory; the lock goes with the process.
pub fn lock_data_dir(data_dir: &Path) -> Result<File> {
    let path = data_dir.join("lock");
    let file = File::create(&path).with_context(|| format!("open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            bail!(
                "another tinydc runs with {}; stop it first, or give this one a data_dir of its own",
                data_dir.display()
            )
        }
        Err(fs::TryLockError::Error(error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

/// Mode 0660 for the group `tinydc` if there is one, else 0600.
pub fn listen(run_dir: &Path) -> Result<Arc<Async<UnixListener>>> {
    fs::create_dir_all(run_dir).with_context(|| format!("create {}", run_dir.display()))?;
    let path = run_dir.join(FILE);
    if UnixStream::connect(&path).is_ok() {
        bail!("another daemon answers on {}", path.display());
    }
    // Left by a daemon that was killed.
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
    let group = nix::unistd::Group::from_name("tinydc").ok().flatten();
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    if let Some(group) = group {
        nix::unistd::chown(&path, None, Some(group.gid))
            .with_context(|| format!("give {} to its group", path.display()))?;
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("set the mode of {}", path.display()))?;
    Ok(Arc::new(Async::new(listener).context("make the socket non-blocking")?))
}
