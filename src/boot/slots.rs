//! Which boot slot is taken, which one is tried, and what `autoboot.txt` says of it. Pure.
//!
//! The Raspberry Pi's firmware reads that file: `[all]` names the slot of every start, `[tryboot]` the one of a single
//! start that was asked for. A slot that proves itself is made the usual one by exchanging the two numbers; one that
//! does not is left by any restart.
//!
//! Invariant: text that was written reads back, and exchanging twice changes nothing (`numbers_are_exchanged`).

pub const FILE: &str = "autoboot.txt";
/// Where no firmware keeps the word for one try: a file on the first partition, which goes with being read.
pub const TRY_FILE: &str = "tryboot";
/// A slot on trial must have a daemon that answers within this.
pub const WINDOW_MS: u64 = 300_000;
/// And for this long without a break.
pub const STEADY_MS: u64 = 20_000;

/// Numbers of partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    pub usual: u32,
    pub trial: u32,
}

impl Slots {
    pub fn parse(text: &str) -> Option<Slots> {
        let (mut section, mut usual, mut trial) = ("[all]", None, None);
        for line in text.lines().map(str::trim) {
            if line.starts_with('[') {
                section = line;
            } else if let Some(number) = line.strip_prefix("boot_partition=") {
                let number = number.trim().parse().ok()?;
                match section {
                    "[all]" => usual = Some(number),
                    "[tryboot]" => trial = Some(number),
                    _ => {}
                }
            }
        }
        let slots = Slots { usual: usual?, trial: trial? };
        (slots.usual != slots.trial).then_some(slots)
    }

    pub fn text(self) -> String {
        let Slots { usual, trial } = self;
        format!("[all]\ntryboot_a_b=1\nboot_partition={usual}\n[tryboot]\nboot_partition={trial}\n")
    }

    pub fn exchanged(self) -> Slots {
        Slots { usual: self.trial, trial: self.usual }
    }
}

/// On the first partition: what the board had when its other slot was written.
pub const STANDING_FILE: &str = "trial.txt";
pub const MEMBER: &str = "a member of a cluster";
pub const ON_DISK: &str = "on disk";

/// What a board has beside a daemon that answers. A slot on trial is to have what the board had before: a kernel that finds
/// neither disk nor network makes one that answers itself, and nobody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    pub has_data_disk: bool,
    pub has_address: bool,
    pub is_member: bool,
}

impl Standing {
    /// From the report's lines.
    pub fn parse(report: &str) -> Standing {
        let value = |key: &str| report.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
        Standing {
            has_data_disk: value("data") == Some(ON_DISK),
            // With its length.
            has_address: value("address").is_some_and(|text| text.contains('/')),
            is_member: value("daemon") == Some(MEMBER),
        }
    }

    /// What is missing beside what there was.
    pub fn lack(self, before: Standing) -> Option<&'static str> {
        if before.has_data_disk && !self.has_data_disk {
            Some("finds no disk for its data")
        } else if before.has_address && !self.has_address {
            Some("gets no address")
        } else if before.is_member && !self.is_member {
            Some("is no member of its cluster")
        } else {
            None
        }
    }
}

/// What a start from the slot on trial has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Wait,
    Keep,
    GoBack,
}

/// `since_start_ms`: of the supervisor; `well_ms`: how long the daemon has answered without a break, if it does.
pub fn judge(since_start_ms: u64, well_ms: Option<u64>, window_ms: u64) -> Verdict {
    match well_ms {
        Some(well_ms) if well_ms >= STEADY_MS => Verdict::Keep,
        _ if since_start_ms >= window_ms => Verdict::GoBack,
        _ => Verdict::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_exchanged() {
        let slots = Slots { usual: 2, trial: 3 };
        assert_eq!(Slots::parse(&slots.text()), Some(slots));
        assert_eq!(slots.exchanged().exchanged(), slots);
        let written = Slots::parse(&slots.exchanged().text()).unwrap();
        assert_eq!((written.usual, written.trial), (3, 2));
        for broken in
            ["", "[all]\nboot_partition=2\n", "[all]\nboot_partition=2\n[tryboot]\nboot_partition=2\n"]
        {
            assert_eq!(Slots::parse(broken), None, "{broken}");
        }
    }

    #[test]
    fn a_slot_lacks_what_the_board_had_before() {
        let report = "name: pi1\naddress: eth0 10.0.0.5/24\ndaemon: a member of a cluster\ndata: on disk\n[   1.2] ok\n";
        let before = Standing::parse(report);
        assert_eq!(before, Standing { has_data_disk: true, has_address: true, is_member: true });
        assert_eq!(before.lack(before), None);
        let now = |from: &str, to: &str| Standing::parse(&report.replace(from, to)).lack(before);
        assert_eq!(now("on disk", "IN MEMORY, lost at the next start"), Some("finds no disk for its data"));
        assert_eq!(now("10.0.0.5/24", "no address yet"), Some("gets no address"));
        assert_eq!(
            now("a member of a cluster", "belongs to no cluster yet"),
            Some("is no member of its cluster")
        );
        let bare = Standing { has_data_disk: false, has_address: false, is_member: false };
        assert_eq!(before.lack(bare), None);
        assert_eq!(bare.lack(bare), None);
    }

    #[test]
    fn a_slot_is_kept_when_its_daemon_is_steady_within_the_window() {
        assert_eq!(judge(1_000, None, WINDOW_MS), Verdict::Wait);
        assert_eq!(judge(30_000, Some(STEADY_MS - 1), WINDOW_MS), Verdict::Wait);
        assert_eq!(judge(30_000, Some(STEADY_MS), WINDOW_MS), Verdict::Keep);
        assert_eq!(judge(WINDOW_MS, Some(5), WINDOW_MS), Verdict::GoBack);
        assert_eq!(judge(WINDOW_MS, None, WINDOW_MS), Verdict::GoBack);
    }
}
