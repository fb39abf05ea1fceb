//! Secrets: in the containers that use them, and nowhere on a disk.

use super::Scenario;
use super::stage::{IMAGE, Stage, until};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "secrets",
    proves: "a secret is a file in a container on a node without the cluster key, with its owner and mode; it survives restarts \
             of container and daemon, is kept while used, changes with the next deploy, and is in the clear on no disk",
    machines: 4,
    run: secrets,
}];

const FIRST: &str = "first-uuZ4ahGh-words";
const SECOND: &str = "second-eeX3vohL-words";
const SHARED: &str = "shared-Ohr9quoo-words";

/// The name of a member that never got the cluster key.
pub fn learner(stage: &Stage) -> Result<String> {
    let nodes = stage.lab.nodes[0].get("/v1/nodes")?;
    let nodes = nodes["nodes"].as_array().cloned().unwrap_or_default();
    let learner = nodes.iter().find(|node| node["role"] == "learner").context("one of four only learns")?;
    let name = learner["name"].as_str().context("a node has a name")?.to_string();
    let key = stage.lab.node(&name)?.data_dir().join("identity/cluster.key");
    ensure!(!key.exists(), "{name} holds the cluster key and proves nothing");
    Ok(name)
}

fn inside(stage: &Stage, path: &str) -> Result<String> {
    stage.cli(0, &["exec", "shop/web.1", "cat", path])
}

fn secrets(stage: &mut Stage) -> Result<()> {
    stage.form(4)?;
    let learner = learner(stage)?;
    fs::write(stage.lab.dir.join("db.txt"), FIRST)?;
    let yaml = format!(
        "services:\n  web:\n    image: {IMAGE}\n    stop_grace_period: 1s\n    user: \"7:7\"\n    \
         deploy: {{placement: {{constraints: [\"node.hostname == {learner}\"]}}}}\n    secrets:\n      - db\n      \
         - {{source: shared, target: /etc/shared.txt, uid: \"7\", mode: 0400}}\n    configs: [page]\n\
         secrets:\n  db: {{file: ./db.txt}}\n  shared: {{external: true}}\nconfigs:\n  page: {{content: a page}}\n"
    );
    let path = stage.write_compose("shop", &yaml)?.display().to_string();
    let refused = stage.cli_refused(1, &["deploy", "-f", &path, "--name", "shop"], 1)?;
    ensure!(refused.contains("tinydc secret set shared FILE"), "{refused}");
    fs::write(stage.lab.dir.join("shared.txt"), SHARED)?;
    let index = stage.lab.nodes.iter().position(|node| node.name == learner).context("the learner")?;
    // Also by way of a node that can't seal.
    stage.cli(index, &["secret", "set", "shared", "shared.txt"])?;
    stage.deploy(1, "shop", &yaml)?;
    ensure!(inside(stage, "/run/secrets/db")? == FIRST, "the app's own secret");
    ensure!(inside(stage, "/etc/shared.txt")? == SHARED, "the cluster's, for its owner alone");
    ensure!(inside(stage, "/page")? == "a page", "the config");
    let listed = stage.cli(2, &["secret", "ls"])?;
    ensure!(listed.contains("shop/db") && listed.contains("shop/web") && !listed.contains(FIRST), "{listed}");
    stage.remark(listed);
    let refused = stage.cli_refused(0, &["secret", "rm", "shared"], 1)?;
    ensure!(refused.contains("used by shop/web"), "{refused}");

    let before = stage.pids(0, "shop")?;
    stage.kill_process(before["shop/web.1"])?;
    until("the container runs again", Duration::from_secs(10), || {
        Ok(stage.pids(0, "shop")?.get("shop/web.1").is_some_and(|pid| *pid != before["shop/web.1"]))
    })?;
    ensure!(inside(stage, "/run/secrets/db")? == FIRST, "after a restart of the container");
    stage.lab.nodes[index].kill_daemon()?;
    stage.lab.nodes[index].start()?;
    stage.wait_up(0, "shop", 1, Duration::from_secs(20))?;
    ensure!(inside(stage, "/run/secrets/db")? == FIRST, "after a restart of the daemon");

    fs::write(stage.lab.dir.join("db.txt"), SECOND)?;
    stage.deploy(0, "shop", &yaml)?;
    ensure!(inside(stage, "/run/secrets/db")? == SECOND, "what was deployed last");
    for node in &stage.lab.nodes {
        let mut files = 0;
        search(&node.dir, fs::metadata(&node.dir)?.dev(), &mut files)?;
        ensure!(files > 10, "only {files} files were searched at {}", node.name);
        println!("  {files} files of {} hold none of it", node.name);
    }
    stage.cli(0, &["rm", "shop"])?;
    let listed = stage.cli(0, &["secret", "ls"])?;
    ensure!(!listed.contains("shop/db") && listed.contains("shared"), "an app's go with it: {listed}");
    stage.cli(0, &["secret", "rm", "shared"])?;
    Ok(())
}

/// All files below, on this file system: what is mounted there lives in memory or is seen at its own place.
fn search(folder: &Path, device: u64, files: &mut usize) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        // What is removed meanwhile held nothing that stays.
        let Ok(about) = fs::symlink_metadata(&path) else { continue };
        if about.dev() != device {
            continue;
        }
        if about.is_dir() {
            search(&path, device, files)?;
        } else if about.is_file() {
            let Ok(bytes) = fs::read(&path) else { continue };
            *files += 1;
            for secret in [FIRST, SECOND, SHARED] {
                let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
                ensure!(!found, "{} holds a secret in the clear", path.display());
            }
        }
    }
    Ok(())
}
