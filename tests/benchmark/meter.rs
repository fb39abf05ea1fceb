//! What processes wrote and hold, as the kernel counts it.

use anyhow::{Context, Result};
use std::fs;
use tinydc::cli::lab::{Lab, Node};

/// Counts `write_bytes` of a set of processes from now on.
pub struct Meter {
    start: Vec<(u32, u64)>,
}

impl Meter {
    pub fn of_daemon(node: &Node) -> Result<Meter> {
        let pid = node.pid().context("the daemon runs")?;
        Ok(Meter { start: vec![(pid, written(pid)?)] })
    }

    /// The daemon and its shims.
    pub fn of_node(node: &Node) -> Result<Meter> {
        let mut start = Meter::of_daemon(node)?.start;
        for pid in shims_of(node) {
            start.push((pid, written(pid)?));
        }
        Ok(Meter { start })
    }

    /// A process that has ended since counts no more.
    pub fn bytes_since(&self) -> Result<u64> {
        Ok(self
            .start
            .iter()
            .map(|(pid, before)| written(*pid).map_or(0, |now| now.saturating_sub(*before)))
            .sum())
    }
}

pub fn written(pid: u32) -> Result<u64> {
    let text =
        fs::read_to_string(format!("/proc/{pid}/io")).with_context(|| format!("read what {pid} wrote"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    Ok(line.and_then(|number| number.parse().ok()).unwrap_or(0))
}

/// Waiters whose command line names the node's folder.
fn shims_of(node: &Node) -> Vec<u32> {
    let needle = node.dir.display().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let text = String::from_utf8_lossy(&line).replace('\0', " ");
        if text.contains("shim-wait") && text.contains(&needle) {
            found.push(pid);
        }
    }
    found
}

fn pss(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("Pss")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    Ok(kib << 10)
}

pub fn pss_of_daemon(node: &Node) -> Result<u64> {
    pss(node.pid().context("the daemon runs")?)
}

pub fn pss_of_shims(lab: &Lab) -> Result<Vec<u64>> {
    lab.nodes.iter().flat_map(shims_of).map(pss).collect()
}

pub fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get((values.len() * percent / 100).min(values.len().saturating_sub(1))).copied().unwrap_or(0.0)
}
