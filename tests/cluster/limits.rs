//! Memory and disk run out.

use super::Scenario;
use super::stage::{IMAGE, Stage, throughout, until, web};
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use tinydc::linux::mount;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "out-of-memory",
        proves: "a container that eats all memory is killed at its limit, ps says so in words, and the daemon lives",
        machines: 1,
        run: out_of_memory,
    },
    Scenario {
        name: "full-disk",
        proves: "a node's disk fills up: the cluster goes on accepting writes, apps serve, and with space the node is as before",
        machines: 3,
        run: full_disk,
    },
    Scenario {
        name: "low-disk",
        proves: "on a disk that is all but full a container that wrote much is stopped and ps says why, the others run on, \
                 and with space it runs again",
        machines: 1,
        run: low_disk,
    },
];

fn out_of_memory(stage: &mut Stage) -> Result<()> {
    stage.form(1)?;
    stage.deploy(0, "calm", &web(8080, 1, "calm"))?;
    let yaml = format!(
        "services:\n  hog:\n    image: {IMAGE}\n    entrypoint: [\"sh\", \"-c\", \"echo eating; exec dd if=/dev/zero of=/dev/null bs=300M\"]\n    \
         deploy: {{resources: {{limits: {{memory: 64M}}}}}}\n"
    );
    let path = stage.write_compose("greedy", &yaml)?.display().to_string();
    let daemon = stage.lab.nodes[0].pid();
    let begin = Instant::now();
    stage.cli(0, &["deploy", "-d", "-f", &path, "--name", "greedy"])?;
    until("ps tells it", Duration::from_secs(20), || {
        Ok(stage.cli(0, &["ps", "greedy"])?.contains("OOM-killed at 64 MiB"))
    })?;
    stage.note("deployed → told as killed for memory", begin);
    ensure!(stage.lab.nodes[0].ended()?.is_none() && stage.lab.nodes[0].pid() == daemon, "the daemon lives");
    let address = stage.lab.nodes[0].address;
    stage.wait_http(address, 8080, "calm", Duration::from_secs(2))?;
    let said = stage.cli(0, &["ps", "greedy"])?;
    stage.remark(said.lines().nth(1).unwrap_or_default().trim().into());
    Ok(())
}

const DISK_BYTES: u64 = 900 << 20;

fn full_disk(stage: &mut Stage) -> Result<()> {
    let folder = stage.lab.nodes[1].data_dir();
    std::fs::create_dir_all(&folder)?;
    nix::mount::mount(
        Some("tmpfs"),
        &folder,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some(format!("size={DISK_BYTES}").as_str()),
    )
    .context("mount a small disk")?;
    stage.form(3)?;
    stage.deploy(0, "shop", &web(8080, 3, "a"))?;
    stage.wait_up(0, "shop", 3, Duration::from_secs(10))?;
    let before = stage.pids(0, "shop")?;
    let ballast = folder.join("ballast");
    fill(&ballast)?;
    let begin = Instant::now();
    throughout("writes are accepted by way of the full node", Duration::from_secs(4), || {
        let mut ways = [1, 0, 2].into_iter();
        ensure!(ways.any(|way| stage.lab.nodes[way].is_running() && stage.label(way, "pi1", "full").is_ok()));
        Ok(true)
    })?;
    // More than the reserve and the log grown before can take.
    let mut refused = 0;
    for round in 0..400 {
        let value = format!("{round}-{}", "x".repeat(200));
        if stage.set_label(0, "pi3", "fill", &value[..60.min(value.len())]).is_err() {
            refused += 1;
        }
    }
    ensure!(refused == 0, "the other two are a majority, yet {refused} of 400 writes failed");
    let end = stage.lab.nodes[1].ended()?;
    stage.remark(format!(
        "the full node's daemon {}",
        end.map_or("ran on".into(), |end| format!("ended: {end}"))
    ));
    stage.note("disk full, 400 writes later", begin);
    let address = stage.lab.nodes[1].address;
    stage
        .wait_http(address, 8080, "hello", Duration::from_secs(3))
        .context("the full node's container serves")?;
    std::fs::remove_file(&ballast)?;
    if end.is_some() {
        stage.lab.nodes[1].start()?;
    }
    until("the node takes writes again", Duration::from_secs(15), || {
        Ok(stage.label(1, "pi2", "space").is_ok())
    })?;
    stage.agree()?;
    stage.wait_up(1, "shop", 3, Duration::from_secs(15))?;
    ensure!(stage.pids(0, "shop")? == before, "no instance was touched");
    ensure!(mount::mounted_below(&stage.lab.dir)?.contains(&folder), "the disk was the small one");
    Ok(())
}

fn free_bytes(folder: &std::path::Path) -> Result<u64> {
    Ok(tinydc::linux::disk::Space::of(folder).context("the disk says how full it is")?.free_bytes)
}

/// Writes until nothing more fits.
fn fill(path: &std::path::Path) -> Result<()> {
    let file = File::create(path)?;
    let block = vec![0xa5; 1 << 20];
    let mut at = 0;
    let mut size = block.len();
    while size >= 512 {
        match file.write_at(&block[..size], at) {
            Ok(0) | Err(_) => size /= 2,
            Ok(written) => at += written as u64,
        }
    }
    Ok(())
}

fn low_disk(stage: &mut Stage) -> Result<()> {
    let folder = stage.lab.nodes[0].data_dir();
    std::fs::create_dir_all(&folder)?;
    let (source, options) = (Some("tmpfs"), format!("size={DISK_BYTES}"));
    nix::mount::mount(source, &folder, source, nix::mount::MsFlags::empty(), Some(options.as_str()))
        .context("mount a small disk")?;
    stage.form(1)?;
    stage.deploy(0, "calm", &web(8080, 1, "calm"))?;
    let yaml = format!(
        "services:\n  hog:\n    image: {IMAGE}\n    entrypoint: [\"sh\", \"-c\", \"dd if=/dev/zero of=/big bs=1M count=80; \
         sleep 1000\"]\n"
    );
    let path = stage.write_compose("greedy", &yaml)?.display().to_string();
    let before = free_bytes(&folder)?;
    stage.cli(0, &["deploy", "-d", "-f", &path, "--name", "greedy"])?;
    until("it has written 80 MiB", Duration::from_secs(30), || {
        Ok(free_bytes(&folder)? + (80 << 20) <= before)
    })?;
    let calm = stage.pids(0, "calm")?;
    // Between nothing and the critical mark of 128 MiB.
    let ballast = File::create(folder.join("ballast"))?;
    let free = free_bytes(&folder)?;
    rustix::fs::fallocate(&ballast, rustix::fs::FallocateFlags::empty(), 0, free.saturating_sub(60 << 20))?;
    let begin = Instant::now();
    until("it is stopped, and ps says why", Duration::from_secs(20), || {
        let said = stage.cli(0, &["ps", "greedy"])?;
        Ok(stage.pids(0, "greedy")?.is_empty() && said.contains("the disk is nearly full"))
    })?;
    stage.note("disk all but full → stopped with a reason", begin);
    let said = stage.cli(0, &["ps", "greedy"])?;
    stage.remark(said.lines().nth(1).unwrap_or_default().trim().into());
    ensure!(stage.pids(0, "calm")? == calm, "the other one runs on");
    std::fs::remove_file(folder.join("ballast"))?;
    drop(ballast);
    stage.wait_up(0, "greedy", 1, Duration::from_secs(70))
}
