//! Kernel settings of the whole machine: set while this node needs them, and given back when it leaves.
//!
//! What was there before is kept in a file beside the other things that end with the machine, so that it is known to
//! whichever daemon leaves.

use super::{NetworkError, lan};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const ROOT: &str = "/proc/sys";
pub const IP_FORWARD: &str = "net/ipv4/ip_forward";
const IPV6_LINKS: &str = "net/ipv6/conf";
const IPV6_FORWARD: &str = "net/ipv6/conf/all/forwarding";

pub fn set(name: &str, value: &'static str) -> Result<(), NetworkError> {
    let path = Path::new(ROOT).join(name);
    if read(&path).as_deref() == Some(value) {
        return Ok(());
    }
    fs::write(&path, value).map_err(|source| NetworkError::Sysctl { path, value, source })
}

pub fn knows_ipv6() -> bool {
    Path::new(ROOT).join(IPV6_LINKS).exists()
}

/// No link of tinydc's own has a router behind it: what a container, or a machine on the LAN in a packet of VXLAN,
/// advertises is no way for this node.
pub fn take_no_router(link: &str) -> Result<(), NetworkError> {
    match knows_ipv6() {
        true => set(&format!("{IPV6_LINKS}/{link}/accept_ra"), "0"),
        false => Ok(()),
    }
}

/// Where the machine's owner has switched IPv6 off, tinydc's own links may have it all the same.
pub fn switch_ipv6(link: &str, is_on: bool) -> Result<(), NetworkError> {
    set(&format!("{IPV6_LINKS}/{link}/disable_ipv6"), if is_on { "0" } else { "1" })
}

/// Has the kernel forward IPv6. A machine that forwards takes no router's advertisements unless told to, and would lose its
/// own IPv6 on the LAN: told first, for links to come, too.
pub fn forward_ipv6(before: &Before) -> Result<(), NetworkError> {
    let links = fs::read_dir(Path::new(ROOT).join(IPV6_LINKS)).into_iter().flatten().flatten();
    for link in links.map(|entry| entry.file_name().to_string_lossy().into_owned()) {
        let is_1 = |name: &str| {
            read(&Path::new(ROOT).join(IPV6_LINKS).join(&link).join(name)).as_deref() == Some("1")
        };
        // One that forwards already takes none, and means it.
        if is_1("accept_ra") && !is_1("forwarding") && link != "all" && !lan::is_own(&link) {
            before.set(&format!("{IPV6_LINKS}/{link}/accept_ra"), "2")?;
        }
    }
    before.set(IPV6_FORWARD, "1")
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
