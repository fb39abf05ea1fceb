//! From one machine to five.

use super::Scenario;
use super::stage::{Stage, web};
use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "one-node",
        proves: "init, image load, deploy, serve, logs, exec and ps work on a single machine",
        machines: 1,
        run: one_node,
    },
    Scenario {
        name: "grow",
        proves: "1 → 3 → 5 → 7 nodes: voters 1, 3, 3, 5; all copies of the state agree; every verb works against any node",
        machines: 7,
        run: grow,
    },
];

fn one_node(stage: &mut Stage) -> Result<()> {
    let node = &mut stage.lab.nodes[0];
    node.start()?;
    let refused = stage.cli_refused(0, &["deploy", "-f", "/dev/null"], 1).is_err();
    let said = stage.cli(0, &["init", "--name", "attic"])?;
    ensure!(said.contains("tinydc join tdc-join-"), "init prints the line to join: {said}");
    ensure!(said.contains("recovery key"), "init prints the recovery key: {said}");
    let again = stage.cli_refused(0, &["init"], 1)?;
    ensure!(again.contains("attic"), "a second init names the cluster: {again} {refused}");
    let archive = stage.lab.dir.join("busy.tar");
    std::fs::write(&archive, super::stage::image()?)?;
    let begin = Instant::now();
    stage.cli(0, &["image", "load", &archive.display().to_string()])?;
    stage.note("image loaded", begin);
    let begin = Instant::now();
    let said = stage.deploy(0, "shop", &web(8080, 1, "one"))?;
    stage.note("deployed", begin);
    let address = stage.lab.nodes[0].address;
    ensure!(said.contains(&format!("http://{address}:8080")), "deploy ends with where to open it: {said}");
    stage.wait_http(address, 8080, "hello from one", Duration::from_secs(5))?;
    let logs = stage.cli(0, &["logs", "shop/web"])?;
    ensure!(logs.contains("serving as one"), "logs show what was printed: {logs}");
    let output = stage.try_cli(0, &["exec", "shop/web", "sh", "-c", "echo $NAME; echo no >&2; exit 7"])?;
    ensure!(output.status.code() == Some(7), "exec returns the command's code: {:?}", output.status);
    ensure!(
        output.stdout == b"one\n" && output.stderr == b"no\n",
        "exec tells the streams apart: {output:?}"
    );
    let shown = stage.cli(0, &["ps"])?;
    ensure!(shown.contains("shop/web.1") && shown.contains("running"), "{shown}");
    let shown = stage.cli(0, &["ls"])?;
    ensure!(shown.contains("shop") && shown.contains("1/1"), "{shown}");
    stage.cli(0, &["rm", "shop"])?;
    stage.lab.nodes[0].wait("its containers are gone", Duration::from_secs(10), |node| {
        Ok(node.container_pids()?.is_empty())
    })
}

fn grow(stage: &mut Stage) -> Result<()> {
    stage.form(1)?;
    stage.deploy(0, "shop", &web(8080, 1, "grow"))?;
    for (nodes, voters) in [(3, 3), (5, 3), (7, 5)] {
        let begin = Instant::now();
        let token = stage.cli(0, &["token"])?;
        let token = token.split_whitespace().last().context("token prints a line")?.to_string();
        for index in 0..nodes {
            if !stage.lab.nodes[index].is_running() {
                stage.lab.nodes[index].start()?;
                stage.cli(index, &["join", &token])?;
            }
        }
        // The last voters of seven are taken once they have been steady for a minute.
        wait_voters(stage, voters)?;
        stage.note(&format!("{nodes} nodes, {voters} voters"), begin);
        stage.agree()?;
    }
    for index in 0..7 {
        let name = &stage.lab.nodes[index].name;
        for words in [
            &["ps", "shop"][..],
            &["ls"],
            &["status"],
            &["logs", "shop/web"],
            &["exec", "shop/web", "echo", "hi"],
            &["node", "ls"],
            &["node", "inspect", "pi1"],
            &["image", "ls"],
            &["events"],
            &["settings"],
            &["token", "ls"],
            &["user", "ls"],
            &["version"],
        ] {
            stage.cli(index, words).with_context(|| format!("against {name}"))?;
        }
        stage.cli(index, &["node", "label", "pi1", &format!("seen-by={name}")])?;
        stage.cli(index, &["scale", &format!("shop/web={}", 1 + index % 2), "--timeout", "30s"])?;
    }
    stage.agree()
}

fn wait_voters(stage: &Stage, wanted: usize) -> Result<()> {
    let begin = Instant::now();
    loop {
        match stage.wait_voters(wanted) {
            Ok(()) => return Ok(()),
            Err(error) if begin.elapsed() > Duration::from_secs(80) => return Err(error),
            Err(_) => {}
        }
    }
}
