//! `tinydc hello`: the tiny HTTP server of the demo's image, hidden from help.
//!
//! `tinydc hello --ask HOST:PORT COUNT` asks such a server and counts who answers.
//!
//! `tinydc hello --eat MIB` takes that much memory and holds it: for trying limits.
//!
//! `tinydc hello --keep FILE` adds a line to a file and then serves: for trying disks.
//!
//! `GET /` answers who it is and what machine it is built for, `GET /health` that it is well. Blocking sockets and a few
//! threads: it stays below 1 MiB.
//! SIGTERM ends it at once, because a container's first process gets no default action for signals (pid_namespaces(7)).

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::model::Architecture;
use nix::sys::signal::{SigSet, Signal};

const PORT: u16 = 8080;
const THREADS: usize = 8;
const THREAD_STACK_BYTES: usize = 64 << 10;
const REQUEST_BYTES_MAX: usize = 8 << 10;
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// `args`: what follows `hello`.
pub fn main(args: &[std::ffi::OsString]) -> ExitCode {
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: hello: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[std::ffi::OsString]) -> io::Result<()> {
    if let [option, target, count] = args
        && option == "--ask"
    {
        return ask(&target.to_string_lossy(), &count.to_string_lossy());
    }
    if let [option, mebibytes] = args
        && option == "--eat"
    {
        return eat(&mebibytes.to_string_lossy());
    }
    let port = match args {
        [] => std::env::var("PORT").ok().map_or(Ok(PORT), |port| port.parse()),
        [option, file] if option == "--keep" => keep(file).map(|()| Ok(PORT))?,
        [option, port] if option == "--port" => port.to_string_lossy().parse(),
        _ => return Err(io::Error::other("usage: tinydc hello [--port PORT | --ask HOST:PORT COUNT]")),
    };
    let port = port.map_err(|_| io::Error::other("the port is a number from 1 to 65535"))?;
    // Blocked in every thread, and taken by this one: the threads below inherit the mask.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    let listener = Arc::new(TcpListener::bind(("0.0.0.0", port))?);
    let greeting: Arc<str> = greeting().into();
    println!("hello: listening on port {port}");
    for _ in 0..THREADS {
        let (listener, greeting) = (listener.clone(), greeting.clone());
        thread::Builder::new().stack_size(THREAD_STACK_BYTES).spawn(move || {
            loop {
                match listener.accept() {
                    // A client that breaks off is its own business.
                    Ok((stream, _)) => drop(serve(stream, &greeting)),
                    // Out of descriptors or memory: don't spin.
                    Err(_) => thread::sleep(Duration::from_millis(50)),
                }
            }
        })?;
    }
    signals.wait()?;
    Ok(())
}

fn keep(file: &std::ffi::OsString) -> io::Result<()> {
    let mut file = std::fs::File::options().create(true).append(true).open(file)?;
    writeln!(file, "{}", std::process::id())?;
    file.sync_all()
}

/// Takes memory a mebibyte at a time, and keeps it.
fn eat(mebibytes: &str) -> io::Result<()> {
    let count: usize = mebibytes.parse().map_err(|_| io::Error::other("how many MiB?"))?;
    // Written to, or it would only be promised.
    let held: Vec<Vec<u8>> = (0..count).map(|_| vec![1; 1 << 20]).collect();
    println!("holding {} MiB", held.len());
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

/// Prints a line for each instance that answered: how often, and its name.
fn ask(target: &str, count: &str) -> io::Result<()> {
    let count: u32 = count.parse().map_err(|_| io::Error::other("the count is a number"))?;
    let mut tally: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..count {
        let address = target.to_socket_addrs()?.next().ok_or_else(|| io::Error::other("no such name"))?;
        let mut stream = TcpStream::connect_timeout(&address, REQUEST_LIMIT)?;
        stream.set_read_timeout(Some(REQUEST_LIMIT))?;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: hello\r\n\r\n")?;
        let mut answer = String::new();
        stream.take(REQUEST_BYTES_MAX as u64).read_to_string(&mut answer)?;
        // `hello from web instance web-1 on pi2 (arm64)`
        let name = answer.split(" instance ").nth(1).and_then(|rest| rest.split(' ').next());
        *tally.entry(name.unwrap_or("?").to_owned()).or_default() += 1;
    }
    for (name, count) in tally {
        println!("{count} {name}");
    }
    Ok(())
}

fn greeting() -> String {
    let variable = |names: &[&str]| {
        let found = names.iter().find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()));
        found.unwrap_or_else(|| "?".into())
    };
    let host = nix::unistd::gethostname().ok().map(|name| name.to_string_lossy().into_owned());
    let service = variable(&["SERVICE_NAME", "NAME", "TINYDC_SERVICE"]);
    let node = variable(&["NODE", "TINYDC_NODE"]);
    let (host, machine) = (host.unwrap_or_else(|| "?".into()), Architecture::own());
    format!("hello from {service} instance {host} on {node} ({machine})\n")
}

/// One request, one answer, and the connection ends.
fn serve(mut stream: TcpStream, greeting: &str) -> io::Result<()> {
    let started = Instant::now();
    stream.set_read_timeout(Some(REQUEST_LIMIT))?;
    stream.set_write_timeout(Some(REQUEST_LIMIT))?;
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let length = stream.read(&mut buffer)?;
        if length == 0 || request.len() > REQUEST_BYTES_MAX || started.elapsed() > REQUEST_LIMIT {
            return Ok(());
        }
        request.extend_from_slice(&buffer[..length]);
    }
    stream.write_all(answer(&request, greeting).as_bytes())
}

fn answer(request: &[u8], greeting: &str) -> String {
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or(b"");
    let mut words = line.split(|byte| *byte == b' ');
    let (method, path) = (words.next().unwrap_or(b""), words.next().unwrap_or(b""));
    let path = path.split(|byte| *byte == b'?').next().unwrap_or(b"");
    let (status, body) = match (method, path) {
        (b"GET" | b"HEAD", b"/") => ("200 OK", greeting),
        (b"GET" | b"HEAD", b"/health") => ("200 OK", "ok\n"),
        (b"GET" | b"HEAD", _) => ("404 Not Found", "not found\n"),
        _ => ("405 Method Not Allowed", "only GET\n"),
    };
    let length = body.len();
    let body = if method == b"HEAD" { "" } else { body };
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {length}\r\n\
         connection: close\r\n\r\n{body}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_answers_what_it_knows() {
        let cases = [
            ("GET / HTTP/1.1\r\n\r\n", "200", "hi"),
            ("GET /?a=b HTTP/1.1\r\n\r\n", "200", "hi"),
            ("GET /health HTTP/1.1\r\n\r\n", "200", "ok"),
            ("GET /x HTTP/1.1\r\n\r\n", "404", "not found"),
            ("POST / HTTP/1.1\r\n\r\n", "405", "only GET"),
            ("\r\n\r\n", "405", "only GET"),
        ];
        for (request, status, body) in cases {
            let answer = answer(request.as_bytes(), "hi");
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request}: {answer}");
            assert!(answer.ends_with(body) || answer.ends_with(&format!("{body}\n")), "{request}: {answer}");
        }
        assert!(answer(b"HEAD / HTTP/1.1\r\n\r\n", "hi").ends_with("\r\n\r\n"));
    }
}
