//! Plugs that are pulled while a board writes, and daemons that hang.

use crate::Case;
use crate::cluster::{form, load_hello};
use crate::field::{Field, until};
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[Case {
    name: "power-cut",
    proves: "plugs are pulled at moments of writing: each time the board boots by itself and has all that was acknowledged",
    run: power_cut,
}];

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
