//! Reads a container's log: the last lines, those since a time, and what comes from now on.
//!
//! Input: the log files and, while a shim lives, its control socket. Output: frames in order, each once.
//! The shim first says how long the current file is and what it holds beyond it; the files are read up to there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::writer::read_rest;
use super::{BUFFER_BYTES, CURRENT, LineEnd, LogRecord, PREVIOUS, TAIL};
use crate::linux::{process, socket};

const SHIM_ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// A line of a damaged file may have no end; it is skipped in pieces of this size.
const LINE_BYTES_MAX: u64 = 64 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("read log {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("ask the shim for its log")]
    AskShim(#[source] io::Error),
    #[error("move the rest of the log into {path}")]
    Settle {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What of a log is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogRequest {
    /// The last lines only.
    pub tail: Option<u64>,
    /// Frames at or after this time, in ms since 1970.
    pub since_ms: Option<u64>,
    pub follow: bool,
}

/// What `LogReader::next_live` saw.
#[derive(Debug, PartialEq, Eq)]
pub enum FollowEvent {
    Records(Vec<LogRecord>),
    /// Nothing within the timeout.
    Idle,
    /// The container has exited; read no more.
    Ended,
}

/// A log being read: first `backlog`, then, with `follow`, `next_live` again and again.
#[derive(Debug)]
pub struct LogReader {
    folder: PathBuf,
    request: LogRequest,
    /// Inode and length of the current file when the shim was asked.
    current: Option<(u64, u64)>,
    /// Frames beyond the files.
    rest: Vec<u8>,
    live: Option<OwnedFd>,
}

/// A stretch of frames to be read: a file up to a length, or memory.
enum Source<'a> {
    File(File, u64, PathBuf),
    Memory(&'a [u8]),
}

impl LogReader {
    /// `logs` is the folder of the files, `run` that of the shim.
    pub fn open(logs: &Path, run: &Path, request: LogRequest) -> Result<LogReader, LogError> {
        let mut reader =
            LogReader { folder: logs.into(), request, current: None, rest: Vec::new(), live: None };
        match socket::connect_messages(&run.join("control.sock"), SHIM_ANSWERS_WITHIN) {
            Ok(shim) => reader.ask_shim(shim).map_err(LogError::AskShim)?,
            // No shim: the container does not run.
            Err(_) => reader.rest = read_rest(&run.join(TAIL)),
        }
        Ok(reader)
    }

    fn ask_shim(&mut self, shim: OwnedFd) -> io::Result<()> {
        let verb: &[u8] = if self.request.follow { b"follow" } else { b"dump" };
        socket::send(shim.as_fd(), verb)?;
        let mut message = vec![0u8; BUFFER_BYTES];
        let length = socket::receive(shim.as_fd(), &mut message)?;
        let [inode, bytes, rest] = parse_position(&message[..length]).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "the shim's answer is not understood")
        })?;
        self.current = Some((inode, bytes));
        while (self.rest.len() as u64) < rest {
            let length = socket::receive(shim.as_fd(), &mut message)?;
            if length == 0 {
                break;
            }
            self.rest.extend_from_slice(&message[..length]);
        }
        if self.request.follow {
            self.live = Some(shim);
        }
        Ok(())
    }

    /// Hands over what is there already. `sink` returns `false` to stop.
    pub fn backlog(&mut self, sink: &mut dyn FnMut(LogRecord) -> bool) -> Result<(), LogError> {
        let mut to_skip = match self.request.tail {
            Some(wanted) => self.lines_before_tail(wanted)?,
            None => (0, 0),
        };
        let since_ms = self.request.since_ms.unwrap_or(0);
        for (number, source) in self.sources()?.into_iter().enumerate() {
            if number < to_skip.0 {
                continue;
            }
            let mut visit = |record: LogRecord| {
                if to_skip.1 > 0 {
                    to_skip.1 -= u64::from(record.end == LineEnd::Ended);
                    return true;
                }
                record.time_ms < since_ms || sink(record)
            };
            if !source.read(&mut visit)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Waits for new frames. `Ended` at once without `follow` or without a running container.
    pub fn next_live(&mut self, timeout: Duration) -> Result<FollowEvent, LogError> {
        let Some(live) = &self.live else { return Ok(FollowEvent::Ended) };
        if !process::poll_readable(live.as_fd(), timeout).map_err(LogError::AskShim)? {
            return Ok(FollowEvent::Idle);
        }
        let mut message = vec![0u8; BUFFER_BYTES];
        let length = match socket::receive(live.as_fd(), &mut message) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(LogError::AskShim(error)),
        };
        if length == 0 {
            self.live = None;
            return Ok(FollowEvent::Ended);
        }
        let frames = message[..length].split(|byte| *byte == b'\n');
        Ok(FollowEvent::Records(frames.filter_map(LogRecord::parse).collect()))
    }

    /// Readable when `next_live` has something to say.
    pub fn live_fd(&self) -> Option<BorrowedFd<'_>> {
        self.live.as_ref().map(AsFd::as_fd)
    }

    /// The stretches of the log, oldest first. A file that was rotated since the shim answered is found by its inode.
    fn sources(&self) -> Result<Vec<Source<'_>>, LogError> {
        let mut sources = Vec::new();
        let mut files = Vec::new();
        for name in [PREVIOUS, CURRENT] {
            let path = self.folder.join(name);
            match File::open(&path).and_then(|file| file.metadata().map(|metadata| (file, metadata))) {
                Ok((file, metadata)) => files.push((file, metadata.ino(), metadata.len(), path)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(LogError::Read { path, source }),
            }
        }
        for (file, inode, length, path) in files {
            match self.current {
                Some((current, bytes)) if inode == current => {
                    sources.push(Source::File(file, bytes, path));
                    break;
                }
                _ => sources.push(Source::File(file, length, path)),
            }
        }
        sources.push(Source::Memory(&self.rest));
        Ok(sources)
    }

    /// Where the last `wanted` lines begin: the number of the stretch, and how many lines of it come before.
    fn lines_before_tail(&self, wanted: u64) -> Result<(usize, u64), LogError> {
        let sources = self.sources()?;
        let mut missing = wanted;
        for (number, source) in sources.iter().enumerate().rev() {
            let mut lines = 0u64;
            source.read(&mut |record| {
                lines += u64::from(record.end == LineEnd::Ended);
                true
            })?;
            if lines >= missing {
                return Ok((number, lines - missing));
            }
            missing -= lines;
        }
        Ok((0, 0))
    }
}

impl Source<'_> {
    /// Visits every frame. `false`: the visitor stopped.
    fn read(&self, visit: &mut dyn FnMut(LogRecord) -> bool) -> Result<bool, LogError> {
        match self {
            Source::Memory(bytes) => {
                let frames = bytes.split(|byte| *byte == b'\n');
                Ok(frames.filter_map(LogRecord::parse).all(visit))
            }
            Source::File(file, length, path) => {
                let failed = |source| LogError::Read { path: path.clone(), source };
                let mut file = file;
                file.seek(SeekFrom::Start(0)).map_err(failed)?;
                let mut reader = BufReader::with_capacity(64 * 1024, file.take(*length));
                let mut line = Vec::new();
                loop {
                    line.clear();
                    let count =
                        (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).map_err(failed)?;
                    if count == 0 {
                        return Ok(true);
                    }
                    if line.last() == Some(&b'\n') {
                        line.pop();
                    }
                    if let Some(record) = LogRecord::parse(&line)
                        && !visit(record)
                    {
                        return Ok(false);
                    }
                }
            }
        }
    }
}

/// `log INODE BYTES REST`: the shim's first message.
fn parse_position(message: &[u8]) -> Option<[u64; 3]> {
    let text = std::str::from_utf8(message).ok()?.strip_prefix("log ")?;
    let mut numbers = text.split_ascii_whitespace().map(|word| word.parse::<u64>().ok());
    Some([numbers.next()??, numbers.next()??, numbers.next()??])
}

/// Moves what the last shim had not flushed into the file: before its run folder goes away.
pub fn settle(logs: &Path, run: &Path) -> Result<(), LogError> {
    let tail = run.join(TAIL);
    let rest = read_rest(&tail);
    if rest.is_empty() {
        return Ok(());
    }
    let path = logs.join(CURRENT);
    let append = || -> io::Result<()> {
        OpenOptions::new().create(true).append(true).open(&path)?.write_all(&rest)?;
        fs::remove_file(&tail)
    };
    append().map_err(|source| LogError::Settle { path: path.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::super::{Stream, write_frame};
    use super::*;
    use crate::runtime::scratch::Scratch;

    fn write_log(path: &Path, lines: std::ops::Range<u64>) {
        let mut bytes = Vec::new();
        for line in lines {
            write_frame(&mut bytes, line, Stream::Stdout, LineEnd::Open, b"line ");
            write_frame(&mut bytes, line, Stream::Stdout, LineEnd::Ended, line.to_string().as_bytes());
        }
        fs::write(path, bytes).unwrap();
    }

    fn read(scratch: &Scratch, request: LogRequest) -> Vec<String> {
        let mut reader = LogReader::open(scratch.path(), scratch.path(), request).unwrap();
        let mut text = String::new();
        reader
            .backlog(&mut |record| {
                text.push_str(&String::from_utf8(record.text).unwrap());
                if record.end == LineEnd::Ended {
                    text.push('\n');
                }
                true
            })
            .unwrap();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn the_last_lines_are_found_across_files_and_memory() {
        let scratch = Scratch::new("log-tail");
        write_log(&scratch.path().join(PREVIOUS), 0..3_000);
        write_log(&scratch.path().join(CURRENT), 3_000..6_000);
        write_log(&scratch.path().join(TAIL), 6_000..6_010);
        for tail in [0, 1, 10, 11, 3_010, 3_011, 6_009, 6_010, 9_999] {
            let lines = read(&scratch, LogRequest { tail: Some(tail), ..LogRequest::default() });
            assert_eq!(lines.len() as u64, tail.min(6_010), "tail {tail}");
            if let (Some(first), Some(last)) = (lines.first(), lines.last()) {
                assert_eq!(first, &format!("line {}", 6_010 - tail.min(6_010)), "tail {tail}");
                assert_eq!(last, "line 6009");
            }
        }
        let lines = read(&scratch, LogRequest { since_ms: Some(6_005), ..LogRequest::default() });
        assert_eq!(lines, (6_005..6_010).map(|line| format!("line {line}")).collect::<Vec<_>>());
        settle(scratch.path(), scratch.path()).unwrap();
        assert!(!scratch.path().join(TAIL).exists());
        assert_eq!(read(&scratch, LogRequest::default()).len(), 6_010, "settling loses and doubles nothing");
    }

    #[test]
    fn torn_bytes_cost_only_their_line() {
        let scratch = Scratch::new("log-torn");
        fs::write(scratch.path().join(CURRENT), b"1 o. a\n2 o. \0\0\0\0\n\0\0\0\0\n17 o").unwrap();
        assert_eq!(read(&scratch, LogRequest::default()), ["a", "\0\0\0\0"]);
    }
}
