//! Boards as a person has them: guests of QEMU that start from the images as they are built.
//!
//! `tests/qemu run [CASE…]` builds what is needed and runs this (root). Each case has a LAN in a network namespace of its
//! own, guests on taps of its bridge, their serial lines logged, QMP to pull plugs and press buttons. Says what each
//! proves, its times, and how it ended; the last line is `N passed, N failed`.
//!
//! Invariant: nothing of a case outlives it: guests, namespace, DHCP server and disks go with `Field`.

mod boot;
mod cluster;
mod disks;
mod field;
mod guest;
mod image;
mod losses;
mod network;
mod power;
mod slots;

use anyhow::{Result, anyhow};
use field::Field;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

pub struct Case {
    pub name: &'static str,
    pub proves: &'static str,
    pub run: fn(&mut Field) -> Result<()>,
}

const CASES: &[&[Case]] =
    &[boot::CASES, cluster::CASES, disks::CASES, network::CASES, power::CASES, slots::CASES];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let all: Vec<&Case> = CASES.iter().copied().flatten().collect();
    let fits = |case: &&Case| words.is_empty() || words.iter().any(|word| case.name.contains(word.as_str()));
    let wanted: Vec<&Case> = all.iter().copied().filter(fits).collect();
    if wanted.is_empty() {
        let names: Vec<&str> = all.iter().map(|case| case.name).collect();
        eprintln!("no case is called {}; there are: {}", words.join(" or "), names.join(", "));
        return ExitCode::from(2);
    }
    let mut failed = Vec::new();
    for case in &wanted {
        println!("\n{}: {}", case.name, case.proves);
        let begin = Instant::now();
        let outcome = play(case);
        let seconds = begin.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => println!("  ok ({seconds:.1} s)"),
            Err(error) => {
                println!("  FAILED ({seconds:.1} s): {error:#}");
                failed.push(case.name);
            }
        }
    }
    if !failed.is_empty() {
        println!("\nfailed: {}", failed.join(", "));
    }
    println!("\n{} passed, {} failed", wanted.len() - failed.len(), failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn play(case: &Case) -> Result<()> {
    let mut field = Field::new()?;
    let outcome = catch_unwind(AssertUnwindSafe(|| (case.run)(&mut field)));
    let outcome = outcome.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_string()));
        Err(anyhow!("panicked: {}", text.unwrap_or_default()))
    });
    for note in &field.notes {
        println!("  {note}");
    }
    if outcome.is_err() {
        print!("{}", field.log_tails());
    }
    outcome
}
