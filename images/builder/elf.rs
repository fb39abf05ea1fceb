//! Kernel modules without what only debuggers and BPF programs read.
//!
//! Input: a relocatable ELF file of 64 bits, little endian. Output: the same without the content of some sections.
//! Sections keep their numbers, by which relocations and symbols name them.

use anyhow::{Context, Result, ensure};

const HEADER_BYTES: usize = 64;
const SECTION_BYTES: usize = 64;
const TYPE_NULL: u32 = 0;
const TYPE_NO_BITS: u32 = 8;
/// The types of all that a module defines: a third of it. The kernel reads and keeps them at every start.
const UNWANTED: [&[u8]; 2] = [b".BTF", b".BTF.base"];

fn number(bytes: &[u8], at: usize, length: usize) -> Result<usize> {
    let part = bytes.get(at..at + length).with_context(|| format!("it ends before byte {}", at + length))?;
    Ok(part.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte)))
}

fn put(bytes: &mut [u8], at: usize, length: usize, value: usize) {
    bytes[at..at + length].copy_from_slice(&(value as u64).to_le_bytes()[..length]);
}

pub fn lean(module: &[u8]) -> Result<Vec<u8>> {
    ensure!(module.starts_with(b"\x7fELF\x02\x01"), "it is no ELF file of 64 bits, little endian");
    let (table, count) = (number(module, 40, 8)?, number(module, 60, 2)?);
    ensure!(number(module, 58, 2)? == SECTION_BYTES, "its sections are described in another way");
    let mut sections =
        module.get(table..table + count * SECTION_BYTES).context("its table of sections")?.to_vec();
    let names = table + number(module, 62, 2)? * SECTION_BYTES;
    let names = number(module, names + 24, 8)?;

    let mut out = module[..HEADER_BYTES].to_vec();
    for section in sections.chunks_exact_mut(SECTION_BYTES) {
        let name = module.get(names + number(section, 0, 4)?..).context("a section's name")?;
        if UNWANTED
            .iter()
            .any(|unwanted| name.strip_prefix(*unwanted).is_some_and(|rest| rest.first() == Some(&0)))
        {
            section.fill(0);
            continue;
        }
        let kind = number(section, 4, 4)? as u32;
        let (from, length) = (number(section, 24, 8)?, number(section, 32, 8)?);
        if kind == TYPE_NULL {
            continue;
        }
        out.resize(out.len().next_multiple_of(number(section, 48, 8)?.max(1)), 0);
        put(section, 24, 8, out.len());
        if kind != TYPE_NO_BITS {
            out.extend_from_slice(module.get(from..from + length).context("a section's content")?);
        }
    }
    out.resize(out.len().next_multiple_of(8), 0);
    let table = out.len();
    put(&mut out, 40, 8, table);
    out.extend_from_slice(&sections);
    Ok(out)
}
