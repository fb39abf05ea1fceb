//! A file that holds disk space for the cluster's state, let go once when the disk is full.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

pub const RESERVE_BYTES: u64 = 16 << 20;

pub struct Reserve {
    path: PathBuf,
}

impl Reserve {
    /// Makes the file if it is missing; a disk that is full already has none, and that is no error.
    pub fn open(data_dir: &Path) -> Reserve {
        let reserve = Reserve { path: data_dir.join("reserve") };
        let is_there = std::fs::metadata(&reserve.path).is_ok_and(|file| file.len() == RESERVE_BYTES);
        if !is_there && let Err(error) = reserve.fill() {
            tracing::warn!(%error, "no disk space for the reserve");
            reserve.release();
        }
        reserve
    }

    fn fill(&self) -> io::Result<()> {
        let file = File::create(&self.path)?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, RESERVE_BYTES)?;
        file.sync_all()
    }

    /// Gives the space back to the file system; says whether there was any.
    pub fn release(&self) -> bool {
        std::fs::remove_file(&self.path).is_ok()
    }
}
