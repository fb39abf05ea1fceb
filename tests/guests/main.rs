//! Boards as a person has them: guests of QEMU that start from the images as they are built.
//!
//! `tests/qemu run [CASE…]` builds what is needed and runs this (root). Each case has a LAN in a network namespace of its
//! own, guests on taps of its bridge, their serial lines logged, QMP to pull plugs and press buttons. Says what each
//! proves, its times, and how it ended, two at a time where there is room; the last line is `N passed, N failed`.
//!
//! Invariant: nothing of a case outlives it: guests, namespace, DHCP server and disks go with `Field`.

mod boot;
mod cluster;
mod disks;
mod field;
mod guest;
mod hang;
mod image;
mod losses;
mod mixed;
mod network;
mod power;
mod readme;
mod slots;
mod wireguard;

use anyhow::{Result, anyhow};
use field::Field;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

/// What the largest case takes: three guests, each with its emulator.
const LANE_KIB: u64 = 3 << 20;
const LANES_MAX: usize = 2;

pub struct Case {
    pub name: &'static str,
    pub proves: &'static str,
    pub run: fn(&mut Field) -> Result<()>,
}

/// The longest first: they run beside each other.
const CASES: &[&[Case]] = &[
    power::CASES,
    slots::CASES,
    mixed::CASES,
    cluster::CASES,
    wireguard::CASES,
    disks::CASES,
    network::CASES,
    hang::CASES,
    boot::CASES,
];

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
    let begin = Instant::now();
    let lanes = lanes().min(wanted.len());
    println!("{} cases, {lanes} at a time", wanted.len());
    let waiting = Mutex::new(wanted.iter().copied());
    let failed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for lane in 1..=lanes {
            let (waiting, failed) = (&waiting, &failed);
            scope.spawn(move || {
                loop {
                    let Some(case) = lock(waiting).next() else { return };
                    if !play(case, lane) {
                        lock(failed).push(case.name);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !failed.is_empty() {
        println!("\nfailed: {}", failed.join(", "));
    }
    println!("\nin {} s", begin.elapsed().as_secs());
    println!("{} passed, {} failed", wanted.len() - failed.len(), failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A case that panicked has been caught; what the lock guards is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many cases run beside each other: what memory and processors give.
fn lanes() -> usize {
    let cores = thread::available_parallelism().map_or(1, |count| count.get());
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let free_kib: u64 = free.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    cores.min((free_kib / LANE_KIB) as usize).clamp(1, LANES_MAX)
}

/// Runs one case in a field of its own and tells of it in one piece. Returns whether it passed.
fn play(case: &Case, lane: usize) -> bool {
    let begin = Instant::now();
    let mut text = format!("\n{}: {}\n", case.name, case.proves);
    let outcome = Field::new(lane).and_then(|mut field| {
        let outcome = catch_unwind(AssertUnwindSafe(|| (case.run)(&mut field)));
        let outcome = outcome.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_string()));
            Err(anyhow!("panicked: {}", text.unwrap_or_default()))
        });
        for note in &field.notes {
            text += &format!("  {note}\n");
        }
        if outcome.is_err() {
            text += &field.log_tails();
        }
        outcome
    });
    let seconds = begin.elapsed().as_secs_f64();
    match &outcome {
        Ok(()) => println!("{text}  ok ({seconds:.1} s)"),
        Err(error) => println!("{text}  FAILED ({seconds:.1} s): {error:#}"),
    }
    outcome.is_ok()
}
