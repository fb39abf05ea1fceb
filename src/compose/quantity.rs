//! Sizes, durations, CPU counts and numbers as Compose writes them, read without floats.
//!
//! Input: text. Output: an exact integer, or why it is none. Fractions are decimal digits, scaled as integers.

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error("{0:?} is not a size: write bytes or a unit such as 64m, 512MiB, 1g")]
    Size(String),
    #[error("{0:?} is not a duration: write it as 30s, 1m30s or 500ms")]
    Duration(String),
    #[error("{0:?} is not a number of CPUs: write it as 0.5 or 2, at most three decimals")]
    Cpus(String),
    #[error("{0:?} is too large")]
    TooLarge(String),
}

/// `64m`, `1gb`, `512MiB`, `1.5g`, plain bytes; all units are powers of 1024, as in Docker.
pub fn parse_bytes(text: &str) -> Result<u64, QuantityError> {
    let refused = || QuantityError::Size(text.to_owned());
    let trimmed = text.trim().to_ascii_lowercase();
    let end = trimmed.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(end);
    let unit = unit.trim();
    let unit = unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(unit);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return Err(refused()),
    };
    scaled(number, 1 << shift).ok_or_else(refused)?.ok_or(QuantityError::TooLarge(text.to_owned()))
}

/// `1m30s`, `1.5s`, `500ms`, `2h`: what Go reads, so each number has a unit. In milliseconds, rounded down.
pub fn parse_duration_ms(text: &str) -> Result<u64, QuantityError> {
    let refused = || QuantityError::Duration(text.to_owned());
    let too_large = || QuantityError::TooLarge(text.to_owned());
    let mut rest = text.trim();
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(refused());
    }
    let mut total_ns: u64 = 0;
    while !rest.is_empty() {
        let end = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.').ok_or_else(refused)?;
        let (number, behind) = rest.split_at(end);
        let unit_end =
            behind.find(|letter: char| letter.is_ascii_digit() || letter == '.').unwrap_or(behind.len());
        let (unit, behind) = behind.split_at(unit_end);
        let unit_ns: u64 = match unit {
            "ns" => 1,
            "us" | "µs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return Err(refused()),
        };
        let part = scaled(number, unit_ns).ok_or_else(refused)?.ok_or_else(too_large)?;
        total_ns = total_ns.checked_add(part).ok_or_else(too_large)?;
        rest = behind;
    }
    Ok(total_ns / 1_000_000)
}

/// `0.5`, `2`, `.25` → thousandths of a CPU.
pub fn parse_cpu_millis(text: &str) -> Result<u64, QuantityError> {
    let refused = || QuantityError::Cpus(text.to_owned());
    let trimmed = text.trim();
    let decimals = trimmed.split_once('.').map_or("", |(_, decimals)| decimals);
    if decimals.trim_end_matches('0').len() > 3 {
        return Err(refused());
    }
    scaled(trimmed, 1000).ok_or_else(refused)?.ok_or(QuantityError::TooLarge(text.to_owned()))
}

/// A decimal number times `unit`, rounded down: outer `None` if it is no number, inner if it doesn't fit.
fn scaled(number: &str, unit: u64) -> Option<Option<u64>> {
    let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
    let is_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if (whole.is_empty() && decimals.is_empty()) || !is_digits(whole) || !is_digits(decimals) {
        return None;
    }
    let whole = if whole.is_empty() { Some(0) } else { whole.parse::<u64>().ok() };
    // Eighteen decimals fit a u64; what stands behind them is less than one of any unit.
    let decimals: String = decimals.chars().take(18).collect();
    let power = 10u128.pow(decimals.len() as u32);
    let decimals = if decimals.is_empty() { 0 } else { decimals.parse::<u128>().ok()? };
    let fraction = decimals * u128::from(unit) / power;
    Some(whole.and_then(|whole| whole.checked_mul(unit)?.checked_add(u64::try_from(fraction).ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        let cases = [
            ("64m", 64 << 20),
            ("1gb", 1 << 30),
            ("512MiB", 512 << 20),
            ("1024", 1024),
            ("1.5g", 3 << 29),
            ("10 kb", 10_240),
            ("7b", 7),
            ("0", 0),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "m", "12q", "1.2.3m", "-1m", "lots", "ib", "1e3"] {
            assert!(matches!(parse_bytes(text), Err(QuantityError::Size(_))), "{text}");
        }
        assert!(matches!(parse_bytes("99999999p"), Err(QuantityError::TooLarge(_))));
        assert!(matches!(parse_bytes("99999999999999999999"), Err(QuantityError::TooLarge(_))));
    }

    #[test]
    fn durations_are_gos() {
        let cases =
            [("1m30s", 90_000), ("1.5s", 1500), ("500ms", 500), ("2h", 7_200_000), ("0", 0), ("1us", 0)];
        for (text, expected) in cases {
            assert_eq!(parse_duration_ms(text), Ok(expected), "{text}");
        }
        for text in ["", "30", "s", "1d", "1 s", "-1s", "1m30"] {
            assert!(parse_duration_ms(text).is_err(), "{text}");
        }
        assert!(matches!(parse_duration_ms("99999999999h"), Err(QuantityError::TooLarge(_))));
    }

    #[test]
    fn cpus_are_exact() {
        let cases = [("0.5", 500), ("1", 1000), (".25", 250), ("0.1", 100), ("2.50", 2500), ("0.001", 1)];
        for (text, expected) in cases {
            assert_eq!(parse_cpu_millis(text), Ok(expected), "{text}");
        }
        for text in ["", ".", "0.0001", "half", "-1", "1,5", "1e1"] {
            assert!(parse_cpu_millis(text).is_err(), "{text}");
        }
    }
}
