//! Container images made on the spot: of the running binary, or of any program, with the libraries it needs.

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// An image whose command is the `hello` server in the running binary, as `docker save` would write it.
pub fn hello_image(name: &str) -> Result<Vec<u8>> {
    let own = std::env::current_exe().context("find the running binary")?;
    image_of(name, &own, &["/tinydc".into(), "hello".into()], &[])
}

/// An image with `program` as `/tinydc`, its loader and its libraries, and further files as `(path, content, mode)`.
pub fn image_of(
    name: &str,
    program: &Path,
    command: &[String],
    files: &[(&str, &[u8], u32)],
) -> Result<Vec<u8>> {
    let bytes = fs::read(program).with_context(|| format!("read {}", program.display()))?;
    let mut layer = tar::Builder::new(Vec::new());
    let mut folders = BTreeSet::new();
    for path in libraries_of(&bytes)? {
        let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        add_folders(&mut layer, &path, &mut folders)?;
        add_file(&mut layer, &path, &content, 0o755)?;
    }
    add_file(&mut layer, Path::new("/tinydc"), &bytes, 0o755)?;
    for (path, content, mode) in files {
        add_folders(&mut layer, Path::new(path), &mut folders)?;
        add_file(&mut layer, Path::new(path), content, *mode)?;
    }
    let layer = layer.into_inner()?;
    let config = serde_json::json!({
        "architecture": crate::model::Architecture::own().oci_name(),
        "os": "linux",
        "config": { "Entrypoint": command, "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", hex(&layer))] },
    })
    .to_string();
    let config_name = format!("{}.json", hex(config.as_bytes()));
    let manifest =
        serde_json::json!([{ "Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"] }]);
    let mut archive = tar::Builder::new(Vec::new());
    add_file(&mut archive, Path::new("layer.tar"), &layer, 0o644)?;
    add_file(&mut archive, Path::new(&config_name), config.as_bytes(), 0o644)?;
    add_file(&mut archive, Path::new("manifest.json"), manifest.to_string().as_bytes(), 0o644)?;
    Ok(archive.into_inner()?)
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// With every number set: an empty field is no number to a strict reader.
fn header(mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn add_file(archive: &mut tar::Builder<Vec<u8>>, path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let mut header = header(mode);
    header.set_size(content.len() as u64);
    let inside = path.strip_prefix("/").unwrap_or(path);
    Ok(archive.append_data(&mut header, inside, content)?)
}

fn add_folders(
    archive: &mut tar::Builder<Vec<u8>>,
    path: &Path,
    known: &mut BTreeSet<PathBuf>,
) -> Result<()> {
    let mut parents: Vec<&Path> =
        path.ancestors().skip(1).filter(|parent| parent.parent().is_some()).collect();
    parents.reverse();
    for parent in parents {
        if known.insert(parent.into()) {
            let mut header = header(0o755);
            header.set_entry_type(tar::EntryType::Directory);
            archive.append_data(&mut header, parent.strip_prefix("/").unwrap_or(parent), std::io::empty())?;
        }
    }
    Ok(())
}

/// The loader that an ELF file names, and the libraries that this process has mapped: a program built beside it needs
/// the same.
fn libraries_of(bytes: &[u8]) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let Some(loader) = interpreter(bytes) else { return Ok(found) };
    found.insert(PathBuf::from(loader));
    let maps = fs::read_to_string("/proc/self/maps")?;
    let mapped = maps.lines().filter_map(|line| line.find('/').map(|start| &line[start..]));
    found.extend(mapped.filter(|path| path.contains(".so")).map(PathBuf::from));
    Ok(found)
}

/// PT_INTERP of a 64-bit little-endian ELF file.
fn interpreter(bytes: &[u8]) -> Option<String> {
    const PT_INTERP: u32 = 3;
    let number = |at: usize, length: usize| -> Option<u64> {
        let mut value = [0; 8];
        value[..length].copy_from_slice(bytes.get(at..at + length)?);
        Some(u64::from_le_bytes(value))
    };
    if bytes.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (table, size, count) = (number(32, 8)? as usize, number(54, 2)? as usize, number(56, 2)? as usize);
    (0..count).find_map(|index| {
        let at = table + index * size;
        (number(at, 4)? as u32 == PT_INTERP).then_some(())?;
        let (start, length) = (number(at + 8, 8)? as usize, number(at + 32, 8)? as usize);
        let text = bytes.get(start..start + length.checked_sub(1)?)?;
        String::from_utf8(text.to_vec()).ok()
    })
}
