//! Partition tables, MBR and GPT, as bytes: written for an image, read and grown on a board. Pure.
//!
//! Input: the first sectors of a disk and its size. Output: the partitions, or the sectors to write. Only the last
//! partition ever grows, and it never moves.
//!
//! Invariant: a table that was written reads back, grown or not (`what_is_written_reads_back`,
//! `the_last_partition_grows_to_the_end`).

pub const SECTOR: u64 = 512;
/// Of a GPT: header and 128 entries, at both ends of the disk.
const GPT_SECTORS: u64 = 33;
const GPT_ENTRIES: usize = 128;
const GPT_ENTRY_BYTES: usize = 128;
/// How much of a disk `read` wants to see.
pub const HEAD_BYTES: usize = (GPT_SECTORS as usize + 1) * SECTOR as usize;
/// Partitions end on these, as erase blocks of cards do.
const ALIGNMENT_BYTES: u64 = 4 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// The Raspberry Pi's firmware reads it on all models.
    Mbr,
    /// What a PC's firmware expects.
    Gpt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// FAT that a firmware starts from.
    Boot,
    Linux,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    pub number: u32,
    pub start: u64,
    pub sectors: u64,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    pub scheme: Scheme,
    /// Names the disk.
    pub id: [u8; 16],
    pub partitions: Vec<Partition>,
}

/// Bytes to write at an offset.
pub type Write = (u64, Vec<u8>);

const GUID_BOOT: [u8; 16] =
    guid(0xc12a_7328, 0xf81f, 0x11d2, [0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b]);
const GUID_LINUX: [u8; 16] =
    guid(0x0fc6_3daf, 0x8483, 0x4772, [0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4]);

/// The first three fields are stored little-endian.
const fn guid(first: u32, second: u16, third: u16, rest: [u8; 8]) -> [u8; 16] {
    let (a, b, c) = (first.to_le_bytes(), second.to_le_bytes(), third.to_le_bytes());
    [
        a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], rest[0], rest[1], rest[2], rest[3], rest[4], rest[5],
        rest[6], rest[7],
    ]
}

/// CRC-32 as GPT wants it: the reflected polynomial of Ethernet.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The table in a disk's first `HEAD_BYTES`; `None` when there is none that this reads.
pub fn read(head: &[u8]) -> Option<Table> {
    if head.get(510..512)? != [0x55, 0xaa] {
        return None;
    }
    let is_gpt = (0..4).any(|index| head[446 + index * 16 + 4] == 0xee);
    if is_gpt { read_gpt(head) } else { read_mbr(head) }
}

fn read_mbr(head: &[u8]) -> Option<Table> {
    let mut partitions = Vec::new();
    for index in 0..4usize {
        let entry = &head[446 + index * 16..][..16];
        let (start, sectors) = (u64::from(u32_at(entry, 8)?), u64::from(u32_at(entry, 12)?));
        if entry[4] == 0 || sectors == 0 {
            continue;
        }
        let kind = if entry[4] == 0x83 { Kind::Linux } else { Kind::Boot };
        partitions.push(Partition { number: index as u32 + 1, start, sectors, kind });
    }
    let mut id = [0; 16];
    id[..4].copy_from_slice(&head[440..444]);
    Some(Table { scheme: Scheme::Mbr, id, partitions })
}

fn read_gpt(head: &[u8]) -> Option<Table> {
    let header = head.get(512..512 + 92)?;
    if &header[..8] != b"EFI PART" || u32_at(header, 84)? as usize != GPT_ENTRY_BYTES {
        return None;
    }
    let mut zeroed = header.to_vec();
    zeroed[16..20].fill(0);
    let entries = head.get(1024..1024 + GPT_ENTRIES * GPT_ENTRY_BYTES)?;
    if u32_at(header, 16)? != crc32(&zeroed) || u32_at(header, 88)? != crc32(entries) {
        return None;
    }
    let mut partitions = Vec::new();
    for (index, entry) in entries.chunks_exact(GPT_ENTRY_BYTES).enumerate() {
        let (start, end) = (u64_at(entry, 32)?, u64_at(entry, 40)?);
        if entry[..16] == [0; 16] || end < start {
            continue;
        }
        let kind = if entry[..16] == GUID_BOOT { Kind::Boot } else { Kind::Linux };
        partitions.push(Partition { number: index as u32 + 1, start, sectors: end - start + 1, kind });
    }
    Some(Table { scheme: Scheme::Gpt, id: header[56..72].try_into().ok()?, partitions })
}

impl Table {
    /// The table's sectors for a disk of this size.
    pub fn write(&self, disk_sectors: u64) -> Vec<Write> {
        match self.scheme {
            Scheme::Mbr => vec![(0, self.mbr())],
            Scheme::Gpt => self.gpt(disk_sectors),
        }
    }

    fn mbr(&self) -> Vec<u8> {
        let mut sector = vec![0; SECTOR as usize];
        sector[440..444].copy_from_slice(&self.id[..4]);
        for partition in &self.partitions {
            let entry = &mut sector[446 + (partition.number as usize - 1) * 16..][..16];
            entry[0] = if partition.number == 1 { 0x80 } else { 0 };
            entry[4] = if partition.kind == Kind::Linux { 0x83 } else { 0x0c };
            // Cylinders and heads are not used any more; these values say so.
            entry[1..4].copy_from_slice(&[0xfe, 0xff, 0xff]);
            entry[5..8].copy_from_slice(&[0xfe, 0xff, 0xff]);
            entry[8..12].copy_from_slice(&(partition.start as u32).to_le_bytes());
            entry[12..16].copy_from_slice(&(partition.sectors as u32).to_le_bytes());
        }
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        sector
    }

    fn gpt(&self, disk_sectors: u64) -> Vec<Write> {
        let mut protective = vec![0; SECTOR as usize];
        let covered = u32::try_from(disk_sectors - 1).unwrap_or(u32::MAX);
        protective[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0]);
        protective[458..462].copy_from_slice(&covered.to_le_bytes());
        protective[510..].copy_from_slice(&[0x55, 0xaa]);
        let mut entries = vec![0; GPT_ENTRIES * GPT_ENTRY_BYTES];
        for partition in &self.partitions {
            let entry = &mut entries[(partition.number as usize - 1) * GPT_ENTRY_BYTES..][..GPT_ENTRY_BYTES];
            let kind = if partition.kind == Kind::Boot { GUID_BOOT } else { GUID_LINUX };
            entry[..16].copy_from_slice(&kind);
            // Unique within the disk, whose own id is random.
            entry[16..32].copy_from_slice(&self.id);
            entry[31] ^= partition.number as u8;
            entry[32..40].copy_from_slice(&partition.start.to_le_bytes());
            entry[40..48].copy_from_slice(&(partition.start + partition.sectors - 1).to_le_bytes());
        }
        let last = disk_sectors - 1;
        let first = self.gpt_header((1, last, 2), &entries, last);
        let backup = self.gpt_header((last, 1, last - GPT_SECTORS + 1), &entries, last);
        // The backup first: a cut between the two leaves one that is whole.
        vec![
            ((last - GPT_SECTORS + 1) * SECTOR, entries.clone()),
            (last * SECTOR, backup),
            (2 * SECTOR, entries),
            (SECTOR, first),
            (0, protective),
        ]
    }

    /// `places`: this header's sector, the other's, and where the entries begin.
    fn gpt_header(&self, places: (u64, u64, u64), entries: &[u8], last: u64) -> Vec<u8> {
        let (own, other, entries_at) = places;
        let mut header = vec![0; SECTOR as usize];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..16].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
        for (at, value) in
            [(24, own), (32, other), (40, GPT_SECTORS + 1), (48, last - GPT_SECTORS), (72, entries_at)]
        {
            header[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        header[56..72].copy_from_slice(&self.id);
        header[80..84].copy_from_slice(&(GPT_ENTRIES as u32).to_le_bytes());
        header[84..88].copy_from_slice(&(GPT_ENTRY_BYTES as u32).to_le_bytes());
        header[88..92].copy_from_slice(&crc32(entries).to_le_bytes());
        let crc = crc32(&header[..92]);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        header
    }

    /// Lets partition `number` end where the disk ends, if it is the last one and there is room for more. Returns it.
    pub fn grow(&mut self, number: u32, disk_sectors: u64) -> Option<Partition> {
        let usable = match self.scheme {
            Scheme::Mbr => disk_sectors.min(u64::from(u32::MAX)),
            Scheme::Gpt => disk_sectors.checked_sub(GPT_SECTORS)?,
        };
        let end = usable / (ALIGNMENT_BYTES / SECTOR) * (ALIGNMENT_BYTES / SECTOR);
        let start = self.partitions.iter().find(|one| one.number == number)?.start;
        if self.partitions.iter().any(|one| one.start > start) {
            return None;
        }
        let partition = self.partitions.iter_mut().find(|one| one.number == number)?;
        if end <= partition.start + partition.sectors {
            return None;
        }
        partition.sectors = end - partition.start;
        Some(partition.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(scheme: Scheme) -> Table {
        let partition = |number, start_mib: u64, mib: u64, kind| Partition {
            number,
            start: start_mib * 2048,
            sectors: mib * 2048,
            kind,
        };
        Table {
            scheme,
            id: if scheme == Scheme::Gpt {
                [7; 16]
            } else {
                [7, 7, 7, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
            },
            partitions: vec![
                partition(1, 4, 16, Kind::Boot),
                partition(2, 20, 96, Kind::Boot),
                partition(4, 116, 64, Kind::Linux),
            ],
        }
    }

    fn head(table: &Table, disk_sectors: u64) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        for (at, bytes) in table.write(disk_sectors) {
            assert!(at + bytes.len() as u64 <= disk_sectors * SECTOR, "beyond the end");
            if let Some(place) = head.get_mut(at as usize..at as usize + bytes.len()) {
                place.copy_from_slice(&bytes);
            }
        }
        head
    }

    #[test]
    fn what_is_written_reads_back() {
        for scheme in [Scheme::Mbr, Scheme::Gpt] {
            let table = table(scheme);
            let head = head(&table, 200 * 2048);
            assert_eq!(read(&head), Some(table));
            let mut broken = head;
            broken[511] = 0;
            assert_eq!(read(&broken), None);
        }
        let mut damaged = head(&table(Scheme::Gpt), 200 * 2048);
        damaged[1024 + 40] ^= 1;
        assert_eq!(read(&damaged), None, "a checksum of GPT");
    }

    #[test]
    fn the_last_partition_grows_to_the_end() {
        for scheme in [Scheme::Mbr, Scheme::Gpt] {
            let mut table = table(scheme);
            assert_eq!(table.grow(2, 1000 * 2048), None, "not the last");
            assert_eq!(table.grow(4, 180 * 2048), None, "no room");
            let grown = table.grow(4, 1001 * 2048).unwrap();
            assert_eq!((grown.start + grown.sectors) / 2048, 1000, "a multiple of 4 MiB that fits");
            assert_eq!(read(&head(&table, 1001 * 2048)), Some(table));
        }
    }

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }
}
