//! Where guests stand: a LAN in a network namespace, a DHCP server on it, a laptop, and everything's end.

use crate::guest::{Guest, Setup};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tinydc::cli::lab::{self, Lan};
use tinydc::linux::netns;

const DIR: &str = "/var/tmp/tinydc-guest-test";
pub const PREFIX: [u8; 3] = [10, 97, 0];
const HTTP_LIMIT: Duration = Duration::from_secs(2);

pub struct Field {
    pub dir: PathBuf,
    pub lan: Lan,
    pub guests: Vec<Guest>,
    pub notes: Vec<String>,
    dhcp: Option<Child>,
    _lock: fs::File,
}

impl Field {
    /// One of several that may stand at a time.
    pub fn new(lane: usize) -> Result<Field> {
        let base = PathBuf::from(std::env::var_os("TINYDC_GUEST_DIR").unwrap_or(DIR.into()));
        let dir = base.with_extension(format!("lane{lane}"));
        let lock_path = dir.with_extension(format!("lock{lane}"));
        let lock = fs::File::create(&lock_path).with_context(|| format!("open {}", lock_path.display()))?;
        ensure!(lock.try_lock().is_ok(), "{} is in use by another run", dir.display());
        sweep(&dir)?;
        fs::create_dir_all(dir.join("netns"))?;
        let lan = Lan::new(&dir.join("netns"), "lan", PREFIX)?;
        Ok(Field { dir, lan, guests: Vec::new(), notes: Vec::new(), dhcp: None, _lock: lock })
    }

    pub fn note(&mut self, what: &str, since: Instant) {
        self.notes.push(format!("{what}: {:.1} s", since.elapsed().as_secs_f64()));
    }

    pub fn remark(&mut self, text: String) {
        self.notes.push(text);
    }

    pub fn address(&self, number: u8) -> Ipv4Addr {
        self.lan.address(number)
    }

    /// Runs a program in the LAN's namespace.
    pub fn inside(&self, command: &mut Command) -> Result<Child> {
        let name = command.get_program().to_string_lossy().into_owned();
        netns::in_netns(&self.lan.netns, || command.spawn()).with_context(|| format!("start {name}"))
    }

    fn inside_done(&self, program: &str, words: &[&str]) -> Result<()> {
        let mut child = self.inside(Command::new(program).args(words).stdin(Stdio::null()))?;
        let status = child.wait()?;
        ensure!(status.success(), "{program} {}: {status}", words.join(" "));
        Ok(())
    }

    /// Gives guest N the address PREFIX.(offset + N), for leases of this many seconds.
    pub fn serve_dhcp(&mut self, offset: u8, lease_s: u32) -> Result<()> {
        self.stop_dhcp();
        let [a, b, c] = PREFIX;
        let mut command = Command::new("/usr/sbin/dnsmasq");
        command.args(["--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--interface=lan0"]);
        command.args([
            "--bind-interfaces",
            "--leasefile-ro",
            "--dhcp-authoritative",
            "--log-facility=-",
            "--user=root",
        ]);
        command.arg(format!("--pid-file={}", self.dir.join("dnsmasq.pid").display()));
        command.arg(format!("--dhcp-range={a}.{b}.{c}.1,{a}.{b}.{c}.200,255.255.255.0,{lease_s}s"));
        command.arg(format!("--dhcp-option=option:dns-server,{a}.{b}.{c}.254"));
        for number in 1..=9 {
            let hardware = crate::guest::hardware(number);
            // The second is how QEMU's network chip on USB changes it.
            let on_usb = hardware.replacen("52", "40", 1);
            command.arg(format!("--dhcp-host={hardware},{on_usb},{a}.{b}.{c}.{}", offset + number));
        }
        let log = fs::File::create(self.dir.join("dnsmasq.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.dhcp = Some(self.inside(&mut command)?);
        Ok(())
    }

    pub fn stop_dhcp(&mut self) {
        if let Some(mut dhcp) = self.dhcp.take() {
            // Gone already is what is wanted.
            let _ = dhcp.kill();
            let _ = dhcp.wait();
        }
    }

    /// A guest with its disk, switched off.
    pub fn add(&mut self, setup: Setup) -> Result<usize> {
        let number = self.guests.len() as u8 + 1;
        let tap = format!("tap{number}");
        self.inside_done("ip", &["tuntap", "add", "dev", &tap, "mode", "tap"])?;
        self.inside_done("ip", &["link", "set", &tap, "master", "lan0", "up"])?;
        self.guests.push(Guest::new(&self.dir, number, setup)?);
        Ok(self.guests.len() - 1)
    }

    pub fn start(&mut self, index: usize) -> Result<()> {
        let netns = self.lan.netns.clone();
        self.guests[index].start(&netns)
    }

    /// The cable between a guest and the LAN.
    pub fn set_cable(&self, index: usize, is_plugged: bool) -> Result<()> {
        self.guests[index].qmp("set_link", serde_json::json!({ "name": "nic", "up": is_plugged })).map(drop)
    }

    /// The command line on the laptop, which stands on the LAN and has nothing but its own contexts.
    pub fn laptop(&self, words: &[&str]) -> Result<String> {
        let output: Output = self.laptop_begin(words)?.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!(
                "tinydc {} on the laptop: {said}{}",
                words.join(" "),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(said)
    }

    /// The same, not waited for.
    pub fn laptop_begin(&self, words: &[&str]) -> Result<Child> {
        self.laptop_spoken_to(words, Stdio::null())
    }

    /// The same with something to read.
    pub fn laptop_spoken_to(&self, words: &[&str], input: Stdio) -> Result<Child> {
        let home = self.laptop_dir();
        fs::create_dir_all(&home)?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_tinydc"));
        command.args(words).env_clear().env("HOME", &home).env("PATH", "/usr/bin:/bin").current_dir(&home);
        command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.inside(&mut command)
    }

    pub fn laptop_dir(&self) -> PathBuf {
        self.dir.join("laptop")
    }

    pub fn laptop_json(&self, words: &[&str]) -> Result<serde_json::Value> {
        let mut all = words.to_vec();
        all.push("--json");
        serde_json::from_str(&self.laptop(&all)?)
            .with_context(|| format!("the answer to {}", words.join(" ")))
    }

    /// One GET from the LAN: the body.
    pub fn http(&self, address: Ipv4Addr, port: u16, path: &str) -> Result<String> {
        let path = path.to_string();
        let inside = netns::in_netns(&self.lan.netns, move || {
            let mut stream = TcpStream::connect_timeout(&SocketAddr::from((address, port)), HTTP_LIMIT)?;
            stream.set_read_timeout(Some(HTTP_LIMIT))?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        });
        let text = inside.with_context(|| format!("GET http://{address}:{port}"))?;
        Ok(text.split_once("\r\n\r\n").map(|(_, body)| body.to_string()).unwrap_or_default())
    }

    /// Serves files below `target/images` to the LAN on port 8000, until the field's end.
    pub fn serve_images(&mut self) -> Result<()> {
        let address = SocketAddr::from((self.address(254), 8000));
        let listener = netns::in_netns(&self.lan.netns, move || std::net::TcpListener::bind(address))?;
        // A thread that waits for clients ends with the process.
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                // A client that went away asks again.
                let _ = serve_file(&mut stream);
            }
        });
        Ok(())
    }

    pub fn log_tails(&self) -> String {
        self.guests.iter().map(Guest::log_tail).collect()
    }
}

impl Drop for Field {
    fn drop(&mut self) {
        for guest in &mut self.guests {
            guest.kill();
        }
        self.stop_dhcp();
        let keep = std::env::var_os("TINYDC_GUEST_KEEP").is_some();
        if !keep && let Err(error) = sweep(&self.dir) {
            eprintln!("warning: {} was not taken away whole: {error:#}", self.dir.display());
        }
    }
}

fn serve_file(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut line = String::new();
    let mut reader = std::io::BufReader::new(stream.try_clone()?);
    std::io::BufRead::read_line(&mut reader, &mut line)?;
    let name = line.split(' ').nth(1).and_then(|path| path.rsplit('/').next()).unwrap_or_default();
    let mut file = fs::File::open(Path::new("target/images").join(name))?;
    let length = file.metadata()?.len();
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")?;
    std::io::copy(&mut file, stream).map(drop)
}

/// Takes away what an earlier run left: processes that name the folder, the namespace, the files.
fn sweep(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let needle = dir.display().to_string();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        let is_ours = line.starts_with("qemu-system") || line.starts_with("/usr/sbin/dnsmasq");
        if is_ours && line.contains(&needle) {
            // Gone already is what is wanted.
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
    netns::remove(&dir.join("netns/lan")).context("remove the LAN's namespace")?;
    fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))
}

/// Asks five times a second: a guest shares its processor with what asks it.
pub fn until(what: &str, limit: Duration, is_true: impl FnMut() -> Result<bool>) -> Result<()> {
    lab::until(what, limit, Duration::from_millis(200), is_true)
}
