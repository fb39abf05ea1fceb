//! One table of the state: rows by key, shared between copies, with the changes since they were last taken.

use serde::{Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

/// One changed row, encoded with postcard; `body` is `None` for a removed one.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RowChange {
    pub kind: u8,
    pub key: Vec<u8>,
    pub body: Option<Vec<u8>>,
}

impl RowChange {
    pub fn bytes(&self) -> usize {
        1 + self.key.len() + self.body.as_ref().map_or(0, Vec::len)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RowError {
    #[error("no table has the number {0}; this state was written by a newer tinydc")]
    UnknownTable(u8),
    #[error("decode a row")]
    Decode(#[from] postcard::Error),
}

#[derive(Clone, Debug, PartialEq)]
struct Slot<V> {
    row: Arc<V>,
    bytes: u32,
}

#[derive(Clone, Debug)]
pub struct Table<K: Ord, V> {
    slots: Arc<BTreeMap<K, Slot<V>>>,
    bytes: usize,
    changes: BTreeMap<K, Option<Vec<u8>>>,
}

impl<K: Ord, V> Default for Table<K, V> {
    fn default() -> Self {
        Table { slots: Arc::default(), bytes: 0, changes: BTreeMap::new() }
    }
}

/// Equal rows; what has been taken of the changes does not count.
impl<K: Ord, V: PartialEq> PartialEq for Table<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.slots == other.slots
    }
}

impl<K, V> Table<K, V>
where
    K: Ord + Clone + Debug + Serialize + DeserializeOwned,
    V: Clone + PartialEq + Serialize + DeserializeOwned,
{
    pub fn find(&self, key: &K) -> Option<&V> {
        self.slots.get(key).map(|slot| slot.row.as_ref())
    }

    pub fn contains(&self, key: &K) -> bool {
        self.slots.contains_key(key)
    }

    pub fn rows(&self) -> impl DoubleEndedIterator<Item = &V> {
        self.slots.values().map(|slot| slot.row.as_ref())
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.slots.iter().map(|(key, slot)| (key, slot.row.as_ref()))
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Puts a row in place; an equal row is no change.
    pub fn put(&mut self, key: K, row: V) {
        if self.find(&key) == Some(&row) {
            return;
        }
        let body = encode(&row);
        self.insert(key.clone(), row, body.len());
        self.changes.insert(key, Some(body));
    }

    /// Changes a row in place; says whether there was one.
    pub fn update(&mut self, key: &K, change: impl FnOnce(&mut V)) -> bool {
        let Some(mut row) = self.find(key).cloned() else { return false };
        change(&mut row);
        self.put(key.clone(), row);
        true
    }

    pub fn remove(&mut self, key: &K) -> Option<V> {
        let slot = Arc::make_mut(&mut self.slots).remove(key)?;
        self.bytes -= slot.bytes as usize;
        self.changes.insert(key.clone(), None);
        Some(Arc::unwrap_or_clone(slot.row))
    }

    fn insert(&mut self, key: K, row: V, bytes: usize) {
        let slot = Slot { row: Arc::new(row), bytes: bytes as u32 };
        let before = Arc::make_mut(&mut self.slots).insert(key, slot);
        self.bytes = self.bytes + bytes - before.map_or(0, |slot| slot.bytes as usize);
    }

    pub(super) fn take_changes(&mut self, kind: u8, into: &mut Vec<RowChange>) {
        for (key, body) in std::mem::take(&mut self.changes) {
            into.push(RowChange { kind, key: encode(&key), body });
        }
    }

    pub(super) fn load(&mut self, key: &[u8], body: &[u8]) -> Result<(), RowError> {
        let (key, row) = (postcard::from_bytes(key)?, postcard::from_bytes(body)?);
        self.insert(key, row, body.len());
        Ok(())
    }

    pub(super) fn for_each(&self, kind: u8, visit: &mut dyn FnMut(u8, &[u8], &[u8])) {
        for (key, slot) in self.slots.iter() {
            visit(kind, &encode(key), &encode(slot.row.as_ref()));
        }
    }
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_allocvec(value).expect("plain data in memory always encodes")
}
