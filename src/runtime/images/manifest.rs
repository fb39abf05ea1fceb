//! Reads manifests, indexes and image configurations.
//!
//! Input: bytes whose digest was checked. Output: small types with parsed digests; nothing else is trusted.

use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest};
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use crate::model::spec::{HEALTH_INTERVAL_MS, HEALTH_RETRIES, HEALTH_TIMEOUT_MS};
use crate::model::{HealthSpec, HealthTest, Order};

/// A manifest, an index or a configuration is never longer.
pub const DOCUMENT_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// A compressed layer is never longer.
pub const LAYER_BYTES_MAX: u64 = 8 * 1024 * 1024 * 1024;
/// What overlayfs stacks in one page of mount options (`linux::mount`).
pub const LAYERS_MAX: usize = 128;

#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("{digest} is no OCI or Docker {what}")]
    Parse {
        what: &'static str,
        digest: Digest,
        #[source]
        source: serde_json::Error,
    },
    #[error("{digest} names a blob by an unusable digest")]
    BadDigest {
        digest: Digest,
        #[source]
        source: super::digest::DigestError,
    },
    #[error("the image is not built for {wanted}; it has {offered}")]
    NoPlatform { wanted: Platform, offered: String },
    #[error("no machine can run the image: it has {offered}")]
    Unrunnable { offered: String },
    #[error("{manifest} has {layers} layers but its configuration lists {diff_ids}")]
    LayerCount { manifest: Digest, layers: usize, diff_ids: usize },
    #[error("{manifest} has {layers} layers; at most {LAYERS_MAX} can be stacked")]
    TooManyLayers { manifest: Digest, layers: usize },
    #[error("{blob} has an impossible size of {bytes} bytes")]
    BlobSize { blob: Digest, bytes: u64 },
}

/// An architecture as image indexes name it (`amd64`, `arm64`, `arm`) with its variant (`v7`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    pub architecture: String,
    pub variant: Option<String>,
}

/// What a node may be: as Rust names it, and as image indexes do.
const HOSTS: [(&str, &str, Option<&str>); 4] = [
    ("x86_64", "amd64", None),
    ("aarch64", "arm64", Some("v8")),
    ("arm", "arm", Some("v7")),
    ("riscv64", "riscv64", None),
];

impl Platform {
    /// The platform of this binary.
    pub fn host() -> Platform {
        let own = HOSTS.iter().find(|(name, ..)| *name == std::env::consts::ARCH);
        let (_, architecture, variant) = own.copied().unwrap_or(("", std::env::consts::ARCH, None));
        Platform { architecture: architecture.into(), variant: variant.map(Into::into) }
    }

    /// Whether some node could run such an offer. A node's architecture decides: it has one platform.
    pub fn is_runnable(&self) -> bool {
        HOSTS.iter().any(|(_, architecture, variant)| {
            let host = Platform { architecture: (*architecture).into(), variant: variant.map(Into::into) };
            host.suits(self).is_some()
        })
    }

    /// Those offers that some node could run. None of them: whoever deploys it is to hear so at once.
    pub fn runnable(offers: Vec<Platform>) -> Result<Vec<Platform>, ManifestError> {
        let runnable: Vec<Platform> = offers.iter().filter(|offer| offer.is_runnable()).cloned().collect();
        if runnable.is_empty() {
            return Err(ManifestError::Unrunnable { offered: names(&offers) });
        }
        Ok(runnable)
    }

    /// How well an offer suits: higher is better, `None` does not run here.
    fn suits(&self, offer: &Platform) -> Option<u32> {
        if self.architecture != offer.architecture {
            return None;
        }
        let level = |variant: &Option<String>| {
            variant.as_deref().map(|text| text.trim_start_matches('v').parse::<u32>().unwrap_or(u32::MAX))
        };
        match (self.architecture.as_str(), level(&self.variant), level(&offer.variant)) {
            (_, _, None) => Some(0),
            // 32-bit ARM is compatible downwards; the highest level that still runs is the fastest.
            ("arm", Some(own), Some(offered)) => (offered <= own).then_some(offered),
            ("arm64", _, Some(offered)) => (offered == 8).then_some(1),
            // amd64 levels above 1 may use instructions that this processor lacks.
            (_, _, Some(offered)) => (offered <= 1).then_some(0),
        }
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "linux/{}", self.architecture)?;
        match &self.variant {
            Some(variant) => write!(formatter, "/{variant}"),
            None => Ok(()),
        }
    }
}

fn names(offers: &[Platform]) -> String {
    let names: Vec<String> = offers.iter().map(Platform::to_string).collect();
    if names.is_empty() { "nothing for linux".into() } else { names.join(", ") }
}

/// A blob that a manifest or an index names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobRef {
    pub digest: Digest,
    pub size_bytes: u64,
}

/// What a top digest turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    Manifest(Manifest),
    Index(Index),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub digest: Digest,
    pub config: BlobRef,
    /// Base layer first.
    pub layers: Vec<BlobRef>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    pub digest: Digest,
    /// Entries for Linux, in the index's order; attestations and other systems are left out.
    pub manifests: Vec<(Platform, BlobRef)>,
    /// Every digest in it, to tell what an index keeps alive.
    pub all: Vec<Digest>,
}

/// What a container takes from its image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub command: Vec<String>,
    pub env: Vec<String>,
    pub working_dir: String,
    pub user: String,
    pub stop_signal: Option<String>,
    pub volumes: Vec<String>,
    pub exposed_ports: Vec<String>,
    pub labels: Vec<(String, String)>,
    /// HEALTHCHECK, with Docker's defaults.
    #[serde(default)]
    pub health: Option<HealthSpec>,
}

/// What Docker adds to a configuration that the OCI format does not name; times are in nanoseconds.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct DockerHealth {
    test: Vec<String>,
    interval: u64,
    timeout: u64,
    start_period: u64,
    retries: u32,
}

#[derive(Default, Deserialize)]
struct DockerConfig {
    #[serde(rename = "Healthcheck")]
    health: Option<DockerHealth>,
}

#[derive(Default, Deserialize)]
struct DockerDocument {
    config: Option<DockerConfig>,
}

impl DockerHealth {
    /// `None`: NONE, or not understood. An image that was built elsewhere must not fail to start for its check.
    fn to_spec(&self) -> Option<HealthSpec> {
        let test = match self.test.as_slice() {
            [kind, line] if kind == "CMD-SHELL" => HealthTest::Shell(line.clone()),
            [kind, words @ ..] if kind == "CMD" && !words.is_empty() => HealthTest::Exec(words.to_vec()),
            _ => return None,
        };
        let ms = |nanoseconds: u64, default| match nanoseconds / 1_000_000 {
            0 => default,
            ms => ms,
        };
        Some(HealthSpec {
            test,
            interval_ms: ms(self.interval, HEALTH_INTERVAL_MS),
            timeout_ms: ms(self.timeout, HEALTH_TIMEOUT_MS),
            retries: if self.retries == 0 { HEALTH_RETRIES } else { self.retries },
            start_period_ms: ms(self.start_period, 0),
        })
    }
}

impl Document {
    pub fn parse(digest: &Digest, bytes: &[u8]) -> Result<Document, ManifestError> {
        // The body decides, not the media type that a registry claims: an index has `manifests`.
        #[derive(Deserialize)]
        struct Shape {
            manifests: Option<serde::de::IgnoredAny>,
        }
        let shape: Shape = parse_json("manifest", digest, bytes)?;
        if shape.manifests.is_some() {
            return Index::parse(digest, bytes).map(Document::Index);
        }
        Manifest::parse(digest, bytes).map(Document::Manifest)
    }
}

impl Manifest {
    fn parse(digest: &Digest, bytes: &[u8]) -> Result<Manifest, ManifestError> {
        let manifest: ImageManifest = parse_json("image manifest", digest, bytes)?;
        let config = blob_ref(digest, manifest.config())?;
        if config.size_bytes > DOCUMENT_BYTES_MAX {
            return Err(ManifestError::BlobSize { blob: config.digest, bytes: config.size_bytes });
        }
        let layers: Vec<BlobRef> =
            manifest.layers().iter().map(|layer| blob_ref(digest, layer)).collect::<Result<_, _>>()?;
        if layers.len() > LAYERS_MAX {
            return Err(ManifestError::TooManyLayers { manifest: digest.clone(), layers: layers.len() });
        }
        Ok(Manifest { digest: digest.clone(), config, layers })
    }
}

impl Index {
    fn parse(digest: &Digest, bytes: &[u8]) -> Result<Index, ManifestError> {
        let index: ImageIndex = parse_json("image index", digest, bytes)?;
        let mut manifests = Vec::new();
        let mut all = Vec::new();
        for entry in index.manifests() {
            let blob = blob_ref(digest, entry)?;
            all.push(blob.digest.clone());
            let Some(platform) = entry.platform() else { continue };
            if platform.os().to_string() == "linux" {
                let architecture = platform.architecture().to_string();
                manifests.push((Platform { architecture, variant: platform.variant().clone() }, blob));
            }
        }
        Ok(Index { digest: digest.clone(), manifests, all })
    }

    /// The manifest for `wanted`.
    pub fn choose(&self, wanted: &Platform) -> Result<&BlobRef, ManifestError> {
        // max_by_key takes the last of equals; the first is what other runtimes take.
        let suited =
            self.manifests.iter().rev().filter_map(|(offer, blob)| Some((wanted.suits(offer)?, blob)));
        suited.max_by_key(|(rank, _)| *rank).map(|(_, blob)| blob).ok_or_else(|| {
            let offers: Vec<Platform> = self.manifests.iter().map(|(offer, _)| offer.clone()).collect();
            ManifestError::NoPlatform { wanted: wanted.clone(), offered: names(&offers) }
        })
    }
}

/// The configuration blob: settings, platform, and the digest of each layer's tar, base first.
#[derive(Clone, Debug)]
pub struct ConfigDocument {
    pub config: ImageConfig,
    pub platform: Platform,
    pub diff_ids: Vec<Digest>,
}

impl ConfigDocument {
    pub fn parse(digest: &Digest, bytes: &[u8]) -> Result<ConfigDocument, ManifestError> {
        let parsed: ImageConfiguration = parse_json("image configuration", digest, bytes)?;
        let diff_ids = parsed.rootfs().diff_ids().iter().map(|text| {
            Digest::parse(text).map_err(|source| ManifestError::BadDigest { digest: digest.clone(), source })
        });
        let diff_ids = diff_ids.collect::<Result<Vec<_>, _>>()?;
        let inner = parsed.config().clone().unwrap_or_default();
        // Best effort: what is no check of Docker's is none.
        let docker: DockerDocument = serde_json::from_slice(bytes).unwrap_or_default();
        let health = docker.config.and_then(|config| config.health).and_then(|health| health.to_spec());
        let mut labels: Vec<_> = inner.labels().clone().unwrap_or_default().into_iter().collect();
        labels.order();
        let config = ImageConfig {
            entrypoint: inner.entrypoint().clone().unwrap_or_default(),
            command: inner.cmd().clone().unwrap_or_default(),
            env: inner.env().clone().unwrap_or_default(),
            working_dir: inner.working_dir().clone().unwrap_or_default(),
            user: inner.user().clone().unwrap_or_default(),
            stop_signal: inner.stop_signal().clone(),
            volumes: inner.volumes().clone().unwrap_or_default(),
            exposed_ports: inner.exposed_ports().clone().unwrap_or_default(),
            labels,
            health,
        };
        let architecture = parsed.architecture().to_string();
        let os = parsed.os().to_string();
        // Old tools left it empty, and meant Linux.
        if !os.is_empty() && os != "linux" {
            return Err(ManifestError::Unrunnable { offered: format!("{os}/{architecture}") });
        }
        let variant = parsed.variant().clone();
        Ok(ConfigDocument { config, platform: Platform { architecture, variant }, diff_ids })
    }

    /// Fails when `host` cannot run the image or its layers are not all described.
    pub fn check(&self, manifest: &Manifest, host: &Platform) -> Result<(), ManifestError> {
        let (layers, diff_ids) = (manifest.layers.len(), self.diff_ids.len());
        if layers != diff_ids {
            return Err(ManifestError::LayerCount { manifest: manifest.digest.clone(), layers, diff_ids });
        }
        if host.suits(&self.platform).is_none() {
            let offered = self.platform.to_string();
            return Err(ManifestError::NoPlatform { wanted: host.clone(), offered });
        }
        Ok(())
    }
}

fn parse_json<'a, T: Deserialize<'a>>(
    what: &'static str,
    digest: &Digest,
    bytes: &'a [u8],
) -> Result<T, ManifestError> {
    serde_json::from_slice(bytes).map_err(|source| ManifestError::Parse {
        what,
        digest: digest.clone(),
        source,
    })
}

fn blob_ref(owner: &Digest, descriptor: &Descriptor) -> Result<BlobRef, ManifestError> {
    let digest = Digest::parse(descriptor.digest().as_ref())
        .map_err(|source| ManifestError::BadDigest { digest: owner.clone(), source })?;
    let size_bytes = descriptor.size();
    if size_bytes > LAYER_BYTES_MAX {
        return Err(ManifestError::BlobSize { blob: digest, bytes: size_bytes });
    }
    Ok(BlobRef { digest, size_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_s_own_check_is_read_with_docker_s_defaults() {
        let health = |check: &str| {
            let text = format!(
                r#"{{"architecture":"amd64","os":"linux","config":{{"Healthcheck":{check}}},
                "rootfs":{{"type":"layers","diff_ids":[]}}}}"#
            );
            ConfigDocument::parse(&Digest::of(b""), text.as_bytes()).unwrap().config.health
        };
        let full = health(
            r#"{"Test":["CMD","curl","-f","x"],"Interval":5000000000,"Timeout":2000000000,"StartPeriod":1000000000,"Retries":5}"#,
        );
        let test = HealthTest::Exec(["curl", "-f", "x"].map(String::from).to_vec());
        let expected =
            HealthSpec { test, interval_ms: 5_000, timeout_ms: 2_000, retries: 5, start_period_ms: 1_000 };
        assert_eq!(full, Some(expected));
        let short = health(r#"{"Test":["CMD-SHELL","exit 0"]}"#).unwrap();
        assert_eq!(
            (short.test, short.interval_ms, short.retries),
            (HealthTest::Shell("exit 0".into()), 30_000, 3)
        );
        for none in
            ["null", "{}", r#"{"Test":["NONE"]}"#, r#"{"Test":[]}"#, r#"{"Test":["CMD"]}"#, r#"{"Test":7}"#]
        {
            assert_eq!(health(none), None, "{none}");
        }
    }

    fn platform(text: &str) -> Platform {
        let (architecture, variant) =
            text.split_once('/').map_or((text, None), |(a, v)| (a, Some(v.to_owned())));
        Platform { architecture: architecture.to_owned(), variant }
    }

    #[test]
    fn the_best_manifest_that_runs_here_is_chosen() {
        let digest = |byte: u8| Digest::from_hex(&format!("{byte:02x}").repeat(32)).unwrap();
        let cases = [
            ("amd64", vec!["arm64/v8", "amd64", "amd64/v3"], Some(1)),
            ("arm64/v8", vec!["arm/v7", "arm64/v8"], Some(1)),
            ("arm64/v8", vec!["arm64"], Some(0)),
            ("arm/v7", vec!["arm/v5", "arm/v7", "arm/v6", "arm/v8"], Some(1)),
            ("arm/v6", vec!["arm/v5", "arm/v7", "arm/v6"], Some(2)),
            ("arm/v6", vec!["arm/v7"], None),
            ("amd64", vec!["amd64", "amd64"], Some(0)),
            ("amd64", vec![], None),
        ];
        for (host, offers, expected) in cases {
            let manifests = offers
                .iter()
                .zip(0u8..)
                .map(|(offer, n)| (platform(offer), BlobRef { digest: digest(n), size_bytes: 1 }))
                .collect();
            let index = Index { digest: digest(255), manifests, all: vec![] };
            let chosen = index.choose(&platform(host)).ok().map(|blob| blob.digest.clone());
            assert_eq!(chosen, expected.map(digest), "{host} of {offers:?}");
        }
    }

    #[test]
    fn what_no_machine_runs_is_refused() {
        let text =
            r#"{"architecture":"amd64","os":"windows","config":{},"rootfs":{"type":"layers","diff_ids":[]}}"#;
        let refused = ConfigDocument::parse(&Digest::of(b""), text.as_bytes()).unwrap_err();
        assert_eq!(refused.to_string(), "no machine can run the image: it has windows/amd64");
        let runs = |offers: &[&str]| {
            let offers = offers.iter().map(|text| platform(text)).collect();
            let names = |offers: Vec<Platform>| offers.iter().map(Platform::to_string).collect::<Vec<_>>();
            Platform::runnable(offers).map(names).map_err(|error| error.to_string())
        };
        let both = runs(&["amd64/v3", "amd64", "arm64/v9", "arm64/v8", "arm/v8", "arm/v6", "s390x"]);
        assert_eq!(both.unwrap(), ["linux/amd64", "linux/arm64/v8", "linux/arm/v6"]);
        let refused = runs(&["amd64/v3", "arm64/v9"]).unwrap_err();
        assert_eq!(refused, "no machine can run the image: it has linux/amd64/v3, linux/arm64/v9");
        let refused = runs(&[]).unwrap_err();
        assert_eq!(refused, "no machine can run the image: it has nothing for linux");
    }

    #[test]
    fn a_digest_that_is_no_file_name_is_refused() {
        let bytes = br#"{"schemaVersion":2,"config":{"mediaType":"a/b","digest":"sha256:../../etc","size":1},"layers":[]}"#;
        assert!(Document::parse(&Digest::of(bytes), bytes).is_err());
    }
}
