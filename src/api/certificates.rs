//! Certificates of the ingress: made and ordered by the leader, checked where they are given.
//!
//! The planner says what is to be done; here it is signed with the cluster's CA or ordered by ACME, sealed, and put into
//! the state. One order at a time, on a thread of its own; when another node leads it is given up, unless the certificate
//! is there already. Answers to challenges are in the state, so that every node's ingress gives them, before the authority
//! is told to ask.
//!
//! Invariant: what an authority issued is offered to the cluster until it is applied or refused: authorities count
//! duplicates (`what_came_of_an_order_is_kept_until_it_is_applied`).

use super::backend::Backend;
use super::body::{self, Reply};
use super::error::ApiError;
use super::peer;
use super::secrets::{holders, open_secret};
use super::wire::CaBody;
use crate::compose::ingress_labels::{TlsSource, read_ingress_labels};
use crate::model::*;
use crate::network::ingress::acme::{AccountKey, AcmeError, Issued, Wish, obtain};
use crate::network::ingress::{certificate_from_pem, covers};
use crate::planner::certificates::{Failed, Step, pause_seconds, steps};
use crate::state::{CertificateIssuer, Command, IssuedCertificate, State};
use crate::tasks::Launch;
use crate::transport::sealing::ClusterKey;
use crate::transport::serving::{ServingAuthority, to_pem};
use async_executor::{Executor, Task};
use bytes::Bytes;
use hyper::{Method, StatusCode};
use std::collections::BTreeMap;
use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tracing::{info, warn};

const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Before a host whose outcome was refused is looked at again.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);
/// After something that could not be done at all, such as a write without a quorum.
const AGAIN_AFTER: Duration = Duration::from_secs(5);
/// Until every node that is up answers for a challenge.
const PUBLISH_LIMIT: Duration = Duration::from_secs(8);
const ASK_LIMIT: Duration = Duration::from_secs(2);
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(100);
const CHECK_LIMIT: Duration = Duration::from_secs(3);
const ANSWER_BYTES_MAX: usize = 64 << 10;
/// A week: what an authority asks beyond is not meant for a cluster that may be mended meanwhile.
const RETRY_AFTER_SECONDS_MAX: u64 = 7 * 24 * 3600;
const AUTHORITY_PURPOSE: &str = "serving ca key";

pub fn key_purpose(host: &str) -> String {
    format!("certificate/{host}")
}

type Failure = Box<dyn Error + Send + Sync>;

/// An order on its way; told to give up when it is dropped.
struct Order {
    stop: Arc<AtomicBool>,
    task: Task<()>,
}

impl Order {
    /// It ends with the next step, but for one whose certificate was issued: that goes into the state.
    fn give_up(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Drop for Order {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// Does what the planner wants while this node leads and holds the cluster key. Ends with its task.
pub async fn keep_certificates(backend: Arc<Backend>) {
    let watch = backend.replica.published().watch();
    let mut order: Option<Order> = None;
    loop {
        let leads = backend.replica.status().await.is_some_and(|status| status.is_leader);
        match backend.identity().cluster_key.filter(|_| leads) {
            None => {
                if let Some(order) = &order {
                    order.give_up();
                }
            }
            Some(key) => {
                if let Err(error) = look(&backend, &key, &mut order).await {
                    warn!(error = %error, "certificates of the ingress");
                    async_io::Timer::after(AGAIN_AFTER).await;
                }
            }
        }
        peer::within(LOOK_EVERY, watch.changed()).await;
        // A burst of changes is one reason to look.
        async_io::Timer::after(Duration::from_millis(100)).await;
    }
}

async fn look(backend: &Arc<Backend>, key: &ClusterKey, order: &mut Option<Order>) -> Result<(), ApiError> {
    let state = backend.replica.state();
    if state.cluster().is_none() {
        return Ok(());
    }
    for step in steps(&state, backend.replica.cluster_time()) {
        let command = match step {
            Step::MakeAuthority => make_authority(&state, key)?,
            Step::Sign { host } => sign(backend, &state, key, &host).unwrap_or_else(|error| {
                let text = error.to_string();
                let pause_ms = pause_seconds(Failed::Unreached, failures(&state, &host) + 1) * 1000;
                Command::NoteCertificateTrouble { host, text, pause_ms }
            }),
            Step::Forget { host } => Command::ForgetCertificate { host },
            Step::RemoveChallenges { tokens } => {
                if order.as_ref().is_some_and(|order| !order.task.is_finished()) {
                    continue;
                }
                Command::RemoveChallenges { tokens }
            }
            Step::Order { host } => {
                if order.as_ref().is_none_or(|order| order.task.is_finished()) {
                    *order = Some(begin_order(backend, key.clone(), host));
                }
                continue;
            }
        };
        backend.submit(None, command).await?;
    }
    Ok(())
}

fn make_authority(state: &State, key: &ClusterKey) -> Result<Command, ApiError> {
    let internal = |error: &dyn Error| ApiError::internal(error);
    let name = state.cluster().map(|cluster| cluster.name.as_str()).unwrap_or_default();
    let made = ServingAuthority::create(name).map_err(|error| internal(&error))?;
    let sealed_key = key.seal(AUTHORITY_PURPOSE, made.key_bytes()).map_err(|error| internal(&error))?;
    Ok(Command::PutServingAuthority { certificate: made.certificate().to_vec(), sealed_key })
}

fn sign(backend: &Backend, state: &State, key: &ClusterKey, host: &str) -> Result<Command, ApiError> {
    let internal = |error: &dyn Error| ApiError::internal(error);
    let row = state.serving_authority.find(&()).ok_or_else(|| ApiError::unavailable("there is no CA yet"))?;
    let own = key.unseal(AUTHORITY_PURPOSE, &row.sealed_key).map_err(|error| internal(&error))?;
    let name = state.cluster().map(|cluster| cluster.name.as_str()).unwrap_or_default();
    let authority = ServingAuthority::load(name, &row.certificate, &own).map_err(|error| internal(&error))?;
    let signed = authority.sign(host, backend.replica.cluster_time().0 / 1000);
    let signed = signed.map_err(|error| internal(&error))?;
    let sealed_key = key.seal(&key_purpose(host), signed.key_pem.as_bytes());
    let issued = IssuedCertificate {
        issuer: CertificateIssuer::Cluster,
        chain_pem: signed.chain_pem,
        sealed_key: sealed_key.map_err(|error| internal(&error))?,
        not_before: signed.not_before,
        not_after: signed.not_after,
        version: 0,
    };
    info!(host, "certificate signed by the cluster's CA");
    Ok(Command::PutCertificate { host: host.into(), issued: Box::new(issued) })
}

fn begin_order(backend: &Arc<Backend>, key: ClusterKey, host: String) -> Order {
    let stop = Arc::new(AtomicBool::new(false));
    let (backend, stopped) = (backend.clone(), stop.clone());
    let task = backend.executor.clone().launch(async move {
        let (own, name, stop) = (backend.clone(), host.clone(), stopped.clone());
        let outcome = crate::tasks::unblock(move || order(&own, &key, &name, &stop)).await;
        let command = match outcome {
            Ok(command) => command,
            Err(_) if stopped.load(Ordering::Relaxed) => return,
            Err(error) => {
                let text = crate::agent::chain(error.as_ref());
                let failures = failures(&backend.replica.state(), &host) + 1;
                let pause_ms = pause_after(error.as_ref(), failures) * 1000;
                warn!(host, error = text, "no certificate by ACME");
                Command::NoteCertificateTrouble { host, text, pause_ms }
            }
        };
        // Under one mark: an attempt of unknown outcome may have been applied.
        let kept = match backend.new_mark(&command) {
            Ok(mark) => {
                let submit = || {
                    let (backend, command) = (backend.clone(), command.clone());
                    async move { backend.submit(Some(mark), command).await.map(drop) }
                };
                until_applied(submit, AGAIN_AFTER).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = kept {
            warn!(%error, "what came of an order is refused");
            async_io::Timer::after(REFUSED_PAUSE).await;
        }
    });
    Order { stop, task }
}

/// Tries again for as long as the cluster can't write; a refusal is final.
async fn until_applied<Submitted>(submit: impl Fn() -> Submitted, pause: Duration) -> Result<(), ApiError>
where
    Submitted: Future<Output = Result<(), ApiError>>,
{
    loop {
        match submit().await {
            Err(error) if may_pass(error.status) => {
                warn!(%error, "keep what came of an order; it is tried again");
                async_io::Timer::after(pause).await;
            }
            outcome => return outcome,
        }
    }
}

fn may_pass(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}

/// In a row, so far.
fn failures(state: &State, host: &str) -> u32 {
    let row = state.certificates.find(&host.to_owned()).and_then(|row| row.trouble.as_ref());
    row.map_or(0, |trouble| trouble.failures.min(u32::MAX - 1))
}

/// In seconds; longer if the authority asks for it.
fn pause_after(error: &(dyn Error + Send + Sync + 'static), failures: u32) -> u64 {
    match error.downcast_ref::<AcmeError>() {
        Some(AcmeError::Refused { retry_after_seconds, .. }) => {
            let asked = retry_after_seconds.unwrap_or_default().min(RETRY_AFTER_SECONDS_MAX);
            pause_seconds(Failed::Refused, failures).max(asked)
        }
        // The authority counts nothing for what failed here, such as a write without a leader.
        None | Some(AcmeError::Ask { .. } | AcmeError::Publish(_) | AcmeError::Key) => {
            pause_seconds(Failed::Unreached, failures)
        }
        Some(_) => pause_seconds(Failed::Refused, failures),
    }
}

/// Blocks for up to two minutes.
fn order(
    backend: &Arc<Backend>,
    key: &ClusterKey,
    host: &str,
    stop: &AtomicBool,
) -> Result<Command, Failure> {
    let state = backend.replica.state();
    let settings = state.cluster_settings();
    let directory = settings.acme_directory.clone();
    let account_key = account(backend, key, &state, &directory)?;
    let roots = match settings.acme_ca.as_str() {
        "" => None,
        name => Some(String::from_utf8(open_secret(key, &state, &SecretName::new(name)?)?)?),
    };
    let hosts = [host.to_owned()];
    let wish = Wish {
        directory: &directory,
        roots_pem: roots.as_deref(),
        account_key: &account_key,
        email: Some(settings.acme_email.as_str()).filter(|email| !email.is_empty()),
        hosts: &hosts,
        stop,
    };
    let mut tokens = Vec::new();
    let outcome = obtain(&wish, &mut |answers| {
        tokens.extend(answers.keys().cloned());
        async_io::block_on(publish(backend, answers))
    });
    if !tokens.is_empty() {
        // Else the planner has them removed later.
        let _ = async_io::block_on(backend.submit(None, Command::RemoveChallenges { tokens }));
    }
    let Issued { chain_pem, key_pem, not_before, not_after } = outcome?;
    let sealed_key = key.seal(&key_purpose(host), key_pem.as_bytes())?;
    let issuer = CertificateIssuer::Acme { directory };
    let issued = IssuedCertificate { issuer, chain_pem, sealed_key, not_before, not_after, version: 0 };
    info!(host, "certificate issued by ACME");
    Ok(Command::PutCertificate { host: host.into(), issued: Box::new(issued) })
}

/// The cluster's account with an authority; made and kept first if there is none.
fn account(
    backend: &Arc<Backend>,
    key: &ClusterKey,
    state: &State,
    directory: &str,
) -> Result<AccountKey, Failure> {
    let purpose = format!("acme/{directory}");
    if let Some(row) = state.acme_accounts.find(&directory.to_owned()) {
        return Ok(AccountKey::from_pkcs8(&key.unseal(&purpose, &row.sealed_key)?)?);
    }
    let made = AccountKey::generate()?;
    let sealed_key = key.seal(&purpose, made.pkcs8())?;
    let command = Command::PutAcmeAccount { directory: directory.into(), sealed_key };
    async_io::block_on(backend.submit(None, command)).map_err(|error| error.to_string())?;
    Ok(made)
}

/// Returns when every node that is connected answers for the tokens, or after a while without those that don't.
async fn publish(backend: &Arc<Backend>, answers: &BTreeMap<String, String>) -> Result<(), Failure> {
    let command = Command::PutChallenges { answers: answers.clone() };
    backend.submit(None, command).await.map_err(|error| error.to_string())?;
    let asked: Vec<(NodeId, String)> = (backend.transport.connections().into_keys())
        .flat_map(|node| answers.keys().map(move |token| (node, token.clone())))
        .collect();
    let others = backend.clone();
    let others_answer = until_all(&backend.executor, asked, PUBLISH_LIMIT, move |(node, token)| {
        let backend = others.clone();
        async move { answers_for(&backend, node, &token).await }
    });
    let (own, tokens) = (backend.agent.clone(), answers.keys().cloned().collect());
    let this_one_answers = until_all(&backend.executor, tokens, PUBLISH_LIMIT, move |token: String| {
        std::future::ready(own.answers_challenge(&token))
    });
    futures_lite::future::zip(others_answer, this_one_answers).await;
    Ok(())
}

/// Asks all at once, each again until it is so; at most for `limit` in all.
async fn until_all<Subject, Asked>(
    executor: &Executor<'static>,
    subjects: Vec<Subject>,
    limit: Duration,
    ask: impl Fn(Subject) -> Asked + Clone + Send + 'static,
) where
    Subject: Clone + Send + 'static,
    Asked: Future<Output = bool> + Send + 'static,
{
    let tasks: Vec<Task<()>> = subjects
        .into_iter()
        .map(|subject| {
            let ask = ask.clone();
            executor.spawn(async move {
                while !ask(subject.clone()).await {
                    async_io::Timer::after(ASK_AGAIN_AFTER).await;
                }
            })
        })
        .collect();
    peer::within(limit, async {
        for task in tasks {
            task.await;
        }
    })
    .await;
}

async fn answers_for(backend: &Arc<Backend>, node: NodeId, token: &str) -> bool {
    let path = format!("/internal/challenges/{token}");
    let request = peer::request(Method::GET, &path, Bytes::new());
    let asked = peer::send(&backend.transport, &backend.executor, node, request);
    let answer = peer::within(ASK_LIMIT, asked).await;
    answer.is_some_and(|answer| answer.is_ok_and(|answer| answer.status() == StatusCode::NO_CONTENT))
}

/// `GET /internal/challenges/{token}`: whether this node's ingress answers for it.
pub fn challenge(backend: &Arc<Backend>, token: &str) -> Result<Reply, ApiError> {
    match backend.agent.answers_challenge(token) {
        true => body::done(),
        false => Err(ApiError::not_found("challenge", token)),
    }
}

/// `GET /v1/ca`.
pub async fn authority(backend: &Arc<Backend>) -> Result<Reply, ApiError> {
    let reading = backend.reading().await?;
    let row = reading.state.serving_authority.find(&());
    let row = row.ok_or_else(|| {
        ApiError::unavailable("the cluster has no CA for hosts yet: its leader makes it").hint("try again")
    })?;
    let cluster = reading.state.cluster().map(|cluster| cluster.name.clone()).unwrap_or_default();
    let certificate = to_pem(&row.certificate);
    body::ok(&CaBody { freshness: reading.freshness, cluster, certificate })
}

/// Hosts by the secret that is to hold their certificate, as an app's labels say.
fn given(state: &State, spec: &AppSpec) -> BTreeMap<SecretName, Vec<String>> {
    let mut given: BTreeMap<SecretName, Vec<String>> = BTreeMap::new();
    for service in spec.services.values() {
        for route in read_ingress_labels(&service.labels).routes {
            if let (Some(host), Some(TlsSource::Secret(name))) = (route.host, route.tls) {
                given.entry(state.certificate_secret(&spec.name, &name)).or_default().push(host);
            }
        }
    }
    given
}

/// Refuses an app whose certificates don't parse or are for other hosts. By a node that can open them.
pub async fn check_given(backend: &Arc<Backend>, state: &State, spec: &AppSpec) -> Result<(), ApiError> {
    for (name, hosts) in given(state, spec) {
        if let Some(key) = backend.identity().cluster_key {
            check_one(&key, state, &name, &hosts)?;
            continue;
        }
        for holder in holders(backend, state).await {
            let asked = ask_check(backend, holder, &name, &hosts);
            match peer::within(CHECK_LIMIT, asked).await.flatten() {
                Some(Ok(())) => break,
                Some(Err(why)) => return Err(ApiError::invalid(why)),
                // Without anybody who can look, `net check` tells later.
                None => {}
            }
        }
    }
    Ok(())
}

fn check_one(key: &ClusterKey, state: &State, name: &SecretName, hosts: &[String]) -> Result<(), ApiError> {
    if !state.secrets.contains(name) {
        return Ok(());
    }
    let opened = open_secret(key, state, name).map_err(|error| ApiError::internal(error.as_ref()))?;
    check_bytes(name, &opened, hosts)
}

/// Whether these bytes serve as certificate and key of all these hosts.
pub fn check_bytes(name: &SecretName, bytes: &[u8], hosts: &[String]) -> Result<(), ApiError> {
    let text = std::str::from_utf8(bytes)
        .map_err(|_| ApiError::invalid(format!("secret {name} is no certificate: it is no PEM text")))?;
    let refused = |error: &dyn Error| {
        let why = crate::agent::chain(error);
        ApiError::invalid(format!("secret {name} is no certificate with its key: {why}"))
            .hint("it holds the chain, the host's own certificate first, and the private key, as PEM")
    };
    let certificate = certificate_from_pem(text, text).map_err(|error| refused(&error))?;
    for host in hosts {
        covers(&certificate, host).map_err(|error| {
            ApiError::invalid(format!("the certificate in secret {name} is not for {host}: {error}"))
        })?;
    }
    Ok(())
}

async fn ask_check(
    backend: &Arc<Backend>,
    holder: NodeId,
    name: &SecretName,
    hosts: &[String],
) -> Option<Result<(), String>> {
    let path = format!("/internal/certificate-check/{}", name.as_str().replace('/', "%2F"));
    let asked = serde_json::to_vec(hosts).expect("names are plain data");
    let request = peer::request(Method::POST, &path, asked);
    let answer = peer::send(&backend.transport, &backend.executor, holder, request).await.ok()?;
    let bytes = body::bytes(answer.into_body(), ANSWER_BYTES_MAX).await.ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// `POST /internal/certificate-check/{name}` with hosts; says only whether it is a certificate for them.
pub async fn check_for_peer(
    backend: &Arc<Backend>,
    name: &str,
    request: hyper::Request<hyper::body::Incoming>,
) -> Result<Reply, ApiError> {
    let name = SecretName::new(name).map_err(|error| ApiError::invalid(error.to_string()))?;
    let hosts: Vec<String> = body::parse(request.into_body()).await?;
    let key = backend.identity().cluster_key.ok_or_else(|| ApiError::unavailable("no cluster key here"))?;
    let outcome = check_one(&key, &backend.replica.state(), &name, &hosts);
    body::ok(&outcome.map_err(|error| error.detail.message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::time::Instant;

    #[test]
    fn only_what_the_authority_counts_is_followed_by_an_hour() {
        let (minute, hour) = (60, 3600);
        let refused = |retry_after_seconds| AcmeError::Refused {
            step: "order",
            status: 429,
            kind: "rateLimited".into(),
            detail: "too many".into(),
            retry_after_seconds,
        };
        let no_leader = || Failure::from("no leader for 6 s".to_string());
        let failures: [(Failure, u64); 6] = [
            (AcmeError::Publish(no_leader()).into(), minute),
            // As when the account could not be kept.
            (no_leader(), minute),
            (AcmeError::Key.into(), minute),
            (refused(None).into(), hour),
            (refused(Some(7200)).into(), 2 * hour),
            (AcmeError::NotProved { host: "shop.test".into(), detail: "404".into() }.into(), hour),
        ];
        for (failure, wanted) in failures {
            assert_eq!(pause_after(failure.as_ref(), 1), wanted, "{failure:?}");
        }
    }

    #[test]
    fn what_came_of_an_order_is_kept_until_it_is_applied() {
        let outcomes = |outcomes: Vec<Result<(), ApiError>>| {
            let (left, tries) = (Cell::new(outcomes), Cell::new(0));
            let submit = || {
                tries.set(tries.get() + 1);
                let mut outcomes = left.take();
                let first = outcomes.remove(0);
                left.set(outcomes);
                std::future::ready(first)
            };
            let kept = async_io::block_on(until_applied(submit, Duration::from_millis(1)));
            (kept.is_ok(), tries.get())
        };
        let unknown = || ApiError::new(StatusCode::GATEWAY_TIMEOUT, "unknown_outcome", "it may be done");
        let busy = || ApiError::new(StatusCode::TOO_MANY_REQUESTS, "busy", "too many writes wait");
        let tried = vec![Err(ApiError::unavailable("no leader")), Err(unknown()), Err(busy()), Ok(())];
        assert_eq!(outcomes(tried), (true, 4));
        let refused = vec![Err(ApiError::invalid("too long")), Ok(())];
        assert_eq!(outcomes(refused), (false, 1), "the same again is refused again");
    }

    #[test]
    fn nodes_that_do_not_answer_are_waited_for_together() {
        let executor = Arc::new(Executor::new());
        let begin = Instant::now();
        let asked = |node: u64| async move {
            if node != 1 {
                async_io::Timer::after(Duration::from_millis(200)).await;
            }
            node == 1
        };
        let nodes = (1..32).collect();
        let limit = Duration::from_millis(500);
        async_io::block_on(executor.run(until_all(&executor, nodes, limit, asked)));
        assert!((limit..limit * 4).contains(&begin.elapsed()), "{:?}", begin.elapsed());
        async_io::block_on(executor.run(until_all(&executor, vec![1, 1], LOOK_EVERY, asked)));
        assert!(begin.elapsed() < LOOK_EVERY / 2, "nobody is waited for when all have answered");
    }
}
