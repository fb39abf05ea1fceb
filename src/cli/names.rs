//! Which instances a name means.
//!
//! `APP`, `APP/SERVICE`, `APP/SERVICE.N`, or `SERVICE` and `SERVICE.N` alone → app, service, slot. A lone word is an
//! app of that name; else a service of this directory's app; else the only service of that name. Two that match are an
//! error that lists them. Pure: the services are given.

use super::failure::Failure;
use crate::api::wire::{InstanceBody, ServiceBody};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    pub app: String,
    pub service: Option<String>,
    pub slot: Option<u32>,
}

impl Selection {
    pub fn has_service(&self, service: &ServiceBody) -> bool {
        service.app == self.app && self.service.as_ref().is_none_or(|name| *name == service.name)
    }

    pub fn instances<'a>(&self, services: &'a [ServiceBody]) -> Vec<&'a InstanceBody> {
        services
            .iter()
            .filter(|service| self.has_service(service))
            .flat_map(|service| &service.instances)
            .filter(|instance| self.slot.is_none_or(|slot| slot == instance.slot))
            .collect()
    }
}

/// `web.2` → `web`, 2. A service's name may hold dots too, so it is tried whole first.
fn split_slot(text: &str) -> (&str, Option<u32>) {
    match text.rsplit_once('.').map(|(service, slot)| (service, slot.parse())) {
        Some((service, Ok(slot))) => (service, Some(slot)),
        _ => (text, None),
    }
}

/// `here`: the app of the Compose file in this directory.
pub fn resolve(text: &str, here: Option<&str>, services: &[ServiceBody]) -> Result<Selection, Failure> {
    if let Some((app, rest)) = text.split_once('/') {
        let whole = (rest, None);
        let found = [whole, split_slot(rest)].into_iter().find_map(|(service, slot)| {
            let found = Selection { app: app.into(), service: Some(service.into()), slot };
            services.iter().any(|row| found.has_service(row)).then_some(found)
        });
        return found.ok_or_else(|| not_found(text, services));
    }
    if services.iter().any(|row| row.app == text) {
        return Ok(Selection { app: text.into(), service: None, slot: None });
    }
    let is_whole = services.iter().any(|row| row.name == text);
    let (name, slot) = if is_whole { (text, None) } else { split_slot(text) };
    let select = |app: &str| Selection { app: app.into(), service: Some(name.into()), slot };
    let apps: Vec<&str> =
        services.iter().filter(|row| row.name == name).map(|row| row.app.as_str()).collect();
    if let Some(here) = here.filter(|here| apps.contains(here)) {
        return Ok(select(here));
    }
    match apps[..] {
        [] => Err(not_found(text, services)),
        [app] => Ok(select(app)),
        _ => {
            let names: Vec<String> = apps.iter().map(|app| format!("{app}/{text}")).collect();
            Err(Failure::usage(format!("{text} is in {} apps", apps.len()))
                .hint(format!("say which: {}", names.join(", "))))
        }
    }
}

fn not_found(text: &str, services: &[ServiceBody]) -> Failure {
    let failure = Failure::refused(format!("there is no {text}"));
    let mut names: Vec<String> = services.iter().map(|row| format!("{}/{}", row.app, row.name)).collect();
    names.truncate(8);
    match names.is_empty() {
        true => failure.hint("nothing is deployed yet: tinydc deploy, in a directory with a compose.yaml"),
        false => failure.hint(format!("there are: {}", names.join(", "))),
    }
}

/// The app that is meant where none is named: this directory's, or the only one.
pub fn only_app(here: Option<&str>, services: &[ServiceBody]) -> Result<String, Failure> {
    let mut apps: Vec<&str> = services.iter().map(|row| row.app.as_str()).collect();
    apps.dedup();
    if let Some(here) = here.filter(|here| apps.contains(here)) {
        return Ok(here.into());
    }
    match apps[..] {
        [app] => Ok(app.into()),
        [] => Err(not_found("app", services)),
        _ => Err(Failure::usage("which app?").hint(format!("there are: {}", apps.join(", ")))),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn service(app: &str, name: &str, slots: u32) -> ServiceBody {
        let instance = |slot| InstanceBody {
            name: format!("{app}/{name}.{slot}"),
            id: format!("i{slot}"),
            slot,
            node: Some("pi1".into()),
            address: None,
            phase: "running".into(),
            desired: "run".into(),
            spec_version: 1,
            since: String::new(),
            since_ms: 0,
            reason: None,
            last_exit: None,
            restarts: None,
            pid: None,
            memory_bytes: None,
            progress: None,
        };
        ServiceBody {
            app: app.into(),
            name: name.into(),
            image: "nginx:1.27".into(),
            image_digest: None,
            wanted: slots as usize,
            running: slots as usize,
            settled: slots as usize,
            spec_version: 1,
            update: "done".into(),
            update_reason: None,
            failed_instance: None,
            data: None,
            left_out: None,
            ports: Vec::new(),
            addresses: Vec::new(),
            instances: (1..=slots).map(instance).collect(),
        }
    }

    #[test]
    fn a_name_means_what_it_says_and_two_meanings_are_asked_about() {
        let services = [
            service("blog", "web", 1),
            service("shop", "db", 1),
            service("shop", "web", 3),
            service("web", "x", 1),
        ];
        let check = |text: &str, here: Option<&str>, expected: Result<&str, &str>| {
            let resolved = resolve(text, here, &services);
            let shown = resolved.as_ref().map(|found| {
                let instances = found.instances(&services);
                instances.iter().map(|row| row.name.clone()).collect::<Vec<_>>().join(" ")
            });
            match (shown, expected) {
                (Ok(names), Ok(expected)) => assert_eq!(names, expected, "{text}"),
                (Err(failure), Err(hint)) => {
                    let found = failure.detail.hint.clone().unwrap_or_default();
                    assert!(found.contains(hint) || hint == "there are", "{text}: {found}");
                }
                (shown, _) => panic!("{text}: {shown:?}"),
            }
        };
        check("shop", None, Ok("shop/db.1 shop/web.1 shop/web.2 shop/web.3"));
        check("shop/web", None, Ok("shop/web.1 shop/web.2 shop/web.3"));
        check("shop/web.2", None, Ok("shop/web.2"));
        check("db", None, Ok("shop/db.1"));
        check("db.1", None, Ok("shop/db.1"));
        // An app of that name comes first, also in another app's directory.
        check("web", Some("shop"), Ok("web/x.1"));
        check("web.1", Some("blog"), Ok("blog/web.1"));
        check("web.1", None, Err("blog/web.1, shop/web.1"));
        check("web.x", None, Err("there are"));
        check("cart", None, Err("blog/web"));
        check("shop/cart", None, Err("shop/db"));
        check("shop/web.9", None, Ok(""));
    }

    #[test]
    fn no_name_means_this_directory_s_app_or_the_only_one() {
        let two = [service("blog", "web", 1), service("shop", "db", 1)];
        assert_eq!(only_app(Some("shop"), &two).unwrap(), "shop");
        assert_eq!(only_app(None, &two[..1]).unwrap(), "blog");
        assert!(only_app(None, &two).is_err() && only_app(Some("x"), &[]).is_err());
    }
}
