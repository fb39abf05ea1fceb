//! A board's two boot slots: an update that is kept, one that never starts, one whose daemon does not answer.

use crate::Case;
use crate::field::Field;
use crate::guest::Setup;
use crate::image;
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[Case {
    name: "slot-update",
    proves: "node flash writes the other slot and keeps it when it is well; a slot that panics, one whose daemon does \
             not answer and one without a network are left again; identity and data stay",
    run: slot_update,
}];

const IMAGE: &str = "http://10.97.0.254:8000/tinydc-qemu-x86_64.img.zst";
const FLASH_LIMIT: Duration = Duration::from_secs(240);

/// Flashes at the prompt and waits until the board has switched itself off for its restart.
fn flash(field: &mut Field) -> Result<()> {
    let begin = Instant::now();
    let guest = &mut field.guests[0];
    guest.type_last(&format!("node flash {IMAGE}"))?;
    guest.wait_for("the checksum holds", FLASH_LIMIT)?;
    guest.wait_for("restart from the other slot: now", Duration::from_secs(60))?;
    guest.wait_off(Duration::from_secs(20))?;
    field.note("flashed", begin);
    Ok(())
}

/// The partition that the board says it started from.
fn start_and_ask(field: &mut Field) -> Result<()> {
    field.start(0)?;
    field.guests[0].wait_ready().map(drop)
}

fn slot_update(field: &mut Field) -> Result<()> {
    field.serve_dhcp(10, 3600)?;
    field.serve_images()?;
    field.add(Setup::new("name = \"pi1\"\nbootstrap = true\n"))?;
    start_and_ask(field)?;
    field.guests[0].wait_said("eth0: address", Duration::from_secs(20))?;
    field.guests[0].wait_member("pi1")?;
    field.guests[0].type_line("pi1", "node label pi1 kept=yes")?;

    flash(field)?;
    start_and_ask(field)?;
    let kept = field.guests[0].wait_said("slot 3 is well and is kept", Duration::from_secs(60))?;
    field.remark(kept);
    let node = field.guests[0].wait_member("pi1")?;
    ensure!(node.contains("kept=yes"), "identity and data stay: {node}");
    let text = image::read_file(&field.guests[0].disk, 1, "autoboot.txt")?;
    ensure!(text.contains("[all]\ntryboot_a_b=1\nboot_partition=3"), "{text}");

    // The same into slot 2, which then can't even start: the kernel finds no first process.
    flash(field)?;
    image::write_file(
        &field.guests[0].disk,
        2,
        "cmdline.txt",
        "console=ttyS0 quiet panic=1 rdinit=/nothing\n",
    )?;
    field.start(0)?;
    // A kernel that has panicked counts its second by turning in a circle, which takes an emulator much longer.
    field.guests[0].wait_off(Duration::from_secs(180))?;
    field.remark("a slot that panics restarts by itself".into());

    // And once more, with a window in which no daemon can prove itself.
    start_and_ask(field)?;
    flash(field)?;
    image::write_file(
        &field.guests[0].disk,
        2,
        "cmdline.txt",
        "console=ttyS0 quiet panic=5 tinydc.trial_ms=1\n",
    )?;
    field.start(0)?;
    field.guests[0].wait_said("has no daemon that answered in time: back", Duration::from_secs(60))?;
    field.guests[0].wait_off(Duration::from_secs(90))?;

    // Its kernel starts and its daemon answers, but the network's driver is missing: nobody could ever flash it again.
    image::write_file(
        &field.guests[0].disk,
        2,
        "cmdline.txt",
        "console=ttyS0 quiet panic=5 tinydc.trial_ms=30000 module_blacklist=virtio_net\n",
    )?;
    image::write_file(&field.guests[0].disk, 1, "tryboot", "")?;
    field.start(0)?;
    field.guests[0].wait_ready()?;
    let left = field.guests[0].wait_said("back to the other slot", Duration::from_secs(60))?;
    ensure!(left.contains("gets no address"), "{left}");
    field.remark(left);
    field.guests[0].wait_off(Duration::from_secs(90))?;
    start_and_ask(field)?;
    let node = field.guests[0].wait_member("pi1")?;
    ensure!(node.contains("kept=yes"), "{node}");
    let text = image::read_file(&field.guests[0].disk, 1, "autoboot.txt")?;
    ensure!(
        text.contains("[all]\ntryboot_a_b=1\nboot_partition=3"),
        "the usual slot is still the usual one: {text}"
    );
    Ok(())
}
