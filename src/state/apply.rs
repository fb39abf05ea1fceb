//! Applies one committed entry.
//!
//! The command works on a copy of the tables (a few pointers); only success replaces the original. Outcomes of
//! requests with an id are remembered, so that a retry gets the first answer.

use super::command::{Command, Envelope, Outcome, Rejection, Reply, RequestMark};
use super::rows::{Event, StoredOutcome};
use super::{State, addresses, certificates, deploy, members, plan, report, secrets};
use crate::model::limits::{EVENTS_MAX, OUTCOME_AGE_MS_MAX, OUTCOMES_MAX, STATE_BYTES_MAX};
use crate::model::*;

impl State {
    /// Applies the command of entry `index`. The same state and entry give the same rows on every node.
    pub fn apply(&mut self, index: u64, envelope: &Envelope) -> Outcome {
        self.advance_time(envelope.stamp);
        if let Some(mark) = &envelope.request
            && let Some(outcome) = self.remembered(mark)
        {
            return outcome;
        }
        let mut draft = self.clone();
        let mut outcome = draft.run(index, &envelope.command);
        if outcome.is_ok() && draft.bytes() > STATE_BYTES_MAX && may_grow(&envelope.command) {
            outcome = Err(Rejection::StateFull { max_mib: (STATE_BYTES_MAX >> 20) as u64 });
        }
        if outcome.is_ok() {
            *self = draft;
        }
        if let Some(mark) = &envelope.request {
            self.remember(index, mark, outcome.clone());
        }
        outcome
    }

    fn run(&mut self, index: u64, command: &Command) -> Outcome {
        if self.cluster().is_none() && !matches!(command, Command::Found { .. }) {
            return Err(Rejection::NotFounded);
        }
        match command {
            Command::Found { cluster, node } => members::found(self, cluster, node),
            Command::JoinNode { token, secret_hash, node, replace } => {
                members::join(self, *token, secret_hash, node, replace.as_deref())
            }
            Command::RemoveNode { node, is_forced } => members::remove(self, *node, *is_forced),
            Command::ForgetNode { node } => members::forget(self, *node),
            Command::NodeStarted { node, start_id, architecture, size, software } => {
                let start = members::Start {
                    node: *node,
                    start_id: *start_id,
                    architecture: *architecture,
                    size: *size,
                };
                members::started(self, start, software)
            }
            Command::NodeStopping { node, start_id } => members::stopping(self, *node, *start_id),
            Command::NodeEnding { node, start_id } => members::ending(self, *node, *start_id),
            Command::MarkNodeDown { node, start_id } => members::mark_down(self, *node, *start_id),
            Command::MarkNodeUp { node, start_id } => members::mark_up(self, *node, *start_id),
            Command::NoteTroubles { node, troubles } => members::note_troubles(self, *node, *troubles),
            Command::NoteDisks { node, start_id, disks } => {
                members::note_disks(self, *node, *start_id, disks)
            }
            Command::NoteAbsentDisks { node, start_id, absent } => {
                members::note_absent_disks(self, *node, *start_id, *absent)
            }
            Command::ConfirmKey { node, has_key } => members::confirm_key(self, *node, *has_key),
            Command::DrainNode { node, is_drained } => members::drain(self, *node, *is_drained),
            Command::LabelNode { node, set, remove } => members::label(self, *node, set, remove),
            Command::CreateToken { secret_hash, kind, expires_at } => {
                members::create_token(self, *secret_hash, kind, *expires_at)
            }
            Command::RemoveToken { token } => members::remove_token(self, *token),
            Command::EnrolUser { token, secret_hash, public_key, expires_at } => {
                members::enrol(self, *token, secret_hash, *public_key, *expires_at)
            }
            Command::RemoveUser { name } => members::remove_user(self, name),
            Command::ChangeSetting { key, value } => {
                let mut settings = self.cluster_settings();
                settings.set(key, value).map_err(|error| Rejection::Invalid(error.to_string()))?;
                deploy::check_settings(self, &settings)?;
                self.settings.put((), settings);
                Ok(Reply::Done)
            }
            Command::DeployApp { spec, artifacts } => deploy::deploy(self, spec, artifacts),
            Command::RemoveApp { app, with_volumes } => deploy::remove(self, app, *with_volumes),
            Command::ScaleServices { app, replicas } => deploy::scale(self, app, replicas),
            Command::RegisterArtifact { artifact } => deploy::register(self, artifact),
            Command::RemoveArtifact { digest } => deploy::remove_artifact(self, digest),
            Command::AddAddress { address } => addresses::add(self, *address),
            Command::RemoveAddress { address } => addresses::remove(self, *address),
            Command::AssignAddress { address, epoch, to } => addresses::assign(self, *address, *epoch, *to),
            Command::PutSecret { name, sealed, fingerprint, bytes } => {
                let content = secrets::Content { sealed, fingerprint: *fingerprint, bytes: *bytes };
                secrets::put(self, index, name, content)
            }
            Command::RemoveSecret { name } => secrets::remove(self, name),
            Command::PutServingAuthority { certificate, sealed_key } => {
                certificates::put_authority(self, certificate, sealed_key)
            }
            Command::PutCertificate { host, issued } => certificates::put(self, index, host, issued),
            Command::NoteCertificateTrouble { host, text, pause_ms } => {
                certificates::note_trouble(self, host, text, *pause_ms)
            }
            Command::ForgetCertificate { host } => certificates::forget(self, host),
            Command::PutAcmeAccount { directory, sealed_key } => {
                certificates::put_account(self, directory, sealed_key)
            }
            Command::PutChallenges { answers } => certificates::put_challenges(self, answers),
            Command::RemoveChallenges { tokens } => certificates::remove_challenges(self, tokens),
            Command::Plan { steps } => plan::apply(self, steps),
            Command::Report { node, start_id, report } => report::apply(self, *node, *start_id, report),
        }
    }

    fn advance_time(&mut self, stamp: Timestamp) {
        let mut meta = self.meta.find(&()).cloned().unwrap_or_default();
        if stamp > meta.time {
            meta.time = stamp;
            self.meta.put((), meta);
        }
    }

    /// The answer to a request seen before, or a refusal if that can no longer be known.
    fn remembered(&self, mark: &RequestMark) -> Option<Outcome> {
        // At most a few thousand, and almost always the newest.
        if let Some(stored) = self.outcomes.rows().rev().find(|stored| stored.id == mark.id) {
            let is_same = stored.body_hash == mark.body_hash;
            return Some(if is_same { stored.outcome.clone() } else { Err(Rejection::RequestIdReused) });
        }
        // An id made before the newest evicted outcome may be the one that had it.
        let evicted = self.meta.find(&()).map_or(0, |meta| meta.outcomes_evicted);
        let was_evicted = mark.created_index != 0 && mark.created_index < evicted;
        was_evicted.then_some(Err(Rejection::UnknownOutcome))
    }

    fn remember(&mut self, index: u64, mark: &RequestMark, outcome: Outcome) {
        let now = self.time();
        let stored = StoredOutcome { id: mark.id, body_hash: mark.body_hash, outcome, at: now };
        self.outcomes.put(index, stored);
        loop {
            let first = self.outcomes.iter().next().map(|(index, stored)| (*index, stored.at));
            let Some((oldest, at)) = first else { break };
            if now.since_ms(at) <= OUTCOME_AGE_MS_MAX && self.outcomes.len() <= OUTCOMES_MAX {
                break;
            }
            self.outcomes.remove(&oldest);
            let mut meta = self.meta.find(&()).cloned().unwrap_or_default();
            meta.outcomes_evicted = oldest;
            self.meta.put((), meta);
        }
    }

    /// Records what happened, for `tinydc events`. Part of the command that made it happen.
    pub(super) fn note(&mut self, kind: &str, subject: String, text: String) {
        let at = self.time();
        let id = self.count(|counters| {
            counters.event += 1;
            counters.event
        });
        self.events.put(id, Event { id, at, kind: kind.into(), subject, text });
        if let Some(oldest) = id.checked_sub(EVENTS_MAX as u64) {
            self.events.remove(&oldest);
        }
    }

    pub(super) fn count<T>(&mut self, take: impl FnOnce(&mut super::Counters) -> T) -> T {
        let mut meta = self.meta.find(&()).cloned().unwrap_or_default();
        let taken = take(&mut meta.counters);
        self.meta.put((), meta);
        taken
    }

    pub(super) fn existing_node(&self, id: NodeId) -> Result<&Node, Rejection> {
        self.nodes.find(&id).ok_or_else(|| not_found("node", id))
    }
}

pub(super) fn not_found(what: &str, name: impl ToString) -> Rejection {
    Rejection::NotFound { what: what.into(), name: name.to_string() }
}

/// Whether a command adds what a user asked for; the rest must go on when the state is full.
fn may_grow(command: &Command) -> bool {
    matches!(
        command,
        Command::DeployApp { .. }
            | Command::CreateToken { .. }
            | Command::EnrolUser { .. }
            | Command::LabelNode { .. }
            | Command::RegisterArtifact { .. }
            | Command::JoinNode { .. }
            | Command::AddAddress { .. }
            | Command::PutSecret { .. }
    )
}
