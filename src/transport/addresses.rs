//! Where members were last reached: the `peers` file, and hints in memory.
//!
//! Good connections and announcements in → candidates to dial, newest first. The file is a hint: it is written only when
//! the set of good addresses changes, and a damaged one counts as empty. TLS decides who answers at an address.
//!
//! Invariant: confirming what is known writes nothing (`the_same_addresses_write_nothing`).

use crate::model::{Gather, Order};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_channel::Receiver;
use tracing::warn;

use super::executor::lock;
use super::identity::write_durably;
use super::ids::NodeId;
use super::table::Shared;

const FILE: &str = "peers";
const ADDRESSES_A_NODE_MAX: usize = 4;
/// Several peers that come at once are one write.
const GATHER: Duration = Duration::from_secs(1);

/// Good addresses (on disk) and hints (announced, unproved, in memory only).
#[derive(Debug, Default)]
pub struct AddressBook {
    folder: PathBuf,
    good: BTreeMap<NodeId, Vec<SocketAddr>>,
    hints: BTreeMap<NodeId, Vec<SocketAddr>>,
    /// The text on disk.
    written: String,
}

fn put_first(addresses: &mut Vec<SocketAddr>, address: SocketAddr) {
    addresses.retain(|known| *known != address);
    addresses.insert(0, address);
    addresses.truncate(ADDRESSES_A_NODE_MAX);
}

fn parse_line(line: &str) -> Option<(NodeId, Vec<SocketAddr>)> {
    let mut words = line.split_whitespace();
    let node = NodeId(words.next()?.strip_prefix('n')?.parse().ok()?);
    let addresses: Vec<SocketAddr> = words.map_while(|word| word.parse().ok()).collect();
    (!addresses.is_empty()).then_some((node, addresses))
}

impl AddressBook {
    pub fn load(data_dir: &Path) -> AddressBook {
        let path = data_dir.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    warn!(path = %path.display(), error = %error, "peers file unreadable, starting without");
                }
                String::new()
            }
        };
        let good = text.lines().filter_map(parse_line).gather();
        let mut book = AddressBook { folder: data_dir.into(), good, ..AddressBook::default() };
        book.written = book.to_text();
        book
    }

    /// A peer was reached there. Whether the file must be written.
    pub fn confirm(&mut self, node: NodeId, address: SocketAddr) -> bool {
        if let Some(hints) = self.hints.get_mut(&node) {
            hints.retain(|hint| *hint != address);
        }
        let good = self.good.entry(node).or_default();
        let is_new = !good.contains(&address);
        put_first(good, address);
        is_new
    }

    /// A peer may be there. Whether that is news.
    pub fn hint(&mut self, node: NodeId, address: SocketAddr) -> bool {
        let hints = self.hints.entry(node).or_default();
        let is_new = !hints.contains(&address) && self.good.get(&node).is_none_or(|good| good[0] != address);
        put_first(hints, address);
        is_new
    }

    /// Somebody else answers there.
    pub fn forget(&mut self, node: NodeId, address: SocketAddr) {
        if let Some(hints) = self.hints.get_mut(&node) {
            hints.retain(|hint| *hint != address);
        }
        if let Some(good) = self.good.get_mut(&node).filter(|good| good.len() > 1) {
            good.retain(|known| *known != address);
        }
    }

    /// Hints first: they are newer than the last connection.
    pub fn candidates(&self, node: NodeId) -> Vec<SocketAddr> {
        let hints = self.hints.get(&node).into_iter().flatten();
        let mut candidates: Vec<SocketAddr> = Vec::new();
        for address in hints.chain(self.good.get(&node).into_iter().flatten()) {
            if !candidates.contains(address) {
                candidates.push(*address);
            }
        }
        candidates
    }

    /// The file's text: sorted, so that the order in which addresses were used changes nothing.
    fn to_text(&self) -> String {
        let mut text = String::new();
        for (node, addresses) in &self.good {
            let mut addresses = addresses.clone();
            addresses.order();
            let words: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
            text.push_str(&format!("{node} {}\n", words.join(" ")));
        }
        text
    }

    /// It is no member any more.
    pub fn remove(&mut self, node: NodeId) {
        self.good.remove(&node);
        self.hints.remove(&node);
    }
}

/// Writes the file some time after a change.
pub(super) async fn write_changes(shared: Arc<Shared>, changed: Receiver<()>) {
    while changed.recv().await.is_ok() {
        async_io::Timer::after(GATHER).await;
        write_now(&shared).await;
    }
}

/// Writes the file if it is not what is known, off the executor: a card may take seconds to fsync.
pub(super) async fn write_now(shared: &Shared) {
    let (folder, text) = {
        let book = lock(&shared.book);
        (book.folder.clone(), book.to_text())
    };
    if text == lock(&shared.book).written {
        return;
    }
    let bytes = text.clone().into_bytes();
    match crate::tasks::unblock(move || write_durably(&folder, FILE, &bytes)).await {
        Ok(()) => lock(&shared.book).written = text,
        Err(error) => warn!(error = %error, "peers file not written"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::tests::Folder;

    fn address(last: u8) -> SocketAddr {
        ([10, 0, 0, last], 7400).into()
    }

    #[test]
    fn the_same_addresses_write_nothing() {
        let folder = Folder::create();
        let mut book = AddressBook::load(folder.path());
        assert!(book.confirm(NodeId(1), address(1)));
        assert!(book.confirm(NodeId(1), address(2)));
        let text = book.to_text();
        assert!(!book.confirm(NodeId(1), address(1)));
        assert_eq!(book.to_text(), text);
        assert_eq!(book.candidates(NodeId(1)), [address(1), address(2)]);
        write_durably(folder.path(), FILE, text.as_bytes()).unwrap();
        assert_eq!(AddressBook::load(folder.path()).candidates(NodeId(1)), [address(1), address(2)]);
    }

    #[test]
    fn a_hint_is_tried_first_and_never_written() {
        let mut book = AddressBook::default();
        book.confirm(NodeId(1), address(1));
        let text = book.to_text();
        assert!(!book.hint(NodeId(1), address(1)), "that one is known");
        assert!(book.hint(NodeId(1), address(2)));
        assert!(!book.hint(NodeId(1), address(2)));
        assert_eq!(book.candidates(NodeId(1))[0], address(2));
        for last in 3..100 {
            book.hint(NodeId(1), address(last));
        }
        assert!(book.candidates(NodeId(1)).len() <= 2 * ADDRESSES_A_NODE_MAX);
        assert_eq!(book.to_text(), text);
        book.forget(NodeId(1), address(1));
        assert!(book.candidates(NodeId(1)).contains(&address(1)), "the last good one is never forgotten");
    }

    #[test]
    fn a_damaged_file_counts_as_empty() {
        let folder = Folder::create();
        for content in
            ["\u{0}\u{1}", "n1", "n1 nowhere", "x1 10.0.0.1:7400", "n99999999999999999999 10.0.0.1:1"]
        {
            std::fs::write(folder.path().join(FILE), content).unwrap();
            assert!(AddressBook::load(folder.path()).good.is_empty(), "{content}");
        }
    }
}
