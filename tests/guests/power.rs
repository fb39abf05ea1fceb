//! Plugs that are pulled while a board writes: labels, deploys, images; and disks that lose what was not flushed.

use crate::Case;
use crate::cluster::{form, load_hello};
use crate::field::{Field, until};
use crate::image;
use crate::losses::Log;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use tinydc::model::Digest;

pub const CASES: &[Case] = &[
    Case {
        name: "power-loss",
        proves: "the plug is pulled at ten moments of writing, and a random half of what the disk had not flushed is lost: \
                 all that was acknowledged is there; on a disk that drops flushes it is not, so this check can fail",
        run: power_loss,
    },
    Case {
        name: "power-cut",
        proves: "the plug is pulled ten times while apps are deployed and images loaded: each time the board boots by \
                 itself, has all that was acknowledged, and runs its app",
        run: power_cut,
    },
];

/// Of each kind; together the twenty of a run.
const CUTS: usize = 10;
/// How many flushes a lying disk forgets.
const FORGOTTEN: usize = 12;
const RECORDED: Duration = Duration::from_secs(25);
const SERVES_LIMIT: Duration = Duration::from_secs(60);
/// Not compressible, so that a disk has to take all of it.
const PART_BYTES: usize = 1 << 20;

/// Moments and losses are drawn from this; printed, so that a run can be repeated.
struct Draw(u64);

impl Draw {
    fn new(field: &mut Field) -> Draw {
        let given = std::env::var("TINYDC_SEED").ok().and_then(|text| text.parse().ok());
        let seed = given.unwrap_or(u64::from(std::process::id()) | 1);
        field.remark(format!("TINYDC_SEED={seed}"));
        Draw(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// What the board has said yes to: the last label, the last deploy, the last image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Kept {
    label: u64,
    deploy: u64,
    image: u64,
}

/// `web` is what runs; the other service is the mark of this deploy.
fn compose(number: u64) -> String {
    format!(
        "services:\n  web: {{image: \"hello:1\", stop_grace_period: 1s, deploy: {{replicas: 1}}}}\n  \
         mark{number}: {{image: \"hello:1\", deploy: {{replicas: 0}}}}\n"
    )
}

fn content(number: u64) -> Vec<u8> {
    let mut draw = Draw(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    (0..PART_BYTES / 8).flat_map(|_| draw.next().to_le_bytes()).collect()
}

fn part(number: u64) -> Result<Vec<u8>> {
    let content = content(number);
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    layer.append_data(&mut header, "part", &content[..])?;
    tinydc::cli::lab::archive_of(&format!("part:{number}"), &layer.into_inner()?, &["/part".into()])
}

/// One of the three, begun by the laptop; and what is kept once it is acknowledged.
fn begin_one(field: &Field, kept: Kept, draw: &mut Draw) -> Result<(Child, Kept)> {
    let mut next = kept;
    let folder = field.laptop_dir();
    let child = match draw.next() % 8 {
        0 | 1 => {
            next.deploy += 1;
            fs::write(folder.join("power.yaml"), compose(next.deploy))?;
            field.laptop_begin(&["deploy", "-d", "-f", "power.yaml", "--name", "shop"])?
        }
        2 => {
            next.image += 1;
            fs::write(folder.join("part.tar"), part(next.image)?)?;
            field.laptop_begin(&["image", "load", "part.tar"])?
        }
        _ => {
            next.label += 1;
            field.laptop_begin(&["node", "label", "pi1", &format!("n={}", next.label)])?
        }
    };
    Ok((child, next))
}

/// Writes for this long, telling of each that is acknowledged; the last is still under way.
fn write_on(
    field: &Field,
    length: Duration,
    kept: &mut Kept,
    draw: &mut Draw,
    told: &mut dyn FnMut(Kept) -> Result<()>,
) -> Result<Child> {
    let begin = Instant::now();
    loop {
        let (mut child, next) = begin_one(field, *kept, draw)?;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if begin.elapsed() >= length {
                return Ok(child);
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        if !status.success() {
            let output = child.wait_with_output()?;
            bail!("a write was refused: {}", String::from_utf8_lossy(&output.stderr));
        }
        *kept = next;
        told(next)?;
    }
}

fn end(mut child: Child) -> Result<()> {
    // It waits for a board that is off.
    child.kill()?;
    child.wait().map(drop).context("the laptop's command")
}

/// What is there now. Its images: those that `image ls` names from the first without a gap.
fn found(field: &Field) -> Result<Kept> {
    let node = field.laptop_json(&["node", "inspect", "pi1"])?;
    let label = node["labels"]["n"].as_str().and_then(|text| text.parse().ok()).unwrap_or(0);
    let status = field.laptop_json(&["status"])?;
    let mark = |service: &Value| service["name"].as_str()?.strip_prefix("mark")?.parse().ok();
    let deploy = status["services"].as_array().into_iter().flatten().find_map(mark).unwrap_or(0);
    let images = field.laptop(&["image", "ls"])?;
    let has = |number: &u64| {
        images.split_whitespace().any(|word| word == format!("docker.io/library/part:{number}"))
    };
    let image = (1..).take_while(has).last().unwrap_or(0);
    Ok(Kept { label, deploy, image })
}

/// Of each kind one more may have been written whose answer was cut off.
fn is_all_there(kept: Kept, found: Kept) -> bool {
    let is_there = |kept: u64, found: u64| found == kept || found == kept + 1;
    is_there(kept.label, found.label)
        && is_there(kept.deploy, found.deploy)
        && is_there(kept.image, found.image)
}

/// Starts the board and asks it what it has.
fn start_and_ask(field: &mut Field) -> Result<Kept> {
    field.start(0)?;
    let data = field.guests[0].wait_said(" data ", SERVES_LIMIT)?;
    ensure!(data.contains(" ok "), "the file system comes back by itself: {data}");
    field.guests[0].wait_ready()?;
    let mut now = Kept::default();
    until("the board serves again", SERVES_LIMIT, || {
        now = found(field)?;
        Ok(true)
    })?;
    Ok(now)
}

fn runs_its_app(field: &Field) -> Result<()> {
    until("its app runs again", SERVES_LIMIT, || {
        let status = field.laptop_json(&["status"])?;
        let mut services = status["services"].as_array().into_iter().flatten();
        Ok(services.any(|one| one["name"] == "web" && one["running"] == 1))
    })
}

/// What was loaded by then, as the board names it; from it follows what its disk must hold.
fn images(field: &Field) -> Result<Vec<Digest>> {
    let told = field.laptop_json(&["image", "ls"])?;
    let rows = told["images"].as_array().context("images")?;
    let digest = |row: &Value| Digest::new(row["digest"].as_str()?).ok();
    rows.iter().map(|row| digest(row).context("an image's digest")).collect()
}

/// The board is off. Its data's file system is sound, what it holds under a digest has that digest, of each of these
/// images everything is there, and each unpacked part is one that was loaded.
fn check_disk(field: &Field, images: &[Digest], parts: u64) -> Result<String> {
    let disk = &field.guests[0].disk;
    let folder = field.guests[0].dir().join("data");
    let (start, bytes) = image::partition_span(disk, 4)?;
    let data = field.guests[0].dir().join("data.img");
    // Replaying the journal writes: on a copy, so that the board does it by itself.
    image::copy_part(disk, start, bytes, &data)?;
    let checked =
        Command::new("/usr/sbin/e2fsck").args(["-f", "-p"]).arg(&data).output().context("run e2fsck")?;
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    // 0: clean; 1: what -p corrects without a question, such as counts after a replayed journal.
    ensure!(checked.status.code().is_some_and(|code| code <= 1), "e2fsck: {said}");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir(&folder)?;
    for name in ["blobs", "layers"] {
        let request = format!("rdump /{name} {}", folder.display());
        let dumped = Command::new("/usr/sbin/debugfs").arg("-R").arg(request).arg(&data).output();
        let dumped = dumped.context("run debugfs")?;
        ensure!(dumped.status.success(), "debugfs: {}", String::from_utf8_lossy(&dumped.stderr));
    }
    fs::remove_file(&data)?;

    let blobs = folder.join("blobs/sha256");
    let mut whole = BTreeSet::new();
    for entry in fs::read_dir(&blobs).context("the board's blobs")? {
        let entry = entry?;
        let (name, digest) =
            (entry.file_name().to_string_lossy().into_owned(), digest_of(&fs::read(entry.path())?));
        ensure!(name == digest, "blob {name} holds something else ({digest})");
        whole.insert(name);
    }
    for image in images {
        let manifest =
            fs::read(blobs.join(image.hex())).with_context(|| format!("{image} was acknowledged"))?;
        let manifest: Value = serde_json::from_slice(&manifest)?;
        let layers = manifest["layers"].as_array().context("a manifest's layers")?;
        for blob in layers.iter().chain([&manifest["config"]]) {
            let hex =
                blob["digest"].as_str().and_then(|text| text.strip_prefix("sha256:")).context("a digest")?;
            ensure!(whole.contains(hex), "{image} was acknowledged, its blob {hex} is not there");
        }
    }
    let expected: BTreeSet<String> = (1..=parts).map(|number| digest_of(&content(number))).collect();
    let mut unpacked = BTreeSet::new();
    for path in files_below(&folder.join("layers"))? {
        if path.file_name().is_some_and(|name| name == "part") {
            let digest = digest_of(&fs::read(&path)?);
            ensure!(expected.contains(&digest), "{} is no part that was loaded", path.display());
            unpacked.insert(digest);
        }
    }
    Ok(format!("{} blobs and {} unpacked parts are whole", whole.len(), unpacked.len()))
}

fn digest_of(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => files.extend(files_below(&entry.path())?),
            false => files.push(entry.path()),
        }
    }
    Ok(files)
}

fn power_cut(field: &mut Field) -> Result<()> {
    form(field, 1)?;
    load_hello(field)?;
    let mut draw = Draw::new(field);
    let mut kept = Kept::default();
    for cut in 1..=CUTS {
        let length = Duration::from_millis(300 + draw.next() % 3_000);
        let child = write_on(field, length, &mut kept, &mut draw, &mut |_| Ok(()))?;
        field.guests[0].kill();
        end(child)?;
        let begin = Instant::now();
        let now = start_and_ask(field)?;
        ensure!(is_all_there(kept, now), "cut {cut}: {kept:?} was acknowledged, {now:?} is there");
        field.note(&format!("cut {cut} after {kept:?}: all there"), begin);
        kept = now;
        if kept.deploy > 0 {
            runs_its_app(field)?;
        }
    }
    ensure!(kept.deploy > 0 && kept.image > 0, "no deploy or no image was among what was written: {kept:?}");
    let images = images(field)?;
    field.guests[0].kill();
    let said = check_disk(field, &images, kept.image + 1)?;
    field.remark(said);
    Ok(())
}

/// What was acknowledged, and how much the log of writes held when it was.
struct Moment {
    entries: usize,
    kept: Kept,
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").arg("--sparse=always").arg(from).arg(to).status()?;
    ensure!(status.success(), "copy {}", from.display());
    Ok(())
}

fn power_loss(field: &mut Field) -> Result<()> {
    // Its settings, its disk as it is before anything is written, and a log of all writes after that.
    let index = crate::cluster::add_founder(field)?;
    let disk = field.guests[index].disk.clone();
    let (before, log) = (disk.with_extension("before"), disk.with_extension("log"));
    copy(&disk, &before)?;
    fs::File::create(&log)?;
    let drives = [
        format!("driver=file,node-name=plain,filename={}", disk.display()),
        format!("driver=file,node-name=writes,filename={}", log.display()),
        "driver=blklogwrites,node-name=card,file=plain,log=writes,log-super-update-interval=1".to_string(),
    ];
    let words: Vec<&str> = drives.iter().flat_map(|drive| ["-blockdev", drive.as_str()]).collect();
    field.guests[index].set_machine_words(&words);
    crate::cluster::start_founder(field)?;
    load_hello(field)?;

    let mut draw = Draw::new(field);
    let mut kept = Kept::default();
    let mut moments = vec![Moment { entries: Log::count(&log)?, kept }];
    let child = write_on(field, RECORDED, &mut kept, &mut draw, &mut |kept| {
        moments.push(Moment { entries: Log::count(&log)?, kept });
        Ok(())
    })?;
    field.guests[index].kill();
    end(child)?;
    field.guests[index].set_machine_words(&[]);
    ensure!(kept.deploy > 0 && kept.image > 0, "no deploy or no image was among what was written: {kept:?}");

    let log = Log::read(&log)?;
    let first = moments[0].entries;
    field.remark(format!("{} writes and {} flushes for {kept:?}", log.len() - first, log.flushes()));
    for cut in 1..=CUTS {
        // Of three moments the one with the most to lose.
        let moments_drawn = [(); 3].map(|()| first + draw.next() as usize % (log.len() - first + 1));
        let until = moments_drawn.into_iter().max_by_key(|until| log.unflushed(*until)).unwrap_or(first);
        copy(&before, &disk)?;
        let lost = log.replay(&disk, until, 0, &mut || draw.next().is_multiple_of(2))?;
        let acknowledged =
            moments.iter().rev().find(|moment| moment.entries <= until).context("a moment")?.kept;
        let begin = Instant::now();
        let now = start_and_ask(field).and_then(|now| Ok((now, images(field)?)));
        field.guests[index].kill();
        let (now, images) = now.with_context(|| format!("cut {cut}, after write {until}, {lost} lost"))?;
        ensure!(
            has_all(acknowledged, now),
            "cut {cut}, after write {until}, {lost} lost: {acknowledged:?} was acknowledged, {now:?} is there"
        );
        let said = check_disk(field, &images, kept.image + 1)?;
        field.note(&format!("cut {cut}, {lost} writes lost, {acknowledged:?}: all there, {said}"), begin);
    }
    // Cut when the last answer had come: what was under way afterwards nobody would miss.
    let until = moments.last().context("a moment")?.entries;
    copy(&before, &disk)?;
    let lost = log.replay(&disk, until, FORGOTTEN, &mut || false)?;
    let damage = check_disk(field, &[], kept.image + 1).err();
    // What can't be asked proves nothing: only an answer that lacks something, or a disk that is found damaged.
    let noticed = match damage {
        Some(error) => format!("{error:#}"),
        None => {
            let now = start_and_ask(field)?;
            ensure!(!has_all(kept, now), "losing {FORGOTTEN} flushes must be noticed: {now:?} is there");
            format!("{now:?} is there")
        }
    };
    field.remark(format!("a disk that lies, {lost} writes lost: {noticed}"));
    Ok(())
}

/// Of a run that went on: what came after the moment of the cut may have been written as well.
fn has_all(kept: Kept, found: Kept) -> bool {
    found.label >= kept.label && found.deploy >= kept.deploy && found.image >= kept.image
}
