//! Orders with a small authority that holds to RFC 8555 and believes nothing: it checks every signature, nonce and URL, and
//! fetches the answers to its challenges through a real ingress.

use super::account::base64url;
use super::{AccountKey, AcmeError, Issued, Wish, obtain};
use crate::network::ingress::tests::kit::{Answer, Client, Site, any_port, read_body, read_head};
use crate::network::ingress::{Routes, certificate_from_pem};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::{CertificateParams, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm};
use ring::signature::{ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Fair,
    /// Says that a good nonce is bad, once.
    ForgetsANonce,
    /// Offers DNS only.
    OffersNoHttp,
    Refuses,
}

#[derive(Default)]
struct Book {
    nonces: BTreeSet<String>,
    next: u64,
    has_forgotten: bool,
    jwk: Option<Value>,
    hosts: Vec<String>,
    proved: BTreeMap<usize, Result<(), String>>,
    /// Looks at the order since it was finalized.
    looks: u32,
    certificate: Option<String>,
    faults: Vec<String>,
}

struct Authority {
    port: u16,
    ingress_port: u16,
    manner: Manner,
    issuer: Issuer<'static, KeyPair>,
    book: Mutex<Book>,
    stop: AtomicBool,
}

struct Running {
    authority: Arc<Authority>,
    thread: Option<JoinHandle<()>>,
}

type Outcome = (u16, Vec<(&'static str, String)>, String);

impl Authority {
    fn start(manner: Manner, ingress_port: u16) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority = Arc::new(Authority {
            port: listener.local_addr().unwrap().port(),
            ingress_port,
            manner,
            issuer: Issuer::new(params, KeyPair::generate().unwrap()),
            book: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let own = authority.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if own.stop.load(Ordering::Relaxed) {
                    return;
                }
                let mut reader = BufReader::new(stream);
                // One request a connection is enough.
                let Ok(head) = read_head(&mut reader) else { continue };
                let body = read_body(&mut reader, &head).unwrap();
                let (status, mut headers, text) = own.answer(&head, &body);
                headers.push(("replay-nonce", own.nonce()));
                let mut reply = format!("HTTP/1.1 {status} X\r\nconnection: close\r\n");
                headers.iter().for_each(|(name, value)| reply += &format!("{name}: {value}\r\n"));
                reply += &format!("content-length: {}\r\n\r\n", text.len());
                if !head.starts_with("HEAD") {
                    reply += &text;
                }
                let _ = reader.get_mut().write_all(reply.as_bytes());
            }
        });
        Running { authority, thread: Some(thread) }
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    fn nonce(&self) -> String {
        let mut book = self.book.lock().unwrap();
        book.next += 1;
        let nonce = base64url(book.next.to_be_bytes());
        book.nonces.insert(nonce.clone());
        nonce
    }

    fn answer(&self, head: &str, body: &[u8]) -> Outcome {
        let path = head.split(' ').nth(1).unwrap();
        match path {
            "/directory" => {
                let directory = json!({
                    "newNonce": self.url("/nonce"),
                    "newAccount": self.url("/account"),
                    "newOrder": self.url("/orders"),
                });
                (200, vec![], directory.to_string())
            }
            "/nonce" => (200, vec![], String::new()),
            _ => match self.verify(path, body) {
                Ok(payload) => self.act(path, payload),
                Err((kind, detail)) => {
                    if kind != "badNonce" {
                        self.book.lock().unwrap().faults.push(format!("{path}: {detail}"));
                    }
                    problem(400, kind, &detail)
                }
            },
        }
    }

    /// The payload of a message that is signed as it must be.
    fn verify(&self, path: &str, body: &[u8]) -> Result<Value, (&'static str, String)> {
        let malformed = |what: &str| ("malformed", what.to_string());
        let message: Value = serde_json::from_slice(body).map_err(|_| malformed("no JSON"))?;
        let part = |name: &str| URL_SAFE_NO_PAD.decode(message[name].as_str().unwrap_or("!")).ok();
        let (Some(protected), Some(payload), Some(signature)) =
            (part("protected"), part("payload"), part("signature"))
        else {
            return Err(malformed("not base64url"));
        };
        let protected: Value = serde_json::from_slice(&protected).map_err(|_| malformed("no header"))?;
        if protected["url"] != self.url(path) || protected["alg"] != "ES256" {
            return Err(malformed("another URL or algorithm"));
        }
        let mut book = self.book.lock().unwrap();
        if self.manner == Manner::ForgetsANonce && !book.has_forgotten {
            book.has_forgotten = true;
            return Err(("badNonce", "who are you?".into()));
        }
        if !book.nonces.remove(protected["nonce"].as_str().unwrap_or_default()) {
            return Err(("badNonce", "used or unknown".into()));
        }
        if path == "/account" {
            book.jwk = Some(protected["jwk"].clone());
        } else if protected["kid"] != self.url("/account/1") || !protected["jwk"].is_null() {
            return Err(malformed("not signed by the account"));
        }
        let jwk = book.jwk.clone().ok_or_else(|| malformed("no account"))?;
        let coordinate = |name: &str| URL_SAFE_NO_PAD.decode(jwk[name].as_str().unwrap_or("!")).unwrap();
        let point = [vec![4], coordinate("x"), coordinate("y")].concat();
        let signed =
            format!("{}.{}", message["protected"].as_str().unwrap(), message["payload"].as_str().unwrap());
        let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point);
        key.verify(signed.as_bytes(), &signature).map_err(|_| malformed("a wrong signature"))?;
        Ok(serde_json::from_slice(&payload).unwrap_or(Value::Null))
    }

    fn act(&self, path: &str, payload: Value) -> Outcome {
        if path == "/account" {
            assert_eq!(payload["termsOfServiceAgreed"], true);
            return (201, vec![("location", self.url("/account/1"))], "{}".into());
        }
        if path == "/orders" {
            if self.manner == Manner::Refuses {
                let (status, mut headers, text) =
                    problem(429, "rateLimited", "too many certificates this week");
                headers.push(("retry-after", "3600".into()));
                return (status, headers, text);
            }
            let hosts = payload["identifiers"].as_array().unwrap().iter();
            self.book.lock().unwrap().hosts =
                hosts.map(|one| one["value"].as_str().unwrap().into()).collect();
            return (201, vec![("location", self.url("/order"))], self.order());
        }
        if path == "/order" {
            self.book.lock().unwrap().looks += 1;
            return (200, vec![("retry-after", "0".into())], self.order());
        }
        if path == "/finalize" {
            self.issue(payload["csr"].as_str().unwrap());
            return (200, vec![], self.order());
        }
        if path == "/certificate" {
            return (200, vec![], self.book.lock().unwrap().certificate.clone().unwrap());
        }
        let (kind, number) = path[1..].split_once('/').unwrap();
        let number: usize = number.parse().unwrap();
        if kind == "challenge" {
            let proof = self.prove(number);
            self.book.lock().unwrap().proved.insert(number, proof);
        }
        (200, vec![], self.authorization(number).to_string())
    }

    fn order(&self) -> String {
        let book = self.book.lock().unwrap();
        let is_proved = (0..book.hosts.len()).all(|number| book.proved.get(&number) == Some(&Ok(())));
        let status = match &book.certificate {
            // It works on it for a while.
            Some(_) if book.looks < 3 => "processing",
            Some(_) => "valid",
            None if is_proved => "ready",
            None => "pending",
        };
        let authorizations: Vec<String> =
            (0..book.hosts.len()).map(|number| self.url(&format!("/authorization/{number}"))).collect();
        let certificate = book.certificate.as_ref().map(|_| self.url("/certificate"));
        json!({
            "status": status,
            "authorizations": authorizations,
            "finalize": self.url("/finalize"),
            "certificate": certificate,
        })
        .to_string()
    }

    fn authorization(&self, number: usize) -> Value {
        let book = self.book.lock().unwrap();
        let proof = book.proved.get(&number);
        let status = match proof {
            None => "pending",
            Some(Ok(())) => "valid",
            Some(Err(_)) => "invalid",
        };
        let kind = if self.manner == Manner::OffersNoHttp { "tls-alpn-01" } else { "http-01" };
        let error = proof.and_then(|proof| proof.as_ref().err()).map(|detail| json!({ "detail": detail }));
        json!({
            "status": status,
            "identifier": { "type": "dns", "value": book.hosts[number] },
            "challenges": [
                { "type": "dns-01", "url": self.url("/never/0"), "token": "x", "status": status },
                {
                    "type": kind,
                    "url": self.url(&format!("/challenge/{number}")),
                    "token": format!("token-{number}"),
                    "status": status,
                    "error": error,
                },
            ],
        })
    }

    /// Asks the host itself.
    fn prove(&self, number: usize) -> Result<(), String> {
        let (host, jwk) = {
            let book = self.book.lock().unwrap();
            (book.hosts[number].clone(), book.jwk.clone().unwrap())
        };
        let canonical = format!(r#"{{"crv":"P-256","kty":"EC","x":{},"y":{}}}"#, jwk["x"], jwk["y"]);
        let thumbprint = base64url(ring::digest::digest(&ring::digest::SHA256, canonical.as_bytes()));
        let path = format!("/.well-known/acme-challenge/token-{number}");
        let answer: Answer = Client::new(self.ingress_port)
            .ask(&format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"));
        let wanted = format!("token-{number}.{thumbprint}");
        if answer.status == 200 && answer.body == wanted {
            Ok(())
        } else {
            Err(format!("{host} answered {}", answer.status))
        }
    }

    fn issue(&self, csr: &str) {
        let der = URL_SAFE_NO_PAD.decode(csr).unwrap();
        let (key, named) = asked_for(&der).unwrap();
        let params = CertificateParams::new(named.clone()).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let mut book = self.book.lock().unwrap();
        assert_eq!(named, book.hosts);
        book.looks = 0;
        book.certificate = Some(certificate.pem());
    }
}

/// One DER element: its tag, its content, and what follows it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], mut rest) = der.split_first_chunk::<2>()?;
    let mut length = usize::from(first);
    if first >= 0x80 {
        let (number, behind) = rest.split_at_checked(usize::from(first & 0x7f))?;
        length = number.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        rest = behind;
    }
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

/// A point on P-256, as it stands in a request.
struct AskedKey(Vec<u8>);

impl PublicKeyData for AskedKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

/// The key and the hosts of a request (RFC 2986), which its own key has signed.
fn asked_for(request: &[u8]) -> Option<(AskedKey, Vec<String>)> {
    let (_, parts, _) = element(request)?;
    let (_, information, signed) = element(parts)?;
    let (_, _, after_version) = element(information)?;
    let (_, _, after_subject) = element(after_version)?;
    let (_, key, attributes) = element(after_subject)?;
    // The first byte of a string of bits counts those of its last byte that are none.
    let key = AskedKey(element(element(key)?.2)?.1[1..].to_vec());
    let (_, signature, _) = element(element(signed)?.2)?;
    let verifier = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &key.0);
    verifier.verify(&parts[..parts.len() - signed.len()], &signature[1..]).expect("signed by its own key");
    // The extension's name, 2.5.29.17, before its value: names in a list in a string of octets.
    const SUBJECT_ALT_NAME: &[u8] = &[6, 3, 0x55, 0x1d, 0x11];
    let at = attributes.windows(SUBJECT_ALT_NAME.len()).position(|bytes| bytes == SUBJECT_ALT_NAME)?;
    let (_, value, _) = element(&attributes[at + SUBJECT_ALT_NAME.len()..])?;
    let (_, mut names, _) = element(value)?;
    let mut hosts = Vec::new();
    while let Some((tag, content, rest)) = element(names) {
        assert_eq!(tag, 0x82, "a DNS name");
        hosts.push(String::from_utf8(content.to_vec()).ok()?);
        names = rest;
    }
    Some((key, hosts))
}

fn problem(status: u16, kind: &str, detail: &str) -> Outcome {
    let problem = json!({ "type": format!("urn:ietf:params:acme:error:{kind}"), "detail": detail });
    (status, vec![], problem.to_string())
}

impl Drop for Running {
    fn drop(&mut self) {
        self.authority.stop.store(true, Ordering::Relaxed);
        let _ = std::net::TcpStream::connect(("127.0.0.1", self.authority.port));
        self.thread.take().unwrap().join().unwrap();
        if !std::thread::panicking() {
            assert_eq!(self.authority.book.lock().unwrap().faults, Vec::<String>::new());
        }
    }
}

struct Ordered {
    outcome: Result<Issued, AcmeError>,
    published: usize,
}

/// An order by a node whose ingress answers what is published, unless `is_deaf`.
fn order(manner: Manner, hosts: &[&str], is_deaf: bool) -> Ordered {
    let placeholder = BTreeMap::from([("none".to_string(), "none".to_string())]);
    let site = Site::start(Default::default(), Routes { challenges: placeholder, ..any_port() });
    let running = Authority::start(manner, site.port(false));
    let (key, stop) = (AccountKey::generate().unwrap(), AtomicBool::new(false));
    let hosts: Vec<String> = hosts.iter().map(|host| host.to_string()).collect();
    let wish = Wish {
        directory: &running.authority.url("/directory"),
        roots_pem: None,
        account_key: &key,
        email: Some("me@example.org"),
        hosts: &hosts,
        stop: &stop,
    };
    let mut published = 0;
    let outcome = obtain(&wish, &mut |challenges| {
        published += challenges.len();
        if !is_deaf {
            site.set(Routes { challenges: challenges.clone(), ..any_port() });
        }
        Ok(())
    });
    Ordered { outcome, published }
}

#[test]
fn an_order_ends_with_a_certificate() {
    for manner in [Manner::Fair, Manner::ForgetsANonce] {
        let ordered = order(manner, &["shop.test", "www.shop.test"], false);
        let issued = ordered.outcome.unwrap_or_else(|error| panic!("{error:?}"));
        assert!(certificate_from_pem(&issued.chain_pem, &issued.key_pem).is_ok());
        assert!(issued.not_before < issued.not_after);
        assert_eq!(ordered.published, 2);
    }
}

#[test]
fn a_refusal_is_told_in_the_authority_s_words() {
    match order(Manner::Refuses, &["shop.test"], false).outcome {
        Err(AcmeError::Refused { status: 429, kind, detail, retry_after_seconds: Some(3600), .. }) => {
            assert_eq!((kind.as_str(), detail.as_str()), ("rateLimited", "too many certificates this week"));
        }
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("issued"),
    }
}

#[test]
fn a_host_that_does_not_lead_here_is_named() {
    match order(Manner::Fair, &["shop.test"], true).outcome {
        Err(AcmeError::NotProved { host, detail }) => {
            assert_eq!((host.as_str(), detail.as_str()), ("shop.test", "shop.test answered 404"));
        }
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("issued"),
    }
}

#[test]
fn what_cannot_be_proved_by_http_is_not_asked_for() {
    let wildcard = order(Manner::Fair, &["*.shop.test"], false).outcome.err();
    assert!(matches!(wildcard, Some(AcmeError::Wildcard(host)) if host == "*.shop.test"));
    let no_http = order(Manner::OffersNoHttp, &["shop.test"], false).outcome.err();
    assert!(matches!(no_http, Some(AcmeError::NoHttpChallenge(host)) if host == "shop.test"));
}

#[test]
fn an_authority_elsewhere_is_asked_by_https_only() {
    let (key, stop) = (AccountKey::generate().unwrap(), AtomicBool::new(false));
    let hosts = ["shop.test".to_string()];
    let wish = Wish {
        directory: "http://192.0.2.1/directory",
        roots_pem: None,
        account_key: &key,
        email: None,
        hosts: &hosts,
        stop: &stop,
    };
    match obtain(&wish, &mut |_| Ok(())) {
        Err(AcmeError::Ask { source, .. }) => assert!(matches!(*source, ureq::Error::RequireHttpsOnly(_))),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("issued"),
    }
}

#[test]
fn an_account_key_reads_back() {
    let key = AccountKey::generate().unwrap();
    let again = AccountKey::from_pkcs8(key.pkcs8()).unwrap();
    assert_eq!(key.thumbprint(), again.thumbprint());
    assert!(AccountKey::from_pkcs8(b"no key").is_err());
}
