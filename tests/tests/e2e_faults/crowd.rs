// SPDX-License-Identifier: Apache-2.0
//! Many pods at once, one after the other, and given up halfway.

use super::Bed;
use cloister_tests::cri::{Outcome, Pod, Runtime, api, args, ensure, eventually, script, security};
use futures_util::future::join_all;
use std::cell::Cell;
use std::time::Duration;

/// Twenty pods are started at once, and removed at once.
pub fn twenty_at_once(bed: &mut Bed) -> Outcome {
    let runtime = &bed.runtime;
    bed.node.block_on(async {
        let started = join_all((0..20).map(async |number| -> Outcome<Pod> {
            let config = Pod::config(runtime);
            let pod = Pod::run(runtime, config).await?;
            let said = pod.output(script(&format!("echo {number}"))).await?.good()?;
            ensure(said == format!("{number}\n"), &said)?;
            pod.start(args(&["sleep", "infinity"])).await?;
            Ok(pod)
        }))
        .await;
        let pods = started.into_iter().collect::<Outcome<Vec<Pod>>>()?;
        let removed = join_all(pods.iter().map(Pod::remove)).await;
        removed.into_iter().collect()
    })
}

/// A caller that hangs up while its pod is being made: nothing stays, and the name is free.
pub fn callers_give_up(bed: &mut Bed) -> Outcome {
    let runtime = &bed.runtime;
    bed.node.block_on(async {
        for milliseconds in [1, 100, 500, 1000, 2000] {
            let config = Pod::config(runtime);
            let run = Pod::run(runtime, config.clone());
            let early = tokio::time::timeout(Duration::from_millis(milliseconds), run).await;
            let pod = match early {
                Ok(pod) => pod?,
                // kubelet tries until the name is free.
                Err(_) => {
                    eventually("the name's release", async || {
                        Ok(Pod::run(runtime, config.clone()).await.ok())
                    })
                    .await?
                }
            };
            pod.output(script("true")).await?.good()?;
            pod.remove().await?;
        }
        Ok(())
    })
}

/// Pseudo-random numbers (xorshift64*), repeatable by their seed.
struct Dice(Cell<u64>);

impl Dice {
    /// 0 to `sides` - 1.
    fn roll(&self, sides: u64) -> u64 {
        let mut x = self.0.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.0.set(x);
        (x.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides
    }
}

/// One pod from its start to its end, of whatever kind.
async fn life(runtime: &Runtime, dice: &Dice) -> Outcome {
    let mut config = Pod::config(runtime);
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    if dice.roll(8) == 0 {
        let run = Pod::run(runtime, config.clone());
        let early = tokio::time::timeout(Duration::from_millis(dice.roll(3000)), run).await;
        return match early {
            Ok(pod) => pod?.remove().await,
            Err(_) => {
                let again = eventually("the name's release", async || {
                    Ok(Pod::run(runtime, config.clone()).await.ok())
                })
                .await?;
                again.remove().await
            }
        };
    }
    let pod = Pod::run(runtime, config).await?;
    for _ in 0..dice.roll(3) {
        let container = pod.start(args(&["sleep", "infinity"])).await?;
        if dice.roll(2) == 0 {
            let said = container.exec(&["echo", "in passing"]).await?;
            ensure(said.stdout == "in passing\n", format_args!("{said:?}"))?;
        }
        match dice.roll(3) {
            0 => container.stop(0).await?,
            1 => {
                container.stop(0).await?;
                container.remove().await?;
            }
            _ => {}
        }
    }
    match dice.roll(4) {
        0 => {
            let mut config = script("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger");
            security(&mut config).privileged = true;
            pod.start(config).await?.ended().await?;
        }
        1 => pod.output(script("exit 0")).await?.good().map(drop)?,
        2 => {
            // Removed without having been stopped.
            let request = api::RemovePodSandboxRequest {
                pod_sandbox_id: pod.id.clone(),
            };
            runtime.cri().remove_pod_sandbox(request).await?;
        }
        _ => {}
    }
    pod.remove().await
}

/// Resident memory of a process in KiB.
fn resident_kib(pid: u32) -> Outcome<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.ok_or("no VmRSS")?.parse()?)
}

/// A setting of a soak.
fn setting(name: &str, usual: u64) -> Outcome<u64> {
    Ok(match std::env::var(name) {
        Ok(number) => number.parse()?,
        Err(_) => usual,
    })
}

/// Pods of all kinds, some at a time.
pub fn soak(bed: &mut Bed) -> Outcome {
    let count = setting("CLOISTER_SOAK", 6)?;
    let at_once = setting("CLOISTER_SOAK_AT_ONCE", 3)?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let seed = setting("CLOISTER_SOAK_SEED", now.as_secs() | 1)?;
    eprintln!("soak: {count} pods, {at_once} at a time, CLOISTER_SOAK_SEED={seed}");
    let pid = bed.node.pid("cloisterd");
    let dice = Dice(Cell::new(seed));
    let runtimes: Vec<&Runtime> = bed.runtimes().collect();
    let (done, early) = (Cell::new(0), Cell::new(None));
    bed.node.block_on(async {
        let lanes = join_all((0..at_once).map(async |_| -> Outcome {
            while done.get() < count {
                done.set(done.get() + 1);
                let which = usize::try_from(dice.roll(runtimes.len() as u64))?;
                life(runtimes[which], &dice).await?;
                if done.get() >= count / 4 && early.get().is_none() {
                    early.set(Some(resident_kib(pid)?));
                }
                if done.get().is_multiple_of(10) {
                    eprintln!("soak: {} pods, {} KiB resident", done.get(), resident_kib(pid)?);
                }
            }
            Ok(())
        }));
        lanes.await.into_iter().collect::<Outcome>()
    })?;
    let (early, late) = (early.get().unwrap_or_default(), resident_kib(pid)?);
    eprintln!("soak: {early} KiB resident after a quarter of the pods, {late} KiB at the end");
    // What a pod leaves would show as kilobytes each; an allocator's habits as a few megabytes in all.
    ensure(
        late < early + 8192 + count * 4,
        format_args!("cloisterd grew from {early} to {late} KiB"),
    )
}
