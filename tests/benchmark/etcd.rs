//! Debian's etcd doing the same job: three members, lone puts of 200 bytes.

use super::meter::{percentile, written};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const DIR: &str = "/var/tmp/tinydc-bench-etcd";

pub struct Measured {
    pub median_ms: f64,
    pub p99_ms: f64,
    pub bytes_per_put: f64,
}

struct Members(Vec<Child>);

impl Drop for Members {
    fn drop(&mut self) {
        for member in &mut self.0 {
            // One that has ended is what is wanted.
            let _ = member.kill();
            let _ = member.wait();
        }
        let _ = fs::remove_dir_all(DIR);
    }
}

/// `None` without an etcd on this machine.
pub fn measure(puts: usize) -> Result<Option<Measured>> {
    if Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
        return Ok(None);
    }
    let _ = fs::remove_dir_all(DIR);
    let cluster: Vec<String> = (1..=3).map(|n| format!("e{n}=http://127.0.0.1:2{n}80")).collect();
    let start = |n: usize| {
        Command::new("etcd")
            .args(["--name", &format!("e{n}"), "--data-dir", &format!("{DIR}/e{n}")])
            .args(["--listen-peer-urls", &format!("http://127.0.0.1:2{n}80")])
            .args(["--initial-advertise-peer-urls", &format!("http://127.0.0.1:2{n}80")])
            .args(["--listen-client-urls", &format!("http://127.0.0.1:2{n}79")])
            .args(["--advertise-client-urls", &format!("http://127.0.0.1:2{n}79")])
            .args([
                "--initial-cluster",
                &cluster.join(","),
                "--initial-cluster-state",
                "new",
                "--log-level",
                "error",
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
    };
    let members = Members((1..=3).map(start).collect::<Result<_, _>>().context("start etcd")?);
    let begin = Instant::now();
    while put(0).is_err() {
        if begin.elapsed() > Duration::from_secs(20) {
            bail!("etcd does not take a put within 20 s");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    for warm in 0..20 {
        put(warm)?;
    }
    let total = |members: &Members| members.0.iter().map(|member| written(member.id())).sum::<Result<u64>>();
    let before = total(&members)?;
    let mut times = Vec::with_capacity(puts);
    for number in 0..puts {
        let begin = Instant::now();
        put(number)?;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    let bytes = (total(&members)? - before) as f64 / puts as f64 / 3.0;
    Ok(Some(Measured {
        median_ms: percentile(&mut times, 50),
        p99_ms: percentile(&mut times, 99),
        bytes_per_put: bytes,
    }))
}

/// By etcd's JSON gateway, a connection each as the other side has it too.
fn put(number: usize) -> Result<()> {
    use base64::Engine;
    let engine = base64::engine::general_purpose::STANDARD;
    let (key, value) = (engine.encode("bench"), engine.encode(format!("{number:0200}")));
    let body = format!("{{\"key\":\"{key}\",\"value\":\"{value}\"}}");
    let mut stream = TcpStream::connect("127.0.0.1:2179")?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(
        stream,
        "POST /v3/kv/put HTTP/1.1\r\nhost: etcd\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.starts_with("HTTP/1.1 200") {
        Ok(())
    } else {
        bail!("etcd answers {}", answer.lines().next().unwrap_or_default())
    }
}
