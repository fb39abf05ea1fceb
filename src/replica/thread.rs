//! The thread that owns `Control`.

use super::writer::{self, WriteWatch};
use super::{Handle, INBOX_MAX, Mail, Published, Reply};
use crate::consensus::{Batch, LogStore, Message};
use crate::control::{
    Alive, Applied, Control, ControlConfig, Figures, Input, Now, Output, StartError, Undone, Waiter,
};
use crate::model::{Mono, NodeId, Timestamp};
use crate::state::Command;
use crate::storage::{SqliteStore, StoreError};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What leaves the node, or must be done for the control plane outside of it.
pub enum Outgoing {
    Message {
        to: NodeId,
        message: Message,
    },
    Snapshot {
        to: NodeId,
        message: Message,
        frames: Arc<Vec<Vec<u8>>>,
    },
    Forward {
        to: NodeId,
        command: Box<Command>,
    },
    Broadcast(Alive),
    OfferKey {
        to: NodeId,
    },
    WithdrawKey {
        from: NodeId,
    },
    /// The node must stop: its disk failed or its state can't be trusted.
    Halt {
        why: String,
    },
}

pub struct ReplicaConfig {
    pub control: ControlConfig,
    /// Load, memory and disk as they are now; called once per tick, must not block.
    pub figures: Box<dyn Fn() -> Figures + Send>,
    /// The wall clock, if it is synchronised.
    pub wall: Box<dyn Fn() -> Option<Timestamp> + Send>,
    /// Must not block: queues that are full drop.
    pub outgoing: Box<dyn Fn(Outgoing) + Send + Sync>,
}

#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    #[error("load the cluster's state")]
    Load(#[from] StoreError),
    #[error("start the control plane")]
    Start(#[from] StartError),
    #[error("start a thread")]
    Thread(#[source] std::io::Error),
}

/// Owns both threads.
pub struct Replica {
    handle: Handle,
    threads: Vec<JoinHandle<()>>,
}

impl Replica {
    pub fn start(config: ReplicaConfig, mut store: SqliteStore) -> Result<Replica, ReplicaError> {
        let origin = Instant::now();
        let stored = store.load()?;
        let applied = stored.applied;
        // Control keeps its log in shared, single-threaded memory: it is made on its own thread. Its rows are
        // checked here first, so that a damaged state is an error and not a dead thread.
        let mut state = crate::state::State::default();
        for row in &stored.rows {
            if let Some(body) = &row.body {
                state.load_row(row.kind, &row.key, body).map_err(StartError::from)?;
            }
        }
        let published = Arc::new(Published::new(state, applied));
        let (inbox, mails) = async_channel::bounded(INBOX_MAX);
        let (batches, queue) = async_channel::bounded(writer::QUEUE_MAX);
        let watch = WriteWatch::new(origin);
        let handle = Handle { inbox: inbox.clone(), published: published.clone() };
        let outgoing: Arc<dyn Fn(Outgoing) + Send + Sync> = Arc::from(config.outgoing);
        let fail = {
            let outgoing = outgoing.clone();
            move |why: String| outgoing(Outgoing::Halt { why: format!("write the cluster's state: {why}") })
        };
        let writer_watch = watch.clone();
        let writer = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || writer::run(store, queue, inbox, writer_watch, fail))
            .map_err(ReplicaError::Thread)?;
        let control_config = config.control;
        let (figures, wall) = (config.figures, config.wall);
        let control = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                let clock = Clock { origin, wall };
                match Control::new(control_config, clock.now(), stored) {
                    Ok(control) => {
                        let waiters = Waiters::default();
                        let worker = Worker {
                            control,
                            clock,
                            figures,
                            watch,
                            mails,
                            batches,
                            outgoing,
                            published,
                            waiters,
                        };
                        worker.run();
                    }
                    Err(error) => {
                        outgoing(Outgoing::Halt { why: format!("start the control plane: {error}") })
                    }
                }
            })
            .map_err(ReplicaError::Thread)?;
        Ok(Replica { handle, threads: vec![control, writer] })
    }

    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Writes what waits and joins both threads.
    pub fn stop(self) {
        let _ = self.handle.inbox.send_blocking(Mail::Stop);
        for thread in self.threads {
            // A thread that panicked has aborted the process by the panic hook.
            let _ = thread.join();
        }
    }
}

struct Clock {
    origin: Instant,
    wall: Box<dyn Fn() -> Option<Timestamp> + Send>,
}

impl Clock {
    fn now(&self) -> Now {
        // An hour's head start: nothing in the control plane is ever before its own beginning.
        let mono = Mono(3_600_000 + self.origin.elapsed().as_millis() as u64);
        Now { mono, wall: (self.wall)() }
    }
}

#[derive(Default)]
struct Waiters {
    next: Waiter,
    writes: BTreeMap<Waiter, Reply<Result<Applied, Undone>>>,
    reads: BTreeMap<Waiter, Reply<Result<u64, Undone>>>,
}

struct Worker {
    control: Control,
    clock: Clock,
    figures: Box<dyn Fn() -> Figures + Send>,
    watch: Arc<WriteWatch>,
    mails: async_channel::Receiver<Mail>,
    batches: async_channel::Sender<Batch>,
    outgoing: Arc<dyn Fn(Outgoing) + Send + Sync>,
    published: Arc<Published>,
    waiters: Waiters,
}

impl Worker {
    fn run(mut self) {
        let mut next_tick = Instant::now();
        loop {
            let now = Instant::now();
            if now >= next_tick {
                // A pause does not make up for missed ticks: raft would take them for a silent leader.
                next_tick = now + Duration::from_millis(self.control.tick_ms());
                let mut figures = (self.figures)();
                figures.fsync_age_ms = self.watch.age_ms();
                self.step(Input::Tick { figures });
            }
            let mail = self.next_mail(next_tick);
            match mail {
                Some(Mail::Stop) => break,
                Some(mail) => self.take(mail),
                None if self.mails.is_closed() => break,
                None => {}
            }
        }
        self.step(Input::Flush);
    }

    fn next_mail(&self, until: Instant) -> Option<Mail> {
        let receive = async { self.mails.recv().await.ok() };
        let time_out = async {
            async_io::Timer::at(until).await;
            None
        };
        async_io::block_on(futures_lite::future::or(receive, time_out))
    }

    fn take(&mut self, mail: Mail) {
        match mail {
            Mail::Input(input) => self.step(input),
            Mail::Write { request, command, reply } => {
                self.waiters.next += 1;
                let waiter = self.waiters.next;
                self.waiters.writes.insert(waiter, reply);
                self.step(Input::Write { waiter, request, command });
            }
            Mail::Read { reply } => {
                self.waiters.next += 1;
                let waiter = self.waiters.next;
                self.waiters.reads.insert(waiter, reply);
                self.step(Input::Read { waiter });
            }
            Mail::Status { reply } => {
                let status = self.control.status(self.clock.now());
                // Whoever asked may have gone.
                let _ = reply.try_send(status);
            }
            Mail::Stop => {}
        }
    }

    fn step(&mut self, input: Input) {
        let now = self.clock.now();
        let outputs = self.control.step(now, input);
        // Publish first: whoever gets an outcome must find it in the state.
        if outputs.iter().any(|output| matches!(output, Output::Changed)) {
            self.published.publish(self.control.state().clone(), self.control.applied());
        }
        for output in outputs {
            self.carry_out(output);
        }
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::Send { to, message } => (self.outgoing)(Outgoing::Message { to, message }),
            Output::SendSnapshot { to, message, frames } => {
                (self.outgoing)(Outgoing::Snapshot { to, message, frames });
            }
            Output::Forward { to, command } => (self.outgoing)(Outgoing::Forward { to, command }),
            Output::Broadcast(alive) => (self.outgoing)(Outgoing::Broadcast(alive)),
            Output::OfferKey { to } => (self.outgoing)(Outgoing::OfferKey { to }),
            Output::WithdrawKey { from } => (self.outgoing)(Outgoing::WithdrawKey { from }),
            Output::Halt { why } => (self.outgoing)(Outgoing::Halt { why }),
            Output::Persist(batch) => {
                // Closed only when the writer failed, which has halted the node.
                let _ = self.batches.send_blocking(batch);
            }
            Output::Done { waiter, result } => {
                if let Some(reply) = self.waiters.writes.remove(&waiter) {
                    let _ = reply.try_send(result);
                }
            }
            Output::ReadReady { waiter, result } => {
                if let Some(reply) = self.waiters.reads.remove(&waiter) {
                    let _ = reply.try_send(result);
                }
            }
            Output::Changed => {}
        }
    }
}
