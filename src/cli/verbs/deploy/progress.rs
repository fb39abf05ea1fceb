//! Watches an app until it is as it was asked to be.
//!
//! `GET /v1/status` every 200 ms → lines on standard error: redrawn on a terminal, one per change elsewhere. Ends when
//! every service is settled, one update has failed (with that instance's last lines), or time is up.

use crate::model::Gather;
use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use async_io::Timer;

use crate::api::wire::{InstanceBody, LogLine, ServiceBody, StatusBody};
use crate::cli::client::{Client, escape};
use crate::cli::failure::{Exit, Failure, chain};
use crate::cli::figures::parse_duration;
use crate::cli::table::{WIDTH_MAX, shortened};
use crate::cli::terminal::{self, Colour, print_line, within};
use crate::cli::verbs::apps::{detail, notes};
use crate::cli::{Session, usage};

const POLL_EVERY: Duration = Duration::from_millis(200);
const TIMEOUT: Duration = Duration::from_secs(300);
const FAILED_LINES: usize = 10;
const FAILED_LINES_LIMIT: Duration = Duration::from_secs(5);

pub fn timeout(text: Option<&str>) -> anyhow::Result<Duration> {
    let Some(text) = text else { return Ok(TIMEOUT) };
    parse_duration(text)
        .filter(|time| !time.is_zero())
        .ok_or_else(|| usage(format!("{text:?} is not a length of time"), "such as 90s or 5m"))
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Settled,
    Waiting,
    /// The service whose update stopped.
    Failed(String),
}

fn state(services: &[ServiceBody]) -> State {
    if let Some(failed) = services.iter().find(|service| service.update == "failed") {
        return State::Failed(failed.name.clone());
    }
    if services.iter().all(is_settled) { State::Settled } else { State::Waiting }
}

fn is_settled(service: &ServiceBody) -> bool {
    service.update == "done" && service.settled >= service.wanted
}

/// The last status: every service is settled in it.
pub async fn wait(
    session: &Session,
    client: &Client,
    app: &str,
    timeout: Duration,
) -> anyhow::Result<StatusBody> {
    let until = Instant::now() + timeout;
    let path = format!("/v1/status?app={}", escape(app));
    let mut display = Display::new(session.is_json());
    let mut last: Option<StatusBody> = None;
    loop {
        match client.read::<StatusBody>(&path).await {
            Ok(status) => {
                display.show(&status.services);
                match state(&status.services) {
                    State::Settled => return Ok(status),
                    State::Failed(service) => {
                        return Err(explain_failed(client, &status, &service).await.into());
                    }
                    State::Waiting => last = Some(status),
                }
            }
            // The deploy is committed: a node that restarts or a lost leader only delays the news.
            Err(error) if is_passing(&error) && Instant::now() < until => {}
            Err(error) => return Err(error),
        }
        if Instant::now() >= until {
            return Err(explain_timeout(app, last.as_ref(), timeout).into());
        }
        Timer::after(POLL_EVERY).await;
    }
}

fn is_passing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Failure>().is_some_and(|failure| failure.exit == Exit::Unreachable)
}

fn explain_timeout(app: &str, status: Option<&StatusBody>, timeout: Duration) -> Failure {
    let services = status.map_or(&[][..], |status| &status.services);
    for service in services.iter().filter(|service| !is_settled(service)) {
        match service.settled < service.wanted {
            true => eprintln!("{}", line(service)),
            false => eprintln!("{}  old instances are still being replaced", line(service)),
        }
        notes(service).iter().for_each(|note| eprintln!("  {note}"));
    }
    Failure::refused(format!("{app} does not serve after {} s; the deploy goes on", timeout.as_secs()))
        .hint(format!("see it: tinydc status {app}; wait longer: --timeout 30m"))
}

async fn explain_failed(client: &Client, status: &StatusBody, name: &str) -> Failure {
    let service = status.services.iter().find(|service| service.name == name);
    let app = service.map_or("", |service| service.app.as_str());
    if let Some(instance) = service.and_then(failed_instance) {
        match within(FAILED_LINES_LIMIT, last_lines(client, instance)).await {
            Some(Ok(lines)) if !lines.is_empty() => {
                eprintln!("the last lines of {}:", instance.name);
                lines.iter().for_each(|line| eprintln!("  {}", line.text.trim_end()));
            }
            Some(Err(error)) => eprintln!("the log of {} can't be read: {}", instance.name, chain(&error)),
            _ => eprintln!("{} printed nothing", instance.name),
        }
    }
    let reason = service.and_then(|service| service.update_reason.as_deref()).unwrap_or("no reason is known");
    Failure::refused(format!("the update of {app}/{name} stopped: {reason}"))
        .hint(format!("what ran before goes on; correct it and deploy again (tinydc logs {app}/{name})"))
}

/// Of instances that share the name the newest.
fn failed_instance(service: &ServiceBody) -> Option<&InstanceBody> {
    let name = service.failed_instance.as_ref()?;
    service.instances.iter().filter(|row| row.name == *name).max_by_key(|row| row.spec_version)
}

/// Where the slot has its old instance back, the one that failed is dead, and its log is kept under its name.
async fn last_lines(client: &Client, instance: &InstanceBody) -> anyhow::Result<Vec<LogLine>> {
    let path = |name: &str, query: &str| format!("/v1/instances/{}/logs?{query}", escape(name));
    let own = path(&instance.id, &format!("tail={FAILED_LINES}"));
    if !matches!(instance.phase.as_str(), "running" | "healthy" | "pending" | "assigned" | "preparing") {
        return read_lines(client, &own).await;
    }
    let dead = path(&instance.name, &format!("dead=true&tail={FAILED_LINES}"));
    match read_lines(client, &dead).await {
        Ok(lines) => Ok(lines),
        Err(_) => read_lines(client, &own).await,
    }
}

async fn read_lines(client: &Client, path: &str) -> anyhow::Result<Vec<LogLine>> {
    let mut lines = client.lines(path).await?;
    let mut last = Vec::new();
    while let Some(line) = lines.next().await? {
        last.push(line);
    }
    Ok(last.split_off(last.len().saturating_sub(FAILED_LINES)))
}

/// `shop/web  2/3  rolling  web.3 preparing: pulling nginx 12 of 48 MiB`
fn line(service: &ServiceBody) -> String {
    let head = format!("{}/{} {}/{}", service.app, service.name, service.settled, service.wanted);
    let is_well = |phase: &str| matches!(phase, "healthy" | "completed" | "stopped");
    let busy = service.instances.iter().find(|row| row.desired == "run" && !is_well(&row.phase));
    match busy.filter(|_| service.settled < service.wanted) {
        None => head,
        Some(instance) => {
            let detail = detail(instance);
            let slot = instance.name.rsplit('/').next().unwrap_or("");
            let place = instance.node.as_ref().map(|node| format!(" on {node}")).unwrap_or_default();
            let mark = if detail.is_empty() { "" } else { ": " };
            format!("{head}  {slot} {}{place}{mark}{detail}", instance.phase)
        }
    }
}

struct Display {
    is_live: bool,
    has_colour: bool,
    is_quiet: bool,
    /// Lines on the terminal that the next draw replaces.
    drawn: usize,
    last: BTreeMap<String, String>,
}

impl Display {
    fn new(is_json: bool) -> Display {
        let is_live = io::stderr().is_terminal() && !is_json;
        let has_colour = terminal::has_error_colour();
        Display { is_live, has_colour, is_quiet: false, drawn: 0, last: BTreeMap::new() }
    }

    fn show(&mut self, services: &[ServiceBody]) {
        let lines: BTreeMap<String, String> =
            services.iter().map(|service| (service.name.clone(), line(service))).gather();
        if lines == self.last || self.is_quiet {
            return;
        }
        if self.is_live {
            self.redraw(services, &lines);
        } else {
            for (name, line) in &lines {
                if self.last.get(name) != Some(line) {
                    eprintln!("{line}");
                }
            }
        }
        self.last = lines;
    }

    fn redraw(&mut self, services: &[ServiceBody], lines: &BTreeMap<String, String>) {
        let (rows, columns) = terminal::window_size().unwrap_or((24, 80));
        // More lines than the window holds can't be redrawn: change lines from then on.
        if lines.len() + 1 >= usize::from(rows) {
            self.is_live = false;
            return lines.values().for_each(|line| eprintln!("{line}"));
        }
        let mut text = String::new();
        if self.drawn > 0 {
            text.push_str(&format!("\x1b[{}A", self.drawn));
        }
        let width = usize::from(columns).saturating_sub(1).min(WIDTH_MAX);
        for (name, line) in lines {
            let service = services.iter().find(|service| service.name == *name);
            let is_settled = service.is_some_and(|service| service.settled >= service.wanted);
            let colour = if is_settled { Colour::Green } else { Colour::Yellow };
            let line = shortened(line, width);
            let line = if self.has_colour { colour.paint(&line) } else { line };
            text.push_str(&format!("\r\x1b[K{line}\n"));
        }
        self.drawn = lines.len();
        let mut errors = io::stderr().lock();
        // A terminal that has gone needs no progress.
        self.is_quiet = errors.write_all(text.as_bytes()).and_then(|()| errors.flush()).is_err();
    }
}

/// Where to open it, and where its data lies.
pub fn print_end(status: &StatusBody) {
    let mut has_address = false;
    for service in &status.services {
        for address in &service.addresses {
            if !has_address {
                print_line("");
            }
            has_address = true;
            print_line(&format!("  {:<20} {address}", format!("{}/{}", service.app, service.name)));
        }
    }
    if has_address {
        print_line("");
    }
    for service in &status.services {
        for sentence in service.data.iter().chain(&service.left_out) {
            print_line(&format!("{}/{}: {sentence}", service.app, service.name));
        }
    }
    let running: usize = status.services.iter().map(|service| service.settled).sum();
    print_line(&match running {
        0 => "No instance is wanted, and none runs.".into(),
        1 => "The instance serves.".into(),
        running => format!("All {running} instances serve."),
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::names::tests::service;

    #[test]
    fn an_app_is_settled_when_each_service_is() {
        let mut services = [service("shop", "web", 2), service("shop", "db", 1)];
        assert_eq!(state(&services), State::Settled);
        services[0].settled = 1;
        assert_eq!(state(&services), State::Waiting);
        services[0].settled = 2;
        services[1].update = "rolling".into();
        assert_eq!(state(&services), State::Waiting);
        services[1].update = "failed".into();
        assert_eq!(state(&services), State::Failed("db".into()));
        assert_eq!(state(&[]), State::Settled);
    }

    #[test]
    fn a_waiting_service_says_what_it_waits_for() {
        let mut service = service("shop", "web", 2);
        assert_eq!(line(&service), "shop/web 2/2");
        service.settled = 1;
        service.instances[0].phase = "healthy".into();
        service.instances[1].phase = "preparing".into();
        service.instances[1].progress = Some("pulling nginx 12 of 48 MiB".into());
        assert_eq!(line(&service), "shop/web 1/2  web.2 preparing on pi1: pulling nginx 12 of 48 MiB");
    }

    #[test]
    fn of_two_instances_of_a_slot_the_newest_failed() {
        let mut service = service("shop", "web", 1);
        let mut newer = service.instances[0].clone();
        (newer.id, newer.spec_version) = ("i9".into(), 2);
        service.instances.insert(0, newer);
        service.failed_instance = Some("shop/web.1".into());
        assert_eq!(failed_instance(&service).unwrap().id, "i9");
    }
}
