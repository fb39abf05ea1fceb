//! Ends the TCP connections of clients on this node, by `SOCK_DESTROY`: also one that only waits is told at once.
//!
//! Sockets are those of the thread's namespace: the node's own, or a container's. They are listed first and then named
//! by their cookie: the kernel, asked to end a connection that it doesn't find, takes whatever listens on the client's port.
//!
//! Invariant: nothing is ended but a connection that was asked for (`what_listens_on_a_clients_port_is_left_alone`).

use super::conntrack::Conversation;
use super::netlink::{ACK, Batch, DUMP, Socket};
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const LIST: u16 = 20;
const DESTROY: u16 = 21;
const TCP: u8 = libc::IPPROTO_TCP as u8;
/// ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2 and CLOSE_WAIT: those in which somebody may wait.
const WAITING_STATES: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8;
/// struct inet_diag_sockid: ports, addresses of 16 bytes, interface, cookie.
const ID_BYTES: usize = 48;
type SocketId = [u8; ID_BYTES];

/// Resets those of these connections whose clients are in this namespace. One that can't be reset keeps no other from
/// it; the first error is told.
pub fn reset(conversations: &BTreeSet<Conversation>) -> io::Result<()> {
    let socket = Socket::diagnosis()?;
    let mut outcome = Ok(());
    // A socket for both families holds IPv4 addresses as IPv6 ones.
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        let mut batch = Batch::new();
        batch.message(LIST, DUMP, &request(family, &[0; ID_BYTES]));
        let mut found = Vec::new();
        let listed = socket.dump(&batch, &mut |body| {
            let id = body.get(4..4 + ID_BYTES).and_then(|id| SocketId::try_from(id).ok());
            found.extend(
                id.filter(|id| conversation(family, id).is_some_and(|it| conversations.contains(&it))),
            );
        });
        outcome = outcome.and(listed);
        for id in found {
            let mut batch = Batch::new();
            batch.message(DESTROY, ACK, &request(family, &id));
            match socket.send(&batch) {
                // It has ended meanwhile.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => {}
                ended => outcome = outcome.and(ended),
            }
        }
    }
    outcome
}

/// struct inet_diag_req_v2.
fn request(family: u8, id: &SocketId) -> Vec<u8> {
    let mut bytes = vec![family, TCP, 0, 0];
    bytes.extend(WAITING_STATES.to_ne_bytes());
    bytes.extend(id);
    bytes
}

/// Whose socket it is and whom it has asked.
fn conversation(family: u8, id: &SocketId) -> Option<Conversation> {
    let port = |at: usize| Some(u16::from_be_bytes(id.get(at..at + 2)?.try_into().ok()?));
    let address = |at: usize| -> Option<IpAddr> {
        let bytes: [u8; 16] = id.get(at..at + 16)?.try_into().ok()?;
        match family == libc::AF_INET6 as u8 {
            true => Some(Ipv6Addr::from(bytes).to_canonical()),
            false => Some(Ipv4Addr::from(<[u8; 4]>::try_from(&bytes[..4]).ok()?).into()),
        }
    };
    Some(Conversation {
        client: SocketAddr::new(address(4)?, port(0)?),
        asked: SocketAddr::new(address(20)?, port(2)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::time::Duration;

    fn canonical(address: SocketAddr) -> SocketAddr {
        SocketAddr::new(address.ip().to_canonical(), address.port())
    }

    fn end(conversations: &[(SocketAddr, SocketAddr)]) {
        let all = conversations
            .iter()
            .map(|(client, asked)| Conversation { client: canonical(*client), asked: canonical(*asked) });
        reset(&all.collect()).expect("root, and a kernel with CONFIG_INET_DIAG_DESTROY");
    }

    fn ending(client: &mut TcpStream) -> std::io::ErrorKind {
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        client.read(&mut [0]).expect_err("nobody sends").kind()
    }

    #[test]
    fn a_client_that_only_waits_is_told_at_once_and_another_is_left_alone() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let at = listener.local_addr().unwrap();
        let [mut waits, mut stays] = [0; 2].map(|_| TcpStream::connect(at).unwrap());
        end(&[(waits.local_addr().unwrap(), at), (SocketAddr::from((Ipv4Addr::LOCALHOST, 1)), at)]);
        assert_eq!(ending(&mut waits), std::io::ErrorKind::ConnectionAborted);
        stays.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        assert_eq!(stays.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_client_whose_socket_is_for_both_families_is_told_too() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mapped =
            SocketAddr::from((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), listener.local_addr().unwrap().port()));
        let mut waits = TcpStream::connect(mapped).unwrap();
        end(&[(waits.local_addr().unwrap(), mapped)]);
        assert_eq!(ending(&mut waits), std::io::ErrorKind::ConnectionAborted);
    }

    #[test]
    fn what_listens_on_a_clients_port_is_left_alone() {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        // A client elsewhere whose port happens to be the listener's.
        let client = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 7), port));
        end(&[(client, SocketAddr::from((Ipv4Addr::new(192, 0, 2, 8), 80)))]);
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it still listens");
    }
}
