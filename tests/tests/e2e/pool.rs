// SPDX-License-Identifier: Apache-2.0
//! Pods that are clones, or take cells made ahead: each with the network that CNI gave it, and nothing left of any of them. And one
//! that gives back what it does not use.

use cloister_tests::cri::{End, Failure, Node, Outcome, Pod, Runtime, api, ensure, script};
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// Longest time until the first pod finds a cell, in an emulated host.
const PATIENCE: Duration = Duration::from_secs(200);

/// How many pods there were of a kind.
fn counted(node: &Node, kind: &str) -> u64 {
    let text = node.metrics().unwrap();
    let line = format!("cloister_pods_{kind}_total ");
    let count = text.lines().find_map(|found| found.strip_prefix(&line));
    count.unwrap().parse().unwrap()
}

/// What a pod says of itself: it must be as CNI and the kubelet wanted it.
async fn look(pod: &Pod) -> Outcome<String> {
    let address = pod.address().await?;
    let text = "ip addr show eth0; cat /sys/class/net/eth0/mtu; ip route; cat /proc/sys/kernel/random/uuid; \
                socat -u TCP:10.214.0.1:9,connect-timeout=60 STDOUT 2>&1 | grep -q refused && echo reached; exec sleep infinity";
    let container = pod.start(script(text)).await?;
    container.says("reached").await?;
    let said = container.log()?.stdout;
    ensure(
        said.contains(&format!("inet {address}/16 ")),
        format_args!("{address}: {said}"),
    )?;
    ensure(said.contains("\n1400\n"), &said)?;
    ensure(said.contains("default via 10.214.0.1 dev eth0"), &said)?;
    // A template's cards have this one.
    ensure(!said.contains("ether 02:c0:00:00:00"), &said)?;
    Ok(said)
}

/// A pod, and what it says of itself.
fn run(node: &Node, runtime: &Runtime) -> (Pod, String) {
    let ran = node.block_on(async {
        let pod = Pod::run(runtime, Pod::config(runtime)).await?;
        let said = look(&pod).await?;
        Ok::<_, Failure>((pod, said))
    });
    ran.unwrap_or_else(|error| panic!("{error}\n{}", node.said()))
}

/// Runs pods one after the other until one was of that kind.
fn run_until_one_is(node: &Node, runtime: &Runtime, kind: &str) {
    let begin = Instant::now();
    while counted(node, kind) == 0 {
        assert!(begin.elapsed() < PATIENCE, "{}", node.said());
        let (pod, _) = run(node, runtime);
        std::thread::sleep(Duration::from_secs(3));
        node.block_on(pod.remove()).unwrap();
    }
}

fn line_of(said: &str, word: &str) -> String {
    let line = said.lines().find(|line| line.contains(word));
    line.unwrap_or_else(|| panic!("{word} is not in {said}"))
        .trim()
        .to_owned()
}

fn uuid(said: &str) -> String {
    let is_uuid = |line: &&str| line.len() == 36 && line.matches('-').count() == 4;
    said.lines().find(is_uuid).unwrap().to_owned()
}

#[test]
fn pods_take_cells_made_ahead_or_grow_from_a_template() {
    let mut node = Node::start(&["cloister-pool"]);
    let runtime = node.runtime("cloister-pool");
    // The first boots, the next ones are clones, until there are cells.
    run_until_one_is(&node, &runtime, "pooled");
    // They come back: all at once there are never more than the two.
    let (mut macs, mut uuids, mut pods) = (HashSet::new(), HashSet::new(), Vec::new());
    let begin = Instant::now();
    while counted(&node, "pooled") < 3 {
        assert!(begin.elapsed() < PATIENCE, "{}", node.said());
        let (pod, said) = run(&node, &runtime);
        assert!(macs.insert(line_of(&said, "link/ether")), "{said}");
        assert!(uuids.insert(uuid(&said)), "{said}");
        pods.push(pod);
        std::thread::sleep(Duration::from_secs(3));
    }
    for pod in pods {
        node.block_on(pod.remove()).unwrap();
    }
    a_larger_pod_grows(&node, &runtime);
    // The cells that nobody took end with the daemon.
    assert!(node.end("cloisterd", End::Asked).success());
}

/// A pod of a size that no pod before it had: a clone of a smaller template, which grows before its containers come.
fn a_larger_pod_grows(node: &Node, runtime: &Runtime) {
    let cloned = counted(node, "cloned");
    let grown = node.block_on(async {
        let mut config = Pod::config(runtime);
        config.linux.get_or_insert_default().resources = Some(api::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 200_000,
            memory_limit_in_bytes: 512 << 20,
            ..Default::default()
        });
        let pod = Pod::run(runtime, config).await?;
        look(&pod).await?;
        let text = "nproc; awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo; \
                    head -c 300M /dev/zero | tail -c 300M | wc -c; echo end; exec sleep infinity";
        let container = pod.start(script(text)).await?;
        container.says("end").await?;
        let said = container.log()?.stdout;
        let figures: Vec<u64> = said.lines().map_while(|line| line.parse().ok()).collect();
        // Of the 512 MiB and the overhead the kernel keeps some; the template has 256 MiB.
        let fits = matches!(figures[..], [2, 500..=600, bytes] if bytes == 300 << 20);
        ensure(fits, &said)?;
        pod.remove().await
    });
    grown.unwrap_or_else(|error| panic!("{error}\n{}", node.said()));
    assert_eq!(counted(node, "cloned"), cloned + 1, "{}", node.said());
}

/// The daemon builds what a worker asked for, and each worker clones it.
#[test]
fn pods_in_workers_of_their_own_are_clones_of_the_daemons_template() {
    let mut node = Node::start(&["cloister-worker-clone"]);
    let runtime = node.runtime("cloister-worker-clone");
    run_until_one_is(&node, &runtime, "cloned");
    // At once, in two processes.
    let (mut macs, mut uuids, mut pods) = (HashSet::new(), HashSet::new(), Vec::new());
    for _ in 0..2 {
        let (pod, said) = run(&node, &runtime);
        assert!(macs.insert(line_of(&said, "link/ether")), "{said}");
        assert!(uuids.insert(uuid(&said)), "{said}");
        pods.push(pod);
    }
    assert!(counted(&node, "cloned") >= 3, "{}", node.metrics().unwrap());
    for pod in pods {
        node.block_on(pod.remove()).unwrap();
    }
    // Of the template on the shelf.
    a_larger_pod_grows(&node, &runtime);
    assert!(node.end("cloisterd", End::Asked).success());
}

/// Bytes of the host's that the node's only VM has as its RAM.
fn resident(node: &Node) -> u64 {
    let text = node.metrics().unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("cloister_guest_memory_bytes "));
    let value = line.and_then(|line| line.rsplit(' ').next());
    value.unwrap_or_else(|| panic!("{text}")).parse().unwrap()
}

/// The guest's page cache goes when the pod rests, and the host has the memory again. What processes use stays.
#[test]
fn a_pod_that_rests_gives_back_what_it_caches() {
    const READ: u64 = 32 << 20;
    let mut node = Node::start(&["cloister-idle"]);
    let runtime = node.runtime("cloister-idle");
    let ran = node.block_on(async {
        let pod = Pod::run(&runtime, Pod::config(&runtime)).await?;
        // Read, and kept by the guest while the file is there. The shell's variable is memory of its own.
        let text = format!(
            "own=$(head -c 1M /dev/zero | tr '\\0' x); head -c {READ} /dev/zero > /file; cksum < /file > /sum; echo read; \
             until [ -e /again ]; do sleep 30; done; [ \"$(cksum < /file)\" = \"$(cat /sum)\" ] && echo ${{#own}} again; exec sleep infinity"
        );
        let container = pod.start(script(&text)).await?;
        container.says("read").await?;
        Ok::<_, Failure>((pod, container))
    });
    let (pod, container) = ran.unwrap_or_else(|error| panic!("{error}\n{}", node.said()));
    let before = resident(&node);
    assert!(before > READ, "{before} bytes");
    let begin = Instant::now();
    // What shares a block of 2 MiB with a page in use is not reported: three quarters have been seen to come back.
    while resident(&node) > before - READ / 2 {
        assert!(
            begin.elapsed() < PATIENCE,
            "{} of {before}: {}",
            resident(&node),
            node.said()
        );
        std::thread::sleep(Duration::from_secs(1));
    }
    eprintln!(
        "{} MiB of {} are back after {:.1?}",
        (before - resident(&node)) >> 20,
        before >> 20,
        begin.elapsed()
    );
    let end = node.block_on(async {
        container.exec_script("touch /again").await?;
        container.says("1048576 again").await?;
        pod.remove().await
    });
    end.unwrap_or_else(|error| panic!("{error}\n{}", node.said()));
    assert!(node.end("cloisterd", End::Asked).success());
}
