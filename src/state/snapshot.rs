//! The whole state as a stream of rows, and its digest.
//!
//! A snapshot is frames of at most `SNAPSHOT_CHUNK_BYTES` and one row more; a row is never split. It carries rows
//! only: no log, no vote, no term.

use super::State;
use super::table::{RowChange, RowError};
use crate::model::limits::SNAPSHOT_CHUNK_BYTES;
use sha2::{Digest as _, Sha256};

#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("decode frame {frame} of a snapshot")]
    Frame {
        frame: usize,
        #[source]
        source: postcard::Error,
    },
    #[error("load a row of frame {frame} of a snapshot")]
    Row {
        frame: usize,
        #[source]
        source: RowError,
    },
}

impl State {
    /// All rows in frames; see `from_frames`.
    pub fn to_frames(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut rows: Vec<(u8, Vec<u8>, Vec<u8>)> = Vec::new();
        let mut bytes = 0;
        self.for_each_row(&mut |kind, key, body| {
            bytes += key.len() + body.len() + 8;
            rows.push((kind, key.to_vec(), body.to_vec()));
            if bytes >= SNAPSHOT_CHUNK_BYTES {
                frames.push(encode(&std::mem::take(&mut rows)));
                bytes = 0;
            }
        });
        if !rows.is_empty() {
            frames.push(encode(&rows));
        }
        frames
    }

    pub fn from_frames(frames: &[Vec<u8>]) -> Result<State, SnapshotError> {
        let mut state = State::default();
        for (frame, bytes) in frames.iter().enumerate() {
            let rows: Vec<(u8, Vec<u8>, Vec<u8>)> =
                postcard::from_bytes(bytes).map_err(|source| SnapshotError::Frame { frame, source })?;
            for (kind, key, body) in rows {
                state.load_row(kind, &key, &body).map_err(|source| SnapshotError::Row { frame, source })?;
            }
        }
        Ok(state)
    }

    /// The same on all nodes that applied the same entries.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        self.for_each_row(&mut |kind, key, body| {
            hash.update([kind]);
            hash.update((key.len() as u64).to_le_bytes());
            hash.update(key);
            hash.update((body.len() as u64).to_le_bytes());
            hash.update(body);
        });
        hash.finalize().into()
    }

    /// Every row as a change: what a store writes after a snapshot.
    pub fn all_rows(&self) -> Vec<RowChange> {
        let mut rows = Vec::new();
        self.for_each_row(&mut |kind, key, body| {
            rows.push(RowChange { kind, key: key.to_vec(), body: Some(body.to_vec()) });
        });
        rows
    }
}

fn encode(rows: &Vec<(u8, Vec<u8>, Vec<u8>)>) -> Vec<u8> {
    postcard::to_allocvec(rows).expect("plain data in memory always encodes")
}
