//! The shim's end of a log: frames into a buffer, the buffer into a file, seldom.
//!
//! Input: what a container wrote, and the time as an argument. Output: at most one write per 64 KiB or 30 s; none
//! while the container is silent. Never fsyncs. A full disk costs log lines, which are counted, never the container.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::{
    BUFFER_BYTES, CURRENT, FILE_BYTES_MAX, FLUSH_AFTER_SECONDS, FRAME_EXTRA_BYTES_MAX, HOUR_BYTES_MAX,
    LineEnd, PREVIOUS, Stream, write_frame,
};

const HOUR: Duration = Duration::from_secs(3600);

/// The bounds, smaller in tests.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    pub file_bytes_max: u64,
    pub hour_bytes_max: u64,
}

const BOUNDS: Bounds = Bounds { file_bytes_max: FILE_BYTES_MAX, hour_bytes_max: HOUR_BYTES_MAX };

/// Wall clock for the frames, monotonic for the intervals.
#[derive(Clone, Copy)]
pub struct Now {
    pub unix_ms: u64,
    pub monotonic: Instant,
}

pub struct LogWriter {
    folder: PathBuf,
    /// Opened by the first flush, so that a silent container makes no file.
    file: Option<File>,
    file_bytes: u64,
    buffer: Vec<u8>,
    /// When the oldest frame of the buffer came.
    oldest: Option<Instant>,
    hour_start: Instant,
    hour_bytes: u64,
    is_hour_full: bool,
    dropped_lines: u64,
    dropped_bytes: u64,
    bounds: Bounds,
}

impl LogWriter {
    /// `rest` is what an earlier shim of this container had not flushed.
    pub fn new(folder: PathBuf, rest: Vec<u8>, now: Now) -> LogWriter {
        let oldest = (!rest.is_empty()).then_some(now.monotonic);
        LogWriter {
            folder,
            file: None,
            file_bytes: 0,
            buffer: rest,
            oldest,
            hour_start: now.monotonic,
            hour_bytes: 0,
            is_hour_full: false,
            dropped_lines: 0,
            dropped_bytes: 0,
            bounds: BOUNDS,
        }
    }

    /// Takes what one read of a stream gave: whole lines and perhaps the begin of one. Calls `live` with each frame.
    pub fn append(&mut self, stream: Stream, bytes: &[u8], now: Now, live: &mut dyn FnMut(&[u8])) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (text, end, used) = match rest.iter().position(|byte| *byte == b'\n') {
                Some(length) => (&rest[..length], LineEnd::Ended, length + 1),
                None => (rest, LineEnd::Open, rest.len()),
            };
            self.append_frame(stream, end, text, now, live);
            rest = &rest[used..];
        }
    }

    fn append_frame(
        &mut self,
        stream: Stream,
        end: LineEnd,
        text: &[u8],
        now: Now,
        live: &mut dyn FnMut(&[u8]),
    ) {
        if now.monotonic.duration_since(self.hour_start) >= HOUR {
            self.hour_start = now.monotonic;
            self.hour_bytes = 0;
            self.is_hour_full = false;
            self.note_dropped(now, live);
        }
        let frame_bytes = (text.len() + FRAME_EXTRA_BYTES_MAX) as u64;
        if self.hour_bytes + frame_bytes > self.bounds.hour_bytes_max {
            if !self.is_hour_full {
                self.is_hour_full = true;
                let limit = self.bounds.hour_bytes_max >> 20;
                let note =
                    format!("more than {limit} MiB of log within an hour: dropping until the hour is over");
                self.push(Stream::Note, LineEnd::Ended, note.as_bytes(), now, live);
            }
            self.dropped_lines += u64::from(end == LineEnd::Ended);
            self.dropped_bytes += text.len() as u64 + 1;
            return;
        }
        self.hour_bytes += frame_bytes;
        self.push(stream, end, text, now, live);
    }

    /// Says how much was dropped, once.
    fn note_dropped(&mut self, now: Now, live: &mut dyn FnMut(&[u8])) {
        if self.dropped_bytes > 0 {
            let note = format!("dropped {} lines, {} bytes", self.dropped_lines, self.dropped_bytes);
            (self.dropped_lines, self.dropped_bytes) = (0, 0);
            self.push(Stream::Note, LineEnd::Ended, note.as_bytes(), now, live);
        }
    }

    fn push(&mut self, stream: Stream, end: LineEnd, text: &[u8], now: Now, live: &mut dyn FnMut(&[u8])) {
        if self.buffer.len() + text.len() + FRAME_EXTRA_BYTES_MAX > BUFFER_BYTES {
            self.flush();
        }
        let start = self.buffer.len();
        write_frame(&mut self.buffer, now.unix_ms, stream, end, text);
        live(&self.buffer[start..]);
        self.oldest.get_or_insert(now.monotonic);
    }

    /// When `flush_if_due` wants to be called; `None` while nothing waits.
    pub fn flush_due(&self) -> Option<Instant> {
        self.oldest.map(|oldest| oldest + Duration::from_secs(FLUSH_AFTER_SECONDS))
    }

    pub fn flush_if_due(&mut self, now: Instant) {
        if self.flush_due().is_some_and(|due| now >= due) {
            self.flush();
        }
    }

    /// Writes the buffer out. What cannot be written is dropped and counted.
    pub fn flush(&mut self) {
        if self.buffer.is_empty() {
            return;
        }
        let length = self.buffer.len() as u64;
        let buffer = std::mem::take(&mut self.buffer);
        let written = self.rotate_if_full(length).and_then(|()| self.open_current()?.write_all(&buffer));
        self.buffer = buffer;
        match written {
            Ok(()) => self.file_bytes += length,
            Err(_) => {
                self.dropped_lines += self.buffer.iter().filter(|byte| **byte == b'\n').count() as u64;
                self.dropped_bytes += length;
                // Opened anew at the next flush: the place may have been made free, or the folder be gone.
                self.file = None;
            }
        }
        self.buffer.clear();
        self.oldest = None;
    }

    fn rotate_if_full(&mut self, more_bytes: u64) -> io::Result<()> {
        self.open_current()?;
        if self.file_bytes + more_bytes <= self.bounds.file_bytes_max {
            return Ok(());
        }
        fs::rename(self.folder.join(CURRENT), self.folder.join(PREVIOUS))?;
        self.file = None;
        self.open_current().map(|_| ())
    }

    fn open_current(&mut self) -> io::Result<&mut File> {
        if self.file.is_none() {
            let file = OpenOptions::new().create(true).append(true).open(self.folder.join(CURRENT))?;
            self.file_bytes = file.metadata()?.len();
            self.file = Some(file);
        }
        self.file.as_mut().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// What a reader needs to put file and buffer together: inode and length of the current file, and the rest.
    pub fn position(&mut self) -> (u64, u64, &[u8]) {
        // A file of an earlier shim counts too; a missing one is inode 0.
        let metadata = fs::metadata(self.folder.join(CURRENT)).ok();
        let (inode, length) = metadata.map_or((0, 0), |metadata| (metadata.ino(), metadata.len()));
        (inode, length, &self.buffer)
    }

    /// Ends the log: the unwritten rest is handed over instead of written, for a crash loop to cost no flush each.
    pub fn take_rest(&mut self, now: Now) -> Vec<u8> {
        self.note_dropped(now, &mut |_| {});
        self.oldest = None;
        std::mem::take(&mut self.buffer)
    }
}

/// Reads what an earlier shim left; at most one buffer.
pub fn read_rest(path: &std::path::Path) -> Vec<u8> {
    let mut rest = Vec::with_capacity(0);
    if let Ok(file) = File::open(path) {
        let _ = file.take(BUFFER_BYTES as u64).read_to_end(&mut rest);
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::super::LogRecord;
    use super::*;
    use crate::runtime::scratch::Scratch;

    fn now(seconds: u64, start: Instant) -> Now {
        Now { unix_ms: seconds * 1000, monotonic: start + Duration::from_secs(seconds) }
    }

    fn records(bytes: &[u8]) -> Vec<LogRecord> {
        let frames = bytes.split(|byte| *byte == b'\n').filter(|frame| !frame.is_empty());
        frames.map(|frame| LogRecord::parse(frame).expect("a whole frame")).collect()
    }

    #[test]
    fn nothing_is_written_before_64_kib_or_30_seconds_and_never_while_silent() {
        let scratch = Scratch::new("log-flush");
        let start = Instant::now();
        let current = scratch.path().join(CURRENT);
        let mut writer = LogWriter::new(scratch.path().into(), Vec::new(), now(0, start));
        assert_eq!(writer.flush_due(), None, "a silent container never wakes its shim");
        writer.append(Stream::Stdout, b"hello\n", now(1, start), &mut |_| {});
        writer.flush_if_due(now(30, start).monotonic);
        assert!(!current.exists());
        writer.flush_if_due(now(31, start).monotonic);
        assert_eq!(records(&fs::read(&current).unwrap())[0].text, b"hello");
        assert_eq!(writer.flush_due(), None);
        for _ in 0..5 {
            writer.append(Stream::Stdout, &[b'x'; 16 * 1024], now(32, start), &mut |_| {});
        }
        assert!(fs::metadata(&current).unwrap().len() > 40_000, "a full buffer is written");
    }

    #[test]
    fn streams_keep_their_order_and_partial_lines_join() {
        let start = Instant::now();
        let mut writer = LogWriter::new("/nonexistent".into(), Vec::new(), now(0, start));
        let mut live = Vec::new();
        for (stream, bytes) in
            [(Stream::Stdout, &b"one\ntw"[..]), (Stream::Stderr, b"bad\n"), (Stream::Stdout, b"o\n\n")]
        {
            writer.append(stream, bytes, now(1, start), &mut |frame| live.extend_from_slice(frame));
        }
        let seen: Vec<_> = records(&live).into_iter().map(|r| (r.stream, r.end, r.text)).collect();
        assert_eq!(
            seen,
            [
                (Stream::Stdout, LineEnd::Ended, b"one".to_vec()),
                (Stream::Stdout, LineEnd::Open, b"tw".to_vec()),
                (Stream::Stderr, LineEnd::Ended, b"bad".to_vec()),
                (Stream::Stdout, LineEnd::Ended, b"o".to_vec()),
                (Stream::Stdout, LineEnd::Ended, b"".to_vec()),
            ]
        );
        assert_eq!(writer.take_rest(now(2, start)), live);
    }

    #[test]
    fn two_files_bound_the_log() {
        let scratch = Scratch::new("log-rotate");
        let start = Instant::now();
        let mut writer = LogWriter::new(scratch.path().into(), Vec::new(), now(0, start));
        writer.bounds = Bounds { file_bytes_max: 200_000, hour_bytes_max: u64::MAX };
        for line in 0..20_000 {
            writer.append(Stream::Stdout, format!("line {line}\n").as_bytes(), now(1, start), &mut |_| {});
        }
        writer.flush();
        let (current, previous) = (scratch.path().join(CURRENT), scratch.path().join(PREVIOUS));
        let joined = [fs::read(previous).unwrap(), fs::read(current).unwrap()];
        assert!(joined.iter().all(|file| file.len() as u64 <= 200_000));
        let lines = records(&joined.concat());
        assert_eq!(lines.last().unwrap().text, b"line 19999");
        assert_eq!(
            lines.len(),
            20_000 - String::from_utf8_lossy(&lines[0].text)[5..].parse::<usize>().unwrap()
        );
    }

    #[test]
    fn too_much_within_an_hour_is_dropped_counted_and_said() {
        let start = Instant::now();
        let scratch = Scratch::new("log-cap");
        let mut writer = LogWriter::new(scratch.path().into(), Vec::new(), now(0, start));
        writer.bounds = Bounds { file_bytes_max: u64::MAX, hour_bytes_max: 3 << 20 };
        let mut notes = Vec::new();
        let mut kept = 0u64;
        let mut live = |frame: &[u8]| match LogRecord::parse(&frame[..frame.len() - 1]) {
            Some(record) if record.stream == Stream::Note => {
                notes.push(String::from_utf8(record.text).unwrap())
            }
            _ => kept += 1,
        };
        for _ in 0..5_000 {
            writer.append(Stream::Stdout, &[&[b'x'; 999][..], b"\n"].concat(), now(5, start), &mut live);
        }
        writer.append(Stream::Stdout, b"later\n", now(3_700, start), &mut live);
        let limit = "more than 3 MiB of log within an hour: dropping until the hour is over".to_owned();
        let lines = 5_001 - kept;
        assert_eq!(notes, [limit, format!("dropped {lines} lines, {} bytes", lines * 1000)]);
        assert!(lines > 1_900, "{lines}");
    }
}
