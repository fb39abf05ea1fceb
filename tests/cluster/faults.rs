//! The network between nodes fails.

use super::Scenario;
use super::stage::{Stage, throughout, until, web};
use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};
use tinydc::cli::lab;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "partition",
        proves: "a leader cut off from the others accepts no write and says so within 5 s, reads there are marked stale, \
                 its containers run on; the others go on; once mended all agree again",
        machines: 3,
        run: partition,
    },
    Scenario {
        name: "no-quorum",
        proves: "two of three nodes are gone: the last one answers reads, logs and exec, refuses writes with one sentence, \
                 and its app serves on",
        machines: 3,
        run: no_quorum,
    },
    Scenario {
        name: "exclusive",
        proves: "an exclusive service is dead on a node that was cut off, or whose daemon was killed, before another \
                 node starts it; nothing else ends it",
        machines: 3,
        run: exclusive,
    },
];

/// Five seconds, and what it takes to be told.
const REFUSAL_LIMIT: Duration = Duration::from_millis(5_500);

/// A write at a node without a quorum: refused in time, with the sentence that protocol 5 gives.
fn is_refused(stage: &mut Stage, index: usize) -> Result<()> {
    let body = serde_json::json!({ "set": { "lost": "yes" }, "remove": [] }).to_string();
    let begin = Instant::now();
    let answer = lab::ask(&stage.lab.nodes[index].socket(), "POST", "/v1/nodes/pi1/labels", body.as_bytes())?;
    let took = begin.elapsed();
    stage.note("write without a quorum refused", begin);
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    ensure!(matches!(answer.status, 503 | 504), "answered {} {text}", answer.status);
    ensure!(took <= REFUSAL_LIMIT, "the refusal took {took:?}");
    ensure!(text.contains("apps go on, changes wait"), "{text}");
    ensure!(text.contains("was not made") || text.contains("may still take effect"), "{text}");
    Ok(())
}

fn partition(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    stage.deploy(0, "shop", &web(8080, 3, "a"))?;
    stage.wait_up(0, "shop", 3, Duration::from_secs(10))?;
    let cut = stage.lab.leader()?;
    let other = (cut + 1) % 3;
    let pids = stage.lab.nodes[cut].container_pids()?;
    stage.lab.lan.cut(stage.lab.nodes[cut].number)?;
    let begin = Instant::now();
    is_refused(stage, cut)?;
    until("the majority writes", Duration::from_secs(10), || {
        Ok(stage.label(other, "pi1", "majority").is_ok())
    })?;
    stage.note("leader cut off → the others accept a write", begin);
    is_refused(stage, cut)?;
    let status = stage.lab.nodes[cut].get("/v1/status")?;
    let stale = status["stale"].as_str().unwrap_or_default().to_string();
    ensure!(stale.contains("no leader for") || stale.contains("leads but"), "a read is marked: {stale:?}");
    let shown = stage.try_cli(cut, &["ps"])?;
    ensure!(shown.status.success(), "ps answers from the copy");
    let at = stage.lab.nodes[cut].address;
    let netns = stage.lab.nodes[cut].netns.clone();
    until("its container serves on its side", Duration::from_secs(3), || {
        let asked =
            tinydc::linux::netns::in_netns(&netns, move || super::stage::http_here((at, 8080).into()));
        Ok(asked.is_ok())
    })?;
    ensure!(stage.lab.nodes[cut].container_pids()?.is_superset(&pids), "its containers run on");
    stage.lab.lan.mend(stage.lab.nodes[cut].number)?;
    let begin = Instant::now();
    until("all accept writes", Duration::from_secs(15), || Ok(stage.label(cut, "pi1", "mended").is_ok()))?;
    stage.agree()?;
    stage.note("mended → all agree", begin);
    for index in 0..3 {
        ensure!(stage.has_label(index, "pi1", "majority")?, "the majority's write is everywhere");
    }
    let answer = stage.lab.nodes[cut].get("/v1/status")?;
    ensure!(answer["stale"].is_null(), "reads are no longer marked");
    // Where the cut-off node's instance was placed anew, one of the two goes, and there is peace again.
    stage.wait_up(0, "shop", 3, Duration::from_secs(20))
}

fn no_quorum(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    stage.deploy(0, "shop", &web(8080, 3, "a"))?;
    stage.wait_up(0, "shop", 3, Duration::from_secs(10))?;
    let last = stage.lab.leader()?;
    for index in (0..3).filter(|index| *index != last) {
        stage.lab.kill_node(index)?;
    }
    until("it knows that nobody leads", Duration::from_secs(12), || {
        let status = stage.lab.nodes[last].get("/v1/status")?;
        Ok(status["stale"].as_str().is_some_and(|text| text.contains("2 of 3 voters")))
    })?;
    is_refused(stage, last)?;
    let name = stage.lab.nodes[last].name.clone();
    let rows = stage.rows(last, "shop")?;
    let own = rows.iter().find(|row| row.node == name).map(|row| row.name.clone()).unwrap_or_default();
    let said = stage.cli(last, &["logs", &own])?;
    ensure!(said.contains("serving as a"), "logs need no quorum: {said}");
    let output = stage.try_cli(last, &["exec", &own, "echo", "hi"])?;
    ensure!(output.status.success() && output.stdout == b"hi\n", "exec needs no quorum: {output:?}");
    let address = stage.lab.nodes[last].address;
    throughout("it serves on", Duration::from_secs(2), || Ok(stage.http(address, 8080).is_ok()))?;
    let refused = stage.cli_refused(last, &["node", "label", "pi1", "a=b"], 3);
    // What may still take effect has its own exit code.
    if refused.is_err() {
        stage.cli_refused(last, &["node", "label", "pi1", "a=b"], 4)?;
    }
    Ok(())
}

fn exclusive(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let yaml = web(8080, 1, "only").replacen("  web:\n", "  web:\n    x-tinydc: {exclusive: true}\n", 1);
    stage.deploy(0, "one", &yaml)?;
    stage.wait_up(0, "one", 1, Duration::from_secs(10))?;
    let before = stage.pids(0, "one")?;
    throughout("it runs on past its lease", Duration::from_secs(12), || Ok(stage.pids(0, "one")? == before))?;
    let cut = holder(stage)?;
    stage.lab.lan.cut(stage.lab.nodes[cut].number)?;
    let begin = Instant::now();
    let next = moved(stage, cut)?;
    stage.note("cut off → runs elsewhere, the old one dead before", begin);
    stage.lab.lan.mend(stage.lab.nodes[cut].number)?;
    let runs_once = |stage: &Stage| -> Result<bool> {
        let pids = (0..3).map(|index| stage.lab.nodes[index].container_pids());
        let pids = pids.collect::<Result<Vec<_>>>()?;
        Ok(pids.iter().filter(|pids| !pids.is_empty()).count() == 1)
    };
    throughout("one copy after the mend", Duration::from_secs(4), || runs_once(stage))?;
    stage.lab.nodes[next].kill_daemon()?;
    ensure!(!stage.lab.nodes[next].container_pids()?.is_empty(), "containers outlive the daemon at first");
    let begin = Instant::now();
    moved(stage, next)?;
    stage.note("daemon killed → runs elsewhere, the old one dead before", begin);
    Ok(())
}

/// The machine whose kernel runs a container.
fn holder(stage: &Stage) -> Result<usize> {
    for index in 0..3 {
        if !stage.lab.nodes[index].container_pids()?.is_empty() {
            return Ok(index);
        }
    }
    anyhow::bail!("no machine runs a container")
}

/// Watches all kernels until another machine runs the service; two at a time are an error.
fn moved(stage: &Stage, from: usize) -> Result<usize> {
    let mut to = None;
    until("it runs elsewhere", Duration::from_secs(30), || {
        let is_old_alive = !stage.lab.nodes[from].container_pids()?.is_empty();
        for index in (0..3).filter(|index| *index != from) {
            if !stage.lab.nodes[index].container_pids()?.is_empty() {
                to = Some((index, is_old_alive));
            }
        }
        Ok(to.is_some())
    })?;
    let (to, is_old_alive) = to.context("it runs elsewhere")?;
    ensure!(!is_old_alive, "two copies at a time");
    Ok(to)
}
