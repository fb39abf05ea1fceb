//! Every route, once: method, path, who may. The OpenAPI document is held against this table by a test.

use super::serve::Caller;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Version,
    Status,
    Apps,
    Deploy,
    RemoveApp,
    Scale,
    Instances,
    Logs,
    Exec,
    Nodes,
    Node,
    RemoveNode,
    Drain,
    Activate,
    Labels,
    Tokens,
    CreateToken,
    RemoveToken,
    Users,
    RemoveUser,
    Settings,
    ChangeSetting,
    Images,
    LoadImages,
    RemoveImage,
    PutContent,
    Events,
    Leave,
    RecoverKey,
    RecoveryKey,
    OpenApi,
    InternalWrite,
    InternalBlob,
    InternalLive,
    InternalKey,
    InternalJoin,
    InternalPorts,
    InternalNetwork,
    Network,
    CheckNetwork,
    Addresses,
    AddAddress,
    RemoveAddress,
    Secrets,
    PutSecret,
    RemoveSecret,
    InternalSecret,
    InternalCertificate,
    InternalChallenge,
    InternalCheck,
    Authority,
    Joining,
    ShowCode,
    Pending,
    Accept,
}

/// Who may use a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Anyone with a certificate of the cluster, also a viewer.
    Viewer,
    Operator,
    /// Only on the node's own socket.
    Local,
    Node,
}

pub struct Route {
    pub method: &'static str,
    /// `{name}` stands for one segment.
    pub path: &'static str,
    pub access: Access,
    pub verb: Verb,
}

const fn route(method: &'static str, path: &'static str, access: Access, verb: Verb) -> Route {
    Route { method, path, access, verb }
}

pub const ROUTES: &[Route] = &[
    route("GET", "/v1/version", Access::Viewer, Verb::Version),
    route("GET", "/v1/status", Access::Viewer, Verb::Status),
    route("GET", "/v1/apps", Access::Viewer, Verb::Apps),
    route("POST", "/v1/apps/{app}", Access::Operator, Verb::Deploy),
    route("DELETE", "/v1/apps/{app}", Access::Operator, Verb::RemoveApp),
    route("POST", "/v1/apps/{app}/scale", Access::Operator, Verb::Scale),
    route("GET", "/v1/instances", Access::Viewer, Verb::Instances),
    route("GET", "/v1/instances/{id}/logs", Access::Viewer, Verb::Logs),
    route("POST", "/v1/instances/{id}/exec", Access::Operator, Verb::Exec),
    route("GET", "/v1/nodes", Access::Viewer, Verb::Nodes),
    route("GET", "/v1/nodes/{node}", Access::Viewer, Verb::Node),
    route("DELETE", "/v1/nodes/{node}", Access::Operator, Verb::RemoveNode),
    route("POST", "/v1/nodes/{node}/drain", Access::Operator, Verb::Drain),
    route("POST", "/v1/nodes/{node}/activate", Access::Operator, Verb::Activate),
    route("POST", "/v1/nodes/{node}/labels", Access::Operator, Verb::Labels),
    route("GET", "/v1/tokens", Access::Operator, Verb::Tokens),
    route("POST", "/v1/tokens", Access::Operator, Verb::CreateToken),
    route("DELETE", "/v1/tokens/{id}", Access::Operator, Verb::RemoveToken),
    route("POST", "/v1/codes", Access::Operator, Verb::ShowCode),
    route("GET", "/v1/pending", Access::Viewer, Verb::Pending),
    route("POST", "/v1/pending", Access::Operator, Verb::Accept),
    route("GET", "/v1/joining", Access::Local, Verb::Joining),
    route("GET", "/v1/users", Access::Operator, Verb::Users),
    route("DELETE", "/v1/users/{name}", Access::Operator, Verb::RemoveUser),
    route("GET", "/v1/settings", Access::Viewer, Verb::Settings),
    route("PUT", "/v1/settings/{key}", Access::Operator, Verb::ChangeSetting),
    route("GET", "/v1/images", Access::Viewer, Verb::Images),
    route("POST", "/v1/images", Access::Operator, Verb::LoadImages),
    route("DELETE", "/v1/images/{image}", Access::Operator, Verb::RemoveImage),
    route("PUT", "/v1/content", Access::Operator, Verb::PutContent),
    route("GET", "/v1/events", Access::Viewer, Verb::Events),
    route("GET", "/v1/network", Access::Viewer, Verb::Network),
    route("GET", "/v1/network/check/{service}", Access::Viewer, Verb::CheckNetwork),
    route("GET", "/v1/addresses", Access::Viewer, Verb::Addresses),
    route("POST", "/v1/addresses", Access::Operator, Verb::AddAddress),
    route("DELETE", "/v1/addresses/{address}", Access::Operator, Verb::RemoveAddress),
    route("GET", "/v1/ca", Access::Viewer, Verb::Authority),
    route("GET", "/v1/secrets", Access::Viewer, Verb::Secrets),
    route("PUT", "/v1/secrets/{name}", Access::Operator, Verb::PutSecret),
    route("DELETE", "/v1/secrets/{name}", Access::Operator, Verb::RemoveSecret),
    route("POST", "/v1/leave", Access::Local, Verb::Leave),
    route("POST", "/v1/recover-key", Access::Local, Verb::RecoverKey),
    route("GET", "/v1/recovery-key", Access::Local, Verb::RecoveryKey),
    route("GET", "/v1/openapi.json", Access::Viewer, Verb::OpenApi),
    route("POST", "/internal/write", Access::Node, Verb::InternalWrite),
    route("GET", "/internal/blobs/{digest}", Access::Node, Verb::InternalBlob),
    route("GET", "/internal/live", Access::Node, Verb::InternalLive),
    route("PUT", "/internal/cluster-key", Access::Node, Verb::InternalKey),
    route("DELETE", "/internal/cluster-key", Access::Node, Verb::InternalKey),
    route("POST", "/internal/join", Access::Node, Verb::InternalJoin),
    route("POST", "/internal/ports", Access::Node, Verb::InternalPorts),
    route("GET", "/internal/secrets/{name}", Access::Node, Verb::InternalSecret),
    route("GET", "/internal/certificates/{host}", Access::Node, Verb::InternalCertificate),
    route("GET", "/internal/challenges/{token}", Access::Node, Verb::InternalChallenge),
    route("POST", "/internal/certificate-check/{name}", Access::Node, Verb::InternalCheck),
    route("GET", "/internal/network", Access::Node, Verb::InternalNetwork),
];

/// What a path named: the route, and what stood for `{…}`.
pub struct Match {
    pub verb: Verb,
    pub access: Access,
    pub name: String,
}

pub enum Found {
    Match(Match),
    NoSuchPath,
    /// The path exists; these methods do.
    OtherMethods(Vec<&'static str>),
}

pub fn find(method: &str, path: &str) -> Found {
    let mut methods = Vec::new();
    for route in ROUTES {
        if let Some(name) = matches(route.path, path) {
            if route.method == method {
                return Found::Match(Match { verb: route.verb, access: route.access, name });
            }
            methods.push(route.method);
        }
    }
    if methods.is_empty() { Found::NoSuchPath } else { Found::OtherMethods(methods) }
}

/// The segment that stands for `{…}`, percent-decoded; empty for a path without one.
fn matches(pattern: &str, path: &str) -> Option<String> {
    let (mut wanted, mut given) = (pattern.split('/'), path.split('/'));
    let mut name = String::new();
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => return Some(name),
            (Some(segment), Some(text)) if segment.starts_with('{') && !text.is_empty() => {
                name = decode(text)?
            }
            (Some(segment), Some(text)) if segment == text => {}
            _ => return None,
        }
    }
}

/// Percent-decoding; `None` for a bad escape or bytes that are not UTF-8.
pub fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first == b'%' {
            let hex = std::str::from_utf8(rest.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(hex, 16).ok()?);
            rest = &rest[2..];
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).ok()
}

pub fn may(caller: &Caller, access: Access) -> bool {
    matches!(
        (caller, access),
        (Caller::Local, Access::Viewer | Access::Operator | Access::Local)
            | (Caller::Node(_), Access::Viewer | Access::Operator | Access::Node)
            | (Caller::User { is_operator: true, .. }, Access::Viewer | Access::Operator)
            | (Caller::User { is_operator: false, .. }, Access::Viewer)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NodeId;

    #[test]
    fn a_path_finds_its_route_and_its_name() {
        let found = |method, path| match find(method, path) {
            Found::Match(found) => Some((found.verb, found.name)),
            _ => None,
        };
        assert_eq!(found("GET", "/v1/status"), Some((Verb::Status, String::new())));
        assert_eq!(found("DELETE", "/v1/apps/shop"), Some((Verb::RemoveApp, "shop".into())));
        assert_eq!(found("DELETE", "/v1/images/a%2Fb%3A1"), Some((Verb::RemoveImage, "a/b:1".into())));
        assert_eq!(found("DELETE", "/v1/images/%zz"), None);
        assert_eq!(found("GET", "/v1/apps/"), None);
        assert!(matches!(find("PATCH", "/v1/status"), Found::OtherMethods(methods) if methods == ["GET"]));
    }

    #[test]
    fn a_node_certificate_is_no_operator_s_and_a_viewer_changes_nothing() {
        let viewer = Caller::User { name: "eve".into(), is_operator: false };
        let operator = Caller::User { name: "ada".into(), is_operator: true };
        for route in ROUTES {
            if route.method != "GET" {
                assert!(!may(&viewer, route.access), "{}", route.path);
            }
            if route.path.starts_with("/internal") {
                assert!(
                    !may(&operator, route.access) && !may(&Caller::Local, route.access),
                    "{}",
                    route.path
                );
            }
            assert!(!may(&Caller::Stranger, route.access), "{}", route.path);
        }
        assert!(!may(&Caller::Node(NodeId(1)), Access::Local));
    }

    /// Each route is in the document, and the document has no other.
    #[test]
    fn the_openapi_document_has_every_route() {
        let document: serde_json::Value =
            serde_json::from_slice(&super::super::handlers::openapi_document()).unwrap();
        let mut documented = std::collections::BTreeSet::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            for method in methods.as_object().unwrap().keys() {
                documented.insert(format!("{} {path}", method.to_uppercase()));
            }
        }
        let routes: std::collections::BTreeSet<String> = ROUTES
            .iter()
            .filter(|route| route.path.starts_with("/v1"))
            .map(|route| format!("{} {}", route.method, route.path))
            .chain(["POST /v1/init".into(), "POST /v1/join".into()])
            .collect();
        assert_eq!(documented, routes);
    }
}
