// SPDX-License-Identifier: Apache-2.0
//! `density.*`: what many idle clones in one process cost, each of them and the process as a whole.
//!
//! Every VM of a process hears of every change of its page tables (KVM's MMU notifier). So one change costs more the more VMs there
//! are in one address space; how much more says how many a process should host.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cloister_vmm::{Boot, CellHost, CellHostConfig, HugePages};

use crate::Context;
use crate::boot::end;
use crate::clone::{MEMORY_MIB, Pod, float, kib_of, page_tables, pod, rollup, template};
use crate::ours::chain;
use crate::report::{Figure, median};

/// Clones in the process when it is looked at.
const COUNTS: [u32; 4] = [1, 10, 100, 200];
/// Time for the last clones to come to rest, and for an ended one to be gone.
const SETTLE: Duration = Duration::from_secs(5);
/// Larger than what the C library keeps for later: such an allocation is a mapping of its own.
const MAPPING: usize = 64 << 20;
const CHANGES: u32 = 200;
/// What the kernel keeps of its own, as /proc/meminfo tells it: the field, the figure, what that is.
const KERNEL: [(&str, &str, &str); 6] = [
    (
        "SUnreclaim",
        "slab_kib",
        "objects of the kernel and KVM that cannot be reclaimed",
    ),
    ("PageTables", "page_tables_kib", "page tables of processes"),
    ("SecPageTables", "npt_kib", "page tables of KVM"),
    ("KernelStack", "stacks_kib", "stacks of threads"),
    ("Percpu", "percpu_kib", "variables of each processor"),
    (
        "VmallocUsed",
        "vmalloc_kib",
        "what the kernel maps by itself, stacks of threads too",
    ),
];
/// What the host is to have left, whatever the clones do.
const SPARE_KIB: u64 = 512 << 10;

fn meminfo(field: &str) -> io::Result<u64> {
    kib_of("/proc/meminfo", field)
}

/// Each of [`KERNEL`]; a kernel that does not tell one keeps it at 0.
fn kernel() -> [u64; KERNEL.len()] {
    KERNEL.map(|(field, ..)| meminfo(field).unwrap_or(0))
}

/// Microseconds that a mapping, one page of it touched, and its end take.
fn change() -> f64 {
    let times: Vec<f64> = (0..CHANGES)
        .map(|_| {
            let begin = Instant::now();
            let mut mapping = Vec::<u8>::with_capacity(MAPPING);
            mapping.push(1);
            drop(std::hint::black_box(mapping));
            begin.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    median(&times)
}

/// Measures.
pub fn run(context: &mut Context) -> io::Result<()> {
    let host = CellHost::new(CellHostConfig::default()).map_err(chain)?;
    let image = template(context, &host, HugePages::No)?;
    let clone = |number: u32| -> io::Result<Pod> {
        let boot = Boot::Clone {
            image: Arc::clone(&image),
        };
        let pod = pod(&host, format!("many-{number:03}"), boot, HugePages::No)?;
        drop(pod.ask()?);
        Ok(pod)
    };
    // What is made once is made before the first that counts.
    end(&clone(999)?.cell);
    // The kernel takes its time with what is freed.
    std::thread::sleep(SETTLE);
    let (private, tables, available) = (rollup("Private_Dirty")?, page_tables()?, meminfo("MemAvailable")?);
    let kernel_alone = kernel();
    let mut add = |name: String, value: f64, unit, goal, conditions: String| {
        context
            .report
            .add(Figure::ours(name, value, unit, goal, conditions))
    };
    let alone = change();
    let events =
        "a mapping of 64 MiB, one page of it touched, and its end, in the process that hosts the VMs; median";
    add(
        "density.page_table_event_us.0".into(),
        alone,
        "us",
        "",
        format!("no VM; {events}"),
    )?;

    let mut pods: Vec<Pod> = Vec::new();
    for count in COUNTS {
        let before = u32::try_from(pods.len()).unwrap_or(u32::MAX);
        let begin = Instant::now();
        for number in before..count {
            if meminfo("MemAvailable")? < SPARE_KIB {
                break;
            }
            pods.push(clone(number)?);
        }
        let rate = f64::from(count - before) / begin.elapsed().as_secs_f64();
        if u32::try_from(pods.len()).unwrap_or(0) < count {
            println!("    no memory for more than {} clones", pods.len());
            break;
        }
        std::thread::sleep(SETTLE);
        let own: Vec<f64> = pods
            .iter()
            .map(|pod| float(pod.cell.resident_ram().unwrap_or(0) >> 10))
            .collect();
        let dirtied = own.iter().sum::<f64>() / f64::from(count);
        let process =
            rollup("Private_Dirty")?.saturating_sub(private) + page_tables()?.saturating_sub(tables);
        let all = available.saturating_sub(meminfo("MemAvailable")?);
        let how = format!("{count} idle clones of {MEMORY_MIB} MiB in one process, ordinary pages");
        for (what, value, unit, goal, more) in [
            (
                "dirtied_kib",
                dirtied,
                "KiB",
                "<= 4096",
                "pages of RAM that are a clone's own, mean",
            ),
            (
                "beyond_kib",
                float(process) / f64::from(count) - dirtied,
                "KiB",
                "<= 300",
                "private memory and page tables of the process per clone, beyond those pages",
            ),
            (
                "host_beyond_kib",
                float(all) / f64::from(count) - dirtied,
                "KiB",
                "<= 300",
                "the host's available memory that is gone per clone, beyond those pages: what KVM and the kernel keep, too",
            ),
            ("page_table_event_us", change(), "us", "", events),
            (
                "starts_per_second",
                rate,
                "clones/s",
                "",
                "one after the other, each to its agent's first answer, since the figure before",
            ),
        ] {
            add(
                format!("density.{what}.{count}"),
                value,
                unit,
                goal,
                format!("{how}; {more}"),
            )?;
        }
        for (((_, what, of), now), alone) in KERNEL.iter().zip(kernel()).zip(kernel_alone) {
            add(
                format!("density.host_{what}.{count}"),
                float(now.saturating_sub(alone)) / f64::from(count),
                "KiB",
                "",
                format!("{how}; per clone, /proc/meminfo: {of}"),
            )?;
        }
    }
    let count = f64::from(u32::try_from(pods.len()).unwrap_or(u32::MAX));
    let begin = Instant::now();
    for pod in &pods {
        pod.cell.stop();
    }
    for pod in &pods {
        end(&pod.cell);
    }
    add(
        "density.end_ms".into(),
        begin.elapsed().as_secs_f64() * 1e3 / count,
        "ms",
        "",
        format!("{count} clones stopped at once, until the last is gone; per clone"),
    )
}
