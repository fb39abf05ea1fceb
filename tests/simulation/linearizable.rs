//! Per-key linearizability of a register: the search of Wing and Gong with Lowe's memory of visited states.

use std::collections::HashSet;

#[derive(Clone, Debug)]
pub struct Operation {
    pub called_at: u64,
    /// `u64::MAX` while the outcome is unknown.
    pub returned_at: u64,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    Write(u64),
    /// What was read; 0 for nothing yet. `None` when the read failed.
    Read(Option<u64>),
}

/// Steps after which a history is left undecided rather than searched on.
const STEPS_MAX: usize = 2_000_000;

/// `None` when the search was given up.
pub fn is_linearizable(history: &[Operation]) -> Option<bool> {
    let seen: HashSet<u64> = history
        .iter()
        .filter_map(|operation| match operation.kind {
            Kind::Read(value) => value,
            Kind::Write(_) => None,
        })
        .collect();
    // A failed read says nothing; an unknown write that nobody saw may as well not have happened.
    let operations: Vec<&Operation> = history
        .iter()
        .filter(|operation| match operation.kind {
            Kind::Read(value) => value.is_some(),
            Kind::Write(value) => operation.returned_at != u64::MAX || seen.contains(&value),
        })
        .collect();
    let count = operations.len();
    let mut visited: HashSet<(Vec<u64>, u64)> = HashSet::new();
    let mut stack = vec![(vec![0u64; count.div_ceil(64)], 0u64, 0usize)];
    let mut steps = 0;
    while let Some((done, value, number)) = stack.pop() {
        if number == count {
            return Some(true);
        }
        steps += 1;
        if steps > STEPS_MAX {
            return None;
        }
        if !visited.insert((done.clone(), value)) {
            continue;
        }
        let is_done = |position: usize| done[position / 64] >> (position % 64) & 1 == 1;
        let open: Vec<usize> = (0..count).filter(|position| !is_done(*position)).collect();
        let earliest_return =
            open.iter().map(|position| operations[*position].returned_at).min().unwrap_or(u64::MAX);
        for position in open {
            let operation = operations[position];
            if operation.called_at > earliest_return {
                continue;
            }
            let next = match operation.kind {
                Kind::Write(written) => written,
                Kind::Read(Some(read)) if read == value => value,
                Kind::Read(_) => continue,
            };
            let mut done = done.clone();
            done[position / 64] |= 1 << (position % 64);
            stack.push((done, next, number + 1));
        }
    }
    Some(false)
}

#[test]
fn a_stale_read_is_not_linearizable() {
    let write =
        |called_at, returned_at, value| Operation { called_at, returned_at, kind: Kind::Write(value) };
    let read =
        |called_at, returned_at, value| Operation { called_at, returned_at, kind: Kind::Read(Some(value)) };
    assert_eq!(is_linearizable(&[write(0, 10, 1), read(20, 30, 1)]), Some(true));
    assert_eq!(is_linearizable(&[write(0, 10, 1), read(20, 30, 0)]), Some(false));
    assert_eq!(is_linearizable(&[write(0, 50, 1), read(20, 30, 0), read(31, 40, 1)]), Some(true));
    assert_eq!(is_linearizable(&[write(0, 50, 1), read(20, 30, 1), read(31, 40, 0)]), Some(false));
}
