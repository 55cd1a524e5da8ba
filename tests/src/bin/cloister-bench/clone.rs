// SPDX-License-Identifier: Apache-2.0
//! `clone.*`: a pod's VM cloned from a template, against a cold boot of the same one: the same devices, to the agent's
//! first answer to a request of ours.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cloister_boot::x86_64::Description;
use cloister_devices::fs::FsConfig;
use cloister_devices::net::{NetBackend, NetConfig};
use cloister_devices::vsock::{Vsock, VsockConfig, VsockHandle, VsockListener};
use cloister_protocol::pod::{ConfigureRequest, DnsFiles, Interface, Route};
use cloister_protocol::protobuf::Message;
use cloister_protocol::ttrpc;
use cloister_vmm::config::BASE_COMMAND_LINE;
use cloister_vmm::image::{self, Image};
use cloister_vmm::{
    Boot, Cell, CellConfig, CellHost, CellHostConfig, DeviceConfig, HugePages, KernelBoot, Phase,
};

use crate::Context;
use crate::boot::{end, kvm_exits, thread_id, thread_seconds};
use crate::guest_mode::GuestMode;
use crate::ours::chain;
use crate::report::{Figure, median};

const AGENT_PORT: u32 = 1024;
const READY_PORT: u32 = 1025;
/// Of each VM.
pub const MEMORY_MIB: u64 = 256;
const ROUNDS: u32 = 10;
/// Clones at once, for what each of them costs.
const MANY: u32 = 20;
/// How long they are left alone.
const IDLE: Duration = Duration::from_secs(10);
/// And until what a start has left to be done is done.
const SETTLED: Duration = Duration::from_secs(60);
/// How long they are looked at then.
const REST: Duration = Duration::from_secs(60);

/// A VM as pods have it.
pub struct Pod {
    /// The VM.
    pub cell: Cell,
    vsock: VsockHandle,
    ready: VsockListener,
}

/// Makes one, and starts it.
pub fn pod(host: &CellHost, name: String, boot: Boot, huge_pages: HugePages) -> io::Result<Pod> {
    pod_with(host, name, boot, huge_pages, None)
}

/// The same, with a network card of this address, connected to nothing.
fn pod_with(
    host: &CellHost,
    name: String,
    boot: Boot,
    huge_pages: HugePages,
    card: Option<[u8; 6]>,
) -> io::Result<Pod> {
    let (device, vsock) = Vsock::new(VsockConfig::new(3)).map_err(io::Error::other)?;
    let mut config = CellConfig::new(name, boot);
    config.memory_mib = MEMORY_MIB;
    config.huge_pages = huge_pages;
    config.serial = None;
    let fs = FsConfig {
        tag: "cloister".to_owned(),
        ..FsConfig::default()
    };
    config.devices = vec![
        DeviceConfig::Fs {
            config: fs,
            dax_window: None,
            attached: Vec::new(),
        },
        DeviceConfig::Custom {
            name: "vsock".into(),
            device: Box::new(device),
        },
        DeviceConfig::Slot,
        DeviceConfig::Rng,
        DeviceConfig::Balloon { deflate_on_oom: true },
    ];
    config.devices.extend(card.map(|mac| {
        DeviceConfig::Net(NetConfig {
            backend: NetBackend::Unplugged { pairs: 1 },
            mac,
            mtu: None,
        })
    }));
    let cell = Cell::create(config, host).map_err(chain)?;
    let ready = vsock.listen(READY_PORT)?;
    cell.start().map_err(chain)?;
    Ok(Pod { cell, vsock, ready })
}

fn kernel(context: &Context) -> io::Result<Boot> {
    Ok(Boot::Kernel(KernelBoot {
        kernel: File::open(&context.kernel)?,
        initrd: Some(File::open(&context.initrd)?),
        command_line: BASE_COMMAND_LINE.to_owned(),
        description: Description::MpTable,
    }))
}

impl Pod {
    /// One request to the agent, and its answer: ttrpc by hand, so that nothing but the guest takes time.
    pub fn ask(&self) -> io::Result<UnixStream> {
        let mut connection = self.vsock.connect(AGENT_PORT)?;
        connection.set_read_timeout(Some(Duration::from_secs(60)))?;
        request(&mut connection, 1, "Ping", Vec::new())?;
        Ok(connection)
    }

    /// Waits for the ready message of a boot, and answers it as cloisterd does: an agent that is not answered dials again and
    /// again. To be kept.
    fn answered(&self) -> io::Result<UnixStream> {
        let (mut stream, _) = self.ready.accept()?;
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        let (header, _) = message(&mut stream)?;
        // A Response without fields is an empty one.
        let response = ttrpc::MessageHeader::new_response(header.stream_id, 0);
        stream.write_all(&Vec::from(response))?;
        Ok(stream)
    }

    /// The name of its vCPU's thread.
    fn vcpu(&self) -> String {
        let short: String = self.cell.name().chars().take(8).collect();
        format!("{short}:vcpu0")
    }
}

/// The next message of a connection.
fn message(connection: &mut UnixStream) -> io::Result<(ttrpc::MessageHeader, Vec<u8>)> {
    let mut header = [0; ttrpc::proto::MESSAGE_HEADER_LENGTH];
    connection.read_exact(&mut header)?;
    let header = ttrpc::MessageHeader::from(&header);
    let mut message = vec![0; usize::try_from(header.length).unwrap_or(0)];
    connection.read_exact(&mut message)?;
    Ok((header, message))
}

/// Carries out one request of a connection, the streams of which are numbered 1, 3, 5, ...
fn request(connection: &mut UnixStream, stream: u32, method: &str, payload: Vec<u8>) -> io::Result<()> {
    let request = ttrpc::Request {
        service: "cloister.agent.v1.Pod".into(),
        method: method.into(),
        payload,
        ..Default::default()
    };
    let mut frame = request.write_to_bytes()?;
    let header = ttrpc::MessageHeader::new_request(stream, u32::try_from(frame.len()).unwrap_or(0));
    frame.splice(..0, Vec::from(header));
    connection.write_all(&frame)?;
    let (_, answer) = message(connection)?;
    let status = ttrpc::Response::parse_from_bytes(&answer)?.status;
    if status.code() == ttrpc::Code::OK {
        return Ok(());
    }
    Err(io::Error::other(format!("{method}: {}", status.message)))
}

/// A template, as `cloisterd` makes them.
pub fn template(context: &Context, host: &CellHost, huge_pages: HugePages) -> io::Result<Arc<Image>> {
    template_with(context, host, huge_pages, None)
}

fn template_with(
    context: &Context,
    host: &CellHost,
    huge_pages: HugePages,
    card: Option<[u8; 6]>,
) -> io::Result<Arc<Image>> {
    let pod = pod_with(host, "template".to_owned(), kernel(context)?, huge_pages, card)?;
    let _events = pod.answered()?;
    pod.ask()?;
    pod.cell.discard_initrd()?;
    pod.cell.pause().map_err(chain)?;
    let file = image::memory_file()?;
    pod.cell.write_image(&file).map_err(chain)?;
    end(&pod.cell);
    image::seal(&file)?;
    Image::open(file).map_err(chain)
}

/// What one start cost.
struct Start {
    seconds: f64,
    /// CPU time of the vCPU's thread.
    vcpu: f64,
    /// The number of that thread.
    thread: u32,
    exits: u64,
    phases: Vec<Phase>,
    own_kib: u64,
}

/// Starts one to its first answer, and ends it.
fn start(host: &CellHost, name: String, boot: Boot, huge_pages: HugePages) -> io::Result<Start> {
    let boots = matches!(boot, Boot::Kernel(_));
    let begin = Instant::now();
    let pod = pod(host, name, boot, huge_pages)?;
    if boots {
        pod.answered()?;
    }
    let answer = pod.ask()?;
    let seconds = begin.elapsed().as_secs_f64();
    pod.cell.note_ready();
    let start = Start {
        seconds,
        vcpu: thread_seconds(&pod.vcpu())?,
        thread: thread_id(&pod.vcpu())?,
        exits: kvm_exits(&pod.cell)?,
        phases: pod.cell.phases().to_vec(),
        own_kib: pod.cell.resident_ram().unwrap_or(0) >> 10,
    };
    drop(answer);
    end(&pod.cell);
    Ok(start)
}

/// KiB of `field` of /proc/self/smaps_rollup.
pub fn rollup(field: &str) -> io::Result<u64> {
    kib_of("/proc/self/smaps_rollup", field)
}

/// KiB of `field` of a file such as /proc/meminfo; 0 if it is not there.
pub fn kib_of(file: &str, field: &str) -> io::Result<u64> {
    let text = fs::read_to_string(file)?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    Ok(line
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0))
}

/// For figures.
pub fn float(value: u64) -> f64 {
    f64::from(u32::try_from(value).unwrap_or(u32::MAX))
}

/// Reports a figure of ours: name, value, unit, goal.
fn add(
    context: &mut Context,
    (name, value, unit, goal): (&str, f64, &'static str, &'static str),
    conditions: String,
) -> io::Result<()> {
    context
        .report
        .add(Figure::ours(name, value, unit, goal, conditions))
}

/// Times, and what the host has to do.
pub fn run(context: &mut Context) -> io::Result<()> {
    let host = CellHost::new(CellHostConfig::default()).map_err(chain)?;
    let huge_pages = HugePages::Transparent;
    let image = template(context, &host, huge_pages)?;
    let (mut clones, mut boots) = (Vec::new(), Vec::new());
    // What is made once is made before the first that counts.
    start(
        &host,
        "warm-up0".into(),
        Boot::Clone {
            image: Arc::clone(&image),
        },
        huge_pages,
    )?;
    for round in 0..ROUNDS {
        let boot = Boot::Clone {
            image: Arc::clone(&image),
        };
        clones.push(start(&host, format!("clone-{round:02}"), boot, huge_pages)?);
        boots.push(start(
            &host,
            format!("boots-{round:02}"),
            kernel(context)?,
            huge_pages,
        )?);
    }
    let of = |starts: &[Start], what: fn(&Start) -> f64| median(&starts.iter().map(what).collect::<Vec<_>>());
    let how = format!(
        "1 vCPU, {MEMORY_MIB} MiB, transparent huge pages, the devices of a pod; from the call to the agent's first answer; \
         medians of {ROUNDS}, in turn; template of {} KiB",
        image.ram_bytes() >> 10
    );
    let mut add = |name: &str, value: f64, unit, goal, conditions: &str| {
        add(context, (name, value, unit, goal), conditions.to_owned())
    };
    let (clone, boot) = (of(&clones, |s| s.seconds), of(&boots, |s| s.seconds));
    add("clone.vs_cold_boot", clone / boot, "ratio", "<= 0.1", &how)?;
    add("clone.first_answer", clone * 1e3, "ms", "", &how)?;
    add("clone.first_answer_cold_boot", boot * 1e3, "ms", "", &how)?;
    add("clone.exits", of(&clones, |s| float(s.exits)), "exits", "", &how)?;
    add(
        "clone.exits_cold_boot",
        of(&boots, |s| float(s.exits)),
        "exits",
        "",
        &how,
    )?;
    add(
        "clone.own_kib_at_first_answer",
        of(&clones, |s| float(s.own_kib)),
        "KiB",
        "",
        &how,
    )?;

    // CPU time of Cell::create and start, part by part; KVM's own calls apart from the rest.
    let (mut ours, mut kvms) = (0.0, 0.0);
    for (at, phase) in clones[0].phases.iter().enumerate() {
        let times: Vec<f64> = clones
            .iter()
            .filter_map(|s| Some(s.phases.get(at)?.cpu.as_secs_f64() * 1e3))
            .collect();
        let time = median(&times);
        let whose = if phase.is_kvm { "KVM" } else { "ours" };
        println!("    {:<28} {time:>9.3} ms of CPU ({whose})", phase.name);
        *(if phase.is_kvm { &mut kvms } else { &mut ours }) += time;
    }
    let how = "CPU time of the calling thread in Cell::create and start of a clone, medians of each part";
    add(
        "clone.host_work_ms",
        ours,
        "ms",
        "<= 2",
        &format!("{how}; without KVM's calls"),
    )?;
    add(
        "clone.kvm_work_ms",
        kvms,
        "ms",
        "",
        &format!("{how}; KVM's calls"),
    )?;
    idle(context, &host)
}

/// Many clones that do nothing.
fn idle(context: &mut Context, host: &CellHost) -> io::Result<()> {
    let image = template(context, host, HugePages::No)?;
    let (private, tables) = (rollup("Private_Dirty")?, page_tables()?);
    let mut pods = Vec::new();
    for number in 0..MANY {
        let boot = Boot::Clone {
            image: Arc::clone(&image),
        };
        let pod = pod(host, format!("idle-{number:02}"), boot, HugePages::No)?;
        drop(pod.ask()?);
        pods.push(pod);
    }
    std::thread::sleep(IDLE);
    let own: Vec<f64> = pods
        .iter()
        .map(|pod| float(pod.cell.resident_ram().unwrap_or(0) >> 10))
        .collect();
    let first = exits_per_minute(&pods, IDLE)?;
    std::thread::sleep(SETTLED);
    let rested = exits_per_minute(&pods, REST)?;
    let dirtied = median(&own);
    let all = rollup("Private_Dirty")?.saturating_sub(private) + page_tables()?.saturating_sub(tables);
    let beyond = (float(all) / f64::from(MANY) - dirtied).max(0.0);
    let how = format!(
        "{MANY} clones of {MEMORY_MIB} MiB, ordinary pages, {} s idle",
        IDLE.as_secs()
    );
    for (name, value, unit, goal) in [
        ("clone.idle_dirtied_kib", dirtied, "KiB", "<= 4096"),
        ("clone.idle_beyond_kib", beyond, "KiB", "<= 300"),
        ("clone.first_exits_per_minute", first, "exits", ""),
        ("clone.idle_exits_per_minute", rested, "exits", "< 20"),
    ] {
        let what = match name {
            "clone.idle_dirtied_kib" => "pages of its RAM that are its own, median",
            "clone.idle_beyond_kib" => {
                "private memory and page tables of the process per clone, beyond those pages"
            }
            "clone.first_exits_per_minute" => "KVM's count in as many seconds after that, median",
            _ => "KVM's count, median of 60 s after 60 more; the look itself costs one",
        };
        add(context, (name, value, unit, goal), format!("{how}; {what}"))?;
    }
    for pod in &pods {
        pod.cell.stop();
    }
    for pod in &pods {
        end(&pod.cell);
    }
    Ok(())
}

/// KVM's count of exits while nobody asks for anything: the median.
fn exits_per_minute(pods: &[Pod], time: Duration) -> io::Result<f64> {
    let counts = || -> io::Result<Vec<u64>> { pods.iter().map(|pod| kvm_exits(&pod.cell)).collect() };
    let before = counts()?;
    std::thread::sleep(time);
    let each = counts()?.into_iter().zip(before);
    let per_minute =
        each.map(|(after, before)| float(after.saturating_sub(before)) * 60.0 / time.as_secs_f64());
    Ok(median(&per_minute.collect::<Vec<_>>()))
}

/// KiB of the process's page tables.
pub fn page_tables() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmPTE:"));
    Ok(line
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0))
}

/// What makes a clone a pod: name, files and randomness, and its network.
fn configurations() -> [(&'static str, ConfigureRequest); 2] {
    let files = DnsFiles {
        hosts: "127.0.0.1 localhost\n10.0.0.2 pod\n".into(),
        resolv_conf: "nameserver 10.0.0.10\n".into(),
        ..Default::default()
    };
    let identity = ConfigureRequest {
        hostname: "pod".into(),
        files: Some(files).into(),
        sysctls: [("net.ipv4.ip_unprivileged_port_start".into(), "0".into())].into(),
        entropy: vec![7; 64],
        ..Default::default()
    };
    let route = |gateway: &str| Route {
        gateway: gateway.into(),
        interface: "eth0".into(),
        ..Default::default()
    };
    let network = ConfigureRequest {
        interfaces: vec![Interface {
            mac: "02:00:00:00:00:02".into(),
            former_mac: "02:00:00:00:00:01".into(),
            name: "eth0".into(),
            mtu: 1450,
            addresses: vec!["10.0.0.2/16".into(), "fd00::2/64".into()],
            ..Default::default()
        }],
        routes: vec![route("10.0.0.1"), route("fd00::1")],
        ..Default::default()
    };
    [("identity", identity), ("network", network)]
}

/// What a clone does until it is a pod.
fn count_configuration(context: &mut Context, host: &CellHost) -> io::Result<()> {
    let (huge_pages, card) = (HugePages::Transparent, Some([2, 0, 0, 0, 0, 1]));
    let image = template_with(context, host, huge_pages, card)?;
    let trace = GuestMode::start()?;
    for name in ["warm-cf", "conf-ic"] {
        let boot = Boot::Clone {
            image: Arc::clone(&image),
        };
        let pod = pod_with(host, name.into(), boot, huge_pages, card)?;
        let mut connection = pod.ask()?;
        let thread = thread_id(&pod.vcpu())?;
        let mut stream = 1;
        for (what, configuration) in configurations() {
            let before = (trace.ticks(thread)?, kvm_exits(&pod.cell)?);
            stream += 2;
            request(
                &mut connection,
                stream,
                "Configure",
                configuration.write_to_bytes()?,
            )?;
            let guest = trace.ticks(thread)?.saturating_sub(before.0);
            let exits = kvm_exits(&pod.cell)?.saturating_sub(before.1);
            if name == "warm-cf" {
                continue;
            }
            let how = format!("a clone is told its {what}, transparent huge pages");
            for (figure, value, unit) in [
                ("instructions", float(guest), "instructions"),
                ("exits", float(exits), "exits"),
            ] {
                let name = format!("clone.{what}_{figure}");
                add(context, (name.as_str(), value, unit, ""), how.clone())?;
            }
        }
        end(&pod.cell);
    }
    Ok(())
}

/// Instructions, where a nanosecond is one: `ci/kvm-host --icount`.
pub fn count(context: &mut Context) -> io::Result<()> {
    let host = CellHost::new(CellHostConfig::default()).map_err(chain)?;
    let huge_pages = HugePages::Transparent;
    let image = template(context, &host, huge_pages)?;
    let clone = || Boot::Clone {
        image: Arc::clone(&image),
    };
    start(&host, "warm-up1".into(), clone(), huge_pages)?;
    let cloned = start(&host, "clone-ic".into(), clone(), huge_pages)?;
    let booted = start(&host, "boots-ic".into(), kernel(context)?, huge_pages)?;
    let trace = GuestMode::start()?;
    let traced = start(&host, "clone-gm".into(), clone(), huge_pages)?;
    let cloned_guest = float(trace.ticks(traced.thread)?);
    let traced = start(&host, "boots-gm".into(), kernel(context)?, huge_pages)?;
    let booted_guest = float(trace.ticks(traced.thread)?);
    drop(trace);
    let how = format!(
        "1 vCPU, {MEMORY_MIB} MiB, the devices of a pod, to the agent's first answer; 1 ns of the host's clock is one \
         instruction"
    );
    let guest = "between KVM's trace points kvm_entry and kvm_exit";
    let vcpu = "CPU time of the vCPU's thread: the guest, and KVM's work for it";
    let all = "all instructions of host and guest";
    for (name, value, unit, goal, what) in [
        (
            "clone.guest_instructions",
            cloned_guest,
            "instructions",
            "",
            guest,
        ),
        (
            "clone.guest_instructions_cold_boot",
            booted_guest,
            "instructions",
            "",
            guest,
        ),
        (
            "clone.guest_instructions_vs_cold_boot",
            cloned_guest / booted_guest,
            "ratio",
            "<= 0.05",
            guest,
        ),
        (
            "clone.vcpu_instructions",
            cloned.vcpu * 1e9,
            "instructions",
            "",
            vcpu,
        ),
        (
            "clone.vcpu_instructions_vs_cold_boot",
            cloned.vcpu / booted.vcpu,
            "ratio",
            "",
            vcpu,
        ),
        (
            "clone.instructions",
            cloned.seconds * 1e9,
            "instructions",
            "",
            all,
        ),
        (
            "clone.instructions_vs_cold_boot",
            cloned.seconds / booted.seconds,
            "ratio",
            "",
            all,
        ),
    ] {
        add(context, (name, value, unit, goal), format!("{how}; {what}"))?;
    }
    count_configuration(context, &host)
}
