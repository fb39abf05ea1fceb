//! Decides what to do with the containers of this node. Pure.
//!
//! Input: the instances that the state puts here, and what is here. Output: one action per instance at most, and
//! what is to be reported. The same input gives the same actions; a container under work gets none.
//!
//! Invariant: what the state does not know is stopped and removed, and nothing else is
//! (`only_what_the_state_does_not_know_is_swept`).

use super::restart::Restarts;
use crate::model::*;
use crate::state::State;
use crate::verdict::Verdict;
use std::collections::BTreeMap;

/// A verdict must last this long before it becomes a log entry.
const VERDICT_LASTED_MS: u64 = 10_000;

/// One container as the agent knows it.
#[derive(Clone, Debug, Default)]
pub struct Local {
    pub presence: Presence,
    /// An action is under way; nothing else is begun.
    pub is_busy: bool,
    pub restarts: Restarts,
    pub verdict: Option<Verdict>,
    pub verdict_since: Mono,
    /// It has a health check.
    pub is_probed: bool,
    /// Started by this daemon and not probed since.
    pub is_untested: bool,
    /// `pulling nginx 12 of 48 MiB`.
    pub progress: Option<String>,
    /// An action failed: nothing is tried before this, and twice as long after the next failure.
    pub retry_at: Mono,
    pub failures: u32,
    /// The agent itself is ending it, for this reason.
    pub stopped_because: Option<String>,
    /// A disk that its service binds is not there, in a sentence: it must not run.
    pub lacks_disk: Option<String>,
    /// It runs with a disk that was pulled and is back, in a sentence: it must be started anew, as after a failure.
    pub holds_pulled: Option<String>,
    /// A removal was begun because the state asks for it.
    pub is_gone: bool,
}

impl Local {
    /// Its container was stopped by the agent. One that held on to a pulled disk has that as the reason, and a backoff.
    pub fn stopped(&mut self, now: Mono) {
        self.presence = Presence::Stopped;
        if let Some(why) = self.holds_pulled.take() {
            self.restarts.not_started(why, now);
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Presence {
    #[default]
    Absent,
    /// Made, or ended; its files are here.
    Stopped,
    Running,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Fetch what it needs, make it if it is not there, start it.
    Launch,
    Stop,
    Remove,
}

pub struct Situation<'a> {
    pub state: &'a State,
    pub node: NodeId,
    /// The state here has caught up with a leader's, or none came for a minute.
    pub may_start: bool,
    /// A leader has confirmed lately that exclusive instances may run here.
    pub has_lease: bool,
    pub now: Mono,
}

pub fn reconcile(
    situation: &Situation<'_>,
    locals: &BTreeMap<InstanceId, Local>,
) -> Vec<(InstanceId, Action)> {
    let mut actions = Vec::new();
    for instance in situation.state.instances_on(situation.node) {
        let local = locals.get(&instance.id).cloned().unwrap_or_default();
        if !local.is_busy
            && situation.now >= local.retry_at
            && let Some(action) = next(situation, instance, &local)
        {
            actions.push((instance.id, action));
        }
    }
    // A returning node must not stop what runs before it knows what the cluster has decided meanwhile.
    if situation.may_start {
        for (id, local) in
            locals.iter().filter(|(_, local)| !local.is_busy && situation.now >= local.retry_at)
        {
            let is_here =
                situation.state.instances.find(id).is_some_and(|row| row.node == Some(situation.node));
            match local.presence {
                Presence::Running if !is_here => actions.push((*id, Action::Stop)),
                Presence::Stopped if !is_here => actions.push((*id, Action::Remove)),
                _ => {}
            }
        }
    }
    actions
}

fn next(situation: &Situation<'_>, instance: &Instance, local: &Local) -> Option<Action> {
    match (instance.desired, local.presence) {
        (Desired::Run, Presence::Running) => {
            let must_end = local.lacks_disk.is_some() || local.holds_pulled.is_some();
            must_end.then_some(Action::Stop)
        }
        (Desired::Run, _) if local.lacks_disk.is_some() => None,
        (Desired::Run, Presence::Absent | Presence::Stopped) => {
            let service = situation.state.services.find(&instance.service)?;
            let is_held = !situation.has_lease && service.spec_of(instance.spec_version).is_exclusive;
            // What the state knows as ended stays so, also for a daemon that has just started.
            let is_held = is_held || instance.observed.phase.is_final();
            let may = situation.may_start && !is_held && local.restarts.is_due(situation.now);
            may.then_some(Action::Launch)
        }
        (Desired::Stop | Desired::Remove, Presence::Running) => Some(Action::Stop),
        (Desired::Remove, Presence::Stopped) => Some(Action::Remove),
        (Desired::Stop, Presence::Stopped | Presence::Absent) | (Desired::Remove, Presence::Absent) => None,
    }
}

/// What should stand in the state for an instance; `None` while there is nothing worth an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub phase: Phase,
    pub exit: Option<Exit>,
    pub is_gone: bool,
}

pub fn finding(instance: &Instance, local: &Local, now: Mono) -> Option<Finding> {
    let plain = |phase| Finding { phase, exit: None, is_gone: false };
    if instance.desired == Desired::Remove {
        let is_gone = local.presence == Presence::Absent && !local.is_busy;
        let exit = local.restarts.last_exit.clone();
        return is_gone.then_some(Finding { phase: Phase::Stopped, exit, is_gone: true });
    }
    let exit = local.restarts.last_exit.clone();
    if let Some(phase) = local.restarts.ended {
        return Some(Finding { phase, exit, is_gone: false });
    }
    // It waits where its data is, as on a node that is down.
    let waits = local.lacks_disk.is_some() && local.presence != Presence::Running;
    if waits && !instance.observed.phase.is_final() {
        return (!local.is_busy).then(|| plain(Phase::Lost));
    }
    if local.restarts.is_failing {
        return Some(Finding { phase: Phase::Failing, exit, is_gone: false });
    }
    if local.presence != Presence::Running {
        return None;
    }
    let before = instance.observed.phase;
    match local.verdict {
        // A daemon that has just started has no verdict of its own yet: the one in the state stands.
        None | Some(Verdict::Starting) if matches!(before, Phase::Healthy | Phase::Unhealthy) => None,
        None | Some(Verdict::Starting) => Some(plain(Phase::Running)),
        Some(Verdict::Healthy) if before != Phase::Unhealthy => Some(plain(Phase::Healthy)),
        Some(verdict) => {
            let phase = if verdict == Verdict::Healthy { Phase::Healthy } else { Phase::Unhealthy };
            let has_lasted = now.since_ms(local.verdict_since) >= VERDICT_LASTED_MS;
            // Traffic follows a verdict at once; the log only one that lasts.
            has_lasted.then(|| plain(phase))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Command;
    use crate::state::testing::{Applier, spec};

    fn one_instance() -> (Applier, InstanceId) {
        let mut applier = Applier::with_nodes(1);
        applier.deploy("shop", &[("web", spec("1"))]);
        for _ in 0..2 {
            let steps = crate::planner::plan(&applier.state, &Default::default(), applier.state.time());
            applier.must(Command::Plan { steps });
        }
        let id = applier.state.instances.rows().next().unwrap().id;
        (applier, id)
    }

    fn situation(state: &State, may_start: bool) -> Situation<'_> {
        Situation { state, node: NodeId(1), may_start, has_lease: true, now: Mono(1000) }
    }

    #[test]
    fn what_is_assigned_is_launched_once_the_state_is_current() {
        let (applier, id) = one_instance();
        let locals = BTreeMap::new();
        assert_eq!(reconcile(&situation(&applier.state, false), &locals), []);
        assert_eq!(reconcile(&situation(&applier.state, true), &locals), [(id, Action::Launch)]);
        let busy = [(id, Local { is_busy: true, ..Local::default() })].into();
        assert_eq!(reconcile(&situation(&applier.state, true), &busy), []);
    }

    #[test]
    fn an_exclusive_instance_is_launched_only_with_a_lease() {
        let (mut applier, id) = one_instance();
        let launches = |state: &State, has_lease| {
            let situation = Situation { has_lease, ..situation(state, true) };
            reconcile(&situation, &BTreeMap::new()) == [(id, Action::Launch)]
        };
        assert!(launches(&applier.state, false));
        let service = applier.state.services.rows().next().unwrap().id;
        applier.state.services.update(&service, |service| service.spec.is_exclusive = true);
        assert!(!launches(&applier.state, false) && launches(&applier.state, true));
    }

    #[test]
    fn what_lacks_its_disk_is_stopped_and_waits_and_nothing_else() {
        let (mut applier, id) = one_instance();
        let local = |presence, why: Option<&str>| Local {
            presence,
            lacks_disk: why.map(String::from),
            ..Local::default()
        };
        let act = |state: &State, may_start, local: &Local| {
            reconcile(&situation(state, may_start), &[(id, local.clone())].into())
        };
        let (running, stopped) =
            (local(Presence::Running, Some("gone")), local(Presence::Stopped, Some("gone")));
        // Also before the state has caught up: its disk is gone whatever the cluster has decided.
        assert_eq!(act(&applier.state, false, &running), [(id, Action::Stop)]);
        assert_eq!(act(&applier.state, true, &stopped), []);
        assert_eq!(act(&applier.state, true, &local(Presence::Absent, Some("gone"))), []);
        assert_eq!(act(&applier.state, true, &local(Presence::Running, None)), []);
        assert_eq!(act(&applier.state, true, &local(Presence::Stopped, None)), [(id, Action::Launch)]);
        let row = applier.state.instances.find(&id).unwrap();
        assert_eq!(finding(row, &stopped, Mono(0)).unwrap().phase, Phase::Lost);
        assert_eq!(finding(row, &running, Mono(0)).unwrap().phase, Phase::Running, "until it has stopped");
        // It can still be removed, and what has ended for good is not lost.
        applier.report(NodeId(1), id, Phase::Completed, false);
        assert_eq!(finding(applier.state.instances.find(&id).unwrap(), &stopped, Mono(0)), None);
        applier.must(Command::RemoveApp { app: AppName::new("shop").unwrap(), with_volumes: false });
        assert_eq!(act(&applier.state, true, &stopped), [(id, Action::Remove)]);
    }

    #[test]
    fn what_holds_on_to_a_pulled_disk_is_started_anew_with_a_reason_and_ever_later() {
        let (applier, id) = one_instance();
        let mut local = Local::default();
        let mut launches = Vec::new();
        for ms in 0..120_000 {
            let now = Mono(1000).plus_ms(ms);
            let at = Situation { now, ..situation(&applier.state, true) };
            match reconcile(&at, &[(id, local.clone())].into()).as_slice() {
                [(_, Action::Launch)] => {
                    launches.push(ms);
                    local.presence = Presence::Running;
                    local.restarts.started(now);
                    local.holds_pulled = Some("disk media was pulled".into());
                }
                [(_, Action::Stop)] => local.stopped(now),
                other => assert_eq!(other, []),
            }
        }
        assert!((5..12).contains(&launches.len()), "{launches:?}");
        let told = local.restarts.describe(Mono(1000)).unwrap();
        assert!(told.contains("disk media was pulled"), "{told}");
    }

    #[test]
    fn only_what_the_state_does_not_know_is_swept() {
        let (applier, id) = one_instance();
        let running = Local { presence: Presence::Running, ..Local::default() };
        let locals: BTreeMap<InstanceId, Local> = [(id, running.clone()), (InstanceId(99), running)].into();
        assert_eq!(reconcile(&situation(&applier.state, false), &locals), []);
        assert_eq!(reconcile(&situation(&applier.state, true), &locals), [(InstanceId(99), Action::Stop)]);
    }

    #[test]
    fn a_removal_stops_removes_and_then_says_so() {
        let (mut applier, id) = one_instance();
        applier.must(Command::RemoveApp { app: AppName::new("shop").unwrap(), with_volumes: false });
        let act = |presence| {
            let locals = [(id, Local { presence, ..Local::default() })].into();
            reconcile(&situation(&applier.state, true), &locals)
        };
        assert_eq!(act(Presence::Running), [(id, Action::Stop)]);
        assert_eq!(act(Presence::Stopped), [(id, Action::Remove)]);
        assert_eq!(act(Presence::Absent), []);
        let row = applier.state.instances.find(&id).unwrap();
        assert!(finding(row, &Local::default(), Mono(0)).unwrap().is_gone);
    }
}
