//! Plugs that are pulled while a board writes, and daemons that hang.

use crate::Case;
use crate::cluster::{form, load_hello};
use crate::field::{Field, until};
use crate::guest::Setup;
use crate::losses::Log;
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[
    Case {
        name: "power-loss",
        proves: "a random half of what was not flushed is lost: all that was acknowledged is there; with flushes that \
                 were dropped it is not, so this check can fail",
        run: power_loss,
    },
    Case {
        name: "power-cut",
        proves: "plugs are pulled at moments of writing: each time the board boots by itself and has all that was acknowledged",
        run: power_cut,
    },
];

const CUTS: u32 = 6;

/// Moments are drawn from this; printed, so that a run can be repeated.
fn draw(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

fn power_cut(field: &mut Field) -> Result<()> {
    form(field, 1)?;
    let given = std::env::var("TINYDC_SEED").ok().and_then(|text| text.parse().ok());
    let mut seed: u64 = given.unwrap_or(u64::from(std::process::id()) | 1);
    field.remark(format!("TINYDC_SEED={seed}"));
    let mut acknowledged = 0;
    for cut in 0..CUTS {
        let length = Duration::from_millis(500 + draw(&mut seed) % 3_000);
        let begin = Instant::now();
        if cut == 1 {
            load_hello(field)?;
        }
        while begin.elapsed() < length {
            let next = acknowledged + 1;
            let label = format!("n={next}");
            if field.laptop(&["node", "label", "pi1", &label]).is_ok() {
                acknowledged = next;
            }
        }
        field.guests[0].kill();
        let begin = Instant::now();
        field.start(0)?;
        let data = field.guests[0].wait_said(" data ", Duration::from_secs(60))?;
        ensure!(data.contains(" ok "), "the file system comes back by itself: {data}");
        field.guests[0].wait_ready()?;
        let mut found = 0;
        until("the board serves again", Duration::from_secs(60), || {
            let node = field.laptop_json(&["node", "inspect", "pi1"])?;
            found = node["labels"]["n"].as_str().and_then(|text| text.parse().ok()).unwrap_or(0);
            Ok(true)
        })?;
        // One more may have been written whose answer was cut off.
        ensure!(
            found == acknowledged || found == acknowledged + 1,
            "cut {cut}: {acknowledged} were acknowledged, {found} is there"
        );
        field.note(&format!("cut {cut} after {acknowledged} writes: back"), begin);
    }
    Ok(())
}

/// How many flushes a lying disk forgets.
const FORGOTTEN: usize = 12;

/// The newest label, by the board's own prompt; `None` when the board does not come up or has no cluster.
fn label_at_prompt(field: &mut Field) -> Option<u64> {
    field.start(0).ok()?;
    let guest = &mut field.guests[0];
    guest.wait_ready().ok()?;
    let said = guest.type_line("pi1", "node inspect pi1").ok()?;
    let label = said.split_whitespace().find_map(|word| word.trim_end_matches(',').strip_prefix("n="))?;
    label.parse().ok()
}

fn power_loss(field: &mut Field) -> Result<()> {
    field.serve_dhcp(10, 3600)?;
    let index = field.add(Setup::new("name = \"pi1\"\nbootstrap = true\n"))?;
    let disk = field.guests[index].disk.clone();
    let (before, log) = (disk.with_extension("before"), disk.with_extension("log"));
    let copy = |from: &std::path::Path, to: &std::path::Path| -> Result<()> {
        let status = std::process::Command::new("cp").arg("--sparse=always").arg(from).arg(to).status()?;
        ensure!(status.success(), "copy {}", from.display());
        Ok(())
    };
    copy(&disk, &before)?;
    std::fs::File::create(&log)?;
    let drives = [
        format!("driver=file,node-name=plain,filename={}", disk.display()),
        format!("driver=file,node-name=writes,filename={}", log.display()),
        "driver=blklogwrites,node-name=card,file=plain,log=writes,log-super-update-interval=1".to_string(),
    ];
    let words: Vec<&str> = drives.iter().flat_map(|drive| ["-blockdev", drive.as_str()]).collect();
    field.guests[index].set_machine_words(&words);
    field.start(index)?;
    field.guests[index].wait_ready()?;
    let mut acknowledged = 0;
    for next in 1..=20 {
        field.guests[index].type_line("pi1", &format!("node label pi1 n={next}"))?;
        acknowledged = next;
    }
    // One more is under way when the plug is pulled.
    let given = std::env::var("TINYDC_SEED").ok().and_then(|text| text.parse().ok());
    let mut seed: u64 = given.unwrap_or(u64::from(std::process::id()) | 1);
    field.guests[index].type_last(&format!("node label pi1 n={}", acknowledged + 1))?;
    std::thread::sleep(Duration::from_millis(draw(&mut seed) % 250));
    field.guests[index].kill();
    field.guests[index].set_machine_words(&[]);
    let log = Log::read(&log)?;
    field.remark(format!("TINYDC_SEED={seed}, {} flushes for {acknowledged} writes", log.flushes()));
    for round in 0..3 {
        copy(&before, &disk)?;
        let lost = log.replay(&disk, 0, &mut || draw(&mut seed) % 2 == 0)?;
        let found = label_at_prompt(field);
        field.guests[index].kill();
        field.remark(format!("round {round}: {lost} writes lost, label {found:?}"));
        let is_kept = found == Some(acknowledged) || found == Some(acknowledged + 1);
        ensure!(is_kept, "{acknowledged} was acknowledged, {found:?} is there");
    }
    copy(&before, &disk)?;
    let lost = log.replay(&disk, FORGOTTEN, &mut || false)?;
    let found = label_at_prompt(field);
    field.guests[index].kill();
    field.remark(format!("a disk that lies: {lost} writes lost, label {found:?}"));
    ensure!(found.is_none_or(|found| found < acknowledged), "losing {FORGOTTEN} flushes must be noticed");
    Ok(())
}
