//! One question to a name server: what a container would get.

use async_io::{Async, Timer};
use simple_dns::rdata::RData;
use simple_dns::{CLASS, Name, Packet, QCLASS, QTYPE, Question, TYPE};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(2);
const ANSWER_BYTES_MAX: usize = 1500;

/// The first address of a name; `None` if the server knows none.
pub async fn address_of(server: SocketAddr, name: &str) -> io::Result<Option<Ipv4Addr>> {
    let other = |error: simple_dns::SimpleDnsError| io::Error::other(error.to_string());
    let id = 0x7464;
    let mut packet = Packet::new_query(id);
    packet.set_flags(simple_dns::PacketFlag::RECURSION_DESIRED);
    let asked = Name::new(name).map_err(other)?;
    packet.questions.push(Question::new(asked, QTYPE::TYPE(TYPE::A), QCLASS::CLASS(CLASS::IN), false));
    let socket = Async::<UdpSocket>::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.get_ref().connect(server)?;
    socket.send(&packet.build_bytes_vec().map_err(other)?).await?;
    let mut buffer = [0; ANSWER_BYTES_MAX];
    let length = futures_lite::future::or(socket.recv(&mut buffer), async {
        Timer::after(LIMIT).await;
        Err(io::Error::from(io::ErrorKind::TimedOut))
    })
    .await?;
    let answer = Packet::parse(&buffer[..length]).map_err(other)?;
    if answer.id() != id {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    Ok(answer.answers.iter().find_map(|record| match &record.rdata {
        RData::A(address) => Some(Ipv4Addr::from(address.address)),
        _ => None,
    }))
}
