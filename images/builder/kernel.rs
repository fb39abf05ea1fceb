//! Kernel, modules and this program as the files of a boot slot.
//!
//! Input: packages and the binary. Output: `kernel.img`, `initramfs.img`, `cmdline.txt`. Only modules that the board
//! names come along, with all that they need; they lie there unpacked, without their signatures and the types that debuggers read,
//! because a board loads some forty at every start and unpacking costs it seconds.

use crate::archive::Archive;
use crate::board::{Board, Firmware};
use crate::packages::Packages;
use crate::{Part, run};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tinydc::boot::BOARD_FOLDER;
use tinydc::boot::modules::{Catalogue, name_of};

pub struct Kernel {
    pub image: PathBuf,
    pub initramfs: PathBuf,
    pub command_line: PathBuf,
    /// The board's name, for the slot.
    pub board: PathBuf,
    pub parts: Vec<Part>,
}

const SIGNATURE_END: &[u8] = b"~Module signature appended~\n";

pub fn prepare(board: &Board, packages: &Packages, binary: &Path, work: &Path) -> Result<Kernel> {
    let modules = packages.modules()?;
    let catalogue = catalogue(packages, &modules)?;
    let chosen = choose(board, packages, &catalogue)?;
    let program = fs::read(binary).with_context(|| format!("read {}", binary.display()))?;
    let mut archive = Archive::new(commit_time()?);
    for folder in ["proc", "sys", "dev", "run", "tmp", "etc", "var/lib"] {
        archive.folder(folder);
    }
    archive.device("dev/console", 5, 1);
    archive.program("init", &program);
    let board_folder = BOARD_FOLDER.trim_start_matches('/');
    archive.file(&format!("{board_folder}/name"), board.title.as_bytes());
    archive.file(&format!("{board_folder}/board"), board.name.as_bytes());
    archive.file(&format!("{board_folder}/modules"), board.load.join("\n").as_bytes());
    let mut module_bytes = 0;
    let below = format!("lib/modules/{}", packages.release);
    for name in &chosen {
        let file = catalogue.file(name).context("a chosen module is in the catalogue")?;
        let body = unpacked(&modules.join(file))?;
        let body = crate::elf::lean(&body).with_context(|| format!("read the module {file}"))?;
        module_bytes += body.len() as u64;
        archive.file(&format!("{below}/{}", plain_name(file)), &body);
    }
    let (dependencies, soft, aliases) = catalogue.texts_of(&chosen, plain_name);
    for (name, text) in [("modules.dep", dependencies), ("modules.softdep", soft), ("modules.alias", aliases)]
    {
        archive.file(&format!("{below}/{name}"), text.as_bytes());
    }
    let plain = work.join("initramfs.cpio");
    fs::write(&plain, archive.finish()).context("write the archive")?;
    let initramfs = work.join("initramfs.img");
    run(Command::new("zstd").args(["-q", "-f", "-19", "-T2", "-o"]).arg(&initramfs).arg(&plain))?;
    let image = kernel_image(board, packages, work)?;
    let command_line = work.join("cmdline.txt");
    fs::write(&command_line, format!("{}\n", board.command_line)).context("write cmdline.txt")?;
    let board_file = work.join("board.txt");
    fs::write(&board_file, format!("{}\n", board.name)).context("write board.txt")?;
    let size = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
    let parts = vec![
        Part { name: "tinydc".into(), bytes: program.len() as u64 },
        Part { name: format!("{} modules", chosen.len()), bytes: module_bytes },
        Part { name: "initramfs.img of both".into(), bytes: size(&initramfs) },
        Part { name: format!("kernel {}", packages.release), bytes: size(&image) },
    ];
    Ok(Kernel { image, initramfs, command_line, board: board_file, parts })
}

/// When the source was last changed: the earliest time that a board can believe.
fn commit_time() -> Result<u32> {
    if let Ok(given) = std::env::var("SOURCE_DATE_EPOCH") {
        return given.trim().parse().context("SOURCE_DATE_EPOCH is a number of seconds");
    }
    let told =
        run(Command::new("git").args(["log", "-1", "--format=%ct"])).context("ask for the commit's time")?;
    String::from_utf8_lossy(&told).trim().parse().context("git tells a number of seconds")
}

/// depmod reads what only the modules know; it is run once for each kernel.
fn catalogue(packages: &Packages, modules: &Path) -> Result<Catalogue> {
    if !modules.join("modules.softdep").exists() {
        // What is built in tells depmod which needs are met.
        for name in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
            let from = packages.find(name)?;
            fs::copy(&from, modules.join(name)).with_context(|| format!("copy {name}"))?;
        }
        let root = modules.ancestors().nth(3).context("modules lie three folders deep")?;
        let depmod = ["/usr/sbin/depmod", "/sbin/depmod"].into_iter().find(|path| Path::new(path).exists());
        let depmod = depmod.context("depmod is missing; install kmod")?;
        run(Command::new(depmod).arg("-b").arg(root).arg(&packages.release))?;
    }
    let text = |name: &str| fs::read_to_string(modules.join(name)).with_context(|| format!("read {name}"));
    Ok(Catalogue::parse(&text("modules.dep")?, &text("modules.softdep")?, &text("modules.alias")?))
}

fn choose(board: &Board, packages: &Packages, catalogue: &Catalogue) -> Result<BTreeSet<String>> {
    let built_in = fs::read_to_string(packages.find("modules.builtin")?).context("read modules.builtin")?;
    let built_in: BTreeSet<String> = built_in.lines().map(name_of).collect();
    let mut names: Vec<String> = Vec::new();
    for wish in board.load.iter().chain(&board.carry) {
        if let Some(folder) = wish.strip_suffix("/**") {
            let below = format!("kernel/{folder}/");
            let inside = catalogue
                .names()
                .filter(|name| catalogue.file(name).is_some_and(|file| file.starts_with(&below)));
            let before = names.len();
            names.extend(inside.map(String::from));
            ensure!(names.len() > before, "board {}: no module lies below {folder}", board.name);
            continue;
        }
        let name = name_of(wish);
        ensure!(
            catalogue.has(&name) || built_in.contains(&name),
            "board {}: kernel {} has no module {wish}",
            board.name,
            packages.release
        );
        names.push(name);
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    Ok(catalogue.order(&names).into_iter().collect())
}

fn plain_name(file: &str) -> String {
    file.trim_end_matches(".xz").to_string()
}

fn unpacked(path: &Path) -> Result<Vec<u8>> {
    let mut body = match path.extension().is_some_and(|ending| ending == "xz") {
        true => run(Command::new("xz").arg("-dc").arg(path))?,
        false => fs::read(path).with_context(|| format!("read {}", path.display()))?,
    };
    if body.ends_with(SIGNATURE_END) {
        // Before the mark: 12 bytes about the signature, of which the last four are its length.
        let end = body.len() - SIGNATURE_END.len();
        let length: [u8; 4] = body[end - 4..end].try_into().context("four bytes")?;
        let start = (end - 12).checked_sub(u32::from_be_bytes(length) as usize);
        body.truncate(start.with_context(|| format!("{} has a broken signature", path.display()))?);
    }
    Ok(body)
}

fn kernel_image(board: &Board, packages: &Packages, work: &Path) -> Result<PathBuf> {
    let image = packages.find(&format!("{}/vmlinuz", packages.release))?;
    // arm64 kernels come unpacked; a PC's unpack themselves, and UEFI starts nothing that is packed.
    if board.architecture != "aarch64" || board.firmware == Firmware::Uefi {
        return Ok(image);
    }
    let packed = work.join("kernel.img");
    let bytes = run(Command::new("gzip").args(["-9", "-n", "-c"]).arg(&image))?;
    fs::write(&packed, bytes).context("write kernel.img")?;
    Ok(packed)
}
