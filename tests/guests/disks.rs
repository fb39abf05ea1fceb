//! Disks beside the card: data on one, and one that is absent, plugged in, pulled and plugged in again.

use crate::Case;
use crate::cluster::{give_laptop_a_context, load_hello};
use crate::field::{Field, until};
use crate::guest::{START_LIMIT, Setup};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[
    Case {
        name: "disk-pulled",
        proves: "a disk that is absent at the start is named in status and keeps only the service that binds it from \
                 running; plugged in it runs, pulled it is stopped and nothing is written to memory in its place, and \
                 plugged in again it goes on with its data",
        run: disk_pulled,
    },
    Case {
        name: "data-disk",
        proves: "an ext4 disk labelled tinydc-data is preferred to the card's data partition; without it the card's is \
                 taken",
        run: data_disk,
    },
];

const LIMIT: Duration = Duration::from_secs(60);

/// `plain` binds the folder above, which the disk's absence does not concern.
const APP: &str = "\
services:
  films:
    image: hello:1
    entrypoint: [\"/tinydc\"]
    command: [\"hello\", \"--keep\", \"/data/visits\"]
    volumes: [\"/mnt/media:/data\"]
    deploy: {resources: {reservations: {memory: 8M}}}
  plain:
    image: hello:1
    volumes: [\"/mnt:/mnt\"]
    deploy: {resources: {reservations: {memory: 8M}}}
";

fn make_disk(path: &Path, label: &str) -> Result<()> {
    let mut command = Command::new("/usr/sbin/mke2fs");
    let status = command.args(["-q", "-t", "ext4", "-L", label]).arg(path).arg("64M").status();
    ensure!(status.context("run mke2fs")?.success(), "make {}", path.display());
    Ok(())
}

/// A port that a disk can be plugged into, and the disk's file, that no device uses yet.
fn words(disk: &Path) -> Vec<String> {
    let port = "pcie-root-port,id=port1,chassis=1".to_string();
    let node = format!("driver=raw,node-name=extra,file.driver=file,file.filename={}", disk.display());
    vec!["-device".into(), port, "-blockdev".into(), node]
}

fn plug(field: &Field) -> Result<()> {
    let device = json!({ "driver": "virtio-blk-pci", "drive": "extra", "id": "plug", "bus": "port1" });
    field.guests[0].qmp("device_add", device).map(drop)
}

fn pull(field: &Field) -> Result<()> {
    field.guests[0].qmp("device_del", json!({ "id": "plug" }))?;
    until("the machine lets go of the disk", LIMIT, || {
        let listed = field.guests[0].qmp("qom-list", json!({ "path": "/machine/peripheral" }))?;
        let named = |one: &Value| one["name"] == "plug";
        Ok(!listed.as_array().context("a list")?.iter().any(named))
    })
}

/// The one instance of a service.
fn instance(field: &Field, service: &str) -> Result<Value> {
    let status = field.laptop_json(&["status"])?;
    let services = status["services"].as_array().context("services")?;
    let found = services.iter().find(|one| one["name"] == service).context("the service")?;
    Ok(found["instances"][0].clone())
}

fn await_phase(field: &Field, service: &str, phase: &str) -> Result<Value> {
    let mut found = Value::Null;
    let came = until(&format!("{service} is {phase}"), LIMIT, || {
        found = instance(field, service)?;
        Ok(found["phase"] == phase)
    });
    came.with_context(|| format!("it is: {found}"))?;
    Ok(found)
}

/// What people are told while the disk is absent.
fn check_told(field: &Field) -> Result<()> {
    let status = field.laptop(&["status"])?;
    ensure!(status.contains("pi1: disk media (/mnt/media) is absent: plug it in"), "{status}");
    let node = field.laptop(&["node", "inspect", "pi1"])?;
    ensure!(node.contains("disk media (/mnt/media) is absent: plug it in"), "{node}");
    let node = field.laptop_json(&["node", "inspect", "pi1"])?;
    ensure!(
        node["disks"] == json!([{"label": "media", "mount_point": "/mnt/media", "is_absent": true}]),
        "{node}"
    );
    let ps = field.laptop(&["ps", "cinema"])?;
    ensure!(ps.contains("disk media (/mnt/media) is absent on pi1"), "{ps}");
    Ok(())
}

fn await_event(field: &Field, text: &str) -> Result<()> {
    until(&format!("the event {text:?}"), LIMIT, || Ok(field.laptop(&["events"])?.contains(text)))
}

fn start(field: &mut Field, disk: &Path) -> Result<()> {
    field.serve_dhcp(10, 3600)?;
    let settings = "name = \"pi1\"\nbootstrap = true\ndisks = [\"LABEL=media:/mnt/media\"]\n";
    let setup = Setup { machine_words: words(disk), ..Setup::new(settings) };
    field.add(setup)?;
    field.start(0)?;
    field.guests[0].wait_said("disk media (/mnt/media) is absent", START_LIMIT)?;
    field.guests[0].wait_ready()?;
    field.guests[0].wait_said("eth0: address", Duration::from_secs(20))?;
    // A founder first looks for a cluster of its name.
    until("the cluster is founded", LIMIT, || Ok(give_laptop_a_context(field, 0, "pi1").is_ok()))?;
    load_hello(field)
}

fn disk_pulled(field: &mut Field) -> Result<()> {
    let disk = field.dir.join("media.img");
    make_disk(&disk, "media")?;
    start(field, &disk)?;
    fs::write(field.laptop_dir().join("compose.yaml"), APP)?;
    let refused = field.laptop(&["deploy", "--name", "cinema", "--timeout", "20s"]);
    let told = refused.err().context("deploy waits for the disk")?;
    ensure!(format!("{told:#}").contains("disk media (/mnt/media) is absent on pi1"), "{told:#}");
    let plain = await_phase(field, "plain", "running")?;
    ensure!(instance(field, "films")?["phase"] == "pending", "it is placed nowhere");
    check_told(field)?;
    await_event(field, "disk media (/mnt/media) is absent")?;
    // Its mount point takes no writes meanwhile, from whomever.
    until("a write to it is refused", LIMIT, || {
        let written = field.laptop(&["exec", "cinema/plain", "/tinydc", "hello", "--keep", "/mnt/media/x"]);
        let why = written.unwrap_or_else(|error| format!("{error:#}"));
        // A guest shares its processor with much else, and may not answer in time.
        ensure!(why.contains("Read-only file system") || why.contains("answers"), "{why}");
        Ok(why.contains("Read-only file system"))
    })?;

    let begin = Instant::now();
    plug(field)?;
    await_phase(field, "films", "running")?;
    field.note("plugged in → the service that binds it runs", begin);
    await_event(field, "disk media (/mnt/media) is back")?;

    let begin = Instant::now();
    pull(field)?;
    field.note("pulled", begin);
    field.guests[0].wait_said("disk media (/mnt/media) is gone", LIMIT)?;
    let lost = await_phase(field, "films", "lost")?;
    field.note("pulled → it is stopped", begin);
    ensure!(lost["node"] == "pi1" && lost["pid"] == Value::Null, "it waits where its data is: {lost}");
    check_told(field)?;
    let still = instance(field, "plain")?;
    ensure!(still["pid"] == plain["pid"] && still["phase"] == "running", "its neighbour runs on: {still}");
    std::thread::sleep(Duration::from_secs(5));
    ensure!(instance(field, "films")?["phase"] == "lost", "it stays stopped");

    let begin = Instant::now();
    plug(field)?;
    await_phase(field, "films", "running")?;
    field.note("plugged in again → it runs again", begin);
    // The node acts before the state has been told.
    until("status tells of no absent disk", LIMIT, || Ok(!field.laptop(&["status"])?.contains("is absent")))?;
    ensure!(instance(field, "plain")?["pid"] == plain["pid"], "its neighbour ran through it all");

    field.guests[0].type_last("poweroff")?;
    field.guests[0].wait_off(Duration::from_secs(60))?;
    let read = Command::new("/usr/sbin/debugfs").args(["-R", "cat /visits"]).arg(&disk).output()?;
    let visits = String::from_utf8_lossy(&read.stdout).lines().count();
    ensure!(visits == 2, "both runs wrote to the disk: {visits} lines");
    let checked = Command::new("/usr/sbin/e2fsck").args(["-n", "-f"]).arg(&disk).output()?;
    ensure!(checked.status.success(), "it was unmounted: {}", String::from_utf8_lossy(&checked.stdout));
    Ok(())
}

fn data_disk(field: &mut Field) -> Result<()> {
    field.serve_dhcp(10, 3600)?;
    let disk = field.dir.join("data.img");
    make_disk(&disk, "tinydc-data")?;
    let drive = format!("file={},if=none,id=data,format=raw", disk.display());
    let words = ["-drive", &drive, "-device", "virtio-blk-pci,drive=data"];
    let index = field.add(Setup::new("name = \"pi1\"\n"))?;
    // The first start on a disk founds a cluster there; the label tells on which disk that was.
    let mut boot = |words: &[&str], label: &str| -> Result<(String, String)> {
        field.guests[index].set_machine_words(words);
        field.start(index)?;
        let guest = &mut field.guests[index];
        let data = guest.wait_said(" data ", START_LIMIT)?;
        guest.wait_ready()?;
        guest.wait_said("eth0: address", Duration::from_secs(20))?;
        if !label.is_empty() {
            guest.type_line("pi1", "init")?;
        }
        let node = guest.wait_member("pi1")?;
        if !label.is_empty() {
            guest.type_line("pi1", &format!("node label pi1 lies={label}"))?;
        }
        guest.type_last("poweroff")?;
        guest.wait_off(Duration::from_secs(60))?;
        Ok((data, node))
    };
    let with = boot(&words, "disk")?;
    ensure!(with.0.contains("(tinydc-data)"), "{}", with.0);
    let without = boot(&[], "card")?;
    ensure!(without.0.contains("(tinydc)") && !without.1.contains("lies="), "{without:?}");
    let again = boot(&words, "")?;
    ensure!(again.0.contains("(tinydc-data)") && again.1.contains("lies=disk"), "{again:?}");
    field.remark(with.0);
    field.remark(without.0);
    Ok(())
}
