//! One loop that waits for whatever happens first, and does what is then due.
//!
//! Input: ended children, devices, cables, packets, buttons, signals, time. Output: children started, drivers loaded,
//! addresses held, the watchdog fed, the report kept true. Nothing in a turn waits.

use super::attach::{self, Attached};
use super::card;
use super::child::{self, Kept, Output};
use super::clock;
use super::node_watch::{NodeWatch, Standing};
use super::phases::{Board, DATA_DIR, DISKS_PHASE};
use super::shutdown;
use super::slots::{self, Verdict};
use super::trial::Trial;
use crate::linux::clock::{boot_ms, is_synchronised};
use crate::linux::machine::{self, Ending};
use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// What tells the first process to end the machine's run.
const SIGNALS: [(Signal, Ending); 4] = [
    // Ctrl-Alt-Del.
    (Signal::SIGINT, Ending::Restart),
    (Signal::SIGTERM, Ending::Restart),
    (Signal::SIGUSR1, Ending::RestartOther),
    (Signal::SIGUSR2, Ending::PowerOff),
];
/// The daemon's, as it is without a data directory of its own.
pub const RUN_DIR: &str = "/run/tinydc";
const SOCKET: &str = "/run/tinydc/api.sock";
/// A turn comes at least this often.
const TURN_MS_MAX: u64 = 5_000;
/// A daemon that has not answered for this long is a problem that is told.
const SILENCE_MS: u64 = 20_000;
/// Prompts come when the daemon answers, or without it after this.
const PROMPTS_AFTER_MS: u64 = 8_000;
/// Tried again after this, when the card could not be written.
const WIPE_AGAIN_MS: u64 = 60_000;

pub struct Supervisor {
    pub board: Board,
    signals: SignalFd,
    output: Output,
    pub node: Kept,
    watch: NodeWatch,
    prompts: Vec<(PathBuf, Kept)>,
    disks: Attached,
    time_child: Option<i32>,
    time_at_ms: u64,
    time_wait: Duration,
    wipe_at_ms: u64,
    is_ready_told: bool,
    began_ms: u64,
    trial: Option<Trial>,
    log_terminal: Option<File>,
}

impl Supervisor {
    pub fn new(board: Board) -> Supervisor {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        for (signal, _) in SIGNALS {
            mask.add(signal);
        }
        mask.thread_block().expect("a set of existing signals");
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&mask, flags).expect("a kernel with signal descriptors");
        let output = Output::open().expect("a pipe, of which this process has hardly any");
        let has_prompts = board.settings.has_console;
        let trial = Trial::of(&board);
        let log_terminal = board.words.iter().find_map(|word| child::open_log_terminal(word));
        let paths = if has_prompts { board.console.paths() } else { Vec::new() };
        Supervisor {
            prompts: paths.into_iter().map(|path| (path, Kept::new())).collect(),
            disks: Attached::new(board.settings.disks.clone()),
            board,
            signals,
            output,
            node: Kept::new(),
            watch: NodeWatch::new(SOCKET.into()),
            time_child: None,
            time_at_ms: 0,
            time_wait: clock::RETRY_MIN,
            wipe_at_ms: 0,
            is_ready_told: false,
            trial,
            log_terminal,
            began_ms: boot_ms(),
        }
    }

    pub fn run(mut self) -> ! {
        loop {
            self.turn();
            self.wait();
            if self.is_trial_lost() {
                let lack = self.trial_lack().filter(|_| self.watch.standing.is_some());
                let lack = lack.unwrap_or("has no daemon that answered in time");
                self.board.console.say(&format!("this slot {lack}: back to the other slot"));
                shutdown::end(self, Ending::Restart);
            }
            if let Some(ending) = self.hear_signals() {
                shutdown::end(self, ending);
            }
            if self.board.buttons.is_pressed() {
                self.board.console.say("power button");
                shutdown::end(self, Ending::PowerOff);
            }
        }
    }

    /// Everything that is due now.
    fn turn(&mut self) {
        let now = boot_ms();
        self.hear_devices(now);
        self.hear_network(now);
        self.keep_disks(now);
        self.tell();
        self.keep_children(now);
        self.watch.step(now);
        self.judge(now);
        if let Some(watchdog) = &mut self.board.watchdog {
            watchdog.step(now, self.watch.answered_ms);
        }
        self.keep_time(now);
        self.wipe_token(now);
        self.board.report.answer();
    }

    /// What a slot on trial lacks beside a daemon that answers.
    fn trial_lack(&self) -> Option<&'static str> {
        let now = slots::Standing {
            has_data_disk: self.board.has_data_disk,
            has_address: self.board.network.as_ref().is_some_and(|network| network.has_address()),
            is_member: self.watch.standing == Some(Standing::Member),
        };
        self.trial.as_ref().and_then(|trial| trial.lack(now))
    }

    /// A slot on trial is kept once its daemon is steady, and left when its window ends.
    fn is_trial_lost(&mut self) -> bool {
        let now = boot_ms();
        let is_whole = self.trial_lack().is_none();
        let well = self.watch.well_since_ms.filter(|_| is_whole).map(|since| now - since);
        let Some(trial) = &mut self.trial else { return false };
        match trial.judge(now - self.began_ms, well) {
            Verdict::Wait => false,
            Verdict::GoBack => true,
            Verdict::Keep => {
                let kept = trial.keep();
                self.trial = None;
                match kept {
                    Ok(number) => self.board.console.say(&format!("slot {number} is well and is kept")),
                    Err(error) => self.board.complain(&format!("keep this slot: {error:#}")),
                }
                false
            }
        }
    }

    fn wait(&self) {
        let now = boot_ms();
        let mut due: Vec<u64> =
            vec![now + TURN_MS_MAX, self.watch.deadline_ms(), self.time_at_ms.max(now + 10)];
        due.extend(self.node.deadline_ms());
        due.extend(self.prompts.iter().filter_map(|(_, prompt)| prompt.deadline_ms()));
        due.extend(
            self.board.watchdog.as_ref().filter(|dog| dog.is_patient(now)).map(|dog| dog.deadline_ms()),
        );
        due.extend(self.board.network.as_ref().and_then(|network| network.deadline_ms()));
        due.extend(self.disks.deadline_ms());
        let left = due.into_iter().min().unwrap_or(now).saturating_sub(now);
        let limit = Timespec { tv_sec: (left / 1000) as i64, tv_nsec: (left % 1000 * 1_000_000) as i64 };
        let mut on: Vec<BorrowedFd<'_>> = vec![self.signals.as_fd(), self.output.waits_on()];
        on.extend(self.watch.waits_on());
        on.extend(self.board.events.as_ref().map(AsFd::as_fd));
        on.extend(self.board.network.iter().flat_map(|network| network.sockets()));
        on.extend(self.board.buttons.waits_on());
        on.extend(self.board.report.waits_on());
        let mut polled: Vec<PollFd<'_>> =
            on.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        // A failed wait makes the next turn come at once.
        let _ = rustix::event::poll(&mut polled, Some(&limit));
    }

    /// The end that a signal asks for.
    fn hear_signals(&mut self) -> Option<Ending> {
        let mut ending = None;
        while let Ok(Some(info)) = self.signals.read_signal() {
            if info.ssi_signo == Signal::SIGCHLD as u32 {
                self.reap();
            } else {
                let asked = SIGNALS.iter().find(|(signal, _)| *signal as u32 == info.ssi_signo);
                ending = ending.or(asked.map(|(_, ending)| *ending));
            }
        }
        ending
    }

    /// Takes everything that has ended, orphans of containers included.
    pub fn reap(&mut self) {
        let now = boot_ms();
        loop {
            let (pid, how) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid.as_raw(), format!("exit code {code}")),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid.as_raw(), signal.to_string()),
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            if self.node.ended(pid, now) {
                self.watch.forget(now);
                self.take_output();
                if !self.node.is_retired() {
                    self.board.complain(&format!("the daemon ended ({how}); it is started again"));
                }
            }
            for (_, prompt) in &mut self.prompts {
                prompt.ended(pid, now);
            }
            if self.disks.ended(pid, how == "exit code 0", now) {
                self.take_output();
            }
            if self.time_child == Some(pid) {
                self.time_child = None;
                self.asked_time(how == "exit code 0", now);
            }
        }
    }

    fn hear_devices(&mut self, now: u64) {
        let Some(events) = &self.board.events else { return };
        let mut buffer = vec![0; 8 << 10];
        let mut has_new = false;
        while let Ok(Some(length)) = machine::read_waiting(events.as_fd(), &mut buffer) {
            has_new |= self.board.drivers.hear(&buffer[..length]);
            if attach::is_of_disk(&buffer[..length]) {
                self.disks.heard(now);
            }
        }
        if has_new {
            self.board.buttons.look();
            for problem in self.board.drivers.take_failures() {
                self.board.complain(&problem);
            }
            self.look_at_links(now);
        }
    }

    fn look_at_links(&mut self, now: u64) {
        let board = &mut self.board;
        if let Some(network) = &mut board.network {
            network.look(&board.settings, &board.name, now);
        }
    }

    /// Tells which disks beside the data came and went, and lets a child see to them.
    fn keep_disks(&mut self, now: u64) {
        let news = self.disks.news(now);
        if !news.is_empty() && self.disks.is_complete() {
            self.board.report.forget_problem(DISKS_PHASE);
        }
        for news in news {
            self.board.console.say(&news);
        }
        if let Some(lack) = self.disks.lack(now) {
            self.board.complain(&format!("{DISKS_PHASE}: {lack}"));
        }
        let Some(words) = self.disks.due(now) else { return };
        let words: Vec<&str> =
            std::iter::once(super::DISKS_WORD).chain(words.iter().map(String::as_str)).collect();
        let mut command = child::own(&words);
        let started = self.output.attach(&mut command).and_then(|()| Ok(command.spawn()?));
        self.disks.started(started.ok().map(|child| child.id() as i32), now);
    }

    fn hear_network(&mut self, now: u64) {
        let Some(network) = &mut self.board.network else { return };
        network.tick(now);
        if network.receive(now) {
            self.look_at_links(now);
        }
        let Some(network) = &mut self.board.network else { return };
        let had_address = network.has_address();
        for news in network.take_news() {
            self.board.console.say(&news);
            // A new network may tell the time at last.
            if had_address && self.time_wait < clock::ASK_EVERY {
                self.time_at_ms = self.time_at_ms.min(now);
            }
        }
    }

    fn keep_children(&mut self, now: u64) {
        self.take_output();
        if self.node.is_due(now) {
            let outcome = self.start_node();
            self.node.started(&outcome, now);
            if let Err(error) = outcome {
                self.board.complain(&format!("start the daemon: {error:#}"));
            }
        }
        // A prompt that comes with the daemon shows at once what the board is.
        if self.watch.standing.is_none() && now < self.began_ms + PROMPTS_AFTER_MS {
            return;
        }
        for index in 0..self.prompts.len() {
            if self.prompts[index].1.is_due(now) {
                let outcome = start_prompt(&self.prompts[index].0);
                self.prompts[index].1.started(&outcome, now);
            }
        }
    }

    fn start_node(&self) -> Result<i32> {
        let mut command = child::own(&["node", "run"]);
        self.output.attach(&mut command)?;
        Ok(command.spawn().context("start tinydc node run")?.id() as i32)
    }

    pub fn take_output(&mut self) {
        for line in self.output.take_lines() {
            child::log(&line);
            if let Some(terminal) = &mut self.log_terminal {
                // A serial line whose other end is gone takes nothing.
                let _ = terminal.write_all(format!("{line}\r\n").as_bytes());
            }
        }
    }

    /// Whether the daemon is well, told when that changes.
    fn judge(&mut self, now: u64) {
        if self.watch.standing.is_some() && !self.is_ready_told {
            self.is_ready_told = true;
            let took = now - self.began_ms;
            self.board.console.say(&format!(
                "[{:>4}.{:03}] ready     the daemon answers ({took} ms after the last phase)",
                now / 1000,
                now % 1000
            ));
        }
        let answered = self.watch.answered_ms.unwrap_or(self.began_ms);
        let is_silent = now.saturating_sub(answered) > SILENCE_MS;
        if is_silent {
            self.board
                .report
                .add_problem("the daemon does not answer; the watchdog restarts the board if it stays so");
        }
        let is_wanted = is_silent || !self.board.has_data_disk || self.board.report.has_failure();
        self.board.report.listen(is_wanted);
    }

    /// Asks for the time when that is due: by a child, because names are looked up for it.
    fn keep_time(&mut self, now: u64) {
        let has_address = self.board.network.as_ref().is_some_and(|network| network.has_address());
        if self.time_child.is_some() || now < self.time_at_ms || !has_address {
            if self.time_child.is_none() && now >= self.time_at_ms {
                self.time_at_ms = now + clock::RETRY_MIN.as_millis() as u64;
            }
            return;
        }
        let mut words = vec![super::CLOCK_WORD.to_string(), DATA_DIR.to_string()];
        words.extend(self.board.settings.ntp.iter().cloned());
        words.extend(self.board.network.iter().flat_map(|network| network.time_servers()));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut command = child::own(&words);
        let started = self.output.attach(&mut command).and_then(|()| Ok(command.spawn()?));
        match started {
            Ok(child) => self.time_child = Some(child.id() as i32),
            Err(_) => self.asked_time(false, now),
        }
    }

    fn asked_time(&mut self, is_right: bool, now: u64) {
        self.time_wait = match is_right {
            true => clock::ASK_EVERY,
            false if self.time_wait >= clock::ASK_EVERY => clock::RETRY_MIN,
            false => (self.time_wait * 2).min(clock::RETRY_MAX),
        };
        self.time_at_ms = now + self.time_wait.as_millis() as u64;
    }

    /// A token that was used leaves the card.
    fn wipe_token(&mut self, now: u64) {
        let is_used = self.watch.standing == Some(Standing::Member) && self.board.settings.join.is_some();
        if !is_used || now < self.wipe_at_ms {
            return;
        }
        self.wipe_at_ms = now + WIPE_AGAIN_MS;
        let Some(card) = &self.board.card else { return };
        match card::wipe_token(card, "the token was used by this board and taken out") {
            Ok(_) => {
                self.board.settings.join = None;
                self.board.console.say("the token in tinydc.toml was used and taken out");
            }
            Err(error) => self.board.complain(&format!("take the token out of tinydc.toml: {error:#}")),
        }
    }

    fn tell(&mut self) {
        let addresses = self.board.network.as_ref().map(|network| network.addresses()).unwrap_or_default();
        let daemon = match self.watch.standing {
            Some(Standing::Member) => slots::MEMBER,
            Some(Standing::Unjoined) => "belongs to no cluster yet",
            None => "does not answer",
        };
        let clock = if is_synchronised() { "right" } else { "not checked yet" };
        let data =
            if self.board.has_data_disk { slots::ON_DISK } else { "IN MEMORY, lost at the next start" };
        let mut standing = vec![
            format!("name: {}", self.board.name),
            format!("address: {}", addresses.join(", ")),
            format!("daemon: {daemon}"),
            format!("clock: {clock}"),
            format!("data: {data}"),
        ];
        standing.extend(self.disks.standing().map(|disks| format!("disks: {disks}")));
        self.board.report.set_standing(standing);
    }

    /// The children that only read and print.
    pub fn prompt_pids(&self) -> Vec<i32> {
        self.prompts.iter().filter_map(|(_, prompt)| prompt.pid()).collect()
    }

    pub fn retire_children(&mut self) {
        self.node.retire();
        for (_, prompt) in &mut self.prompts {
            prompt.retire();
        }
    }
}

fn start_prompt(path: &Path) -> Result<i32> {
    let open = || File::options().read(true).write(true).open(path).context("open the terminal");
    let mut command = child::own(&["console"]);
    command.stdin(Stdio::from(open()?)).stdout(Stdio::from(open()?)).stderr(Stdio::from(open()?));
    command.env("TERM", if path.ends_with("tty1") { "linux" } else { "vt100" });
    machine::take_terminal(&mut command);
    Ok(command.spawn().context("start a prompt")?.id() as i32)
}
