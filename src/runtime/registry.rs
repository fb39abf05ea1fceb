//! Pulls images from registries, on blocking threads.
//!
//! Input: an image reference, or a digest in a repository. Output: what `images` stores; every byte is checked there.
//! Plain HTTP is spoken to this machine's own loopback and to registries named as insecure, to nobody else, not even
//! after a redirect. Every step has a timeout; a stalled transfer ends after 30 s and is tried again.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ureq::http::{Response, StatusCode};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::images::{
    BlobKind, BlobRequest, ConfigDocument, DOCUMENT_BYTES_MAX, Digest, Document, FetchError, FetchRequest,
    Image, ImageStore, LAYER_UNPACKED_BYTES_MAX, LayerBlobs, ManifestError, Platform, Progress, SourceError,
    StoreError,
};
use super::reference::ImageReference;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Registries with cold storage take their time until the first byte.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
const REDIRECTS_MAX: u32 = 5;
const ATTEMPTS: u32 = 3;
const TOKEN_BYTES_MAX: u64 = 256 * 1024;
const ACCEPTED_MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json";

#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error("resolve {image}")]
    Resolve {
        image: ImageReference,
        #[source]
        source: Box<TransferError>,
    },
    #[error("{image} is not usable here")]
    Unusable {
        image: ImageReference,
        #[source]
        source: Box<ManifestError>,
    },
    #[error("{image} was asked for by digest, but its registry served {actual}")]
    WrongDigest { image: ImageReference, actual: Digest },
    #[error("pull {image}")]
    Fetch {
        image: ImageReference,
        #[source]
        source: Box<FetchError>,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error("the registry has no such image or tag, or hides it without a login")]
    NotFound,
    #[error("the registry refuses access; log in, or check the image's name")]
    Refused,
    #[error("the registry limits pulls for now (HTTP 429); try later or log in")]
    TooMany,
    #[error("the registry answers HTTP {0}")]
    Status(u16),
    #[error("connect to {registry}")]
    Connect {
        registry: String,
        #[source]
        source: Box<ureq::Error>,
    },
    #[error("read from the registry")]
    Read(#[source] std::io::Error),
    #[error("the registry asks for an unusable login (`{0}`)")]
    BadChallenge(String),
    #[error("the login service gives no token")]
    NoToken,
    #[error("the additional CA certificates are no PEM")]
    BadCa,
}

/// How registries are spoken to.
#[derive(Clone, Debug, Default)]
pub struct RegistryConfig {
    /// `host` or `host:port` of registries without TLS.
    pub insecure: Vec<String>,
    /// PEM certificates that are trusted beside the public ones.
    pub extra_ca_pem: Option<Vec<u8>>,
    /// User and password by registry.
    pub credentials: BTreeMap<String, (String, String)>,
}

/// What a reference meant when it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    pub image: ImageReference,
    /// Of the index or manifest as served: the same on every node, whatever its architecture.
    pub digest: Digest,
    /// What it is built for.
    pub platforms: Vec<Platform>,
}

/// What to pull.
pub struct PullRequest<'a> {
    pub image: &'a ImageReference,
    pub digest: &'a Digest,
    pub platform: &'a Platform,
    pub layer_blobs: LayerBlobs,
}

pub struct RegistryClient {
    config: RegistryConfig,
    plain: Agent,
    /// One per set of root certificates, in the order in which they are tried.
    secure: Vec<Agent>,
    /// Bearer tokens by registry and repository.
    tokens: Mutex<BTreeMap<String, String>>,
}

impl RegistryClient {
    pub fn new(config: RegistryConfig) -> Result<RegistryClient, TransferError> {
        let base = || {
            Agent::config_builder()
                .http_status_as_error(false)
                .user_agent(concat!("tinydc/", env!("CARGO_PKG_VERSION")))
                .max_redirects(REDIRECTS_MAX)
                .timeout_resolve(Some(CONNECT_TIMEOUT))
                .timeout_connect(Some(CONNECT_TIMEOUT))
                .timeout_recv_response(Some(ANSWER_TIMEOUT))
                .timeout_per_read(Some(STALL_TIMEOUT))
                .max_idle_connections(2)
        };
        let mut secure = vec![base().https_only(true).build().into()];
        if let Some(pem) = &config.extra_ca_pem {
            let roots = RootCerts::new_with_certs(&certificates(pem)?);
            let tls = TlsConfig::builder().root_certs(roots).build();
            secure.push(base().https_only(true).tls_config(tls).build().into());
        }
        // A proxy of the environment is for the outside.
        let plain = base().proxy(None).build().into();
        Ok(RegistryClient { config, plain, secure, tokens: Mutex::default() })
    }

    /// Asks the registry what `image` means now. Blocks.
    pub fn resolve(&self, image: &ImageReference) -> Result<Resolved, PullError> {
        let failed = |source| PullError::Resolve { image: image.clone(), source: Box::new(source) };
        let unusable = |source| PullError::Unusable { image: image.clone(), source: Box::new(source) };
        let read = |kind, identifier: &str| -> Result<Vec<u8>, PullError> {
            let mut bytes = Vec::new();
            let reader = self.open(image, kind, identifier).map_err(failed)?;
            let read = reader.take(DOCUMENT_BYTES_MAX).read_to_end(&mut bytes);
            read.map_err(|source| failed(TransferError::Read(source)))?;
            Ok(bytes)
        };
        let bytes = read(BlobKind::Manifest, &image.identifier())?;
        let digest = Digest::of(&bytes);
        if image.digest.as_ref().is_some_and(|wanted| *wanted != digest) {
            return Err(PullError::WrongDigest { image: image.clone(), actual: digest });
        }
        let platforms = match Document::parse(&digest, &bytes).map_err(unusable)? {
            Document::Index(index) => index.manifests.into_iter().map(|(platform, _)| platform).collect(),
            Document::Manifest(manifest) => {
                let config = manifest.config.digest;
                let bytes = read(BlobKind::Config, &config.to_string())?;
                if Digest::of(&bytes) != config {
                    return Err(PullError::WrongDigest { image: image.clone(), actual: Digest::of(&bytes) });
                }
                vec![ConfigDocument::parse(&config, &bytes).map_err(unusable)?.platform]
            }
        };
        let platforms = Platform::runnable(platforms).map_err(unusable)?;
        Ok(Resolved { image: image.clone(), digest, platforms })
    }

    /// Brings an image into the store. What is there already is not asked for. Blocks.
    pub fn pull(
        &self,
        store: &ImageStore,
        request: &PullRequest<'_>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Image, PullError> {
        let name = request.image.to_string();
        let fetch = FetchRequest {
            digest: request.digest,
            name: Some(&name),
            platform: request.platform,
            layer_blobs: request.layer_blobs,
            layer_unpacked_bytes_max: LAYER_UNPACKED_BYTES_MAX,
        };
        let mut source = |blob: &BlobRequest| -> Result<Box<dyn Read>, SourceError> {
            Ok(self.open(request.image, blob.kind, &blob.digest.to_string())?)
        };
        let mut attempt = 1;
        loop {
            match store.fetch(&fetch, &mut source, progress) {
                Ok(image) => return Ok(image),
                Err(error) if attempt == ATTEMPTS || is_final(&error) => {
                    return Err(PullError::Fetch { image: request.image.clone(), source: Box::new(error) });
                }
                // Layers that are done stay done; only the broken one is read again.
                Err(_) => std::thread::sleep(Duration::from_secs(u64::from(attempt))),
            }
            attempt += 1;
        }
    }

    /// Opens a manifest or a blob of an image's repository.
    fn open(
        &self,
        image: &ImageReference,
        kind: BlobKind,
        identifier: &str,
    ) -> Result<Box<dyn Read>, TransferError> {
        let (folder, accept) = match kind {
            BlobKind::Manifest => ("manifests", ACCEPTED_MANIFESTS),
            BlobKind::Config | BlobKind::Layer => ("blobs", "*/*"),
        };
        let scheme = if self.is_plain(&image.registry) { "http" } else { "https" };
        let host = image.api_host();
        let url = format!("{scheme}://{host}/v2/{}/{folder}/{identifier}", image.repository);
        let scope = format!("{} {}", image.registry, image.repository);
        // A second round after a login; a token may also have run out.
        for round in 0..2 {
            let token = self.tokens().get(&scope).cloned();
            let answer = self.call(image, &url, accept, token.as_deref())?;
            match answer.status() {
                StatusCode::OK => return Ok(Box::new(answer.into_body().into_reader())),
                StatusCode::UNAUTHORIZED if round == 0 => {
                    let token = self.log_in(image, &answer)?;
                    self.tokens().insert(scope.clone(), token);
                }
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(TransferError::Refused),
                StatusCode::NOT_FOUND => return Err(TransferError::NotFound),
                StatusCode::TOO_MANY_REQUESTS => return Err(TransferError::TooMany),
                other => return Err(TransferError::Status(other.as_u16())),
            }
        }
        Err(TransferError::Refused)
    }

    fn call(
        &self,
        image: &ImageReference,
        url: &str,
        accept: &str,
        authorization: Option<&str>,
    ) -> Result<Response<Body>, TransferError> {
        let plain = std::slice::from_ref(&self.plain);
        let agents = if self.is_plain(&image.registry) { plain } else { &self.secure };
        let mut last = None;
        for agent in agents {
            // ureq drops the authorization when it follows a redirect: blobs lie with other hosts.
            let mut request = agent.get(url).header("accept", accept);
            if let Some(value) = authorization {
                request = request.header("authorization", value);
            }
            match request.call() {
                Ok(answer) => return Ok(answer),
                Err(error) => last = Some(error),
            }
        }
        let source = last.unwrap_or(ureq::Error::HostNotFound);
        Err(TransferError::Connect { registry: image.registry.clone(), source: Box::new(source) })
    }

    /// Answers a 401: `Basic` with the credentials themselves, `Bearer` with a token from the named service.
    fn log_in(&self, image: &ImageReference, refusal: &Response<Body>) -> Result<String, TransferError> {
        let challenge = refusal.headers().get("www-authenticate").and_then(|value| value.to_str().ok());
        let challenge = challenge.unwrap_or_default();
        let credentials = self.config.credentials.get(&image.registry);
        let basic = credentials
            .map(|(user, password)| format!("Basic {}", BASE64.encode(format!("{user}:{password}"))));
        let (method, parameters) = challenge.split_once(' ').unwrap_or((challenge, ""));
        if method.eq_ignore_ascii_case("basic") {
            return basic.ok_or(TransferError::Refused);
        }
        let bad = || TransferError::BadChallenge(challenge.chars().take(200).collect());
        let realm = parameter(parameters, "realm").ok_or_else(bad)?;
        let is_usable =
            realm.starts_with("https://") || (realm.starts_with("http://") && self.is_plain(&image.registry));
        if !method.eq_ignore_ascii_case("bearer") || !is_usable {
            return Err(bad());
        }
        let service = parameter(parameters, "service").unwrap_or_default();
        let scope = format!("repository:{}:pull", image.repository);
        let joint = if realm.contains('?') { '&' } else { '?' };
        let url = format!("{realm}{joint}service={}&scope={}", escaped(service), escaped(&scope));
        let answer = self.call(image, &url, "application/json", basic.as_deref())?;
        if answer.status() != StatusCode::OK {
            return Err(TransferError::Refused);
        }
        let mut text = Vec::new();
        let reader = answer.into_body().into_reader();
        reader.take(TOKEN_BYTES_MAX).read_to_end(&mut text).map_err(TransferError::Read)?;
        let document: serde_json::Value =
            serde_json::from_slice(&text).map_err(|_| TransferError::NoToken)?;
        let token = document["token"].as_str().or(document["access_token"].as_str());
        let token = token.filter(|token| token.bytes().all(|byte| byte.is_ascii_graphic()));
        token.map(|token| format!("Bearer {token}")).ok_or(TransferError::NoToken)
    }

    fn is_plain(&self, registry: &str) -> bool {
        is_loopback(registry) || self.config.insecure.iter().any(|insecure| insecure == registry)
    }

    fn tokens(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, String>> {
        // Whole between any two statements, so a panic elsewhere does not spoil it.
        self.tokens.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Trying again cannot help.
fn is_final(error: &FetchError) -> bool {
    match error {
        FetchError::Manifest(_) | FetchError::NestedIndex(_) | FetchError::DiffIdMismatch { .. } => true,
        FetchError::Store(StoreError::Io { .. } | StoreError::Manifest(_)) => true,
        FetchError::Source { source, .. } => {
            let transfer = source.downcast_ref::<TransferError>();
            matches!(
                transfer,
                Some(TransferError::NotFound | TransferError::Refused | TransferError::TooMany)
            )
        }
        _ => false,
    }
}

/// `localhost`, 127.0.0.0/8 or ::1, with or without a port.
fn is_loopback(registry: &str) -> bool {
    let host = match registry.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => registry.rsplit_once(':').map_or(registry, |(host, _)| host),
    };
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn certificates(pem: &[u8]) -> Result<Vec<Certificate<'static>>, TransferError> {
    let mut all = Vec::new();
    for item in parse_pem(pem) {
        if let PemItem::Certificate(certificate) = item.map_err(|_| TransferError::BadCa)? {
            all.push(certificate);
        }
    }
    if all.is_empty() { Err(TransferError::BadCa) } else { Ok(all) }
}

/// `key="value"` of a challenge.
fn parameter<'a>(parameters: &'a str, key: &str) -> Option<&'a str> {
    parameters.split(',').find_map(|part| {
        let (name, value) = part.trim().split_once('=')?;
        name.eq_ignore_ascii_case(key).then(|| value.trim_matches('"'))
    })
}

/// Percent-encodes all but the characters that never need it.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_spoken_to_without_tls() {
        for loopback in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.8.9.1", "[::1]:5000"] {
            assert!(is_loopback(loopback), "{loopback}");
        }
        for other in
            ["localhost.example.com", "docker.io", "10.0.0.1:5000", "127.0.0.1.example.com", "[fe80::1]:5"]
        {
            assert!(!is_loopback(other), "{other}");
        }
    }

    #[test]
    fn challenges_are_read_and_scopes_escaped() {
        let text = r#"realm="https://auth.example/token",service="registry.example", Scope="x""#;
        assert_eq!(parameter(text, "realm"), Some("https://auth.example/token"));
        assert_eq!(parameter(text, "scope"), Some("x"));
        assert_eq!(parameter(text, "error"), None);
        assert_eq!(escaped("repository:a/b-c:pull"), "repository%3Aa%2Fb-c%3Apull");
    }
}
