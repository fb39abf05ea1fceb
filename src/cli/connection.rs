//! To which daemon a command speaks, and the stream to it.
//!
//! `--host`, `--context`, `TINYDC_HOST`, `TINYDC_CONTEXT`, the current context, this machine's socket: the first that
//! is given counts. A socket gives a Unix stream; a context gives TLS to whichever of its nodes answers first, the
//! remembered ones started 250 ms apart so that a dead board costs little.

use crate::model::Order;
use std::cell::{Cell, RefCell};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context as _;
use async_executor::LocalExecutor;
use async_io::{Async, Timer};
use futures_lite::{AsyncRead, AsyncWrite};

use super::arguments::Globals;
use super::contexts::{Context, LOCAL, Store};
use super::failure::Failure;
use super::terminal::within;
use crate::transport::https::HttpsClient;

pub const SOCKET: &str = "/run/tinydc/api.sock";
const DATA_DIR: &str = "/var/lib/tinydc";
/// The API's TCP port where nothing else is known.
pub const API_PORT: u16 = 7400;
const SOCKET_LIMIT: Duration = Duration::from_secs(3);
const CONNECT_LIMIT: Duration = Duration::from_secs(6);
const STAGGER: Duration = Duration::from_millis(250);

pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<Stream: AsyncRead + AsyncWrite + Send + Unpin> Duplex for Stream {}
pub type BoxedStream = Box<dyn Duplex>;

pub enum Target {
    Socket(PathBuf),
    Context(Box<Remote>),
}

pub struct Remote {
    pub store: Store,
    pub context: RefCell<Context>,
    client: HttpsClient,
    /// Which address answered last.
    preferred: Cell<Option<SocketAddr>>,
}

impl Target {
    pub fn choose(globals: &Globals) -> anyhow::Result<Target> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        if let Some(host) = &globals.host {
            return Ok(Target::Socket(socket_of_host(host)?));
        }
        if let Some(name) = &globals.context {
            return Target::named(name, globals);
        }
        if globals.data_dir.is_some() {
            return Ok(Target::Socket(local_socket(globals)));
        }
        if let Some(host) = variable("TINYDC_HOST") {
            return Ok(Target::Socket(socket_of_host(&host)?));
        }
        if let Some(name) = variable("TINYDC_CONTEXT") {
            return Target::named(&name, globals);
        }
        // A system service has no home and no contexts.
        match Store::open().ok().and_then(|store| store.current()) {
            Some(name) => Target::named(&name, globals),
            None => Ok(Target::Socket(local_socket(globals))),
        }
    }

    /// For what only a machine's own daemon can do: init, join, leave.
    pub fn local(globals: &Globals) -> anyhow::Result<Target> {
        match globals.host.clone().or_else(|| std::env::var("TINYDC_HOST").ok()) {
            Some(host) if globals.data_dir.is_none() => Ok(Target::Socket(socket_of_host(&host)?)),
            _ => Ok(Target::Socket(local_socket(globals))),
        }
    }

    fn named(name: &str, globals: &Globals) -> anyhow::Result<Target> {
        if name == LOCAL {
            return Ok(Target::Socket(local_socket(globals)));
        }
        let store = Store::open()?;
        let context = store.load(name)?;
        Target::of_context(store, context)
    }

    pub fn of_context(store: Store, context: Context) -> anyhow::Result<Target> {
        let name = &context.name;
        let shown = (context.certificate.clone(), &context.key);
        let client = HttpsClient::new(context.authority.clone(), Some(shown))
            .with_context(|| format!("set up TLS for context {name}"))?;
        let context = RefCell::new(context);
        Ok(Target::Context(Box::new(Remote { store, context, client, preferred: Cell::new(None) })))
    }

    pub async fn connect(&self, executor: &LocalExecutor<'static>) -> Result<BoxedStream, Failure> {
        match self {
            Target::Socket(path) => connect_socket(path).await,
            Target::Context(remote) => remote.connect(executor).await,
        }
    }
}

fn local_socket(globals: &Globals) -> PathBuf {
    match &globals.data_dir {
        Some(data_dir) if data_dir != Path::new(DATA_DIR) => data_dir.join("run/api.sock"),
        _ => PathBuf::from(SOCKET),
    }
}

fn socket_of_host(host: &str) -> Result<PathBuf, Failure> {
    match host.strip_prefix("unix://").filter(|path| path.starts_with('/')) {
        Some(path) => Ok(path.into()),
        None if host.starts_with('/') => Ok(host.into()),
        None => Err(Failure::usage(format!("{host:?} is not a host that tinydc can reach"))
            .hint("unix:///PATH is; another machine is reached by a context: tinydc context create")),
    }
}

async fn connect_socket(path: &Path) -> Result<BoxedStream, Failure> {
    let connected = within(SOCKET_LIMIT, Async::<UnixStream>::connect(path)).await;
    let error = match connected {
        Some(Ok(stream)) => return Ok(Box::new(stream)),
        Some(Err(error)) => error,
        None => io::ErrorKind::TimedOut.into(),
    };
    Err(explain_socket(path, &error))
}

fn explain_socket(path: &Path, error: &io::Error) -> Failure {
    let shown = path.display();
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            let is_default = path == Path::new(SOCKET);
            let place = if is_default { String::new() } else { format!(" (no daemon at {shown})") };
            Failure::unreachable(format!("tinydc is not running here{place}; start it: tinydc node run"))
                .hint("for a cluster elsewhere, use a context: tinydc context ls")
        }
        io::ErrorKind::PermissionDenied => {
            Failure::refused(format!("you may not open {shown}: only root and the group tinydc may"))
                .hint("use sudo, or once: sudo usermod -aG tinydc $USER, then log in again")
        }
        _ => Failure::unreachable(format!("connect to {shown}: {error}")),
    }
}

impl Remote {
    async fn connect(&self, executor: &LocalExecutor<'static>) -> Result<BoxedStream, Failure> {
        let mut addresses = self.context.borrow().file.addresses.clone();
        let preferred = self.preferred.get();
        addresses.order_by_key(|address| Some(*address) != preferred);
        let (sender, results) = async_channel::bounded(addresses.len().max(1));
        let mut attempts = Vec::new();
        for (number, address) in addresses.iter().copied().enumerate() {
            let (sender, client) = (sender.clone(), self.client.clone());
            attempts.push(executor.spawn(async move {
                Timer::after(STAGGER.saturating_mul(number.try_into().unwrap_or(u32::MAX))).await;
                // The receiver is gone once another address has answered.
                let _ = sender.send((address, attempt(&client, address).await)).await;
            }));
        }
        drop(sender);
        let failures = Rc::new(RefCell::new(Vec::new()));
        let first = within(CONNECT_LIMIT, async {
            while let Ok((address, result)) = results.recv().await {
                match result {
                    Ok(stream) => return Some((address, stream)),
                    Err(error) => failures.borrow_mut().push(format!("{address}: {error}")),
                }
            }
            None
        })
        .await
        .flatten();
        for attempt in attempts {
            attempt.cancel().await;
        }
        match first {
            Some((address, stream)) => {
                self.preferred.set(Some(address));
                Ok(stream)
            }
            None => Err(self.nobody_answers(&addresses, &failures.borrow())),
        }
    }

    /// The next connection starts with another node.
    pub fn avoid_last(&self) {
        let context = self.context.borrow();
        let addresses = &context.file.addresses;
        let last = addresses.iter().position(|address| Some(*address) == self.preferred.get());
        let next = last.map_or(0, |last| last + 1) % addresses.len().max(1);
        self.preferred.set(addresses.get(next).copied());
    }

    fn nobody_answers(&self, addresses: &[SocketAddr], failures: &[String]) -> Failure {
        let tried = match failures.is_empty() {
            true => addresses.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", "),
            false => failures.join("; "),
        };
        let name = self.context.borrow().name.clone();
        Failure::unreachable(format!("no node of context {name} answers (tried {tried})"))
            .hint("are the nodes on, and is this the right network? another cluster: tinydc context ls")
    }

    /// Writes down where the nodes are now, if that is news. Failing to is no reason to fail the command.
    pub fn remember(&self, hosts: &[String]) {
        let mut context = self.context.borrow_mut();
        let known = context.file.addresses.clone();
        // First the port that answered just now.
        let ports: Vec<SocketAddr> = self.preferred.get().into_iter().chain(known.iter().copied()).collect();
        let addresses: Vec<SocketAddr> = hosts.iter().filter_map(|host| api_address(host, &ports)).collect();
        let is_news = addresses.iter().any(|address| !known.contains(address));
        if addresses.is_empty() || !is_news && addresses.len() == known.len() {
            return;
        }
        context.file.addresses = addresses;
        if let Some(preferred) = self.preferred.get().filter(|at| !context.file.addresses.contains(at)) {
            // It answered just now, though the nodes don't know that address: a forwarded port.
            context.file.addresses.push(preferred);
        }
        if context.file.addresses != known {
            let _ = self.store.remember_addresses(&context.name, &context.file);
        }
    }
}

/// A node tells its IP address only; the port is what this context used for it, or the first known.
fn api_address(host: &str, known: &[SocketAddr]) -> Option<SocketAddr> {
    let address = host.parse::<SocketAddr>().map(|address| address.ip()).or_else(|_| host.parse()).ok()?;
    let same = known.iter().find(|known| known.ip() == address).or(known.first());
    Some(SocketAddr::new(address, same.map_or(API_PORT, SocketAddr::port)))
}

async fn attempt(client: &HttpsClient, address: SocketAddr) -> Result<BoxedStream, String> {
    let stream = Async::<TcpStream>::connect(address).await.map_err(|error| error.to_string())?;
    match client.connect(stream).await {
        Ok(stream) => Ok(Box::new(stream)),
        Err(error) => Err(super::failure::chain(&error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_a_socket_s_path() {
        assert_eq!(socket_of_host("unix:///run/a.sock").unwrap(), Path::new("/run/a.sock"));
        assert_eq!(socket_of_host("/run/a.sock").unwrap(), Path::new("/run/a.sock"));
        for host in ["tcp://10.0.0.1:7400", "unix://a.sock", "pi1", ""] {
            assert_eq!(socket_of_host(host).unwrap_err().exit.number(), 2, "{host}");
        }
    }

    #[test]
    fn a_daemon_with_its_own_data_directory_has_its_own_socket() {
        let socket = |data_dir: Option<&str>| {
            local_socket(&Globals { data_dir: data_dir.map(PathBuf::from), ..Globals::default() })
        };
        assert_eq!(socket(None), Path::new(SOCKET));
        assert_eq!(socket(Some(DATA_DIR)), Path::new(SOCKET));
        assert_eq!(socket(Some("/tmp/n1")), Path::new("/tmp/n1/run/api.sock"));
    }

    #[test]
    fn a_missing_socket_says_what_to_type() {
        let failure = explain_socket(Path::new(SOCKET), &io::ErrorKind::NotFound.into());
        assert_eq!(failure.to_string(), "tinydc is not running here; start it: tinydc node run");
        assert_eq!(failure.exit.number(), 3);
        let failure = explain_socket(Path::new(SOCKET), &io::ErrorKind::PermissionDenied.into());
        assert!(failure.to_string().contains("group tinydc"));
    }

    #[test]
    fn a_node_s_port_is_the_one_that_worked() {
        let known: Vec<SocketAddr> = vec!["10.0.0.1:7500".parse().unwrap()];
        assert_eq!(api_address("10.0.0.2", &known), "10.0.0.2:7500".parse().ok());
        assert_eq!(api_address("fd00::1", &[]), "[fd00::1]:7400".parse().ok());
        assert_eq!(api_address("pi1", &known), None);
    }
}
