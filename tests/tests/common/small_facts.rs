// SPDX-License-Identifier: Apache-2.0
//! What a snapshot says of a small pod: for the readers' tests, and for the seeds of their fuzz target.

use cloister_sandbox_api::pod::snapshot::Facts;
use cloister_sandbox_api::pod::state::{Network, Plan, Record};

/// Something in each of its parts.
pub fn facts() -> Facts {
    let plan = Plan {
        wishes: Default::default(),
        cpus: 1,
        memory: 4 << 20,
        dax: Some(1 << 30),
        network: Network::None,
        publish: Vec::new(),
        hostname: "small".into(),
        kernel: "/kernel".into(),
        initrd: "/initrd".into(),
        kernel_args: vec!["quiet".into()],
        init_timeout_ms: 1000,
        auto_remove: false,
        interactive: true,
        stop_signal: 15,
        rootfs: Some("/folder".into()),
        labels: Default::default(),
    };
    Facts {
        record: Record::of("ab".repeat(32), plan, None),
        pid: 7,
        streams: Default::default(),
        paused: false,
        card: None,
    }
}
