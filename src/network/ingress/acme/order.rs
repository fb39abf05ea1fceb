//! One order: account, challenges, proof, certificate (RFC 8555 7.4).

use super::AcmeError;
use super::account::{AccountKey, base64url};
use super::messages::{Authorization, Challenge, Order, Problem, Status};
use super::session::{Reply, Session, parse, unreadable};
use crate::certificate::{Validity, validity};
use crate::model::Gather;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

const AUTHORIZE: &str = "read what is to be proved";
const FOLLOW: &str = "follow the order";
const HTTP: &str = "http-01";

pub struct Wish<'a> {
    /// Of the authority.
    pub directory: &'a str,
    /// Of an authority with certificates of its own; `None`: those that browsers trust.
    pub roots_pem: Option<&'a str>,
    pub account_key: &'a AccountKey,
    /// An address for warnings; may be none.
    pub email: Option<&'a str>,
    /// Names of one certificate; no wildcards.
    pub hosts: &'a [String],
    /// Set from outside to give up within a request's time.
    pub stop: &'a AtomicBool,
}

#[derive(Clone, PartialEq, Eq)]
pub struct Issued {
    /// The host's own certificate first.
    pub chain_pem: String,
    /// A secret.
    pub key_pem: String,
    /// Seconds since 1970.
    pub not_before: u64,
    pub not_after: u64,
}

/// `publish` gets token → answer, and returns when every node answers so; whoever calls takes them back afterwards. Agrees
/// to the authority's terms. Blocks.
pub fn obtain(
    wish: &Wish<'_>,
    publish: &mut dyn FnMut(
        &BTreeMap<String, String>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>,
) -> Result<Issued, AcmeError> {
    if let Some(wildcard) = wish.hosts.iter().find(|host| host.contains('*')) {
        return Err(AcmeError::Wildcard(wildcard.clone()));
    }
    let mut session = Session::open(wish.directory, wish.roots_pem, wish.account_key, wish.stop)?;
    register(&mut session, wish.email)?;
    let (url, order) = place(&mut session, wish.hosts)?;
    let open = open_challenges(&mut session, &order)?;
    if !open.is_empty() {
        let answers = open.iter().map(|one| {
            let token = one.challenge.token.clone();
            let answer = wish.account_key.key_authorization(&token);
            (token, answer)
        });
        publish(&answers.gather()).map_err(AcmeError::Publish)?;
    }
    for one in &open {
        session.post("say that the answers are published", &one.challenge.url, Some(&json!({})))?;
    }
    for one in &open {
        wait_for_proof(&mut session, one)?;
    }
    let (key_pem, csr) = make_request(wish.hosts)?;
    follow(&mut session, &url, |order| order.status == Status::Ready)?;
    session.post("ask for the certificate", &order.finalize, Some(&json!({ "csr": base64url(csr) })))?;
    let order = follow(&mut session, &url, |order| order.status == Status::Valid)?;
    const FETCH: &str = "fetch the certificate";
    let certificate = order.certificate.ok_or_else(|| unreadable(FETCH)("the order names none"))?;
    let reply = session.post(FETCH, &certificate, None)?;
    let chain_pem = String::from_utf8(reply.body).map_err(unreadable(FETCH))?;
    let first = CertificateDer::from_pem_slice(chain_pem.as_bytes());
    let first = first.map_err(|error| unreadable(FETCH)(error.to_string()))?;
    let Validity { not_before, not_after } =
        validity(&first).ok_or_else(|| unreadable(FETCH)("it is no certificate"))?;
    Ok(Issued { chain_pem, key_pem, not_before, not_after })
}

/// The account of the key: a new one, or the one that it has.
fn register(session: &mut Session<'_>, email: Option<&str>) -> Result<(), AcmeError> {
    const STEP: &str = "register with the authority";
    let mut account = json!({ "termsOfServiceAgreed": true });
    if let Some(email) = email {
        account["contact"] = json!([format!("mailto:{email}")]);
    }
    let url = session.directory.new_account.clone();
    let reply = session.post(STEP, &url, Some(&account))?;
    let account = reply.location.ok_or_else(|| unreadable(STEP)("the account has no URL"))?;
    session.set_account(account);
    Ok(())
}

fn place(session: &mut Session<'_>, hosts: &[String]) -> Result<(String, Order), AcmeError> {
    const STEP: &str = "place the order";
    let identifiers: Vec<_> = hosts.iter().map(|host| json!({ "type": "dns", "value": host })).collect();
    let url = session.directory.new_order.clone();
    let reply = session.post(STEP, &url, Some(&json!({ "identifiers": identifiers })))?;
    let order = parse(STEP, &reply.body)?;
    let url = reply.location.ok_or_else(|| unreadable(STEP)("the order has no URL"))?;
    Ok((url, order))
}

/// A proof that is still to be given.
struct Open {
    host: String,
    authorization: String,
    challenge: Challenge,
}

fn open_challenges(session: &mut Session<'_>, order: &Order) -> Result<Vec<Open>, AcmeError> {
    let mut open = Vec::new();
    for url in &order.authorizations {
        let reply = session.post(AUTHORIZE, url, None)?;
        let authorization: Authorization = parse(AUTHORIZE, &reply.body)?;
        if authorization.status == Status::Valid {
            continue;
        }
        let host = authorization.identifier.value;
        let mut challenges = authorization.challenges.into_iter();
        let challenge = challenges.find(|one| one.kind == HTTP && is_token(&one.token));
        let challenge = challenge.ok_or_else(|| AcmeError::NoHttpChallenge(host.clone()))?;
        open.push(Open { host, authorization: url.clone(), challenge });
    }
    Ok(open)
}

/// Of base64url's letters (RFC 8555 8.3): it becomes part of a path.
fn is_token(token: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (1..=256).contains(&token.len()) && token.bytes().all(is_letter)
}

fn wait_for_proof(session: &mut Session<'_>, one: &Open) -> Result<(), AcmeError> {
    const STEP: &str = "wait for the proof";
    loop {
        let reply = session.post(STEP, &one.authorization, None)?;
        let authorization: Authorization = parse(STEP, &reply.body)?;
        match authorization.status {
            Status::Valid => return Ok(()),
            Status::Pending | Status::Processing => session.pause(&reply)?,
            status => {
                let problem = authorization.challenges.into_iter().find_map(|challenge| challenge.error);
                let detail = said(problem).unwrap_or_else(|| format!("{status:?}"));
                return Err(AcmeError::NotProved { host: one.host.clone(), detail });
            }
        }
    }
}

fn said(problem: Option<Problem>) -> Option<String> {
    problem.map(|problem| problem.detail).filter(|detail| !detail.is_empty())
}

/// Looks at the order until it is as far as `is_there` wants it.
fn follow(
    session: &mut Session<'_>,
    url: &str,
    is_there: impl Fn(&Order) -> bool,
) -> Result<Order, AcmeError> {
    loop {
        let reply: Reply = session.post(FOLLOW, url, None)?;
        let order: Order = parse(FOLLOW, &reply.body)?;
        if is_there(&order) {
            return Ok(order);
        }
        if matches!(order.status, Status::Invalid | Status::Expired | Status::Revoked | Status::Deactivated) {
            let status = order.status;
            return Err(AcmeError::OrderFailed(said(order.error).unwrap_or_else(|| format!("{status:?}"))));
        }
        session.pause(&reply)?;
    }
}

/// A key of its own for each certificate, and the request that it signs.
fn make_request(hosts: &[String]) -> Result<(String, Vec<u8>), AcmeError> {
    let key = KeyPair::generate().map_err(AcmeError::Csr)?;
    let params = CertificateParams::new(hosts).map_err(AcmeError::Csr)?;
    let request = params.serialize_request(&key).map_err(AcmeError::Csr)?;
    Ok((key.serialize_pem(), request.der().to_vec()))
}
