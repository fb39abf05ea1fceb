//! `LogStore` over SQLite.

use super::Reserve;
use crate::consensus::{Batch, ConfState, Entry, EntryType, HardState, LogStore, Stored};
use crate::state::RowChange;
use rusqlite::{Connection, OptionalExtension, Transaction, params};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Pages of 1 KiB that the write-ahead log holds before it is folded back: the file is grown once to this size, so
/// that a commit changes no file length and costs one flush.
const WAL_PAGES: u32 = 4000;
const SCHEMA_VERSION: i64 = 1;
/// The table number of raft's own row. The state's tables begin at 1: its row lies on the same page as the state's
/// clock and counters, which every command changes too.
const RAFT_KIND: u8 = 0;

const SCHEMA: &str = "
    CREATE TABLE log (idx INTEGER PRIMARY KEY, term INTEGER NOT NULL, kind INTEGER NOT NULL, data BLOB NOT NULL,
        context BLOB NOT NULL) STRICT;
    CREATE TABLE row (kind INTEGER NOT NULL, key BLOB NOT NULL, body BLOB NOT NULL,
        PRIMARY KEY (kind, key)) STRICT, WITHOUT ROWID;
";

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{step} in {path}")]
    Sqlite {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: rusqlite::Error,
    },
    #[error("{path} was written by a newer tinydc (schema {found}, this one knows {SCHEMA_VERSION})")]
    NewerSchema { path: PathBuf, found: i64 },
    #[error("{path} is damaged: the configuration can't be decoded; restore the node by joining it anew")]
    Damaged {
        path: PathBuf,
        #[source]
        source: postcard::Error,
    },
    #[error("{path} is damaged: entry {index} is of an unknown kind {kind}")]
    EntryKind { path: PathBuf, index: u64, kind: i64 },
}

/// What raft keeps beside its log, as it is on disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct RaftRow {
    term: u64,
    vote: u64,
    commit: u64,
    applied: u64,
    /// The entry before the first one kept: index and term.
    compacted: (u64, u64),
    /// Empty until a cluster is founded or joined.
    conf_state: ConfState,
}

pub struct SqliteStore {
    connection: Connection,
    raft: RaftRow,
    path: PathBuf,
    reserve: Option<Reserve>,
}

impl SqliteStore {
    /// Opens `<data_dir>/state.db`, making it when there is none.
    pub fn open(data_dir: &Path) -> Result<SqliteStore, StoreError> {
        let path = data_dir.join("state.db");
        let at = |step| {
            let path = path.clone();
            move |source| StoreError::Sqlite { step, path, source }
        };
        let connection = Connection::open(&path).map_err(at("open the database"))?;
        configure(&connection).map_err(at("configure the database"))?;
        let found: i64 = connection
            .query_row("PRAGMA user_version", [], |row| row.get(0))
            .map_err(at("read the schema's version"))?;
        if found > SCHEMA_VERSION {
            return Err(StoreError::NewerSchema { path, found });
        }
        if found == 0 {
            let sql = format!("BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;");
            connection.execute_batch(&sql).map_err(at("create the schema"))?;
        }
        grow_wal(&connection, &path).map_err(at("grow the write-ahead log"))?;
        let raft = match read_raft(&connection).map_err(at("read raft's state"))? {
            Some(body) => postcard::from_bytes(&body)
                .map_err(|source| StoreError::Damaged { path: path.clone(), source })?,
            None => RaftRow::default(),
        };
        Ok(SqliteStore { connection, raft, reserve: Some(Reserve::open(data_dir)), path })
    }

    /// Makes the first node's log: an empty state at index 1 of which it is the only voter.
    pub fn found(&mut self, node: u64) -> Result<(), StoreError> {
        let conf_state = ConfState { voters: vec![node], ..ConfState::default() };
        let raft = RaftRow { term: 1, vote: 0, commit: 1, applied: 1, compacted: (1, 1), conf_state };
        write_raft(&self.connection, &raft).map_err(|source| self.error("found the log", source))?;
        self.raft = raft;
        Ok(())
    }

    /// Ends without closing: the write-ahead log keeps its length, so that the next start need not grow it.
    pub fn leave_open(self) {
        std::mem::forget(self.connection);
    }

    fn error(&self, step: &'static str, source: rusqlite::Error) -> StoreError {
        StoreError::Sqlite { step, path: self.path.clone(), source }
    }

    /// Writes batches in one transaction, in order.
    pub fn write_all(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        let outcome = self.write_once(batches);
        let is_full = matches!(&outcome, Err(StoreError::Sqlite { source, .. })
            if source.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull));
        if is_full && self.reserve.take().is_some_and(|reserve| reserve.release()) {
            tracing::error!("the disk is full; the reserve for the cluster's state is used up now");
            return self.write_once(batches);
        }
        outcome
    }

    fn write_once(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
        let path = self.path.clone();
        let at = |step| {
            let path = path.clone();
            move |source| StoreError::Sqlite { step, path, source }
        };
        let mut raft = self.raft.clone();
        let transaction = self.connection.transaction().map_err(at("begin a batch"))?;
        for batch in batches {
            write_snapshot(&transaction, batch).map_err(at("write a snapshot"))?;
            write_log(&transaction, batch).map_err(at("append to the log"))?;
            write_rows(&transaction, &batch.changes).map_err(at("write rows"))?;
            raft.take(batch);
        }
        if raft != self.raft {
            write_raft(&transaction, &raft).map_err(at("write raft's state"))?;
        }
        transaction.commit().map_err(at("commit a batch"))?;
        self.raft = raft;
        Ok(())
    }
}

impl RaftRow {
    fn take(&mut self, batch: &Batch) {
        if let Some(image) = &batch.snapshot {
            self.applied = image.index;
            self.compacted = (image.index, image.term);
            self.conf_state = image.conf_state.clone();
            self.commit = self.commit.max(image.index);
        }
        if let Some(compacted) = batch.compact_to {
            self.compacted = compacted;
        }
        if let Some(hard_state) = &batch.hard_state {
            self.term = hard_state.term;
            self.vote = hard_state.vote;
            self.commit = hard_state.commit;
        }
        self.applied = self.applied.max(batch.applied);
        if let Some(conf_state) = &batch.conf_state {
            self.conf_state = conf_state.clone();
        }
    }
}

fn configure(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(&format!(
        "PRAGMA page_size = 1024; PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL;
         PRAGMA synchronous = {}; PRAGMA wal_autocheckpoint = {WAL_PAGES}; PRAGMA cache_size = -1000;
         PRAGMA temp_store = MEMORY; PRAGMA foreign_keys = OFF;",
        synchronous()
    ))?;
    // The log's file stays when the database is closed: growing it again would cost flushes.
    connection.set_prepared_statement_cache_capacity(16);
    Ok(())
}

/// FULL, unless a test shows that durability rests on it.
fn synchronous() -> &'static str {
    match std::env::var("TINYDC_TEST_SYNCHRONOUS").as_deref() {
        Ok("OFF") => "OFF",
        _ => "FULL",
    }
}

fn grow_wal(connection: &Connection, path: &Path) -> rusqlite::Result<()> {
    let wal = PathBuf::from(format!("{}-wal", path.display()));
    let wanted = u64::from(WAL_PAGES) * 1024;
    if std::fs::metadata(&wal).is_ok_and(|file| file.len() >= wanted) {
        return Ok(());
    }
    // A transaction larger than the page cache spills into the log; rolled back, it leaves a long file behind and
    // nothing in the database.
    let spill = wanted + (2 << 20);
    connection.execute_batch(&format!(
        "BEGIN; CREATE TABLE fill (b); INSERT INTO fill VALUES (zeroblob({spill})); ROLLBACK;"
    ))
}

fn write_snapshot(transaction: &Transaction<'_>, batch: &Batch) -> rusqlite::Result<()> {
    let Some(image) = &batch.snapshot else { return Ok(()) };
    transaction.execute_batch("DELETE FROM row WHERE kind > 0; DELETE FROM log;")?;
    let state = crate::state::State::from_frames(&image.frames)
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?;
    write_rows(transaction, &state.all_rows())
}

fn write_log(transaction: &Transaction<'_>, batch: &Batch) -> rusqlite::Result<()> {
    if let Some(first) = batch.entries.first() {
        transaction.prepare_cached("DELETE FROM log WHERE idx >= ?1")?.execute([first.index as i64])?;
    }
    let mut insert = transaction.prepare_cached("INSERT INTO log VALUES (?1, ?2, ?3, ?4, ?5)")?;
    for entry in &batch.entries {
        let kind = match entry.entry_type {
            EntryType::EntryNormal => 0,
            EntryType::EntryConfChange => 1,
            EntryType::EntryConfChangeV2 => 2,
        };
        insert.execute(params![entry.index as i64, entry.term as i64, kind, entry.data, entry.context])?;
    }
    if let Some((index, _)) = batch.compact_to {
        transaction.prepare_cached("DELETE FROM log WHERE idx <= ?1")?.execute([index as i64])?;
    }
    Ok(())
}

fn write_rows(transaction: &Transaction<'_>, changes: &[RowChange]) -> rusqlite::Result<()> {
    let mut put = transaction.prepare_cached("INSERT OR REPLACE INTO row VALUES (?1, ?2, ?3)")?;
    let mut remove = transaction.prepare_cached("DELETE FROM row WHERE kind = ?1 AND key = ?2")?;
    for change in changes {
        match &change.body {
            Some(body) => put.execute(params![change.kind, change.key, body])?,
            None => remove.execute(params![change.kind, change.key])?,
        };
    }
    Ok(())
}

fn write_raft(connection: &Connection, raft: &RaftRow) -> rusqlite::Result<()> {
    let body = postcard::to_allocvec(raft).expect("plain data in memory always encodes");
    connection
        .prepare_cached("INSERT OR REPLACE INTO row VALUES (?1, x'', ?2)")?
        .execute(params![RAFT_KIND, body])?;
    Ok(())
}

fn read_raft(connection: &Connection) -> rusqlite::Result<Option<Vec<u8>>> {
    connection.query_row("SELECT body FROM row WHERE kind = ?1", [RAFT_KIND], |row| row.get(0)).optional()
}

impl LogStore for SqliteStore {
    type Error = StoreError;

    fn load(&mut self) -> Result<Stored, StoreError> {
        let raft = self.raft.clone();
        let mut stored = Stored {
            hard_state: HardState { term: raft.term, vote: raft.vote, commit: raft.commit },
            applied: raft.applied,
            compacted: raft.compacted,
            conf_state: raft.conf_state,
            ..Stored::default()
        };
        stored.entries = self.load_log()?;
        stored.rows = self.load_rows().map_err(|source| self.error("read the state's rows", source))?;
        // A commit index travels lazily: what was applied was committed.
        stored.hard_state.commit = stored.hard_state.commit.max(stored.applied);
        Ok(stored)
    }

    fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        self.write_all(std::slice::from_ref(batch))
    }
}

impl SqliteStore {
    fn load_log(&self) -> Result<Vec<Entry>, StoreError> {
        let read = || -> rusqlite::Result<Vec<(i64, Entry)>> {
            let mut statement =
                self.connection.prepare("SELECT idx, term, kind, data, context FROM log ORDER BY idx")?;
            let entries = statement.query_map([], |row| {
                let entry = Entry {
                    index: row.get::<_, i64>(0)? as u64,
                    term: row.get::<_, i64>(1)? as u64,
                    data: row.get(3)?,
                    context: row.get(4)?,
                    ..Entry::default()
                };
                Ok((row.get::<_, i64>(2)?, entry))
            })?;
            entries.collect()
        };
        let entries = read().map_err(|source| self.error("read the log", source))?;
        entries
            .into_iter()
            .map(|(kind, mut entry)| {
                entry.entry_type = match kind {
                    0 => EntryType::EntryNormal,
                    1 => EntryType::EntryConfChange,
                    2 => EntryType::EntryConfChangeV2,
                    _ => {
                        return Err(StoreError::EntryKind {
                            path: self.path.clone(),
                            index: entry.index,
                            kind,
                        });
                    }
                };
                Ok(entry)
            })
            .collect()
    }

    fn load_rows(&self) -> rusqlite::Result<Vec<RowChange>> {
        let mut statement =
            self.connection.prepare("SELECT kind, key, body FROM row WHERE kind > 0 ORDER BY kind, key")?;
        let rows = statement.query_map([], |row| {
            Ok(RowChange { kind: row.get(0)?, key: row.get(1)?, body: Some(row.get(2)?) })
        })?;
        rows.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch() -> PathBuf {
        let dir = std::env::temp_dir().join(format!(
            "tinydc-store-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        std::fs::create_dir_all(&dir).expect("make a scratch folder");
        dir
    }

    fn entry(index: u64, term: u64) -> Entry {
        Entry { index, term, data: vec![index as u8; 3], ..Entry::default() }
    }

    #[test]
    fn a_store_returns_what_was_written() {
        let dir = scratch();
        let mut store = SqliteStore::open(&dir).expect("open");
        store.found(1).expect("found");
        let wal = std::fs::metadata(dir.join("state.db-wal")).expect("a write-ahead log").len();
        assert!(wal >= u64::from(WAL_PAGES) * 1024, "the log was grown to {wal} bytes only");
        let row = |body: Option<Vec<u8>>| RowChange { kind: 3, key: vec![1], body };
        let first = Batch {
            number: 1,
            hard_state: Some(HardState { term: 2, vote: 1, commit: 1 }),
            entries: vec![entry(2, 2), entry(3, 2), entry(4, 2)],
            changes: vec![row(Some(vec![9]))],
            applied: 1,
            ..Batch::default()
        };
        store.write(&first).expect("write");
        // A new leader's entries replace the tail; a row goes; the head is compacted.
        let second = Batch {
            number: 2,
            entries: vec![entry(4, 3)],
            changes: vec![row(None), RowChange { kind: 4, key: vec![2], body: Some(vec![7]) }],
            applied: 3,
            compact_to: Some((2, 2)),
            ..Batch::default()
        };
        store.write(&second).expect("write");
        drop(store);
        let stored = SqliteStore::open(&dir).expect("open again").load().expect("load");
        assert_eq!(stored.entries, vec![entry(3, 2), entry(4, 3)]);
        assert_eq!(stored.compacted, (2, 2));
        assert_eq!(stored.applied, 3);
        assert_eq!(stored.hard_state, HardState { term: 2, vote: 1, commit: 3 });
        assert_eq!(stored.conf_state.voters, vec![1]);
        assert_eq!(stored.rows, vec![RowChange { kind: 4, key: vec![2], body: Some(vec![7]) }]);
        std::fs::remove_dir_all(&dir).expect("clean up");
    }
}
