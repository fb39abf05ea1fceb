//! What a board's firmware does with an image, for guests: which slot, and its files; and what a person does with the
//! card in a PC: editing `tinydc.toml`. Container images of several platforms, too.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use tinydc::boot::partitions::{self, SECTOR};

/// The image of a board as `images/build BOARD --plain` left it.
pub fn of_board(board: &str) -> PathBuf {
    PathBuf::from(format!("target/images/tinydc-{board}.img"))
}

/// Where a partition begins and how long it is, in bytes.
pub fn partition_span(disk: &Path, number: u32) -> Result<(u64, u64)> {
    let mut head = vec![0; partitions::HEAD_BYTES];
    File::open(disk)
        .and_then(|mut file| file.read_exact(&mut head))
        .with_context(|| format!("read {}", disk.display()))?;
    let table = partitions::read(&head).with_context(|| format!("{} has no partitions", disk.display()))?;
    let partition = table.partitions.iter().find(|one| one.number == number);
    let partition = partition.with_context(|| format!("{} has no partition {number}", disk.display()))?;
    Ok((partition.start * SECTOR, partition.sectors * SECTOR))
}

/// A part of a disk as a file of its own.
pub fn copy_part(disk: &Path, start: u64, bytes: u64, to: &Path) -> Result<()> {
    let mut command = Command::new("dd");
    command.arg(format!("if={}", disk.display())).arg(format!("of={}", to.display()));
    command.args(["bs=1M", "conv=sparse", "status=none", "iflag=skip_bytes,count_bytes"]);
    let status =
        command.arg(format!("skip={start}")).arg(format!("count={bytes}")).status().context("run dd")?;
    ensure!(status.success(), "copy a partition of {}", disk.display());
    Ok(())
}

fn mtools(program: &str, disk: &Path, number: u32) -> Result<Command> {
    let (start, _) = partition_span(disk, number)?;
    let mut command = Command::new(program);
    command.env("MTOOLS_SKIP_CHECK", "1").arg("-i").arg(format!("{}@@{start}", disk.display()));
    Ok(command)
}

pub fn read_file(disk: &Path, number: u32, name: &str) -> Result<String> {
    let output = mtools("mtype", disk, number)?.arg(format!("::{name}")).output().context("run mtype")?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub fn write_file(disk: &Path, number: u32, name: &str, text: &str) -> Result<()> {
    let from = disk.with_extension("edit");
    fs::write(&from, text)?;
    let mut command = mtools("mcopy", disk, number)?;
    let status = command.arg("-o").arg(&from).arg(format!("::{name}")).status().context("run mcopy")?;
    ensure!(status.success(), "write {name} to {}", disk.display());
    Ok(fs::remove_file(&from)?)
}

/// Kernel, initramfs and command line of the slot that the firmware takes.
pub struct Slot {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub command_line: String,
    /// Where the firmware hands one to the kernel.
    pub device_tree: Option<PathBuf>,
}

/// As the Raspberry Pi's firmware reads `autoboot.txt`; the word for one try lies in a file where there is no firmware
/// that keeps it, and goes with being read.
pub fn slot_of(disk: &Path, folder: &Path) -> Result<Slot> {
    let text = read_file(disk, 1, "autoboot.txt")?;
    let is_try = read_file(disk, 1, "tryboot").is_ok();
    if is_try {
        let status = mtools("mdel", disk, 1)?.arg("::tryboot").status().context("run mdel")?;
        ensure!(status.success(), "forget the try");
    }
    let section = if is_try { "[tryboot]" } else { "[all]" };
    let mut lines = text.lines().skip_while(|line| line.trim() != section).skip(1);
    let number = lines.find_map(|line| line.trim().strip_prefix("boot_partition=")?.parse().ok());
    let number: u32 = number.with_context(|| format!("autoboot.txt names no partition in {section}"))?;
    let fetch = |name: &str| -> Result<PathBuf> {
        let to = folder.join(name);
        let status =
            mtools("mcopy", disk, number)?.args(["-n", "-o"]).arg(format!("::{name}")).arg(&to).status()?;
        ensure!(status.success(), "partition {number} has no {name}");
        Ok(to)
    };
    // Boards without the Raspberry Pi's firmware have none.
    let config = read_file(disk, number, "config.txt").unwrap_or_default();
    let mut lines = config.lines().skip_while(|line| line.trim() != "[pi3]").skip(1);
    let device_tree = lines.find_map(|line| line.trim().strip_prefix("device_tree="));
    Ok(Slot {
        device_tree: device_tree.map(fetch).transpose()?,
        kernel: fetch("kernel.img")?,
        initramfs: fetch("initramfs.img")?,
        // The Raspberry Pi's firmware tells the kernel by the device tree.
        command_line: format!("{} tinydc.partition={number}", read_file(disk, number, "cmdline.txt")?.trim()),
    })
}

/// Overwrites the begin of a partition, where its file system is named.
pub fn wipe_partition(disk: &Path, number: u32) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let (start, _) = partition_span(disk, number)?;
    Ok(File::options().write(true).open(disk)?.write_all_at(&[0; 8192], start)?)
}

/// An archive of one container image for several platforms, each with its own program as `/tinydc`: an OCI layout as
/// `docker buildx build --platform … --output type=oci` writes it.
pub fn multi_platform(name: &str, platforms: &[(&str, PathBuf)]) -> Result<Vec<u8>> {
    let mut archive = Layout { tar: tar::Builder::new(Vec::new()) };
    let mut manifests = Vec::new();
    for (architecture, program) in platforms {
        let program = fs::read(program).with_context(|| format!("read {}", program.display()))?;
        let mut layer = tar::Builder::new(Vec::new());
        layer.append_data(&mut header(0o755, &program), "tinydc", program.as_slice())?;
        let layer = archive.blob("application/vnd.oci.image.layer.v1.tar", &layer.into_inner()?)?;
        let config = json!({
            "architecture": architecture, "os": "linux", "config": { "Entrypoint": ["/tinydc", "hello"] },
            "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
        });
        let config = archive.document("application/vnd.oci.image.config.v1+json", &config)?;
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer] });
        let mut described = archive.document(kind, &manifest)?;
        described["platform"] = json!({ "architecture": architecture, "os": "linux" });
        manifests.push(described);
    }
    let kind = "application/vnd.oci.image.index.v1+json";
    let mut top =
        archive.document(kind, &json!({ "schemaVersion": 2, "mediaType": kind, "manifests": manifests }))?;
    top["annotations"] = json!({ "io.containerd.image.name": format!("docker.io/library/{name}") });
    let index = json!({ "schemaVersion": 2, "manifests": [top] });
    archive.file("index.json", index.to_string().as_bytes())?;
    Ok(archive.tar.into_inner()?)
}

/// With every number set: an empty field is no number to a strict reader.
fn header(mode: u32, content: &[u8]) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

struct Layout {
    tar: tar::Builder<Vec<u8>>,
}

impl Layout {
    fn file(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        Ok(self.tar.append_data(&mut header(0o644, bytes), path, bytes)?)
    }

    /// Its descriptor.
    fn blob(&mut self, kind: &str, bytes: &[u8]) -> Result<Value> {
        let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        self.file(&format!("blobs/sha256/{hex}"), bytes)?;
        Ok(json!({ "mediaType": kind, "digest": format!("sha256:{hex}"), "size": bytes.len() }))
    }

    fn document(&mut self, kind: &str, document: &Value) -> Result<Value> {
        self.blob(kind, document.to_string().as_bytes())
    }
}
