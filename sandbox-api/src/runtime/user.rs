// SPDX-License-Identifier: Apache-2.0
//! Who a process runs as: `user[:group]`, by name or number, looked up in the container's own files.
//!
//! The files belong to the image and are hostile: they are opened inside the root file system only, must be regular,
//! and no more than 1 MiB of each is read.

use rustix::fs::{FileType, OFlags};
use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::path::Path;

/// A resolved user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Further groups, without the primary one.
    pub groups: Vec<u32>,
    /// Home directory, `/` if unknown.
    pub home: String,
}

/// A user that cannot be had.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such name in /etc/passwd.
    #[error("unable to find user {0}: no matching entries in passwd file")]
    NoUser(String),
    /// No such name in /etc/group.
    #[error("unable to find group {0}: no matching entries in group file")]
    NoGroup(String),
}

/// Resolves `text` (empty: root) in the root file system `root`.
///
/// # Errors
/// A name that the files do not have.
pub fn resolve(root: BorrowedFd<'_>, text: &str) -> Result<User, Error> {
    resolve_in(&read(root, "etc/passwd"), &read(root, "etc/group"), text)
}

fn read(root: BorrowedFd<'_>, path: &str) -> String {
    // Not blocking: the image may have a fifo there.
    let opened = crate::image::open_in(
        root,
        Path::new(path),
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY,
    );
    let Ok(fd) = opened else { return String::new() };
    if !rustix::fs::fstat(&fd)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
    {
        return String::new();
    }
    let mut bytes = Vec::new();
    let _ = File::from(fd).take(1 << 20).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn resolve_in(passwd: &str, group: &str, text: &str) -> Result<User, Error> {
    let (user_text, group_text) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    let user_text = if user_text.is_empty() { "0" } else { user_text };
    let id = |text: &str| text.parse::<u32>().ok().filter(|id| i32::try_from(*id).is_ok());

    let entry = |matches: &dyn Fn(&[&str]) -> bool| {
        passwd
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .find(|f| f.len() >= 6 && matches(f))
    };
    // A name first: a user may be called "1000".
    let found = entry(&|f| f[0] == user_text).or_else(|| {
        let wanted = id(user_text)?;
        entry(&|f| id(f[2]) == Some(wanted))
    });
    let parsed = found.as_ref().and_then(|f| Some((id(f[2])?, id(f[3])?)));
    let mut user = match (parsed, id(user_text)) {
        (Some((uid, gid)), _) => {
            let home = found
                .as_ref()
                .map(|f| f[5])
                .filter(|home| home.starts_with('/'))
                .unwrap_or("/");
            User {
                uid,
                gid,
                groups: Vec::new(),
                home: home.to_owned(),
            }
        }
        (None, Some(uid)) => User {
            uid,
            gid: 0,
            groups: Vec::new(),
            home: "/".to_owned(),
        },
        (None, None) => return Err(Error::NoUser(user_text.to_owned())),
    };
    let groups = || {
        group
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .filter(|f| f.len() >= 3)
    };
    match group_text {
        Some(name) => {
            let by_name = groups().find(|f| f[0] == name).and_then(|f| id(f[2]));
            user.gid = by_name
                .or_else(|| id(name))
                .ok_or_else(|| Error::NoGroup(name.to_owned()))?;
        }
        None => {
            if let Some(name) = found.as_ref().map(|f| f[0]).filter(|name| !name.is_empty()) {
                let members =
                    groups().filter(|f| f.get(3).is_some_and(|list| list.split(',').any(|m| m == name)));
                user.groups = members
                    .filter_map(|f| id(f[2]))
                    .filter(|gid| *gid != user.gid)
                    .take(256)
                    .collect();
            }
        }
    }
    Ok(user)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34:www:/var/www:/bin/false\n1000:x:7:8::/odd:\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nssl:x:50:other,web\nadm:x:4:web\nbad:x:many:web\n";

    fn user(uid: u32, gid: u32, groups: &[u32], home: &str) -> User {
        User {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.to_owned(),
        }
    }

    #[test]
    fn all_forms() {
        for (text, expected) in [
            ("", user(0, 0, &[], "/root")),
            ("root", user(0, 0, &[], "/root")),
            ("web", user(33, 34, &[50, 4], "/var/www")),
            ("33", user(33, 34, &[50, 4], "/var/www")),
            ("web:ssl", user(33, 50, &[], "/var/www")),
            ("web:1", user(33, 1, &[], "/var/www")),
            ("1000", user(7, 8, &[], "/odd")),
            ("4242", user(4242, 0, &[], "/")),
            ("4242:4343", user(4242, 4343, &[], "/")),
            (":ssl", user(0, 50, &[], "/root")),
        ] {
            assert_eq!(resolve_in(PASSWD, GROUP, text).unwrap(), expected, "{text}");
        }
        assert_eq!(
            resolve_in(PASSWD, GROUP, "nobody"),
            Err(Error::NoUser("nobody".into()))
        );
        assert_eq!(
            resolve_in(PASSWD, GROUP, "web:nogroup"),
            Err(Error::NoGroup("nogroup".into()))
        );
        assert_eq!(
            resolve_in(PASSWD, GROUP, "4294967295"),
            Err(Error::NoUser("4294967295".into()))
        );
        assert_eq!(resolve_in(PASSWD, GROUP, "-1"), Err(Error::NoUser("-1".into())));
        assert_eq!(resolve_in("", "", "0").unwrap(), user(0, 0, &[], "/"));
    }

    #[test]
    fn files_that_are_none() {
        let dir = std::env::temp_dir().join(format!("cloister-user-{}", crate::ids::random_hex(6)));
        std::fs::create_dir_all(dir.join("etc")).unwrap();
        std::os::unix::fs::symlink("/proc/self/environ", dir.join("etc/group")).unwrap();
        let fifo = rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.join("etc/passwd"),
            FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        );
        fifo.unwrap();
        let root = File::open(&dir).unwrap();
        use std::os::fd::AsFd;
        assert_eq!(resolve(root.as_fd(), "5").unwrap(), user(5, 0, &[], "/"));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
