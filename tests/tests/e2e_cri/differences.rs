// SPDX-License-Identifier: Apache-2.0
//! Where Cloister may differ from runc, and why.

use serde_json::Value;
use std::collections::BTreeMap;

/// One thing that is seen differently.
struct Difference {
    case: &'static str,
    /// JSON pointer into what was seen.
    place: &'static str,
    runc: &'static str,
    cloister: &'static str,
    reason: &'static str,
}

const DIFFERENCES: &[Difference] = &[
    Difference {
        case: "cri::streams::port_forward",
        place: "/closed/1",
        runc: "\"true\"",
        cloister: "\"false\"",
        reason: "the connection is taken for the VM before the VM refuses it: it is reset, not refused",
    },
    Difference {
        case: "cri::pods::sysctls",
        place: "/of the node",
        runc: "\"refused\"",
        cloister: "\"taken\"",
        reason: "the kernel is the pod's own, and so are all its sysctls",
    },
    Difference {
        case: "cri::containers::surroundings",
        place: "/mounts/.etc.hostname",
        runc: "\"tmpfs mode=755 rw\"",
        cloister: "\"tmpfs mode=755 nodev nosuid rw\"",
        reason: "they lie on the VM's /run",
    },
    Difference {
        case: "cri::containers::surroundings",
        place: "/mounts/.etc.hosts",
        runc: "\"tmpfs mode=755 rw\"",
        cloister: "\"tmpfs mode=755 nodev nosuid rw\"",
        reason: "they lie on the VM's /run",
    },
    Difference {
        case: "cri::containers::surroundings",
        place: "/mounts/.etc.resolv.conf",
        runc: "\"tmpfs mode=755 rw\"",
        cloister: "\"tmpfs mode=755 nodev nosuid rw\"",
        reason: "they lie on the VM's /run",
    },
    Difference {
        case: "cri::containers::surroundings",
        place: "/mounts/.proc.acpi",
        runc: "\"tmpfs ro\"",
        cloister: "nothing",
        reason: "the guest has no ACPI to hide",
    },
    Difference {
        case: "cri::containers::surroundings",
        place: "/mounts/.proc.kcore",
        runc: "\"tmpfs mode=755 nosuid rw size=65536k\"",
        cloister: "nothing",
        reason: "the guest has no /proc/kcore to hide",
    },
    Difference {
        case: "cri::containers::surroundings",
        place: "/process/.dev.core",
        runc: "\"/proc/kcore\"",
        cloister: "nothing",
        reason: "nor to point at",
    },
    Difference {
        case: "cri::containers::surroundings",
        place: "/process/SigIgn:",
        runc: "\"80001000\"",
        cloister: "\"00001000\"",
        reason: "runc leaves signal 32, which its language uses, ignored",
    },
    Difference {
        case: "cri::mounts::nested",
        place: "/output/stdout",
        runc: "\"in memory\\ninner\\ninner\\n     1024\\nread-only\\nnot recursive\\nread-only\\nNo space left on device\\n\"",
        cloister: "\"in memory\\ninner\\ninner\\n     1024\\nread-only\\nread-only\\nNo space left on device\\n\"",
        reason: "a read-only volume is read-only with all that is mounted in it: the host enforces it",
    },
    Difference {
        case: "cri::mounts::nested",
        place: "/recursive",
        runc: "\"recursive\\n\"",
        cloister: "\"not offered\"",
        reason: "containerd 2.1 asks only runc for it, and crashes where it did not ask",
    },
    Difference {
        case: "cri::namespaces::shared_processes",
        place: "/second/stdout",
        runc: "\"1\\n2\\nsent\\ncatatonit\\n\"",
        cloister: "\"1\\n2\\nsent\\npause\\n\"",
        reason: "the first process is the agent's, not the pause image's",
    },
    Difference {
        case: "cri::namespaces::of_the_node",
        place: "/ipc",
        runc: "true",
        cloister: "\"refused\"",
        reason: "a VM has no part in the node's namespaces",
    },
    Difference {
        case: "cri::namespaces::of_the_node",
        place: "/network",
        runc: "true",
        cloister: "\"refused\"",
        reason: "a VM has no part in the node's namespaces",
    },
    Difference {
        case: "cri::namespaces::of_the_node",
        place: "/processes",
        runc: "true",
        cloister: "\"refused\"",
        reason: "a VM has no part in the node's namespaces",
    },
    Difference {
        case: "cri::resources::given",
        place: "/none/1",
        runc: "\"memory.swap.max max\"",
        cloister: "\"memory.swap.max \"",
        reason: "the guest has no swap",
    },
    Difference {
        case: "cri::resources::given",
        place: "/set/1",
        runc: "\"memory.swap.max max\"",
        cloister: "\"memory.swap.max \"",
        reason: "the guest has no swap",
    },
    Difference {
        case: "cri::resources::given",
        place: "/set/3",
        runc: "\"cpu.weight 20\"",
        cloister: "\"cpu.weight 59\"",
        reason: "runc 1.1 converts shares by the older formula",
    },
    Difference {
        case: "cri::resources::changed",
        place: "/seen/0",
        runc: "\"memory.max 67108864\\nmemory.swap.max max\\ncpu.max 50000 100000\\ncpu.weight 20\\ncpuset.cpus \\n\"",
        cloister: "\"memory.max 67108864\\nmemory.swap.max \\ncpu.max 50000 100000\\ncpu.weight 59\\ncpuset.cpus \\n\"",
        reason: "swap and weight as in resources::given",
    },
    Difference {
        case: "cri::resources::changed",
        place: "/seen/1",
        runc: "\"memory.max 100663296\\nmemory.swap.max max\\ncpu.max 75000 100000\\ncpu.weight 39\\ncpuset.cpus \\n\"",
        cloister: "\"memory.max 100663296\\nmemory.swap.max \\ncpu.max 75000 100000\\ncpu.weight 39\\ncpuset.cpus \\n\"",
        reason: "swap and weight as in resources::given",
    },
    Difference {
        case: "cri::resources::changed",
        place: "/seen/2",
        runc: "\"memory.max 50331648\\nmemory.swap.max max\\ncpu.max 20000 100000\\ncpu.weight 1\\ncpuset.cpus \\n\"",
        cloister: "\"memory.max 50331648\\nmemory.swap.max \\ncpu.max 20000 100000\\ncpu.weight 1\\ncpuset.cpus \\n\"",
        reason: "swap and weight as in resources::given",
    },
    Difference {
        case: "cri::stats::of_a_pod",
        place: "/cpu/1",
        runc: "true",
        cloister: "false",
        reason: "containerd reads the pod's cgroup on the node, in which the VM is not (docs/restarts.md)",
    },
    Difference {
        case: "cri::stats::of_a_pod",
        place: "/memory/0",
        runc: "true",
        cloister: "false",
        reason: "containerd reads the pod's cgroup on the node, in which the VM is not (docs/restarts.md)",
    },
    Difference {
        case: "cri::stats::of_a_pod",
        place: "/memory/1",
        runc: "true",
        cloister: "false",
        reason: "containerd reads the pod's cgroup on the node, in which the VM is not (docs/restarts.md)",
    },
    Difference {
        case: "cri::mounts::propagation",
        place: "/both-ways",
        runc: "nothing",
        cloister: "\"not started\"",
        reason: "what a guest mounts is in the guest: Bidirectional propagation is not possible",
    },
    Difference {
        case: "cri::mounts::propagation",
        place: "/both-ways/0/code",
        runc: "0",
        cloister: "nothing",
        reason: "what a guest mounts is in the guest: Bidirectional propagation is not possible",
    },
    Difference {
        case: "cri::mounts::propagation",
        place: "/both-ways/0/stderr",
        runc: "\"\"",
        cloister: "nothing",
        reason: "what a guest mounts is in the guest: Bidirectional propagation is not possible",
    },
    Difference {
        case: "cri::mounts::propagation",
        place: "/both-ways/0/stdout",
        runc: "\"file\\n\"",
        cloister: "nothing",
        reason: "what a guest mounts is in the guest: Bidirectional propagation is not possible",
    },
    Difference {
        case: "cri::mounts::propagation",
        place: "/both-ways/1",
        runc: "true",
        cloister: "nothing",
        reason: "what a guest mounts is in the guest: Bidirectional propagation is not possible",
    },
    Difference {
        case: "cri::mounts::propagation",
        place: "/both-ways/2/code",
        runc: "0",
        cloister: "nothing",
        reason: "what a guest mounts is in the guest: Bidirectional propagation is not possible",
    },
    Difference {
        case: "cri::mounts::propagation",
        place: "/both-ways/2/stderr",
        runc: "\"\"",
        cloister: "nothing",
        reason: "what a guest mounts is in the guest: Bidirectional propagation is not possible",
    },
    Difference {
        case: "cri::mounts::propagation",
        place: "/both-ways/2/stdout",
        runc: "\"\"",
        cloister: "nothing",
        reason: "what a guest mounts is in the guest: Bidirectional propagation is not possible",
    },
];

/// Says what differs without a reason, and which reason is not needed any more.
pub fn check(case: &str, runc: &Value, cloister: &Value) -> Result<(), String> {
    let (runc, cloister) = (leaves(runc), leaves(cloister));
    let mut complaints = Vec::new();
    let places: std::collections::BTreeSet<&String> = runc.keys().chain(cloister.keys()).collect();
    for place in places {
        let nothing = "nothing".to_owned();
        let seen = [&runc, &cloister].map(|leaves| leaves.get(place).unwrap_or(&nothing));
        let expected = DIFFERENCES
            .iter()
            .find(|difference| difference.case == case && difference.place == place);
        match expected {
            None if seen[0] != seen[1] => {
                complaints.push(format!("{place}: runc {}, cloister {}", seen[0], seen[1]));
            }
            Some(listed) if [listed.runc, listed.cloister] != seen.map(String::as_str) => {
                complaints.push(format!(
                    "{place}: runc {}, cloister {}, but listed as {} and {}: {}",
                    seen[0], seen[1], listed.runc, listed.cloister, listed.reason
                ));
            }
            _ => {}
        }
    }
    if complaints.is_empty() {
        return Ok(());
    }
    Err(complaints.join("\n"))
}

/// Each value that has no parts, by its JSON pointer.
fn leaves(value: &Value) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut rest = vec![(String::new(), value)];
    while let Some((place, value)) = rest.pop() {
        match value {
            Value::Object(fields) if !fields.is_empty() => {
                rest.extend(
                    fields
                        .iter()
                        .map(|(name, value)| (format!("{place}/{name}"), value)),
                );
            }
            Value::Array(items) if !items.is_empty() => {
                rest.extend(
                    items
                        .iter()
                        .enumerate()
                        .map(|(number, value)| (format!("{place}/{number}"), value)),
                );
            }
            _ => {
                found.insert(place, value.to_string());
            }
        }
    }
    found
}
