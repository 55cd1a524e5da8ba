// SPDX-License-Identifier: Apache-2.0
//! The host is short of something, or one of its parts fails.

use super::Bed;
use cloister_tests::cri::{Outcome, Pod, api, ensure, eventually, script};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

/// A pod that wants more memory than there can be is refused by name, and its name is free for one that does not.
pub fn no_such_memory(bed: &mut Bed) -> Outcome {
    bed.node.block_on(async {
        let mut config = Pod::config(&bed.runtime);
        let modest = config.clone();
        let resources = api::LinuxContainerResources {
            memory_limit_in_bytes: 1 << 50,
            ..Default::default()
        };
        config.linux.get_or_insert_default().resources = Some(resources);
        let refused = Pod::run(&bed.runtime, config).await;
        let text = refused.err().map_or_else(String::new, |error| error.to_string());
        ensure(text.contains("memory"), format_args!("{text:?}"))?;
        let pod = Pod::run(&bed.runtime, modest).await?;
        pod.output(script("true")).await?.good()?;
        pod.remove().await
    })
}

/// The second plugin of a chain fails: what the first one made is gone, and kubelet's next try succeeds.
pub fn cni_fails_midway(bed: &mut Bed) -> Outcome {
    let list = bed.node.dir().join("cni/10-cri-e2e.conflist");
    let good = fs::read_to_string(&list)?;
    // Among the plugins that containerd knows, for it has one folder of them.
    let failing = "/usr/lib/cni/cloister-e2e-fails";
    fs::write(
        failing,
        "#!/bin/sh\n[ \"$CNI_COMMAND\" != ADD ] || { echo '{\"cniVersion\":\"1.0.0\",\"code\":100,\"msg\":\"this plugin fails\"}'; exit 1; }\n",
    )?;
    fs::set_permissions(failing, fs::Permissions::from_mode(0o755))?;
    let bad = good.replace("\"portmap\"", "\"cloister-e2e-fails\"");
    ensure(bad != good, "there is no second plugin")?;
    fs::write(&list, bad)?;
    let outcome = bed.node.block_on(async {
        let config = Pod::config(&bed.runtime);
        // containerd reads the list when it sees that it has changed.
        let text = eventually("a network that fails", async || {
            match Pod::run(&bed.runtime, config.clone()).await {
                Err(error) => Ok(Some(error.to_string())),
                Ok(pod) => pod.remove().await.map(|()| None),
            }
        })
        .await?;
        ensure(text.contains("this plugin fails"), format_args!("{text:?}"))?;
        fs::write(&list, &good)?;
        let pod = eventually("a network that works", async || {
            Ok(Pod::run(&bed.runtime, config.clone()).await.ok())
        })
        .await?;
        pod.output(script("ip -o addr show dev eth0 | grep -q 10.214"))
            .await?
            .good()?;
        pod.remove().await
    });
    fs::write(&list, &good)?;
    fs::remove_file(failing)?;
    outcome
}

/// No space for what is kept of a pod.
pub fn disk_is_full(bed: &mut Bed) -> Outcome {
    let state = bed.node.dir().join("r/sandboxes");
    let mount = |arguments: &[&str]| -> Outcome {
        let status = Command::new("mount").args(arguments).arg(&state).status()?;
        ensure(status.success(), format_args!("mount {arguments:?}"))
    };
    // Smaller than a page: nothing can be made there.
    mount(&["-t", "tmpfs", "-o", "size=4k,nr_inodes=2,mode=700", "full"])?;
    let outcome: Outcome<api::PodSandboxConfig> = bed.node.block_on(async {
        let config = Pod::config(&bed.runtime);
        let refused = Pod::run(&bed.runtime, config.clone()).await;
        let text = refused.err().map_or_else(String::new, |error| error.to_string());
        ensure(text.contains("No space left on device"), format_args!("{text:?}"))?;
        ensure(
            fs::read_dir(&state)?.count() == 0,
            "something half-made is left on the full disk",
        )?;
        Ok(config)
    });
    let status = Command::new("umount").arg(&state).status()?;
    ensure(status.success(), "umount")?;
    let config = outcome?;
    bed.node.block_on(async {
        let pod = Pod::run(&bed.runtime, config).await?;
        pod.output(script("true")).await?.good()?;
        pod.remove().await
    })
}
