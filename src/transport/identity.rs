//! This node's identity on disk: `<data_dir>/identity/`.
//!
//! Files, all 0600: `node.key`, `node.crt`, `ca.crt` (PEM), `cluster.key` (text with checksum) and `store` (JSON: node,
//! store and cluster). Each is written to a temporary file, fsynced and renamed; `store` comes last, so a membership is
//! there wholly or not at all. It never repairs: a damaged file is an error that names it and what to do.
//!
//! Invariant: what loads belongs together (`files_of_two_identities_are_refused`).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use super::authority::{self, Role};
use super::ids::{AuthorityHash, ClusterId, NodeId, PublicKey, StoreId};
use super::sealing::ClusterKey;

const NODE_KEY: &str = "node.key";
const NODE_CERTIFICATE: &str = "node.crt";
const AUTHORITY_CERTIFICATE: &str = "ca.crt";
const CLUSTER_KEY: &str = "cluster.key";
const STORE: &str = "store";

#[derive(Debug, thiserror::Error)]
pub enum LoadIdentityError {
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{path} is damaged: {reason}. Restore it from a backup, or wipe the data directory and `tinydc join` as a new node"
    )]
    Damaged { path: PathBuf, reason: String },
}

#[derive(Debug, thiserror::Error)]
pub enum SaveIdentityError {
    #[error("write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("remove {path}")]
    Remove {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("make an Ed25519 key")]
    Create,
    #[error("the key is not Ed25519 in PKCS#8")]
    Parse,
}

/// A private key of a node, or of a person on a laptop.
pub struct NodeKey {
    pkcs8: Vec<u8>,
    pair: Ed25519KeyPair,
}

impl NodeKey {
    pub fn create() -> Result<NodeKey, KeyError> {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| KeyError::Create)?;
        NodeKey::from_pkcs8(pkcs8.as_ref())
    }

    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<NodeKey, KeyError> {
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(pkcs8).map_err(|_| KeyError::Parse)?;
        Ok(NodeKey { pkcs8: pkcs8.to_vec(), pair })
    }

    pub fn public_key(&self) -> PublicKey {
        let mut key = [0; 32];
        key.copy_from_slice(self.pair.public_key().as_ref());
        PublicKey(key)
    }

    /// An Ed25519 signature, 64 bytes.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.pair.sign(message).as_ref().to_vec()
    }

    pub fn as_pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    pub(super) fn to_rustls(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.pkcs8.clone()))
    }
}

impl Clone for NodeKey {
    fn clone(&self) -> NodeKey {
        NodeKey::from_pkcs8(&self.pkcs8).expect("these bytes were a key before")
    }
}

impl PublicKey {
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, &self.0).verify(message, signature).is_ok()
    }
}

/// What a node has once it is a member of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    pub node_id: NodeId,
    pub store_id: StoreId,
    pub cluster_id: ClusterId,
    pub cluster_name: String,
    pub certificate: CertificateDer<'static>,
    pub authority: CertificateDer<'static>,
}

impl Membership {
    pub fn authority_hash(&self) -> AuthorityHash {
        AuthorityHash::of(&self.authority)
    }
}

/// `store` as it is written: ids in hexadecimal, so that a person can compare them.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoreFile {
    node_id: u64,
    store_id: String,
    cluster_id: String,
    cluster_name: String,
}

/// A node's identity: the key from its first start, the rest from its join on.
#[derive(Clone)]
pub struct Identity {
    pub node_key: NodeKey,
    pub membership: Option<Membership>,
    pub cluster_key: Option<ClusterKey>,
}

fn damaged(path: &Path, reason: impl ToString) -> LoadIdentityError {
    LoadIdentityError::Damaged { path: path.into(), reason: reason.to_string() }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, LoadIdentityError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(LoadIdentityError::Read { path: path.into(), source }),
    }
}

fn read_expected(path: &Path, because: &str) -> Result<Vec<u8>, LoadIdentityError> {
    read(path)?.ok_or_else(|| damaged(path, format_args!("it is missing, but {because}")))
}

fn pem(label: &str, der: &[u8]) -> Vec<u8> {
    let text = STANDARD.encode(der);
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n")).into_bytes()
}

/// Writes a file so that after a crash it is the old one or the new one: temporary file, fsync, rename, fsync of the folder.
pub(super) fn write_durably(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = folder.join(format!(".{name}.tmp"));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, folder.join(name))?;
    File::open(folder)?.sync_all()
}

impl Identity {
    /// `None` if this data directory never had a node.
    pub fn load(data_dir: &Path) -> Result<Option<Identity>, LoadIdentityError> {
        let folder = data_dir.join("identity");
        let path = folder.join(NODE_KEY);
        let Some(bytes) = read(&path)? else {
            let store = folder.join(STORE);
            return match read(&store)? {
                None => Ok(None),
                Some(_) => Err(damaged(&path, "it is missing, but this node is a member")),
            };
        };
        let key = PrivatePkcs8KeyDer::from_pem_slice(&bytes).map_err(|error| damaged(&path, error))?;
        let node_key = NodeKey::from_pkcs8(key.secret_pkcs8_der()).map_err(|error| damaged(&path, error))?;
        let cluster_key_path = folder.join(CLUSTER_KEY);
        let cluster_key = match read(&cluster_key_path)? {
            None => None,
            Some(bytes) => {
                let text = String::from_utf8(bytes).map_err(|error| damaged(&cluster_key_path, error))?;
                let key = ClusterKey::from_text(&text).map_err(|error| damaged(&cluster_key_path, error))?;
                Some(key)
            }
        };
        let membership = load_membership(&folder, &node_key)?;
        Ok(Some(Identity { node_key, membership, cluster_key }))
    }

    /// Writes all that is there; removes `cluster.key` if this node no longer holds it.
    pub fn save(&self, data_dir: &Path) -> Result<(), SaveIdentityError> {
        let folder = data_dir.join("identity");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(|source| SaveIdentityError::Write { path: folder.clone(), source })?;
        let write = |name: &str, bytes: &[u8]| {
            write_durably(&folder, name, bytes)
                .map_err(|source| SaveIdentityError::Write { path: folder.join(name), source })
        };
        write(NODE_KEY, &pem("PRIVATE KEY", self.node_key.as_pkcs8()))?;
        match &self.cluster_key {
            Some(key) => write(CLUSTER_KEY, format!("{}\n", key.to_text()).as_bytes())?,
            None => remove(&folder, CLUSTER_KEY)?,
        }
        let Some(membership) = &self.membership else { return remove(&folder, STORE) };
        write(NODE_CERTIFICATE, &pem("CERTIFICATE", &membership.certificate))?;
        write(AUTHORITY_CERTIFICATE, &pem("CERTIFICATE", &membership.authority))?;
        let store = StoreFile {
            node_id: membership.node_id.0,
            store_id: format!("{:032x}", membership.store_id.0),
            cluster_id: format!("{:032x}", membership.cluster_id.0),
            cluster_name: membership.cluster_name.clone(),
        };
        let text = serde_json::to_string_pretty(&store).expect("strings and numbers are JSON");
        write(STORE, format!("{text}\n").as_bytes())
    }
}

fn remove(folder: &Path, name: &str) -> Result<(), SaveIdentityError> {
    let path = folder.join(name);
    match fs::remove_file(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(SaveIdentityError::Remove { path, source }),
        Ok(()) => {}
    }
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|source| SaveIdentityError::Remove { path, source })
}

fn load_membership(folder: &Path, node_key: &NodeKey) -> Result<Option<Membership>, LoadIdentityError> {
    let path = folder.join(STORE);
    let Some(bytes) = read(&path)? else { return Ok(None) };
    let store: StoreFile = serde_json::from_slice(&bytes).map_err(|error| damaged(&path, error))?;
    let hexadecimal = |text: &str| u128::from_str_radix(text, 16).map_err(|error| damaged(&path, error));
    let certificate = |name: &str| {
        let path = folder.join(name);
        let bytes = read_expected(&path, "this node is a member")?;
        CertificateDer::from_pem_slice(&bytes).map_err(|error| damaged(&path, error))
    };
    let membership = Membership {
        node_id: NodeId(store.node_id),
        store_id: StoreId(hexadecimal(&store.store_id)?),
        cluster_id: ClusterId(hexadecimal(&store.cluster_id)?),
        cluster_name: store.cluster_name,
        certificate: certificate(NODE_CERTIFICATE)?,
        authority: certificate(AUTHORITY_CERTIFICATE)?,
    };
    let path = folder.join(NODE_CERTIFICATE);
    let peer = authority::read_client(&membership.certificate, &membership.authority)
        .map_err(|error| damaged(&path, format_args!("beside {AUTHORITY_CERTIFICATE}, {error}")))?;
    if peer.role != Role::Node || peer.public_key != node_key.public_key() {
        return Err(damaged(&path, format_args!("it is not the certificate of {NODE_KEY}")));
    }
    Ok(Some(membership))
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::transport::authority::Authority;
    use crate::transport::tests::Folder;

    pub fn member(authority: &Authority, number: u64) -> Identity {
        let node_key = NodeKey::create().unwrap();
        let membership = Membership {
            node_id: NodeId(number),
            store_id: StoreId(u128::from(number) << 100),
            cluster_id: ClusterId(7),
            cluster_name: "home".into(),
            certificate: authority.sign_node(node_key.public_key()).unwrap(),
            authority: authority.certificate().clone(),
        };
        Identity { node_key, membership: Some(membership), cluster_key: None }
    }

    #[test]
    fn what_was_saved_loads_and_only_root_may_read_it() {
        let folder = Folder::create();
        assert!(Identity::load(folder.path()).unwrap().is_none());
        let mut identity = member(&Authority::create().unwrap(), 3);
        identity.cluster_key = Some(ClusterKey::create().unwrap());
        identity.save(folder.path()).unwrap();
        let loaded = Identity::load(folder.path()).unwrap().unwrap();
        assert_eq!(loaded.node_key.public_key(), identity.node_key.public_key());
        assert_eq!(loaded.membership, identity.membership);
        assert_eq!(loaded.cluster_key, identity.cluster_key);
        for file in fs::read_dir(folder.path().join("identity")).unwrap() {
            assert_eq!(file.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
        identity.cluster_key = None;
        identity.save(folder.path()).unwrap();
        assert!(Identity::load(folder.path()).unwrap().unwrap().cluster_key.is_none());
    }

    #[test]
    fn a_damaged_file_is_named_with_its_remedy() {
        let identity = || {
            let mut identity = member(&Authority::create().unwrap(), 3);
            identity.cluster_key = Some(ClusterKey::create().unwrap());
            identity
        };
        for name in [NODE_KEY, NODE_CERTIFICATE, AUTHORITY_CERTIFICATE, CLUSTER_KEY, STORE] {
            for content in [&b""[..], b"\xff\xfe garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n"] {
                let folder = Folder::create();
                identity().save(folder.path()).unwrap();
                fs::write(folder.path().join("identity").join(name), content).unwrap();
                let error = Identity::load(folder.path()).err().unwrap().to_string();
                assert!(error.contains(name) || error.contains(NODE_CERTIFICATE), "{name}: {error}");
                assert!(error.contains("tinydc join"), "{error}");
            }
        }
        for name in [NODE_KEY, NODE_CERTIFICATE, AUTHORITY_CERTIFICATE] {
            let folder = Folder::create();
            identity().save(folder.path()).unwrap();
            fs::remove_file(folder.path().join("identity").join(name)).unwrap();
            let error = Identity::load(folder.path()).err().unwrap().to_string();
            assert!(error.contains(name) && error.contains("missing"), "{error}");
        }
    }

    #[test]
    fn files_of_two_identities_are_refused() {
        let (folder, other) = (Folder::create(), Folder::create());
        let authority = Authority::create().unwrap();
        member(&authority, 1).save(folder.path()).unwrap();
        member(&authority, 2).save(other.path()).unwrap();
        let key = other.path().join("identity").join(NODE_KEY);
        fs::copy(key, folder.path().join("identity").join(NODE_KEY)).unwrap();
        assert!(Identity::load(folder.path()).is_err());
    }
}
