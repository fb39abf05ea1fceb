//! How machines and laptops come into a cluster without a token: by the code that a machine shows, or by a key.

use super::Scenario;
use super::people::Laptop;
use super::stage::{Stage, throughout, until, web};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::process::Command;
use std::time::{Duration, Instant};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "join_by_code",
        proves: "machines without a cluster announce themselves, and a member takes each in by the code on its display; \
                 five wrong tries make a new code; an expired token is told with its date and the remedy",
        machines: 3,
        run: join_by_code,
    },
    Scenario {
        name: "two_clusters_one_lan",
        proves: "two clusters on one LAN each take in their own machines by code, and never mix",
        machines: 4,
        run: two_clusters_one_lan,
    },
    Scenario {
        name: "laptop_by_code",
        proves: "a laptop founds a cluster on a board by its code and deploys from there; another laptop gets in by a code, \
                 once; a third by the SSH key that the board's configuration names",
        machines: 1,
        run: laptop_by_code,
    },
    Scenario {
        name: "bootstrap_once",
        proves: "of two boards that would found the same cluster one does, and the other says why it doesn't; the first \
                 shows the code that gives a laptop its access",
        machines: 2,
        run: bootstrap_once,
    },
];

/// A tick of an announcement, and a board's patience.
const HEARD: Duration = Duration::from_secs(15);

fn joining(stage: &Stage, index: usize) -> Result<Value> {
    stage.lab.nodes[index].get("/v1/joining")
}

fn code_of(stage: &Stage, index: usize) -> Result<String> {
    Ok(joining(stage, index)?["code"].as_str().context("it shows a code")?.into())
}

/// Another code than this.
fn wrong(code: &str) -> &'static str {
    if code == "111111" { "222222" } else { "111111" }
}

fn wait_listed(stage: &Stage, index: usize, names: &[&str]) -> Result<()> {
    until(&format!("pending lists {names:?}"), HEARD, || {
        let pending = stage.lab.nodes[index].get("/v1/pending")?;
        let all = pending["machines"].as_array().cloned().unwrap_or_default();
        let listed: Vec<&str> = all.iter().filter_map(|machine| machine["name"].as_str()).collect();
        match listed == names {
            true => Ok(true),
            false => bail!("{listed:?}"),
        }
    })
}

fn names_of(stage: &Stage, index: usize) -> Result<Vec<String>> {
    let nodes = stage.lab.nodes[index].get("/v1/nodes")?;
    let all = nodes["nodes"].as_array().cloned().unwrap_or_default();
    Ok(all.iter().filter_map(|node| node["name"].as_str().map(String::from)).collect())
}

fn wait_up(stage: &Stage, index: usize, names: &[&str]) -> Result<()> {
    until(&format!("{names:?} are up"), Duration::from_secs(20), || {
        let nodes = stage.lab.nodes[index].get("/v1/nodes")?;
        let all = nodes["nodes"].as_array().cloned().unwrap_or_default();
        let is_up = |name: &&str| all.iter().any(|node| node["name"] == **name && node["state"] == "up");
        Ok(names.iter().all(is_up) && all.len() == names.len())
    })
}

/// A third machine whose configuration holds a token that has expired.
fn start_with_expired_token(stage: &mut Stage) -> Result<()> {
    let line = stage.cli(0, &["token", "--valid", "1s"])?;
    let token = line.split_whitespace().last().context("token prints a line")?.to_string();
    until("the token has expired", HEARD, || {
        let tokens = stage.lab.nodes[0].get("/v1/tokens")?;
        let all = tokens["tokens"].as_array().cloned().unwrap_or_default();
        Ok(all.last().is_some_and(|token| token["is_expired"] == true))
    })?;
    stage.lab.nodes[2].set_config(&format!("join = {token:?}"));
    stage.lab.nodes[2].start()?;
    until("it says why its token brings it nowhere", HEARD, || {
        let problem = joining(stage, 2)?["problem"].as_str().unwrap_or_default().to_string();
        Ok(problem.contains("expired at 20") && problem.contains("make a new one on a member: tinydc token"))
    })?;
    stage.remark(joining(stage, 2)?["problem"].as_str().unwrap_or_default().into());
    let said = stage.cli_refused(1, &["join", &token], 1)?;
    ensure!(said.contains("expired at 20") && said.contains("hint: make a new one"), "{said}");
    Ok(())
}

fn join_by_code(stage: &mut Stage) -> Result<()> {
    for node in &mut stage.lab.nodes[..2] {
        node.start()?;
    }
    stage.cli(0, &["init"])?;
    start_with_expired_token(stage)?;
    let begin = Instant::now();
    wait_listed(stage, 0, &["pi2", "pi3"])?;
    stage.note("a machine without a cluster is listed", begin);
    let (second, third) = (code_of(stage, 1)?, code_of(stage, 2)?);
    ensure!(stage.log_of(1).contains(&second), "the log shows the code");
    ensure!(stage.cli(1, &["join"])?.contains(&second), "join alone shows it");
    ensure!(stage.cli(1, &["status"])?.contains(&second), "so does status");
    let listed = stage.cli(0, &["node", "pending"])?;
    stage.remark(format!("node pending: {}", listed.lines().nth(1).unwrap_or_default()));
    ensure!(!listed.contains(&second), "no code is listed");

    for _ in 0..5 {
        ensure!(code_of(stage, 1)? == second, "four wrong tries change nothing");
        let said = stage.cli_refused(0, &["node", "accept", wrong(&second), "pi2"], 1)?;
        ensure!(said.contains("five wrong tries"), "it says what will happen: {said}");
    }
    let renewed = code_of(stage, 1)?;
    ensure!(renewed != second, "five wrong tries make a new code");
    ensure!(stage.log_of(1).contains("five wrong codes were tried"), "the log says so");
    let said = stage.cli_refused(0, &["node", "accept", &renewed, "pi2"], 1)?;
    ensure!(said.contains("too many wrong codes"), "guessing is slowed: {said}");
    let begin = Instant::now();
    until("the new code serves", HEARD, || Ok(stage.cli(0, &["node", "accept", &renewed, "pi2"]).is_ok()))?;
    stage.note("five wrong tries → the new code serves", begin);
    // Only one waits now: its name need not be said.
    wait_listed(stage, 0, &["pi3"])?;
    let begin = Instant::now();
    let said = stage.cli(0, &["node", "accept", &third])?;
    stage.note("node accept", begin);
    ensure!(said.contains("pi3 is a member of cluster home"), "{said}");
    wait_up(stage, 0, &["pi1", "pi2", "pi3"])?;
    stage.wait_voters(3)?;
    ensure!(joining(stage, 2)?["state"] == "member", "it knows so itself");
    stage.cli_refused(0, &["node", "accept", &third], 1).map(drop)
}

fn two_clusters_one_lan(stage: &mut Stage) -> Result<()> {
    for node in &mut stage.lab.nodes {
        node.start()?;
    }
    stage.cli(0, &["init"])?;
    stage.cli(1, &["init", "--name", "barn"])?;
    for index in [0, 1] {
        wait_listed(stage, index, &["pi3", "pi4"])?;
    }
    // Neither names the machine: the other's counts one wrong try.
    let (third, fourth) = (code_of(stage, 2)?, code_of(stage, 3)?);
    stage.cli(1, &["node", "accept", &fourth])?;
    stage.cli(0, &["node", "accept", &third])?;
    for (index, cluster, names) in [
        (0, "home", ["pi1", "pi3"]),
        (2, "home", ["pi1", "pi3"]),
        (1, "barn", ["pi2", "pi4"]),
        (3, "barn", ["pi2", "pi4"]),
    ] {
        wait_up(stage, index, &names)?;
        ensure!(joining(stage, index)?["cluster"] == cluster, "{names:?} are of {cluster}");
    }
    throughout("the clusters stay apart", Duration::from_secs(6), || {
        Ok(names_of(stage, 0)? == ["pi1", "pi3"] && names_of(stage, 1)? == ["pi2", "pi4"])
    })?;
    // Whoever joined may still be announced for some seconds, but shows no code any more.
    stage.cli_refused(0, &["node", "accept", &fourth, &stage.lab.nodes[3].address.to_string()], 1).map(drop)
}

fn laptop_by_code(stage: &mut Stage) -> Result<()> {
    stage.lab.nodes[0].start()?;
    let board = stage.lab.nodes[0].address.to_string();
    let ann = Laptop::new(stage, "ann", 100)?;
    let code = code_of(stage, 0)?;
    ann.refused(&["init", "--board", wrong(&code), "--user", "ann"], 1)?;
    let begin = Instant::now();
    // No address: the laptop hears the board by mDNS.
    let said = ann.cli(&["init", "--board", &code, "--user", "ann"])?;
    stage.note("init --board from a laptop → context", begin);
    ensure!(said.contains("Cluster home is founded") && said.contains("recovery key"), "{said}");
    stage.load(0)?;
    ann.write("compose.yaml", &web(8080, 1, "laptop"))?;
    ann.cli(&["deploy", "--name", "shop", "--timeout", "30s"])?;
    stage.wait_http(stage.lab.nodes[0].address, 8080, "hello from laptop", Duration::from_secs(10))?;

    let line = ann.cli(&["token", "--user", "bob", "--code"])?;
    let code = line.split_whitespace().last().context("a code ends the line")?.to_string();
    ensure!(line.contains(&board), "the line names the node: {line}");
    let bob = Laptop::new(stage, "bob", 101)?;
    let create = ["context", "create", "home", "--host", &board, "--code"];
    bob.refused(&[&create[..], &[wrong(&code)]].concat(), 1)?;
    bob.cli(&[&create[..], &[&code]].concat())?;
    ensure!(bob.cli(&["ps"])?.contains("shop"), "bob is in");
    let eve = Laptop::new(stage, "eve", 102)?;
    eve.refused(&[&create[..], &[&code]].concat(), 1)?;
    by_key(stage, &board)
}

/// The board's configuration names a key; the laptop that holds it gets in, another one doesn't.
fn by_key(stage: &mut Stage, board: &str) -> Result<()> {
    let folder = stage.lab.dir.join("keys");
    std::fs::create_dir_all(&folder)?;
    for (name, passphrase) in [("carl", ""), ("dora", ""), ("locked", "secret words")] {
        let file = folder.join(name);
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", passphrase, "-C", &format!("{name}@laptop"), "-f"])
            .arg(&file)
            .status()
            .context("run ssh-keygen (openssh-client)")?;
        ensure!(made.success(), "ssh-keygen makes a key");
    }
    let text = |name: &str| std::fs::read_to_string(folder.join(name));
    let line = text("carl.pub")?;
    stage.lab.nodes[0].stop()?;
    stage.lab.nodes[0].set_config(&format!("operators = [{:?}]", line.trim()));
    stage.lab.nodes[0].start()?;
    until("the board serves again", Duration::from_secs(20), || {
        Ok(stage.lab.nodes[0].get("/v1/nodes").is_ok())
    })?;
    let carl = Laptop::new(stage, "carl", 103)?;
    for name in ["carl", "dora", "locked"] {
        carl.write(name, &text(name)?)?;
    }
    let create = ["context", "create", "home", "--host", board, "--ssh-key"];
    let said = carl.refused(&[&create[..], &["dora"]].concat(), 1)?;
    ensure!(said.contains("operators"), "another key is told where to go: {said}");
    let said = carl.refused(&[&create[..], &["locked"]].concat(), 1)?;
    ensure!(said.contains("passphrase") && said.contains("ssh-keygen"), "a locked key has a remedy: {said}");
    let begin = Instant::now();
    carl.cli(&[&create[..], &["carl"]].concat())?;
    stage.note("context by an SSH key", begin);
    carl.cli(&["scale", "shop/web=1"])?;
    let users = stage.lab.nodes[0].get("/v1/users")?;
    let names: Vec<&str> =
        users["users"].as_array().into_iter().flatten().filter_map(|user| user["name"].as_str()).collect();
    ensure!(names == ["ann", "bob", "carl"], "each is known by name: {names:?}");
    Ok(())
}

fn bootstrap_once(stage: &mut Stage) -> Result<()> {
    let begin = Instant::now();
    for node in &mut stage.lab.nodes {
        node.set_config("bootstrap = true");
        node.start()?;
    }
    let state = |stage: &Stage, index: usize| {
        Ok::<_, anyhow::Error>(joining(stage, index)?["state"].as_str().unwrap_or_default().to_string())
    };
    ensure!(state(stage, 0)? == "listening", "a board listens before it founds");
    until("one founds the cluster", Duration::from_secs(40), || {
        Ok((0..2).any(|index| state(stage, index).is_ok_and(|state| state == "member")))
    })?;
    stage.note("switched on → founded", begin);
    let founder = if state(stage, 0)? == "member" { 0 } else { 1 };
    let other = 1 - founder;
    until("the other says why it founds nothing", Duration::from_secs(40), || {
        let shown = joining(stage, other)?;
        let why = shown["problem"].as_str().unwrap_or_default();
        Ok(shown["state"] == "waiting" && why.contains("founds nothing") && why.contains("node accept"))
    })?;
    let said = stage.cli(other, &["join"])?;
    stage.remark(format!("it says: {}", said.lines().last().unwrap_or_default()));

    // The first board shows how a laptop gets in; the laptop takes the other one in.
    let shown = joining(stage, founder)?;
    let code = shown["code"].as_str().context("the founder shows a code")?.to_string();
    ensure!(shown["code_for"] == "operator", "{shown}");
    let host = stage.lab.nodes[founder].address.to_string();
    let ann = Laptop::new(stage, "ann", 100)?;
    ann.cli(&["context", "create", "home", "--host", &host, "--code", &code])?;
    ensure!(joining(stage, founder)?["code"] == json!(null), "the code has served");
    ann.cli(&["node", "accept", &code_of(stage, other)?])?;
    let names = if founder == 0 { ["pi1", "pi2"] } else { ["pi2", "pi1"] };
    wait_up(stage, founder, &names)
}
