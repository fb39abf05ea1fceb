//! What is killed, and what must not notice.

use super::Scenario;
use super::durability::{copy_of_log, entries_after};
use super::stage::{IMAGE, Stage, throughout, until, web};
use super::watcher::Watcher;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};
use tinydc::state::Command;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "container-kill",
        proves: "a container killed with -9 is replaced within 0.5 s",
        machines: 1,
        run: container_kill,
    },
    Scenario {
        name: "daemon-kill",
        proves: "a daemon killed with -9 and started again finds its containers with the same pids; they served all along",
        machines: 3,
        run: daemon_kill,
    },
    Scenario {
        name: "all-daemons-kill",
        proves: "every daemon killed with -9 at once and started again: nothing acknowledged is lost, containers ran on, \
                 and the log holds no entry that nothing asked for",
        machines: 3,
        run: all_daemons_kill,
    },
    Scenario {
        name: "leader-kill",
        proves: "when the leader's daemon is killed the next write is accepted by another",
        machines: 3,
        run: leader_kill,
    },
    Scenario {
        name: "leader-node-kill",
        proves: "the leading node dies whole: its instances serve elsewhere within 5 s",
        machines: 4,
        run: |stage| node_kill(stage, true),
    },
    Scenario {
        name: "follower-node-kill",
        proves: "another node dies whole: its instances serve elsewhere within 5 s",
        machines: 4,
        run: |stage| node_kill(stage, false),
    },
    Scenario {
        name: "leader-pause",
        proves: "a leader stopped for 10 s and woken again: at no time do two leaders accept writes, and nobody is marked \
                 down for having been unheard by it",
        machines: 3,
        run: leader_pause,
    },
    Scenario {
        name: "power-cut",
        proves: "all nodes lose power and return 0, 4 and 8 s later: no instance moves",
        machines: 3,
        run: power_cut,
    },
    Scenario {
        name: "pinned-volume",
        proves: "a service with data waits when its node dies, and comes back there with its data",
        machines: 4,
        run: pinned_volume,
    },
];

pub fn addresses(stage: &Stage) -> Vec<Ipv4Addr> {
    stage.lab.nodes.iter().map(|node| node.address).collect()
}

fn container_kill(stage: &mut Stage) -> Result<()> {
    stage.form(1)?;
    stage.deploy(0, "shop", &web(8080, 1, "a"))?;
    let address = stage.lab.nodes[0].address;
    let mut slowest = Duration::ZERO;
    // The second kill within a minute waits for the backoff of 1 s by design, so a fresh instance serves each round.
    for round in 0..3 {
        stage.deploy(0, "shop", &web(8080, 1, &format!("round{round}")))?;
        stage.wait_http(address, 8080, &format!("round{round}"), Duration::from_secs(10))?;
        stage.wait_up(0, "shop", 1, Duration::from_secs(10))?;
        let old = *stage.pids(0, "shop")?.values().next().context("it runs")?;
        let begin = Instant::now();
        stage.kill_process(old)?;
        until("another process runs", Duration::from_secs(5), || {
            let pids = stage.lab.nodes[0].container_pids()?;
            Ok(!pids.contains(&(old as i32)) && stage.http(address, 8080).is_ok())
        })?;
        slowest = slowest.max(begin.elapsed());
    }
    stage.remark(format!("killed → serving again, slowest of 3: {} ms", slowest.as_millis()));
    ensure!(slowest <= Duration::from_millis(500), "took {slowest:?}");
    Ok(())
}

fn daemon_kill(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    stage.deploy(0, "shop", &web(8080, 3, "a"))?;
    stage.wait_up(0, "shop", 3, Duration::from_secs(10))?;
    let before = stage.pids(0, "shop")?;
    ensure!(before.len() == 3);
    for index in 0..3 {
        let watcher = Watcher::start(stage, vec![stage.lab.nodes[index].address], 8080)?;
        stage.lab.nodes[index].kill_daemon()?;
        let begin = Instant::now();
        stage.lab.nodes[index].start()?;
        stage.note(&format!("{} answers again", stage.lab.nodes[index].name.clone()), begin);
        stage.wait_up(index, "shop", 3, Duration::from_secs(15))?;
        let seen = watcher.stop()?;
        ensure!(seen.longest_gap < Duration::from_secs(1), "its container served all along: {seen:?}");
        let after = stage.pids(index, "shop")?;
        ensure!(after == before, "pids changed from {before:?} to {after:?}");
    }
    Ok(())
}

fn all_daemons_kill(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    stage.deploy(0, "shop", &web(8080, 3, "a"))?;
    stage.wait_up(0, "shop", 3, Duration::from_secs(10))?;
    let before = stage.pids(0, "shop")?;
    // Every acknowledgement before the kill counts; the last one comes microseconds before it.
    let mut written = 0;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(1) {
        // In turn, so that each one's presence proves those before it.
        stage.set_label(written % 3, "pi1", "count", &written.to_string())?;
        written += 1;
    }
    for node in &stage.lab.nodes {
        node.signal(Signal::SIGKILL)?;
    }
    let killed = Instant::now();
    for node in &mut stage.lab.nodes {
        node.kill_daemon()?;
    }
    stage.remark(format!("{written} writes were acknowledged in the last second"));
    let last = (0..3).map(|index| copy_of_log(stage, index)).collect::<Result<Vec<_>>>()?;
    let last = last.iter().map(|log| log.last_index).max().unwrap_or(0);
    for node in &mut stage.lab.nodes {
        node.start()?;
    }
    until("all see a leader", Duration::from_secs(20), || Ok(stage.label(0, "pi2", "after").is_ok()))?;
    stage.note("killed → next write", killed);
    for index in 0..3 {
        stage.wait_up(index, "shop", 3, Duration::from_secs(15))?;
        let after = stage.pids(index, "shop")?;
        ensure!(after == before, "containers kept running: {before:?}, {after:?}");
        let node = stage.lab.nodes[index].get("/v1/nodes/pi1")?;
        let found = node["labels"]["count"].as_str().unwrap_or("none");
        ensure!(
            found.parse() == Ok(written - 1),
            "{written} writes were acknowledged, the last kept is {found}"
        );
    }
    // What is written without being asked for would be written while nothing happens.
    let quiet = stage.applied(0)?;
    throughout("an idle cluster writes nothing", Duration::from_secs(5), || {
        let now = stage.applied(0)?;
        ensure!(now == quiet, "applied went from {quiet} to {now}");
        Ok(true)
    })?;
    let log = copy_of_log(stage, 0)?;
    let extra: Vec<Command> = entries_after(&log, last)
        .into_iter()
        .filter(|command| !matches!(command, Command::NodeStarted { .. } | Command::LabelNode { .. }))
        .collect();
    ensure!(extra.is_empty(), "entries that nothing asked for: {extra:?}");
    Ok(())
}

fn leader_kill(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    for timers in ["card", "fast"] {
        stage.cli(0, &["settings", "timers", timers])?;
        let leader = stage.lab.leader()?;
        let asked = (leader + 1) % 3;
        let begin = Instant::now();
        stage.lab.nodes[leader].kill_daemon()?;
        until("a write is accepted", Duration::from_secs(10), || {
            Ok(stage.label(asked, "pi1", &format!("after-{timers}")).is_ok())
        })?;
        let took = begin.elapsed();
        stage.note(&format!("leader killed → next write, timers {timers}"), begin);
        // Two rounds of 25–35 ticks: the two that are left may vote for themselves at once.
        let limit = if timers == "card" { 7 } else { 2 };
        ensure!(took < Duration::from_secs(limit), "took {took:?}");
        stage.lab.nodes[leader].start()?;
        stage.wait_voters(3)?;
        stage.agree()?;
    }
    Ok(())
}

fn node_kill(stage: &mut Stage, is_leader: bool) -> Result<()> {
    stage.form(4)?;
    let leader = stage.lab.leader()?;
    let victim = if is_leader { leader } else { (leader + 1) % 3 };
    let name = stage.lab.nodes[victim].name.clone();
    stage.cli(0, &["node", "label", &name, "disk=ssd"])?;
    // The victim alone bears the label until its instance runs.
    let yaml = web(8080, 1, "a")
        .replace("replicas: 1}", "replicas: 1, placement: {constraints: [\"node.labels.disk == ssd\"]}}");
    let spare = (0..4).find(|index| *index != victim).context("there is another")?;
    stage.deploy(spare, "shop", &yaml)?;
    let other = stage.lab.nodes[spare].name.clone();
    stage.cli(spare, &["node", "label", &other, "disk=ssd"])?;
    let at = stage.lab.nodes[victim].address;
    stage.wait_http(at, 8080, "hello", Duration::from_secs(5))?;
    let watcher = Watcher::start(stage, addresses(stage), 8080)?;
    throughout("it serves", Duration::from_millis(500), || Ok(true))?;
    let begin = Instant::now();
    stage.lab.kill_node(victim)?;
    stage.wait_http(stage.lab.nodes[spare].address, 8080, "hello", Duration::from_secs(20))?;
    stage.note("node killed → serving elsewhere", begin);
    let seen = watcher.stop()?;
    stage.remark(format!("longest gap seen by a client {:.2} s", seen.longest_gap.as_secs_f64()));
    ensure!(seen.longest_gap <= Duration::from_secs(5), "longer than 5 s: {seen:?}");
    // It comes back as the node it was and takes nothing away from where it is.
    stage.lab.lan.mend(stage.lab.nodes[victim].number)?;
    stage.lab.nodes[victim].start()?;
    stage.lab.nodes[spare].wait("it is up again", Duration::from_secs(15), |node| {
        Ok(node.get(&format!("/v1/nodes/{name}"))?["state"] == "up")
    })?;
    let rows = stage.rows(spare, "shop")?;
    ensure!(rows.iter().filter(|row| row.is_up()).all(|row| row.node == other), "{rows:?}");
    Ok(())
}

fn leader_pause(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    stage.deploy(0, "shop", &web(8080, 3, "a"))?;
    stage.wait_up(0, "shop", 3, Duration::from_secs(10))?;
    let before = stage.pids(0, "shop")?;
    let paused = stage.lab.leader()?;
    let (first, second) = ((paused + 1) % 3, (paused + 2) % 3);
    let marked_before = downs(stage, first)?;
    stage.lab.nodes[paused].signal(Signal::SIGSTOP)?;
    let begin = Instant::now();
    until("the others have a leader", Duration::from_secs(8), || {
        Ok(stage.label(first, "pi1", "while").is_ok())
    })?;
    stage.note("leader stopped → next write", begin);
    until("ten seconds have passed", Duration::from_secs(11), || {
        Ok(begin.elapsed() >= Duration::from_secs(10))
    })?;
    stage.lab.nodes[paused].signal(Signal::SIGCONT)?;
    // What the woken one acknowledges must be seen by all: it does not lead any more.
    for round in 0..10 {
        let key = format!("woken{round}");
        if stage.label(paused, "pi1", &key).is_ok() {
            for index in [first, second] {
                ensure!(stage.has_label(index, "pi1", &key)?, "the old leader accepted {key} on its own");
            }
        }
    }
    stage.wait_up(first, "shop", 3, Duration::from_secs(10))?;
    stage.agree()?;
    throughout("nobody is marked down after it woke", Duration::from_secs(4), || {
        let marked = downs(stage, first)?;
        // The stopped node itself was rightly lost once.
        ensure!(marked <= marked_before + 1, "{marked} nodes were marked down, {marked_before} before");
        Ok(true)
    })?;
    for index in [first, second] {
        let name = &stage.lab.nodes[index].name;
        let kept = before
            .iter()
            .filter(|(_, pid)| stage.pids(index, "shop").is_ok_and(|now| now.values().any(|p| p == *pid)));
        ensure!(kept.count() >= 2, "instances on {name} were left alone");
    }
    Ok(())
}

/// How often a node was marked down, as events tell.
fn downs(stage: &Stage, index: usize) -> Result<usize> {
    let answer = tinydc::cli::lab::ask(&stage.lab.nodes[index].socket(), "GET", "/v1/events", &[])?;
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    let events = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let is_down = |event: &serde_json::Value| event["kind"] == "node_down";
    Ok(events.filter(is_down).count())
}

fn power_cut(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    stage.deploy(0, "shop", &web(8080, 3, "a"))?;
    stage.wait_up(0, "shop", 3, Duration::from_secs(10))?;
    let places = |stage: &Stage, index: usize| -> Result<Vec<(String, String, String)>> {
        let mut rows: Vec<_> =
            stage.rows(index, "shop")?.into_iter().map(|row| (row.id, row.name, row.node)).collect();
        rows.sort();
        Ok(rows)
    };
    let before = places(stage, 0)?;
    for node in &mut stage.lab.nodes {
        node.kill_all()?;
    }
    let begin = Instant::now();
    for (index, delay) in [(2, 0), (0, 4), (1, 8)] {
        until("it is its turn", Duration::from_secs(20), || {
            Ok(begin.elapsed() >= Duration::from_secs(delay))
        })?;
        stage.lab.nodes[index].start()?;
    }
    let all_on = Instant::now();
    stage.wait_up(0, "shop", 3, Duration::from_secs(30))?;
    stage.note("last board on → all instances run", all_on);
    for node in 0..3 {
        stage.wait_http(stage.lab.nodes[node].address, 8080, "hello", Duration::from_secs(5))?;
    }
    throughout("no instance moves", Duration::from_secs(5), || {
        let now = places(stage, 0)?;
        ensure!(now == before, "{before:?} became {now:?}");
        Ok(true)
    })
}

fn pinned_volume(stage: &mut Stage) -> Result<()> {
    stage.form(4)?;
    let yaml = format!(
        "services:\n  db:\n    image: {IMAGE}\n    environment: {{NAME: db}}\n    stop_grace_period: 1s\n    ports: [\"8090:8080\"]\n    \
         volumes: [\"data:/data\"]\n    deploy: {{placement: {{constraints: [\"node.hostname == pi4\"]}}}}\nvolumes:\n  data: {{}}\n"
    );
    let said = stage.deploy(0, "ledger", &yaml)?;
    ensure!(said.contains("pi4"), "deploy says where the data is: {said}");
    stage.cli(0, &["exec", "ledger/db", "sh", "-c", "echo precious > /data/word"])?;
    // The constraint must not be what holds it there.
    stage.deploy(
        0,
        "ledger",
        &yaml.replace("    deploy: {placement: {constraints: [\"node.hostname == pi4\"]}}\n", ""),
    )?;
    stage.lab.kill_node(3)?;
    let begin = Instant::now();
    stage.lab.nodes[0].wait("pi4 is down", Duration::from_secs(10), |node| {
        Ok(node.get("/v1/nodes/pi4")?["state"] == "down")
    })?;
    stage.note("node killed → down", begin);
    throughout("the instance waits", Duration::from_secs(3), || {
        Ok(stage.rows(0, "ledger")?.iter().all(|row| row.node == "pi4" || row.node.is_empty()))
    })?;
    let status = stage.cli(0, &["status", "ledger"])?;
    ensure!(status.contains("pi4 is down and holds its data"), "status says why: {status}");
    stage.lab.lan.mend(4)?;
    let begin = Instant::now();
    stage.lab.nodes[3].start()?;
    let address = stage.lab.nodes[3].address;
    stage.wait_http(address, 8090, "hello from db", Duration::from_secs(20))?;
    stage.note("node on → serving again", begin);
    until("its data is there", Duration::from_secs(5), || {
        Ok(stage.cli(0, &["exec", "ledger/db", "cat", "/data/word"])? == "precious\n")
    })
}
