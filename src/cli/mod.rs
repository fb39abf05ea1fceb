//! The command line: what a person types, sent to a daemon, and its answer in words and tables.
//!
//! argv → `arguments` (normalised) → argh → one file per verb in `verbs` → `client` → `connection`. A thin client:
//! apart from `node run` it holds no state of the cluster and runs without root; what it knows of clusters elsewhere
//! lies in `contexts`. Errors carry their exit code (`failure`) and are printed once, here.
//!
//! Invariant: nothing but what was asked for goes to standard output; progress and errors go to standard error.

mod arguments;
mod by_code;
mod client;
mod connection;
pub mod console;
mod contexts;
pub mod demo;
mod failure;
mod figures;
pub mod hello;
mod help;
pub mod lab;
mod names;
mod pack;
mod project;
mod table;
mod terminal;
mod verbs;

use std::ffi::OsString;
use std::process::ExitCode;
use std::rc::Rc;

use anyhow::Context;
use argh::FromArgs;
use async_executor::LocalExecutor;
use serde::Serialize;

use arguments::{Arguments, Globals};
use client::Client;
use connection::Target;
use failure::Failure;

/// `args`: without the program's name.
pub fn main(args: &[OsString]) -> ExitCode {
    // Before anything is parsed, so that also a usage error is JSON where JSON was asked for.
    let asks_json = args.iter().take_while(|arg| *arg != "--").any(|arg| arg == "--json");
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error, asks_json, terminal::has_error_colour()),
    }
}

fn run(args: &[OsString]) -> anyhow::Result<()> {
    let Arguments { globals, words } = arguments::read(args)?;
    let Some(words) = help::wanted_words(words) else {
        terminal::print_bytes(help::OVERVIEW.as_bytes());
        return Ok(());
    };
    let verb = words.first().cloned().unwrap_or_default();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let command = match verbs::Command::from_args(&["tinydc"], &words) {
        Ok(command) => command,
        Err(early) if early.status.is_ok() => {
            terminal::print_bytes(help::complete(&early.output).as_bytes());
            return Ok(());
        }
        Err(early) => return Err(help::explain_usage(&verb, &early.output).into()),
    };
    if let verbs::Verb::Node(node) = &command.verb
        && let Some(options) = node.run_options(&globals)
    {
        crate::linux::process::raise_open_files_limit().context("raise the limit of open files")?;
        return crate::node::run(options);
    }
    terminal::block(command.verb.own_signals())?;
    let executor = Rc::new(LocalExecutor::new());
    let session = Session { globals, executor: executor.clone() };
    async_io::block_on(executor.run(verbs::run(&session, command.verb)))
}

/// What every verb is given.
pub struct Session {
    pub globals: Globals,
    pub executor: Rc<LocalExecutor<'static>>,
}

impl Session {
    pub fn client(&self) -> anyhow::Result<Client> {
        let target = Target::choose(&self.globals)?;
        Ok(Client::new(self.executor.clone(), target, self.globals.is_json))
    }

    /// To this machine's daemon, whatever the current context.
    pub fn local_client(&self) -> anyhow::Result<Client> {
        let target = Target::local(&self.globals)?;
        Ok(Client::new(self.executor.clone(), target, self.globals.is_json))
    }

    pub fn is_json(&self) -> bool {
        self.globals.is_json
    }

    /// With `--json` the answer as it came; else what `show` prints.
    pub fn show<Answer: Serialize>(&self, answer: &Answer, show: impl FnOnce(&Answer)) -> anyhow::Result<()> {
        if self.is_json() {
            terminal::print_line(&serde_json::to_string(answer)?);
        } else {
            show(answer);
        }
        Ok(())
    }

    /// For a verb whose whole answer is that it was done.
    pub fn done(&self, sentence: &str) {
        if self.is_json() {
            terminal::print_line("{}");
        } else {
            terminal::print_line(sentence);
        }
    }
}

/// An operand that is a number, size or word gets an error that names it.
fn usage(message: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Failure::usage(message).hint(hint).into()
}
