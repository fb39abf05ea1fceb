//! Opens a layer's compression. Input: a stream. Output: the tar inside. The first bytes decide, not the media
//! type, since builders and `docker save` mislabel; the digest of the result is checked by the caller.

use std::io::{self, BufRead, BufReader, Cursor, Read};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// A skippable frame's magic is 0x184D2A50 to 0x184D2A5F, little endian.
const ZSTD_SKIPPABLE_MAGIC: [u8; 3] = [0x2a, 0x4d, 0x18];
/// What is decoded before it is handed on; bounds the memory beside the window, which the crate caps at 100 MiB.
const DECODED_BYTES: usize = 64 * 1024;
pub fn decompress<'a>(mut stream: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let start = first_bytes(&mut stream)?;
    let is_gzip = start.starts_with(&GZIP_MAGIC);
    let is_zstd = start.starts_with(&ZSTD_MAGIC) || start.get(1..4) == Some(&ZSTD_SKIPPABLE_MAGIC);
    let stream = BufReader::with_capacity(32 * 1024, Cursor::new(start).chain(stream));
    if is_gzip {
        return Ok(Box::new(MultiGzDecoder::new(stream)));
    }
    if is_zstd {
        return Ok(Box::new(ZstdFrames { stream, frame: None }));
    }
    Ok(Box::new(stream))
}

/// Up to four bytes; fewer only at the end. A socket may give them one by one.
fn first_bytes(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut start = Vec::with_capacity(4);
    stream.take(4).read_to_end(&mut start)?;
    Ok(start)
}

/// All zstd frames of a stream, skippable ones left out. The crate's own reader stops after the first frame.
struct ZstdFrames<R> {
    stream: R,
    frame: Option<FrameDecoder>,
}

impl<R: BufRead> ZstdFrames<R> {
    /// Starts the next frame; `false` at the end of the stream.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.stream.fill_buf()?.is_empty() {
                return Ok(false);
            }
            let mut frame = FrameDecoder::new();
            match frame.init(&mut self.stream) {
                Ok(()) => {
                    self.frame = Some(frame);
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    io::copy(&mut (&mut self.stream).take(u64::from(length)), &mut io::sink())?;
                }
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
        }
    }
}

impl<R: BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if self.frame.is_none() && !self.next_frame()? {
                return Ok(0);
            }
            let Some(frame) = self.frame.as_mut() else { return Ok(0) };
            while frame.can_collect() == 0 && !frame.is_finished() {
                frame
                    .decode_blocks(&mut self.stream, BlockDecodingStrategy::UptoBytes(DECODED_BYTES))
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            }
            let count = frame.read(buffer)?;
            if count > 0 {
                return Ok(count);
            }
            if frame.is_finished() {
                self.frame = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};
    use std::io::Write;

    fn unpacked(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        decompress(bytes).unwrap().read_to_end(&mut out).unwrap();
        out
    }

    #[test]
    fn plain_gzip_and_zstd_of_many_frames_open() {
        let gzip = |bytes: &[u8]| {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        let zstd = |bytes: &[u8]| compress_to_vec(bytes, CompressionLevel::Fastest);
        let skippable = [&0x184D_2A53u32.to_le_bytes()[..], &3u32.to_le_bytes(), b"xyz"].concat();
        assert_eq!(unpacked(b"plain"), b"plain");
        assert_eq!(unpacked(b""), b"");
        assert_eq!(unpacked(&[gzip(b"one "), gzip(b"two")].concat()), b"one two");
        assert_eq!(unpacked(&[zstd(b"one "), skippable.clone(), zstd(b"two")].concat()), b"one two");
        assert_eq!(unpacked(&[skippable, zstd(b"late")].concat()), b"late");
    }
}
