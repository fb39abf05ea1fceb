//! Durability as seen from outside the process: what the log holds, and when the disk was asked.

use super::Scenario;
use super::stage::{Stage, until};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};
use tinydc::state::{Command, Envelope};

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "durability",
    proves: "no acknowledgement leaves before two of three disks were flushed after the request (strace); with \
             synchronous=OFF the same check fails",
    machines: 3,
    run: durability,
}];

const WRITES: usize = 20;

/// The log of a node as its files have it.
pub struct LogCopy {
    pub last_index: u64,
    entries: BTreeMap<u64, Vec<u8>>,
}

/// Read from a copy: the daemon holds the file for itself.
pub fn copy_of_log(stage: &Stage, index: usize) -> Result<LogCopy> {
    let from = stage.lab.nodes[index].data_dir();
    let folder = stage.lab.dir.join("log-copy");
    let mut last = None;
    // A copy of a running daemon's files may be torn; the next one is not.
    until("the log can be read", Duration::from_secs(10), || {
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        for part in ["state.db", "state.db-wal"] {
            fs::copy(from.join(part), folder.join(part))?;
        }
        let connection = rusqlite::Connection::open(folder.join("state.db"))?;
        let mut query = connection.prepare("SELECT idx, data FROM log ORDER BY idx")?;
        let rows =
            query.query_map([], |row| Ok((row.get::<_, i64>(0)? as u64, row.get::<_, Vec<u8>>(1)?)))?;
        last = Some(rows.collect::<rusqlite::Result<BTreeMap<u64, Vec<u8>>>>()?);
        Ok(true)
    })?;
    let entries = last.context("the log was read")?;
    Ok(LogCopy { last_index: entries.keys().last().copied().unwrap_or(0), entries })
}

/// What was written after an index; a new leader's empty entry is no command.
pub fn entries_after(log: &LogCopy, index: u64) -> Vec<Command> {
    let later = log.entries.range(index + 1..).filter(|(_, data)| !data.is_empty());
    later.filter_map(|(_, data)| Envelope::decode(data).ok()).map(|envelope| envelope.command).collect()
}

fn durability(stage: &mut Stage) -> Result<()> {
    let begin = Instant::now();
    let sound = trace(stage, false)?;
    stage.note("traced with synchronous=FULL", begin);
    ensure!(sound.is_empty(), "acknowledged before two disks were flushed: {sound:?}");
    for node in &mut stage.lab.nodes {
        node.kill_all()?;
        node.set_environment("TINYDC_TEST_SYNCHRONOUS", "OFF");
    }
    let unsound = trace(stage, true)?;
    stage.remark(format!(
        "with synchronous=OFF {} of {WRITES} acknowledgements came too early",
        unsound.len()
    ));
    ensure!(unsound.len() > WRITES / 2, "the check does not see that nothing is flushed");
    Ok(())
}

/// Starts all nodes under strace, writes, and returns the writes that were acknowledged too early.
fn trace(stage: &mut Stage, is_again: bool) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for node in &mut stage.lab.nodes {
        let file = node.dir.join(format!("strace-{is_again}"));
        let words = ["strace", "-f", "-ttt", "-T", "-s", "64", "-o"];
        let mut wrapper: Vec<String> = words.iter().map(|word| (*word).into()).collect();
        wrapper.push(file.display().to_string());
        let calls = "trace=fdatasync,fsync,sendmsg,sendto,write,writev,read,recvfrom,recvmsg";
        wrapper.extend(["-e".into(), calls.into()]);
        node.start_with(wrapper).context("start under strace; apt-get install strace")?;
        files.push(file);
    }
    if !is_again {
        let founded = stage.lab.nodes[0].post("/v1/init", &serde_json::json!({}))?;
        let line = founded["join_line"].as_str().context("a join line")?.to_string();
        let token = line.rsplit(' ').next().context("a token")?;
        for node in &stage.lab.nodes[1..] {
            node.post("/v1/join", &serde_json::json!({ "token": token }))?;
        }
    }
    until("there is a leader", Duration::from_secs(30), || Ok(stage.label(0, "pi1", "ready").is_ok()))?;
    stage.wait_voters(3)?;
    let leader = stage.lab.leader()?;
    for write in 0..WRITES {
        stage.set_label(leader, "pi1", "write", &write.to_string())?;
        // Apart, so that one write's flush is not taken for the next one's.
        std::thread::sleep(Duration::from_millis(30));
    }
    let mut traces = Vec::new();
    for (node, file) in stage.lab.nodes.iter_mut().zip(&files) {
        node.kill_all()?;
        traces.push(Trace::parse(&fs::read_to_string(file)?));
    }
    too_early(&traces, leader)
}

/// Times in seconds since 1970, of one clock for all.
#[derive(Default)]
struct Trace {
    /// Begin and end of each flush.
    flushes: Vec<(f64, f64)>,
    requests: Vec<f64>,
    answers: Vec<f64>,
}

impl Trace {
    fn parse(text: &str) -> Trace {
        let mut trace = Trace::default();
        let mut unfinished: BTreeMap<String, (f64, bool)> = BTreeMap::new();
        for line in text.lines() {
            let mut words = line.splitn(3, char::is_whitespace).filter(|word| !word.is_empty());
            let Some(pid) = words.next() else { continue };
            let rest = line[pid.len()..].trim_start();
            let Some((time, call)) = rest.split_once(' ') else { continue };
            let Ok(time) = time.parse::<f64>() else { continue };
            let is_flush = call.starts_with("fdatasync(") || call.starts_with("fsync(");
            if call.ends_with("<unfinished ...>") {
                if is_flush {
                    unfinished.insert(pid.into(), (time, true));
                }
            } else if is_flush {
                let took = call.rsplit('<').next().and_then(|text| text.trim_end_matches('>').parse().ok());
                trace.flushes.push((time, time + took.unwrap_or(0.0)));
            } else if call.contains("resumed>")
                && call.contains("sync")
                && let Some((begin, _)) = unfinished.remove(pid)
            {
                trace.flushes.push((begin, time));
            }
            if call.contains("\"POST /v1/nodes/pi1/labels") {
                trace.requests.push(time);
            } else if call.contains("\"HTTP/1.1 2") {
                trace.answers.push(time);
            }
        }
        trace
    }

    fn has_flush_between(&self, from: f64, to: f64) -> bool {
        self.flushes.iter().any(|(begin, end)| *begin >= from && *end <= to)
    }
}

fn too_early(traces: &[Trace], leader: usize) -> Result<Vec<String>> {
    let own = &traces[leader];
    let requests = &own.requests[own.requests.len().saturating_sub(WRITES)..];
    if requests.len() < WRITES {
        bail!("strace saw {} of {WRITES} requests", requests.len());
    }
    let mut early = Vec::new();
    for (number, asked) in requests.iter().enumerate() {
        let answered = own.answers.iter().find(|time| *time > asked).context("each request was answered")?;
        let flushed = traces.iter().filter(|trace| trace.has_flush_between(*asked, *answered)).count();
        if flushed < 2 {
            early.push(format!(
                "write {number}: {flushed} disks within {:.1} ms",
                (answered - asked) * 1000.0
            ));
        }
    }
    Ok(early)
}
