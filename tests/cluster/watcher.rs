//! A client on the LAN that asks every 50 ms and remembers the longest time without an answer.

use super::stage::{Stage, http_here};
use anyhow::{Result, anyhow};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tinydc::linux::netns;

const ASK_EVERY: Duration = Duration::from_millis(50);

#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub answered: u64,
    pub failed: u64,
    pub longest_gap: Duration,
    /// Other than what was expected to be served.
    pub texts: std::collections::BTreeSet<String>,
}

pub struct Watcher {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<std::io::Result<Seen>>>,
}

impl Watcher {
    /// Asks the machines in turn, staying with one that answers.
    pub fn start(stage: &Stage, addresses: Vec<Ipv4Addr>, port: u16) -> Result<Watcher> {
        let stop = Arc::new(AtomicBool::new(false));
        let (flag, lan) = (stop.clone(), stage.lab.lan.netns.clone());
        let thread = thread::Builder::new()
            .name("watcher".into())
            .spawn(move || netns::in_netns(&lan, move || Ok(watch(&flag, &addresses, port))))?;
        Ok(Watcher { stop, thread: Some(thread) })
    }

    pub fn stop(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or_else(|| anyhow!("the watcher was stopped before"))?;
        Ok(thread.join().map_err(|_| anyhow!("the watcher panicked"))??)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // The scenario has failed already; only the thread must end.
            let _ = thread.join();
        }
    }
}

fn watch(stop: &AtomicBool, addresses: &[Ipv4Addr], port: u16) -> Seen {
    let mut seen = Seen::default();
    let (mut current, mut answered_at) = (0, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        let begin = Instant::now();
        let answer = (0..addresses.len())
            .map(|step| (current + step) % addresses.len())
            .find_map(|index| Some((index, http_here((addresses[index], port).into()).ok()?)));
        match answer {
            Some((index, text)) => {
                current = index;
                seen.answered += 1;
                seen.texts.insert(text);
                seen.longest_gap = seen.longest_gap.max(answered_at.elapsed());
                answered_at = Instant::now();
            }
            None => seen.failed += 1,
        }
        thread::sleep(ASK_EVERY.saturating_sub(begin.elapsed()));
    }
    seen.longest_gap = seen.longest_gap.max(answered_at.elapsed());
    seen
}
