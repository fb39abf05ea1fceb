//! `deploy:` of a service, and the older keys that say the same.
//!
//! Input: their places. Output: replicas, resources, placement and the restart policy in the service that is read.

use super::keys::{self, supported};
use super::problem::{Problems, Spot, shortened};
use super::service::ServiceReader;
use super::values::{self, settle};
use crate::model::limits::REPLICAS_MAX;
use crate::model::{Constraint, ConstraintSubject, ResourceSpec, RestartPolicy};

/// As Docker: below it a container can't start.
const MEMORY_BYTES_MIN: u64 = 6 << 20;
const CONSTRAINTS_MAX: usize = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Replicated,
    Global,
}

/// What `deploy.resources` and the older keys say; two that contradict each other are named.
#[derive(Default)]
pub struct Amounts {
    resources: ResourceSpec,
    pub restart: Option<RestartPolicy>,
}

impl Amounts {
    pub fn limit_cpus(&mut self, spot: &Spot<'_>, problems: &mut Problems) {
        // 0 is "no limit" in Docker.
        if let Some(millis) = values::cpu_millis(spot, problems).filter(|millis| *millis > 0) {
            settle(&mut self.resources.cpu_millis_max, millis, spot, problems);
        }
    }

    pub fn limit_memory(&mut self, spot: &Spot<'_>, problems: &mut Problems) {
        let Some(bytes) = values::bytes(spot, problems).filter(|bytes| *bytes > 0) else { return };
        if bytes < MEMORY_BYTES_MIN {
            let message = format_args!("{bytes} bytes are too few: a container needs at least 6m to start");
            problems.error_with(spot, message, "write a unit, such as 64m");
            return;
        }
        settle(&mut self.resources.memory_bytes_max, bytes, spot, problems);
    }

    pub fn reserve_memory(&mut self, spot: &Spot<'_>, problems: &mut Problems) {
        if let Some(bytes) = values::bytes(spot, problems).filter(|bytes| *bytes > 0) {
            settle(&mut self.resources.reserved_memory_bytes, bytes, spot, problems);
        }
    }

    pub fn limit_pids(&mut self, spot: &Spot<'_>, problems: &mut Problems) {
        // -1 and 0 are "no limit" in Docker.
        if spot.node.scalar() == Some("-1") {
            return;
        }
        if let Some(count) =
            values::number(spot, 0..=u64::from(u32::MAX), problems).filter(|count| *count > 0)
        {
            settle(&mut self.resources.pids_max, count, spot, problems);
        }
    }

    fn reserve_cpus(&mut self, spot: &Spot<'_>, problems: &mut Problems) {
        if let Some(millis) = values::cpu_millis(spot, problems) {
            settle(&mut self.resources.reserved_cpu_millis, millis, spot, problems);
        }
    }

    /// The amounts, if no limit is below its reservation.
    pub fn settled(&self, service: &Spot<'_>, problems: &mut Problems) -> ResourceSpec {
        let found = &self.resources;
        let pairs = [
            ("memory", found.memory_bytes_max, found.reserved_memory_bytes, "bytes"),
            ("CPU", found.cpu_millis_max, found.reserved_cpu_millis, "thousandths"),
        ];
        for (what, limit, reserved, unit) in pairs {
            let (Some(limit), Some(reserved)) = (limit, reserved) else { continue };
            if limit < reserved {
                let message =
                    format_args!("its {what} limit ({limit} {unit}) is below what it reserves ({reserved})");
                problems.error_with(service, message, "raise the limit or reserve less");
            }
        }
        found.clone()
    }
}

pub fn read_deploy(reader: &mut ServiceReader, spot: &Spot<'_>, problems: &mut Problems) {
    for (key, entry) in supported(spot, keys::DEPLOY, problems) {
        match key {
            "mode" => reader.mode = read_mode(&entry, problems),
            "replicas" => {
                if let Some(count) = values::number(&entry, 0..=u64::from(REPLICAS_MAX), problems) {
                    settle(&mut reader.replicas, count as u32, &entry, problems);
                }
            }
            "resources" => read_resources(&mut reader.amounts, &entry, problems),
            "placement" => read_placement(reader, &entry, problems),
            "restart_policy" => {
                if let Some(policy) = read_restart_policy(&entry, problems) {
                    reader.amounts.restart = Some(policy);
                }
            }
            _ => match values::text(&entry, problems) {
                None | Some("vip") => {}
                Some(other) => {
                    let message = format_args!("{:?} is not supported", shortened(other));
                    problems.error_with(
                        &entry,
                        message,
                        "remove it: a service has one address for all instances",
                    );
                }
            },
        }
    }
}

fn read_mode(spot: &Spot<'_>, problems: &mut Problems) -> Option<Mode> {
    match values::text(spot, problems)? {
        "replicated" => Some(Mode::Replicated),
        "global" => Some(Mode::Global),
        "replicated-job" | "global-job" => {
            problems.error_with(spot, "jobs are not run yet", "write replicated or global");
            None
        }
        other => {
            let message = format_args!("{:?} is not a mode", shortened(other));
            problems.error_with(spot, message, "write replicated or global");
            None
        }
    }
}

fn read_resources(amounts: &mut Amounts, spot: &Spot<'_>, problems: &mut Problems) {
    for (group, inner) in supported(spot, keys::RESOURCES, problems) {
        for (key, entry) in supported(&inner, keys::AMOUNTS, problems) {
            match (group, key) {
                ("limits", "cpus") => amounts.limit_cpus(&entry, problems),
                ("limits", "memory") => amounts.limit_memory(&entry, problems),
                ("limits", _) => amounts.limit_pids(&entry, problems),
                (_, "cpus") => amounts.reserve_cpus(&entry, problems),
                (_, "memory") => amounts.reserve_memory(&entry, problems),
                _ => problems.ignored(&entry, "processes are only limited, not reserved"),
            }
        }
    }
}

fn read_restart_policy(spot: &Spot<'_>, problems: &mut Problems) -> Option<RestartPolicy> {
    let mut attempts_max = None;
    let mut condition = "any";
    let mut condition_spot = spot.clone();
    for (key, entry) in supported(spot, keys::RESTART_POLICY, problems) {
        if key == "condition" {
            condition = values::text(&entry, problems)?;
            condition_spot = entry;
        } else {
            let attempts = values::number(&entry, 0..=u64::from(u32::MAX), problems);
            attempts_max = attempts.map(|attempts| attempts as u32).filter(|attempts| *attempts > 0);
        }
    }
    match condition {
        "none" => Some(RestartPolicy::No),
        "on-failure" => Some(RestartPolicy::OnFailure { attempts_max }),
        "any" | "" => {
            if attempts_max.is_some() {
                let hint = "write `condition: on-failure`";
                problems.warning_with(spot, "`max_attempts` counts only failures", hint);
            }
            Some(RestartPolicy::Always)
        }
        other => {
            let message = format_args!("{:?} is not a condition", shortened(other));
            problems.error_with(&condition_spot, message, "write none, on-failure or any");
            None
        }
    }
}

fn read_placement(reader: &mut ServiceReader, spot: &Spot<'_>, problems: &mut Problems) {
    for (key, entry) in supported(spot, keys::PLACEMENT, problems) {
        match key {
            "constraints" => {
                for item in values::one_or_more(&entry, problems).iter().take(CONSTRAINTS_MAX) {
                    let constraint = read_constraint(item, problems);
                    reader.spec.placement.constraints.extend(constraint);
                }
                if entry.node.items().len() > CONSTRAINTS_MAX {
                    problems.error(&entry, format_args!("has more than {CONSTRAINTS_MAX} constraints"));
                }
            }
            "preferences" => {
                for item in values::one_or_more(&entry, problems) {
                    reader.spec.placement.spread_over.extend(read_preference(&item, problems));
                }
            }
            _ => {
                // 0 is "no bound", as in Docker.
                let count = values::number(&entry, 0..=u64::from(REPLICAS_MAX), problems);
                reader.spec.placement.instances_per_node_max =
                    count.map(|count| count as u32).filter(|count| *count > 0);
            }
        }
    }
}

const CONSTRAINT_HINT: &str =
    "write node.labels.KEY == VALUE, node.hostname != NAME or node.platform.arch == arm64";

fn read_constraint(spot: &Spot<'_>, problems: &mut Problems) -> Option<Constraint> {
    let text = values::word(spot, problems)?;
    let split = text
        .split_once("==")
        .map(|(subject, value)| (subject, true, value))
        .or_else(|| text.split_once("!=").map(|(subject, value)| (subject, false, value)));
    let Some((subject, must_equal, value)) = split else {
        problems.error_with(spot, format_args!("{:?} is not a constraint", shortened(text)), CONSTRAINT_HINT);
        return None;
    };
    let (subject, value) = (subject.trim(), value.trim());
    if value.is_empty() {
        problems.error_with(spot, format_args!("{:?} has no value", shortened(text)), CONSTRAINT_HINT);
        return None;
    }
    let subject = match subject {
        "node.hostname" => ConstraintSubject::NodeName,
        "node.id" => ConstraintSubject::NodeId,
        "node.platform.arch" => ConstraintSubject::Architecture,
        // Every node runs Linux.
        "node.platform.os" if (value == "linux") == must_equal => return None,
        "node.role" => {
            let hint = "label the nodes and write node.labels.KEY == VALUE";
            problems.error_with(spot, "nodes have no roles to choose from: tinydc picks the voters", hint);
            return None;
        }
        _ => match subject.strip_prefix("node.labels.") {
            Some(key) if !key.is_empty() => ConstraintSubject::Label(key.to_owned()),
            _ => {
                let message = format_args!("{:?} is not known of nodes", shortened(subject));
                problems.error_with(spot, message, CONSTRAINT_HINT);
                return None;
            }
        },
    };
    Some(Constraint { subject, must_equal, value: value.to_owned() })
}

fn read_preference(spot: &Spot<'_>, problems: &mut Problems) -> Option<String> {
    let spread = spot.entries().find(|(key, _)| *key == "spread").map(|(_, entry)| entry);
    let label = spread.as_ref().and_then(|entry| entry.node.scalar()?.strip_prefix("node.labels."));
    if label.is_none_or(str::is_empty) || spot.node.entries().len() > 1 {
        problems.error_with(spot, "is not a preference", "write `spread: node.labels.KEY`");
        return None;
    }
    label.map(str::to_owned)
}
