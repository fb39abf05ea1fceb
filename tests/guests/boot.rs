//! One board: from a flashed card to a node, and its orderly end.

use crate::Case;
use crate::field::Field;
use crate::guest::{START_LIMIT, Setup};
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[
    Case {
        name: "first-boot",
        proves: "a flashed card becomes a node: its partition grows, a cluster is founded at the prompt, and the board \
                 comes back after each orderly end",
        run: first_boot,
    },
    Case {
        name: "wrong-settings",
        proves: "a wrong tinydc.toml is told with its line, and the board comes up with defaults",
        run: wrong_settings,
    },
    Case {
        name: "aarch64",
        proves: "the same on a board with an ARM processor, under the kernel of the Raspberry Pis",
        run: aarch64,
    },
    Case {
        name: "raspi3b",
        proves: "the card of a Raspberry Pi 3 starts on QEMU's Raspberry Pi 3, with its own kernel, device tree and console: \
                 data from the card, an address by a network chip on USB, a cluster founded at the prompt",
        run: raspi3b,
    },
    Case {
        name: "pc",
        proves: "a PC starts by its own firmware, UEFI, from the image as it is: data from a SATA disk, an address by its \
                 network chip, a cluster that is there again at the next start",
        run: pc,
    },
    Case {
        name: "no-data",
        proves: "a card without a data partition gives a board that runs in memory and says so, on the network too",
        run: no_data,
    },
];

fn first_boot(field: &mut Field) -> Result<()> {
    field.serve_dhcp(10, 3600)?;
    let index = field.add(Setup::new("name = \"pi1\"\n"))?;
    let begin = Instant::now();
    field.start(index)?;
    let guest = &mut field.guests[index];
    let data = guest.wait_said(" data ", START_LIMIT)?;
    ensure!(data.contains("partition grown to") && data.contains("file system grown to"), "{data}");
    let ready = guest.wait_ready()?;
    guest.wait_said("eth0: address 10.97.0.11/24", Duration::from_secs(20))?;
    field.remark(data);
    field.remark(ready);
    field.note("from the plug to a node that answers", begin);
    let guest = &mut field.guests[index];
    let screen = guest.type_line("pi1", "join")?;
    ensure!(screen.contains("belongs to no cluster") && screen.contains("tinydc node accept"), "{screen}");
    let founded = guest.type_line("pi1", "init")?;
    ensure!(founded.contains("tinydc join tdc-join-"), "{founded}");
    let report = guest.type_line("pi1", "report")?;
    ensure!(!report.contains("FAILED") && !report.contains("problem:"), "{report}");
    let nodes = guest.type_line("pi1", "node ls")?;
    ensure!(nodes.contains("pi1") && nodes.contains("up"), "{nodes}");
    guest.type_last("poweroff")?;
    let off = Instant::now();
    guest.wait_for("power off: now", Duration::from_secs(30))?;
    guest.wait_off(Duration::from_secs(20))?;
    field.note("switched off in order", off);

    // Again: identity and cluster stay, nothing grows, the power button ends the run.
    field.start(index)?;
    let guest = &mut field.guests[index];
    let data = guest.wait_said(" data ", START_LIMIT)?;
    ensure!(!data.contains("grown"), "{data}");
    guest.wait_ready()?;
    let nodes = guest.type_line("pi1", "node ls")?;
    ensure!(nodes.contains("pi1") && nodes.contains("leader"), "{nodes}");
    guest.qmp("system_powerdown", serde_json::json!({}))?;
    guest.wait_for("power button", Duration::from_secs(20))?;
    guest.wait_for("power off: now", Duration::from_secs(30))?;
    guest.wait_off(Duration::from_secs(20))
}

/// The kernel and the modules are those of the Raspberry Pis' images.
fn aarch64(field: &mut Field) -> Result<()> {
    field.serve_dhcp(10, 3600)?;
    let setup = Setup { board: "qemu-aarch64", ..Setup::new("name = \"pi1\"\n") };
    let index = field.add(setup)?;
    field.start(index)?;
    let guest = &mut field.guests[index];
    let data = guest.wait_said(" data ", START_LIMIT)?;
    ensure!(data.contains("file system grown to"), "{data}");
    guest.wait_said("eth0: address 10.97.0.11/24", START_LIMIT)?;
    let ready = guest.wait_ready()?;
    let founded = guest.type_line("pi1", "init")?;
    ensure!(founded.contains("tinydc join tdc-join-"), "{founded}");
    let nodes = guest.type_line("pi1", "node ls")?;
    ensure!(nodes.contains("arm64") && nodes.contains("leader"), "{nodes}");
    let report = guest.type_line("pi1", "report")?;
    ensure!(!report.contains("FAILED"), "{report}");
    guest.type_last("poweroff")?;
    guest.wait_for("power off: now", Duration::from_secs(60))?;
    guest.wait_off(Duration::from_secs(20))?;
    field.remark(data);
    field.remark(ready);
    Ok(())
}

/// What QEMU leaves out of the real one: its firmware, its own network chip, Wi-Fi. Its watchdog does not count but
/// restarts the machine when it is switched on, so that module is left out, and with it the way to switch off.
fn raspi3b(field: &mut Field) -> Result<()> {
    field.serve_dhcp(10, 3600)?;
    let setup = Setup {
        board: "rpi3",
        kernel_words: "module_blacklist=bcm2835_wdt".into(),
        ..Setup::new("name = \"pi1\"\n")
    };
    let index = field.add(setup)?;
    let begin = Instant::now();
    field.start(index)?;
    let guest = &mut field.guests[index];
    let data = guest.wait_said(" data ", START_LIMIT)?;
    ensure!(data.contains("mmcblk0p4") && data.contains("file system grown to"), "{data}");
    let ready = guest.wait_ready()?;
    guest.wait_said("usb0: address 10.97.0.11/24", START_LIMIT)?;
    field.remark(data);
    field.remark(ready);
    field.note("from the plug to a node that answers", begin);
    let guest = &mut field.guests[index];
    let founded = guest.type_line("pi1", "init")?;
    ensure!(founded.contains("tinydc join tdc-join-"), "{founded}");
    let nodes = guest.type_line("pi1", "node ls")?;
    ensure!(nodes.contains("arm64") && nodes.contains("leader"), "{nodes}");
    let report = guest.type_line("pi1", "report")?;
    let failures: Vec<&str> = report.lines().filter(|line| line.contains("FAILED")).collect();
    ensure!(failures.len() == 1 && failures[0].contains("bcm2835_wdt"), "{report}");
    Ok(())
}

fn pc(field: &mut Field) -> Result<()> {
    field.serve_dhcp(10, 3600)?;
    let setup = Setup { board: "pc-x86_64", memory_mib: 512, ..Setup::new("name = \"pi1\"\n") };
    let index = field.add(setup)?;
    let begin = Instant::now();
    field.start(index)?;
    let guest = &mut field.guests[index];
    let data = guest.wait_said(" data ", START_LIMIT)?;
    ensure!(data.contains("sda2 (tinydc)") && data.contains("file system grown to"), "{data}");
    let ready = guest.wait_ready()?;
    guest.wait_said("eth0: address 10.97.0.11/24", START_LIMIT)?;
    field.remark(data);
    field.remark(ready);
    field.note("from the plug to a node that answers, firmware and all", begin);
    let guest = &mut field.guests[index];
    let founded = guest.type_line("pi1", "init")?;
    ensure!(founded.contains("tinydc join tdc-join-"), "{founded}");
    let report = guest.type_line("pi1", "report")?;
    ensure!(
        report.contains(" ok ") && !report.contains("FAILED") && !report.contains("problem:"),
        "{report}"
    );
    guest.type_last("reboot")?;
    guest.wait_off(Duration::from_secs(60))?;

    field.start(index)?;
    let guest = &mut field.guests[index];
    guest.wait_ready()?;
    let node = guest.wait_member("pi1")?;
    ensure!(node.contains("amd64") && node.contains("leader"), "{node}");
    guest.qmp("system_powerdown", serde_json::json!({}))?;
    guest.wait_for("power off: now", Duration::from_secs(30))?;
    guest.wait_off(Duration::from_secs(20))
}

fn wrong_settings(field: &mut Field) -> Result<()> {
    field.serve_dhcp(10, 3600)?;
    let text = "name = \"pi1\"\n\naddress = \"192.168.1.5\"\n";
    let index = field.add(Setup::new(text))?;
    field.start(index)?;
    let guest = &mut field.guests[index];
    let told = guest.wait_said("tinydc.toml:3:", START_LIMIT)?;
    ensure!(told.contains("FAILED") && told.contains("\"192.168.1.5\" is no address"), "{told}");
    guest.wait_said("so defaults are used", Duration::from_secs(5))?;
    // The default name, from the hardware address.
    let name = guest.wait_said("tinydc-009701", Duration::from_secs(20))?;
    guest.wait_ready()?;
    let screen = guest.type_line("tinydc-009701", "")?;
    ensure!(screen.contains("tinydc.toml:3:"), "the screen shows the last problem: {screen}");
    field.remark(told);
    field.remark(name);
    let address = field.address(11);
    crate::field::until("the report by HTTP", Duration::from_secs(20), || {
        Ok(field.http(address, 7480, "/")?.contains("FAILED settings  tinydc.toml:3:"))
    })
}

fn no_data(field: &mut Field) -> Result<()> {
    field.serve_dhcp(10, 3600)?;
    let index = field.add(Setup::new("name = \"pi1\"\n"))?;
    // A card whose last partition was wiped.
    crate::image::wipe_partition(&field.guests[index].disk, 4)?;
    field.start(index)?;
    let guest = &mut field.guests[index];
    let told = guest.wait_said("NOTHING IS KEPT", START_LIMIT)?;
    guest.wait_ready()?;
    field.remark(told);
    let address = field.address(11);
    let mut page = String::new();
    crate::field::until("the report by HTTP", Duration::from_secs(20), || {
        page = field.http(address, 7480, "/")?;
        Ok(page.contains("FAILED data"))
    })?;
    ensure!(page.contains("IN MEMORY"), "{page}");
    // A founder in memory is a founder all the same.
    let founded = field.guests[index].type_line("pi1", "init")?;
    ensure!(founded.contains("tinydc join tdc-join-"), "{founded}");
    Ok(())
}
