//! The prompt on a board's screen and serial line: `tinydc console`, started by the first process.
//!
//! Input: lines that a person types. Output: the same verbs as anywhere, run as processes of their own, under a screen
//! that says what this board is: name, address, cluster, leader, instances, its code, the last problem. On a screen
//! (80×25) it is drawn anew when something changed and nobody types; a serial line gets it only when it is asked for.
//! Where the screen says so, Enter founds a cluster.

use super::lab;
use super::terminal;
use super::verbs::health_text;
use crate::boot;
use crate::node::CLUSTER_NAME;
use crate::transport::pending::{Neighbours, find_cluster};
use serde_json::Value;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

const SOCKET: &str = "/run/tinydc/api.sock";
const WIDTH: usize = 79;
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Before Enter founds a cluster: a member on the network answers well within it.
const LISTEN_FOR: Duration = Duration::from_secs(3);
const LINE_BYTES_MAX: usize = 4096;
const LOG_LINES: usize = 18;
const CLEAR: &str = "\x1b[H\x1b[2J";

/// What only the prompt of a board knows.
const HELP: &str = "\
At a board's prompt, beside the verbs (help lists them):
  log          what the daemon printed last
  report       how the start went, phase by phase, and every problem
  reboot       stop the containers and restart the board
  poweroff     stop the containers and switch the board off
";

pub fn main() -> ExitCode {
    terminal::print_bytes(b"\n");
    let is_screen = std::env::var("TERM").is_ok_and(|term| term == "linux");
    let mut prompt = Prompt { is_screen, shown: String::new(), is_founding_offered: false };
    prompt.run();
    ExitCode::SUCCESS
}

struct Prompt {
    is_screen: bool,
    /// The screen as it was drawn last.
    shown: String,
    /// It says that Enter founds a cluster.
    is_founding_offered: bool,
}

/// What a screen is drawn from.
#[derive(Default)]
struct Facts {
    /// What the first process wrote.
    report: String,
    /// The daemon's answers.
    status: Option<Value>,
    joining: Option<Value>,
}

impl Facts {
    fn read() -> Facts {
        let ask = |path: &str| lab::ask(Path::new(SOCKET), "GET", path, &[]).ok()?.json().ok();
        Facts {
            report: fs::read_to_string(boot::REPORT_FILE).unwrap_or_default(),
            status: ask("/v1/status"),
            joining: ask("/v1/joining"),
        }
    }

    fn waits_for_cluster(&self) -> bool {
        self.joining.as_ref().is_some_and(|joining| joining["state"] == "waiting")
    }
}

fn print(text: &str) {
    let mut out = std::io::stdout();
    // Nobody may be at the other end.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

impl Prompt {
    fn run(&mut self) {
        self.draw();
        print(&prompt());
        loop {
            let Some(line) = self.read_line() else { return };
            match line.split_whitespace().next() {
                None if self.is_founding_offered => self.found(),
                None => self.draw(),
                Some("reboot") => ask_first_process(nix::sys::signal::Signal::SIGTERM),
                Some("poweroff") => ask_first_process(nix::sys::signal::Signal::SIGUSR2),
                Some("log") => print(&last_lines(boot::LOG_FILE)),
                Some("report") => print(&fs::read_to_string(boot::REPORT_FILE).unwrap_or_default()),
                Some(_) => run_verb(&line),
            }
            // What was offered has scrolled away.
            self.is_founding_offered = self.is_founding_offered && line.is_empty();
            print(&prompt());
        }
    }

    fn draw(&mut self) {
        let facts = Facts::read();
        self.is_founding_offered = facts.waits_for_cluster();
        self.shown = screen(&facts);
        let clear = if self.is_screen { CLEAR } else { "" };
        print(&format!("{clear}{}\n", self.shown));
    }

    /// Founds a cluster on this board, unless there is one: two beside each other are never what was meant.
    fn found(&mut self) {
        self.is_founding_offered = false;
        print("looking for a cluster on this network …\n");
        // Any other founder goes first.
        match async_io::block_on(find_cluster(CLUSTER_NAME, &[0xff; 16], LISTEN_FOR)) {
            Neighbours::Cluster(address) => print(&format!(
                "A cluster called {CLUSTER_NAME} answers at {address}. A member of it takes this board in by its code; \
                 init founds another cluster all the same.\n"
            )),
            Neighbours::Founder(other) => print(&format!(
                "{} at {} is about to found a cluster, which can take this board in by its code; init founds \
                 another one all the same.\n",
                other.name,
                other.address.ip()
            )),
            Neighbours::None => run_verb("init"),
        }
    }

    /// A line; `None` when the terminal is gone. While nobody types, a screen is kept true.
    fn read_line(&mut self) -> Option<String> {
        let stdin = std::io::stdin();
        while self.is_screen {
            let is_typed = crate::linux::process::poll_readable(stdin.as_fd(), LOOK_EVERY).ok()?;
            if is_typed {
                break;
            }
            if screen(&Facts::read()) != self.shown {
                self.draw();
                print(&prompt());
            }
        }
        // The terminal hands over whole lines; one byte at a time leaves the rest to the verb that reads it.
        let mut line = Vec::new();
        let mut byte = [0];
        loop {
            match stdin.lock().read(&mut byte) {
                Ok(0) | Err(_) => return None,
                Ok(_) if byte[0] == b'\n' => break,
                Ok(_) if line.len() < LINE_BYTES_MAX => line.push(byte[0]),
                Ok(_) => {}
            }
        }
        Some(String::from_utf8_lossy(&line).trim().to_string())
    }
}

fn prompt() -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    format!("{}> ", name.unwrap_or_default())
}

fn ask_first_process(signal: nix::sys::signal::Signal) {
    if let Err(error) = nix::sys::signal::kill(nix::unistd::Pid::from_raw(1), signal) {
        print(&format!("error: ask the first process: {error}\n"));
    }
}

fn last_lines(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].iter().map(|line| format!("{line}\n")).collect()
}

/// A verb as a process of its own, which Ctrl-C ends and the prompt survives.
fn run_verb(line: &str) {
    let words = match split(line) {
        Ok(words) => words,
        Err(why) => return print(&format!("error: {why}\n")),
    };
    if words == ["help"] {
        print(HELP);
    }
    let mut command = Command::new("/proc/self/exe");
    command.arg0("tinydc").args(words.iter().map(OsString::from));
    let ignored = nix::sys::signal::SigSet::from_iter([nix::sys::signal::Signal::SIGINT]);
    // Held while the verb runs: it is for the verb. A child starts with no signal held.
    let held = ignored.thread_block();
    let outcome = command.status();
    if held.is_ok() {
        drain_interrupts(&ignored);
    }
    if let Err(error) = outcome {
        print(&format!("error: run the verb: {error}\n"));
    }
}

/// Takes the Ctrl-C that was meant for the verb, then lets the next one through.
fn drain_interrupts(ignored: &nix::sys::signal::SigSet) {
    use nix::sys::signalfd::{SfdFlags, SignalFd};
    if let Ok(fd) = SignalFd::with_flags(ignored, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC) {
        while let Ok(Some(_)) = fd.read_signal() {}
    }
    // Fails only for a set that does not exist.
    let _ = ignored.thread_unblock();
}

/// Words as a shell splits them: blanks, quotes, and a backslash before one character.
fn split(line: &str) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' => words.extend(word.take()),
            '\'' | '"' => {
                let inside = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        None => return Err("a quote is not closed"),
                        Some(end) if end == c => break,
                        Some('\\') if c == '"' => inside.extend(chars.next()),
                        Some(other) => inside.push(other),
                    }
                }
            }
            '\\' => word.get_or_insert_default().extend(chars.next()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    Ok(words)
}

/// The screen's text.
fn screen(facts: &Facts) -> String {
    let Facts { report, status, joining } = facts;
    let value = |key: &str| report.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
    let mut text = String::new();
    let mut row = |name: &str, value: &str| {
        let line: String = format!("  {name:<11} {value}").chars().take(WIDTH).collect();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{line}");
    };
    row("tinydc", env!("CARGO_PKG_VERSION"));
    row("name", value("name").unwrap_or("?"));
    row("address", value("address").unwrap_or("none yet"));
    let code = joining.as_ref().and_then(|joining| joining["code"].as_str());
    match status {
        Some(status) => {
            let word = |key: &str| status[key].as_str().unwrap_or_default().to_string();
            let leader = status["leader"].as_str().unwrap_or("none now").to_string();
            let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
            let own = nodes.iter().find(|node| node["name"] == status["node"]);
            let up = nodes.iter().filter(|node| node["state"] == "up").count();
            row(
                "cluster",
                &format!("{}, leader {leader}, {up} of {} nodes up", word("cluster"), nodes.len()),
            );
            row("role", own.and_then(|node| node["role"].as_str()).unwrap_or("?"));
            let services = status["services"].as_array().cloned().unwrap_or_default();
            let sum = |key: &str| services.iter().filter_map(|one| one[key].as_u64()).sum::<u64>();
            let here = own.and_then(|node| node["instances"].as_u64()).unwrap_or(0);
            row(
                "instances",
                &format!("{here} here; {} of {} run in the cluster", sum("running"), sum("wanted")),
            );
            if let Some(own) = own.and_then(|own| serde_json::from_value(own.clone()).ok()) {
                row("health", &health_text(&own));
            }
        }
        None if joining.is_some() => row("cluster", "none yet"),
        None => row("cluster", value("daemon").unwrap_or("the daemon does not answer yet")),
    }
    if let (Some(code), None) = (code, status) {
        row("code", code);
        row("", &format!("into a cluster:   tinydc node accept {code}    on a member"));
        row("", &format!("found one on it:  tinydc init --board {code}   on a laptop"));
    }
    if let (Some(code), Some(line)) = (code, joining.as_ref().and_then(|joining| joining["line"].as_str())) {
        row("code", &format!("{code}, once, for a laptop:"));
        row("", line);
    }
    if facts.waits_for_cluster() {
        row("", "found one here:   Enter");
    }
    row("clock", value("clock").unwrap_or("?"));
    row("data", value("data").unwrap_or("?"));
    if let Some(disks) = value("disks") {
        row("disks", disks);
    }
    let problem = joining.as_ref().and_then(|joining| joining["problem"].as_str());
    let problems = report.lines().filter_map(|line| line.strip_prefix("problem: "));
    let problems: Vec<&str> = problems.chain(problem).collect();
    for (index, part) in last_problem(&problems).iter().enumerate() {
        row(if index == 0 { "problem" } else { "" }, part);
    }
    let enter = if facts.waits_for_cluster() { "" } else { "Enter draws this anew; " };
    row("", &format!("{enter}help lists what can be typed"));
    text
}

/// In lines that fit beside its name.
fn last_problem(problems: &[&str]) -> Vec<String> {
    let Some(last) = problems.last() else { return Vec::new() };
    let text = match problems.len() - 1 {
        0 => last.to_string(),
        more => format!("{last} ({more} more: report)"),
    };
    let letters: Vec<char> = text.chars().collect();
    letters.chunks(WIDTH - 14).map(|part| part.iter().collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_a_shell_does() {
        assert_eq!(split("token --user  'ada l'").unwrap(), ["token", "--user", "ada l"]);
        assert_eq!(split(r#"a "b \" c" d\ e """#).unwrap(), ["a", "b \" c", "d e", ""]);
        assert!(split("a 'b").is_err());
    }

    #[test]
    fn the_screen_fits_80_columns_and_25_rows() {
        let long = "x".repeat(400);
        let report = format!("name: pi1\naddress: eth0 192.0.2.5/24\nproblem: {long}\nproblem: {long}\n");
        let status = serde_json::json!({
            "cluster": "home", "node": "pi1", "leader": "pi2",
            "nodes": [{"name": "pi1", "state": "up", "role": "voter", "instances": 2}, {"name": "pi2", "state": "down"}],
            "services": [{"running": 2, "wanted": 3}],
        });
        let waiting = serde_json::json!({ "state": "waiting", "code": "493112", "problem": long });
        let member = serde_json::json!({ "state": "member", "code": "493112", "line":
            "tinydc context create home --host 192.0.2.5 --code 493112" });
        let facts = |status: Option<&Value>, joining: Option<&Value>| Facts {
            report: report.clone(),
            status: status.cloned(),
            joining: joining.cloned(),
        };
        for (status, joining) in [(None, None), (None, Some(&waiting)), (Some(&status), Some(&member))] {
            let text = screen(&facts(status, joining));
            assert!(text.lines().count() < 24, "{text}");
            assert!(text.lines().all(|line| line.chars().count() < 80), "{text}");
        }
        let text = screen(&facts(None, Some(&waiting)));
        assert!(text.contains("tinydc node accept 493112") && text.contains("Enter"), "{text}");
        let text = screen(&facts(Some(&status), Some(&member)));
        assert!(text.contains("--code 493112"), "{text}");
        assert!(text.contains("home, leader pi2, 1 of 2 nodes up"), "{text}");
        assert!(text.contains("2 here; 2 of 3 run"), "{text}");
    }
}
