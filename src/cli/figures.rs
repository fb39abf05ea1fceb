//! Numbers as people read and write them: sizes, ages, durations, dates.
//!
//! `67108864` ↔ `64 MiB`, `185000 ms` → `3 m`, `5m` → 300 s, RFC 3339 → milliseconds since 1970. No clock.

use std::time::Duration;

/// `512 B`, `1.5 KiB`, `64 MiB`: three digits at most, no trailing zero.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut tenths = u128::from(bytes) * 10;
    while tenths >= 10_240 && unit < UNITS.len() - 1 {
        tenths /= 1024;
        unit += 1;
    }
    match (tenths / 10, tenths % 10) {
        (whole, part) if whole < 10 && part > 0 => format!("{whole}.{part} {}", UNITS[unit]),
        (whole, _) => format!("{whole} {}", UNITS[unit]),
    }
}

/// The largest unit only: `8 s`, `3 m`, `2 h`, `5 d`.
pub fn age(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} m", seconds / 60),
        3600..86_400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Cores from thousandths: `4`, `0.5`, `1.25`.
pub fn cores(millis: u64) -> String {
    let text = format!("{}.{:03}", millis / 1000, millis % 1000);
    text.trim_end_matches('0').trim_end_matches('.').into()
}

/// `90`, `90s`, `5m`, `24h`, `7d`, `1h30m`; a bare number is seconds.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut seconds: u64 = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = match rest.chars().next() {
            None if digits == text.len() => 1,
            Some('s') => 1,
            Some('m') => 60,
            Some('h') => 3600,
            Some('d') => 86_400,
            _ => return None,
        };
        seconds = seconds.checked_add(number.checked_mul(unit)?)?;
        rest = rest.get(1..).unwrap_or("");
    }
    (!text.is_empty()).then(|| Duration::from_secs(seconds))
}

/// `2026-11-24T06:03:00Z`, with or without a fraction, → milliseconds since 1970.
pub fn parse_time_ms(text: &str) -> Option<u64> {
    let number = |range: std::ops::Range<usize>| text.get(range)?.parse::<u64>().ok();
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    if !text.ends_with('Z') || !(1..=12).contains(&month) || year < 1970 {
        return None;
    }
    // Days from 1970-01-01 in the Gregorian calendar, years beginning in March (Howard Hinnant's algorithm).
    let shifted = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = shifted * 365 + shifted / 4 - shifted / 100 + shifted / 400 + day_of_year;
    let seconds = days.checked_sub(719_468)? * 86_400 + hour * 3600 + minute * 60 + second;
    Some(seconds * 1000)
}

/// `3 replicas`, `1 replica`.
pub fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ages_are_short() {
        let sizes = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (64 << 20, "64 MiB"),
            (8_000_000_000, "7.4 GiB"),
            (u64::MAX, "16777215 TiB"),
        ];
        for (bytes, text) in sizes {
            assert_eq!(size(bytes), text);
        }
        let ages = [(999, "0 s"), (8_000, "8 s"), (185_000, "3 m"), (7_300_000, "2 h"), (500_000_000, "5 d")];
        for (ms, text) in ages {
            assert_eq!(age(ms), text);
        }
        assert_eq!([4000, 500, 1250].map(cores), ["4", "0.5", "1.25"]);
    }

    #[test]
    fn durations_are_read_as_people_write_them() {
        let cases = [("90", 90), ("90s", 90), ("5m", 300), ("24h", 86_400), ("7d", 604_800), ("1h30m", 5400)];
        for (text, seconds) in cases {
            assert_eq!(parse_duration(text), Some(Duration::from_secs(seconds)), "{text}");
        }
        for bad in ["", "m", "5x", "5m3", "-1", "99999999999999999999h", "é"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_time_reads_as_it_was_printed() {
        for ms in [0, 951_782_400_000, 1_795_500_180_000, 1_704_067_199_000] {
            assert_eq!(parse_time_ms(&crate::model::Timestamp(ms).to_string()), Some(ms));
        }
        for bad in ["", "2026-11-24", "2026-13-24T06:03:00Z", "äöüäöüäöüäöüäöüäöü"] {
            assert_eq!(parse_time_ms(bad), None, "{bad}");
        }
    }
}
