//! Signed requests to one authority, each with a fresh nonce.

use super::AcmeError;
use super::account::{AccountKey, Signer};
use super::messages::{Directory, Problem};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use ureq::Agent;
use ureq::http::Response;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// A chain has some 5 kB.
const ANSWER_BYTES_MAX: u64 = 256 << 10;
/// A nonce may have run out, and some authorities refuse good ones to see what happens.
const NONCES_TRIED_MAX: usize = 6;
const ORDER_LIMIT: Duration = Duration::from_secs(120);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
const STEP: Duration = Duration::from_millis(100);
/// For an authority on this machine; elsewhere only HTTPS is asked.
const LOCAL: &str = "http://127.0.0.1:";

pub struct Reply {
    pub location: Option<String>,
    pub retry_after_seconds: Option<u64>,
    pub body: Vec<u8>,
}

pub struct Session<'k> {
    agent: Agent,
    key: &'k AccountKey,
    pub directory: Directory,
    account: Option<String>,
    nonce: Option<String>,
    deadline: Instant,
    stop: &'k AtomicBool,
}

fn asked(step: &'static str) -> impl FnOnce(ureq::Error) -> AcmeError {
    move |source| AcmeError::Ask { step, source: Box::new(source) }
}

pub fn unreadable<Cause>(step: &'static str) -> impl FnOnce(Cause) -> AcmeError
where
    Cause: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    move |source| AcmeError::Unreadable { step, source: source.into() }
}

fn agent(directory: &str, roots_pem: Option<&str>) -> Result<Agent, AcmeError> {
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .user_agent(concat!("tinydc/", env!("CARGO_PKG_VERSION")))
        // A signature holds for one URL.
        .max_redirects(0)
        .https_only(!directory.starts_with(LOCAL))
        .timeout_resolve(Some(CONNECT_LIMIT))
        .timeout_connect(Some(CONNECT_LIMIT))
        .timeout_global(Some(ANSWER_LIMIT));
    if let Some(pem) = roots_pem {
        let certificates = parse_pem(pem.as_bytes()).filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(Ok(certificate)),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        });
        let certificates: Vec<Certificate<'_>> =
            certificates.collect::<Result<_, _>>().map_err(asked("read the authority's own roots"))?;
        let roots = RootCerts::new_with_certs(&certificates);
        config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
    }
    Ok(config.build().into())
}

fn text<Body>(response: &Response<Body>, name: &str) -> Option<String> {
    Some(response.headers().get(name)?.to_str().ok()?.to_owned())
}

pub fn parse<Answer: DeserializeOwned>(step: &'static str, body: &[u8]) -> Result<Answer, AcmeError> {
    serde_json::from_slice(body).map_err(unreadable(step))
}

impl<'k> Session<'k> {
    pub fn open(
        directory: &str,
        roots_pem: Option<&str>,
        key: &'k AccountKey,
        stop: &'k AtomicBool,
    ) -> Result<Session<'k>, AcmeError> {
        const STEP: &str = "read the authority's directory";
        let agent = agent(directory, roots_pem)?;
        let response = agent.get(directory).call().map_err(asked(STEP))?;
        let status = response.status().as_u16();
        let body = read(STEP, response)?;
        if status != 200 {
            return Err(refusal(STEP, status, None, &body));
        }
        let directory = parse(STEP, &body)?;
        let deadline = Instant::now() + ORDER_LIMIT;
        Ok(Session { agent, key, directory, account: None, nonce: None, deadline, stop })
    }

    /// From now on requests are the account's.
    pub fn set_account(&mut self, account: String) {
        self.account = Some(account);
    }

    fn fresh_nonce(&mut self, step: &'static str) -> Result<String, AcmeError> {
        if let Some(nonce) = self.nonce.take() {
            return Ok(nonce);
        }
        let response = self.agent.head(&self.directory.new_nonce).call().map_err(asked(step))?;
        text(&response, "replay-nonce").ok_or_else(|| unreadable(step)("there is no nonce"))
    }

    /// Without a payload it asks for what lies there.
    pub fn post(
        &mut self,
        step: &'static str,
        url: &str,
        payload: Option<&Value>,
    ) -> Result<Reply, AcmeError> {
        let mut tried = 0;
        loop {
            self.check()?;
            tried += 1;
            let nonce = self.fresh_nonce(step)?;
            let signer = self.account.as_deref().map_or(Signer::Key, Signer::Account);
            let message = self.key.sign(url, &nonce, signer, payload)?.to_string();
            let request = self.agent.post(url).header("content-type", "application/jose+json");
            let response = request.send(message.as_bytes()).map_err(asked(step))?;
            self.nonce = text(&response, "replay-nonce");
            let status = response.status().as_u16();
            let retry_after_seconds = text(&response, "retry-after").and_then(|text| text.parse().ok());
            let location = text(&response, "location");
            let body = read(step, response)?;
            if (200..300).contains(&status) {
                return Ok(Reply { location, retry_after_seconds, body });
            }
            let refused = refusal(step, status, retry_after_seconds, &body);
            let is_old_nonce = matches!(&refused, AcmeError::Refused { kind, .. } if kind == "badNonce");
            if !is_old_nonce || tried == NONCES_TRIED_MAX {
                return Err(refused);
            }
        }
    }

    fn check(&self) -> Result<(), AcmeError> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(AcmeError::Stopped);
        }
        if Instant::now() >= self.deadline { Err(AcmeError::Late(ORDER_LIMIT.as_secs())) } else { Ok(()) }
    }

    /// Between two looks at what the authority works on.
    pub fn pause(&self, reply: &Reply) -> Result<(), AcmeError> {
        let wanted = Duration::from_secs(reply.retry_after_seconds.unwrap_or(1).max(1)).min(LONGEST_PAUSE);
        let until = Instant::now() + wanted;
        while Instant::now() < until {
            self.check()?;
            thread::sleep(STEP);
        }
        Ok(())
    }
}

fn read(step: &'static str, response: Response<ureq::Body>) -> Result<Vec<u8>, AcmeError> {
    let mut body = Vec::new();
    let reader = response.into_body().into_reader();
    reader.take(ANSWER_BYTES_MAX).read_to_end(&mut body).map_err(unreadable(step))?;
    Ok(body)
}

fn refusal(step: &'static str, status: u16, retry_after_seconds: Option<u64>, body: &[u8]) -> AcmeError {
    let problem: Problem = serde_json::from_slice(body).unwrap_or_default();
    let detail = match problem.detail.is_empty() {
        true => format!("status {status}"),
        false => problem.detail.chars().take(500).collect(),
    };
    AcmeError::Refused { step, status, kind: problem.name().into(), detail, retry_after_seconds }
}
