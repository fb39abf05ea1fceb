//! Kernel settings of the whole machine: set while this node needs them, and given back when it leaves.
//!
//! What was there before is kept in a file beside the other things that end with the machine, so that it is known to
//! whichever daemon leaves.

use super::NetworkError;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const ROOT: &str = "/proc/sys";
pub const IP_FORWARD: &str = "net/ipv4/ip_forward";
pub const IPV6_FORWARD: &str = "net/ipv6/conf/all/forwarding";

pub fn set(name: &str, value: &'static str) -> Result<(), NetworkError> {
    let path = Path::new(ROOT).join(name);
    if read(&path).as_deref() == Some(value) {
        return Ok(());
    }
    fs::write(&path, value).map_err(|source| NetworkError::Sysctl { path, value, source })
}

/// As it was before this node's first change.
pub struct Before {
    file: PathBuf,
}

impl Before {
    pub fn at(run_dir: &Path) -> Before {
        Before { file: run_dir.join("sysctl-before") }
    }

    pub fn set(&self, name: &str, value: &'static str) -> Result<(), NetworkError> {
        let old = read(&Path::new(ROOT).join(name));
        if let Some(old) = old.filter(|old| old != value) {
            // Without it the setting stays when the node leaves.
            let _ = self.remember(name, &old);
        }
        set(name, value)
    }

    fn remember(&self, name: &str, old: &str) -> io::Result<()> {
        let mut text = fs::read_to_string(&self.file).unwrap_or_default();
        if entries(&text).any(|(known, _)| known == name) {
            return Ok(());
        }
        text.push_str(&format!("{name} {old}\n"));
        self.write(&text)
    }

    /// Gives back those whose names begin so; forwarding stays for whoever else forwards here now.
    pub fn restore(&self, prefix: &str, is_forwarding_used: bool) -> io::Result<()> {
        let text = match fs::read_to_string(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            text => text?,
        };
        let (ours, others): (Vec<_>, Vec<_>) = entries(&text).partition(|(name, _)| name.starts_with(prefix));
        for (name, old) in ours {
            if is_forwarding_used && is_of_forwarding(name) {
                continue;
            }
            match fs::write(Path::new(ROOT).join(name), old) {
                // Of a link that is gone.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                outcome => outcome?,
            }
        }
        match others.is_empty() {
            true => fs::remove_file(&self.file),
            false => {
                self.write(&others.iter().map(|(name, old)| format!("{name} {old}\n")).collect::<String>())
            }
        }
    }

    fn write(&self, text: &str) -> io::Result<()> {
        let new = self.file.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(new, &self.file)
    }
}

/// A machine that forwards loses its own IPv6 with the setting by which it takes router advertisements all the same.
fn is_of_forwarding(name: &str) -> bool {
    [IP_FORWARD, IPV6_FORWARD].contains(&name) || name.ends_with("/accept_ra")
}

fn entries(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| line.split_once(' '))
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_is_the_one_to_give_back() {
        let folder = std::env::temp_dir().join(format!("tinydc-sysctl-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let before = Before::at(&folder);
        before.remember("net/ipv4/ip_forward", "0").unwrap();
        before.remember("net/ipv4/conf/all/send_redirects", "1").unwrap();
        // A later daemon of the same machine finds another program's value.
        before.remember("net/ipv4/ip_forward", "2").unwrap();
        let text = fs::read_to_string(folder.join("sysctl-before")).unwrap();
        fs::remove_dir_all(folder).unwrap();
        let all: Vec<_> = entries(&text).collect();
        assert_eq!(all, [("net/ipv4/ip_forward", "0"), ("net/ipv4/conf/all/send_redirects", "1")]);
    }
}
