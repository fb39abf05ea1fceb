//! The Compose file of this directory, and the app it names.

use std::fs;
use std::path::{Path, PathBuf};

use crate::compose::FILE_BYTES_MAX;

/// In the order in which Compose looks.
const FILE_NAMES: [&str; 4] = ["compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml"];
pub fn find_file(folder: &Path) -> Option<PathBuf> {
    FILE_NAMES.iter().map(|name| folder.join(name)).find(|path| path.is_file())
}

/// The app of the Compose file in the current directory, if there is one.
pub fn app_here() -> Option<String> {
    let folder = std::env::current_dir().ok()?;
    app_of_file(&find_file(&folder)?)
}

pub fn app_of_file(path: &Path) -> Option<String> {
    let is_small = fs::metadata(path).is_ok_and(|file| file.len() <= FILE_BYTES_MAX as u64);
    let text = is_small.then(|| fs::read_to_string(path).ok()).flatten();
    let folder = path.canonicalize().ok()?.parent()?.file_name()?.to_string_lossy().into_owned();
    app_name(text.as_deref().unwrap_or(""), &folder)
}

/// The top-level `name:`, else the directory's name with what a name can't hold left out.
fn app_name(text: &str, folder: &str) -> Option<String> {
    let named = text.lines().find_map(|line| line.strip_prefix("name:"));
    let named = named.map(|value| value.split(" #").next().unwrap_or("").trim().trim_matches(['"', '\'']));
    match named.filter(|name| !name.is_empty() && !name.contains('$')) {
        Some(name) => Some(name.into()),
        None => name_of_folder(folder),
    }
}

/// As `compose` does: lower case, everything else a dash.
fn name_of_folder(folder: &str) -> Option<String> {
    let plain = |letter: char| if letter.is_ascii_alphanumeric() { letter.to_ascii_lowercase() } else { '-' };
    let name: String = folder.chars().map(plain).take(40).collect();
    let name = name.trim_matches('-');
    (!name.is_empty()).then(|| name.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_app_is_named_by_its_file_or_its_directory() {
        let cases = [
            ("name: shop\nservices: {}", "x", Some("shop")),
            ("services: {}\nname: \"shop\" # ours", "x", Some("shop")),
            ("services:\n  name: y", "My_Shop.v2", Some("my-shop-v2")),
            ("name: ${NAME}", "shop", Some("shop")),
            ("", "…", None),
        ];
        for (text, folder, name) in cases {
            assert_eq!(app_name(text, folder).as_deref(), name, "{text:?} in {folder}");
        }
    }
}
