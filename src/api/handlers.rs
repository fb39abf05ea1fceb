//! What each route does, apart from instances, images and what nodes ask of each other.

use super::backend::{Backend, Reading, RequestKey};
use super::body::{self, Reply};
use super::error::ApiError;
use super::routes::{Match, Verb, decode};
use super::serve::Caller;
use super::view::{Live, View};
use super::wire::*;
use super::{certificates, exec, images, instances, internal, joining, keys, network, ports, secrets};
use crate::model::*;
use crate::state::{Command, Reply as StateReply, RequestMark, Role, State, TokenKind};
use crate::tasks::Launch;
use crate::transport::ids::AuthorityHash;
use crate::transport::token::{Token, TokenKind as TokenText, TokenSecret};
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::{HeaderMap, Request};
use std::collections::BTreeMap;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The API's description, `openapi.json` beside this file, as cross/link.rs packed it.
const OPENAPI: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/openapi.json.z"));

const TOKEN_VALID_SECONDS: u64 = 24 * 3600;
const TOKEN_VALID_SECONDS_MAX: u64 = 365 * 24 * 3600;
const ENCRYPTION_TOLD_LIMIT: Duration = Duration::from_secs(5);
const ENCRYPTION_TOLD_EVERY: Duration = Duration::from_millis(100);
/// How often a follower of events looks.
const EVENTS_EVERY: Duration = Duration::from_millis(250);

pub async fn handle(
    backend: &Arc<Backend>,
    caller: &Caller,
    found: Match,
    request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    let query = query_of(&request);
    match found.verb {
        Verb::Version => body::ok(&version(backend)),
        Verb::OpenApi => Ok(openapi()),
        Verb::Status => status(backend, query.get("app").map(String::as_str)).await,
        Verb::Apps => apps(backend).await,
        Verb::Deploy => images::deploy(backend, &found.name, request).await,
        Verb::RemoveApp => remove_app(backend, &found.name, &query, &request).await,
        Verb::Scale => scale(backend, &found.name, request).await,
        Verb::Instances => instances::list(backend, &query).await,
        Verb::Logs => instances::logs(backend, &found.name, &query, request).await,
        Verb::Exec => exec::exec(backend, &found.name, request).await,
        Verb::Nodes | Verb::Node | Verb::RemoveNode | Verb::Drain | Verb::Activate | Verb::Labels => {
            nodes(backend, found, &query, request).await
        }
        Verb::Tokens | Verb::CreateToken | Verb::RemoveToken | Verb::Users | Verb::RemoveUser => {
            people(backend, found, request).await
        }
        Verb::Settings | Verb::ChangeSetting => settings(backend, found, request).await,
        Verb::Images => images::list(backend).await,
        Verb::LoadImages => images::load(backend, request).await,
        Verb::RemoveImage => images::remove(backend, &found.name, &request).await,
        Verb::PutContent => images::put_content(backend, request).await,
        Verb::Events => events(backend, query.contains_key("follow")).await,
        Verb::Leave => leave(backend, request).await,
        Verb::Network => network::show(backend, query.get("app").map(String::as_str)).await,
        Verb::CheckNetwork => network::check(backend, &found.name).await,
        Verb::Addresses => network::addresses(backend).await,
        Verb::AddAddress => network::add_address(backend, request).await,
        Verb::RemoveAddress => network::remove_address(backend, &found.name, &request).await,
        Verb::Secrets => secrets::list(backend).await,
        Verb::PutSecret => secrets::put(backend, caller, &found.name, request).await,
        Verb::RemoveSecret => secrets::remove(backend, &found.name, &request).await,
        Verb::InternalSecret => secrets::hand_out(backend, caller, &found.name).await,
        Verb::InternalCertificate => secrets::hand_out_key(backend, &found.name),
        Verb::InternalChallenge => certificates::challenge(backend, &found.name),
        Verb::InternalCheck => certificates::check_for_peer(backend, &found.name, request).await,
        Verb::Authority => certificates::authority(backend).await,
        Verb::InternalPorts => ports::answer(backend, request).await,
        Verb::InternalNetwork => network::facts(backend).await,
        Verb::Joining => joining::show(backend),
        Verb::ShowCode => joining::show_code(backend, request).await,
        Verb::Pending => joining::pending(backend),
        Verb::Accept => joining::accept(backend, request).await,
        Verb::RecoverKey => keys::recover(backend, request).await,
        Verb::RecoveryKey => keys::show_recovery_key(backend),
        Verb::InternalWrite
        | Verb::InternalBlob
        | Verb::InternalLive
        | Verb::InternalKey
        | Verb::InternalJoin => internal::handle(backend, caller, found, request).await,
    }
}

pub fn query_of<B>(request: &Request<B>) -> BTreeMap<String, String> {
    let pairs = request.uri().query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
    pairs
        .filter_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, "true"));
            Some((decode(key)?, decode(&value.replace('+', "%20"))?))
        })
        .filter(|(_, value)| value != "false")
        .gather()
}

/// The mark of what a client asked, if it minted a key for it.
pub fn mark_of(headers: &HeaderMap, asked: &Command) -> Result<Option<RequestMark>, ApiError> {
    Ok(RequestKey::of(headers)?.map(|key| key.mark(asked)))
}

pub fn app_name(text: &str) -> Result<AppName, ApiError> {
    AppName::new(text).map_err(|error| ApiError::invalid(error.to_string()))
}

/// Where nodes are on the LAN, as this node's connections show it.
pub fn lan_addresses(backend: &Backend) -> BTreeMap<NodeId, IpAddr> {
    let mut addresses: BTreeMap<NodeId, IpAddr> = backend
        .transport
        .connections()
        .into_iter()
        .map(|(node, connection)| (node, connection.address.ip().to_canonical()))
        .gather();
    let own = backend.transport.local_addresses();
    if let Some(address) =
        own.iter().map(SocketAddr::ip).find(|address| address.is_ipv4() && !address.is_loopback())
    {
        addresses.insert(backend.node, address);
    }
    addresses
}

/// A reading with what it takes to show it.
pub struct Shown {
    pub reading: Reading,
    pub live: Live,
    pub addresses: BTreeMap<NodeId, IpAddr>,
}

impl Shown {
    pub fn view<'a>(&'a self, backend: &'a Backend) -> View<'a> {
        View {
            state: &self.reading.state,
            status: &self.reading.status,
            live: &self.live,
            addresses: &self.addresses,
            data_dir: &backend.ground.data_dir,
        }
    }
}

pub async fn shown(backend: &Arc<Backend>, wants_live: bool) -> Result<Shown, ApiError> {
    let reading = backend.reading().await?;
    let live = match wants_live {
        true => internal::gather_live(backend, &reading.state).await,
        false => Live::new(),
    };
    Ok(Shown { reading, live, addresses: lan_addresses(backend) })
}

fn version(backend: &Backend) -> VersionBody {
    let state = backend.replica.state();
    VersionBody {
        version: env!("CARGO_PKG_VERSION").into(),
        architecture: Architecture::own().to_string(),
        cluster: state.cluster().map(|cluster| cluster.name.clone()),
        node: Some(state.node_name(backend.node)),
    }
}

pub fn openapi_document() -> Vec<u8> {
    let mut document = Vec::new();
    flate2::read::ZlibDecoder::new(OPENAPI).read_to_end(&mut document).expect("cross/link.rs packed it");
    document
}

fn openapi() -> Reply {
    let mut reply = hyper::Response::new(body::full(openapi_document()));
    reply.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    reply
}

async fn status(backend: &Arc<Backend>, app: Option<&str>) -> Result<Reply, ApiError> {
    let shown = shown(backend, true).await?;
    let view = shown.view(backend);
    let state = &shown.reading.state;
    if let Some(name) = app
        && !state.apps.contains(&app_name(name)?)
    {
        return Err(ApiError::not_found("app", name));
    }
    let is_wanted = |name: &AppName| app.is_none_or(|app| app == name.as_str());
    body::ok(&StatusBody {
        freshness: shown.reading.freshness.clone(),
        cluster: state.cluster().map(|cluster| cluster.name.clone()).unwrap_or_default(),
        node: state.node_name(backend.node),
        leader: shown.reading.status.leader.map(|leader| state.node_name(leader)),
        cluster_time: shown.reading.status.cluster_time.to_string(),
        nodes: state.nodes.rows().map(|node| view.node(node)).collect(),
        services: state
            .services
            .rows()
            .filter(|service| !service.is_removed && is_wanted(&service.app))
            .map(|service| view.service(service))
            .collect(),
        volumes: state
            .volumes
            .rows()
            .filter(|volume| is_wanted(&volume.app))
            .map(|volume| view.volume(volume))
            .collect(),
    })
}

async fn apps(backend: &Arc<Backend>) -> Result<Reply, ApiError> {
    let shown = shown(backend, false).await?;
    let view = shown.view(backend);
    let apps = shown.reading.state.apps.rows().map(|app| view.app(app)).collect();
    body::ok(&AppsBody { freshness: shown.reading.freshness.clone(), apps })
}

async fn remove_app(
    backend: &Arc<Backend>,
    name: &str,
    query: &BTreeMap<String, String>,
    request: &Request<Incoming>,
) -> Result<Reply, ApiError> {
    let app = app_name(name)?;
    let command = Command::RemoveApp { app: app.clone(), with_volumes: query.contains_key("volumes") };
    let mark = mark_of(request.headers(), &command)?;
    let StateReply::Removed { volumes } = backend.submit(mark, command).await? else {
        return Err(unexpected());
    };
    let root = backend.ground.data_dir.join("volumes").join(app.as_str());
    let volumes = volumes
        .into_iter()
        .map(|volume| VolumeBody {
            app: app.to_string(),
            path: root.join(&volume.name).display().to_string(),
            name: volume.name,
            node: volume.node,
            directory: None,
            is_removed: false,
        })
        .collect();
    body::ok(&RemoveReply { volumes })
}

pub fn unexpected() -> ApiError {
    ApiError::new(
        hyper::StatusCode::INTERNAL_SERVER_ERROR,
        "internal",
        "the state answered something else than was asked",
    )
}

async fn scale(backend: &Arc<Backend>, name: &str, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let app = app_name(name)?;
    let (head, content) = request.into_parts();
    let wish: ScaleRequest = body::parse(content).await?;
    let command = Command::ScaleServices { app, replicas: wish.replicas };
    let mark = mark_of(&head.headers, &command)?;
    let StateReply::Deployed { revision, changed, removed } = backend.submit(mark, command).await? else {
        return Err(unexpected());
    };
    body::ok(&DeployReply { app: name.into(), revision, changed, removed, images: BTreeMap::new() })
}

async fn nodes(
    backend: &Arc<Backend>,
    found: Match,
    query: &BTreeMap<String, String>,
    request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    if found.verb == Verb::Nodes {
        let shown = shown(backend, false).await?;
        let view = shown.view(backend);
        let nodes = shown.reading.state.nodes.rows().map(|node| view.node(node)).collect();
        return body::ok(&NodesBody { freshness: shown.reading.freshness.clone(), nodes });
    }
    if found.verb == Verb::Node {
        let shown = shown(backend, false).await?;
        let node = node_named(&shown.reading.state, &found.name);
        let node = node.ok_or_else(|| ApiError::not_found("node", &found.name))?;
        return body::ok(&shown.view(backend).node(node));
    }
    // Whom the copy here knows needs no reading first: without a leader that would take its own time.
    let known = node_named(&backend.replica.state(), &found.name).map(|node| node.id);
    let node = match known {
        Some(node) => Some(node),
        None => node_named(&backend.reading().await?.state, &found.name).map(|node| node.id),
    };
    let node = node.ok_or_else(|| ApiError::not_found("node", &found.name))?;
    let (head, content) = request.into_parts();
    let command = match found.verb {
        Verb::Drain => Command::DrainNode { node, is_drained: true },
        Verb::Activate => Command::DrainNode { node, is_drained: false },
        Verb::RemoveNode => Command::RemoveNode { node, is_forced: query.contains_key("force") },
        _ => {
            let wish: LabelsRequest = body::parse(content).await?;
            Command::LabelNode { node, set: wish.set, remove: wish.remove }
        }
    };
    backend.submit(mark_of(&head.headers, &command)?, command).await?;
    body::done()
}

/// By its name or its id.
fn node_named<'a>(state: &'a State, name: &str) -> Option<&'a Node> {
    let by_id = || name.parse().ok().and_then(|id: NodeId| state.nodes.find(&id));
    state.node_by_name(name).or_else(by_id)
}

async fn people(backend: &Arc<Backend>, found: Match, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let (head, content) = request.into_parts();
    match found.verb {
        Verb::Tokens => {
            let shown = shown(backend, false).await?;
            let tokens = shown.view(backend).tokens();
            body::ok(&TokensBody { freshness: shown.reading.freshness.clone(), tokens })
        }
        Verb::CreateToken => {
            let key = RequestKey::of(&head.headers)?;
            let wish = body::parse_or_default(content).await?;
            body::ok(&create_token(backend, wish, key).await?)
        }
        Verb::RemoveToken => {
            let token = found.name.parse().map_err(|_| ApiError::not_found("token", &found.name))?;
            let command = Command::RemoveToken { token };
            backend.submit(mark_of(&head.headers, &command)?, command).await?;
            body::done()
        }
        Verb::Users => {
            let reading = backend.reading().await?;
            let user = |user: &crate::state::User| UserBody {
                name: user.name.clone(),
                role: user.role.name().into(),
                contexts: user.keys.len(),
                created_at: user.created_at.to_string(),
            };
            let users = reading.state.users.rows().map(user).collect();
            body::ok(&UsersBody { freshness: reading.freshness, users })
        }
        _ => {
            let command = Command::RemoveUser { name: found.name };
            backend.submit(mark_of(&head.headers, &command)?, command).await?;
            body::done()
        }
    }
}

/// A retry with the same key at the same node gets the same token; at another node it is refused, since the secret is
/// that node's to know.
pub async fn create_token(
    backend: &Arc<Backend>,
    wish: TokenRequest,
    key: Option<RequestKey>,
) -> Result<TokenReply, ApiError> {
    let seconds = wish.valid_seconds.unwrap_or(TOKEN_VALID_SECONDS);
    if seconds == 0 || seconds > TOKEN_VALID_SECONDS_MAX {
        return Err(ApiError::invalid("a token is valid for 1 s to 365 days"));
    }
    let secret = match key {
        Some(key) => TokenSecret::derive(&backend.identity().node_key, key.id),
        None => TokenSecret::create().map_err(|error| ApiError::internal(&error))?,
    };
    let (kind, text) = match &wish.user {
        Some(name) => {
            let role = if wish.is_viewer { Role::Viewer } else { Role::Operator };
            (TokenKind::User { name: name.clone(), role }, TokenText::User)
        }
        None => (TokenKind::Join { is_once: wish.is_once }, TokenText::Join),
    };
    let status = backend.replica.status().await;
    let now = status.map(|status| status.cluster_time).unwrap_or_default();
    // A retry would end later: what was asked is how long it is to be valid.
    let asked =
        |expires_at| Command::CreateToken { secret_hash: secret.hash(), kind: kind.clone(), expires_at };
    let mark = key.map(|key| key.mark(&asked(Timestamp(seconds * 1000))));
    let expires_at = now.plus_ms(seconds * 1000);
    let StateReply::TokenCreated { token: id } = backend.submit(mark, asked(expires_at)).await? else {
        return Err(unexpected());
    };
    let expires_at = backend.replica.state().tokens.find(&id).map_or(expires_at, |token| token.expires_at);
    let membership = backend.identity().membership.ok_or_else(unexpected)?;
    // The answering node first; then the others, so that a token outlives one board.
    let mut addresses = backend.transport.local_addresses();
    let peers = backend.transport.connections();
    addresses.extend(peers.values().map(|connection| connection.address));
    let token = Token {
        id,
        secret,
        authority: AuthorityHash::of(&membership.authority),
        cluster_name: membership.cluster_name,
        addresses,
    };
    let token = token.to_text(text);
    let line = match wish.user {
        Some(_) => format!("tinydc context create home {token}"),
        None => format!("tinydc join {token}"),
    };
    Ok(TokenReply { id: id.to_string(), token, expires_at: expires_at.to_string(), line })
}

/// Encryption is for all nodes or for none: one that can't would lose touch with the others' containers. A node that has
/// just come tells in a moment whether it can.
async fn refuse_if_some_cannot_encrypt(backend: &Backend) -> Result<(), ApiError> {
    let begin = Instant::now();
    loop {
        let (ways, own, state) = (backend.ways.clone(), backend.node, backend.replica.state());
        let known = state.clone();
        let obstacles = crate::tasks::unblock(move || ways.obstacles(own, &known)).await;
        if let Some((node, reason)) = obstacles.first_key_value() {
            let name = state.node_name(*node);
            return Err(ApiError::rejected(format!("{name} can't encrypt: {reason}")).hint(
                "load the module there (modprobe wireguard, or modprobe tun), restart tinydc on it, and set it again",
            ));
        }
        let is_silent =
            |node: &&Node| node.condition == Condition::Up && node.id != own && !backend.ways.has_heard(node);
        let Some(silent) = state.nodes.rows().find(is_silent) else { return Ok(()) };
        if begin.elapsed() > ENCRYPTION_TOLD_LIMIT {
            let told = format!("{} has not told yet whether it can encrypt", silent.name);
            return Err(
                ApiError::rejected(told).hint("see whether it is reached: tinydc net; then set it again")
            );
        }
        async_io::Timer::after(ENCRYPTION_TOLD_EVERY).await;
    }
}

async fn settings(
    backend: &Arc<Backend>,
    found: Match,
    request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    if found.verb == Verb::ChangeSetting {
        let (head, content) = request.into_parts();
        let wish: SettingValue = body::parse(content).await?;
        match (found.name.as_str(), wish.value.as_str()) {
            ("encrypt", "true") => refuse_if_some_cannot_encrypt(backend).await?,
            ("ipv6", "true") => network::refuse_if_some_lack_ipv6(backend).await?,
            _ => {}
        }
        let command = Command::ChangeSetting { key: found.name, value: wish.value };
        backend.submit(mark_of(&head.headers, &command)?, command).await?;
        return body::done();
    }
    let reading = backend.reading().await?;
    let settings = reading.state.cluster_settings().rows().into_iter().map(|row| SettingBody {
        key: row.key.into(),
        value: row.value,
        default: row.default,
        meaning: row.meaning.into(),
    });
    body::ok(&SettingsBody { freshness: reading.freshness, settings: settings.collect() })
}

async fn events(backend: &Arc<Backend>, follow: bool) -> Result<Reply, ApiError> {
    let reading = backend.reading().await?;
    let (sender, chunks) = async_channel::bounded(16);
    let replica = backend.replica.clone();
    let mut state = reading.state;
    backend
        .executor
        .launch(async move {
            let mut next = 0;
            loop {
                for event in state.events.rows().filter(|event| event.id >= next) {
                    let line = EventBody {
                        id: event.id,
                        at: event.at.to_string(),
                        kind: event.kind.clone(),
                        subject: event.subject.clone(),
                        text: event.text.clone(),
                    };
                    if sender.send(line_of(&line)).await.is_err() {
                        return;
                    }
                }
                next = state.events.rows().next_back().map_or(next, |event| event.id + 1);
                if !follow || sender.is_closed() {
                    return;
                }
                async_io::Timer::after(EVENTS_EVERY).await;
                state = replica.state();
            }
        })
        .detach();
    Ok(body::streamed("application/x-ndjson", chunks))
}

/// One JSON object and a line end.
pub fn line_of<T: serde::Serialize>(value: &T) -> Bytes {
    let mut line = serde_json::to_vec(value).expect("wire types are plain data");
    line.push(b'\n');
    Bytes::from(line)
}

async fn leave(backend: &Arc<Backend>, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let (head, content) = request.into_parts();
    let wish: LeaveRequest = body::parse_or_default(content).await?;
    let command = Command::RemoveNode { node: backend.node, is_forced: wish.is_forced };
    backend.submit(mark_of(&head.headers, &command)?, command).await?;
    // Full means that leaving has begun already.
    let _ = backend.leave.try_send(());
    body::done()
}
