//! What other people's code comes along: its licences, and that no second async runtime is among it.
//!
//! Reads `cargo metadata`, resolved for this machine.

use serde_json::Value;
use std::process::Command;

/// SPDX names that the distribution of one binary under MIT or Apache-2.0 allows.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    // File by file: the sources that it covers come unchanged from the registry.
    "MPL-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Crates that name a licence file instead of a licence, as read: rust-criu's text is MIT's.
const READ: &[(&str, &str)] = &[("rust-criu", "MIT")];

/// Of tokio only what needs no runtime: channels and locks, and the traits of byte streams that HTTP/2 is written with.
const TOKIO_FEATURES: &[&str] = &["default", "sync", "io-util", "bytes"];

fn metadata() -> Value {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", &target])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("run cargo metadata");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
}

/// `MIT OR Apache-2.0`, `(MIT OR Apache-2.0) AND Unicode-3.0`, and the older `MIT/Apache-2.0`.
fn is_allowed(expression: &str) -> bool {
    let plain = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = plain.split_whitespace().collect();
    let (allowed, rest) = any_of(&words);
    allowed && rest.is_empty()
}

fn any_of<'a>(words: &'a [&'a str]) -> (bool, &'a [&'a str]) {
    let (mut allowed, mut rest) = all_of(words);
    while rest.first() == Some(&"OR") {
        let (next, after) = all_of(&rest[1..]);
        (allowed, rest) = (allowed || next, after);
    }
    (allowed, rest)
}

fn all_of<'a>(words: &'a [&'a str]) -> (bool, &'a [&'a str]) {
    let (mut allowed, mut rest) = one_of(words);
    while rest.first() == Some(&"AND") {
        let (next, after) = one_of(&rest[1..]);
        (allowed, rest) = (allowed && next, after);
    }
    (allowed, rest)
}

fn one_of<'a>(words: &'a [&'a str]) -> (bool, &'a [&'a str]) {
    match words {
        ["(", inside @ ..] => {
            let (allowed, rest) = any_of(inside);
            (allowed, rest.strip_prefix(&[")"]).unwrap_or(rest))
        }
        [name, "WITH", exception, rest @ ..] => {
            (LICENCES.contains(&format!("{name} WITH {exception}").as_str()), rest)
        }
        [name, rest @ ..] => (LICENCES.contains(name), rest),
        [] => (false, words),
    }
}

#[test]
fn an_expression_is_allowed_as_spdx_means_it() {
    for good in [
        "MIT",
        "MIT/Apache-2.0",
        "GPL-2.0 OR MIT",
        "(MIT OR GPL-3.0) AND Unicode-3.0",
        "Apache-2.0 WITH LLVM-exception OR X",
    ] {
        assert!(is_allowed(good), "{good}");
    }
    for bad in ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR ISC) AND GPL-3.0", "", "MIT Apache-2.0"] {
        assert!(!is_allowed(bad), "{bad}");
    }
}

#[test]
fn every_dependency_has_an_allowed_licence() {
    let metadata = metadata();
    let resolved: Vec<&Value> =
        metadata["resolve"]["nodes"].as_array().unwrap().iter().map(|node| &node["id"]).collect();
    let mut refused = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let read = READ.iter().find(|(read, _)| *read == name).map(|(_, licence)| *licence);
        let licence = package["license"].as_str().or(read).unwrap_or_default();
        // Paths of this tree are this project's own, or carry their licence beside them.
        let is_own = package["source"].is_null();
        if resolved.contains(&&package["id"]) && !is_own && !is_allowed(licence) {
            refused.push(format!("{name}: {licence:?}"));
        }
    }
    assert!(refused.is_empty(), "licences not on the list: {}", refused.join(", "));
}

#[test]
fn no_runtime_of_tokio_is_in_the_tree() {
    let metadata = metadata();
    for node in metadata["resolve"]["nodes"].as_array().unwrap() {
        let id = node["id"].as_str().unwrap();
        let name = |wanted: &str| id.contains(&format!("#{wanted}@")) || id.contains(&format!("/{wanted}#"));
        assert!(!name("mio"), "mio is in the tree: {id}");
        if name("tokio") {
            let features: Vec<&str> =
                node["features"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
            let extra: Vec<_> = features.iter().filter(|feature| !TOKIO_FEATURES.contains(feature)).collect();
            assert!(
                extra.is_empty(),
                "tokio has the features {extra:?}; find who wants them: cargo tree -e features -i tokio"
            );
        }
    }
}
