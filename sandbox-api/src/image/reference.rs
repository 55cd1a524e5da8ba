// SPDX-License-Identifier: Apache-2.0
//! Names of images, read and shown as docker does: `busybox` is `docker.io/library/busybox:latest`.

use super::error::{Result, bad};
use oci_client::Reference;

/// Parses a name in docker's grammar.
///
/// # Errors
/// Not such a name.
pub fn parse(name: &str) -> Result<Reference> {
    name.parse()
        .map_err(|e| bad(format!("invalid image name {name:?}"), format!("{e}")))
}

/// The full form of a name.
///
/// # Errors
/// Not a name.
pub fn normalize(name: &str) -> Result<String> {
    Ok(parse(name)?.whole())
}

/// The short form that docker shows.
pub fn familiar(full: &str) -> &str {
    full.strip_prefix("docker.io/library/")
        .or_else(|| full.strip_prefix("docker.io/"))
        .unwrap_or(full)
}

/// Repository and tag (or `<none>`) as `docker images` has them.
pub fn columns(full: &str) -> (String, String) {
    let familiar = familiar(full);
    if let Some((repository, _)) = familiar.split_once('@') {
        return (repository.to_owned(), "<none>".to_owned());
    }
    match familiar.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository.to_owned(), tag.to_owned()),
        _ => (familiar.to_owned(), "<none>".to_owned()),
    }
}

/// Whether a registry (`host[:port]`) is on this machine, where plain HTTP is fine.
pub fn is_loopback(registry: &str) -> bool {
    let host = match registry.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => registry.rsplit_once(':').map_or(registry, |(host, _)| host),
    };
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_docker_reads_them() {
        for (short, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("me/app", "docker.io/me/app:latest"),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
            ("localhost/x", "localhost/x:latest"),
            ("registry.example/a", "registry.example/a:latest"),
        ] {
            assert_eq!(normalize(short).unwrap(), full, "{short}");
        }
        for wrong in ["", "UPPER", "a b", "a:b:c", "-x", "a@sha256:00", "../x"] {
            assert!(normalize(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_as_docker_shows_them() {
        assert_eq!(familiar("docker.io/library/busybox:latest"), "busybox:latest");
        assert_eq!(
            columns("docker.io/library/busybox:latest"),
            ("busybox".into(), "latest".into())
        );
        assert_eq!(
            columns("localhost:5000/a"),
            ("localhost:5000/a".into(), "<none>".into())
        );
        assert_eq!(columns("a/b@sha256:00").1, "<none>");
    }

    #[test]
    fn loopback_registries() {
        for yes in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:80",
            "127.1.2.3",
            "[::1]:5000",
        ] {
            assert!(is_loopback(yes), "{yes}");
        }
        for no in ["docker.io", "10.0.0.1:5000", "localhost.example", "[::2]:5000"] {
            assert!(!is_loopback(no), "{no}");
        }
    }
}
