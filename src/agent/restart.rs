//! When a container that ended is started again. Pure: time is passed in.
//!
//! At once, then after 1 s, doubling to 60 s; anew after 60 s of steady running. Three exits within 60 s make the
//! instance `Failing` until it has run 60 s.

use crate::model::{Exit, Mono, Phase, RestartPolicy};
use std::collections::VecDeque;

const BACKOFF_MS_MAX: u64 = 60_000;
const STEADY_MS: u64 = 60_000;
const FAILING_EXITS: usize = 3;
const FAILING_WITHIN_MS: u64 = 60_000;

#[derive(Clone, Debug, Default)]
pub struct Restarts {
    /// Times of the last exits, newest last.
    exits: VecDeque<Mono>,
    /// Since the instance began on this daemon's watch.
    pub count: u32,
    backoff_ms: u64,
    pub not_before: Mono,
    started_at: Option<Mono>,
    pub is_failing: bool,
    /// Set when it will not be started again.
    pub ended: Option<Phase>,
    pub last_exit: Option<Exit>,
}

impl Restarts {
    pub fn started(&mut self, now: Mono) {
        self.started_at = Some(now);
    }

    /// A run that was under way when this daemon started counts from then.
    pub fn is_running(&self) -> bool {
        self.started_at.is_some()
    }

    /// It could not be made or started: tried again under every policy, because an image may be on its way; no
    /// attempt of the policy is spent.
    pub fn not_started(&mut self, why: String, now: Mono) {
        let count = self.count;
        self.exited(Exit::NotStarted(why), RestartPolicy::Always, now);
        self.count = count;
    }

    pub fn exited(&mut self, exit: Exit, policy: RestartPolicy, now: Mono) {
        let was_steady = self.started_at.take().is_some_and(|at| now.since_ms(at) >= STEADY_MS);
        if was_steady {
            self.backoff_ms = 0;
            self.exits.clear();
            self.is_failing = false;
        }
        self.exits.push_back(now);
        while self.exits.len() > FAILING_EXITS {
            self.exits.pop_front();
        }
        let spread_ms = self.exits.front().map_or(u64::MAX, |first| now.since_ms(*first));
        self.is_failing |= self.exits.len() == FAILING_EXITS && spread_ms <= FAILING_WITHIN_MS;
        self.ended = match policy {
            RestartPolicy::Always | RestartPolicy::UnlessStopped => None,
            RestartPolicy::No => Some(end_of(&exit)),
            RestartPolicy::OnFailure { .. } if exit.is_success() => Some(Phase::Completed),
            RestartPolicy::OnFailure { attempts_max } => {
                attempts_max.is_some_and(|max| self.count >= max).then_some(Phase::Stopped)
            }
        };
        self.last_exit = Some(exit);
        if self.ended.is_none() {
            self.not_before = now.plus_ms(self.backoff_ms);
            self.backoff_ms = (self.backoff_ms * 2).clamp(1000, BACKOFF_MS_MAX);
            self.count += 1;
        }
    }

    /// Whether it may be started now.
    pub fn is_due(&self, now: Mono) -> bool {
        self.ended.is_none() && now >= self.not_before
    }

    /// Ends `Failing` after a steady minute.
    pub fn settle(&mut self, now: Mono) {
        if self.is_failing && self.started_at.is_some_and(|at| now.since_ms(at) >= STEADY_MS) {
            self.is_failing = false;
            self.exits.clear();
        }
    }

    /// `exited 1, 3 restarts, next in 8 s`.
    pub fn describe(&self, now: Mono) -> Option<String> {
        let exit = self.last_exit.as_ref()?;
        let mut text = exit.to_string();
        match self.count {
            0 => {}
            1 => text += ", 1 restart",
            count => text += &format!(", {count} restarts"),
        }
        if self.ended.is_none() && self.started_at.is_none() && self.not_before > now {
            text += &format!(", next in {} s", self.not_before.since_ms(now).div_ceil(1000));
        }
        Some(text)
    }
}

fn end_of(exit: &Exit) -> Phase {
    if exit.is_success() { Phase::Completed } else { Phase::Stopped }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_and_starts_anew_after_a_steady_minute() {
        let mut restarts = Restarts::default();
        let mut now = Mono(1_000_000);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            restarts.started(now);
            restarts.exited(Exit::Code(1), RestartPolicy::Always, now);
            pauses.push(restarts.not_before.since_ms(now));
            now = restarts.not_before;
        }
        assert_eq!(pauses, [0, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000]);
        assert!(restarts.is_failing);
        restarts.started(now);
        now = now.plus_ms(60_000);
        restarts.settle(now);
        assert!(!restarts.is_failing);
        restarts.exited(Exit::Code(1), RestartPolicy::Always, now);
        assert!(restarts.is_due(now));
        assert_eq!(restarts.describe(now).as_deref(), Some("exited 1, 10 restarts"));
    }

    #[test]
    fn a_policy_ends_where_it_says() {
        let ended = |policy, exit| {
            let mut restarts = Restarts::default();
            restarts.started(Mono(1));
            restarts.exited(exit, policy, Mono(2));
            restarts.ended
        };
        let twice = RestartPolicy::OnFailure { attempts_max: Some(0) };
        assert_eq!(ended(RestartPolicy::No, Exit::Code(0)), Some(Phase::Completed));
        assert_eq!(ended(RestartPolicy::No, Exit::Code(1)), Some(Phase::Stopped));
        assert_eq!(ended(RestartPolicy::OnFailure { attempts_max: None }, Exit::Code(1)), None);
        assert_eq!(
            ended(RestartPolicy::OnFailure { attempts_max: None }, Exit::Code(0)),
            Some(Phase::Completed)
        );
        assert_eq!(ended(twice, Exit::Code(1)), Some(Phase::Stopped));
        assert_eq!(ended(RestartPolicy::Always, Exit::Code(0)), None);
    }
}
