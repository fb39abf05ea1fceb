//! Which certificates the ingress needs, and what is to be done for them now. Pure.
//!
//! State and cluster time → the wished certificates by host; steps for the leader's daemon, which alone orders, signs and
//! seals. Authorities count failures, so the pauses between tries are in the state and outlive a leader.
//!
//! Invariant: a certificate is renewed in its last third and never before, and a failure is followed by its pause
//! (`a_certificate_is_renewed_in_its_last_third`, `a_failed_order_waits`).

use crate::compose::ingress_labels::{TlsSource, read_ingress_labels};
use crate::model::Timestamp;
use crate::model::limits::CERTIFICATES_MAX;
use crate::state::{Certificate, CertificateIssuer, IssuedCertificate, Service, State};
use std::collections::BTreeMap;

/// An order takes two minutes; what is older was left by a leader that died.
const CHALLENGE_LIFE_MS: u64 = 15 * 60_000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The CA that signs for hosts is to be made.
    MakeAuthority,
    /// The cluster's CA signs.
    Sign {
        host: String,
    },
    /// By ACME.
    Order {
        host: String,
    },
    Forget {
        host: String,
    },
    RemoveChallenges {
        tokens: Vec<String>,
    },
}

/// By host; where two services wish for one, by the source that comes first.
pub fn wished(state: &State) -> BTreeMap<String, (TlsSource, &Service)> {
    let mut wished: BTreeMap<String, (TlsSource, &Service)> = BTreeMap::new();
    for service in state.services.rows().filter(|service| !service.is_removed) {
        for route in read_ingress_labels(&service.spec.labels).routes {
            let (Some(host), Some(source)) = (route.host, route.tls) else { continue };
            let is_first = wished.get(&host).is_none_or(|(known, _)| source < *known);
            if is_first {
                wished.insert(host, (source, service));
            }
        }
    }
    wished
}

pub fn steps(state: &State, now: Timestamp) -> Vec<Step> {
    let mut steps = Vec::new();
    if state.serving_authority.is_empty() {
        steps.push(Step::MakeAuthority);
    }
    let wished = wished(state);
    let directory = state.cluster_settings().acme_directory;
    for (host, (source, _)) in &wished {
        let row = state.certificates.find(host);
        if row.is_none() && state.certificates.len() >= CERTIFICATES_MAX {
            continue;
        }
        let host = host.clone();
        match source {
            TlsSource::Secret(_) => {}
            TlsSource::Cluster if state.serving_authority.is_empty() => {}
            TlsSource::Cluster => {
                if needs(row, &CertificateIssuer::Cluster, now) {
                    steps.push(Step::Sign { host });
                }
            }
            TlsSource::Acme => {
                if needs(row, &CertificateIssuer::Acme { directory: directory.clone() }, now) {
                    steps.push(Step::Order { host });
                }
            }
        }
    }
    for row in state.certificates.rows().filter(|row| !wished.contains_key(&row.host)) {
        // What an authority issued is kept to its end: an app that comes back must not order again.
        let is_kept = row.issued.as_ref().is_some_and(|issued| {
            issued.issuer != CertificateIssuer::Cluster && now.0 < issued.not_after.saturating_mul(1000)
        });
        if !is_kept {
            steps.push(Step::Forget { host: row.host.clone() });
        }
    }
    let old = state.challenges.iter().filter(|(_, row)| now.since_ms(row.at) > CHALLENGE_LIFE_MS);
    let tokens: Vec<String> = old.map(|(token, _)| token.clone()).collect();
    if !tokens.is_empty() {
        steps.push(Step::RemoveChallenges { tokens });
    }
    steps
}

fn needs(row: Option<&Certificate>, issuer: &CertificateIssuer, now: Timestamp) -> bool {
    let Some(row) = row else { return true };
    let is_pausing = row.trouble.as_ref().is_some_and(|trouble| now < trouble.again_at);
    let is_good = |issued: &IssuedCertificate| {
        issued.issuer == *issuer && !is_due(issued.not_before, issued.not_after, now.0 / 1000)
    };
    !is_pausing && !row.issued.as_ref().is_some_and(is_good)
}

/// Whether a certificate should be renewed: in the last third of its life. All in seconds since 1970.
pub fn is_due(not_before: u64, not_after: u64, now: u64) -> bool {
    let life = not_after.saturating_sub(not_before);
    now >= not_after.saturating_sub(life / 3)
}

/// How an order failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// The authority never had it: nobody counts.
    Unreached,
    /// It counts failures and blocks who has many.
    Refused,
}

/// How long to wait after so many failures in a row: doubling from a minute to an hour, or from an hour to a day.
pub fn pause_seconds(failed: Failed, failures: u32) -> u64 {
    let (first, longest) = match failed {
        Failed::Unreached => (60, 3600),
        Failed::Refused => (3600, 24 * 3600),
    };
    match failures {
        0 => 0,
        _ => (first << (failures - 1).min(10)).min(longest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Command;
    use crate::state::testing::{Applier, deploy, spec};

    const DAY: u64 = 86_400;

    #[test]
    fn a_certificate_is_renewed_in_its_last_third() {
        for (now, wanted) in [(0, false), (59 * DAY, false), (60 * DAY, true), (100 * DAY, true)] {
            assert_eq!(is_due(0, 90 * DAY, now), wanted, "day {}", now / DAY);
        }
        assert!(is_due(10, 5, 10), "one that makes no sense is replaced");
    }

    #[test]
    fn pauses_grow_up_to_a_day() {
        let hours: Vec<u64> =
            (0..8).map(|failures| pause_seconds(Failed::Refused, failures) / 3600).collect();
        assert_eq!(hours, [0, 1, 2, 4, 8, 16, 24, 24]);
        let minutes: Vec<u64> =
            (0..9).map(|failures| pause_seconds(Failed::Unreached, failures) / 60).collect();
        assert_eq!(minutes, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(pause_seconds(Failed::Refused, u32::MAX), 24 * 3600);
    }

    /// `shop/web` at `shop.test`, by this source.
    fn routed(source: &str) -> Applier {
        let mut applier = Applier::with_nodes(1);
        let certificate = vec![1];
        applier.must(Command::PutServingAuthority { certificate, sealed_key: vec![2] });
        let mut web = spec("a");
        web.labels.insert("tinydc.http.host".into(), "shop.test".into());
        web.labels.insert("tinydc.http.tls".into(), source.into());
        applier.must(deploy("shop", &[("web", web)]));
        applier
    }

    fn put(applier: &mut Applier, issuer: CertificateIssuer) {
        let now = applier.state.time().0 / 1000;
        let issued = IssuedCertificate {
            issuer,
            chain_pem: "chain".into(),
            sealed_key: vec![3],
            not_before: now,
            not_after: now + 90 * DAY,
            version: 0,
        };
        applier.must(Command::PutCertificate { host: "shop.test".into(), issued: Box::new(issued) });
    }

    fn at(applier: &Applier, seconds: u64) -> Vec<Step> {
        steps(&applier.state, applier.state.time().plus_ms(seconds * 1000))
    }

    #[test]
    fn what_is_wished_is_made_renewed_and_forgotten() {
        let host = || "shop.test".to_string();
        assert_eq!(steps(&Applier::with_nodes(1).state, Timestamp(0)), [Step::MakeAuthority]);
        let mut applier = routed("cluster");
        assert_eq!(at(&applier, 0), [Step::Sign { host: host() }]);
        put(&mut applier, CertificateIssuer::Cluster);
        assert_eq!(at(&applier, 59 * DAY), []);
        assert_eq!(at(&applier, 61 * DAY), [Step::Sign { host: host() }]);
        applier.must(deploy("shop", &[("web", spec("a"))]));
        assert_eq!(at(&applier, 0), [Step::Forget { host: host() }]);
        // Another source is another certificate.
        let mut applier = routed("acme");
        put(&mut applier, CertificateIssuer::Cluster);
        assert_eq!(at(&applier, 0), [Step::Order { host: host() }]);
        let directory = applier.state.cluster_settings().acme_directory;
        put(&mut applier, CertificateIssuer::Acme { directory });
        assert_eq!(at(&applier, 0), []);
        applier.must(deploy("shop", &[("web", spec("a"))]));
        assert_eq!(at(&applier, 0), [], "the app may come back");
        assert_eq!(at(&applier, 91 * DAY), [Step::Forget { host: host() }]);
    }

    #[test]
    fn a_failed_order_waits() {
        let mut applier = routed("acme");
        let trouble = |text: &str| Command::NoteCertificateTrouble {
            host: "shop.test".into(),
            text: text.into(),
            pause_ms: 3_600_000,
        };
        applier.must(trouble("no route to shop.test"));
        let notes =
            |applier: &Applier| applier.state.events.rows().filter(|e| e.kind == "certificate").count();
        assert_eq!((at(&applier, 3590), notes(&applier)), (vec![], 1));
        assert_eq!(at(&applier, 3601), [Step::Order { host: "shop.test".into() }]);
        applier.must(trouble("no route to shop.test"));
        assert_eq!(notes(&applier), 1, "the same reason is told once");
        let row = applier.state.certificates.find(&"shop.test".to_string()).unwrap();
        assert_eq!(row.trouble.as_ref().unwrap().failures, 2);
        let long = "no way to shop.test, ".repeat(50);
        applier.must(trouble(&long));
        applier.must(trouble(&long));
        assert_eq!(notes(&applier), 2, "also one that is cut");
    }

    #[test]
    fn answers_that_a_dead_leader_left_are_removed() {
        let mut applier = Applier::with_nodes(1);
        applier.must(Command::PutServingAuthority { certificate: vec![1], sealed_key: vec![2] });
        let answers = BTreeMap::from([("token".to_string(), "answer".to_string())]);
        applier.must(Command::PutChallenges { answers });
        assert_eq!(at(&applier, 60), []);
        assert_eq!(at(&applier, 1000), [Step::RemoveChallenges { tokens: vec!["token".into()] }]);
    }
}
