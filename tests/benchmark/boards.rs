//! A board as a guest of QEMU: how long it takes to be a node, what memory it leaves, what its disk gets when nothing
//! happens, and of what its image is made.

use crate::Row;
use crate::field::{Field, until};
use crate::guest::{Guest, START_LIMIT, Setup};
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const BOARD: &str = "qemu-x86_64";
/// Of the measurements here; those of tests have others.
const LANE: usize = 9;
const STARTS: usize = 5;
const SETTLED: Duration = Duration::from_secs(30);
const IDLE: Duration = Duration::from_secs(60);
const MIB: f64 = 1024.0 * 1024.0;

/// Switches the machine off and does nothing else: reboot(2) with its two magic numbers and POWER_OFF.
const BARE_INIT: &str = "\
.globl _start
_start: mov $0xfee1dead, %edi
 mov $672274793, %esi
 mov $0x4321fedc, %edx
 mov $169, %eax
 syscall
";

/// A container that reserves nothing is given 64 MiB, of which a board of 256 has room for one.
const APP: &str = "\
services:
  web:
    image: hello:1
    stop_grace_period: 1s
    deploy:
      replicas: 3
      resources: {reservations: {memory: 16M}}
";

pub fn boards() -> Result<Vec<Row>> {
    let mut rows = image_parts()?;
    let mut field = Field::new(LANE)?;
    field.serve_dhcp(10, 3600)?;
    field.add(Setup::new("name = \"pi1\"\nbootstrap = true\n"))?;
    let measured = measure(&mut field);
    if measured.is_err() {
        eprint!("{}", field.log_tails());
    }
    rows.extend(measured?);
    Ok(rows)
}

/// Makes the image as README says, and reads what its builder tells of it.
fn image_parts() -> Result<Vec<Row>> {
    let output = Command::new("images/build").args([BOARD, "--plain"]).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "images/build {BOARD}: {}", output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    let mut rows = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some(unit) = words.iter().position(|word| *word == "MiB") else { continue };
        let Some(value) = unit.checked_sub(1).and_then(|at| words[at].parse().ok()) else { continue };
        let part = words[..unit - 1].join(" ");
        let row = Row::new(format!("image {BOARD}: {part}"), value, "MiB");
        rows.push(if part == "compressed" { row.within(64.0) } else { row });
    }
    ensure!(rows.len() > 3, "images/build names the parts of the image: {text}");
    Ok(rows)
}

fn measure(field: &mut Field) -> Result<Vec<Row>> {
    field.start(0)?;
    field.guests[0].wait_ready()?;
    let mut token = String::new();
    until("the board gives a token for a laptop", Duration::from_secs(60), || {
        let said = field.guests[0].type_line("pi1", "token --user ada")?;
        let word = said.split_whitespace().find(|word| word.starts_with("tdc-user-"));
        token = word.context("a token")?.into();
        Ok(true)
    })?;
    field.laptop(&["context", "create", "home", &token])?;

    std::thread::sleep(SETTLED);
    let idle_256 = memory_left(field)?;
    let before = written(&field.guests[0])?;
    std::thread::sleep(IDLE);
    let idle_bytes = written(&field.guests[0])? - before;

    load_hello(field)?;
    fs::write(field.laptop_dir().join("compose.yaml"), APP)?;
    field.laptop(&["deploy", "--name", "shop", "--timeout", "120s"])?;
    let after = written(&field.guests[0])? - before;
    ensure!(after > 0, "the meter shows nothing for an image and a deploy either");
    std::thread::sleep(SETTLED);
    let status = field.laptop_json(&["status"])?;
    ensure!(status["services"][0]["running"] == 3, "three containers run: {status}");
    let full_256 = memory_left(field)?;
    field.laptop(&["rm", "shop", "--yes"])?;
    switch_off(field)?;

    field.guests[0].set_memory(512);
    field.start(0)?;
    field.guests[0].wait_ready()?;
    std::thread::sleep(SETTLED);
    let idle_512 = memory_left(field)?;
    switch_off(field)?;

    field.guests[0].set_memory(256);
    let bare = bare_initramfs(&field.dir)?;
    let (mut ready, mut off) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        off.push(bare_start(field, &bare)?);
        ready.push(start(field)?);
        switch_off(field)?;
    }
    let (ready, off) = (median(&mut ready), median(&mut off));
    Ok(vec![
        Row::new("board: plug → node ready", ready, "s").beside(Some(("bare init", off))),
        Row::new("board: the same, of a bare init's time", ready / off, "×").within(1.5),
        Row::new("board: memory left of 512 MiB, node idle", idle_512, "MiB"),
        Row::new("board: memory left of 256 MiB, node idle", idle_256, "MiB"),
        Row::new("board: the same with three containers", full_256, "MiB"),
        Row::new("board: bytes its disk got in an idle minute", idle_bytes as f64, "B").within(0.0),
    ])
}

fn median(all: &mut [f64]) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

fn load_hello(field: &Field) -> Result<()> {
    let binary = "target/cross/x86_64/x86_64-unknown-linux-musl/dist/tinydc";
    let binary = std::env::var_os("TINYDC_BINARY").map_or(binary.into(), PathBuf::from);
    let words = ["/tinydc".to_string(), "hello".to_string()];
    let image = tinydc::cli::lab::image_of("hello:1", &binary, &words, &[])?;
    fs::write(field.laptop_dir().join("hello.tar"), image)?;
    field.laptop(&["image", "load", "hello.tar"]).map(drop)
}

fn memory_left(field: &Field) -> Result<f64> {
    let mut bytes = None;
    until("the node tells its memory", Duration::from_secs(30), || {
        bytes = field.laptop_json(&["node", "inspect", "pi1"])?["memory_available_bytes"].as_f64();
        Ok(bytes.is_some())
    })?;
    Ok(bytes.context("the node tells its memory")? / MIB)
}

fn written(guest: &Guest) -> Result<u64> {
    let told = guest.qmp("query-blockstats", json!({}))?;
    let drives = told.as_array().context("QEMU tells of its drives")?;
    let bytes = drives.iter().filter_map(|drive| drive["stats"]["wr_bytes"].as_u64()).max();
    bytes.context("QEMU counts what a drive got")
}

fn switch_off(field: &mut Field) -> Result<()> {
    let guest = &mut field.guests[0];
    guest.qmp("system_powerdown", json!({}))?;
    guest.wait_off(Duration::from_secs(60))
}

/// Seconds from the plug until the board's daemon answers.
fn start(field: &mut Field) -> Result<f64> {
    field.start(0)?;
    let guest = &mut field.guests[0];
    let begin = Instant::now();
    let from = guest.log_start();
    while !guest.log()[from..].contains("] ready ") {
        if begin.elapsed() > START_LIMIT {
            bail!("the board isn't ready after {} s", START_LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(guest.since_plug().as_secs_f64())
}

/// Seconds from the plug until a machine that does nothing is off: its kernel and all that the board's boot files hold.
fn bare_start(field: &mut Field, bare: &[u8]) -> Result<f64> {
    let guest = &mut field.guests[0];
    guest.set_kernel("rdinit=/bare", bare.to_vec());
    field.start(0)?;
    let guest = &mut field.guests[0];
    let seconds = guest.wait_exit(START_LIMIT)?.as_secs_f64();
    guest.set_kernel("", Vec::new());
    Ok(seconds)
}

/// An archive that the kernel unpacks after the board's own: one file, `/bare`.
fn bare_initramfs(dir: &Path) -> Result<Vec<u8>> {
    let (source, program) = (dir.join("bare.s"), dir.join("bare"));
    fs::write(&source, BARE_INIT)?;
    let made = Command::new("cc").args(["-static", "-nostdlib", "-o"]).arg(&program).arg(&source).output();
    let made = made.context("run cc")?;
    ensure!(made.status.success(), "cc: {}", String::from_utf8_lossy(&made.stderr));
    let mut archive = Vec::new();
    for (name, mode, content) in [("bare", 0o100_755, fs::read(&program)?), ("TRAILER!!!", 0, Vec::new())] {
        // ino, mode, uid, gid, nlink, mtime, filesize, major, minor, rmajor, rminor, namesize, check
        let fields = [1, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend_from_slice(b"070701");
        fields.iter().for_each(|field| archive.extend_from_slice(format!("{field:08X}").as_bytes()));
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(&content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    Ok(archive)
}
