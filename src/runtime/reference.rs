//! Image references as Docker's users write them. Pure.
//!
//! Input: `nginx`, `ghcr.io/me/app:1.2`, `localhost:5000/x@sha256:…`. Output: registry, repository, tag and digest.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::images::Digest;

const DEFAULT_REGISTRY: &str = "docker.io";
const NAME_BYTES_MAX: usize = 255;
const TAG_BYTES_MAX: usize = 128;

#[derive(Debug, thiserror::Error)]
#[error("`{text}` is no image reference: {reason}")]
pub struct ReferenceError {
    text: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageReference {
    /// Host with an optional port; `docker.io` when none was written.
    pub registry: String,
    pub repository: String,
    pub tag: Option<String>,
    /// Wins over the tag.
    pub digest: Option<Digest>,
}

impl ImageReference {
    pub fn parse(text: &str) -> Result<ImageReference, ReferenceError> {
        let refuse = |reason| ReferenceError { text: text.chars().take(200).collect(), reason };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                (rest, Some(Digest::parse(digest).map_err(|_| refuse("the digest is not sha256"))?))
            }
            None => (text, None),
        };
        // A colon after the last slash begins a tag; an earlier one a port.
        let name_start = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (path, tag) = match rest[name_start..].split_once(':') {
            Some((name, tag)) => (&rest[..name_start + name.len()], Some(tag)),
            None => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(refuse("a tag is letters, digits, `_`, `.` and `-`"));
        }
        // A first part with a dot or a colon, or `localhost`, is a host.
        let (registry, repository) = match path.split_once('/') {
            Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest.to_owned()),
            _ => (DEFAULT_REGISTRY, path.to_owned()),
        };
        let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
        let repository = match registry == DEFAULT_REGISTRY && !repository.contains('/') {
            true => format!("library/{repository}"),
            false => repository,
        };
        if !is_host(registry) {
            return Err(refuse("the registry is no host with an optional port"));
        }
        if repository.len() > NAME_BYTES_MAX || !repository.split('/').all(is_path_part) {
            return Err(refuse("a name is lower-case letters and digits, parted by `.`, `_`, `-` or `/`"));
        }
        let tag = match (tag, &digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(ImageReference { registry: registry.to_owned(), repository, tag, digest })
    }

    /// Where the registry's API answers.
    pub fn api_host(&self) -> &str {
        if self.registry == DEFAULT_REGISTRY { "registry-1.docker.io" } else { &self.registry }
    }

    /// What the API is asked for: the digest, or else the tag.
    pub fn identifier(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.clone().unwrap_or_else(|| "latest".to_owned()),
        }
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(formatter, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(formatter, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl TryFrom<String> for ImageReference {
    type Error = ReferenceError;

    fn try_from(text: String) -> Result<ImageReference, ReferenceError> {
        ImageReference::parse(&text)
    }
}

impl From<ImageReference> for String {
    fn from(image: ImageReference) -> String {
        image.to_string()
    }
}

fn is_tag(tag: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= TAG_BYTES_MAX
        && tag.bytes().next().is_some_and(is_word)
        && tag.bytes().all(|byte| is_word(byte) || byte == b'.' || byte == b'-')
}

fn is_host(host: &str) -> bool {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        _ => (host, None),
    };
    let is_name = |name: &str| {
        !name.is_empty()
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.' || byte == b'-')
    };
    let is_address = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let is_host =
        is_address.map_or_else(|| is_name(name), |address| address.parse::<std::net::Ipv6Addr>().is_ok());
    is_host && port.is_none_or(|port| port.parse::<u16>().is_ok())
}

/// Lower-case letters and digits with single separators (`_` also double) between them.
fn is_path_part(part: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let allowed = part.bytes().all(|byte| is_word(byte) || b"._-".contains(&byte));
    let ends = part.bytes().next().is_some_and(is_word) && part.bytes().last().is_some_and(is_word);
    allowed && ends && !part.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_mean_what_docker_means() {
        let hex = "ab".repeat(32);
        let cases = [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.2", "docker.io/library/nginx:1.2"),
            ("me/app", "docker.io/me/app:latest"),
            ("docker.io/nginx", "docker.io/library/nginx:latest"),
            ("index.docker.io/me/app:x", "docker.io/me/app:x"),
            ("ghcr.io/me/app", "ghcr.io/me/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/a/b:t", "localhost:5000/a/b:t"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            (&format!("a@sha256:{hex}"), &format!("docker.io/library/a@sha256:{hex}")),
            (&format!("a:t@sha256:{hex}"), &format!("docker.io/library/a:t@sha256:{hex}")),
        ];
        for (text, expected) in cases {
            let parsed = ImageReference::parse(text).unwrap();
            assert_eq!(parsed.to_string(), expected, "{text}");
            assert_eq!(ImageReference::parse(expected).unwrap(), parsed, "{expected}");
        }
        let bad = [
            "",
            ":tag",
            "Upper",
            "a//b",
            "/a",
            "a/",
            "a:",
            "a:b:c",
            "a:-t",
            "a@sha256:00",
            "-a",
            "a..b",
            "a b",
            "host.example:99999/a",
            "ex ample.com/a",
            "a/../b",
            "localhost:5000/",
        ];
        for text in bad {
            assert!(ImageReference::parse(text).is_err(), "{text}");
        }
    }
}
