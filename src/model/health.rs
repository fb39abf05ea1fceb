//! What a machine tells of its own condition: troubles, temperature, and how much its disk has been written.

use serde::{Deserialize, Serialize};

/// Something about a machine that lets it serve worse, or not for long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trouble {
    Hot,
    Throttled,
    UnderVoltage,
    DiskErrors,
    DiskReadOnly,
    NoMemoryLimits,
}

impl Trouble {
    pub const ALL: [Trouble; 6] = [
        Trouble::Hot,
        Trouble::Throttled,
        Trouble::UnderVoltage,
        Trouble::DiskErrors,
        Trouble::DiskReadOnly,
        Trouble::NoMemoryLimits,
    ];

    pub fn code(self) -> &'static str {
        match self {
            Trouble::Hot => "hot",
            Trouble::Throttled => "throttled",
            Trouble::UnderVoltage => "under_voltage",
            Trouble::DiskErrors => "disk_errors",
            Trouble::DiskReadOnly => "disk_read_only",
            Trouble::NoMemoryLimits => "no_memory_limits",
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Trouble::Hot => "heat",
            Trouble::Throttled => "throttling",
            Trouble::UnderVoltage => "low voltage",
            Trouble::DiskErrors => "disk errors",
            Trouble::DiskReadOnly => "a read-only disk",
            Trouble::NoMemoryLimits => "no memory limits",
        }
    }

    /// What it is, and what helps.
    pub fn text(self) -> &'static str {
        match self {
            Trouble::Hot => "its processor is hot: give it air",
            Trouble::Throttled => "its processor is slowed down, by heat or for want of power",
            Trouble::UnderVoltage => {
                "its supply voltage is too low: use a stronger power supply or a shorter cable"
            }
            Trouble::DiskErrors => "its file system has found errors: replace the disk soon",
            Trouble::DiskReadOnly => "its disk takes no writes any more: replace it",
            Trouble::NoMemoryLimits => {
                "its kernel has no memory controller, so memory limits do not hold: add cgroup_enable=memory to its \
                 command line"
            }
        }
    }
}

/// A set of troubles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Troubles(u8);

impl Troubles {
    pub fn set(&mut self, trouble: Trouble, is_there: bool) {
        let bit = 1 << trouble as u8;
        self.0 = if is_there { self.0 | bit } else { self.0 & !bit };
    }

    pub fn has(self, trouble: Trouble) -> bool {
        self.0 & (1 << trouble as u8) != 0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Also those that are in `other`.
    pub fn with(self, other: Troubles) -> Troubles {
        Troubles(self.0 | other.0)
    }

    pub fn iter(self) -> impl Iterator<Item = Trouble> {
        Trouble::ALL.into_iter().filter(move |trouble| self.has(*trouble))
    }
}

/// What has been written to the disk that holds the data directory, by whomever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskWear {
    pub disk_bytes: u64,
    pub written_bytes: u64,
    /// Since midnight, UTC.
    pub written_today_bytes: u64,
    /// How long the machine has run while that was counted.
    pub counted_s: u64,
}

/// Below this the rate says nothing yet.
const COUNTED_S_MIN: u64 = 3600;
const DAY_S: f64 = 86_400.0;

impl DiskWear {
    /// How many days of running are left at the rate so far, of a disk that may be written over `endurance` times.
    pub fn days_left(&self, endurance: u32) -> Option<u64> {
        if self.counted_s < COUNTED_S_MIN || self.disk_bytes == 0 {
            return None;
        }
        let rated = self.disk_bytes as f64 * f64::from(endurance);
        let per_second = self.written_bytes.max(1) as f64 / self.counted_s as f64;
        Some(((rated - self.written_bytes as f64).max(0.0) / per_second / DAY_S) as u64)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineHealth {
    pub troubles: Troubles,
    /// Of its hottest processor sensor.
    pub temperature_celsius: Option<i16>,
    pub disk: Option<DiskWear>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_gives_days() {
        // A card of 32 GB that may be written 300 times, at 1 GB a day: 9.6 TB, of which 0.1 TB are gone.
        let wear = DiskWear {
            disk_bytes: 32_000_000_000,
            written_bytes: 100_000_000_000,
            written_today_bytes: 0,
            counted_s: 100 * 86_400,
        };
        assert_eq!(wear.days_left(300), Some(9500));
        assert_eq!(DiskWear { counted_s: 60, ..wear }.days_left(300), None);
        let worn = DiskWear { written_bytes: 10_000_000_000_000, ..wear };
        assert_eq!(worn.days_left(300), Some(0));
    }

    #[test]
    fn troubles_are_a_set() {
        let mut troubles = Troubles::default();
        for trouble in Trouble::ALL {
            troubles.set(trouble, true);
        }
        troubles.set(Trouble::Hot, false);
        let codes: Vec<_> = troubles.iter().map(Trouble::code).collect();
        assert_eq!(
            codes,
            ["throttled", "under_voltage", "disk_errors", "disk_read_only", "no_memory_limits"]
        );
    }
}
