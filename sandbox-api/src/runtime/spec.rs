// SPDX-License-Identifier: Apache-2.0
//! The OCI runtime specification of a container, from the image's configuration and the user's wishes.
//!
//! Paths are the host's here; [`crate::pod::task`] rewrites them into the guest's. What docker's default profile gives is
//! given: capabilities, masked and read-only paths, mounts, devices, a seccomp profile ([`super::seccomp`]). A privileged
//! container has all of its VM's kernel, and nothing of the host more than any other.

use super::capabilities::{self, Change};
use super::seccomp;
use super::user::User;
use oci_spec::runtime::{
    BoxBuilder, Capabilities, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxDeviceCgroup,
    LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxNamespaceBuilder, LinuxNamespaceType,
    LinuxResourcesBuilder, Mount, MountBuilder, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
    get_default_maskedpaths, get_default_readonly_paths,
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
    /// What the container may do in its VM.
    #[serde(default)]
    pub security: Security,
}

/// What a container may do in its VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Security {
    /// `--privileged`: everything.
    pub privileged: bool,
    /// `--cap-add`.
    pub cap_add: Vec<Change>,
    /// `--cap-drop`.
    pub cap_drop: Vec<Change>,
    /// `--security-opt seccomp=`.
    pub seccomp: seccomp::Choice,
    /// `--security-opt no-new-privileges`.
    pub no_new_privileges: bool,
    /// `--pid host`: it sees the processes of its VM, the agent among them.
    pub vm_processes: bool,
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

/// Later settings of a variable replace earlier ones, in place; a name without a value removes it.
pub fn environment<'a>(sources: impl IntoIterator<Item = &'a String>) -> Vec<String> {
    let mut env: Vec<String> = Vec::new();
    for setting in sources {
        let key = setting.split('=').next().unwrap_or(setting);
        let same = |old: &str| old.split('=').next() == Some(key);
        if !setting.contains('=') {
            env.retain(|old| !same(old));
            continue;
        }
        match env.iter_mut().find(|old| same(old)) {
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

    let security = &wishes.security;
    let all = capabilities::resolve(security.privileged, &security.cap_add, &security.cap_drop);
    let profile = security.seccomp.resolve(security.privileged, &all);
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
        .no_new_privileges(security.no_new_privileges);
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
        .filter(|typ| *typ != LinuxNamespaceType::Pid || !security.vm_processes)
        .map(|typ| LinuxNamespaceBuilder::default().typ(typ).build().map_err(failed))
        .collect::<Result<Vec<_>, _>>()?;
    let resources = LinuxResourcesBuilder::default()
        .devices(devices(security.privileged)?)
        .build()
        .map_err(failed)?;
    let (masked, read_only) = if security.privileged {
        (Vec::new(), Vec::new())
    } else {
        (get_default_maskedpaths(), get_default_readonly_paths())
    };
    let mut linux = LinuxBuilder::default()
        .namespaces(namespaces)
        .resources(resources)
        .cgroups_path(PathBuf::from(format!("/cloister/{id}")))
        .masked_paths(masked)
        .readonly_paths(read_only);
    if let Some(profile) = profile {
        linux = linux.seccomp(profile);
    }
    let linux = linux.build().map_err(failed)?;
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

/// Which devices may be used: those of containerd's and docker's defaults, and all may be made.
fn devices(privileged: bool) -> Result<Vec<LinuxDeviceCgroup>, Error> {
    use LinuxDeviceType::{B, C};
    let rule = |allow, typ, major, minor, access: &str| {
        let mut rule = LinuxDeviceCgroupBuilder::default().allow(allow).access(access);
        if let Some(typ) = typ {
            rule = rule.typ(typ);
        }
        if let Some(major) = major {
            rule = rule.major(major);
        }
        if let Some(minor) = minor {
            rule = rule.minor(minor);
        }
        rule.build().map_err(|e| Error::Spec(e.to_string()))
    };
    if privileged {
        return Ok(vec![rule(true, None, None, None, "rwm")?]);
    }
    let mut rules = vec![
        rule(false, None, None, None, "rwm")?,
        rule(true, Some(C), None, None, "m")?,
        rule(true, Some(B), None, None, "m")?,
    ];
    // null, zero, full, random, urandom, tty, console, ptmx; then any pseudo terminal.
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)] {
        rules.push(rule(true, Some(C), Some(major), Some(minor), "rwm")?);
    }
    rules.push(rule(true, Some(C), Some(136), None, "rwm")?);
    Ok(rules)
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
    let kernel = if wishes.security.privileged { "rw" } else { "ro" };
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
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", kernel])?,
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", kernel],
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
    fn a_name_without_a_value_is_removed() {
        let settings = strings(&["A=1", "AB=2", "A", "C", "B=3"]);
        assert_eq!(environment(&settings), ["AB=2", "B=3"]);
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
    fn privileged_and_not() {
        let json = |security: Security| -> serde_json::Value {
            let wishes = Wishes {
                security,
                ..Wishes::default()
            };
            serde_json::to_value(build(&image(), &wishes, &root(), "h", "id").unwrap()).unwrap()
        };
        let usual = json(Security::default());
        assert_eq!(usual["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
        assert_eq!(usual["process"]["noNewPrivileges"], false);
        assert!(!usual["linux"]["maskedPaths"].as_array().unwrap().is_empty());
        let devices = usual["linux"]["resources"]["devices"].as_array().unwrap();
        assert_eq!(
            (&devices[0]["allow"], &devices[0]["access"]),
            (&false.into(), &"rwm".into())
        );
        assert!(
            devices
                .iter()
                .any(|rule| rule["major"] == 1 && rule["minor"] == 3)
        );
        let privileged = json(Security {
            privileged: true,
            vm_processes: true,
            no_new_privileges: true,
            ..Security::default()
        });
        assert!(privileged["linux"].get("seccomp").is_none());
        assert_eq!(privileged["process"]["noNewPrivileges"], true);
        assert!(privileged["linux"]["maskedPaths"].as_array().unwrap().is_empty());
        assert_eq!(privileged["linux"]["resources"]["devices"][0]["allow"], true);
        let namespaces = privileged["linux"]["namespaces"].as_array().unwrap();
        assert!(namespaces.iter().all(|ns| ns["type"] != "pid"));
        assert_eq!(
            privileged["process"]["capabilities"]["bounding"]
                .as_array()
                .unwrap()
                .len(),
            41
        );
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
