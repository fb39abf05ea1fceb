//! `tinydc shim-wait`: stays with one container until it ends.
//!
//! Input: the container's output, its end, and questions at the control socket. Output: the log, the exit record,
//! answers. It waits in one poll without a timeout while the log is flushed, so a silent container costs neither
//! wake-ups nor writes. It allocates little and lives in few pages (≤ 0.6 MiB PSS).
//!
//! A message at the control socket is one verb: `dump` (the unflushed log), `follow` (the same, then every frame),
//! `status`, `lease MILLISECONDS`: until when since boot the container of an exclusive service may run. The lease is
//! a message and no file: it costs no write and no look at a clock, and the poll below ends when it does.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use super::launch::unix_ms;
use super::record::ExitRecord;
use super::{LeaseEnd, OOM_SCORE};
use crate::linux::cgroup::Cgroups;
use crate::linux::{process, socket};
use crate::runtime::logs::{LogWriter, Now, Stream, TAIL, TEXT_BYTES_MAX, read_rest};

/// Bounds what readers can make a shim hold and do.
const CLIENTS_MAX: usize = 8;
/// One message to a follower; far below a socket's buffer.
const MESSAGE_BYTES_MAX: usize = 48 * 1024;

/// Output that comes within this time of the last is let gather for as long.
const CHATTY_PAUSE: Duration = Duration::from_millis(1);

/// What the waiter is told, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitArguments {
    pub run: PathBuf,
    pub logs: PathBuf,
    pub cgroup: String,
    pub pid: i32,
    pub started_at_ms: u64,
    pub lease: Option<LeaseEnd>,
    pub control_fd: i32,
    pub stdout_fd: i32,
    /// -1: the terminal carries both streams.
    pub stderr_fd: i32,
}

impl WaitArguments {
    pub fn to_words(&self) -> Vec<PathBuf> {
        let numbers = [self.control_fd, self.stdout_fd, self.stderr_fd].map(|number| number.to_string());
        let mut words =
            vec!["shim-wait".into(), self.run.clone(), self.logs.clone(), self.cgroup.clone().into()];
        let figures = [self.pid.to_string(), self.started_at_ms.to_string(), LeaseEnd::to_word(self.lease)];
        words.extend(figures.map(PathBuf::from));
        words.extend(numbers.map(PathBuf::from));
        words
    }

    fn parse(words: &[&str]) -> Option<WaitArguments> {
        let [run, logs, cgroup, pid, started_at_ms, lease, control, stdout, stderr] = words else {
            return None;
        };
        Some(WaitArguments {
            run: PathBuf::from(run),
            logs: PathBuf::from(logs),
            cgroup: (*cgroup).to_owned(),
            pid: pid.parse().ok()?,
            started_at_ms: started_at_ms.parse().ok()?,
            lease: LeaseEnd::parse(lease)?,
            control_fd: control.parse().ok()?,
            stdout_fd: stdout.parse().ok()?,
            stderr_fd: stderr.parse().ok()?,
        })
    }
}

pub fn run(words: &[&str]) -> ExitCode {
    let Some(arguments) = WaitArguments::parse(words) else { return ExitCode::from(2) };
    let _ = process::set_oom_score_adj(OOM_SCORE);
    match Waiter::new(arguments).and_then(|mut waiter| waiter.wait().map(|()| waiter.finish())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

struct Client {
    socket: OwnedFd,
    follows: bool,
    /// Frames that a slow reader missed.
    missed: u64,
}

struct Waiter {
    arguments: WaitArguments,
    children: OwnedFd,
    control: OwnedFd,
    outputs: Vec<(Stream, OwnedFd)>,
    clients: Vec<Client>,
    log: LogWriter,
    exit: Option<WaitStatus>,
}

impl Waiter {
    fn new(arguments: WaitArguments) -> io::Result<Waiter> {
        let children = process::child_exit_fd()?;
        let control = process::take_inherited(arguments.control_fd)?;
        let mut outputs = Vec::with_capacity(2);
        for (stream, number) in [(Stream::Stdout, arguments.stdout_fd), (Stream::Stderr, arguments.stderr_fd)]
        {
            if number >= 0 {
                let fd = process::take_inherited(number)?;
                rustix::io::ioctl_fionbio(&fd, true)?;
                outputs.push((stream, fd));
            }
        }
        let tail = arguments.run.join(TAIL);
        let rest = read_rest(&tail);
        let _ = std::fs::remove_file(&tail);
        let log = LogWriter::new(arguments.logs.clone(), rest, now());
        Ok(Waiter { arguments, children, control, outputs, clients: Vec::new(), log, exit: None })
    }

    /// Returns when the container has ended.
    fn wait(&mut self) -> io::Result<()> {
        let mut buffer = vec![0u8; TEXT_BYTES_MAX];
        // A child may have ended before its signal was watched.
        self.reap();
        let mut last_wake = Instant::now();
        while self.exit.is_none() {
            let ready = self.poll()?;
            if last_wake.elapsed() < CHATTY_PAUSE {
                // Line by line, a chatty container would wake this process a million times: read it in batches.
                std::thread::sleep(CHATTY_PAUSE);
            }
            last_wake = Instant::now();
            if ready.children {
                // One read takes one of the queued signals; what matters is in waitpid.
                let _ = rustix::io::read(&self.children, &mut buffer[..128]);
            }
            self.pump_ready(&ready.outputs, &mut buffer);
            for index in (0..self.clients.len()).rev().filter(|index| ready.clients[*index]) {
                if !self.serve(index) {
                    self.clients.remove(index);
                }
            }
            if ready.control {
                self.admit()?;
            }
            self.end_if_over();
            self.log.flush_if_due(Instant::now());
            if ready.children {
                self.reap();
            }
        }
        Ok(())
    }

    fn poll(&self) -> io::Result<Ready> {
        let mut fds = Vec::with_capacity(2 + self.outputs.len() + self.clients.len());
        fds.push(PollFd::new(&self.children, PollFlags::IN));
        fds.push(PollFd::new(&self.control, PollFlags::IN));
        fds.extend(self.outputs.iter().map(|(_, fd)| PollFd::new(fd, PollFlags::IN)));
        fds.extend(self.clients.iter().map(|client| PollFd::new(&client.socket, PollFlags::IN)));
        let flush = self.log.flush_due().map(|due| due.saturating_duration_since(Instant::now()));
        let lease = self.arguments.lease.map(LeaseEnd::left);
        let timeout = flush.into_iter().chain(lease).min().map(|left| {
            let left = left + Duration::from_millis(1);
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
        });
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut states = fds.iter().map(|fd| !fd.revents().is_empty());
        let (children, control) = (states.next().unwrap_or(false), states.next().unwrap_or(false));
        let outputs = states.by_ref().take(self.outputs.len()).collect();
        Ok(Ready { children, control, outputs, clients: states.collect() })
    }

    /// Kills the container when its lease is over: the first process of its namespace takes all others with it.
    fn end_if_over(&mut self) {
        if self.exit.is_some() || !self.arguments.lease.is_some_and(LeaseEnd::has_come) {
            return;
        }
        self.arguments.lease = None;
        let note = b"ended: exclusive, and no leader has confirmed for 10 s that it may run here\n";
        self.log.append(Stream::Note, note, now(), &mut |_| {});
        if let Some(pid) = Pid::from_raw(self.arguments.pid) {
            // It is this process's child and not yet reaped, so the number is still its own.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }

    /// Collects every child that has ended: the container, and orphans that fell to this process.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if Some(pid) == Pid::from_raw(self.arguments.pid) {
                self.exit = Some(status);
            }
        }
    }

    /// Reads every output that has something, stdout first, and forgets those that have ended.
    fn pump_ready(&mut self, ready: &[bool], buffer: &mut [u8]) {
        let mut ended = [false; 2];
        for index in (0..self.outputs.len()).filter(|index| ready[*index]) {
            ended[index] = !self.pump(index, buffer);
        }
        let mut index = 0;
        self.outputs.retain(|_| {
            index += 1;
            !ended[index - 1]
        });
    }

    /// One read of an output into the log and to the followers. `false`: it has ended.
    fn pump(&mut self, index: usize, buffer: &mut [u8]) -> bool {
        let Some((stream, fd)) = self.outputs.get(index) else { return false };
        let count = match rustix::io::read(fd, &mut *buffer) {
            Ok(0) => return false,
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return true,
            // A terminal whose last user is gone answers EIO.
            Err(_) => return false,
        };
        let mut batch = Vec::new();
        let clients = &mut self.clients;
        let has_followers = clients.iter().any(|client| client.follows);
        self.log.append(*stream, &buffer[..count], now(), &mut |frame| {
            if has_followers {
                if batch.len() + frame.len() > MESSAGE_BYTES_MAX {
                    tell_followers(clients, &batch);
                    batch.clear();
                }
                batch.extend_from_slice(frame);
            }
        });
        if !batch.is_empty() {
            tell_followers(clients, &batch);
        }
        true
    }

    fn admit(&mut self) -> io::Result<()> {
        while let Some(socket) = socket::accept_messages(self.control.as_fd())? {
            if self.clients.len() < CLIENTS_MAX {
                self.clients.push(Client { socket, follows: false, missed: 0 });
            }
        }
        Ok(())
    }

    /// Answers one message of a client. `false`: it has left, or is done.
    fn serve(&mut self, index: usize) -> bool {
        let Some(client) = self.clients.get_mut(index) else { return false };
        let mut message = [0u8; 64];
        let length = match socket::receive(client.socket.as_fd(), &mut message) {
            Ok(0) => return false,
            Ok(length) => length,
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        };
        let verb = message[..length].split(|byte| *byte == b' ').next().unwrap_or_default();
        let answer = |text: &[u8]| socket::send(client.socket.as_fd(), text).is_ok();
        match verb {
            b"dump" | b"follow" => {
                let (inode, bytes, rest) = self.log.position();
                let head = format!("log {inode} {bytes} {}", rest.len());
                let sent = answer(head.as_bytes()) && rest.chunks(MESSAGE_BYTES_MAX).all(answer);
                client.follows = verb == b"follow";
                sent
            }
            b"status" => answer(format!("running {}", self.arguments.pid).as_bytes()),
            b"lease" => {
                let end = std::str::from_utf8(&message[6.min(length)..length]).ok();
                match (self.arguments.lease, end.and_then(LeaseEnd::parse).flatten()) {
                    (Some(_), Some(end)) => {
                        self.arguments.lease = Some(end);
                        answer(b"ok")
                    }
                    (None, _) => answer(b"error this container has no lease, or it is over"),
                    (_, None) => answer(b"error lease takes milliseconds since boot"),
                }
            }
            _ => answer(b"error unknown verb"),
        }
    }

    /// Takes what the pipes still hold, hands over the rest of the log, writes the exit record.
    fn finish(&mut self) {
        let mut buffer = vec![0u8; TEXT_BYTES_MAX];
        for index in 0..self.outputs.len() {
            // A pipe holds at most 1 MiB, and nobody writes any more: the namespace died with its first process.
            for _ in 0..64 {
                let Some((_, fd)) = self.outputs.get(index) else { break };
                let mut fds = [PollFd::new(fd, PollFlags::IN)];
                let none = Timespec { tv_sec: 0, tv_nsec: 0 };
                let readable = rustix::event::poll(&mut fds, Some(&none)).is_ok()
                    && fds[0].revents().contains(PollFlags::IN);
                if !readable || !self.pump(index, &mut buffer) {
                    break;
                }
            }
        }
        let exit = self.exit_record();
        let rest = self.log.take_rest(now());
        if !rest.is_empty() {
            let _ = std::fs::write(self.arguments.run.join(TAIL), &rest);
        }
        // Last: whoever sees it may start the container again.
        let _ = exit.write(&self.arguments.run);
    }

    fn exit_record(&self) -> ExitRecord {
        let status = self.exit;
        let signal = status.and_then(WaitStatus::terminating_signal);
        let code =
            status.and_then(WaitStatus::exit_status).or(signal.map(|number| 128 + number)).unwrap_or(255);
        let oom_kills = Cgroups::detect().map_or(0, |cgroups| cgroups.oom_kills(&self.arguments.cgroup));
        ExitRecord {
            code,
            signal,
            // 137: a shell that reports its child's death as its own.
            is_oom_killed: oom_kills > 0 && code == 137,
            oom_kills,
            started_at_ms: self.arguments.started_at_ms,
            finished_at_ms: unix_ms(),
        }
    }
}

struct Ready {
    children: bool,
    control: bool,
    outputs: Vec<bool>,
    clients: Vec<bool>,
}

fn now() -> Now {
    Now { unix_ms: unix_ms(), monotonic: Instant::now() }
}

/// Sends frames to every follower. One that does not keep up misses them and is told how many; the container never
/// waits for a reader. One that left is noticed by `serve`.
fn tell_followers(clients: &mut [Client], frames: &[u8]) {
    for client in clients.iter_mut().filter(|client| client.follows) {
        if client.missed > 0 {
            let note = format!("{} n. {} frames skipped: the reader is too slow\n", unix_ms(), client.missed);
            if socket::send(client.socket.as_fd(), note.as_bytes()).is_ok() {
                client.missed = 0;
            }
        }
        if client.missed > 0 || socket::send(client.socket.as_fd(), frames).is_err() {
            client.missed += frames.iter().filter(|byte| **byte == b'\n').count() as u64;
        }
    }
}
