//! Rules of the source that no compiler checks: layers, purity, sizes, names.
//!
//! The layer order is read from `src/lib.rs`. Each check returns what it found, so that `planted_violations_are_found`
//! can hold it against text that breaks the rule.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const FUNCTION_LINES_MAX: usize = 70;
const FILE_LINES_MAX: usize = 800;

/// Functions that are long because they are one list; each with its reason.
const LONG_FUNCTIONS: [(&str, &str); 1] = [("src/state/apply.rs", "run: one arm for each command")];

/// Modules that hold no clock, randomness, float, hash map, thread, async, file or socket.
const PURE: [&str; 18] = [
    "compose",
    "state",
    "planner",
    "consensus",
    "control",
    "verdict",
    "agent/reconcile",
    "agent/restart",
    "agent/wiring",
    "agent/names",
    "agent/routes",
    "agent/ways/lanes",
    "boot/backoff",
    "boot/dhcp",
    "boot/modules",
    "boot/partitions",
    "boot/settings",
    "boot/sntp",
];
const IMPURE_WORDS: [(&str, &str); 17] = [
    ("Instant::now", "clock"),
    ("SystemTime", "clock"),
    ("rand::", "randomness"),
    ("random_bytes", "randomness"),
    (": f32", "float"),
    (": f64", "float"),
    ("as f64", "float"),
    ("HashMap", "hash map"),
    ("HashSet", "hash map"),
    ("std::thread", "thread"),
    ("async fn", "async"),
    (".await", "async"),
    ("std::fs", "file"),
    ("File::", "file"),
    ("std::net::Tcp", "socket"),
    ("std::net::Udp", "socket"),
    ("std::env", "environment"),
];

const VAGUE_NAMES: [&str; 7] = ["util", "utils", "helper", "helpers", "manager", "common", "misc"];

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        let mut entries: Vec<PathBuf> = fs::read_dir(&folder)
            .expect("a folder of the source")
            .flatten()
            .map(|entry| entry.path())
            .collect();
        entries.sort();
        for path in entries {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let text = fs::read_to_string(&path).expect("a source file");
                found.push((path, text));
            }
        }
    }
    found.sort();
    found
}

/// The file with everything that is compiled for tests only blanked out, so that line numbers hold.
fn without_tests(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let indent = &line[..line.len() - line.trim_start().len()];
        let opens_block =
            line.trim_start() == "#[cfg(test)]" && lines.peek().is_some_and(|next| next.ends_with('{'));
        kept.push('\n');
        if !opens_block {
            kept.insert_str(kept.len() - 1, line);
            continue;
        }
        let closing = format!("{indent}}}");
        for skipped in lines.by_ref() {
            kept.push('\n');
            if skipped == closing {
                break;
            }
        }
    }
    kept
}

fn is_test_file(path: &Path) -> bool {
    path.ends_with("tests.rs") || path.components().any(|part| part.as_os_str() == "tests")
}

/// Modules in order, with their layer.
fn layers(lib: &str) -> Vec<(String, u32)> {
    let mut layer = 0;
    let mut modules = Vec::new();
    for line in lib.lines() {
        if let Some(number) = line.strip_prefix("// layer ") {
            layer = number.trim().parse().expect("a layer's number");
        } else if let Some(name) = line.strip_prefix("pub mod ") {
            modules.push((name.trim_end_matches(';').to_string(), layer));
        }
    }
    modules
}

/// Uses of `crate::X` by a module that X does not stand below.
fn layer_violations(modules: &[(String, u32)], own: &str, text: &str) -> Vec<String> {
    let order: BTreeMap<&str, (usize, u32)> =
        modules.iter().enumerate().map(|(index, (name, layer))| (name.as_str(), (index, *layer))).collect();
    let Some((own_index, own_layer)) = order.get(own).copied() else {
        return vec![format!("module {own} is not in src/lib.rs")];
    };
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("//") {
            continue;
        }
        for part in line.split("crate::").skip(1) {
            let name: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let Some((index, layer)) = order.get(name.as_str()).copied() else { continue };
            let is_sibling = layer == own_layer && own_layer == 4;
            if name != own && (index > own_index || is_sibling) {
                found.push(format!(
                    "line {}: {own} (layer {own_layer}) uses {name} (layer {layer})",
                    number + 1
                ));
            }
        }
    }
    found
}

fn impurities(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in without_tests(text).lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        for (word, what) in IMPURE_WORDS {
            if code.contains(word) {
                found.push(format!("line {}: {what} ({word}) in a pure module", number + 1));
            }
        }
    }
    found
}

/// Functions over the limit: name, line, length. By indentation, which rustfmt fixes.
fn long_functions(text: &str) -> Vec<(String, usize, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        let head = trimmed
            .trim_start_matches("pub ")
            .trim_start_matches("pub(crate) ")
            .trim_start_matches("pub(super) ");
        let head =
            head.trim_start_matches("const ").trim_start_matches("async ").trim_start_matches("unsafe ");
        let Some(name) = head.strip_prefix("fn ") else { continue };
        let closing = format!("{}}}", " ".repeat(indent));
        let Some(length) = lines[start..].iter().position(|line| *line == closing) else { continue };
        if length + 1 > FUNCTION_LINES_MAX {
            let name = name.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            found.push((name, start + 1, length + 1));
        }
    }
    found
}

fn forbidden_words(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in without_tests(text).lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        for word in [".unwrap()", concat!("to", "do!"), concat!("unimple", "mented!"), concat!("db", "g!")] {
            if code.contains(word) {
                found.push(format!("line {}: {word}", number + 1));
            }
        }
    }
    found
}

fn vague_names(path: &Path, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for part in path.components().filter_map(|part| part.as_os_str().to_str()) {
        if VAGUE_NAMES.contains(&part.trim_end_matches(".rs")) {
            found.push(format!("{part} says nothing of what is inside"));
        }
    }
    for (number, line) in without_tests(text).lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        if code.contains("fn get_") {
            found.push(format!("line {}: a function is named by what it returns, without get_", number + 1));
        }
    }
    found
}

fn report(all: Vec<String>) {
    assert!(all.is_empty(), "\n{}\n", all.join("\n"));
}

fn own_module(path: &Path) -> Option<String> {
    let inside = path.strip_prefix("src").ok()?;
    let first = inside.components().next()?.as_os_str().to_str()?;
    let name = first.trim_end_matches(".rs");
    (!matches!(name, "lib" | "main")).then(|| name.to_string())
}

fn is_shim(path: &Path) -> bool {
    path.starts_with("src/consensus/shim")
}

#[test]
fn modules_use_only_what_stands_below_them() {
    let modules = layers(&fs::read_to_string("src/lib.rs").expect("src/lib.rs"));
    assert!(modules.len() > 15, "the layers were not found: {modules:?}");
    let mut all = Vec::new();
    for (path, text) in sources("src").iter().filter(|(path, _)| !is_shim(path)) {
        if let Some(own) = own_module(path) {
            let found = layer_violations(&modules, &own, &without_tests(text));
            if !is_test_file(path) {
                all.extend(found.into_iter().map(|what| format!("{}: {what}", path.display())));
            }
        }
    }
    report(all);
}

#[test]
fn pure_modules_stay_pure() {
    let mut all = Vec::new();
    for (path, text) in sources("src").iter().filter(|(path, _)| !is_shim(path) && !is_test_file(path)) {
        let inside = path.strip_prefix("src").expect("below src").with_extension("");
        if PURE.iter().any(|pure| inside.starts_with(pure)) {
            all.extend(impurities(text).into_iter().map(|what| format!("{}: {what}", path.display())));
        }
    }
    report(all);
}

#[test]
fn functions_fit_a_screen_and_files_a_sitting() {
    let mut all = Vec::new();
    for folder in ["src", "tests", "images"] {
        for (path, text) in sources(folder).iter().filter(|(path, _)| !is_shim(path)) {
            let lines = text.lines().count();
            if lines > FILE_LINES_MAX {
                all.push(format!("{}: {lines} lines; split it by meaning", path.display()));
            }
            for (name, line, length) in long_functions(text) {
                let is_listed = LONG_FUNCTIONS
                    .iter()
                    .any(|(file, why)| path == Path::new(file) && why.starts_with(&format!("{name}:")));
                if !is_listed {
                    all.push(format!("{}:{line}: {name} has {length} lines", path.display()));
                }
            }
        }
    }
    report(all);
}

#[test]
fn nothing_is_unwrapped_or_left_to_do() {
    let mut all = Vec::new();
    for (path, text) in sources("src").iter().filter(|(path, _)| !is_shim(path) && !is_test_file(path)) {
        all.extend(forbidden_words(text).into_iter().map(|what| format!("{}: {what}", path.display())));
    }
    report(all);
}

#[test]
fn names_say_what_is_inside() {
    let mut all = Vec::new();
    for (path, text) in sources("src").iter().filter(|(path, _)| !is_shim(path)) {
        all.extend(vague_names(path, text).into_iter().map(|what| format!("{}: {what}", path.display())));
    }
    report(all);
}

#[test]
fn every_file_says_what_it_does() {
    let headless = |(path, text): &&(PathBuf, String)| !is_shim(path) && !text.starts_with("//!");
    let all = sources("src")
        .iter()
        .filter(headless)
        .map(|(path, _)| format!("{}: no //! head", path.display()))
        .collect();
    report(all);
}

#[test]
fn unsafe_code_is_in_one_place() {
    let mut all = Vec::new();
    for (path, text) in
        sources("src").iter().filter(|(path, _)| !is_shim(path) && !path.starts_with("src/linux"))
    {
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl") {
                all.push(format!("{}:{}: unsafe outside src/linux", path.display(), number + 1));
            }
        }
    }
    report(all);
}

/// A check that never fails checks nothing.
#[test]
fn planted_violations_are_found() {
    let modules = layers(
        "// layer 0\npub mod model;\n// layer 4\npub mod network;\npub mod runtime;\n// layer 5\npub mod api;\n",
    );
    assert_eq!(layer_violations(&modules, "model", "use crate::api::Server;").len(), 1);
    assert_eq!(layer_violations(&modules, "runtime", "let x = crate::network::y();").len(), 1);
    assert_eq!(layer_violations(&modules, "network", "use crate::model::NodeId;").len(), 0);
    assert_eq!(impurities("let now = Instant::now();\nlet m: HashMap<u8, u8>;\n").len(), 2);
    assert_eq!(
        impurities("// Instant::now is not used here\n#[cfg(test)]\nmod tests {\n  HashMap\n}").len(),
        0
    );
    let long = format!("fn long() {{\n{}}}\n", "    x();\n".repeat(80));
    assert_eq!(long_functions(&long), [("long".to_string(), 1, 82)]);
    assert_eq!(forbidden_words("a.unwrap();\n").len(), 1);
    assert_eq!(vague_names(Path::new("src/x/utils.rs"), "fn get_it() {}").len(), 2);
}
