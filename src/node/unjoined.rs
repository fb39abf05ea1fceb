//! A node without a cluster: waits until somebody founds one on it, or takes it into one.
//!
//! Ways on, whichever comes first: `init` and `join` on the local socket, the token of the configuration, somebody on
//! the network who knows the six-digit code, and `bootstrap = true`, which founds a cluster unless the LAN has one of
//! that name. One after the other, so that two never meet halfway.
//!
//! Invariant: what this machine tells of itself is what it does (`facts` is read by the local socket's `/v1/joining`).

use super::{Awaiting, Config, Stop, founding, machine, socket};
use crate::api::wire::{InitRequest, JoinBody, JoiningBody};
use crate::api::{ApiError, UnjoinedRequest, serve_unjoined};
use crate::model::Architecture;
use crate::tasks::Launch;
use crate::tasks::lock;
use crate::transport::authority::is_person_name;
use crate::transport::by_code::{CodeReply, CodeRequest};
use crate::transport::codes::{Grant, Lasting, Shown, make_code};
use crate::transport::door::{CodeAsked, Door};
use crate::transport::identity::NodeKey;
use crate::transport::join::Joined;
use crate::transport::pending::{
    self, Neighbours, Pending, PendingConfig, find_cluster, key_hash, key_hash_text,
};
use anyhow::Result;
use async_executor::{Executor, Task};
use async_io::Async;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// How long `bootstrap = true` listens for a cluster of its name.
const LISTEN_FOR: Duration = Duration::from_secs(10);
const RETRY_JOIN_EVERY: Duration = Duration::from_secs(10);
const RETRY_REFUSED_EVERY: Duration = Duration::from_secs(60);
/// What `init` calls a cluster unless told otherwise.
pub const CLUSTER_NAME: &str = "home";

struct Unjoined<'a> {
    config: &'a Config,
    executor: &'a Arc<Executor<'static>>,
    data_dir: PathBuf,
    name: String,
    key: NodeKey,
    /// What the local socket shows, but for the code.
    facts: Arc<Mutex<JoiningBody>>,
    pending: Option<Pending>,
}

enum Next {
    Request(Option<UnjoinedRequest>),
    Code(CodeAsked),
    Listened(Neighbours),
    JoinByConfig,
    Stop,
}

/// Until this machine may be a member; `None` when asked to stop.
pub(super) async fn wait(
    config: &Config,
    executor: &Arc<Executor<'static>>,
    listener: &Arc<Async<UnixListener>>,
    stopping: &async_channel::Receiver<Stop>,
) -> Result<Option<Awaiting>> {
    let data_dir = config.data_dir();
    let name = config.name.clone().unwrap_or_else(machine::host_name);
    let key = founding::announced_key(&data_dir).map_err(|error| anyhow::anyhow!("{error}"))?;
    let facts = Arc::new(Mutex::new(JoiningBody {
        state: "waiting".into(),
        node: name.clone(),
        architecture: Architecture::own().oci_name().into(),
        key_hash: Some(key_hash_text(&key_hash(&key.public_key()))),
        ..JoiningBody::default()
    }));
    let mut unjoined = Unjoined { config, executor, data_dir, name, key, facts, pending: None };
    info!(socket = %config.run_dir().join(socket::FILE).display(),
        "this node belongs to no cluster: found one with `tinydc init`, or join one with `tinydc join TOKEN`");
    let codes = unjoined.show_code()?;
    let (sender, requests) = async_channel::bounded(4);
    let accepting = unjoined.serve_socket(listener.clone(), sender);
    let awaiting = unjoined.go_on(&codes, &requests, stopping).await;
    accepting.cancel().await;
    if let Some(pending) = unjoined.pending {
        pending.stop().await;
    }
    awaiting
}

impl Unjoined<'_> {
    /// Opens the network's way in, with a code of its own. A port that is taken leaves the other ways.
    fn show_code(&mut self) -> Result<async_channel::Receiver<CodeAsked>> {
        let started = Pending::start(PendingConfig {
            executor: self.executor.clone(),
            listen: self.config.listen(),
            key: self.key.clone(),
            name: self.name.clone(),
            architecture: Architecture::own().oci_name().into(),
        });
        let (pending, codes) = match started {
            Ok(started) => started,
            Err(error) => {
                let error = crate::agent::chain(&error);
                warn!(error, "no code is shown: this machine can't be reached");
                self.tell_problem(format!("no code is shown: {error}"));
                // Its sender is kept by nobody: no code ever comes.
                return Ok(async_channel::bounded(1).1);
            }
        };
        let (code, grant) = (make_code()?, Grant::Machine);
        info!(code, "or, on any member of a cluster on this network: tinydc node accept CODE");
        pending.door().show(Shown { code, grant, lasting: Lasting::Renewed, until: None, wrong_tries: 0 });
        self.pending = Some(pending);
        Ok(codes)
    }

    fn serve_socket(
        &self,
        listener: Arc<Async<UnixListener>>,
        sender: async_channel::Sender<UnjoinedRequest>,
    ) -> Task<()> {
        let (facts, tasks) = (self.facts.clone(), self.executor.clone());
        let door: Option<Arc<Door>> = self.pending.as_ref().map(|pending| pending.door().clone());
        let joining = Arc::new(move || {
            let code = door.as_ref().and_then(|door| door.displayed()).map(|shown| shown.code);
            JoiningBody { code, ..lock(&facts).clone() }
        });
        self.executor.launch(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tasks.spawn(serve_unjoined(stream, sender.clone(), joining.clone())).detach();
            }
        })
    }

    fn tell_state(&self, state: &str) {
        lock(&self.facts).state = state.into();
    }

    fn tell_problem(&self, problem: String) {
        lock(&self.facts).problem = Some(problem);
    }

    async fn go_on(
        &self,
        codes: &async_channel::Receiver<CodeAsked>,
        requests: &async_channel::Receiver<UnjoinedRequest>,
        stopping: &async_channel::Receiver<Stop>,
    ) -> Result<Option<Awaiting>> {
        let mut listening = self.config.bootstrap.then(|| self.listen_for_cluster());
        let mut join_at = self.config.join.as_ref().map(|_| Instant::now());
        loop {
            match next(codes, requests, stopping, &mut listening, join_at).await {
                Next::Stop | Next::Request(None) => return Ok(None),
                Next::JoinByConfig => match self.join_by_config().await {
                    Ok(()) => return Ok(Some(Awaiting::Nobody)),
                    Err(wait) => join_at = Some(Instant::now() + wait),
                },
                Next::Request(Some(request)) => {
                    if let Some(awaiting) = self.take(request).await {
                        return Ok(Some(awaiting));
                    }
                }
                Next::Code(asked) => {
                    if let Some(awaiting) = self.take_code(asked).await {
                        return Ok(Some(awaiting));
                    }
                }
                Next::Listened(Neighbours::None) => return self.found_by_config().map(Some),
                Next::Listened(Neighbours::Founder(other)) => {
                    info!(name = other.name, address = %other.address,
                        "another machine goes first at founding the cluster; listening on");
                    listening = Some(self.listen_for_cluster());
                }
                Next::Listened(Neighbours::Cluster(address)) => {
                    listening = None;
                    self.stay_out(address);
                }
            }
        }
    }

    fn listen_for_cluster(&self) -> Task<Neighbours> {
        self.tell_state("listening");
        if let Some(pending) = &self.pending {
            pending.set_would_found(Some(CLUSTER_NAME.into()));
        }
        let hash = pending::key_hash(&self.key.public_key());
        self.executor.launch(async move { find_cluster(CLUSTER_NAME, &hash, LISTEN_FOR).await })
    }

    /// A second cluster beside the one that is there is never what was meant.
    fn stay_out(&self, address: std::net::IpAddr) {
        if let Some(pending) = &self.pending {
            pending.set_would_found(None);
        }
        self.tell_state("waiting");
        let problem = format!(
            "bootstrap = true founds nothing: a cluster called {CLUSTER_NAME} answers at {address}. Take this \
             machine into it: tinydc node accept CODE, on a member; or found another one: tinydc init"
        );
        warn!("{problem}");
        self.tell_problem(problem);
    }

    fn found_by_config(&self) -> Result<Awaiting> {
        let (containers, vips) = self.config.network.as_deref().and_then(|text| text.split_once(' ')).unzip();
        let wish = InitRequest {
            name: None,
            container_range: containers.map(String::from),
            vip_range: vips.map(String::from),
        };
        let founded =
            founding::init(&self.data_dir, &self.name, &wish).map_err(|error| anyhow::anyhow!("{error}"))?;
        info!("founded a cluster, as `bootstrap = true` says");
        println!("recovery key: {}", founded.recovery_key);
        Ok(Awaiting::Nobody)
    }

    /// Joins by the token of the configuration; an error is after which time it is worth another try.
    async fn join_by_config(&self) -> Result<(), Duration> {
        let token = self.config.join.clone().unwrap_or_default();
        let wish = JoinBody { token, replace: None };
        let error = match founding::join(self.executor.clone(), &self.data_dir, &self.name, &wish).await {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        // A cluster that isn't there yet comes; a token that has expired stays so, and each try counts as a failure.
        let wait = if error.status.is_server_error() { RETRY_JOIN_EVERY } else { RETRY_REFUSED_EVERY };
        let hint = error.detail.hint.map(|hint| format!(". {hint}")).unwrap_or_default();
        let problem = format!("the token of the configuration: {}{hint}", error.detail.message);
        warn!(again_in_s = wait.as_secs(), "{problem}");
        self.tell_problem(problem);
        Err(wait)
    }

    async fn take(&self, request: UnjoinedRequest) -> Option<Awaiting> {
        match request {
            UnjoinedRequest::Init { wish, reply } => {
                match founding::init(&self.data_dir, &self.name, &wish) {
                    Ok(founded) => Some(Awaiting::Init { reply, recovery_key: founded.recovery_key }),
                    Err(error) => {
                        // Whoever asked may have gone.
                        let _ = reply.send(Err(error)).await;
                        None
                    }
                }
            }
            UnjoinedRequest::Join { wish, reply } => {
                match founding::join(self.executor.clone(), &self.data_dir, &self.name, &wish).await {
                    Ok(_) => Some(Awaiting::Join { reply }),
                    Err(error) => {
                        let _ = reply.send(Err(error)).await;
                        None
                    }
                }
            }
        }
    }

    /// Somebody knows the code: `node accept` of a member, or `init --board` of a laptop.
    async fn take_code(&self, asked: CodeAsked) -> Option<Awaiting> {
        let (reply, awaiting) = match asked.request {
            CodeRequest::Admit { token } => {
                let wish = JoinBody { token, replace: None };
                match self.join_with_announced_key(&wish).await {
                    Ok(joined) => {
                        info!(address = %asked.address, cluster = joined.cluster_name, "admitted by code");
                        let reply =
                            CodeReply::Joined { cluster: joined.cluster_name, node_id: joined.node_id.0 };
                        (reply, Some(Awaiting::Nobody))
                    }
                    Err(error) => (refused(error), None),
                }
            }
            CodeRequest::Found { name, container_range, vip_range, person } => {
                let wish = InitRequest { name, container_range, vip_range };
                match (self.found_for(&wish, &person), asked.secret) {
                    (Ok(reply), Some(secret)) => {
                        info!(address = %asked.address, person, "founded a cluster, by code");
                        (reply, Some(Awaiting::Founder { person, secret }))
                    }
                    (Ok(reply), None) => (reply, Some(Awaiting::Nobody)),
                    (Err(error), _) => (refused(error), None),
                }
            }
            CodeRequest::Enrol => {
                let error = ApiError::rejected("this machine belongs to no cluster yet")
                    .hint("found one on it first: tinydc init --board CODE");
                (refused(error), None)
            }
        };
        // Whoever asked may have gone.
        let _ = asked.reply.send(reply).await;
        awaiting
    }

    /// With the key that the code was proved for.
    async fn join_with_announced_key(&self, wish: &JoinBody) -> Result<Joined, ApiError> {
        founding::keep_key(&self.data_dir, &self.key)?;
        founding::join(self.executor.clone(), &self.data_dir, &self.name, wish).await
    }

    fn found_for(&self, wish: &InitRequest, person: &str) -> Result<CodeReply, ApiError> {
        if !is_person_name(person) {
            let error = ApiError::invalid(format!("{person:?} is no person's name"));
            return Err(error.hint("1 to 32 of a-z, 0-9 and '-': tinydc init --board CODE --user ann"));
        }
        let founded = founding::init(&self.data_dir, &self.name, wish)?;
        Ok(CodeReply::Founded {
            cluster: wish.name.clone().unwrap_or_else(|| CLUSTER_NAME.into()),
            node: self.name.clone(),
            recovery_key: founded.recovery_key,
        })
    }
}

fn refused(error: ApiError) -> CodeReply {
    CodeReply::Refused { sentence: error.detail.message, hint: error.detail.hint.unwrap_or_default() }
}

async fn next(
    codes: &async_channel::Receiver<CodeAsked>,
    requests: &async_channel::Receiver<UnjoinedRequest>,
    stopping: &async_channel::Receiver<Stop>,
    listening: &mut Option<Task<Neighbours>>,
    join_at: Option<Instant>,
) -> Next {
    use futures_lite::future::{or, pending};
    let by_code = async {
        match codes.recv().await {
            Ok(asked) => Next::Code(asked),
            // No network's way in.
            Err(_) => pending().await,
        }
    };
    let listened = async {
        match listening {
            Some(task) => Next::Listened(task.await),
            None => pending().await,
        }
    };
    let stop = async {
        let _ = stopping.recv().await;
        Next::Stop
    };
    let join = async {
        match join_at {
            Some(at) => async_io::Timer::at(at).await,
            None => pending().await,
        };
        Next::JoinByConfig
    };
    let asked = or(async { Next::Request(requests.recv().await.ok()) }, by_code);
    or(asked, or(listened, or(stop, join))).await
}
