//! Probes one container until it ends: runs its health check, feeds the judge, tells the agent of each verdict.

use super::Signal;
use super::launch::container_id;
use crate::model::*;
use crate::runtime::{CheckEnd, ExecRequest, Runtime};
use crate::verdict::{Judge, Verdict};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Runs until the agent drops it, which it does when the container ends or its check changes.
pub async fn probe(
    runtime: Arc<Runtime>,
    instance: InstanceId,
    spec: HealthSpec,
    origin: Instant,
    signals: async_channel::Sender<Signal>,
) {
    let command = match &spec.test {
        HealthTest::Disabled => return,
        HealthTest::Exec(command) => command.clone(),
        HealthTest::Shell(line) => vec!["/bin/sh".into(), "-c".into(), line.clone()],
    };
    let now = || Mono(origin.elapsed().as_millis() as u64);
    let mut judge = Judge::new(now());
    let mut told = None;
    loop {
        let (runtime, request) =
            (runtime.clone(), ExecRequest { command: command.clone(), ..ExecRequest::default() });
        let timeout = Duration::from_millis(spec.timeout_ms);
        let outcome =
            crate::tasks::unblock(move || runtime.check(&container_id(instance), &request, timeout)).await;
        let is_success = matches!(outcome, Ok(result) if result.end == CheckEnd::Exited(0));
        let pause_ms = judge.take(is_success, &spec, now());
        let verdict = judge.verdict();
        if told != Some(verdict) && verdict != Verdict::Starting {
            told = Some(verdict);
            // The agent has ended: so does this.
            if signals.send(Signal::Verdict { instance, verdict }).await.is_err() {
                return;
            }
        }
        async_io::Timer::after(Duration::from_millis(pause_ms)).await;
    }
}
