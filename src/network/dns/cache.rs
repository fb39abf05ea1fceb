//! Answers of upstreams, for as long as they may be believed.
//!
//! Bounded by entries and bytes; the least recently used goes first. The clock is an argument. Kept in memory only.

use super::wire::{self, Section, kind};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

const ENTRIES_MAX: usize = 1024;
/// Messages and keys, with what the maps need for each.
const BYTES_MAX: usize = 256 << 10;
const ENTRY_OVERHEAD_BYTES: usize = 160;
/// A site that renames its servers shall not wait for a day.
const POSITIVE_SECONDS_MAX: u32 = 3600;
const NEGATIVE_SECONDS_MAX: u32 = 300;

/// The question in lower case, with the flags that change its answer.
pub type Key = Arc<[u8]>;

#[derive(Debug)]
struct Entry {
    message: Arc<[u8]>,
    stored: Instant,
    expires: Instant,
    used: u64,
}

#[derive(Debug, Default)]
pub struct Cache {
    entries: HashMap<Key, Entry>,
    by_use: BTreeMap<u64, Key>,
    uses: u64,
    bytes: usize,
}

fn cost(key: &Key, message: &[u8]) -> usize {
    2 * key.len() + message.len() + ENTRY_OVERHEAD_BYTES
}

impl Cache {
    /// The message and its age in seconds.
    pub fn find(&mut self, key: &Key, now: Instant) -> Option<(Arc<[u8]>, u32)> {
        let entry = self.entries.get_mut(key)?;
        if entry.expires <= now {
            self.remove(key);
            return None;
        }
        self.uses += 1;
        self.by_use.remove(&entry.used);
        entry.used = self.uses;
        self.by_use.insert(self.uses, key.clone());
        let age = now.saturating_duration_since(entry.stored).as_secs();
        Some((entry.message.clone(), u32::try_from(age).unwrap_or(u32::MAX)))
    }

    pub fn store(&mut self, key: Key, message: Arc<[u8]>, now: Instant) {
        let Some(seconds) = lifetime(&message).filter(|seconds| *seconds > 0) else { return };
        let cost = cost(&key, &message);
        if cost > BYTES_MAX / 4 {
            return;
        }
        self.remove(&key);
        while self.entries.len() >= ENTRIES_MAX || self.bytes + cost > BYTES_MAX {
            let Some((_, oldest)) = self.by_use.pop_first() else { return };
            self.remove(&oldest);
        }
        self.uses += 1;
        self.bytes += cost;
        self.by_use.insert(self.uses, key.clone());
        let expires = now + Duration::from_secs(seconds.into());
        self.entries.insert(key, Entry { message, stored: now, expires, used: self.uses });
    }

    fn remove(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            self.by_use.remove(&entry.used);
            self.bytes -= cost(key, &entry.message);
        }
    }

    pub fn clear(&mut self) {
        *self = Cache::default();
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// How many seconds a message may be believed. `None`: not at all (RFC 2308 5 for negative ones).
fn lifetime(message: &[u8]) -> Option<u32> {
    let is_failure = !matches!(wire::code_of(message), 0 | 3);
    let is_cut = wire::number_at(message, 2)? & wire::FLAG_TRUNCATED != 0;
    if is_failure || is_cut {
        return None;
    }
    let records = wire::records(message, wire::question_length(message)?)?;
    let answers = records.iter().filter(|record| record.section == Section::Answer);
    let is_positive = wire::code_of(message) == 0 && answers.clone().count() > 0;
    if is_positive {
        return answers.map(|record| record.ttl).min().map(|ttl| ttl.min(POSITIVE_SECONDS_MAX));
    }
    let is_soa = |record: &&wire::Record| record.kind == kind::SOA && record.section == Section::Authority;
    let soa = records.iter().find(is_soa)?;
    // What an alias says on the way to a name that doesn't exist bounds it too.
    let shortest = records.iter().map(|record| record.ttl).min()?;
    Some(shortest.min(wire::soa_minimum(message, soa)?).min(NEGATIVE_SECONDS_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use simple_dns::rdata::{A, RData, SOA};
    use simple_dns::{CLASS, Name, Packet, Question, RCODE, ResourceRecord, TYPE};

    fn key(number: usize) -> Key {
        Arc::from(number.to_be_bytes().as_slice())
    }

    fn message(ttl: Option<u32>, soa_minimum: Option<u32>) -> Arc<[u8]> {
        let name = Name::new_unchecked("a.example");
        let mut packet = Packet::new_reply(1);
        packet.questions.push(Question::new(name.clone(), TYPE::A.into(), CLASS::IN.into(), false));
        if let Some(ttl) = ttl {
            let data = RData::A(A { address: 1 });
            packet.answers.push(ResourceRecord::new(name.clone(), CLASS::IN, ttl, data));
        } else {
            *packet.rcode_mut() = RCODE::NameError;
        }
        if let Some(minimum) = soa_minimum {
            let soa = SOA {
                mname: name.clone(),
                rname: name.clone(),
                serial: 1,
                refresh: 1,
                retry: 1,
                expire: 1,
                minimum,
            };
            packet.name_servers.push(ResourceRecord::new(name, CLASS::IN, 7200, RData::SOA(soa)));
        }
        Arc::from(packet.build_bytes_vec_compressed().unwrap())
    }

    #[test]
    fn an_answer_is_believed_as_long_as_it_says_and_no_longer() {
        for (message, wanted) in [
            (message(Some(30), None), Some(30)),
            (message(Some(86_400), None), Some(POSITIVE_SECONDS_MAX)),
            (message(None, Some(20)), Some(20)),
            (message(None, Some(5000)), Some(NEGATIVE_SECONDS_MAX)),
            (message(None, None), None),
        ] {
            assert_eq!(lifetime(&message), wanted);
        }
        let (mut cache, start) = (Cache::default(), Instant::now());
        cache.store(key(1), message(Some(30), None), start);
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(cache.find(&key(1), after(29)).map(|(_, age)| age), Some(29));
        assert!(cache.find(&key(1), after(30)).is_none());
        assert_eq!((cache.len(), cache.bytes(), cache.by_use.len()), (0, 0, 0));
    }

    #[test]
    fn the_cache_is_bounded_and_keeps_what_is_used() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        for number in 0..5000 {
            cache.store(key(number), message(Some(60), None), now);
            assert!(cache.find(&key(0), now).is_some(), "after {number}");
        }
        assert!(cache.len() <= ENTRIES_MAX && cache.bytes() <= BYTES_MAX);
        assert_eq!(cache.by_use.len(), cache.len());
        assert!(cache.find(&key(4999), now).is_some());
        assert!(cache.find(&key(1), now).is_none());
    }
}
