//! Packet sockets: whole Ethernet frames of one protocol on one interface.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// A socket that sends and receives frames of `protocol` (such as 0x0806) on the interface with this index; reads give
/// up after `timeout`.
pub fn open(protocol: u16, interface: u32, timeout: Duration) -> io::Result<OwnedFd> {
    let big_endian = protocol.to_be();
    // SAFETY: no memory is handed over; the descriptor is checked before it is owned, and nobody else has it.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(big_endian));
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: all-zero is a valid sockaddr_ll; the kernel reads `size_of` bytes of it, and it outlives the call.
    let bound = unsafe {
        let mut address: libc::sockaddr_ll = mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = big_endian;
        address.sll_ifindex = interface as i32;
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if bound != 0 {
        return Err(io::Error::last_os_error());
    }
    const IGNORE_OUTGOING: libc::c_int = 23;
    let yes: libc::c_int = 1;
    // SAFETY: the kernel reads `size_of` bytes of `yes`, which outlives the call. Kernels before 4.20 refuse, and then
    // what this machine sends is seen too.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            IGNORE_OUTGOING,
            (&raw const yes).cast(),
            mem::size_of::<libc::c_int>() as libc::socklen_t,
        );
    }
    use rustix::net::sockopt::{Timeout, set_socket_timeout};
    set_socket_timeout(&socket, Timeout::Recv, Some(timeout))?;
    Ok(socket)
}
