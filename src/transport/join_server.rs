//! The server's side of a join: limits, one request, one reply.
//!
//! A stranger's connection → at most one `Event::Join`, or a refusal. Frames ≤ 4 KiB, 3 s a step, 8 at once, 5 failures
//! a minute. It tells nothing but the certificate chain until the proof holds and the node layer has answered.

use std::sync::Arc;

use quinn::Connection;
use tracing::{debug, info};

use super::executor::{lock, within};
use super::frames::{self, FrameError};
use super::hello::{CLOSE_DONE, Refusal, RefusalCode};
use super::join::{
    JOIN_ANSWER_LIMIT, JOIN_BYTES_MAX, JOIN_STEP_LIMIT, JoinAsked, JoinReply, SignedRequest, fitting,
    proof_message,
};
use super::join_limit::{JoinLimit, JoinOutcome};
use super::peers::Event;
use super::serve::{self, finish};
use super::table::{Shared, malformed};

/// Leaves the limit when it is dropped, also if the task is stopped midway.
struct Entered<'a> {
    shared: &'a Shared,
    address: std::net::IpAddr,
    outcome: JoinOutcome,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let now_ms = self.shared.now_ms();
        limit(self.shared).leave(self.address, self.outcome, now_ms);
    }
}

fn limit(shared: &Shared) -> std::sync::MutexGuard<'_, JoinLimit> {
    lock(&shared.join_limit)
}

pub(super) async fn serve(shared: &Arc<Shared>, connection: Connection) {
    let address = connection.remote_address();
    if let Err(refusal) = limit(shared).enter(address.ip(), shared.now_ms()) {
        debug!(%address, reason = %refusal, "joiner turned away");
        return refusal.close(&connection);
    }
    let mut entered = Entered { shared, address: address.ip(), outcome: JoinOutcome::Failed };
    match answer(shared, &connection).await {
        Ok(outcome) => {
            entered.outcome = outcome;
            // The joiner closes once it has read the reply.
            within(JOIN_STEP_LIMIT, connection.closed()).await;
            connection.close(CLOSE_DONE, b"");
        }
        Err(refusal) => {
            info!(%address, reason = %refusal, "join refused");
            refusal.close(&connection);
        }
    }
}

async fn answer(shared: &Shared, connection: &Connection) -> Result<JoinOutcome, Refusal> {
    let broken = |error: FrameError| {
        malformed(&error).unwrap_or_else(|| Refusal::new(RefusalCode::Malformed, "the request broke off"))
    };
    let timeout = FrameError::Timeout { limit: JOIN_STEP_LIMIT };
    let (mut send, mut receive) = within(JOIN_STEP_LIMIT, connection.accept_bi())
        .await
        .ok_or_else(|| broken(timeout))?
        .map_err(|_| Refusal::new(RefusalCode::Malformed, "the request broke off"))?;
    let signed: SignedRequest =
        frames::read_value(&mut receive, JOIN_BYTES_MAX, JOIN_STEP_LIMIT).await.map_err(broken)?;
    let is_proved = proof_message(connection)
        .is_some_and(|message| signed.request.public_key.verifies(&message, &signed.proof));
    if !is_proved {
        return Err(Refusal::new(RefusalCode::Malformed, "the request's proof of its key doesn't hold"));
    }
    let (reply, replied) = async_channel::bounded(1);
    let asked = JoinAsked { request: signed.request, address: serve::remote_address(connection), reply };
    let busy = Refusal::new(RefusalCode::Busy, "this node is busy; try again in a few seconds");
    shared.events.try_send(Event::Join(asked)).map_err(|_| busy)?;
    let internal = || Refusal::new(RefusalCode::Internal, "no answer in time; joining again is safe");
    let reply = within(JOIN_ANSWER_LIMIT, replied.recv()).await.ok_or_else(internal)?;
    let reply = fitting(reply.map_err(|_| internal())?);
    let outcome = match reply {
        JoinReply::Refused { .. } => JoinOutcome::Failed,
        JoinReply::Joined(_) | JoinReply::Enrolled(_) => JoinOutcome::Accepted,
    };
    frames::write_value(&mut send, &reply, JOIN_BYTES_MAX, JOIN_STEP_LIMIT).await.map_err(broken)?;
    finish(&mut send).await;
    Ok(outcome)
}
