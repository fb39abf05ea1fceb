//! Network namespaces, kept alive by a bind mount at a path.
//!
//! Joining a namespace changes the calling thread, so everything here happens on a thread that ends with the call.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// Makes a network namespace and binds it to `path`, whose parent must exist. Fails if something is mounted there.
pub fn create(path: &Path) -> io::Result<()> {
    fs::OpenOptions::new().write(true).create_new(true).open(path)?;
    let result = on_own_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        // `/proc/thread-self` names the new namespace of this thread, not that of the process.
        mount(Some("/proc/thread-self/ns/net"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(())
    });
    if result.is_err() {
        let _ = fs::remove_file(path);
    }
    result
}

/// Unbinds and removes `path`. The namespace ends with its last process. A missing one is fine.
pub fn remove(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL) | Err(nix::errno::Errno::ENOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Runs `work` inside the network namespace at `path`, on a thread of its own.
pub fn in_netns<T: Send>(path: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = fs::File::open(path)?;
    on_own_thread(move || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let handle = thread::Builder::new().name("netns".into()).spawn_scoped(scope, work)?;
        handle.join().unwrap_or_else(|_| Err(io::Error::other("the namespace thread panicked")))
    })
}
