//! An ingress with threads of its own, endpoints that do as the path says, and a client that sees every byte.

use crate::network::ingress::{Ingress, IngressConfig, IngressCounts, Route, RouteOptions, Routes};
use async_executor::Executor;
use futures_lite::future;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub const LIMIT: Duration = Duration::from_secs(10);

pub struct Site {
    ingress: Option<Ingress>,
    executor: Arc<Executor<'static>>,
    threads: Vec<JoinHandle<()>>,
    stop: async_channel::Sender<()>,
}

impl Site {
    pub fn start(config: IngressConfig, routes: Routes) -> Site {
        let executor = Arc::new(Executor::new());
        let (stop, stopped) = async_channel::bounded::<()>(1);
        let threads = (0..2)
            .map(|_| {
                let (executor, stopped) = (executor.clone(), stopped.clone());
                std::thread::spawn(move || {
                    let _ = async_io::block_on(executor.run(stopped.recv()));
                })
            })
            .collect();
        let config = IngressConfig { listen: vec![Ipv4Addr::LOCALHOST.into()], ..config };
        let ingress = Ingress::start(config, &executor).unwrap();
        let site = Site { ingress: Some(ingress), executor, threads, stop };
        site.set(routes);
        site
    }

    pub fn plain(routes: Vec<Route>) -> Site {
        Site::start(IngressConfig::default(), Routes { routes, ..any_port() })
    }

    pub fn set(&self, routes: Routes) {
        self.ingress.as_ref().unwrap().set_routes(routes).unwrap();
    }

    /// Also if a port isn't to be had.
    pub fn set_anyway(&self, routes: Routes) {
        let _ = self.ingress.as_ref().unwrap().set_routes(routes);
    }

    pub fn port(&self, is_tls: bool) -> u16 {
        let addresses = self.ingress.as_ref().unwrap().addresses();
        addresses.iter().find(|(tls, _)| *tls == is_tls).expect("a listener").1.port()
    }

    pub fn is_listening(&self) -> bool {
        !self.ingress.as_ref().unwrap().addresses().is_empty()
    }

    pub fn counts(&self) -> IngressCounts {
        self.ingress.as_ref().unwrap().counts()
    }

    pub fn connect(&self) -> Client {
        Client::new(self.port(false))
    }

    /// One request with a connection of its own.
    pub fn get(&self, path: &str) -> Answer {
        self.connect().ask(&format!("GET {path} HTTP/1.1\r\nhost: shop.test\r\n\r\n"))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        future::block_on(self.ingress.take().unwrap().stop());
        until("a stopped ingress leaves no task", || self.executor.is_empty());
        self.stop.close();
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

pub fn any_port() -> Routes {
    Routes { http_port: 0, https_port: 0, ..Routes::default() }
}

pub fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_true() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn route(path_prefix: &str, endpoints: &[SocketAddrV4]) -> Route {
    Route {
        host: None,
        path_prefix: path_prefix.into(),
        app: "shop".into(),
        service: "web".into(),
        endpoints: endpoints.to_vec(),
        options: RouteOptions::default(),
    }
}

/// A port where nobody listens.
pub fn dead() -> SocketAddrV4 {
    let SocketAddr::V4(address) = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() else {
        unreachable!("bound to IPv4")
    };
    address
}

pub struct Client {
    pub stream: BufReader<TcpStream>,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Client {
    pub fn new(port: u16) -> Client {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Client { stream: BufReader::new(stream) }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    pub fn ask(&mut self, request: &str) -> Answer {
        self.send(request);
        self.answer()
    }

    pub fn answer(&mut self) -> Answer {
        let head = read_head(&mut self.stream).unwrap();
        let status =
            head.split(' ').nth(1).unwrap_or_default().parse().unwrap_or_else(|_| panic!("{head:?}"));
        let body = if status == 101 { Vec::new() } else { read_body(&mut self.stream, &head).unwrap() };
        Answer { status, head, body: String::from_utf8_lossy(&body).into() }
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        line
    }

    /// What comes until the other side closes, or breaks off.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        let _ = self.stream.read_to_end(&mut rest);
        rest
    }
}

pub fn read_head(stream: &mut impl BufRead) -> io::Result<String> {
    let mut head = String::new();
    loop {
        let before = head.len();
        if stream.read_line(&mut head)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if head.len() - before <= 2 {
            return Ok(head);
        }
    }
}

pub fn header<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    let lines = head.lines().filter_map(|line| line.split_once(':'));
    lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).next()
}

pub fn read_body(stream: &mut impl BufRead, head: &str) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    if let Some(length) = header(head, "content-length") {
        body.resize(length.parse().unwrap(), 0);
        stream.read_exact(&mut body)?;
    } else if header(head, "transfer-encoding") == Some("chunked") {
        loop {
            let mut size = String::new();
            stream.read_line(&mut size)?;
            let size = usize::from_str_radix(size.trim(), 16).map_err(io::Error::other)?;
            let mut piece = vec![0; size + 2];
            stream.read_exact(&mut piece)?;
            if size == 0 {
                break;
            }
            body.extend_from_slice(&piece[..size]);
        }
    }
    Ok(body)
}

/// An endpoint that does what the path says.
pub struct Endpoint {
    pub address: SocketAddrV4,
    pub connections: Arc<AtomicUsize>,
    pub requests: Arc<Mutex<Vec<String>>>,
    /// Lets `/wait` and the second half of `/stream` go on.
    pub gate: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Behaviour {
    name: &'static str,
    requests: Arc<Mutex<Vec<String>>>,
    gate: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

const WAITING_MAX: i32 = 1024;

impl Endpoint {
    pub fn start(name: &'static str) -> Endpoint {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // Hundreds come at once, more than the 128 that may wait otherwise: a busy machine would refuse the rest.
        rustix::net::listen(&listener, WAITING_MAX).unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { unreachable!("bound to IPv4") };
        let (connections, requests) = (Arc::new(AtomicUsize::new(0)), Arc::<Mutex<Vec<String>>>::default());
        let (gate, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (count, seen, open, ended) = (connections.clone(), requests.clone(), gate.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                count.fetch_add(1, Ordering::Relaxed);
                let behaviour =
                    Behaviour { name, requests: seen.clone(), gate: open.clone(), stop: ended.clone() };
                std::thread::spawn(move || behaviour.serve(stream));
            }
        });
        Endpoint { address, connections, requests, gate, stop, thread: Some(thread) }
    }

    pub fn open_gate(&self) {
        self.gate.store(true, Ordering::Relaxed);
    }

    pub fn seen(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.gate.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().unwrap().join();
    }
}

/// Answers that depend on nothing, and whether the connection goes on.
fn canned(path: &str) -> Option<(&'static str, bool)> {
    Some(match path {
        "/h2c" => ("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n", false),
        "/two-lengths" => (
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n5\r\nwhole\r\n0\r\n\r\n",
            true,
        ),
        "/garbage" => ("this is not HTTP\r\n\r\n", false),
        _ => return None,
    })
}

impl Behaviour {
    fn serve(&self, stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut writer = stream;
        let mut is_first = true;
        while let Ok(head) = read_head(&mut reader) {
            self.requests.lock().unwrap().push(head.clone());
            if head.contains("/fresh") && !is_first {
                return;
            }
            is_first = false;
            let path = head.split(' ').nth(1).unwrap_or_default().to_string();
            let Ok(goes_on) = self.answer(&path, &head, &mut reader, &mut writer) else { return };
            if !goes_on || self.stop.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    fn wait(&self) {
        while !self.gate.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn answer(
        &self,
        path: &str,
        head: &str,
        reader: &mut BufReader<TcpStream>,
        writer: &mut TcpStream,
    ) -> io::Result<bool> {
        if let Some((reply, goes_on)) = canned(path) {
            writer.write_all(reply.as_bytes())?;
            return Ok(goes_on);
        }
        let whole = |text: &str| format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len());
        match path {
            "/close" => return Ok(false),
            "/half" => {
                writer.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")?;
                self.wait();
                return Ok(false);
            }
            "/wait" => self.wait(),
            "/stream" => {
                writer.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\nfirst\n\r\n")?;
                self.wait();
                writer.write_all(b"5\r\nlast\n\r\n0\r\n\r\n")?;
                return Ok(true);
            }
            "/ws" => {
                writer.write_all(
                    b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
                )?;
                io::copy(reader, writer)?;
                writer.write_all(b"bye")?;
                return Ok(false);
            }
            "/head" => {
                writer.write_all(whole(head).as_bytes())?;
                return Ok(true);
            }
            "/once" => {
                // Closes without a word after an answer that promises to stay.
                writer.write_all(whole(self.name).as_bytes())?;
                return Ok(false);
            }
            "/huge-head" => {
                writer
                    .write_all(format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(200_000)).as_bytes())?;
                return Ok(false);
            }
            _ => {}
        }
        let body = read_body(reader, head)?;
        if path == "/echo" {
            let mut reply = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len()).into_bytes();
            reply.extend_from_slice(&body);
            writer.write_all(&reply)?;
        } else {
            writer.write_all(whole(self.name).as_bytes())?;
        }
        Ok(true)
    }
}
