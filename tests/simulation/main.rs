//! The control plane under a simulated network, disk and clock: seeded, and replayable from the seed.
//!
//! `cargo test --test simulation` runs the seeds of CI and the planted bugs. A failure prints its replay line:
//! `TINYDC_SEED=17 cargo test --test simulation one_seed -- --nocapture`.

mod checks;
mod directed;
mod disk;
mod fate;
mod linearizable;
mod world;

use fate::{Bug, Report};
use std::panic::{AssertUnwindSafe, catch_unwind};
use world::World;

const SEEDS_IN_CI: u64 = 200;

/// Runs one seed; `Err` holds what an invariant said.
fn run(seed: u64, bug: Bug) -> Result<Report, String> {
    let outcome = catch_unwind(AssertUnwindSafe(|| match bug {
        Bug::ForgetVote => directed::forgotten_vote(bug),
        _ => World::new(seed, bug).run_to_the_end(),
    }));
    outcome.map_err(|panic| {
        panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()))
            .unwrap_or_else(|| "a panic without a text".into())
    })
}

fn must_hold(seed: u64) -> Report {
    match run(seed, Bug::None) {
        Ok(report) => report,
        Err(why) => panic!(
            "seed {seed}: {why}\n  replay: TINYDC_SEED={seed} cargo test --test simulation one_seed -- --nocapture"
        ),
    }
}

fn seeds() -> u64 {
    std::env::var("TINYDC_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SEEDS_IN_CI)
}

#[test]
fn all_seeds_hold() {
    let workers = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let total = seeds();
    let reports: Vec<Report> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers)
            .map(|worker| {
                scope.spawn(move || {
                    (1..=total).filter(|seed| seed % workers == worker).map(must_hold).collect::<Vec<_>>()
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("a seed failed; its replay line is above"))
            .collect()
    });
    let sum = |part: fn(&Report) -> u64| reports.iter().map(part).sum::<u64>();
    println!(
        "{total} seeds: {} s simulated, {} elections, {} crashes, {} batches lost, {} snapshots, {} writes, {} reads, {} membership changes",
        sum(|r| r.simulated_ms) / 1000,
        sum(|r| r.elections),
        sum(|r| r.crashes),
        sum(|r| r.lost_batches),
        sum(|r| r.snapshots),
        sum(|r| r.writes),
        sum(|r| r.reads),
        sum(|r| r.conf_changes),
    );
    // A simulator in which nothing happens proves nothing.
    assert!(sum(|r| r.crashes) > total && sum(|r| r.snapshots) > 0 && sum(|r| r.lost_batches) > 0);
}

#[test]
fn one_seed() {
    let seed = std::env::var("TINYDC_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    println!("seed {seed}: {:?}", must_hold(seed));
}

#[test]
fn a_seed_repeats_itself() {
    for seed in [3, 4] {
        assert_eq!(must_hold(seed).trace, must_hold(seed).trace, "seed {seed} took two paths");
    }
    assert_ne!(must_hold(3).trace, must_hold(4).trace);
}

#[test]
fn a_vote_survives_a_crash() {
    // One in term 2, the other in a later one.
    assert!(directed::forgotten_vote(Bug::None).trace > 2);
}

/// Each planted bug must be caught by some seed within its budget: a check that never fails checks nothing.
#[test]
fn planted_bugs_are_caught() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut escaped = Vec::new();
    for (bug, budget) in Bug::PLANTED {
        let caught = (1..=budget).find_map(|seed| run(seed, bug).err().map(|why| (seed, why)));
        match caught {
            Some((seed, why)) => {
                let line: String = why.lines().next().unwrap_or_default().chars().take(120).collect();
                println!("{bug:?}: caught by seed {seed}: {line}");
            }
            None => escaped.push(bug),
        }
    }
    std::panic::set_hook(hook);
    assert!(escaped.is_empty(), "not caught: {escaped:?}");
}

#[test]
fn an_idle_cluster_writes_nothing() {
    let mut world = World::calm(7);
    world.found_with_members(3);
    world.run_for(30_000);
    world.settle_writes();
    let before = world.batches_written();
    world.run_for(600_000);
    assert_eq!(world.batches_written() - before, 0, "ten idle minutes wrote to a disk");
    world.write_label("k", "v");
    world.run_for(1_000);
    assert!(world.batches_written() > before, "the same meter must show a write");
}
