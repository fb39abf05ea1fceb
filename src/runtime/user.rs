//! Who a container runs as: `user[:group]` by name or number, looked up in the image's own files.
//!
//! Input: the text and the image's `/etc/passwd` and `/etc/group`. Output: numbers. Pure; `read` fetches the files,
//! resolved inside the image's root, so a link planted there cannot reach the node's own users.

use crate::model::Order;
use std::os::fd::BorrowedFd;
use std::path::Path;

use super::images::tree;

/// Larger user databases are cut off with an error.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum UserError {
    #[error("the image has no user `{0}` in /etc/passwd; use its number or another image")]
    NoUser(String),
    #[error("the image has no group `{0}` in /etc/group; use its number or another image")]
    NoGroup(String),
    #[error("read {file} of the image")]
    Read {
        file: &'static str,
        #[source]
        source: std::io::Error,
    },
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolvedUser {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups, sorted.
    pub groups: Vec<u32>,
    pub home: Option<String>,
}

/// Resolves `user` inside the tree `root`.
pub fn read(root: BorrowedFd<'_>, user: &str) -> Result<ResolvedUser, UserError> {
    resolve(user, &read_text(root, "/etc/passwd")?, &read_text(root, "/etc/group")?)
}

fn read_text(root: BorrowedFd<'_>, file: &'static str) -> Result<String, UserError> {
    match tree::read_file(root, Path::new(file), FILE_BYTES_MAX) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        // Images from scratch have neither.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(UserError::Read { file, source }),
    }
}

/// As Docker does: nothing means root; a number need not be in the files.
fn resolve(text: &str, passwd: &str, group: &str) -> Result<ResolvedUser, UserError> {
    let (user, wanted_group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    let entry = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let (uid, gid) = (fields.get(2)?.parse::<u32>().ok()?, fields.get(3)?.parse::<u32>().ok()?);
        let matches = number.map_or(fields[0] == user, |number| number == uid);
        matches.then(|| (fields[0].to_owned(), uid, gid, fields.get(5).map(|home| (*home).to_owned())))
    });
    let (name, uid, mut gid, home) = match (entry, number) {
        (Some((name, uid, gid, home)), _) => (Some(name), uid, gid, home),
        (None, Some(uid)) => (None, uid, 0, None),
        (None, None) => return Err(UserError::NoUser(user.to_owned())),
    };
    let mut groups = Vec::new();
    match wanted_group.filter(|wanted| !wanted.is_empty()) {
        Some(wanted) => gid = resolve_group(wanted, group)?,
        // Supplementary groups belong to a named user; an explicit group replaces them.
        None => {
            let members = group_entries(group).filter(|(_, _, members)| {
                name.as_deref().is_some_and(|name| members.split(',').any(|member| member == name))
            });
            groups.extend(members.map(|(_, id, _)| id).filter(|id| *id != gid));
            groups.order();
            groups.dedup();
        }
    }
    Ok(ResolvedUser { uid, gid, groups, home: home.filter(|home| !home.is_empty()) })
}

fn resolve_group(wanted: &str, group: &str) -> Result<u32, UserError> {
    if let Ok(number) = wanted.parse() {
        return Ok(number);
    }
    let found = group_entries(group).find(|(name, _, _)| *name == wanted).map(|(_, id, _)| id);
    found.ok_or_else(|| UserError::NoGroup(wanted.to_owned()))
}

fn group_entries(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, id) = (fields.next()?, fields.nth(1)?.parse().ok()?);
        Some((name, id, fields.next().unwrap_or_default().trim()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_resolve_as_docker_resolves_them() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:44:w:/srv:/bin/false\n";
        let group = "root:x:0:\nweb:x:44:\nvideo:x:50:other,web\naudio:x:49:web\n";
        let user = |uid, gid, groups: &[u32], home: Option<&str>| ResolvedUser {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.map(Into::into),
        };
        let cases = [
            ("", user(0, 0, &[], Some("/root"))),
            ("root", user(0, 0, &[], Some("/root"))),
            ("web", user(33, 44, &[49, 50], Some("/srv"))),
            ("33", user(33, 44, &[49, 50], Some("/srv"))),
            ("web:video", user(33, 50, &[], Some("/srv"))),
            ("1000", user(1000, 0, &[], None)),
            ("1000:1001", user(1000, 1001, &[], None)),
            (":video", user(0, 50, &[], Some("/root"))),
        ];
        for (text, expected) in cases {
            assert_eq!(resolve(text, passwd, group).unwrap(), expected, "{text}");
        }
        assert!(matches!(resolve("nobody", passwd, group), Err(UserError::NoUser(_))));
        assert!(matches!(resolve("web:nobody", passwd, group), Err(UserError::NoGroup(_))));
        assert_eq!(resolve("5", "", "").unwrap(), user(5, 0, &[], None));
    }
}
