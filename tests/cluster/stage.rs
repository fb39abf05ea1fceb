//! What scenarios are made of: machines, a command line, apps of busybox, and waiting for what must become true.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tinydc::cli::lab::{self, Lab};
use tinydc::linux::netns;

pub const IMAGE: &str = "busy:1";
const HTTP_LIMIT: Duration = Duration::from_millis(500);
const LOG_LINES: usize = 12;

/// Serves `hello from $NAME` on 8080 and logs; as a container's first process it must mind SIGTERM itself.
const SERVE: &str = "#!/bin/sh
trap 'exit 0' TERM
mkdir -p /www
echo \"hello from $NAME\" > /www/index.html
echo \"serving as $NAME\"
echo \"a word to stderr\" >&2
httpd -p 8080 -h /www
while :; do sleep 1000 & wait $!; done
";

pub struct Stage {
    pub lab: Lab,
    notes: Vec<String>,
}

/// One instance as the API shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub id: String,
    pub name: String,
    pub node: String,
    pub phase: String,
    pub desired: String,
    pub pid: Option<i64>,
    pub detail: String,
}

impl Row {
    pub fn is_up(&self) -> bool {
        matches!(self.phase.as_str(), "running" | "healthy") && self.desired == "run"
    }
}

/// Where everything of a run lies; `TINYDC_TEST_DIR` names another place, so that two runs can share a machine.
pub fn dir() -> PathBuf {
    std::env::var_os("TINYDC_TEST_DIR").map_or("/var/tmp/tinydc-cluster-test".into(), PathBuf::from)
}

impl Stage {
    pub fn new(program: &Path, machines: u8) -> Result<Stage> {
        let lab = Lab::new(&dir(), program, machines)?;
        fs::create_dir_all(lab.dir.join("home"))?;
        Ok(Stage { lab, notes: Vec::new() })
    }

    /// A cluster of the first `count` machines with the test image, and voters as they should be.
    pub fn form(&mut self, count: usize) -> Result<()> {
        let begin = Instant::now();
        self.lab.form(count)?;
        self.wait_voters(if count >= 7 {
            5
        } else if count >= 3 {
            3
        } else {
            1
        })?;
        self.note(&format!("a cluster of {count}"), begin);
        self.load(0)
    }

    /// Two machines on the LAN and a third behind a router, in one cluster; the router's address.
    pub fn form_on_two_lans(&mut self) -> Result<Ipv4Addr> {
        self.lab.lan.add_far_lan()?;
        let router = self.lab.lan.address(254);
        for node in &self.lab.nodes {
            self.lab.lan.add_default_route(&node.netns, router)?;
        }
        self.lab.add_far_node()?;
        self.form(3)?;
        Ok(router)
    }

    pub fn wait_voters(&self, wanted: usize) -> Result<()> {
        // Each by its own copy: a configuration counts for a node once that node has applied it.
        for node in self.lab.nodes.iter().filter(|node| node.is_running()) {
            node.wait(&format!("{wanted} voters"), Duration::from_secs(40), |node| {
                let nodes = node.get("/v1/nodes")?;
                let votes = |one: &&Value| one["role"] == "voter" || one["role"] == "leader";
                let leads = |one: &Value| one["role"] == "leader";
                let all = nodes["nodes"].as_array().cloned().unwrap_or_default();
                Ok(all.iter().filter(votes).count() == wanted && all.iter().any(leads))
            })?;
        }
        Ok(())
    }

    /// Loads the image into one node and waits until it cannot be lost with it.
    pub fn load(&mut self, index: usize) -> Result<()> {
        lab::ask(&self.lab.nodes[index].socket(), "POST", "/v1/images", image()?)?.json()?;
        let wanted = self.lab.nodes.iter().filter(|node| node.is_running()).count().min(2);
        self.lab.nodes[index].wait("the image lies on two nodes", Duration::from_secs(30), |node| {
            let images = node.get("/v1/images")?;
            Ok(images["images"][0]["nodes"].as_array().map_or(0, Vec::len) >= wanted)
        })
    }

    /// The first machine whose daemon runs.
    pub fn running(&self) -> Result<usize> {
        self.lab.nodes.iter().position(|node| node.is_running()).context("no node runs")
    }

    pub fn note(&mut self, what: &str, since: Instant) {
        self.notes.push(format!("{what}: {:.2} s", since.elapsed().as_secs_f64()));
    }

    pub fn remark(&mut self, text: String) {
        self.notes.push(text);
    }

    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    pub fn log_tails(&self) -> String {
        let mut text = String::new();
        for node in &self.lab.nodes {
            let log = fs::read_to_string(node.dir.join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            text += &format!("  | log of {} ends:\n", node.name);
            for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
                text += &format!("  |   {line}\n");
            }
        }
        text
    }

    pub fn log_of(&self, index: usize) -> String {
        fs::read_to_string(self.lab.nodes[index].dir.join("log")).unwrap_or_default()
    }

    /// The command line against one node, whatever comes of it.
    pub fn try_cli(&self, index: usize, words: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.lab.program);
        command.arg("--host").arg(format!("unix://{}", self.lab.nodes[index].socket().display()));
        command.args(words).stdin(Stdio::null()).current_dir(&self.lab.dir);
        command.env("HOME", self.lab.dir.join("home")).env_remove("TINYDC_CONTEXT");
        command.output().context("run tinydc")
    }

    /// What it printed; an error with what it said when it exits otherwise than 0.
    pub fn cli(&self, index: usize, words: &[&str]) -> Result<String> {
        said(&words.join(" "), self.try_cli(index, words)?)
    }

    /// The error output of a command that must fail with this exit code.
    pub fn cli_refused(&self, index: usize, words: &[&str], code: i32) -> Result<String> {
        refusal(&words.join(" "), &self.try_cli(index, words)?, code)
    }

    pub fn write_compose(&self, app: &str, yaml: &str) -> Result<PathBuf> {
        let path = self.lab.dir.join(format!("{app}.yaml"));
        fs::write(&path, yaml)?;
        Ok(path)
    }

    pub fn deploy(&self, index: usize, app: &str, yaml: &str) -> Result<String> {
        let path = self.write_compose(app, yaml)?;
        self.cli(index, &["deploy", "-f", &path.display().to_string(), "--name", app, "--timeout", "60s"])
    }

    pub fn rows(&self, index: usize, app: &str) -> Result<Vec<Row>> {
        rows_of(&self.lab.nodes[index], app)
    }

    /// Names of instances that should run and do, with their pids.
    pub fn pids(&self, index: usize, app: &str) -> Result<BTreeMap<String, i64>> {
        let rows = self.rows(index, app)?;
        Ok(rows.into_iter().filter(Row::is_up).filter_map(|row| Some((row.name, row.pid?))).collect())
    }

    pub fn wait_up(&self, index: usize, app: &str, wanted: usize, limit: Duration) -> Result<()> {
        let what = format!("{wanted} instances of {app} run");
        self.lab.nodes[index].wait(&what, limit, |node| {
            let up = rows_of(node, app)?.into_iter().filter(|row| row.is_up() && row.pid.is_some()).count();
            Ok(up == wanted)
        })
    }

    /// One GET from the LAN.
    pub fn http(&self, address: Ipv4Addr, port: u16) -> Result<String> {
        let inside = netns::in_netns(&self.lab.lan.netns, move || http_here((address, port).into()));
        inside.with_context(|| format!("GET http://{address}:{port}/"))
    }

    /// Until a page is served with this text.
    pub fn wait_http(&self, address: Ipv4Addr, port: u16, text: &str, limit: Duration) -> Result<()> {
        until(&format!("http://{address}:{port}/ says {text:?}"), limit, || {
            Ok(self.http(address, port)?.contains(text))
        })
    }

    /// Kills one process for good, as the kernel's killer would.
    pub fn kill_process(&self, pid: i64) -> Result<()> {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL)
            .with_context(|| format!("kill {pid}"))
    }

    pub fn applied(&self, index: usize) -> Result<u64> {
        let status = self.lab.nodes[index].get("/v1/nodes")?;
        status["applied_index"].as_u64().context("an answer names its applied index")
    }

    /// A write that is told from others by its name, by way of one node.
    pub fn label(&self, index: usize, of: &str, key: &str) -> Result<()> {
        self.set_label(index, of, key, "yes")
    }

    pub fn set_label(&self, index: usize, of: &str, key: &str, value: &str) -> Result<()> {
        let body = serde_json::json!({ "set": { key: value }, "remove": [] });
        self.lab.nodes[index].post(&format!("/v1/nodes/{of}/labels"), &body).map(drop)
    }

    pub fn has_label(&self, index: usize, of: &str, key: &str) -> Result<bool> {
        let node = self.lab.nodes[index].get(&format!("/v1/nodes/{of}"))?;
        Ok(node["labels"][key] == "yes")
    }

    /// All running nodes have applied the same and show the same.
    pub fn agree(&self) -> Result<()> {
        let running: Vec<&lab::Node> = self.lab.nodes.iter().filter(|node| node.is_running()).collect();
        until("all nodes show the same state", Duration::from_secs(10), || {
            let shown: Vec<Value> = running.iter().map(|node| durable_view(node)).collect::<Result<_>>()?;
            let first = &shown[0];
            match shown.iter().find(|other| *other != first) {
                None => Ok(true),
                Some(other) => bail!("{first} and {other}"),
            }
        })
    }
}

/// What comes from the replicated state alone, without figures that each node has of its own.
fn durable_view(node: &lab::Node) -> Result<Value> {
    let status = node.get("/v1/status")?;
    let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
    let services = status["services"].as_array().cloned().unwrap_or_default();
    let nodes: Vec<Value> = nodes
        .iter()
        .map(|one| serde_json::json!([one["id"], one["name"], one["role"], one["state"], one["labels"]]))
        .collect();
    let services: Vec<Value> = services
        .iter()
        .map(|one| {
            let instances = one["instances"].as_array().cloned().unwrap_or_default();
            let instances: Vec<Value> = instances
                .iter()
                .map(|row| serde_json::json!([row["id"], row["node"], row["desired"]]))
                .collect();
            serde_json::json!([one["app"], one["name"], one["spec_version"], one["update"], instances])
        })
        .collect();
    Ok(serde_json::json!([status["applied_index"], status["leader"], nodes, services]))
}

pub fn rows_of(node: &lab::Node, app: &str) -> Result<Vec<Row>> {
    let body = node.get(&format!("/v1/instances?app={app}"))?;
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_string();
    let rows = body["instances"].as_array().cloned().unwrap_or_default();
    Ok(rows
        .iter()
        .map(|row| Row {
            id: text(row, "id"),
            name: text(row, "name"),
            node: text(row, "node"),
            phase: text(row, "phase"),
            desired: text(row, "desired"),
            pid: row["pid"].as_i64(),
            detail: format!("{} {}", text(row, "reason"), text(row, "last_exit")),
        })
        .collect())
}

pub fn said(what: &str, output: Output) -> Result<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "tinydc {what}: {}: {text}{errors}", output.status);
    Ok(text)
}

pub fn refusal(what: &str, output: &Output, code: i32) -> Result<String> {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let text = String::from_utf8_lossy(&output.stdout);
    let found = output.status.code();
    ensure!(found == Some(code), "tinydc {what} exits {found:?}, not {code}: {text}{errors}");
    Ok(errors)
}

/// Asks every 20 ms until it is true.
pub fn until(what: &str, limit: Duration, is_true: impl FnMut() -> Result<bool>) -> Result<()> {
    lab::until(what, limit, Duration::from_millis(20), is_true)
}

/// Holds for as long as it is looked at: what must not happen did not.
pub fn throughout(what: &str, time: Duration, mut is_true: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < time {
        ensure!(is_true()?, "no longer true after {:.1} s: {what}", begin.elapsed().as_secs_f64());
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// One GET in the network namespace of this thread: the body of a 200.
pub fn http_here(address: SocketAddr) -> std::io::Result<String> {
    http_within(address, HTTP_LIMIT)
}

/// The same, of a client that waits as long for a connection, and again for its answer.
pub fn http_within(address: SocketAddr, limit: Duration) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"GET / HTTP/1.0\r\nhost: test\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    match text.split_once("\r\n\r\n") {
        Some((head, body)) if head.split(' ').nth(1) == Some("200") => Ok(body.into()),
        _ => Err(std::io::Error::other(format!("answered {text:?}"))),
    }
}

/// The test image: Debian's static busybox and a script that serves.
pub fn image() -> Result<&'static [u8]> {
    static MADE: OnceLock<Vec<u8>> = OnceLock::new();
    if let Some(made) = MADE.get() {
        return Ok(made);
    }
    let busybox = Path::new("/bin/busybox");
    ensure!(busybox.exists(), "there is no /bin/busybox: apt-get install busybox-static");
    let applets =
        ["sh", "httpd", "sleep", "mkdir", "cat", "echo", "head", "tail", "dd", "id", "touch", "wget"];
    let inside: Vec<String> = applets.iter().map(|applet| format!("/bin/{applet}")).collect();
    // Names of one program, as scripts of one line: an archive of two megabytes instead of twenty.
    let wrappers: Vec<(String, String)> = inside
        .iter()
        .zip(applets)
        .filter(|(_, applet)| *applet != "sh")
        .map(|(path, applet)| (path.clone(), format!("#!/bin/sh\nexec /bin/busybox {applet} \"$@\"\n")))
        .collect();
    let mut files: Vec<(&str, &[u8], u32)> =
        wrappers.iter().map(|(path, text)| (path.as_str(), text.as_bytes(), 0o755)).collect();
    files.push(("/bin/serve", SERVE.as_bytes(), 0o755));
    let made = lab::image_with(
        IMAGE,
        &[(busybox, "/bin/busybox"), (busybox, "/bin/sh")],
        &["/bin/serve".into()],
        &files,
    )?;
    Ok(MADE.get_or_init(|| made))
}

/// A Compose file of one service `web` that serves on a port.
pub fn web(port: u16, replicas: u32, name: &str) -> String {
    format!(
        "services:\n  web:\n    image: {IMAGE}\n    ports: [\"{port}:8080\"]\n    environment: {{NAME: {name}}}\n    \
         stop_grace_period: 1s\n    deploy: {{replicas: {replicas}}}\n"
    )
}
