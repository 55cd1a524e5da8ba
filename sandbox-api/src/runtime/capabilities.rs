// SPDX-License-Identifier: Apache-2.0
//! Capabilities (capabilities(7)) of a container: docker's defaults, and what `--cap-add`, `--cap-drop` and `--privileged`
//! make of them.

use oci_spec::runtime::{Capabilities, Capability};

/// docker's default set.
const DEFAULT: [Capability; 14] = [
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

/// The others that the guest's kernel knows.
const OTHER: [Capability; 27] = [
    Capability::AuditControl,
    Capability::AuditRead,
    Capability::BlockSuspend,
    Capability::Bpf,
    Capability::CheckpointRestore,
    Capability::DacReadSearch,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::Lease,
    Capability::LinuxImmutable,
    Capability::MacAdmin,
    Capability::MacOverride,
    Capability::NetAdmin,
    Capability::NetBroadcast,
    Capability::Perfmon,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysModule,
    Capability::SysNice,
    Capability::SysPacct,
    Capability::SysPtrace,
    Capability::SysRawio,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Syslog,
    Capability::WakeAlarm,
];

/// One of `--cap-add` or `--cap-drop`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Change {
    /// ALL
    All,
    /// One by its name.
    One(Capability),
}

/// Reads a name, with or without `CAP_`, in any case; or ALL.
///
/// # Errors
/// docker's words.
pub fn parse(text: &str) -> Result<Change, String> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("CAP_").unwrap_or(&upper);
    if name == "ALL" {
        return Ok(Change::All);
    }
    name.parse()
        .map(Change::One)
        .map_err(|_| format!("unknown capability: \"CAP_{name}\""))
}

/// The capabilities of a container's root: as docker, `ALL` on one side and names on the other may be combined.
pub fn resolve(privileged: bool, add: &[Change], drop: &[Change]) -> Capabilities {
    let all = || DEFAULT.into_iter().chain(OTHER);
    if privileged {
        return all().collect();
    }
    let mut set: Capabilities = if add.contains(&Change::All) {
        all().collect()
    } else if drop.contains(&Change::All) {
        Capabilities::new()
    } else {
        DEFAULT.into_iter().collect()
    };
    let one = |change: &Change| match change {
        Change::All => None,
        Change::One(capability) => Some(*capability),
    };
    // What is both dropped and added by name stays, as with docker.
    for capability in drop.iter().filter_map(one) {
        set.remove(&capability);
    }
    set.extend(add.iter().filter_map(one));
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_any_form() {
        for text in ["sys_admin", "CAP_SYS_ADMIN", "Cap_Sys_Admin"] {
            assert_eq!(parse(text), Ok(Change::One(Capability::SysAdmin)), "{text}");
        }
        assert_eq!(parse("all"), Ok(Change::All));
        assert_eq!(parse("CAP_ALL"), Ok(Change::All));
        assert_eq!(parse("foo").unwrap_err(), "unknown capability: \"CAP_FOO\"");
    }

    #[test]
    fn each_is_there_once() {
        assert_eq!(resolve(true, &[], &[]).len(), DEFAULT.len() + OTHER.len());
        assert_eq!(resolve(false, &[], &[]).len(), DEFAULT.len());
    }

    #[test]
    fn added_and_dropped() {
        let admin = Change::One(Capability::SysAdmin);
        let chown = Change::One(Capability::Chown);
        assert!(resolve(false, &[admin], &[]).contains(&Capability::SysAdmin));
        assert!(!resolve(false, &[], &[chown]).contains(&Capability::Chown));
        assert_eq!(
            resolve(false, &[chown], &[Change::All]),
            [Capability::Chown].into()
        );
        let most = resolve(false, &[Change::All], &[admin]);
        assert_eq!(most.len(), DEFAULT.len() + OTHER.len() - 1);
        // Nothing is kept from a privileged one.
        assert_eq!(
            resolve(true, &[], &[Change::All]).len(),
            DEFAULT.len() + OTHER.len()
        );
    }
}
