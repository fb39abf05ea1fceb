//! One guest: its disk, its run, its serial line, its plug and its buttons.

use crate::field::until;
use crate::image;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tinydc::linux::netns;

const LOG_LINES: usize = 40;
/// A prompt that has said nothing for this long waits for a line.
const QUIET: Duration = Duration::from_millis(1500);
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
pub const START_LIMIT: Duration = Duration::from_secs(120);

pub struct Setup {
    pub board: &'static str,
    pub memory_mib: u32,
    pub disk_mib: u64,
    /// What a person writes into `tinydc.toml`.
    pub settings: String,
    /// Words for QEMU and for the kernel.
    pub machine_words: Vec<String>,
    pub kernel_words: String,
    /// What the kernel unpacks after the board's initramfs.
    pub more_initramfs: Vec<u8>,
}

impl Setup {
    pub fn new(settings: &str) -> Setup {
        Setup {
            board: "qemu-x86_64",
            memory_mib: 256,
            disk_mib: 1024,
            settings: settings.into(),
            machine_words: Vec::new(),
            kernel_words: String::new(),
            more_initramfs: Vec::new(),
        }
    }
}

pub struct Guest {
    pub number: u8,
    pub disk: PathBuf,
    dir: PathBuf,
    setup: Setup,
    qemu: Option<Child>,
    /// The other end of the serial line. Somebody must read it: QEMU holds the guest's output back otherwise.
    serial: Option<UnixStream>,
    /// How much of the log was read by earlier waits.
    seen: usize,
    /// Where the log of this run begins.
    begin: usize,
    plugged_in: Instant,
}

/// Text without the sequences that colour it on a terminal.
fn without_colours(text: &str) -> String {
    let mut plain = String::new();
    let mut parts = text.split("\x1b[");
    plain += parts.next().unwrap_or_default();
    for part in parts {
        plain += part.split_once('m').map_or("", |(_, rest)| rest);
    }
    plain
}

pub fn hardware(number: u8) -> String {
    format!("52:54:00:00:97:{number:02x}")
}

impl Guest {
    /// Its disk: the board's image on a card of its own size, with `tinydc.toml` as a person left it.
    pub fn new(dir: &Path, number: u8, setup: Setup) -> Result<Guest> {
        let dir = dir.join(format!("guest{number}"));
        fs::create_dir_all(&dir)?;
        let disk = dir.join("disk.img");
        let base = image::of_board(setup.board);
        let copied = Command::new("cp").arg("--sparse=always").arg(&base).arg(&disk).status()?;
        ensure!(copied.success(), "copy {}; images/build {} --plain makes it", base.display(), setup.board);
        fs::File::options().write(true).open(&disk)?.set_len(setup.disk_mib << 20)?;
        if !setup.settings.is_empty() {
            image::write_file(&disk, 1, "tinydc.toml", &setup.settings)?;
        }
        Ok(Guest {
            number,
            disk,
            dir,
            setup,
            qemu: None,
            serial: None,
            seen: 0,
            begin: 0,
            plugged_in: Instant::now(),
        })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn write_settings(&mut self, text: &str) -> Result<()> {
        ensure!(self.qemu.is_none(), "a card is edited while its board is off");
        image::write_file(&self.disk, 1, "tinydc.toml", text)
    }

    pub fn settings(&self) -> Result<String> {
        image::read_file(&self.disk, 1, "tinydc.toml")
    }

    pub fn set_machine_words(&mut self, words: &[&str]) {
        self.setup.machine_words = words.iter().map(|word| word.to_string()).collect();
    }

    pub fn set_memory(&mut self, mib: u32) {
        self.setup.memory_mib = mib;
    }

    /// Of the next starts: more words for the kernel, and an archive that it unpacks last.
    pub fn set_kernel(&mut self, words: &str, more_initramfs: Vec<u8>) {
        self.setup.kernel_words = words.into();
        self.setup.more_initramfs = more_initramfs;
    }

    /// How long this run is.
    pub fn since_plug(&self) -> Duration {
        self.plugged_in.elapsed()
    }

    /// Where the log of this run begins.
    pub fn log_start(&self) -> usize {
        self.begin
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("serial.log")
    }

    pub fn start(&mut self, netns_path: &Path) -> Result<()> {
        self.begin = self.log().len();
        self.seen = self.begin;
        // The console of a Raspberry Pi is its second serial line.
        let lines = if self.setup.board == "rpi3" { ["daemon", "serial"] } else { ["serial", "daemon"] };
        let mut command = match self.setup.board {
            "pc-x86_64" => self.pc()?,
            _ => self.with_kernel()?,
        };
        command.args(["-display", "none", "-nodefaults", "-no-reboot"]);
        command.args(["-netdev", &format!("tap,id=net,ifname=tap{},script=no,downscript=no", self.number)]);
        let serial = format!(
            "socket,id=serial,path={},server=on,wait=off,logfile={},logappend=on",
            self.dir.join("serial.sock").display(),
            self.log_path().display()
        );
        let daemon = format!("file,id=daemon,path={},append=on", self.dir.join("daemon.log").display());
        command.args(["-chardev", &serial, "-chardev", &daemon]);
        for line in lines {
            command.args(["-serial", &format!("chardev:{line}")]);
        }
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", self.dir.join("qmp.sock").display())]);
        command.args(&self.setup.machine_words);
        let log = fs::File::create(self.dir.join("qemu.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = netns::in_netns(netns_path, || command.spawn()).context("start QEMU")?;
        self.qemu = Some(child);
        self.plugged_in = Instant::now();
        let path = self.dir.join("serial.sock");
        let mut serial = None;
        until("QEMU opens the serial line", Duration::from_secs(10), || {
            serial = Some(UnixStream::connect(&path)?);
            Ok(true)
        })?;
        let serial = serial.context("the serial line is open")?;
        let mut reader = serial.try_clone()?;
        // Ends with QEMU. What it reads is in the log already.
        std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
        self.serial = Some(serial);
        Ok(())
    }

    /// What takes the place of the firmware: the slot's kernel and initramfs are handed to QEMU.
    fn with_kernel(&self) -> Result<Command> {
        let slot = image::slot_of(&self.disk, &self.dir)?;
        if !self.setup.more_initramfs.is_empty() {
            let mut whole = fs::read(&slot.initramfs)?;
            whole.resize(whole.len().next_multiple_of(4), 0);
            whole.extend_from_slice(&self.setup.more_initramfs);
            fs::write(&slot.initramfs, whole)?;
        }
        let (mut command, log) = match self.setup.board {
            "rpi3" => (self.raspberry_pi_3(), "ttyAMA0"),
            board => (self.virtual_machine(board.contains("aarch64")), "ttyS1"),
        };
        command.arg("-kernel").arg(&slot.kernel).arg("-initrd").arg(&slot.initramfs);
        if let Some(device_tree) = &slot.device_tree {
            command.arg("-dtb").arg(device_tree);
        }
        let words = format!("{} tinydc.log={log} {}", slot.command_line, self.setup.kernel_words);
        command.args(["-append", &words]);
        Ok(command)
    }

    /// A PC with its firmware, which finds by itself what is to be started. Disk and network chip are common ones.
    fn pc(&self) -> Result<Command> {
        const FIRMWARE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
        const VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
        let variables = self.dir.join("variables.fd");
        if !variables.exists() {
            fs::copy(VARIABLES, &variables).with_context(|| format!("copy {VARIABLES}; install ovmf"))?;
        }
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", "q35", "-cpu", "max", "-smp", "1", "-accel", "tcg,thread=multi"]);
        command.args(["-m", &self.setup.memory_mib.to_string()]);
        command.args(["-drive", &format!("if=pflash,format=raw,readonly=on,file={FIRMWARE}")]);
        command.args(["-drive", &format!("if=pflash,format=raw,file={}", variables.display())]);
        let drive = format!("file={},if=none,id=card,format=raw,cache=writeback", self.disk.display());
        command.args(["-drive", &drive, "-device", "ide-hd,drive=card,bus=ide.0"]);
        command
            .args(["-device", &format!("e1000e,netdev=net,id=nic,mac={},romfile=", hardware(self.number))]);
        Ok(command)
    }

    /// QEMU's own machines, with virtio.
    fn virtual_machine(&self, is_arm: bool) -> Command {
        let mut command = Command::new(if is_arm { "qemu-system-aarch64" } else { "qemu-system-x86_64" });
        let machine = if is_arm { ["virt", "cortex-a72"] } else { ["q35", "max"] };
        command.args(["-M", machine[0], "-cpu", machine[1], "-smp", "1", "-accel", "tcg,thread=multi"]);
        command.args(["-m", &self.setup.memory_mib.to_string()]);
        let has_drive = self.setup.machine_words.iter().any(|word| word.contains("node-name=card"));
        if !has_drive {
            let drive = format!("file={},if=none,id=card,format=raw,cache=writeback", self.disk.display());
            command.args(["-drive", &drive]);
        }
        // A request that was merged has one piece more than QEMU's log of writes can take.
        command.args(["-device", "virtio-blk-pci,drive=card,request-merging=off"]);
        let hardware = hardware(self.number);
        command.args(["-device", &format!("virtio-net-pci,netdev=net,id=nic,mac={hardware},romfile=")]);
        command.args(["-device", "i6300esb", "-action", "watchdog=reset"]);
        command
    }

    /// Its processors and its memory are given; its card has a size that is a power of two. Its own network chip is not
    /// emulated: another one on the same bus stands for it.
    fn raspberry_pi_3(&self) -> Command {
        let mut command = Command::new("qemu-system-aarch64");
        // Its four processors take turns: those that wait for the first would keep four of ours busy.
        command.args(["-M", "raspi3b", "-accel", "tcg,thread=single"]);
        let drive = format!("file={},if=sd,format=raw,cache=writeback", self.disk.display());
        command.args(["-drive", &drive]);
        command.args(["-device", &format!("usb-net,netdev=net,id=nic,mac={}", hardware(self.number))]);
        command
    }

    fn type_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let serial = self.serial.as_mut().context("the guest is on")?;
        serial.write_all(bytes).context("type on the serial line")
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// Waits for a text on the serial line, after what was waited for before. Returns its line.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<String> {
        let what = format!("guest {} says {text:?}", self.number);
        let mut found = None;
        until(&what, limit, || {
            if let Some(status) = self.qemu.as_mut().and_then(|qemu| qemu.try_wait().ok().flatten()) {
                // What it said last may just have been written.
                if !self.log()[self.seen.min(self.log().len())..].contains(text) {
                    bail!("QEMU has ended: {status}");
                }
            }
            let log = self.log();
            let rest = log.get(self.seen..).unwrap_or_default();
            let Some(at) = rest.find(text) else { return Ok(false) };
            let line_start = rest[..at].rfind('\n').map_or(0, |index| index + 1);
            let line_end = rest[at..].find('\n').map(|index| at + index);
            let Some(line_end) = line_end else { return Ok(false) };
            found = Some(rest[line_start..line_end].trim().to_string());
            self.seen += line_end;
            Ok(true)
        })?;
        found.context("a line was found")
    }

    /// Waits for a text anywhere in what was said since the start. Returns its line.
    pub fn wait_said(&mut self, text: &str, limit: Duration) -> Result<String> {
        let seen = std::mem::replace(&mut self.seen, self.begin);
        let line = self.wait_for(text, limit);
        self.seen = self.seen.max(seen);
        line
    }

    pub fn wait_ready(&mut self) -> Result<String> {
        self.wait_said(" ready ", START_LIMIT)
    }

    /// Types a line at the board's prompt; what was printed until the next prompt.
    pub fn type_line(&mut self, name: &str, line: &str) -> Result<String> {
        let prompt = format!("{name}> ");
        // A fresh prompt, so that what follows is the answer to this line alone. Not by Enter, which founds a cluster.
        let before = self.log().len();
        self.type_bytes(b"version\n")?;
        // The screen may be drawn meanwhile, for the prompt's start: a prompt counts that comes after the answer.
        let (mut length, mut since) = (0, Instant::now());
        until("the prompt answers", COMMAND_LIMIT, || {
            let log = self.log();
            if log.len() != length {
                (length, since) = (log.len(), Instant::now());
            }
            // As only the verb writes it.
            let answered = log[before..].split_once(concat!("tinydc ", env!("CARGO_PKG_VERSION"), " ("));
            Ok(answered.is_some_and(|(_, rest)| rest.contains(&prompt)) && since.elapsed() > QUIET)
        })?;
        let begin = self.log().len();
        self.type_bytes(format!("{line}\n").as_bytes())?;
        until(&format!("{line:?} is done"), COMMAND_LIMIT, || Ok(self.log()[begin..].contains(&prompt)))?;
        let said = self.log()[begin..].to_string();
        let said = said.split(&prompt).next().unwrap_or_default();
        // The first line is what was typed.
        Ok(without_colours(&said.lines().skip(1).collect::<Vec<_>>().join("\n")))
    }

    /// Waits until the board is a member of a cluster: a founder first looks for one of its name. What is told of it.
    pub fn wait_member(&mut self, name: &str) -> Result<String> {
        let mut told = String::new();
        until(&format!("{name} is a member of a cluster"), COMMAND_LIMIT, || {
            told = self.type_line(name, &format!("node inspect {name}"))?;
            Ok(told.contains("last heard"))
        })?;
        Ok(told)
    }

    /// Types a line that ends the prompt.
    pub fn type_last(&mut self, line: &str) -> Result<()> {
        self.type_bytes(format!("{line}\n").as_bytes())
    }

    /// One command of QEMU's machine protocol.
    pub fn qmp(&self, command: &str, arguments: Value) -> Result<Value> {
        let stream = UnixStream::connect(self.dir.join("qmp.sock")).context("connect to QMP")?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut writer = stream.try_clone()?;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        for (name, arguments) in [("qmp_capabilities", json!({})), (command, arguments)] {
            writeln!(writer, "{}", json!({ "execute": name, "arguments": arguments }))?;
            loop {
                line.clear();
                ensure!(reader.read_line(&mut line)? > 0, "QMP was closed");
                let answer: Value = serde_json::from_str(&line)?;
                if let Some(error) = answer.get("error") {
                    bail!("{name}: {error}");
                }
                if let Some(value) = answer.get("return") {
                    if name == command {
                        return Ok(value.clone());
                    }
                    break;
                }
            }
        }
        bail!("no answer to {command}")
    }

    /// Waits until the machine has switched itself off or, with `-no-reboot`, restarted.
    pub fn wait_off(&mut self, limit: Duration) -> Result<()> {
        let Some(qemu) = &mut self.qemu else { return Ok(()) };
        let what = format!("guest {} is off", self.number);
        until(&what, limit, || Ok(qemu.try_wait()?.is_some()))?;
        self.qemu = None;
        Ok(())
    }

    /// The same, to the millisecond; how long the run was.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<Duration> {
        let qemu = self.qemu.as_mut().context("the guest is on")?;
        while qemu.try_wait()?.is_none() {
            ensure!(self.plugged_in.elapsed() < limit, "guest {} is still on", self.number);
            std::thread::sleep(Duration::from_millis(2));
        }
        self.qemu = None;
        Ok(self.plugged_in.elapsed())
    }

    /// Pulls the plug.
    pub fn kill(&mut self) {
        if let Some(mut qemu) = self.qemu.take() {
            // Gone already is what is wanted.
            let _ = qemu.kill();
            let _ = qemu.wait();
        }
    }

    pub fn is_on(&self) -> bool {
        self.qemu.is_some()
    }

    /// Of the emulator itself, in MiB.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let mut text = format!("  | serial line of guest {} ends:\n", self.number);
        for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
            text += &format!("  |   {}\n", line.trim_end());
        }
        let daemon = fs::read(self.dir.join("daemon.log")).unwrap_or_default();
        let daemon = String::from_utf8_lossy(&daemon).into_owned();
        let lines: Vec<&str> = daemon.lines().collect();
        text += "  | its daemon's log ends:\n";
        for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
            text += &format!("  |   {}\n", line.trim_end());
        }
        let qemu = fs::read_to_string(self.dir.join("qemu.log")).unwrap_or_default();
        if !qemu.trim().is_empty() {
            text += &format!("  | QEMU: {}\n", qemu.trim());
        }
        text
    }
}
