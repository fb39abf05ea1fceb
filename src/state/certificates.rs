//! Certificates of the ingress, and what it takes to get them: the CA that serves, accounts, answers to challenges.
//!
//! Private keys come sealed and stay so. What is to be ordered and when is the planner's; the leader's daemon does it and
//! says here what came of it.

use super::State;
use super::command::{Outcome, Rejection, Reply};
use super::rows::{AcmeAccount, Certificate, Challenge, IssuedCertificate, ServingAuthority, Trouble};
use crate::model::Timestamp;
use crate::model::limits::CERTIFICATES_MAX;
use std::collections::BTreeMap;

const CHALLENGES_MAX: usize = 256;
const ACCOUNTS_MAX: usize = 16;
/// Of a chain as PEM, of a sealed key, of an answer.
const CHAIN_BYTES_MAX: usize = 64 << 10;
const KEY_BYTES_MAX: usize = 16 << 10;
const ANSWER_BYTES_MAX: usize = 1024;
const REASON_CHARACTERS_MAX: usize = 512;

pub fn put_authority(state: &mut State, certificate: &[u8], sealed_key: &[u8]) -> Outcome {
    // The first one stays: people have told their browsers to trust it.
    if state.serving_authority.is_empty() {
        let row = ServingAuthority { certificate: certificate.to_vec(), sealed_key: sealed_key.to_vec() };
        state.serving_authority.put((), row);
    }
    Ok(Reply::Done)
}

/// The entry's index is the version: a host that was forgotten and comes back never has an old one again.
pub fn put(state: &mut State, index: u64, host: &str, issued: &IssuedCertificate) -> Outcome {
    if issued.chain_pem.len() > CHAIN_BYTES_MAX || issued.sealed_key.len() > KEY_BYTES_MAX {
        return Err(Rejection::Invalid(format!("the certificate of {host} is too long")));
    }
    if state.certificates.len() >= CERTIFICATES_MAX && state.certificates.find(&host.to_owned()).is_none() {
        return Err(Rejection::Invalid(format!("the cluster has certificates for {CERTIFICATES_MAX} hosts")));
    }
    let issued = IssuedCertificate { version: index, ..issued.clone() };
    let until = Timestamp(issued.not_after.saturating_mul(1000));
    let text = format!("{host} has a certificate of {} until {until}", issued.issuer.name());
    let row = Certificate { host: host.into(), issued: Some(issued), trouble: None };
    state.certificates.put(host.into(), row);
    state.note("certificate", host.into(), text);
    Ok(Reply::Done)
}

/// There is none (or no new one), and it is tried again after a pause.
pub fn note_trouble(state: &mut State, host: &str, text: &str, pause_ms: u64) -> Outcome {
    let now = state.time();
    let before = state.certificates.find(&host.to_owned()).cloned();
    if before.is_none() && state.certificates.len() >= CERTIFICATES_MAX {
        return Err(Rejection::Invalid(format!("the cluster has certificates for {CERTIFICATES_MAX} hosts")));
    }
    let mut row = before.unwrap_or(Certificate { host: host.into(), issued: None, trouble: None });
    let failures = row.trouble.as_ref().map_or(0, |trouble| trouble.failures).saturating_add(1);
    let text: String = text.chars().take(REASON_CHARACTERS_MAX).collect();
    // Compared as it is kept.
    let is_news = row.trouble.as_ref().is_none_or(|trouble| trouble.text != text);
    row.trouble = Some(Trouble { text: text.clone(), failures, at: now, again_at: now.plus_ms(pause_ms) });
    state.certificates.put(host.into(), row);
    if is_news {
        state.note("certificate", host.into(), format!("no certificate for {host}: {text}"));
    }
    Ok(Reply::Done)
}

/// Somebody deploys and has perhaps mended what was wrong: no pause holds any more.
pub fn try_again(state: &mut State, hosts: &[String]) {
    let now = state.time();
    for host in hosts {
        state.certificates.update(host, |row| {
            if let Some(trouble) = &mut row.trouble {
                trouble.again_at = trouble.again_at.min(now);
            }
        });
    }
}

pub fn forget(state: &mut State, host: &str) -> Outcome {
    state.certificates.remove(&host.to_owned());
    Ok(Reply::Done)
}

pub fn put_account(state: &mut State, directory: &str, sealed_key: &[u8]) -> Outcome {
    // The first one stays: the authority knows it.
    if state.acme_accounts.contains(&directory.to_owned()) {
        return Ok(Reply::Done);
    }
    if state.acme_accounts.len() >= ACCOUNTS_MAX {
        return Err(Rejection::Invalid(format!("the cluster has accounts with {ACCOUNTS_MAX} authorities")));
    }
    let row = AcmeAccount { directory: directory.into(), sealed_key: sealed_key.to_vec() };
    state.acme_accounts.put(directory.into(), row);
    Ok(Reply::Done)
}

pub fn put_challenges(state: &mut State, answers: &BTreeMap<String, String>) -> Outcome {
    let at = state.time();
    let is_long = |(token, answer): (&String, &String)| token.len() + answer.len() > ANSWER_BYTES_MAX;
    if state.challenges.len() + answers.len() > CHALLENGES_MAX || answers.iter().any(is_long) {
        return Err(Rejection::Invalid("too many or too long answers to challenges".into()));
    }
    for (token, answer) in answers {
        state.challenges.put(token.clone(), Challenge { answer: answer.clone(), at });
    }
    Ok(Reply::Done)
}

pub fn remove_challenges(state: &mut State, tokens: &[String]) -> Outcome {
    for token in tokens {
        state.challenges.remove(token);
    }
    Ok(Reply::Done)
}
