//! Who is let in, and who is not.

use super::Scenario;
use super::stage::{Stage, refusal, throughout, until, web};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tinydc::network::link;
use tinydc::network::netlink::Socket;
use tinydc::transport::token::{Token, TokenKind, TokenSecret};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "hostile-join",
        proves: "a mistyped, wrong, expired, revoked or foreign token, a once-token shown by a second key, and a machine whose networks \
                 overlap the cluster's, let nobody \
                 in and say why; each leaves the cluster as it was",
        machines: 3,
        run: hostile_join,
    },
    Scenario {
        name: "cloned-card",
        proves: "a copy of a node's data directory, started elsewhere, is refused while the original goes on",
        machines: 3,
        run: cloned_card,
    },
    Scenario {
        name: "old-backup",
        proves: "a node that comes back with an old copy of its disk is refused, and the cluster goes on without it",
        machines: 3,
        run: old_backup,
    },
    Scenario {
        name: "leave",
        proves: "leave and node rm refuse while the node holds the only copy of a volume, --force overrides, and a node \
                 that left keeps no trace but its volumes",
        machines: 4,
        run: leave,
    },
    Scenario {
        name: "clock-1970",
        proves: "a board whose clock stands at 1970 joins and runs apps",
        machines: 3,
        run: clock_1970,
    },
    Scenario {
        name: "cluster-key",
        proves: "only voters hold the cluster key: demoted ones delete it; when all copies are lost the recovery key that \
                 init printed restores it",
        machines: 7,
        run: cluster_key,
    },
];

fn token(stage: &Stage, words: &[&str]) -> Result<String> {
    let said = stage.cli(0, &[&["token"], words].concat())?;
    Ok(said.split_whitespace().last().context("token prints a line")?.to_string())
}

fn count_nodes(stage: &Stage) -> Result<usize> {
    let nodes = stage.lab.nodes[0].get("/v1/nodes")?;
    Ok(nodes["nodes"].as_array().map_or(0, Vec::len))
}

fn hostile_join(stage: &mut Stage) -> Result<()> {
    stage.form(1)?;
    let good = token(stage, &[])?;
    stage.lab.nodes[1].start()?;
    stage.lab.nodes[2].start()?;
    let inside = |change: fn(&Socket, u32, Ipv4Addr, u8) -> std::io::Result<()>| {
        stage.lab.nodes[1].inside(move || {
            change(&Socket::route()?, link::index_of("eth0")?, Ipv4Addr::new(10, 77, 9, 9), 24)
        })
    };
    inside(link::add_address)?;
    let said = stage.cli_refused(1, &["join", &good], 1)?;
    ensure!(
        said.contains("10.77.9.9/24 (eth0)") && said.contains("--container-range 10."),
        "a machine with a network inside the cluster's ranges: {said}"
    );
    inside(link::delete_address)?;
    let mistyped: String = {
        let mut letters: Vec<char> = good.chars().collect();
        let at = letters.len() - 12;
        letters[at] = if letters[at] == 'q' { 'w' } else { 'q' };
        letters.into_iter().collect()
    };
    let said = stage.cli_refused(1, &["join", &mistyped], 2)?;
    ensure!(said.contains("copy the whole line"), "a mistyped token: {said}");
    let mut wrong = Token::from_text(TokenKind::Join, &good)?;
    wrong.secret = TokenSecret::create()?;
    let said = stage.cli_refused(1, &["join", &wrong.to_text(TokenKind::Join)], 1)?;
    ensure!(said.contains("not valid"), "a wrong secret: {said}");
    let mut foreign = Token::from_text(TokenKind::Join, &good)?;
    foreign.authority.0[0] ^= 1;
    let begin = Instant::now();
    let said = stage.try_cli(1, &["join", &foreign.to_text(TokenKind::Join)])?;
    stage.note("a token of another cluster's CA refused", begin);
    ensure!(!said.status.success(), "a foreign CA's token joined");
    let user = token(stage, &["--user", "ann"])?;
    let said = stage.cli_refused(1, &["join", &user], 2)?;
    ensure!(said.contains("for a laptop"), "a laptop's token: {said}");
    let short = token(stage, &["--valid", "1s"])?;
    let begin = Instant::now();
    until("it expires", Duration::from_secs(3), || Ok(begin.elapsed() > Duration::from_millis(1500)))?;
    let said = stage.cli_refused(1, &["join", &short], 1)?;
    ensure!(said.contains("expired"), "an expired token: {said}");
    ensure!(count_nodes(stage)? == 1, "nobody was let in");
    // Five failures a minute close the door for this address; the other machine has its own count.
    let revoked = token(stage, &[])?;
    let id = Token::from_text(TokenKind::Join, &revoked)?.id;
    stage.cli(0, &["token", "rm", &id.to_string()])?;
    let said = stage.cli_refused(2, &["join", &revoked], 1)?;
    ensure!(said.contains("not valid"), "a revoked token: {said}");
    let once = token(stage, &["--once"])?;
    stage.cli(2, &["join", &once])?;
    let said = stage.cli_refused(1, &["join", &once], 1)?;
    ensure!(
        said.contains("used by another key") || said.contains("too many"),
        "a once-token replayed: {said}"
    );
    let refused = stage.cli_refused(2, &["join", &good], 1)?;
    ensure!(refused.contains("home"), "a member refuses to join and names its cluster: {refused}");
    ensure!(count_nodes(stage)? == 2, "only the one was let in");
    Ok(())
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).output()?;
    ensure!(copied.status.success(), "copy {}: {}", from.display(), String::from_utf8_lossy(&copied.stderr));
    Ok(())
}

fn cloned_card(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    stage.deploy(0, "shop", &web(8080, 2, "a"))?;
    let original = 1;
    let folder = stage.lab.nodes[original].data_dir();
    let node = stage.lab.add_node()?;
    fs::create_dir_all(node.data_dir())?;
    let clone_dir = node.data_dir();
    for part in ["identity", "state.db", "state.db-wal", "peers"] {
        if folder.join(part).exists() {
            copy_folder(&folder.join(part), &clone_dir.join(part))?;
        }
    }
    let begin = Instant::now();
    // It may serve its own copy or end by itself; it must not be heard.
    let started = stage.lab.nodes[3].start();
    until("the refusal is told", Duration::from_secs(20), || {
        let logs: String = (0..4).map(|index| stage.log_of(index)).collect();
        Ok(logs.contains("copy of its card") || logs.contains("another board"))
    })?;
    stage.note(
        &format!(
            "a cloned card refused (its daemon {})",
            if started.is_ok() { "serves its copy" } else { "does not serve" }
        ),
        begin,
    );
    throughout("the original goes on", Duration::from_secs(4), || {
        let node = stage.lab.nodes[0].get("/v1/nodes/pi2")?;
        ensure!(node["state"] == "up", "pi2 is {}", node["state"]);
        stage.label(original, "pi2", "original")?;
        Ok(true)
    })?;
    let node = stage.lab.nodes[0].get("/v1/nodes/pi2")?;
    ensure!(node["address"] == "10.99.0.2", "its address is still its own: {}", node["address"]);
    Ok(())
}

fn old_backup(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let victim = (stage.lab.leader()? + 1) % 3;
    let other = (victim + 1) % 3;
    let folder = stage.lab.nodes[victim].data_dir();
    let backup = stage.lab.dir.join("backup");
    fs::create_dir_all(&backup)?;
    stage.lab.nodes[victim].stop()?;
    for part in ["state.db", "state.db-wal"] {
        if folder.join(part).exists() {
            copy_folder(&folder.join(part), &backup.join(part))?;
        }
    }
    stage.lab.nodes[victim].start()?;
    for round in 0..20 {
        stage.set_label(victim, "pi1", "round", &round.to_string())?;
    }
    stage.lab.nodes[victim].kill_all()?;
    for part in ["state.db", "state.db-wal", "state.db-shm"] {
        let _ = fs::remove_file(folder.join(part));
        if backup.join(part).exists() {
            copy_folder(&backup.join(part), &folder.join(part))?;
        }
    }
    let begin = Instant::now();
    let _ = stage.lab.nodes[victim].start();
    let name = stage.lab.nodes[victim].name.clone();
    until("the refusal is told", Duration::from_secs(20), || {
        Ok((0..3).any(|index| stage.log_of(index).contains("an old backup of its card")))
    })?;
    stage.note("an old backup refused", begin);
    stage.set_label(other, "pi1", "round", "after")?;
    until("it counts as lost", Duration::from_secs(10), || {
        Ok(stage.lab.nodes[other].get(&format!("/v1/nodes/{name}"))?["state"] == "down")
    })
}

fn leave(stage: &mut Stage) -> Result<()> {
    stage.form(4)?;
    let yaml = "services:\n  db:\n    image: busy:1\n    stop_grace_period: 1s\n    volumes: [\"data:/data\"]\n    deploy: {placement: {constraints: [\"node.hostname == pi4\"]}}\nvolumes:\n  data: {}\n";
    stage.cli(0, &["settings", "ipv6", "true"])?;
    stage.deploy(0, "ledger", yaml)?;
    for said in [stage.cli_refused(3, &["leave"], 1)?, stage.cli_refused(0, &["node", "rm", "pi4"], 1)?] {
        ensure!(
            said.contains("data") && said.contains("--force"),
            "it lists the volume and the way on: {said}"
        );
    }
    let tags = stage.lab.tags();
    let begin = Instant::now();
    stage.cli(3, &["leave", "--force"])?;
    until("it is no member", Duration::from_secs(20), || Ok(count_nodes(stage)? == 3))?;
    let path = stage.lab.nodes[3].data_dir();
    until("its traces are gone", Duration::from_secs(20), || {
        let left: Vec<&str> = ["identity", "state.db", "blobs", "layers", "instances"]
            .into_iter()
            .filter(|part| path.join(part).exists())
            .collect();
        ensure!(left.is_empty(), "left: {left:?}");
        Ok(true)
    })?;
    stage.note("leave --force → no trace", begin);
    ensure!(path.join("volumes/ledger/data").exists(), "its volume stays");
    let still = stage.lab.tags();
    let tag = tags.into_iter().find(|tag| !still.contains(tag)).context("pi4 had a tag")?;
    until("no rule, link, route or cgroup of it is left", Duration::from_secs(5), || {
        const ALL: &str =
            "nft list ruleset && ip -o link && ip rule && ip route show table all && ip -6 addr";
        let asked = stage.lab.nodes[3].inside(|| Command::new("sh").args(["-c", ALL]).output())?;
        let text = String::from_utf8_lossy(&asked.stdout).into_owned();
        ensure!(asked.status.success() && text.contains("eth0"), "{asked:?}");
        // Its links are called tdc0, tdx0, tdv-…, tdw-…; the ranges are those of containers and services.
        for trace in ["tinydc", " td", "10.77.", "10.78.", ":a4d:", ":a4e:"] {
            ensure!(!text.contains(trace), "{trace}: {text}");
        }
        for setting in ["ip_forward", "conf/all/send_redirects", "conf/all/route_localnet"] {
            // What a new namespace begins with.
            let path = Path::new("/proc/sys/net/ipv4").join(setting);
            let before = fs::read_to_string(&path)?;
            let after = stage.lab.nodes[3].inside(move || fs::read_to_string(path))?;
            ensure!(after == before, "{setting} was {before} and is {after}");
        }
        for (setting, wanted) in [("all/forwarding", "0"), ("eth0/accept_ra", "1")] {
            let path = Path::new("/proc/sys/net/ipv6/conf").join(setting);
            let found = stage.lab.nodes[3].inside(move || fs::read_to_string(path))?;
            ensure!(found.trim() == wanted, "{setting} is {found}");
        }
        let groups =
            Command::new("find").args(["/sys/fs/cgroup", "-maxdepth", "3", "-name", &tag]).output()?;
        ensure!(groups.stdout.is_empty(), "{}", String::from_utf8_lossy(&groups.stdout));
        Ok(true)
    })?;
    stage.lab.nodes[3].wait("it waits unjoined", Duration::from_secs(5), |node| {
        Ok(node.get("/v1/version")?["node"].is_null())
    })?;
    // It may come back as a new node.
    let line = token(stage, &[])?;
    stage.cli(3, &["join", &line])?;
    // Its app, deployed still, has begun a volume here again.
    stage.cli(0, &["node", "rm", "--force", "pi4"])?;
    until("it is removed from afar", Duration::from_secs(20), || Ok(count_nodes(stage)? == 3))?;
    let refused = refusal("token rm", &stage.try_cli(0, &["node", "rm", "nobody"])?, 1)?;
    ensure!(refused.contains("nobody"), "{refused}");
    Ok(())
}

fn clock_1970(stage: &mut Stage) -> Result<()> {
    let library = ["x86_64-linux-gnu", "aarch64-linux-gnu", "arm-linux-gnueabihf"]
        .iter()
        .map(|triple| format!("/usr/lib/{triple}/faketime/libfaketimeMT.so.1"))
        .find(|path| Path::new(path).exists())
        .context("there is no libfaketime: apt-get install faketime")?;
    for (key, value) in [
        ("LD_PRELOAD", library.as_str()),
        ("FAKETIME", "@1970-01-01 00:00:10"),
        ("DONT_FAKE_MONOTONIC", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ] {
        stage.lab.nodes[2].set_environment(key, value);
    }
    stage.form(3)?;
    let yaml =
        web(8080, 1, "a").replace("{replicas: 1}", "{placement: {constraints: [\"node.hostname == pi3\"]}}");
    stage.deploy(2, "shop", &yaml)?;
    stage.wait_http(stage.lab.nodes[2].address, 8080, "hello", Duration::from_secs(5))?;
    let status = stage.lab.nodes[2].get("/v1/status")?;
    let time = status["cluster_time"].as_str().unwrap_or_default().to_string();
    ensure!(!time.starts_with("1970"), "cluster time is not its clock: {time}");
    stage.agree()
}

fn cluster_key(stage: &mut Stage) -> Result<()> {
    let founded = stage.lab.found(7)?;
    let recovery = founded["recovery_key"].as_str().context("init prints a recovery key")?.to_string();
    stage.wait_voters(5)?;
    until("five nodes hold the key", Duration::from_secs(20), || Ok(key_holders(stage).len() == 5))?;
    let first = fs::read_to_string(&key_holders(stage)[0])?;
    let holds = |index: usize| stage.lab.nodes[index].data_dir().join("identity/cluster.key").exists();
    let learner = (0..7).find(|index| !holds(*index)).context("a node without a vote")?;
    let name = stage.lab.nodes[learner].name.clone();
    stage.lab.kill_node(learner)?;
    let asked = (learner + 1) % 7;
    until("it is down", Duration::from_secs(20), || {
        Ok(stage.lab.nodes[asked].get(&format!("/v1/nodes/{name}"))?["state"] == "down")
    })?;
    let begin = Instant::now();
    stage.cli(asked, &["node", "rm", &name, "--force"])?;
    stage.wait_voters(3)?;
    until("three nodes hold the key", Duration::from_secs(20), || Ok(key_holders(stage).len() == 3))?;
    stage.note("7 → 6 nodes: two demoted voters deleted their copies", begin);

    let others: Vec<usize> = (0..7).filter(|index| *index != learner).collect();
    others.iter().try_for_each(|index| stage.lab.nodes[*index].stop())?;
    key_holders(stage).iter().try_for_each(fs::remove_file)?;
    others.iter().try_for_each(|index| stage.lab.nodes[*index].start())?;
    stage.wait_voters(3)?;
    let leader = stage.lab.leader()?;
    let begin = Instant::now();
    let wrong = recover(stage, leader, "tdc-recovery-0000")?;
    ensure!(!wrong.status.success(), "a mistyped recovery key is refused");
    let right = recover(stage, leader, &recovery)?;
    ensure!(right.status.success(), "{}", String::from_utf8_lossy(&right.stderr));
    until("three nodes hold the key again", Duration::from_secs(20), || Ok(key_holders(stage).len() == 3))?;
    stage.note("restored by the recovery key", begin);
    let same = key_holders(stage).iter().all(|path| fs::read_to_string(path).is_ok_and(|text| text == first));
    ensure!(same, "it is the same key");
    stage.cli(asked, &["token"]).map(drop)
}

fn key_holders(stage: &Stage) -> Vec<std::path::PathBuf> {
    let paths = stage.lab.nodes.iter().map(|node| node.data_dir().join("identity/cluster.key"));
    paths.filter(|path| path.exists()).collect()
}

fn recover(stage: &Stage, index: usize, key: &str) -> Result<std::process::Output> {
    use std::io::Write;
    let host = format!("unix://{}", stage.lab.nodes[index].socket().display());
    let mut command = std::process::Command::new(&stage.lab.program);
    command.args(["--host", &host, "node", "recover-key"]);
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = command.stderr(std::process::Stdio::piped()).spawn()?;
    child.stdin.take().context("its input")?.write_all(format!("{key}\n").as_bytes())?;
    Ok(child.wait_with_output()?)
}
