//! The terminal: colour, output that may be cut off, questions, raw mode.
//!
//! Colour is shown only on a terminal, and not if `NO_COLOR` is set (no-color.org) or the terminal is dumb. A reader
//! that has gone (`tinydc ps | head -1`) ends the process quietly, as it does for other programs.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_io::Async;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{self, SetArg, Termios};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    Red,
    Green,
    Yellow,
    Blue,
    Magenta,
    Cyan,
    Faint,
}

impl Colour {
    fn code(self) -> &'static str {
        match self {
            Colour::Red => "31",
            Colour::Green => "32",
            Colour::Yellow => "33",
            Colour::Blue => "34",
            Colour::Magenta => "35",
            Colour::Cyan => "36",
            Colour::Faint => "2",
        }
    }

    pub fn paint(self, text: &str) -> String {
        format!("\x1b[{}m{text}\x1b[0m", self.code())
    }
}

fn wants_colour() -> bool {
    let is_off = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let is_dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
    !is_off && !is_dumb
}

/// On standard output.
pub fn has_colour() -> bool {
    io::stdout().is_terminal() && wants_colour()
}

/// On standard error.
pub fn has_error_colour() -> bool {
    io::stderr().is_terminal() && wants_colour()
}

/// One line on standard output; ends the process if nobody reads it any more.
pub fn print_line(line: &str) {
    print_bytes(format!("{line}\n").as_bytes());
}

pub fn print_bytes(bytes: &[u8]) {
    let mut output = io::stdout().lock();
    let written = output.write_all(bytes).and_then(|()| output.flush());
    if written.is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
        restore();
        // 128 + SIGPIPE, as a shell reports it.
        std::process::exit(141);
    }
}

/// Asks on standard error and reads one line; anything but y or yes is no.
pub fn confirm(question: &str) -> io::Result<bool> {
    eprint!("{question} [y/N] ");
    io::stderr().flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes" | "Yes"))
}

/// Rows and columns of the terminal on standard output; `None` if it is none.
pub fn window_size() -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// What the terminal was before raw mode, for whoever restores it: the guard, the panic hook, a stop signal.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode until it is dropped; also restored when the process panics.
pub struct RawMode(());

impl RawMode {
    /// `None` if standard input is no terminal.
    pub fn enter() -> io::Result<Option<RawMode>> {
        let input = io::stdin();
        if !input.is_terminal() {
            return Ok(None);
        }
        let before = termios::tcgetattr(input.as_fd())?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        let was_first = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).replace(before).is_none();
        if was_first {
            let hook = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                hook(panic);
            }));
        }
        termios::tcsetattr(input.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Some(RawMode(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was before raw mode.
pub fn restore() {
    // Taken only for a moment, but a panic may come at any.
    let Ok(before) = BEFORE.try_lock() else { return };
    if let Some(before) = before.as_ref() {
        // There is nothing to be done about a terminal that has gone.
        let _ = termios::tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, before);
    }
}

/// `None` if `work` takes longer than `limit`.
pub async fn within<Output>(limit: Duration, work: impl Future<Output = Output>) -> Option<Output> {
    futures_lite::future::or(async { Some(work.await) }, async {
        async_io::Timer::after(limit).await;
        None
    })
    .await
}

/// Signals that a verb takes itself. Blocked before any thread is made, so that every thread inherits it.
pub fn block(signals: &[Signal]) -> io::Result<()> {
    let set: SigSet = signals.iter().copied().collect();
    Ok(set.thread_block()?)
}

/// Waits for signals that `block` blocked.
pub struct Signals(Async<SignalFd>);

impl Signals {
    pub fn open(signals: &[Signal]) -> io::Result<Signals> {
        let set: SigSet = signals.iter().copied().collect();
        let file = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Signals(Async::new_nonblocking(file)?))
    }

    pub async fn next(&self) -> io::Result<Signal> {
        loop {
            if let Some(signal) = self.0.get_ref().read_signal()? {
                let number = i32::try_from(signal.ssi_signo).unwrap_or_default();
                return Ok(Signal::try_from(number)?);
            }
            self.0.readable().await?;
        }
    }
}
