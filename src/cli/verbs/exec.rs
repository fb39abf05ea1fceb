//! `exec`: run a command in an instance.
//!
//! The connection is upgraded and carries the frames that `api::wire::ExecBody` describes. With `-t` the terminal is
//! raw until the end, also after a panic or a stop signal; a changed window is told. The command's exit code is ours.

use crate::model::Gather;
use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};

use argh::FromArgs;
use async_channel::{Receiver, Sender};
use futures_lite::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, future};
use nix::sys::signal::Signal;
use smol::Unblock;

use crate::api::wire::{ExecBody, StatusBody};
use crate::cli::client::escape;
use crate::cli::failure::Failure;
use crate::cli::names::resolve;
use crate::cli::project::app_here;
use crate::cli::terminal::{self, RawMode, Signals};
use crate::cli::{Session, usage};

pub const SIGNALS: &[Signal] = &[Signal::SIGWINCH, Signal::SIGTERM, Signal::SIGHUP];
const PROTOCOL: &str = "tinydc-exec";
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
/// From us; the daemon's frames of this kind are standard error.
const WINDOW: u8 = 2;
const EXIT: u8 = 3;
const ERROR: u8 = 4;
const FRAME_BYTES_MAX: usize = 1 << 20;
const INPUT_CHUNK_BYTES: usize = 16 << 10;
const FRAMES_WAITING_MAX: usize = 16;

/// Run a command in an instance; its exit code is passed on.
#[derive(FromArgs)]
#[argh(subcommand, name = "exec", help_triggers("-h", "--help"))]
#[argh(example = "tinydc exec -it shop/web -- sh\ntinydc exec db -- pg_dump shop > shop.sql")]
pub struct Exec {
    /// pass standard input on
    #[argh(switch, short = 'i')]
    interactive: bool,
    /// give the command a terminal
    #[argh(switch, short = 't')]
    tty: bool,
    /// set a variable, KEY=VALUE
    #[argh(option, short = 'e', arg_name = "KEY=VALUE")]
    env: Vec<String>,
    /// run as this user
    #[argh(option, short = 'u', arg_name = "USER")]
    user: Option<String>,
    /// run in this directory
    #[argh(option, short = 'w', arg_name = "DIR")]
    workdir: Option<String>,
    /// APP/SERVICE.N; the first running instance of APP/SERVICE
    #[argh(positional, arg_name = "NAME")]
    name: String,
    /// the command and its arguments
    #[argh(positional, arg_name = "COMMAND", greedy)]
    command: Vec<String>,
}

impl Exec {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        if self.command.is_empty() {
            return Err(usage("exec needs a command", "such as: tinydc exec -it web -- sh"));
        }
        if self.tty && !io::stdin().is_terminal() {
            return Err(usage("-t needs a terminal on standard input", "leave out -t"));
        }
        let client = session.client()?;
        let status: StatusBody = client.read("/v1/status").await?;
        let selection = resolve(&self.name, app_here().as_deref(), &status.services)?;
        let instances = selection.instances(&status.services);
        let services: std::collections::BTreeSet<&str> = instances
            .iter()
            .map(|instance| instance.name.rsplit_once('.').map_or("", |(service, _)| service))
            .gather();
        if services.len() > 1 {
            let names: Vec<&str> = services.into_iter().collect();
            return Err(usage("in which service?", format!("say one of {}", names.join(", "))));
        }
        let is_running = |phase: &str| matches!(phase, "running" | "healthy" | "unhealthy" | "failing");
        let instance = instances.iter().find(|instance| is_running(&instance.phase)).ok_or_else(|| {
            Failure::refused(format!("no instance of {} is running", self.name))
                .hint(format!("tinydc status {} says why", selection.app))
        })?;
        let path = format!("/v1/instances/{}/exec", escape(&instance.id));
        let body = self.body()?;
        let signals = Signals::open(SIGNALS)?;
        let upgraded = client.upgrade(&path, PROTOCOL, &body).await?;
        let raw = if self.tty { RawMode::enter()? } else { None };
        let (reader, writer) = futures_lite::io::split(upgraded.stream);
        let reader = AsyncReadExt::chain(futures_lite::io::Cursor::new(upgraded.early.to_vec()), reader);
        let (sender, frames) = async_channel::bounded(FRAMES_WAITING_MAX);
        if self.interactive {
            client.executor.spawn(read_input(sender.clone())).detach();
        }
        let (mut output, mut errors) = (io::stdout(), io::stderr());
        let receive = receive(reader, &mut output, &mut errors);
        let watch = watch_signals(&signals, &sender);
        let code = future::or(future::or(receive, send(writer, frames)), watch).await;
        drop(raw);
        match code? {
            0 => Ok(()),
            code => Err(Failure::command(exit_number(code)).into()),
        }
    }

    fn body(&self) -> anyhow::Result<ExecBody> {
        let mut environment = BTreeMap::new();
        for variable in &self.env {
            let (key, value) = variable
                .split_once('=')
                .ok_or_else(|| usage(format!("{variable:?} is no variable"), "write KEY=VALUE"))?;
            environment.insert(key.to_owned(), value.to_owned());
        }
        if self.tty
            && let Ok(term) = std::env::var("TERM")
        {
            environment.entry("TERM".into()).or_insert(term);
        }
        let (rows, columns) = terminal::window_size().unwrap_or((24, 80));
        Ok(ExecBody {
            command: self.command.clone(),
            has_terminal: self.tty,
            has_stdin: self.interactive,
            environment,
            user: self.user.clone(),
            working_dir: self.workdir.clone(),
            rows,
            columns,
        })
    }
}

/// As a shell shows it: what does not fit a byte is 255.
fn exit_number(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(u8::MAX)
}

fn frame(kind: u8, bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).expect("chunks are far below 4 GiB");
    [&[kind][..], &length.to_be_bytes(), bytes].concat()
}

/// Its last frame is empty: the end of standard input.
async fn read_input(sender: Sender<Vec<u8>>) {
    let mut input = Unblock::new(io::stdin());
    let mut buffer = vec![0; INPUT_CHUNK_BYTES];
    loop {
        // A terminal that has gone ends the input.
        let length = input.read(&mut buffer).await.unwrap_or(0);
        if sender.send(frame(STDIN, &buffer[..length])).await.is_err() || length == 0 {
            return;
        }
    }
}

/// Never gives an exit code: when the daemon has gone, `receive` says so.
async fn send(mut writer: impl AsyncWrite + Unpin, frames: Receiver<Vec<u8>>) -> anyhow::Result<i32> {
    while let Ok(frame) = frames.recv().await {
        if writer.write_all(&frame).await.is_err() || writer.flush().await.is_err() {
            break;
        }
    }
    future::pending().await
}

async fn watch_signals(signals: &Signals, sender: &Sender<Vec<u8>>) -> anyhow::Result<i32> {
    loop {
        let signal = signals.next().await?;
        if signal != Signal::SIGWINCH {
            // The guard restores the terminal; 128 + signal, as a shell reports it.
            return Ok(128 + signal as i32);
        }
        if let Some((rows, columns)) = terminal::window_size() {
            let size = [rows.to_be_bytes(), columns.to_be_bytes()].concat();
            // The next size replaces one that is lost in a full queue.
            let _ = sender.try_send(frame(WINDOW, &size));
        }
    }
}

/// Until the daemon tells the exit code.
async fn receive(
    mut reader: impl AsyncRead + Unpin,
    output: &mut impl Write,
    errors: &mut impl Write,
) -> anyhow::Result<i32> {
    let lost = || Failure::unknown_outcome("the connection broke; the command may still run");
    loop {
        let mut head = [0; 5];
        reader.read_exact(&mut head).await.map_err(|_| lost())?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if length > FRAME_BYTES_MAX {
            return Err(Failure::refused("the daemon sent a frame without end").into());
        }
        let mut bytes = vec![0; length];
        reader.read_exact(&mut bytes).await.map_err(|_| lost())?;
        match head[0] {
            STDOUT => write(output, &bytes)?,
            STDERR => write(errors, &bytes)?,
            EXIT => {
                let code = bytes[..].try_into().map(i32::from_be_bytes);
                return code.map_err(|_| Failure::refused("the daemon sent no exit code").into());
            }
            ERROR => return Err(Failure::refused(String::from_utf8_lossy(&bytes)).into()),
            // A newer daemon's.
            _ => {}
        }
    }
}

fn write(output: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    output.write_all(bytes)?;
    output.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_told_apart_and_the_last_is_the_exit_code() {
        let check = |frames: &[Vec<u8>]| {
            let (mut output, mut errors) = (Vec::new(), Vec::new());
            let bytes = frames.concat();
            let code = future::block_on(receive(&bytes[..], &mut output, &mut errors));
            (code, String::from_utf8(output).unwrap(), String::from_utf8(errors).unwrap())
        };
        let end = frame(EXIT, &7_i32.to_be_bytes());
        let (code, output, errors) =
            check(&[frame(STDOUT, b"a"), frame(STDERR, b"b"), frame(9, b"x"), frame(STDOUT, b"c"), end]);
        assert_eq!((code.unwrap(), output.as_str(), errors.as_str()), (7, "ac", "b"));
        let (code, ..) = check(&[frame(STDOUT, b"a")]);
        assert_eq!(code.unwrap_err().downcast_ref::<Failure>().unwrap().exit.number(), 4);
        let (code, ..) = check(&[frame(ERROR, b"no such file")]);
        assert_eq!(code.unwrap_err().to_string(), "no such file");
        let (code, ..) = check(&[vec![STDOUT, 0xff, 0xff, 0xff, 0xff]]);
        assert!(code.is_err());
        assert_eq!([0, 255, 256, -1].map(exit_number), [0, 255, 255, 255]);
    }
}
