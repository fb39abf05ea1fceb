//! Builds the image of a board: one binary, a kernel from Debian, and what differs per board, into a partitioned disk.
//!
//! Input: `board/NAME/board.toml`, a static binary, Debian's packages (cached below `target/`). Output: `FILE.img.zst`,
//! its block map, its checksum, and a table of what takes the room. Needs no root, mounts nothing.
//!
//! Invariant: the same inputs give the same bytes, apart from a token that was asked for.

mod archive;
mod board;
mod disk;
mod elf;
mod kernel;
mod packages;

use anyhow::{Context, Result, bail, ensure};
use board::Board;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

const COMPRESSED_BYTES_MAX: u64 = 64 << 20;

struct Options {
    board: String,
    binary: PathBuf,
    output: PathBuf,
    config: Option<PathBuf>,
    token: Option<String>,
    /// The plain image too, for guests.
    keeps_plain: bool,
}

const USAGE: &str = "usage: images/build BOARD [-o FILE] [--config tinydc.toml] [--token TOKEN] [--plain]";

fn main() -> ExitCode {
    match options().and_then(|options| build(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options> {
    let mut words = std::env::args().skip(1);
    let (mut board, mut binary, mut output, mut config, mut token) = (None, None, None, None, None);
    let mut keeps_plain = false;
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value\n{USAGE}"));
        match word.as_str() {
            "-o" => output = Some(PathBuf::from(value()?)),
            "--binary" => binary = Some(PathBuf::from(value()?)),
            "--config" => config = Some(PathBuf::from(value()?)),
            "--token" => token = Some(value()?),
            "--plain" => keeps_plain = true,
            name if !name.starts_with('-') && board.is_none() => board = Some(name.to_string()),
            other => bail!("{other} is not understood\n{USAGE}"),
        }
    }
    let board = board.with_context(|| format!("which board? {}\n{USAGE}", board::names().join(", ")))?;
    let output = output.unwrap_or_else(|| PathBuf::from(format!("target/images/tinydc-{board}.img.zst")));
    Ok(Options {
        binary: binary.context("--binary names the static binary")?,
        board,
        output,
        config,
        token,
        keeps_plain,
    })
}

/// Runs a tool and shows what it said only when it fails.
pub fn run(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {name}"))?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(output.stdout)
}

/// A part of the image, for the table at the end.
pub struct Part {
    pub name: String,
    pub bytes: u64,
}

fn build(options: &Options) -> Result<()> {
    let board = Board::read(&options.board)?;
    let work = PathBuf::from("target/images/work").join(&options.board);
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("empty {}", work.display()))?;
    }
    fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
    let packages = packages::fetch(&board)?;
    let kernel = kernel::prepare(&board, &packages, &options.binary, &work)?;
    let settings = settings_text(options)?;
    let files = board.boot_files(&packages, &kernel)?;
    let plain = work.join("disk.img");
    let mut parts = disk::build(&board, &files, &settings, &work, &plain)?;
    parts.splice(0..0, kernel.parts);
    finish(options, &board, &plain, &parts)?;
    fs::remove_dir_all(&work).with_context(|| format!("remove {}", work.display()))
}

/// What stands in `tinydc.toml` on the card.
fn settings_text(options: &Options) -> Result<String> {
    let mut text = match &options.config {
        Some(path) => fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?,
        None => include_str!("tinydc.toml").to_string(),
    };
    if let Some(token) = &options.token {
        ensure!(
            token.starts_with("tdc-join-"),
            "{token:?} is no join token; `tinydc token` on a node prints one"
        );
        // At the top: below a [table] it would belong to that.
        text = format!("join = \"{token}\"\n\n{text}");
    }
    if let Err(problem) = tinydc::boot::settings::parse(&text) {
        bail!("{problem}");
    }
    Ok(text)
}

fn finish(options: &Options, board: &Board, plain: &Path, parts: &[Part]) -> Result<()> {
    let output = &options.output;
    if let Some(folder) = output.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let map = output.with_extension("bmap");
    disk::write_block_map(plain, &map)?;
    run(Command::new("zstd").args(["-q", "-f", "-T2", "-12", "-o"]).arg(output).arg(plain))?;
    if options.keeps_plain {
        let kept = output.with_extension("");
        fs::rename(plain, &kept).with_context(|| format!("keep {}", kept.display()))?;
    }
    let sum = disk::sha256(output)?;
    let name = output.file_name().context("the output is a file")?.to_string_lossy().into_owned();
    let sum_path = PathBuf::from(format!("{}.sha256", output.display()));
    fs::write(&sum_path, format!("{sum}  {name}\n"))
        .with_context(|| format!("write {}", sum_path.display()))?;
    let bytes = fs::metadata(output).context("look at the image")?.len();
    println!("{} for {}", output.display(), board.title);
    for part in parts {
        println!("  {:<28} {:>8.2} MiB", part.name, part.bytes as f64 / 1_048_576.0);
    }
    println!(
        "  {:<28} {:>8.2} MiB (at most {})",
        "compressed",
        bytes as f64 / 1_048_576.0,
        COMPRESSED_BYTES_MAX >> 20
    );
    println!("  sha256 {sum}");
    ensure!(bytes <= COMPRESSED_BYTES_MAX, "the image is larger than {} MiB", COMPRESSED_BYTES_MAX >> 20);
    Ok(())
}
