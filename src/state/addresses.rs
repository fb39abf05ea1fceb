//! Floating addresses of the cluster on the LAN: which there are, and which node holds each.

use super::State;
use super::apply::not_found;
use super::command::{Outcome, Rejection, Reply};
use super::rows::FloatingAddress;
use crate::model::NodeId;
use crate::model::limits::ADDRESSES_MAX;
use std::net::Ipv4Addr;

pub fn add(state: &mut State, address: Ipv4Addr) -> Outcome {
    if state.addresses.contains(&address) {
        return Ok(Reply::Done);
    }
    if let Some(why) = unfit(state, address) {
        return Err(Rejection::Invalid(format!("{address} {why}")));
    }
    if state.addresses.len() >= ADDRESSES_MAX {
        return Err(Rejection::NotAllowed(format!("the cluster has {ADDRESSES_MAX} addresses, no more")));
    }
    let since = state.time();
    state.addresses.put(address, FloatingAddress { address, holder: None, epoch: 0, since });
    state.note("address_added", address.to_string(), format!("{address} is the cluster's"));
    Ok(Reply::Done)
}

/// Why an address can't float on a LAN.
fn unfit(state: &State, address: Ipv4Addr) -> Option<&'static str> {
    let in_range = |range: Ipv4Addr| address.octets()[..2] == range.octets()[..2];
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() || address.is_broadcast() {
        return Some("is no address of a machine");
    }
    if address.is_link_local() {
        return Some("is link-local");
    }
    let cluster = state.cluster()?;
    (in_range(cluster.container_range) || in_range(cluster.vip_range))
        .then_some("lies in the cluster's own ranges")
}

pub fn remove(state: &mut State, address: Ipv4Addr) -> Outcome {
    state.addresses.remove(&address).ok_or_else(|| not_found("address", address))?;
    state.note("address_removed", address.to_string(), format!("{address} is no longer the cluster's"));
    Ok(Reply::Done)
}

/// Void when the address has moved meanwhile.
pub fn assign(state: &mut State, address: Ipv4Addr, epoch: u64, to: NodeId) -> Outcome {
    state.existing_node(to)?;
    let row = state.addresses.find(&address).ok_or_else(|| not_found("address", address))?;
    if row.epoch != epoch {
        return Err(Rejection::Stale);
    }
    if row.holder == Some(to) {
        return Ok(Reply::Done);
    }
    let since = state.time();
    state.addresses.update(&address, |row| {
        row.holder = Some(to);
        row.epoch += 1;
        row.since = since;
    });
    let name = state.node_name(to);
    state.note("address_moved", address.to_string(), format!("{address} is on {name}"));
    Ok(Reply::Done)
}
