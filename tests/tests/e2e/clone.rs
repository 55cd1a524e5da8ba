// SPDX-License-Identifier: Apache-2.0
//! Pods cloned from a template, with a real kernel and agent: each comes to life without a boot, with an identity and
//! randomness of its own; containers run in them; nothing of them is left.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::container::{Script, pod_initramfs};
use crate::runtime;
use cloister_protocol::pod::{ConfigureRequest, InfoRequest, PingRequest};
use cloister_protocol::task::WaitRequest;
use cloister_protocol::ttrpc::context::with_duration;
use cloister_sandbox_api::pod::agent::Agent;
use cloister_sandbox_api::pod::guest::{Guest, ShareOptions};
use cloister_sandbox_api::pod::machine::{MachineConfig, Origin, Room};
use cloister_sandbox_api::pod::pool::Ahead;
use cloister_sandbox_api::pod::template::{self, Kind, Templates};
use cloister_sandbox_api::pod::vm::PodVm;
use cloister_tests::e2e::{
    Footprint, PATIENCE, ProcessFootprint, Stage, anonymous_kib, guest_file, number_of,
};
use cloister_vmm::image::Image;
use cloister_vmm::{CellHost, CellHostConfig, CellState, HugePages};
use serde_json::json;

struct Bed {
    host: CellHost,
    kernel: PathBuf,
    initrd: PathBuf,
    _file: File,
}

impl Bed {
    fn new() -> Self {
        let programs = ["sh", "cat", "head", "date", "hostname", "sync"];
        let file = pod_initramfs(&programs, &["proc", "dev", "out"], &[]);
        Self {
            host: CellHost::new(CellHostConfig::default()).unwrap(),
            kernel: guest_file("vmlinux"),
            initrd: PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())),
            _file: file,
        }
    }

    fn config(&self, name: &str, cpus: u8, origin: Origin) -> MachineConfig<'_> {
        MachineConfig {
            name: name.into(),
            cpus,
            memory: 256 << 20,
            huge_pages: HugePages::No,
            dax: None,
            kernel: &self.kernel,
            initrd: &self.initrd,
            kernel_args: &[],
            nics: Vec::new(),
            room: Room::default(),
            origin,
        }
    }

    async fn template(&self, cpus: u8) -> Arc<Image> {
        let kind = Kind::of(&self.config("kind", cpus, Origin::Boot), "node").unwrap();
        template::build(&kind, &self.host, PATIENCE).await.unwrap()
    }

    async fn clone_of(&self, image: &Arc<Image>, cpus: u8, name: &str) -> (PodVm, Agent) {
        let config = self.config(name, cpus, Origin::Clone(Arc::clone(image)));
        let mut vm = PodVm::start(config, &self.host).await.unwrap();
        let agent = vm.ready(PATIENCE).await.unwrap();
        let request = ConfigureRequest {
            hostname: name.into(),
            ..Default::default()
        };
        vm.configure(&request).await.unwrap();
        (vm, agent)
    }
}

/// Runs a script in a container of the pod, with a folder of the host's at /out, to its end.
async fn run_script(vm: &PodVm, agent: &Agent, out: &Path, script: &str) {
    let tree = OwnedFd::from(File::open(out).unwrap());
    vm.machine.attach("out", tree, ShareOptions::default()).unwrap();
    let out = json!({
        "destination": "/out", "type": "bind", "source": "/run/cloister/shared/out", "options": ["rbind", "rw"],
    });
    let container = Script {
        id: "script",
        script,
        capabilities: &[],
        mounts: vec![out],
    };
    container.start(agent).await;
    let request = WaitRequest {
        id: "script".to_owned(),
        ..Default::default()
    };
    let exit = agent.task.wait(with_duration(PATIENCE), &request).await.unwrap();
    assert_eq!(exit.exit_status, 0);
}

fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("e2e-clone-{}-{name}", std::process::id()));
    fs::create_dir(&path).unwrap();
    path
}

/// The pieces of eight bytes of `bytes`, at every offset.
fn pieces(bytes: &[u8]) -> impl Iterator<Item = [u8; 8]> {
    bytes.windows(8).map(|piece| piece.try_into().unwrap())
}

const RANDOM: usize = 4096;

/// What no two clones may have in common.
#[derive(Default)]
struct Unique {
    random: HashSet<[u8; 8]>,
    ids: HashSet<Vec<u8>>,
}

impl Unique {
    /// Looks at a clone that has been given its name: its time is the host's, and nothing of it was seen before.
    async fn check(&mut self, vm: &PodVm, agent: &Agent, name: &str) {
        let request = InfoRequest::new();
        let info = agent.pod.info(with_duration(PATIENCE), &request).await.unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let guest = Duration::from_nanos(info.unix_time_ns);
        assert!(
            guest.abs_diff(now) < Duration::from_secs(5),
            "{guest:?} in the guest, {now:?} here"
        );
        let out = folder(name);
        let script = format!(
            "head -c {RANDOM} /dev/urandom >/out/urandom && head -c {RANDOM} /dev/random >/out/random && \
             cat /proc/sys/kernel/random/uuid >/out/uuid && cat /proc/sys/kernel/random/boot_id >/out/boot_id && \
             hostname >/out/hostname"
        );
        run_script(vm, agent, &out, &script).await;
        let read = |file: &str| fs::read(out.join(file)).unwrap();
        assert_eq!(String::from_utf8(read("hostname")).unwrap().trim(), name);
        for source in ["urandom", "random"] {
            let bytes = read(source);
            assert_eq!(bytes.len(), RANDOM);
            for piece in pieces(&bytes) {
                assert!(
                    self.random.insert(piece),
                    "{source} of {name} has bytes that were there before"
                );
            }
        }
        for id in ["uuid", "boot_id"] {
            assert!(self.ids.insert(read(id)), "{id} of {name} was there before");
        }
        fs::remove_dir_all(out).unwrap();
    }
}

/// Two clones never share a random byte, whoever asks in them, and neither does one with its template's other children.
#[test]
fn clones_have_an_identity_of_their_own_and_run_containers() {
    runtime().block_on(async {
        let bed = Bed::new();
        let image = bed.template(1).await;
        println!("template: {} KiB of RAM", image.ram_bytes() >> 10);
        let mut unique = Unique::default();
        for number in 0..4 {
            let name = format!("pod-{number}");
            let (vm, agent) = bed.clone_of(&image, 1, &name).await;
            unique.check(&vm, &agent, &name).await;
            vm.shut_down().await;
        }
        image.verify().expect("a clone has changed the template");
    });
}

/// Cells that were made ahead stand still until they are taken, are made again, and are as different from each other as other
/// clones. Nothing is left of those that nobody took.
#[test]
fn cells_made_ahead_become_pods_of_their_own() {
    runtime().block_on(async {
        let bed = Bed::new();
        let kind = Kind::of(&bed.config("kind", 1, Origin::Boot), "node").unwrap();
        let other = Kind::of(&bed.config("kind", 2, Origin::Boot), "node").unwrap();
        // What is made once is there after the first.
        let image = bed.template(1).await;
        bed.clone_of(&image, 1, "first").await.0.shut_down().await;
        drop(image);
        let before = ProcessFootprint::of_this();
        let templates = Templates::new(bed.host.clone());
        let ahead = Ahead {
            count: 2,
            ..Default::default()
        };
        let mut unique = Unique::default();
        for round in 0..2 {
            let mut taken = Vec::new();
            let begin = std::time::Instant::now();
            while taken.len() < 2 {
                assert!(begin.elapsed() < Duration::from_secs(200), "no cells");
                // As each pod that starts does: one that could not be made is tried again.
                templates.want(kind.clone(), PATIENCE, ahead.clone());
                tokio::time::sleep(Duration::from_millis(100)).await;
                taken.extend(templates.take(&kind));
            }
            assert!(templates.take(&other).is_none());
            for (number, mut vm) in taken.into_iter().enumerate() {
                let name = format!("pod-{round}-{number}");
                assert_eq!(vm.machine.cell().state(), CellState::Paused);
                vm.machine.resume_with(Vec::new()).unwrap();
                let agent = vm.agent().unwrap().clone();
                let request = ConfigureRequest {
                    hostname: name.clone(),
                    ..Default::default()
                };
                vm.configure(&request).await.unwrap();
                unique.check(&vm, &agent, &name).await;
                drop(agent);
                vm.shut_down().await;
            }
        }
        templates.close().await;
        templates.want(kind.clone(), PATIENCE, ahead);
        assert!(templates.find(&kind).is_none(), "it is closed");
        drop(templates);
        before.assert_no_more();
    });
}

#[test]
fn many_live_side_by_side_and_leave_nothing() {
    let runtime = runtime();
    runtime.block_on(async {
        let bed = Bed::new();
        for cpus in [1, 2] {
            let image = bed.template(cpus).await;
            // What is made once is there after the first.
            bed.clone_of(&image, cpus, "first").await.0.shut_down().await;
            let before = ProcessFootprint::of_this();
            let mut pods = Vec::new();
            for number in 0..6 {
                pods.push(bed.clone_of(&image, cpus, &format!("pod-{number}")).await);
            }
            for (vm, agent) in &pods {
                let request = PingRequest {
                    payload: vec![7; 100],
                    ..Default::default()
                };
                let answer = agent.pod.ping(with_duration(PATIENCE), &request).await.unwrap();
                assert_eq!(answer.payload, request.payload);
                let info = agent
                    .pod
                    .info(with_duration(PATIENCE), &InfoRequest::new())
                    .await
                    .unwrap();
                assert_eq!(info.cpus, u32::from(cpus));
                println!(
                    "{cpus} vCPUs: {} KiB of its own",
                    vm.machine.cell().resident_ram().unwrap() >> 10
                );
            }
            for (vm, agent) in pods {
                drop(agent);
                vm.shut_down().await;
            }
            before.assert_no_more();
            image.verify().expect("a clone has changed the template");
        }
    });
}

/// The agent's events reach the clone's own host: it dials again.
#[test]
fn events_of_a_clone_arrive() {
    runtime().block_on(async {
        let bed = Bed::new();
        let image = bed.template(1).await;
        let (mut vm, agent) = bed.clone_of(&image, 1, "pod").await;
        let mut events = vm.events().unwrap();
        // The agent is asked for it directly.
        vm.members().enter("script", "");
        let out = folder("events");
        run_script(&vm, &agent, &out, "exit 0").await;
        fs::remove_dir_all(out).unwrap();
        let exit = async {
            loop {
                let event = events.recv().await.expect("the connection for events is gone");
                if event.topic == "/tasks/exit" {
                    return;
                }
            }
        };
        tokio::time::timeout(PATIENCE, exit)
            .await
            .expect("no event of its exit");
        vm.shut_down().await;
    });
}

/// As a user does it: a template is built, and `run` clones it, network and all.
#[test]
fn cloister_run_clones_what_template_built() {
    let stage = Stage::with_busybox("template");
    let run = |options: &[&str], words: &[&str]| {
        let head = ["--log-level", "info", "run", "--rm"];
        let all = [&head, options, &["localhost/busybox"], words].concat();
        stage.cloister(&all).expect(0)
    };
    let is_clone = |stderr: &str| stderr.contains("cloned from template");
    assert!(!is_clone(&run(&[], &["true"]).stderr));
    let name = stage.cloister(&["template", "build"]).expect(0).stdout;
    let name = name.trim();
    let listed = stage.json(&["template", "ls", "--json"]);
    assert_eq!(
        (&listed[0]["name"], &listed[0]["memory_mib"]),
        (&name.into(), &512.into())
    );
    // What the first one touches is noted for the others.
    assert!(is_clone(&run(&[], &["true"]).stderr));
    let before = Footprint::of_host(&stage);
    let script = "ip -4 addr show eth0 && ping -c 1 -w 60 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p') && hostname";
    let output = run(&["-h", "pod"], &["sh", "-c", script]);
    assert!(is_clone(&output.stderr), "{output:#?}");
    assert!(
        output.stdout.contains("inet ") && output.stdout.ends_with("pod\n"),
        "{output:#?}"
    );
    // What it takes on the host is what it does not share with the template.
    run(&["-d", "--name", "stays"], &["sleep", "infinity"]);
    let stats = stage.json(&["stats", "--json"]);
    let own = stats[0]["vm_bytes"].as_u64().unwrap();
    assert!((64 << 10..20 << 20).contains(&own), "{stats}");
    stage.cloister(&["rm", "-f", "stays"]).expect(0);
    // Another kind boots.
    assert!(!is_clone(&run(&["-m", "256m"], &["true"]).stderr));
    before.assert_unchanged();
    stage.cloister(&["template", "rm", name]).expect(0);
    assert!(!is_clone(&run(&[], &["true"]).stderr));
    stage.cloister(&["template", "rm", name]).expect(1);
}

/// One after the other and several at once, and each answers: no wake-up is lost when they are made.
#[test]
fn every_clone_answers() {
    runtime().block_on(async {
        let bed = Bed::new();
        for cpus in [1, 2] {
            let image = bed.template(cpus).await;
            for (round, at_once) in [1, 5, 1, 5].into_iter().enumerate() {
                let mut starting = Vec::new();
                for number in 0..at_once {
                    let name = format!("pod-{round}-{number}");
                    let config = bed.config(&name, cpus, Origin::Clone(Arc::clone(&image)));
                    let vm = PodVm::start(config, &bed.host).await.unwrap();
                    starting.push(tokio::spawn(answers(vm, name)));
                }
                for started in starting {
                    started.await.unwrap();
                }
            }
        }
    });
}

/// Again and again: clones that are killed at different moments of their lives, and nothing is left of them.
/// `CLOISTER_CYCLES` says how many.
#[test]
fn clones_killed_again_and_again_leave_nothing() {
    let cycles = number_of("CLOISTER_CYCLES", 4);
    runtime().block_on(async {
        let bed = Bed::new();
        let image = bed.template(1).await;
        for number in 0..4 {
            cycle(&bed, &image, number).await;
        }
        let (before, first) = (ProcessFootprint::of_this(), anonymous_kib(std::process::id()));
        let start = std::time::Instant::now();
        for number in 0..cycles {
            cycle(&bed, &image, number).await;
        }
        let took = start.elapsed();
        before.assert_no_more();
        let last = anonymous_kib(std::process::id());
        println!(
            "{cycles} cycles in {took:.1?}: {first} KiB of the process's own memory before, {last} after"
        );
        // Allocators keep some; what a cycle left would be there a thousand times.
        assert!(
            last < first + 2048 + u64::from(cycles),
            "{first} KiB before, {last} after"
        );
        image.verify().expect("a clone has changed the template");
    });
}

/// One clone, killed as soon as it is made, when it has answered, in the middle of an answer, or when it has an identity.
async fn cycle(bed: &Bed, image: &Arc<Image>, number: u32) {
    let config = bed.config(&format!("cycle-{number}"), 1, Origin::Clone(Arc::clone(image)));
    let mut vm = PodVm::start(config, &bed.host).await.unwrap();
    let moment = number % 4;
    if moment != 0 {
        let agent = vm.ready(PATIENCE).await.unwrap();
        let request = PingRequest {
            payload: vec![7; 1000],
            ..Default::default()
        };
        let ping = agent.pod.ping(with_duration(PATIENCE), &request);
        match moment {
            1 => drop(ping.await.unwrap()),
            2 => drop(tokio::time::timeout(Duration::from_millis(1), ping).await),
            _ => vm.configure(&ConfigureRequest::new()).await.unwrap(),
        }
    }
    vm.machine.cell().stop();
    vm.shut_down().await;
}

/// A clone takes its identity and runs to its end.
async fn answers(mut vm: PodVm, hostname: String) {
    vm.ready(PATIENCE).await.unwrap();
    let request = ConfigureRequest {
        hostname: hostname.clone(),
        ..Default::default()
    };
    if let Err(error) = vm.configure(&request).await {
        panic!("{hostname}: {error}\n{}", vm.machine.last_words());
    }
    vm.shut_down().await;
}
