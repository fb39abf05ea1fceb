//! Network interfaces whose packets a program reads and writes.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

pub const PATH: &str = "/dev/net/tun";
const SET_INTERFACE: libc::c_ulong = 0x4004_54ca;

/// Whether this process could make one.
pub fn probe() -> io::Result<()> {
    open().map(drop)
}

fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(PATH)
}

/// An interface of bare IP packets, gone when the descriptor is closed. Reads and writes don't wait.
pub fn create(name: &str) -> io::Result<OwnedFd> {
    let file = open()?;
    // SAFETY: all-zero is a valid ifreq; the name is shorter than its field, so that a zero ends it. The kernel reads
    // and writes `size_of` bytes of it, and it outlives the call.
    let outcome = unsafe {
        let mut request: libc::ifreq = mem::zeroed();
        if name.len() >= request.ifr_name.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *place = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
        libc::ioctl(file.as_raw_fd(), SET_INTERFACE as _, &raw mut request)
    };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}
