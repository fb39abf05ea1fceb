//! `healthcheck:` of a service.
//!
//! Input: its mapping. Output: a check with Docker's defaults, or `None` and a problem.

use super::keys::{self, is_neutral, supported};
use super::problem::{Problems, Spot, shortened};
use super::tree::Value;
use super::values;
use crate::model::spec::{HEALTH_INTERVAL_MS, HEALTH_RETRIES, HEALTH_TIMEOUT_MS};
use crate::model::{HealthSpec, HealthTest};

const RETRIES_MAX: u64 = 1000;

pub fn read_health(spot: &Spot<'_>, problems: &mut Problems) -> Option<HealthSpec> {
    let mut health = HealthSpec {
        test: HealthTest::Disabled,
        interval_ms: HEALTH_INTERVAL_MS,
        timeout_ms: HEALTH_TIMEOUT_MS,
        retries: HEALTH_RETRIES,
        start_period_ms: 0,
    };
    let mut test = None;
    let mut is_disabled = false;
    for (key, entry) in supported(spot, keys::HEALTHCHECK, problems) {
        match key {
            "test" => test = Some(read_test(&entry, problems)),
            "disable" => is_disabled = values::boolean(&entry, problems).unwrap_or(false),
            "retries" => {
                if let Some(retries) = values::number(&entry, 0..=RETRIES_MAX, problems) {
                    health.retries = if retries == 0 { HEALTH_RETRIES } else { retries as u32 };
                }
            }
            _ => {
                let Some(duration_ms) = values::duration_ms(&entry, problems) else { continue };
                match key {
                    "start_period" => health.start_period_ms = duration_ms,
                    // 0 stands for the default, as in Docker.
                    _ if duration_ms == 0 => {}
                    "interval" => health.interval_ms = duration_ms,
                    _ => health.timeout_ms = duration_ms,
                }
            }
        }
    }
    if is_disabled {
        return Some(health);
    }
    let Some(test) = test else {
        // `disable: false` alone, as several apps ship it, leaves the image's own check alone.
        let is_empty = spot.entries().all(|(key, entry)| key == "disable" || is_neutral(entry.node));
        if is_empty {
            return None;
        }
        problems.error_with(
            spot,
            "has no `test`, and the times of an image's own check can't be changed yet",
            "write the `test` too, or remove `healthcheck`",
        );
        return None;
    };
    health.test = test?;
    Some(health)
}

fn read_test(spot: &Spot<'_>, problems: &mut Problems) -> Option<HealthTest> {
    if let Value::Scalar(text) = &spot.node.value {
        let is_empty = text.trim().is_empty();
        if is_empty {
            problems.error_with(spot, "is empty", "write the command to run, or `disable: true`");
        }
        return if is_empty { None } else { Some(HealthTest::Shell(text.clone())) };
    }
    let words = values::texts(spot, problems)?;
    match words.first().map(String::as_str) {
        Some("NONE") => Some(HealthTest::Disabled),
        Some("CMD") if words.len() > 1 => Some(HealthTest::Exec(words[1..].to_vec())),
        Some("CMD-SHELL") if words.len() == 2 => Some(HealthTest::Shell(words[1].clone())),
        Some("CMD" | "CMD-SHELL") => {
            problems.error_with(
                spot,
                "is not one command",
                "write [CMD, program, argument…] or [CMD-SHELL, \"line\"]",
            );
            None
        }
        None => {
            problems.error_with(spot, "is empty", "write the command to run, or `disable: true`");
            None
        }
        Some(other) => {
            let message = format_args!("begins with {:?}", shortened(other));
            problems.error_with(spot, message, "begin the list with CMD, CMD-SHELL or NONE");
            None
        }
    }
}
