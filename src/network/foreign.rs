//! What others have set on this machine that keeps traffic from containers: named, with the line that cures it.

use super::lan;
use super::netlink::{Batch, DUMP, Socket, attributes};
use super::nft::Family;
use super::nft::table::TABLE;
use crate::model::UlaPrefix;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

const SUBSYSTEM: u16 = 10 << 8;
const GET_CHAIN: u16 = SUBSYSTEM | 4;
const FORWARD_HOOK: u32 = 2;
const DROP: u32 = 0;
const FAMILY_INET: u8 = 1;
const FAMILY_IPV4: u8 = 2;
const FAMILY_IPV6: u8 = 10;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    pub text: String,
    pub remedy: String,
}

/// A chain of others at the forward hook.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ForwardChain {
    family: u8,
    table: String,
    name: String,
    /// Drops what no rule of it takes.
    is_dropping: bool,
}

/// Whether somebody else filters what this machine forwards of a family, and so means it to forward.
pub fn is_forwarding_used(family: Family) -> bool {
    // The tables of the old iptables, which netlink doesn't list.
    let (file, own) = match family {
        Family::Ipv4 => ("/proc/net/ip_tables_names", FAMILY_IPV4),
        Family::Ipv6(_) => ("/proc/net/ip6_tables_names", FAMILY_IPV6),
    };
    let old = std::fs::read_to_string(file).unwrap_or_default();
    let is_meant = |chain: &ForwardChain| [FAMILY_INET, own].contains(&chain.family);
    !old.is_empty() || forward_chains().is_ok_and(|chains| chains.iter().any(is_meant))
}

/// `ula_prefix`: where the cluster has IPv6, too.
pub fn obstacles(
    container_range: Ipv4Addr,
    vip_range: Ipv4Addr,
    ula_prefix: Option<UlaPrefix>,
) -> Vec<Obstacle> {
    // Without netfilter there is nothing to be in the way.
    let chains = forward_chains().unwrap_or_default();
    let range = format!("{container_range}/16");
    let dropping = || chains.iter().filter(|chain| chain.is_dropping);
    let of_ipv4 = dropping().filter(|chain| chain.family != FAMILY_IPV6);
    let mut found: Vec<Obstacle> = of_ipv4.map(|chain| explain(chain, "ip", &range)).collect();
    if let Some(prefix) = ula_prefix.map(|prefix| prefix.to_string()) {
        let of_ipv6 = dropping().filter(|chain| chain.family != FAMILY_IPV4);
        found.extend(of_ipv6.map(|chain| explain(chain, "ip6", &prefix)));
    }
    let networks = lan::networks();
    for (range, what) in [(container_range, "containers"), (vip_range, "services")] {
        found.extend(networks.iter().filter(|one| one.overlaps(range)).map(|one| Obstacle {
            text: format!("the network {one} overlaps the range of {what}, {range}/16"),
            remedy: "give that network another range at the router; the cluster's ranges are fixed at `tinydc init`"
                .into(),
        }));
    }
    found
}

fn forward_chains() -> io::Result<Vec<ForwardChain>> {
    let socket = Socket::netfilter()?;
    let mut batch = Batch::new();
    batch.message(GET_CHAIN, DUMP, &[0, 0, 0, 0]);
    let mut found = Vec::new();
    socket.dump(&batch, &mut |body| {
        let Some((family, rest)) = body.first().zip(body.get(4..)) else { return };
        found.extend(forward_chain(*family, rest));
    })?;
    Ok(found)
}

fn forward_chain(family: u8, body: &[u8]) -> Option<ForwardChain> {
    let value = |wanted: u16| attributes(body).find(|(kind, _)| *kind == wanted).map(|(_, bytes)| bytes);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    let number = |bytes: &[u8]| Some(u32::from_be_bytes(bytes.try_into().ok()?));
    let hook = attributes(value(4)?).find(|(kind, _)| *kind == 1).and_then(|(_, bytes)| number(bytes))?;
    let is_dropping = number(value(5)?)? == DROP;
    let chain = ForwardChain { family, table: text(value(1)?), name: text(value(3)?), is_dropping };
    let is_others = matches!(family, FAMILY_INET | FAMILY_IPV4 | FAMILY_IPV6) && chain.table != TABLE;
    (hook == FORWARD_HOOK && is_others).then_some(chain)
}

/// What is forwarded from and to this range of that family.
fn explain(chain: &ForwardChain, protocol: &str, range: &str) -> Obstacle {
    let ForwardChain { family, table, name, .. } = chain;
    let whose = if Path::new("/run/docker.pid").exists() || Path::new("/var/run/docker.sock").exists() {
        " (Docker's)"
    } else if Path::new("/etc/ufw/ufw.conf").exists() {
        " (ufw's, most likely)"
    } else {
        ""
    };
    let is_iptables = *family != FAMILY_INET && table == "filter" && name == "FORWARD";
    let iptables = if *family == FAMILY_IPV6 { "ip6tables" } else { "iptables" };
    let remedy = match (is_iptables, whose) {
        (true, " (ufw's, most likely)") => {
            format!("ufw route allow from {range} && ufw route allow to {range}")
        }
        (true, _) => format!(
            "{iptables} -I FORWARD -s {range} -j ACCEPT && {iptables} -I FORWARD -d {range} -j ACCEPT"
        ),
        (false, _) => {
            let family = if *family == FAMILY_INET { "inet" } else { protocol };
            format!(
                "nft insert rule {family} {table} {name} {protocol} saddr {range} accept && nft insert rule {family} \
                 {table} {name} {protocol} daddr {range} accept"
            )
        }
    };
    let by = if protocol == "ip6" { " by IPv6" } else { "" };
    let text =
        format!("the chain {name} of the table {table}{whose} drops what is forwarded to containers{by}");
    Obstacle { text, remedy }
}
