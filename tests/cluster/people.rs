//! A person at a laptop: no root, no daemon, another machine.

use super::Scenario;
use super::stage::{Stage, refusal, said, until, web};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use tinydc::linux::netns;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "laptop",
    proves: "a context made from a token by an ordinary user on another machine runs every verb; a viewer may only look; \
             user rm ends it at once; a token serves once the CA is the right one",
    machines: 3,
    run: laptop,
}];

const NOBODY: u32 = 65_534;

/// A machine on the LAN that is no node, and a user on it.
pub struct Laptop {
    netns: PathBuf,
    home: PathBuf,
    program: PathBuf,
}

impl Laptop {
    pub fn new(stage: &Stage, name: &str, number: u8) -> Result<Laptop> {
        let netns = stage.lab.lan.add_machine(name, number)?;
        let home = stage.lab.dir.join(name);
        fs::create_dir_all(&home)?;
        // The build's folder may be closed to other users.
        let program = home.join("tinydc");
        fs::copy(&stage.lab.program, &program)?;
        chown(&home, Some(NOBODY), Some(NOBODY))?;
        Ok(Laptop { netns, home, program })
    }

    /// Runs something of this process on the laptop's network.
    pub fn within<Output: Send>(
        &self,
        work: impl FnOnce() -> std::io::Result<Output> + Send,
    ) -> Result<Output> {
        netns::in_netns(&self.netns, work).context("enter the laptop's network")
    }

    pub fn try_cli(&self, words: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.program);
        command.args(words).stdin(Stdio::null()).current_dir(&self.home).env_clear();
        command.env("HOME", &self.home).uid(NOBODY).gid(NOBODY);
        netns::in_netns(&self.netns, || command.output()).context("run tinydc on the laptop")
    }

    pub fn cli(&self, words: &[&str]) -> Result<String> {
        said(&words.join(" "), self.try_cli(words)?)
    }

    pub fn refused(&self, words: &[&str], code: i32) -> Result<String> {
        refusal(&words.join(" "), &self.try_cli(words)?, code)
    }

    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        Ok(fs::write(self.home.join(name), text)?)
    }

    /// A context from a fresh token.
    pub fn enrol(&self, stage: &Stage, words: &[&str]) -> Result<()> {
        let line = stage.cli(0, &[&["token"], words].concat())?;
        let token = line.split_whitespace().last().context("token prints a line")?;
        self.cli(&["context", "create", "home", token]).map(drop)
    }
}

fn laptop(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let ann = Laptop::new(stage, "ann", 100)?;
    ann.enrol(stage, &["--user", "ann"])?;
    ann.write("compose.yaml", &web(8080, 2, "laptop"))?;
    let begin = Instant::now();
    ann.cli(&["deploy", "--name", "shop", "--timeout", "30s"])?;
    stage.note("deployed from a laptop", begin);
    for words in
        [&["ps"][..], &["status"], &["ls"], &["node", "ls"], &["context", "ls"], &["events"], &["version"]]
    {
        ann.cli(words)?;
    }
    ensure!(ann.cli(&["logs", "shop/web.1"])?.contains("serving as laptop"));
    ensure!(ann.cli(&["exec", "shop/web.1", "echo", "hi"])? == "hi\n");
    let leave = ann.try_cli(&["leave"])?;
    ensure!(!leave.status.success(), "a laptop can't make a node leave");
    // A dead node costs little: the context knows them all.
    let victim = stage.lab.leader()?;
    stage.lab.kill_node(victim)?;
    let begin = Instant::now();
    until("the laptop reaches the others", Duration::from_secs(15), || Ok(ann.cli(&["node", "ls"]).is_ok()))?;
    stage.note("a node died → the laptop is answered", begin);
    stage.lab.lan.mend(stage.lab.nodes[victim].number)?;
    stage.lab.nodes[victim].start()?;
    until("a write is accepted", Duration::from_secs(15), || Ok(stage.label(0, "pi1", "again").is_ok()))?;
    let eve = Laptop::new(stage, "eve", 101)?;
    eve.enrol(stage, &["--user", "eve", "--viewer"])?;
    eve.cli(&["ps"])?;
    for words in [
        &["scale", "shop/web=1"][..],
        &["rm", "shop"],
        &["exec", "shop/web.1", "id"],
        &["token"],
        &["user", "rm", "ann"],
        &["settings", "timers", "fast"],
        &["node", "label", "pi1", "a=b"],
    ] {
        eve.refused(words, 1)?;
    }
    stage.cli(0, &["user", "rm", "ann"])?;
    let begin = Instant::now();
    let refused = ann.try_cli(&["ps"])?;
    stage.note("user rm → refused", begin);
    ensure!(
        !refused.status.success(),
        "a removed user still reads: {}",
        String::from_utf8_lossy(&refused.stdout)
    );
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    stage.remark(format!("a removed user is told: {}", text.lines().next().unwrap_or_default()));
    eve.cli(&["ps"]).map(drop)
}
