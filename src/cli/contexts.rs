//! Contexts: the clusters that this person's laptop may talk to.
//!
//! `$XDG_CONFIG_HOME/tinydc/contexts/NAME/` (0700) holds `context.json` (cluster, addresses of nodes), `key`,
//! `certificate` and `ca` (PEM, 0600); `$XDG_CONFIG_HOME/tinydc/current` names the one in use. A context is written
//! beside its place and renamed, so that it is there wholly or not at all. `local` is no context: it means this
//! machine's own socket.
//!
//! Invariant: what was saved loads, and nobody else may read the key (`a_context_loads_as_it_was_saved`).

use crate::model::Order;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use crate::model::ids::is_label;
use crate::transport::authority::{Peer, read_client};
use crate::transport::identity::NodeKey;

/// In place of a context's name: the daemon of this machine.
pub const LOCAL: &str = "local";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextFile {
    pub cluster: String,
    pub cluster_id: String,
    /// Of the nodes' HTTPS API.
    pub addresses: Vec<SocketAddr>,
}

pub struct Context {
    pub name: String,
    pub file: ContextFile,
    pub key: NodeKey,
    pub certificate: CertificateDer<'static>,
    pub authority: CertificateDer<'static>,
}

impl Context {
    /// Who the certificate says this is.
    pub fn person(&self) -> Option<Peer> {
        read_client(&self.certificate, &self.authority).ok()
    }
}

pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Of the person who runs this.
    pub fn open() -> Result<Store, Failure> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let config = set("XDG_CONFIG_HOME").or_else(|| set("HOME").map(|home| home.join(".config")));
        let config = config.ok_or_else(|| {
            Failure::usage("neither XDG_CONFIG_HOME nor HOME is set, so there is no place for contexts")
        })?;
        Ok(Store::at(config.join("tinydc")))
    }

    pub fn at(root: PathBuf) -> Store {
        Store { root }
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.root.join("contexts").join(name)
    }

    pub fn names(&self) -> anyhow::Result<Vec<String>> {
        let folder = self.root.join("contexts");
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| format!("read {}", folder.display()))?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.with_context(|| format!("read {}", folder.display()))?.file_name();
            names.extend(name.into_string().ok().filter(|name| is_label(name)));
        }
        names.order();
        Ok(names)
    }

    pub fn has(&self, name: &str) -> bool {
        is_label(name) && self.folder(name).is_dir()
    }

    fn expect(&self, name: &str) -> Result<PathBuf, Failure> {
        if self.has(name) {
            return Ok(self.folder(name));
        }
        let failure = Failure::usage(format!("there is no context {name}"));
        let names = self.names().unwrap_or_default();
        Err(match names.is_empty() {
            true => {
                failure.hint("on a node: tinydc token --user NAME; here: tinydc context create CONTEXT TOKEN")
            }
            false => failure.hint(format!("there are: {}, {LOCAL}", names.join(", "))),
        })
    }

    pub fn load(&self, name: &str) -> anyhow::Result<Context> {
        let folder = self.expect(name)?;
        let read = |file: &str| {
            let path = folder.join(file);
            fs::read(&path).with_context(|| format!("read {}", path.display()))
        };
        let damaged = |file: &str| {
            Failure::refused(format!("{} is damaged", folder.join(file).display())).hint(format!(
                "make the context anew: tinydc context rm {name}, then tinydc context create {name} TOKEN"
            ))
        };
        let file = serde_json::from_slice(&read("context.json")?).map_err(|_| damaged("context.json"))?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(&read("key")?).map_err(|_| damaged("key"))?;
        let key = NodeKey::from_pkcs8(key.secret_pkcs8_der()).map_err(|_| damaged("key"))?;
        let certificate =
            CertificateDer::from_pem_slice(&read("certificate")?).map_err(|_| damaged("certificate"))?;
        let authority = CertificateDer::from_pem_slice(&read("ca")?).map_err(|_| damaged("ca"))?;
        Ok(Context { name: name.into(), file, key, certificate, authority })
    }

    /// A name that may be given to a new context.
    pub fn check_new(&self, name: &str) -> Result<(), Failure> {
        if !is_label(name) || name == LOCAL {
            return Err(Failure::usage(format!("{name:?} can't name a context"))
                .hint("1 to 40 of a-z, 0-9 and '-'; `local` is this machine's own daemon"));
        }
        match self.has(name) {
            true => Err(Failure::refused(format!("there is a context {name} already"))
                .hint(format!("take another name, or: tinydc context rm {name}"))),
            false => Ok(()),
        }
    }

    pub fn save(&self, context: &Context) -> anyhow::Result<()> {
        self.check_new(&context.name)?;
        let folder = self.folder(&context.name);
        let temporary = folder.with_file_name(format!(".{}.new", context.name));
        let save = || -> io::Result<()> {
            match fs::remove_dir_all(&temporary) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&temporary)?;
            write(&temporary.join("key"), &pem("PRIVATE KEY", context.key.as_pkcs8()))?;
            write(&temporary.join("certificate"), &pem("CERTIFICATE", &context.certificate))?;
            write(&temporary.join("ca"), &pem("CERTIFICATE", &context.authority))?;
            write(&temporary.join("context.json"), &json(&context.file))?;
            fs::rename(&temporary, &folder)
        };
        save().with_context(|| format!("write {}", folder.display()))
    }

    pub fn remember_addresses(&self, name: &str, file: &ContextFile) -> io::Result<()> {
        let folder = self.folder(name);
        let temporary = folder.join(".context.json.new");
        write(&temporary, &json(file))?;
        fs::rename(&temporary, folder.join("context.json"))
    }

    pub fn remove(&self, name: &str) -> anyhow::Result<()> {
        let folder = self.expect(name)?;
        if self.current().as_deref() == Some(name) {
            self.set_current(LOCAL)?;
        }
        fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))
    }

    /// `None`: no context was chosen, or `local` was.
    pub fn current(&self) -> Option<String> {
        let text = fs::read_to_string(self.root.join("current")).ok()?;
        let name = text.trim();
        (!name.is_empty() && name != LOCAL).then(|| name.to_owned())
    }

    pub fn set_current(&self, name: &str) -> anyhow::Result<()> {
        if name != LOCAL {
            self.expect(name)?;
        }
        let path = self.root.join("current");
        let temporary = self.root.join(".current.new");
        let save = || -> io::Result<()> {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.root)?;
            write(&temporary, format!("{name}\n").as_bytes())?;
            fs::rename(&temporary, &path)
        };
        save().with_context(|| format!("write {}", path.display()))
    }
}

fn json(file: &ContextFile) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(file).expect("strings and addresses are JSON");
    text.push(b'\n');
    text
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn pem(label: &str, der: &[u8]) -> Vec<u8> {
    let text = STANDARD.encode(der);
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n")).into_bytes()
}

#[cfg(test)]
pub mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::transport::authority::{Authority, Role};

    /// A folder of its own that is gone with the test.
    pub struct Folder(pub PathBuf);

    impl Folder {
        pub fn create() -> Folder {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("tinydc-cli-{}-{number}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Folder(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn context(name: &str) -> Context {
        let authority = Authority::create().unwrap();
        let key = NodeKey::create().unwrap();
        Context {
            name: name.into(),
            file: ContextFile {
                cluster: "home".into(),
                cluster_id: "07".into(),
                addresses: vec![SocketAddr::from(([192, 0, 2, 1], 7400))],
            },
            certificate: authority.sign_operator(key.public_key(), "ann", 1_795_000_000).unwrap(),
            authority: authority.certificate().clone(),
            key,
        }
    }

    #[test]
    fn a_context_loads_as_it_was_saved() {
        let folder = Folder::create();
        let store = Store::at(folder.0.join("tinydc"));
        assert!(store.names().unwrap().is_empty() && store.current().is_none());
        let saved = context("home");
        store.save(&saved).unwrap();
        store.set_current("home").unwrap();
        let mut loaded = store.load("home").unwrap();
        assert_eq!(loaded.file, saved.file);
        assert_eq!(loaded.key.public_key(), saved.key.public_key());
        assert_eq!(loaded.person().unwrap().role, Role::Operator { name: "ann".into() });
        assert_eq!((store.names().unwrap(), store.current()), (vec!["home".into()], Some("home".into())));
        let path = store.folder("home");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        for file in fs::read_dir(&path).unwrap() {
            assert_eq!(file.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
        loaded.file.addresses.push(SocketAddr::from(([192, 0, 2, 2], 7400)));
        store.remember_addresses("home", &loaded.file).unwrap();
        assert_eq!(store.load("home").unwrap().file, loaded.file);
        store.remove("home").unwrap();
        assert!(store.names().unwrap().is_empty() && store.current().is_none());
    }

    #[test]
    fn a_context_is_never_overwritten_and_a_bad_name_never_leaves_the_folder() {
        let folder = Folder::create();
        let store = Store::at(folder.0.clone());
        store.save(&context("home")).unwrap();
        for name in ["home", "local", "../x", "", "A"] {
            assert!(store.save(&context(name)).is_err(), "{name}");
        }
        assert!(store.remove("..").is_err() && store.load("../home").is_err());
    }

    #[test]
    fn a_damaged_file_is_named_with_its_remedy() {
        let folder = Folder::create();
        let store = Store::at(folder.0.clone());
        store.save(&context("home")).unwrap();
        for file in ["context.json", "key", "certificate", "ca"] {
            let path = store.folder("home").join(file);
            let kept = fs::read(&path).unwrap();
            fs::write(&path, "garbage").unwrap();
            let error = store.load("home").err().unwrap();
            let failure = error.downcast_ref::<Failure>().unwrap();
            assert!(failure.to_string().contains(file) && failure.detail.hint.is_some(), "{failure}");
            fs::write(&path, kept).unwrap();
        }
    }
}
