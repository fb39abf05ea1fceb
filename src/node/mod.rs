//! Builds everything in order and stops it in reverse: the daemon, `tinydc node run`.
//!
//! Unjoined (`unjoined`) it waits for `init` or `join` on its local socket, or for somebody who knows its code. As a
//! member it runs the replica, the transport, the agent and the API, until it is told to stop, its disk fails, or the
//! cluster has let it go.

mod config;
mod founding;
mod health;
mod in_the_way;
mod machine;
mod member;
mod outgoing;
mod socket;
mod unjoined;

pub use config::{Config, ConfigError};
pub use unjoined::CLUSTER_NAME;

use crate::api::ApiError;
use crate::api::wire::{InitReply, JoinDone};
use crate::tasks::Launch;
use crate::transport::identity::Identity;
use anyhow::{Context, Result, bail};
use async_executor::Executor;
use async_io::Async;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use tracing::{info, warn};

/// Threads that run tasks: one for the network, one so that a busy handler delays nobody.
const EXECUTOR_THREADS: usize = 2;

#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    pub config: Option<PathBuf>,
    pub data_dir: Option<PathBuf>,
}

/// How far a stop goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Of the daemon; containers run on.
    Daemon,
    /// Of the machine, as its first process says by SIGQUIT: containers are stopped first.
    Machine,
}

/// Why a member's run ended.
pub(crate) enum Ended {
    Stopped(Stop),
    /// It belongs to no cluster any more.
    Removed,
    Failed(String),
}

/// Somebody waits for what `init` or `join` came to.
pub(crate) enum Awaiting {
    Nobody,
    Init {
        reply: async_channel::Sender<Result<InitReply, ApiError>>,
        recovery_key: String,
    },
    Join {
        reply: async_channel::Sender<Result<JoinDone, ApiError>>,
    },
    /// Whoever founded the cluster by code gets access by a secret that only the two ends of that session know.
    Founder {
        person: String,
        secret: String,
    },
}

pub fn run(options: RunOptions) -> Result<()> {
    crate::linux::process::share_one_heap();
    let mut config = Config::load(options.config.as_deref())?;
    if options.data_dir.is_some() {
        config.data_dir = options.data_dir;
    }
    crate::telemetry::start(config.log.as_deref().unwrap_or("info"));
    abort_on_panic();
    let executor = Arc::new(Executor::new());
    let (stop_threads, stopped) = async_channel::bounded::<()>(1);
    let threads: Vec<thread::JoinHandle<()>> = (0..EXECUTOR_THREADS)
        .map(|number| {
            let (executor, stopped) = (executor.clone(), stopped.clone());
            thread::Builder::new().name(format!("tasks-{number}")).spawn(move || {
                // Returns when the channel is closed below.
                let _ = async_io::block_on(executor.run(stopped.recv()));
            })
        })
        .collect::<Result<_, _>>()
        .context("start a thread")?;
    let outcome = async_io::block_on(executor.run(serve(config, executor.clone())));
    stop_threads.close();
    for thread in threads {
        // A task that panicked has aborted the process.
        let _ = thread.join();
    }
    outcome
}

/// A dead thread in a live daemon is worse than a restart.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

async fn serve(config: Config, executor: Arc<Executor<'static>>) -> Result<()> {
    let data_dir = config.data_dir();
    std::fs::create_dir_all(&data_dir).with_context(|| format!("create {}", data_dir.display()))?;
    let _lock = socket::lock_data_dir(&data_dir)?;
    let run_dir = config.run_dir();
    let listener = socket::listen(&run_dir)?;
    use async_signal::Signal;
    let signals = async_signal::Signals::new([Signal::Term, Signal::Int, Signal::Quit])
        .context("listen for signals")?;
    let (stop, stopping) = async_channel::bounded::<Stop>(1);
    let listen_for_stop = executor.launch(async move {
        use futures_lite::StreamExt;
        let mut signals = signals;
        while let Some(Ok(signal)) = signals.next().await {
            info!(?signal, "asked to stop");
            // A second signal finds the channel full.
            let _ = stop.try_send(if signal == Signal::Quit { Stop::Machine } else { Stop::Daemon });
        }
    });
    let outcome = live(&config, &executor, &listener, &stopping).await;
    listen_for_stop.cancel().await;
    // Gone already when another daemon took the place.
    let _ = std::fs::remove_file(run_dir.join(socket::FILE));
    outcome
}

/// Returns only when it failed.
fn start_anew() -> std::io::Error {
    let mut words = std::env::args_os();
    let name = words.next().unwrap_or_else(|| "tinydc".into());
    std::process::Command::new("/proc/self/exe").arg0(name).args(words).exec()
}

/// Until asked to stop, or until this process can't go on: first unjoined if need be, then as a member.
async fn live(
    config: &Config,
    executor: &Arc<Executor<'static>>,
    listener: &Arc<Async<UnixListener>>,
    stopping: &async_channel::Receiver<Stop>,
) -> Result<()> {
    let data_dir = config.data_dir();
    let identity = Identity::load(&data_dir)?;
    let is_member = identity.as_ref().is_some_and(|identity| identity.membership.is_some());
    let awaiting = match is_member {
        true => Awaiting::Nobody,
        false => match unjoined::wait(config, executor, listener, stopping).await? {
            Some(awaiting) => awaiting,
            None => return Ok(()),
        },
    };
    let Some(identity) = Identity::load(&data_dir)? else { bail!("the identity has vanished") };
    match member::run(config, executor, listener, stopping, identity, awaiting).await? {
        Ended::Stopped(_) => Ok(()),
        Ended::Failed(why) => Err(anyhow::anyhow!(why)),
        Ended::Removed => {
            founding::unjoin(&data_dir, &config.run_dir());
            warn!("this node belongs to no cluster any more");
            // A fresh process under the same pid: what the member had open, its UDP port above all, is closed.
            Err(start_anew()).context("start anew without a cluster")
        }
    }
}
