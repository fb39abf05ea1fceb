//! Decides which HTTP routes this node serves. Pure.
//!
//! Input: the state and what of it serves. Output: the ingress's table, made from the services' labels.

use super::wiring::{self, View};
use crate::compose::ingress_labels::{RouteSpec, read_ingress_labels};
use crate::model::*;
use crate::network::ingress::{Route, RouteOptions, Routes};
use std::net::SocketAddrV4;

/// Where a service that says nothing of its port most likely listens.
const USUAL_PORT: u16 = 80;

pub fn table(view: &View<'_>) -> Routes {
    let placed = wiring::placed(view);
    let settings = view.state.cluster_settings();
    let mut routes = Vec::new();
    for service in view.state.services.rows().filter(|service| !service.is_removed) {
        for wish in read_ingress_labels(&service.spec.labels).routes {
            let port = port_of(&wish, &service.spec);
            let own = placed.iter().filter(|one| one.service.id == service.id && one.is_endpoint);
            let mut endpoints: Vec<SocketAddrV4> =
                own.map(|one| SocketAddrV4::new(one.address, port)).collect();
            endpoints.order();
            routes.push(Route {
                host: wish.host,
                path_prefix: wish.path_prefix,
                app: service.app.to_string(),
                service: service.name.clone(),
                endpoints,
                options: RouteOptions {
                    redirects_to_https: wish.redirects_to_https,
                    request_bytes_max: wish.request_bytes_max,
                    ..RouteOptions::default()
                },
            });
        }
    }
    Routes {
        http_port: settings.ingress_http_port,
        https_port: settings.ingress_https_port,
        routes,
        challenges: (view.state.challenges.iter())
            .map(|(token, row)| (token.clone(), row.answer.clone()))
            .gather(),
        ..Routes::default()
    }
}

/// The port that the label names, else the only one that the service publishes, else the usual one.
fn port_of(wish: &RouteSpec, spec: &ServiceSpec) -> u16 {
    let mut targets: Vec<u16> =
        spec.ports.iter().filter(|port| port.protocol == Protocol::Tcp).map(|port| port.target).collect();
    targets.dedup();
    match (wish.port, targets.as_slice()) {
        (Some(port), _) => port,
        (None, [only]) => *only,
        (None, _) => USUAL_PORT,
    }
}
