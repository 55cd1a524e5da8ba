// SPDX-License-Identifier: Apache-2.0
//! The OCI runtime specification of a container, from the image's configuration and the user's wishes.
//!
//! Paths are the host's here; [`crate::pod::task`] rewrites them into the guest's. What docker's default profile gives is
//! given: capabilities, masked and read-only paths, mounts. A seccomp profile is not set yet: the VM is the boundary,
//! and the guest kernel sees every system call anyway.

use super::user::User;
use oci_spec::runtime::{
    BoxBuilder, Capabilities, Capability, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxDeviceCgroupBuilder,
    LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResourcesBuilder, Mount, MountBuilder, ProcessBuilder,
    RootBuilder, Spec, SpecBuilder, UserBuilder, get_default_maskedpaths, get_default_readonly_paths,
};
use std::path::PathBuf;

/// A volume: `-v host:container[:ro]`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Volume {
    /// Folder or file of the host.
    pub source: PathBuf,
    /// Absolute path in the container.
    pub target: PathBuf,
    /// Writes are refused, by the host.
    pub read_only: bool,
}

/// What the user asked for, beyond the image.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Wishes {
    /// Command and arguments after the image's name.
    pub args: Vec<String>,
    /// `--entrypoint`; an empty text clears the image's.
    pub entrypoint: Option<String>,
    /// `-e`, `--env-file`: KEY=VALUE.
    pub env: Vec<String>,
    /// `-w`.
    pub workdir: Option<String>,
    /// `-u`.
    pub user: Option<String>,
    /// `-t`.
    pub terminal: bool,
    /// `--read-only`.
    pub read_only: bool,
    /// `--tmpfs`: path and options.
    pub tmpfs: Vec<(PathBuf, String)>,
    /// `-v`, `--mount`.
    pub volumes: Vec<Volume>,
}

/// Wishes and image do not make a container.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Neither the image nor the user names a program.
    #[error("no command specified: the image has none, give one after its name")]
    NoCommand,
    /// `-w` or the image's WorkingDir.
    #[error("the working directory {0:?} is invalid, it needs to be an absolute path")]
    Workdir(String),
    /// The crate refused a value.
    #[error("cannot build the runtime specification: {0}")]
    Spec(String),
}

/// docker's default set.
const CAPABILITIES: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::SysChroot,
    Capability::Mknod,
    Capability::AuditWrite,
    Capability::Setfcap,
];

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Entrypoint and command as docker combines them.
///
/// # Errors
/// [`Error::NoCommand`].
pub fn command(image: &oci_spec::image::Config, wishes: &Wishes) -> Result<Vec<String>, Error> {
    let (entrypoint, image_cmd) = match &wishes.entrypoint {
        // Another entrypoint also clears the image's command.
        Some(program) if program.is_empty() => (Vec::new(), Vec::new()),
        Some(program) => (vec![program.clone()], Vec::new()),
        None => (
            image.entrypoint().clone().unwrap_or_default(),
            image.cmd().clone().unwrap_or_default(),
        ),
    };
    let cmd = if wishes.args.is_empty() {
        image_cmd
    } else {
        wishes.args.clone()
    };
    let args: Vec<String> = entrypoint.into_iter().chain(cmd).collect();
    if args.is_empty() {
        Err(Error::NoCommand)
    } else {
        Ok(args)
    }
}

/// Later settings of a variable replace earlier ones, in place.
pub fn environment<'a>(sources: impl IntoIterator<Item = &'a String>) -> Vec<String> {
    let mut env: Vec<String> = Vec::new();
    for setting in sources {
        let key = setting.split('=').next().unwrap_or(setting);
        let same = |old: &&mut String| old.split('=').next() == Some(key);
        match env.iter_mut().find(same) {
            Some(old) => old.clone_from(setting),
            None => env.push(setting.clone()),
        }
    }
    env
}

/// Builds the specification.
///
/// # Errors
/// See [`Error`].
pub fn build(
    image: &oci_spec::image::Config,
    wishes: &Wishes,
    user: &User,
    hostname: &str,
    id: &str,
) -> Result<Spec, Error> {
    let failed = |e: oci_spec::OciSpecError| Error::Spec(e.to_string());
    let args = command(image, wishes)?;

    let mut defaults = vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if wishes.terminal {
        defaults.push("TERM=xterm".to_owned());
    }
    let image_env = image.env().clone().unwrap_or_default();
    let mut env = environment(defaults.iter().chain(&image_env).chain(&wishes.env));
    if !env.iter().any(|setting| setting.starts_with("HOME=")) {
        env.push(format!("HOME={}", user.home));
    }
    let cwd = wishes
        .workdir
        .clone()
        .or_else(|| image.working_dir().clone())
        .filter(|dir| !dir.is_empty());
    let cwd = cwd.unwrap_or_else(|| "/".to_owned());
    if !cwd.starts_with('/') {
        return Err(Error::Workdir(cwd));
    }

    let all: Capabilities = CAPABILITIES.into_iter().collect();
    let mut capabilities = LinuxCapabilitiesBuilder::default().bounding(all.clone());
    if user.uid == 0 {
        capabilities = capabilities.effective(all.clone()).permitted(all);
    } else {
        capabilities = capabilities
            .effective(Capabilities::new())
            .permitted(Capabilities::new());
    }
    let capabilities = capabilities
        .inheritable(Capabilities::new())
        .ambient(Capabilities::new())
        .build()
        .map_err(failed)?;
    let oci_user = UserBuilder::default()
        .uid(user.uid)
        .gid(user.gid)
        .additional_gids(user.groups.clone())
        .build()
        .map_err(failed)?;
    let mut process = ProcessBuilder::default()
        .terminal(wishes.terminal)
        .user(oci_user)
        .args(args)
        .env(env)
        .cwd(cwd)
        .capabilities(capabilities)
        .no_new_privileges(false);
    if wishes.terminal {
        let size = BoxBuilder::default()
            .height(24_u64)
            .width(80_u64)
            .build()
            .map_err(failed)?;
        process = process.console_size(size);
    }
    let mut process = process.build().map_err(failed)?;
    // oci-spec's own default sets a limit of 1024 files.
    process.set_rlimits(None);

    let namespaces = [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Cgroup,
    ];
    let namespaces = namespaces
        .into_iter()
        .map(|typ| LinuxNamespaceBuilder::default().typ(typ).build().map_err(failed))
        .collect::<Result<Vec<_>, _>>()?;
    let deny = LinuxDeviceCgroupBuilder::default()
        .allow(false)
        .access("rwm")
        .build()
        .map_err(failed)?;
    let resources = LinuxResourcesBuilder::default()
        .devices(vec![deny])
        .build()
        .map_err(failed)?;
    let linux = LinuxBuilder::default()
        .namespaces(namespaces)
        .resources(resources)
        .cgroups_path(PathBuf::from(format!("/cloister/{id}")))
        .masked_paths(get_default_maskedpaths())
        .readonly_paths(get_default_readonly_paths())
        .build()
        .map_err(failed)?;
    let root = RootBuilder::default()
        .path("rootfs")
        .readonly(wishes.read_only)
        .build()
        .map_err(failed)?;
    SpecBuilder::default()
        .version("1.2.0")
        .root(root)
        .process(process)
        .hostname(hostname)
        .mounts(mounts(wishes)?)
        .linux(linux)
        .build()
        .map_err(failed)
}

fn mount(destination: &str, typ: &str, source: &str, options: &[&str]) -> Result<Mount, Error> {
    MountBuilder::default()
        .destination(destination)
        .typ(typ)
        .source(source)
        .options(
            options
                .iter()
                .map(|option| (*option).to_owned())
                .collect::<Vec<_>>(),
        )
        .build()
        .map_err(|e| Error::Spec(e.to_string()))
}

fn mounts(wishes: &Wishes) -> Result<Vec<Mount>, Error> {
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        )?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        )?,
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        )?,
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?,
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"])?,
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "ro"],
        )?,
    ];
    for (path, options) in &wishes.tmpfs {
        let mut all = vec!["nosuid", "nodev", "noexec"];
        all.extend(options.split(',').filter(|option| !option.is_empty()));
        mounts.push(mount(&path.to_string_lossy(), "tmpfs", "tmpfs", &all)?);
    }
    for volume in &wishes.volumes {
        let options = ["rbind", "rprivate", if volume.read_only { "ro" } else { "rw" }];
        mounts.push(mount(
            &volume.target.to_string_lossy(),
            "bind",
            &volume.source.to_string_lossy(),
            &options,
        )?);
    }
    // Outer paths first, whatever the order on the command line.
    mounts.sort_by_key(|mount| mount.destination().components().count());
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::image::{Config, ConfigBuilder};

    fn image() -> Config {
        ConfigBuilder::default()
            .entrypoint(vec!["/entry".to_owned(), "-x".to_owned()])
            .cmd(vec!["serve".to_owned()])
            .env(vec!["PATH=/bin".to_owned(), "LANG=C".to_owned()])
            .working_dir("/srv".to_owned())
            .build()
            .unwrap()
    }

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    fn root() -> User {
        User {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            home: "/root".into(),
        }
    }

    #[test]
    fn commands_as_docker_combines_them() {
        let command = |args: &[&str], entrypoint: Option<&str>| {
            let wishes = Wishes {
                args: strings(args),
                entrypoint: entrypoint.map(str::to_owned),
                ..Wishes::default()
            };
            super::command(&image(), &wishes)
        };
        assert_eq!(command(&[], None).unwrap(), ["/entry", "-x", "serve"]);
        assert_eq!(command(&["a", "b"], None).unwrap(), ["/entry", "-x", "a", "b"]);
        assert_eq!(command(&["a"], Some("/sh")).unwrap(), ["/sh", "a"]);
        assert_eq!(command(&[], Some("/sh")).unwrap(), ["/sh"]);
        assert_eq!(command(&["a"], Some("")).unwrap(), ["a"]);
        assert_eq!(command(&[], Some("")), Err(Error::NoCommand));
        assert_eq!(
            super::command(&Config::default(), &Wishes::default()),
            Err(Error::NoCommand)
        );
    }

    #[test]
    fn environment_of_image_and_user() {
        let wishes = Wishes {
            env: strings(&["LANG=de", "X=a=b"]),
            terminal: true,
            ..Wishes::default()
        };
        let spec = build(&image(), &wishes, &root(), "box", "id").unwrap();
        let process = spec.process().as_ref().unwrap();
        let expected = [
            "PATH=/bin",
            "HOSTNAME=box",
            "TERM=xterm",
            "LANG=de",
            "X=a=b",
            "HOME=/root",
        ];
        assert_eq!(process.env().as_ref().unwrap(), &expected);
        assert_eq!(process.cwd(), &PathBuf::from("/srv"));
        assert_eq!(process.terminal(), Some(true));
        assert!(process.rlimits().is_none());
    }

    #[test]
    fn capabilities_are_for_root() {
        let spec = build(&image(), &Wishes::default(), &root(), "h", "id").unwrap();
        let capabilities = spec.process().as_ref().unwrap().capabilities().clone().unwrap();
        assert_eq!(capabilities.effective().as_ref().unwrap().len(), 14);
        let user = User {
            uid: 5,
            gid: 6,
            groups: vec![7],
            home: "/".into(),
        };
        let spec = build(&image(), &Wishes::default(), &user, "h", "id").unwrap();
        let process = spec.process().as_ref().unwrap();
        let capabilities = process.capabilities().clone().unwrap();
        assert_eq!(capabilities.effective().as_ref().unwrap().len(), 0);
        assert_eq!(capabilities.bounding().as_ref().unwrap().len(), 14);
        assert_eq!(process.user().additional_gids().as_ref().unwrap(), &[7]);
    }

    #[test]
    fn mounts_in_order() {
        let volume = |target: &str| Volume {
            source: "/h".into(),
            target: target.into(),
            read_only: true,
        };
        let wishes = Wishes {
            volumes: vec![volume("/a/b/c"), volume("/a")],
            tmpfs: vec![("/run".into(), "size=1m".into())],
            ..Wishes::default()
        };
        let spec = build(&image(), &wishes, &root(), "h", "id").unwrap();
        let mounts = spec.mounts().as_ref().unwrap();
        let position = |path: &str| {
            mounts
                .iter()
                .position(|m| m.destination() == &PathBuf::from(path))
                .unwrap()
        };
        assert!(position("/a") < position("/a/b/c"));
        assert!(
            mounts[position("/a")]
                .options()
                .as_ref()
                .unwrap()
                .contains(&"ro".to_owned())
        );
        assert!(
            mounts[position("/run")]
                .options()
                .as_ref()
                .unwrap()
                .contains(&"size=1m".to_owned())
        );
        let relative = Wishes {
            workdir: Some("srv".into()),
            ..Wishes::default()
        };
        assert_eq!(
            build(&image(), &relative, &root(), "h", "id").unwrap_err(),
            Error::Workdir("srv".into())
        );
    }
}
