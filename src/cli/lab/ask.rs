//! One request over a Unix socket, blocking: enough for a lab, without an executor.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(30);

pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON; an error for a status above 399, with the API's own sentence.
    pub fn json(self) -> Result<serde_json::Value> {
        let text = String::from_utf8_lossy(&self.body).into_owned();
        if self.status >= 400 {
            let value: serde_json::Value = serde_json::from_slice(text.as_bytes()).unwrap_or_default();
            bail!("{} ({})", value["error"]["message"].as_str().unwrap_or(&text), self.status);
        }
        if text.is_empty() {
            return Ok(serde_json::Value::Null);
        }
        serde_json::from_slice(text.as_bytes()).with_context(|| format!("no JSON: {text}"))
    }
}

pub fn ask(socket: &Path, method: &str, path: &str, body: &[u8]) -> Result<Answer> {
    ask_with(socket, method, path, "", body)
}

/// `headers` are whole lines, each with its line end.
pub fn ask_with(socket: &Path, method: &str, path: &str, headers: &str, body: &[u8]) -> Result<Answer> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: tinydc\r\nconnection: close\r\n{headers}content-length: {}\r\n\r\n",
        body.len()
    )?;
    stream.write_all(body)?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).with_context(|| format!("{method} {path}"))?;
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.with_context(|| format!("{method} {path}: no HTTP answer"))?;
    let (mut length, mut is_chunked) = (None, false);
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let header = line.trim_end().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        length = length
            .or(header.strip_prefix("content-length:").and_then(|text| text.trim().parse::<u64>().ok()));
        is_chunked |= header == "transfer-encoding: chunked";
    }
    let mut body = Vec::new();
    match (is_chunked, length) {
        (true, _) => read_chunks(&mut reader, &mut body)?,
        (false, Some(length)) => {
            reader.take(length).read_to_end(&mut body)?;
        }
        (false, None) => {
            reader.read_to_end(&mut body)?;
        }
    }
    Ok(Answer { status, body })
}

fn read_chunks(reader: &mut impl BufRead, body: &mut Vec<u8>) -> Result<()> {
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let length = u64::from_str_radix(line.trim(), 16).context("a chunk's length")?;
        reader.by_ref().take(length).read_to_end(body)?;
        reader.read_line(&mut line)?;
        if length == 0 {
            return Ok(());
        }
    }
}
