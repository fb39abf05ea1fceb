//! Ends the TCP connections of clients on this node, by `SOCK_DESTROY`: also one that only waits is told at once.
//!
//! A socket is looked up in the namespace of the thread: the node's own, or a container's.

use super::conntrack::Conversation;
use super::netlink::{ACK, Batch, Socket};
use std::io;

const DESTROY: u16 = 21;
const TCP: u8 = libc::IPPROTO_TCP as u8;
const ALL_STATES: u32 = u32::MAX;
const ANY_COOKIE: [u8; 8] = [0xff; 8];

/// Resets those of these connections whose clients are in this namespace. What can't be found is somewhere else, or
/// has ended.
pub fn reset(conversations: &[Conversation]) -> io::Result<()> {
    let socket = Socket::diagnosis()?;
    for conversation in conversations {
        // A socket that listens for both families holds IPv4 addresses as IPv6 ones.
        for is_mapped in [false, true] {
            let mut batch = Batch::new();
            batch.message(DESTROY, ACK, &request(conversation, is_mapped));
            match socket.send(&batch) {
                Ok(()) => break,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// struct inet_diag_req_v2.
fn request(conversation: &Conversation, is_mapped: bool) -> Vec<u8> {
    let family = if is_mapped { libc::AF_INET6 } else { libc::AF_INET };
    let mut bytes = vec![family as u8, TCP, 0, 0];
    bytes.extend(ALL_STATES.to_ne_bytes());
    bytes.extend(conversation.client.port().to_be_bytes());
    bytes.extend(conversation.asked.port().to_be_bytes());
    for address in [conversation.client.ip(), conversation.asked.ip()] {
        match is_mapped {
            true => bytes.extend(address.to_ipv6_mapped().octets()),
            false => {
                bytes.extend(address.octets());
                bytes.extend([0; 12]);
            }
        }
    }
    bytes.extend(0u32.to_ne_bytes());
    bytes.extend(ANY_COOKIE);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket;
    use std::io::Read;
    use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::time::Duration;

    fn v4(address: SocketAddr) -> SocketAddrV4 {
        match address {
            SocketAddr::V4(address) => address,
            SocketAddr::V6(_) => panic!("{address} is no IPv4 address"),
        }
    }

    #[test]
    fn a_client_that_only_waits_is_told_at_once_and_another_is_left_alone() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let at = listener.local_addr().unwrap();
        let [mut waits, mut stays] = [0; 2].map(|_| TcpStream::connect(at).unwrap());
        let conversation = Conversation { client: v4(waits.local_addr().unwrap()), asked: v4(at) };
        reset(&[
            conversation,
            Conversation { client: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1), ..conversation },
        ])
        .expect("root, and a kernel with CONFIG_INET_DIAG_DESTROY");
        waits.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let error = waits.read(&mut [0]).expect_err("it is reset");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted, "{error}");
        stays.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        assert_eq!(stays.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_client_that_is_still_connecting_is_told_too() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        // A queue of one: further clients get no answer.
        socket::listen(&listener, socket::Backlog::new(0).unwrap()).unwrap();
        let at = v4(listener.local_addr().unwrap());
        let _fills = TcpStream::connect(at).unwrap();
        let flags = socket::SockFlag::SOCK_NONBLOCK | socket::SockFlag::SOCK_CLOEXEC;
        let client =
            socket::socket(socket::AddressFamily::Inet, socket::SockType::Stream, flags, None).unwrap();
        let outcome = socket::connect(client.as_raw_fd(), &socket::SockaddrIn::from(at));
        assert_eq!(outcome, Err(nix::errno::Errno::EINPROGRESS));
        let client = TcpStream::from(client);
        reset(&[Conversation { client: v4(client.local_addr().unwrap()), asked: at }]).unwrap();
        let error = client.take_error().unwrap().expect("it is reset");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted, "{error}");
    }
}
