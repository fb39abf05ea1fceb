//! Keeps what the ingress of this node shows to visitors: for each wished host a certificate whose key was opened.
//!
//! State → hosts and where their certificates come from; the ingress's table, and for each host without one the reason.
//! Keys are opened one after another on a blocking thread, here or by asking a node that can, and kept in memory. While
//! a new one is opened the old one is shown.

use super::secrets::{Sealed, Secrets};
use super::worker::chain;
use crate::compose::ingress_labels::TlsSource;
use crate::network::ingress::{
    CertificateAbout, CertifiedKey, HostCertificate, certificate_from_pem, covers,
};
use crate::planner::certificates::wished;
use crate::state::State;
use crate::tasks::Launch;
use async_executor::{Executor, Task};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// After a key could not be opened.
const AGAIN_AFTER: Duration = Duration::from_secs(3);

/// What `tinydc net` shows of one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateView {
    pub host: String,
    /// `APP/SERVICE` that wishes for it.
    pub service: String,
    /// `secret NAME`, `acme` or `cluster`.
    pub source: String,
    /// Of the one that is shown, as its secret or row counts them.
    pub version: Option<u64>,
    pub about: Option<CertificateAbout>,
    pub problem: Option<String>,
}

/// Which one: a secret or a host's row, and the version of it.
type Wanted = (Sealed, u64);

#[derive(Clone)]
struct Shown {
    wanted: Wanted,
    certificate: Arc<CertifiedKey>,
    about: CertificateAbout,
}

struct Work {
    host: String,
    wanted: Wanted,
    /// `None`: the secret holds it, too.
    chain_pem: Option<String>,
}

type Outcome = (String, Wanted, Result<(Arc<CertifiedKey>, CertificateAbout), String>);

pub struct Certificates {
    secrets: Arc<Secrets>,
    executor: Arc<Executor<'static>>,
    shown: BTreeMap<String, Shown>,
    failed: BTreeMap<String, (Wanted, String, Instant)>,
    opening: Option<Task<()>>,
    opened: Arc<Mutex<Vec<Outcome>>>,
    /// Something came up while others were opened.
    has_more: bool,
}

impl Certificates {
    pub fn new(secrets: Arc<Secrets>, executor: Arc<Executor<'static>>) -> Certificates {
        Certificates {
            secrets,
            executor,
            shown: BTreeMap::new(),
            failed: BTreeMap::new(),
            opening: None,
            opened: Arc::default(),
            has_more: false,
        }
    }

    /// Whether `follow` would come to something else although the state is the same.
    pub fn has_news(&self, now: Instant) -> bool {
        let is_again = self.failed.values().any(|(_, _, at)| now.duration_since(*at) >= AGAIN_AFTER);
        let is_idle = self.opening.as_ref().is_none_or(Task::is_finished);
        !lock(&self.opened).is_empty() || (is_idle && (is_again || self.has_more))
    }

    /// `wake` is called when there is news.
    pub fn follow(
        &mut self,
        state: &State,
        now: Instant,
        wake: impl Fn() + Send + 'static,
    ) -> (Vec<HostCertificate>, Vec<CertificateView>) {
        for (host, wanted, outcome) in std::mem::take(&mut *lock(&self.opened)) {
            match outcome {
                Ok((certificate, about)) => {
                    self.failed.remove(&host);
                    self.shown.insert(host, Shown { wanted, certificate, about });
                }
                Err(why) => drop(self.failed.insert(host, (wanted, why, now))),
            }
        }
        let wished = wished(state);
        self.shown.retain(|host, _| wished.contains_key(host));
        self.failed.retain(|host, _| wished.contains_key(host));
        let mut work = Vec::new();
        let mut views = Vec::new();
        for (host, (source, service)) in &wished {
            let found = find(state, host, source, &service.app);
            let shown = self.shown.get(host);
            let mut problem = found.as_ref().err().cloned();
            if let Ok((wanted, chain_pem)) = found
                && shown.is_none_or(|shown| shown.wanted != wanted)
            {
                let failed = self.failed.get(host).filter(|(tried, _, _)| *tried == wanted);
                problem = Some(failed.map_or_else(|| "it is being opened".into(), |(_, why, _)| why.clone()));
                if failed.is_none_or(|(_, _, at)| now.duration_since(*at) >= AGAIN_AFTER) {
                    work.push(Work { host: host.clone(), wanted, chain_pem });
                }
            }
            let source = match source {
                TlsSource::Secret(name) => format!("secret {name}"),
                TlsSource::Acme => "acme".into(),
                TlsSource::Cluster => "cluster".into(),
            };
            views.push(CertificateView {
                host: host.clone(),
                service: format!("{}/{}", service.app, service.name),
                source,
                version: shown.map(|shown| shown.wanted.1),
                about: shown.map(|shown| shown.about.clone()),
                problem,
            });
        }
        self.open(work, wake);
        let certificates = self.shown.iter().map(|(host, shown)| HostCertificate {
            host: host.clone(),
            certificate: shown.certificate.clone(),
        });
        (certificates.collect(), views)
    }

    /// One round at a time; what came up meanwhile is in the next.
    fn open(&mut self, work: Vec<Work>, wake: impl Fn() + Send + 'static) {
        let is_busy = self.opening.as_ref().is_some_and(|task| !task.is_finished());
        self.has_more = is_busy && !work.is_empty();
        if work.is_empty() || is_busy {
            return;
        }
        let (secrets, opened) = (self.secrets.clone(), self.opened.clone());
        self.opening = Some(self.executor.launch(async move {
            for one in work {
                let secrets = secrets.clone();
                let outcome = crate::tasks::unblock(move || {
                    let outcome = prepare(&secrets, &one);
                    (one.host, one.wanted, outcome)
                })
                .await;
                lock(&opened).push(outcome);
            }
            wake();
        }));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What to open for a host; else why there is nothing.
fn find(
    state: &State,
    host: &str,
    source: &TlsSource,
    app: &crate::model::AppName,
) -> Result<(Wanted, Option<String>), String> {
    if let TlsSource::Secret(name) = source {
        let name = state.certificate_secret(app, name);
        let row = state.secrets.find(&name).ok_or_else(|| format!("secret {name} is gone"))?;
        return Ok(((Sealed::Secret(name), row.version), None));
    }
    let row = state.certificates.find(&host.to_owned());
    match row.and_then(|row| row.issued.as_ref()) {
        Some(issued) => {
            let wanted = (Sealed::CertificateKey(host.into()), issued.version);
            Ok((wanted, Some(issued.chain_pem.clone())))
        }
        None => {
            let trouble = row.and_then(|row| row.trouble.as_ref());
            Err(trouble.map_or_else(|| "it is being ordered".into(), ToString::to_string))
        }
    }
}

fn prepare(secrets: &Secrets, work: &Work) -> Result<(Arc<CertifiedKey>, CertificateAbout), String> {
    let (sealed, version) = &work.wanted;
    let opened = secrets.open_sealed(sealed, *version).map_err(|error| chain(&error))?;
    let text = std::str::from_utf8(&opened.bytes).map_err(|_| "it is no PEM text".to_owned())?;
    let certificate = certificate_from_pem(work.chain_pem.as_deref().unwrap_or(text), text);
    let certificate = certificate.map_err(|error| chain(&error))?;
    let about = covers(&certificate, &work.host).map_err(|error| chain(&error))?;
    Ok((certificate, about))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::Opened;
    use crate::model::NodeId;
    use crate::state::testing::{Applier, deploy, spec};
    use crate::state::{CertificateIssuer, Command, IssuedCertificate};
    use std::sync::atomic::{AtomicU64, Ordering};

    const HOST: &str = "shop.test";

    /// Puts a certificate into the state and its key where `open` finds it.
    fn issue(applier: &mut Applier, keys: &Mutex<Vec<String>>) {
        let made = rcgen::generate_simple_self_signed([HOST.to_string()]).unwrap();
        lock(keys).push(made.signing_key.serialize_pem());
        let issued = IssuedCertificate {
            issuer: CertificateIssuer::Cluster,
            chain_pem: made.cert.pem(),
            sealed_key: vec![1],
            not_before: 0,
            not_after: 1,
            version: 0,
        };
        applier.must(Command::PutCertificate { host: HOST.into(), issued: Box::new(issued) });
    }

    /// Follows until what is shown has this version.
    fn shown(certificates: &mut Certificates, executor: &Executor<'_>, state: &State, version: u64) {
        for _ in 0..200 {
            let (given, views) = certificates.follow(state, Instant::now(), || {});
            if views[0].version == Some(version) {
                assert_eq!((given.len(), &views[0].problem), (1, &None));
                return;
            }
            let pause = async { async_io::Timer::after(Duration::from_millis(10)).await };
            async_io::block_on(executor.run(pause));
        }
        panic!("version {version} is not shown");
    }

    #[test]
    fn the_old_certificate_is_shown_until_the_new_one_s_key_is_opened() {
        let mut applier = Applier::with_nodes(1);
        let mut web = spec("a");
        web.labels.insert("tinydc.http.host".into(), HOST.into());
        web.labels.insert("tinydc.http.tls".into(), "cluster".into());
        applier.must(deploy("shop", &[("web", web)]));
        let keys = Arc::new(Mutex::new(Vec::<String>::new()));
        let versions_to_be_had = Arc::new(AtomicU64::new(1));
        let (own_keys, own_versions) = (keys.clone(), versions_to_be_had.clone());
        let open = Box::new(move |_: &Sealed| {
            let version = own_versions.load(Ordering::Relaxed);
            let key = lock(&own_keys)[version as usize - 1].clone();
            Ok(Opened { version, bytes: key.into_bytes() })
        });
        let secrets = Arc::new(Secrets::new(NodeId(1), std::path::Path::new("/nowhere"), open));
        let executor = Arc::new(Executor::new());
        let mut certificates = Certificates::new(secrets, executor.clone());
        let (given, views) = certificates.follow(&applier.state, Instant::now(), || {});
        assert!(given.is_empty() && views[0].problem.as_deref() == Some("it is being ordered"), "{views:?}");
        issue(&mut applier, &keys);
        shown(&mut certificates, &executor, &applier.state, 1);
        // The next one's key is not to be had yet.
        issue(&mut applier, &keys);
        for _ in 0..20 {
            let (given, views) = certificates.follow(&applier.state, Instant::now(), || {});
            assert_eq!((given.len(), views[0].version), (1, Some(1)));
            let pause = async { async_io::Timer::after(Duration::from_millis(5)).await };
            async_io::block_on(executor.run(pause));
        }
        let (_, views) = certificates.follow(&applier.state, Instant::now(), || {});
        assert_eq!(views[0].problem.as_deref(), Some("the newest version is not to be had yet"));
        versions_to_be_had.store(2, Ordering::Relaxed);
        let later = Instant::now() + AGAIN_AFTER;
        assert!(certificates.has_news(later), "it is tried again");
        certificates.follow(&applier.state, later, || {});
        shown(&mut certificates, &executor, &applier.state, 2);
    }
}
