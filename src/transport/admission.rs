//! Who may be a peer: the rules of protocol 6 as plain functions over a table.
//!
//! Table + claim + now → let in or a refusal with its sentence. Pure: time is passed in, nothing is remembered but what
//! the node layer writes into the table. The transport adds one rule that needs its live connections: a second live
//! start of one node.
//!
//! Invariant: each rule refuses exactly its case (`each_rule_refuses_its_case`).

use std::collections::{BTreeMap, BTreeSet};

use super::hello::{PROTOCOL, PeerClaim, Refusal, RefusalCode};
use super::ids::{NodeId, PublicKey, StartId, StoreId};

/// A changed fingerprint is let in once no other start of the node was live for this long.
pub const MOVED_CARD_QUIET_MS: u64 = 30_000;

/// What this node knows of a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub public_key: PublicKey,
    pub store_id: StoreId,
    /// Of the board on which it was last live.
    pub fingerprint: Option<u64>,
    /// The highest log index that this node saw it acknowledge.
    pub acknowledged_index: u64,
    /// The start heard last and when, monotonic milliseconds.
    pub last_live: Option<(StartId, u64)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdmissionTable {
    /// The cluster's; a peer below it can't read what we send.
    pub feature_level: u32,
    pub members: BTreeMap<NodeId, Known>,
    pub removed: BTreeSet<PublicKey>,
}

/// A current member's key, or, if the table lacks the node, any key of this CA that is not removed.
pub fn admit(table: &AdmissionTable, claim: &PeerClaim, now_ms: u64) -> Result<(), Refusal> {
    let hello = &claim.hello;
    let node = hello.node_id;
    if table.removed.contains(&claim.public_key) {
        return Err(Refusal::new(
            RefusalCode::Removed,
            format!(
                "{node} was removed from this cluster; wipe its data directory and join it as a new node"
            ),
        ));
    }
    if hello.feature_level < table.feature_level {
        return Err(Refusal::new(
            RefusalCode::FeatureLevel,
            format!(
                "{node} has feature level {}, the cluster has {}; install a newer tinydc on it",
                hello.feature_level, table.feature_level
            ),
        ));
    }
    let Some(known) = table.members.get(&node) else {
        return match table.members.iter().find(|(_, known)| known.public_key == claim.public_key) {
            Some((owner, _)) => Err(Refusal::new(
                RefusalCode::WrongNode,
                format!("it says it is {node}, but its key is {owner}'s"),
            )),
            None => Ok(()),
        };
    };
    if known.public_key != claim.public_key {
        return Err(Refusal::new(RefusalCode::UnknownKey, format!("{node} has another key in this cluster")));
    }
    if known.store_id != hello.store_id {
        return Err(Refusal::new(
            RefusalCode::WrongStore,
            format!("{node}'s data directory is not the one it joined with; join it as a new node"),
        ));
    }
    if hello.last_index < known.acknowledged_index {
        return Err(Refusal::new(
            RefusalCode::OldBackup,
            format!(
                "{node} comes with log index {}, but had acknowledged {}: an old backup of its card; \
                 join it as a new node",
                hello.last_index, known.acknowledged_index
            ),
        ));
    }
    admit_board(known, claim, now_ms)
}

fn admit_board(known: &Known, claim: &PeerClaim, now_ms: u64) -> Result<(), Refusal> {
    let is_other_board = known.fingerprint.is_some_and(|fingerprint| fingerprint != claim.hello.fingerprint);
    let Some((start, heard_ms)) = known.last_live else { return Ok(()) };
    let quiet_ms = now_ms.saturating_sub(heard_ms);
    if is_other_board && start != claim.hello.start_id && quiet_ms < MOVED_CARD_QUIET_MS {
        let wait_s = (MOVED_CARD_QUIET_MS - quiet_ms).div_ceil(1000);
        return Err(Refusal::new(
            RefusalCode::MovedCard,
            format!(
                "{} comes on another board while it was live {} s ago; if its card was moved, \
                 it is let in after {wait_s} s of silence",
                claim.hello.node_id,
                quiet_ms / 1000
            ),
        ));
    }
    Ok(())
}

/// Rules that need no table: the wire form and the greeting itself.
pub(super) fn check_protocol(claim: &PeerClaim) -> Result<(), Refusal> {
    if claim.hello.protocol != PROTOCOL {
        return Err(Refusal::new(
            RefusalCode::WrongProtocol,
            format!("it speaks protocol {}, this node {PROTOCOL}", claim.hello.protocol),
        ));
    }
    Ok(())
}

/// The sentence for a second live start of one node.
pub(super) fn cloned(claim: &PeerClaim, live_at: std::net::SocketAddr) -> Refusal {
    Refusal::new(
        RefusalCode::ClonedIdentity,
        format!(
            "{} is live already at {live_at}: this is a copy of its card; wipe it and join it as a new node",
            claim.hello.node_id
        ),
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::transport::hello::Hello;

    pub fn claim() -> PeerClaim {
        PeerClaim {
            public_key: PublicKey([3; 32]),
            address: ([127, 0, 0, 1], 7400).into(),
            hello: Hello {
                protocol: PROTOCOL,
                feature_level: 1,
                node_id: NodeId(3),
                store_id: StoreId(33),
                start_id: StartId(1),
                fingerprint: 77,
                term: 2,
                last_index: 100,
                listen_port: 7400,
            },
        }
    }

    fn table() -> AdmissionTable {
        let known = Known {
            public_key: PublicKey([3; 32]),
            store_id: StoreId(33),
            fingerprint: Some(77),
            acknowledged_index: 100,
            last_live: Some((StartId(1), 1_000)),
        };
        AdmissionTable {
            feature_level: 1,
            members: BTreeMap::from([(NodeId(3), known)]),
            removed: BTreeSet::from([PublicKey([9; 32])]),
        }
    }

    #[test]
    fn each_rule_refuses_its_case() {
        type Change = fn(&mut PeerClaim);
        let cases: [(Change, Option<RefusalCode>); 11] = [
            (|_| {}, None),
            (|claim| claim.hello.start_id = StartId(2), None),
            (|claim| claim.public_key = PublicKey([9; 32]), Some(RefusalCode::Removed)),
            (|claim| claim.public_key = PublicKey([4; 32]), Some(RefusalCode::UnknownKey)),
            (|claim| claim.hello.node_id = NodeId(8), Some(RefusalCode::WrongNode)),
            (|claim| claim.hello.store_id = StoreId(34), Some(RefusalCode::WrongStore)),
            (|claim| claim.hello.last_index = 99, Some(RefusalCode::OldBackup)),
            (|claim| claim.hello.last_index = 101, None),
            (|claim| claim.hello.feature_level = 0, Some(RefusalCode::FeatureLevel)),
            (
                |claim| (claim.hello.fingerprint, claim.hello.start_id) = (78, StartId(2)),
                Some(RefusalCode::MovedCard),
            ),
            // A node that the table lacks yet: the certificate is enough.
            (|claim| (claim.hello.node_id, claim.public_key) = (NodeId(8), PublicKey([8; 32])), None),
        ];
        for (index, (change, refusal)) in cases.into_iter().enumerate() {
            let mut claim = claim();
            change(&mut claim);
            let code = admit(&table(), &claim, 2_000).err().map(|refusal| refusal.code);
            assert_eq!(code, refusal, "case {index}");
        }
    }

    #[test]
    fn a_moved_card_is_let_in_after_thirty_quiet_seconds() {
        let mut claim = claim();
        (claim.hello.fingerprint, claim.hello.start_id) = (78, StartId(2));
        let refusal = admit(&table(), &claim, 30_999).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::MovedCard);
        assert_eq!(admit(&table(), &claim, 31_000), Ok(()));
        let mut never_heard = table();
        never_heard.members.get_mut(&NodeId(3)).unwrap().last_live = None;
        assert_eq!(admit(&never_heard, &claim, 0), Ok(()));
    }
}
