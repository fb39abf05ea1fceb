//! Container logs: one text frame per line, two files of 10 MiB, and the shim's unwritten rest.
//!
//! A frame is `MILLISECONDS STREAM END TEXT\n`, such as `1764000000123 o. listening on :80`. The time is since 1970;
//! the stream is `o` (stdout), `e` (stderr) or `n` (a note by tinydc); the end is `.` when the line ends here or `+`
//! when the stream's next frame continues it. The text is any bytes but a newline, so a reader that meets torn bytes
//! goes on at the next line. Frames stand in the order in which the shim read them.
//!
//! ```text
//! <data>/instances/ID/logs/current, previous   what was flushed: in 64 KiB blocks or after 30 s, never fsynced
//! <run>/shim/ID/tail                           what a shim had not flushed when its container exited
//! ```

mod reader;
mod writer;

pub use reader::{FollowEvent, LogError, LogReader, LogRequest, settle};
pub(super) use writer::{LogWriter, Now, read_rest};

/// A frame's text; longer lines are several frames. Also the size of one read from a container.
pub const TEXT_BYTES_MAX: usize = 16 * 1024;
/// Time, stream, end, blanks and newline.
const FRAME_EXTRA_BYTES_MAX: usize = 32;
pub(super) const BUFFER_BYTES: usize = 64 * 1024;
const FILE_BYTES_MAX: u64 = 10 * 1024 * 1024;
const HOUR_BYTES_MAX: u64 = 20 * 1024 * 1024;
const FLUSH_AFTER_SECONDS: u64 = 30;
pub(super) const CURRENT: &str = "current";
const PREVIOUS: &str = "previous";
pub(super) const TAIL: &str = "tail";

const _: () = assert!(TEXT_BYTES_MAX + FRAME_EXTRA_BYTES_MAX < BUFFER_BYTES);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
    /// Written by tinydc itself.
    Note,
}

impl Stream {
    fn letter(self) -> u8 {
        match self {
            Stream::Stdout => b'o',
            Stream::Stderr => b'e',
            Stream::Note => b'n',
        }
    }

    fn from_letter(letter: u8) -> Option<Stream> {
        Some(match letter {
            b'o' => Stream::Stdout,
            b'e' => Stream::Stderr,
            b'n' => Stream::Note,
            _ => return None,
        })
    }
}

/// Whether a frame ends its line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineEnd {
    Ended,
    /// The next frame of the same stream goes on.
    Open,
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRecord {
    pub time_ms: u64,
    pub stream: Stream,
    pub end: LineEnd,
    /// Without the newline; any bytes.
    pub text: Vec<u8>,
}

impl LogRecord {
    /// Reads a frame without its newline. `None`: torn or foreign bytes.
    pub fn parse(frame: &[u8]) -> Option<LogRecord> {
        let blank = frame.iter().position(|byte| *byte == b' ')?;
        let time_ms = std::str::from_utf8(&frame[..blank]).ok()?.parse().ok()?;
        let (stream, rest) = frame[blank + 1..].split_first()?;
        let (end, rest) = rest.split_first()?;
        let end = match end {
            b'.' => LineEnd::Ended,
            b'+' => LineEnd::Open,
            _ => return None,
        };
        let text = rest.strip_prefix(b" ")?.to_vec();
        Some(LogRecord { time_ms, stream: Stream::from_letter(*stream)?, end, text })
    }
}

/// Appends a frame to `buffer`. `text` holds no newline.
fn write_frame(buffer: &mut Vec<u8>, time_ms: u64, stream: Stream, end: LineEnd, text: &[u8]) {
    use std::io::Write;
    let end = match end {
        LineEnd::Ended => '.',
        LineEnd::Open => '+',
    };
    // Writing to a Vec cannot fail.
    let _ = write!(buffer, "{time_ms} {}{end} ", char::from(stream.letter()));
    buffer.extend_from_slice(text);
    buffer.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_survive_a_frame_and_torn_ones_are_told() {
        for text in [&b"plain"[..], b"", b" two  blanks ", b"\x00\xff\r\x1b[1m"] {
            let mut buffer = Vec::new();
            write_frame(&mut buffer, 17, Stream::Stderr, LineEnd::Open, text);
            assert_eq!(buffer.pop(), Some(b'\n'));
            let record = LogRecord::parse(&buffer).unwrap();
            assert_eq!((record.time_ms, record.stream, record.end), (17, Stream::Stderr, LineEnd::Open));
            assert_eq!(record.text, text);
        }
        for torn in
            [&b""[..], b"17", b"17 o", b"17 o. "[..5].as_ref(), b"17 x. a", b"x o. a", b"17 o? a", b"\0\0\0"]
        {
            assert_eq!(LogRecord::parse(torn), None, "{torn:?}");
        }
    }
}
