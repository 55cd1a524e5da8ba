// SPDX-License-Identifier: Apache-2.0
//! Devices of a specification: which block devices of the host a container asks for, and their numbers in the guest;
//! character devices, which stay the host's but for those that every guest has.
//!
//! A raw block volume is an entry of `linux.devices` with the host's number, and a rule of `linux.resources.devices` that
//! allows it. A privileged container's specification lists every device of the host, under the host's names, and has one
//! rule that allows all; those nobody asked for, and they stay the host's.

use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxResources, LinuxThrottleDevice,
    LinuxThrottleDeviceBuilder, LinuxWeightDevice, LinuxWeightDeviceBuilder, Spec,
};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Number of a block device: major and minor.
pub type Number = (u32, u32);

/// Character devices that every guest has under the same numbers: null, zero, full, random, urandom; tty, console, ptmx;
/// net/tun, fuse.
const COMMON: [Number; 10] = [
    (1, 3),
    (1, 5),
    (1, 7),
    (1, 8),
    (1, 9),
    (5, 0),
    (5, 1),
    (5, 2),
    (10, 200),
    (10, 229),
];
/// kmsg: the guest's own, where nobody asked for the host's.
const KERNEL_LOG: Number = (1, 11);

/// Leaves out the host's character devices that nobody asked for.
///
/// # Errors
/// By name, one that somebody asked for.
pub fn refuse_characters(spec: &mut Spec, id: &str) -> Result<(), String> {
    let Some(linux) = spec.linux_mut() else {
        return Ok(());
    };
    let resources = linux.resources().clone().unwrap_or_default();
    let rules = resources.devices().as_deref().unwrap_or_default();
    let Some(devices) = linux.devices_mut() else {
        return Ok(());
    };
    let is_character = |device: &LinuxDevice| matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
    let is_one_of = |device: &LinuxDevice, numbers: &[Number]| {
        number(device.major(), device.minor()).is_some_and(|number| numbers.contains(&number))
    };
    let foreign = |device: &LinuxDevice| is_character(device) && !is_one_of(device, &COMMON);
    if let Some(asked) = devices
        .iter()
        .find(|device| foreign(device) && is_asked_for(rules, device))
    {
        return Err(format!(
            "the host's character device {}:{} ({}) is not in the pod's virtual machine",
            asked.major(),
            asked.minor(),
            asked.path().display()
        ));
    }
    let before = devices.len();
    devices.retain(|device| !foreign(device) || is_one_of(device, &[KERNEL_LOG]));
    let left_out = before.saturating_sub(devices.len());
    if left_out > 0 {
        log::warn!(
            "container {id}: {left_out} character devices of the host are not in the pod's virtual machine, and left out \
             (with privileged_without_host_devices = true for the runtime, containerd does not name them)"
        );
    }
    Ok(())
}

/// A privileged container may use every device, and no rule is about one that is merely listed.
fn is_asked_for(rules: &[LinuxDeviceCgroup], device: &LinuxDevice) -> bool {
    let names = |rule: &LinuxDeviceCgroup| {
        rule.allow()
            && rule.typ() == Some(LinuxDeviceType::C)
            && rule.major() == Some(device.major())
            && rule
                .minor()
                .is_none_or(|minor| minor < 0 || minor == device.minor())
    };
    let every = |rule: &LinuxDeviceCgroup| {
        let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
        rule.allow()
            && matches!(rule.typ(), None | Some(LinuxDeviceType::A))
            && any(rule.major())
            && any(rule.minor())
    };
    rules.iter().any(names) || !rules.iter().any(every)
}

/// Whether a container may write to each block device of the host that it asks for.
///
/// `host_name` is the path that the host has for a device.
pub fn wanted(spec: &Spec, host_name: impl Fn(Number) -> Option<PathBuf>) -> BTreeMap<Number, bool> {
    let Some(linux) = spec.linux() else {
        return BTreeMap::new();
    };
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.devices().as_deref())
        .unwrap_or_default();
    let mut wanted = BTreeMap::new();
    for device in linux.devices().iter().flatten() {
        let Some(number) = number(device.major(), device.minor()) else {
            continue;
        };
        if device.typ() != LinuxDeviceType::B {
            continue;
        }
        let named = rules
            .iter()
            .any(|rule| rule.allow() && is_block(rule) && rule_number(rule) == Some(number));
        if named || host_name(number).as_ref() != Some(device.path()) {
            wanted.insert(number, may_write(rules, number));
        }
    }
    wanted
}

/// Gives the devices their numbers in the guest; those that are not in `found` are left out, with the rules that allow them
/// and the limits of their use.
pub fn rewrite(spec: &mut Spec, found: &BTreeMap<Number, Number>) {
    let Some(linux) = spec.linux_mut() else {
        return;
    };
    if let Some(devices) = linux.devices_mut() {
        devices.retain_mut(|device| {
            if device.typ() != LinuxDeviceType::B {
                return true;
            }
            let guest = number(device.major(), device.minor()).and_then(|host| found.get(&host));
            if let Some((major, minor)) = guest {
                device.set_major((*major).into());
                device.set_minor((*minor).into());
            }
            guest.is_some()
        });
    }
    if let Some(resources) = linux.resources_mut() {
        rewrite_resources(resources, found);
    }
}

/// The same for rules and limits alone.
pub fn rewrite_resources(resources: &mut LinuxResources, found: &BTreeMap<Number, Number>) {
    if let Some(rules) = resources.devices_mut() {
        rules.retain_mut(|rule| {
            if !is_block(rule) || rule.major().is_none_or(|major| major < 0) {
                return true;
            }
            let guest = rule_number(rule).and_then(|host| found.get(&host));
            if let Some((major, minor)) = guest {
                rule.set_major(Some((*major).into()));
                rule.set_minor(Some((*minor).into()));
            }
            guest.is_some() || !rule.allow()
        });
    }
    if let Some(limits) = resources.block_io_mut() {
        let guest = |major, minor| number(major, minor).and_then(|host| found.get(&host).copied());
        let weight = |limit: &LinuxWeightDevice| {
            let (major, minor) = guest(limit.major(), limit.minor())?;
            let mut moved = LinuxWeightDeviceBuilder::default().major(major).minor(minor);
            if let Some(weight) = limit.weight() {
                moved = moved.weight(weight);
            }
            if let Some(weight) = limit.leaf_weight() {
                moved = moved.leaf_weight(weight);
            }
            moved.build().ok()
        };
        let rate = |limit: &LinuxThrottleDevice| {
            let (major, minor) = guest(limit.major(), limit.minor())?;
            let moved = LinuxThrottleDeviceBuilder::default().major(major).minor(minor);
            moved.rate(limit.rate()).build().ok()
        };
        limits.set_weight_device(moved(limits.weight_device(), weight));
        limits.set_throttle_read_bps_device(moved(limits.throttle_read_bps_device(), rate));
        limits.set_throttle_write_bps_device(moved(limits.throttle_write_bps_device(), rate));
        limits.set_throttle_read_iops_device(moved(limits.throttle_read_iops_device(), rate));
        limits.set_throttle_write_iops_device(moved(limits.throttle_write_iops_device(), rate));
    }
}

/// Those of the list that are about a device of the guest, as they are there.
fn moved<T>(list: &Option<Vec<T>>, guest: impl Fn(&T) -> Option<T>) -> Option<Vec<T>> {
    Some(list.as_ref()?.iter().filter_map(guest).collect())
}

fn number(major: i64, minor: i64) -> Option<Number> {
    Some((u32::try_from(major).ok()?, u32::try_from(minor).ok()?))
}

fn is_block(rule: &LinuxDeviceCgroup) -> bool {
    rule.typ() == Some(LinuxDeviceType::B)
}

/// The one device that a rule is about, if it is about one.
fn rule_number(rule: &LinuxDeviceCgroup) -> Option<Number> {
    number(rule.major()?, rule.minor()?)
}

/// The last rule that says something about writing counts; without any, nothing is allowed.
fn may_write(rules: &[LinuxDeviceCgroup], (major, minor): Number) -> bool {
    // A number that is left out, or negative, is any.
    let is = |rule: Option<i64>, number: u32| rule.is_none_or(|rule| rule < 0 || rule == i64::from(number));
    rules
        .iter()
        .rev()
        .find(|rule| {
            matches!(rule.typ(), None | Some(LinuxDeviceType::A | LinuxDeviceType::B))
                && is(rule.major(), major)
                && is(rule.minor(), minor)
                && rule
                    .access()
                    .as_deref()
                    .is_none_or(|access| access.is_empty() || access.contains('w'))
        })
        .is_some_and(LinuxDeviceCgroup::allow)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(devices: Value, rules: Value) -> Spec {
        let spec =
            json!({"ociVersion": "1.2.0", "linux": {"devices": devices, "resources": {"devices": rules}}});
        serde_json::from_value(spec).unwrap()
    }

    fn block(path: &str, major: i64, minor: i64) -> Value {
        json!({"path": path, "type": "b", "major": major, "minor": minor, "fileMode": 0o660})
    }

    fn rule(allow: bool, major: i64, minor: i64, access: &str) -> Value {
        json!({"allow": allow, "type": "b", "major": major, "minor": minor, "access": access})
    }

    fn host(number: Number) -> Option<PathBuf> {
        (number == (8, 0)).then(|| "/dev/sda".into())
    }

    const NONE: fn(Number) -> Option<PathBuf> = |_| None;

    #[test]
    fn volumes_are_found_and_may_be_read_only() {
        let deny = json!({"allow": false, "access": "rwm"});
        let devices = json!([
            block("/dev/a", 7, 0),
            block("/dev/b", 7, 1),
            block("/dev/c", 7, 2),
            {"path": "/dev/other", "type": "c", "major": 1, "minor": 5},
            block("/dev/d", -1, 2),
        ]);
        let rules = json!([deny, rule(true, 7, 0, "rwm"), rule(true, 7, 1, "r")]);
        let expected = BTreeMap::from([((7, 0), true), ((7, 1), false), ((7, 2), false)]);
        assert_eq!(wanted(&spec(devices, rules), NONE), expected);
    }

    #[test]
    fn the_last_rule_counts() {
        let may = |rules: Value| {
            let spec = spec(json!([block("/dev/a", 7, 3)]), rules);
            wanted(&spec, NONE)[&(7, 3)]
        };
        assert!(!may(json!([])));
        assert!(may(json!([{"allow": true, "access": "rwm"}])));
        assert!(may(json!([{"allow": true, "type": "a"}])));
        assert!(may(json!([rule(true, 7, -1, "rw"), rule(false, 7, 4, "rwm")])));
        assert!(!may(json!([rule(true, 7, 3, "rw"), rule(false, 7, 3, "w")])));
        assert!(!may(json!([{"allow": true, "type": "c", "access": "rwm"}])));
    }

    #[test]
    fn a_privileged_container_does_not_get_the_hosts_disks() {
        let all = json!([{"allow": true, "access": "rwm"}]);
        let devices = json!([block("/dev/sda", 8, 0), block("/dev/volume", 8, 0)]);
        assert!(wanted(&spec(json!([block("/dev/sda", 8, 0)]), all.clone()), host).is_empty());
        assert_eq!(
            wanted(&spec(devices, all), host),
            BTreeMap::from([((8, 0), true)])
        );
        // Asked for by the host's own name.
        let named = spec(json!([block("/dev/sda", 8, 0)]), json!([rule(true, 8, 0, "r")]));
        assert_eq!(wanted(&named, host), BTreeMap::from([((8, 0), false)]));
    }

    #[test]
    fn numbers_become_the_guests() {
        let mut spec = spec(
            json!([
                block("/dev/a", 7, 0),
                block("/dev/sda", 8, 0),
                {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
            ]),
            json!([
                {"allow": false, "access": "rwm"},
                rule(true, 7, 0, "rwm"),
                rule(true, 8, 0, "rwm"),
                rule(true, 8, -1, "rwm"),
                rule(false, 8, 1, "rwm"),
                rule(true, -1, -1, "m"),
                {"allow": true, "type": "c", "major": 8, "minor": 0, "access": "r"},
            ]),
        );
        rewrite(&mut spec, &BTreeMap::from([((7, 0), (254, 16))]));
        let linux = serde_json::to_value(spec.linux()).unwrap();
        let numbers = |list: &Value| -> Vec<(Value, Value)> {
            let items = list.as_array().unwrap().iter();
            items
                .map(|item| (item["major"].clone(), item["minor"].clone()))
                .collect()
        };
        let pair = |major: i64, minor: i64| (json!(major), json!(minor));
        assert_eq!(numbers(&linux["devices"]), [pair(254, 16), pair(1, 3)]);
        assert_eq!(linux["devices"][0]["fileMode"], 0o660);
        assert_eq!(
            numbers(&linux["resources"]["devices"]),
            [
                (Value::Null, Value::Null),
                pair(254, 16),
                pair(8, 1),
                pair(-1, -1),
                pair(8, 0)
            ]
        );
    }

    #[test]
    fn character_devices_are_the_guests_or_refused() {
        let node = |path: &str, major: i64, minor: i64| json!({"path": path, "type": "c", "major": major, "minor": minor});
        let allow = |major: i64, minor: i64| json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rw"});
        let deny = json!({"allow": false, "access": "rwm"});
        let all = json!({"allow": true, "access": "rwm"});
        let made = |devices: Value, rules: Value| {
            let mut spec = spec(devices, rules);
            refuse_characters(&mut spec, "c1")?;
            let left = spec.linux().as_ref().unwrap().devices().clone().unwrap();
            let paths = left.iter().map(|device| device.path().display().to_string());
            Ok::<Vec<String>, String>(paths.collect())
        };
        // Under any name.
        let common = json!([
            node("/dev/other", 1, 5),
            node("/dev/net/tun", 10, 200),
            block("/dev/a", 7, 0)
        ]);
        let kept = ["/dev/other", "/dev/net/tun", "/dev/a"];
        assert_eq!(made(common, json!([deny, allow(1, 5)])).unwrap(), kept);
        // Of a device plugin, or of whoever gave no rule; of a privileged container, too.
        let gpu = || json!([node("/dev/gpu0", 195, 0)]);
        for rules in [
            json!([deny, allow(195, 0)]),
            json!([allow(195, -1)]),
            json!([deny]),
            json!([all, allow(195, 0)]),
        ] {
            let error = made(gpu(), rules).unwrap_err();
            assert!(error.contains("195:0 (/dev/gpu0)"), "{error}");
        }
        // All that the host has.
        let host = json!([
            node("/dev/gpu0", 195, 0),
            node("/dev/null", 1, 3),
            node("/dev/kmsg", 1, 11)
        ]);
        assert_eq!(made(host, json!([all])).unwrap(), ["/dev/null", "/dev/kmsg"]);
        let log = json!([node("/dev/kmsg", 1, 11)]);
        assert!(made(log, json!([deny, allow(1, 11)])).is_err());
    }

    #[test]
    fn limits_of_devices_follow_them_or_go() {
        let list =
            |rate: &str| json!([{"major": 8, "minor": 0, rate: 100}, {"major": 7, "minor": 0, rate: 200}]);
        let keys = [
            ("weightDevice", "weight"),
            ("throttleReadBpsDevice", "rate"),
            ("throttleWriteBpsDevice", "rate"),
            ("throttleReadIOPSDevice", "rate"),
            ("throttleWriteIOPSDevice", "rate"),
        ];
        let mut limits = json!({"weight": 500});
        for (key, rate) in keys {
            limits[key] = list(rate);
        }
        let mut resources: LinuxResources = serde_json::from_value(json!({"blockIO": limits})).unwrap();
        rewrite_resources(&mut resources, &BTreeMap::from([((7, 0), (254, 16))]));
        let written = serde_json::to_value(&resources).unwrap();
        for (key, rate) in keys {
            let expected = json!([{"major": 254, "minor": 16, rate: 200}]);
            assert_eq!(written["blockIO"][key], expected, "{key}");
        }
        assert_eq!(written["blockIO"]["weight"], 500);
    }
}
