//! A bad cable: frames of one machine late, out of step, or lost. What netem does, for kernels that lack it.
//!
//! The machine's end of its cable is taken off the bridge, and a thread for each direction carries the frames. The
//! fates of frames are drawn from a seed.

use super::stage::Stage;
use anyhow::{Context, Result, ensure};
use nix::sys::socket::{MsgFlags, recv, send};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tinydc::linux::{netns, packet};

const ALL_PROTOCOLS: u16 = 3;
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// A checksum that is left to the hardware would never be made, and a segment for it to cut never be cut.
const PLAIN: [&str; 6] = ["tx", "off", "gso", "off", "tso", "off"];

#[derive(Clone, Copy)]
pub struct Spoiling {
    pub delay: Duration,
    pub jitter: Duration,
    pub lost_percent: u64,
}

/// Bad until it is dropped; then no frame passes.
pub struct Cable {
    is_over: Arc<AtomicBool>,
    carriers: Vec<JoinHandle<()>>,
}

impl Cable {
    pub fn spoil(stage: &Stage, index: usize, how: Spoiling) -> Result<Cable> {
        let node = &stage.lab.nodes[index];
        let machine = stage.lab.lan.unplug(node.number)?;
        let (inner, outer) = (format!("wire{}a", node.number), format!("wire{}b", node.number));
        let lan = &stage.lab.lan.netns;
        run(lan, "ip", &["link", "add", &inner, "type", "veth", "peer", "name", &outer])?;
        run(lan, "ip", &["link", "set", &outer, "up"])?;
        run(lan, "ip", &["link", "set", &inner, "master", stage.lab.lan.bridge(), "up"])?;
        run(lan, "ethtool", &[&["-K", &inner], PLAIN.as_slice()].concat())?;
        run(&node.netns, "ethtool", &[&["-K", "eth0"], PLAIN.as_slice()].concat())?;
        let is_over = Arc::new(AtomicBool::new(false));
        let mut carriers = Vec::new();
        for (from, to) in [(&machine, &outer), (&outer, &machine)] {
            let (from, to, over) = (open(stage, from)?, open(stage, to)?, is_over.clone());
            let seed = index as u64 * 2 + carriers.len() as u64 + 1;
            carriers.push(thread::spawn(move || carry(&from, &to, how, seed, &over)));
        }
        Ok(Cable { carriers, is_over })
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for carrier in self.carriers.drain(..) {
            // It panicked: the scenario has failed by then.
            let _ = carrier.join();
        }
    }
}

fn run(netns: &std::path::Path, program: &'static str, words: &[&str]) -> Result<()> {
    let owned: Vec<String> = words.iter().map(ToString::to_string).collect();
    let outcome = netns::in_netns(netns, move || Command::new(program).args(owned).output())
        .with_context(|| format!("run {program}; apt-get install iproute2 ethtool"))?;
    ensure!(outcome.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&outcome.stderr));
    Ok(())
}

fn open(stage: &Stage, interface: &str) -> Result<OwnedFd> {
    let name = interface.to_owned();
    let opened = netns::in_netns(&stage.lab.lan.netns, move || {
        packet::open(ALL_PROTOCOLS, nix::net::if_::if_nametoindex(name.as_str())?, LOOK_EVERY)
    });
    opened.with_context(|| format!("listen on {interface}"))
}

fn carry(from: &OwnedFd, to: &OwnedFd, how: Spoiling, seed: u64, is_over: &AtomicBool) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut draw = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below.max(1)
    };
    let mut late: BinaryHeap<Reverse<(Instant, Vec<u8>)>> = BinaryHeap::new();
    let mut frame = vec![0; 65_536];
    while !is_over.load(Ordering::Relaxed) {
        // Without a frame it comes back after a moment, for those that are due.
        if let Ok(length) = recv(from.as_raw_fd(), &mut frame, MsgFlags::empty())
            && draw(100) >= how.lost_percent
        {
            let jitter = Duration::from_micros(draw(how.jitter.as_micros() as u64));
            late.push(Reverse((Instant::now() + how.delay + jitter, frame[..length].to_vec())));
        }
        while late.peek().is_some_and(|Reverse((due, _))| *due <= Instant::now()) {
            if let Some(Reverse((_, frame))) = late.pop() {
                // A full queue loses it, as a bad cable does.
                let _ = send(to.as_raw_fd(), &frame, MsgFlags::MSG_DONTWAIT);
            }
        }
    }
}
