//! What a disk may hold after a power cut: everything up to a flush, and any part of what came after it.
//!
//! Input: the disk as it was before, and QEMU's log of writes (`blklogwrites`, the format of Linux's dm-log-writes).
//! Output: a disk on which a random half of the writes since the last flush is lost.

use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: u64 = 0x6a_7366_7773_6872;
const FLUSH: u64 = 1;
const FORCED: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

struct Entry {
    sector: u64,
    sectors: u64,
    flags: u64,
    /// Where its data lies in the log.
    at: u64,
}

pub struct Log {
    file: File,
    sector_bytes: u64,
    entries: Vec<Entry>,
}

fn number(file: &File, at: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_le_bytes(bytes))
}

impl Log {
    pub fn read(path: &Path) -> Result<Log> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        ensure!(number(&file, 0)? == MAGIC, "{} is no log of writes", path.display());
        let count = number(&file, 16)?;
        let sector_bytes = number(&file, 24)? & 0xffff_ffff;
        ensure!(sector_bytes >= 512, "sectors of {sector_bytes} bytes");
        let mut entries = Vec::new();
        let mut at = sector_bytes;
        for _ in 0..count {
            let entry = Entry {
                sector: number(&file, at)?,
                sectors: number(&file, at + 8)?,
                flags: number(&file, at + 16)?,
                at: at + sector_bytes,
            };
            at =
                entry.at + if entry.flags & (DISCARD | MARK) == 0 { entry.sectors * sector_bytes } else { 0 };
            entries.push(entry);
        }
        Ok(Log { file, sector_bytes, entries })
    }

    /// How many writes a log holds so far, while it is being written.
    pub fn count(path: &Path) -> Result<usize> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        Ok(number(&file, 16)? as usize)
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn flushes(&self) -> usize {
        self.entries.iter().filter(|entry| entry.flags & FLUSH != 0).count()
    }

    /// How many of the first `until` writes came after their last flush.
    pub fn unflushed(&self, until: usize) -> usize {
        self.entries[..until].iter().rev().take_while(|entry| entry.flags & FLUSH == 0).count()
    }

    /// Brings the first `until` writes onto the disk. What came after their last flush but `forgotten` is written or
    /// lost by the toss of a coin; with `forgotten` above 0 the disk is one that lied about its flushes. Returns how
    /// many writes were lost.
    pub fn replay(
        &self,
        disk: &Path,
        until: usize,
        forgotten: usize,
        coin: &mut dyn FnMut() -> bool,
    ) -> Result<usize> {
        let flushes: Vec<usize> =
            (0..until).filter(|index| self.entries[*index].flags & FLUSH != 0).collect();
        let Some(certain) = flushes.len().checked_sub(1 + forgotten).map(|index| flushes[index]) else {
            bail!("the log has only {} flushes", flushes.len())
        };
        let disk =
            File::options().write(true).open(disk).with_context(|| format!("open {}", disk.display()))?;
        let mut lost = 0;
        for (index, entry) in self.entries.iter().enumerate().take(until) {
            if entry.flags & MARK != 0 || entry.sectors == 0 {
                continue;
            }
            let is_certain = index <= certain || (forgotten == 0 && entry.flags & FORCED != 0);
            if !is_certain && !coin() {
                lost += 1;
                continue;
            }
            let length = (entry.sectors * self.sector_bytes) as usize;
            let mut data = vec![0; length];
            if entry.flags & DISCARD == 0 {
                self.file.read_exact_at(&mut data, entry.at)?;
            }
            disk.write_all_at(&data, entry.sector * self.sector_bytes)?;
        }
        Ok(lost)
    }
}
