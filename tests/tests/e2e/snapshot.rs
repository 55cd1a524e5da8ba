// SPDX-License-Identifier: Apache-2.0
//! Snapshots of running containers, as a user takes them: what runs goes on where it is restored, once or many times, with
//! its memory, its files and its output; copies share nothing; what is no snapshot is refused.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cloister_tests::e2e::{Footprint, Stage, eventually, number_of};
use rustix::process::Signal;

/// Counts to its standard output and to a file that it keeps open; each line has a word from its memory.
const COUNTING: &str = "word=$(head -c 16 /dev/urandom | md5sum | cut -c1-8); echo kept >/kept; exec 3>/counted; i=0; \
     while :; do i=$((i+1)); echo $word $i; echo $word $i >&3; sleep 0.05; done";

/// Prints random numbers.
const RANDOM: &str = "while :; do head -c 32 /dev/urandom | md5sum; sleep 0.05; done";

fn run(stage: &Stage, options: &[&str], script: &str) {
    let words = ["localhost/busybox", "sh", "-c", script];
    let args = [&["run", "-d"], options, &words].concat();
    stage.cloister(&args).expect(0);
}

fn logs(stage: &Stage, name: &str) -> Vec<String> {
    let text = stage.cloister(&["logs", name]).expect(0).stdout;
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().map(str::to_owned).collect()
}

/// Waits until it has printed so many more lines.
fn prints_on(stage: &Stage, name: &str) -> Vec<String> {
    let before = logs(stage, name).len();
    eventually("more output", || {
        let lines = logs(stage, name);
        (lines.len() > before + 4).then_some(lines)
    })
}

/// The word, and the numbers, which follow each other.
fn counted(lines: &[String]) -> (String, u32, u32) {
    let parsed: Vec<(&str, u32)> = lines
        .iter()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(word, number)| (word, number.parse().unwrap()))
        .collect();
    let (word, first) = parsed[0];
    for ((own, number), expected) in parsed.iter().zip(first..) {
        assert_eq!((*own, *number), (word, expected), "{lines:#?}");
    }
    (word.to_owned(), first, parsed.last().unwrap().1)
}

#[test]
fn a_container_goes_on_in_its_snapshot() {
    let stage = Stage::with_busybox("snapshot");
    let before = Footprint::of_host(&stage);
    run(&stage, &["--name", "original"], COUNTING);
    prints_on(&stage, "original");
    let file = stage.folder("snapshots").join("counting");
    let path = file.to_str().unwrap();
    let written = stage.json(&["snapshot", "--json", "original", path]);
    assert_eq!(written["bytes"], fs::metadata(&file).unwrap().len());
    // The original goes on, and nothing of its output is lost.
    let lines = prints_on(&stage, "original");
    let (word, first, _) = counted(&lines);
    assert_eq!(first, 1);
    stage.cloister(&["stop", "-t", "0", "original"]).expect(0);
    let (_, _, last) = counted(&logs(&stage, "original"));
    // Twice from the same moment, each with its own name, and once from a copy's own snapshot.
    let mut from = path.to_owned();
    for name in ["one", "other", "grandchild"] {
        let told = stage.json(&["restore", "--json", "--name", name, &from]);
        assert_eq!(told["name"], name);
        let lines = prints_on(&stage, name);
        let (own, resumed, _) = counted(&lines);
        assert_eq!(own, word, "the memory is another");
        if name != "grandchild" {
            // What had been printed before is with the original.
            assert!((2..=last + 1).contains(&resumed), "{resumed} after {last}");
        }
        let kept = stage.cloister(&["exec", name, "cat", "/kept"]).expect(0);
        assert_eq!(kept.stdout, "kept\n");
        let text = stage
            .cloister(&["exec", name, "cat", "/counted"])
            .expect(0)
            .stdout;
        let whole: Vec<String> = text.lines().map(str::to_owned).collect();
        let (_, first, reached) = counted(&whole);
        assert!(
            first == 1 && reached > resumed,
            "the open file: {first} to {reached}"
        );
        let listed = stage.json(&["ps", "--json"]);
        assert!(listed.to_string().contains(name));
        if name == "other" {
            from = stage
                .scratch("snapshots")
                .join("again")
                .to_str()
                .unwrap()
                .to_owned();
            stage.cloister(&["snapshot", name, &from]).expect(0);
        }
    }
    for name in ["one", "other", "grandchild"] {
        stage.cloister(&["stop", "-t", "0", name]).expect(0);
        stage.cloister(&["rm", name]).expect(0);
    }
    stage.cloister(&["rm", "original"]).expect(0);
    fs::remove_dir_all(stage.scratch("snapshots")).unwrap();
    before.assert_unchanged();
}

/// What was printed before the snapshot is with the original, what is printed later with the copy, to the line, however fast
/// it comes. How much came before shows in the original's log, which does not grow while the snapshot is written.
#[test]
fn no_line_of_a_flood_is_lost_or_there_twice() {
    let stage = Stage::with_busybox("flood");
    // Not so fast that the log is rotated, for it is counted in.
    let flood = "i=0; while sleep 0.01; do i=$((i+1)); echo $i; done";
    run(&stage, &["--net", "none", "--name", "original"], flood);
    prints_on(&stage, "original");
    let id = stage.cloister(&["ps", "-q", "--no-trunc"]).expect(0).stdout;
    let log = stage.root().join("pods").join(id.trim()).join("container.log");
    let file = stage.scratch("snapshot");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    let path = file.to_str().unwrap().to_owned();
    let mut lengths: HashMap<u64, u32> = HashMap::new();
    std::thread::scope(|scope| {
        let snapshot = scope.spawn(|| stage.cloister(&["snapshot", "original", &path]));
        while !snapshot.is_finished() {
            *lengths.entry(fs::metadata(&log).unwrap().len()).or_default() += 1;
            std::thread::sleep(Duration::from_millis(2));
        }
        snapshot.join().unwrap().expect(0);
    });
    let (still, _) = lengths.into_iter().max_by_key(|(_, times)| *times).unwrap();
    let mut before = vec![0; usize::try_from(still).unwrap()];
    File::open(&log).unwrap().read_exact_at(&mut before, 0).unwrap();
    let before = before.iter().filter(|byte| **byte == b'\n').count();
    stage.cloister(&["rm", "-f", "original"]).expect(0);
    stage.cloister(&["restore", "--name", "copy", &path]).expect(0);
    let lines = prints_on(&stage, "copy");
    stage.cloister(&["rm", "-f", "copy"]).expect(0);
    // A line may have been given away in parts.
    assert!(
        (before + 1).to_string().ends_with(&lines[0]),
        "{} after {before}",
        lines[0]
    );
    for (line, number) in lines.iter().zip(before + 1..).skip(1) {
        assert_eq!(*line, number.to_string());
    }
}

/// Writes files with their checksums, and sends numbers through a TCP connection, whose other end sees that they follow each other.
const LOAD: &str = "mkdir /files; \
     (i=0; while :; do i=$((i+1)); echo $i; done) | nc -l -p 9000 >/dev/null & \
     sleep 1; sleep infinity | nc 127.0.0.1 9000 | awk '$1 != NR { print \"after\", NR - 1, \"came\", $1; exit 1 } NR % 1000 == 0 { print NR }' >/received & \
     i=0; while :; do i=$((i+1)); head -c 300000 /dev/urandom >/files/new; md5sum </files/new >/files/$i.sum; \
     mv /files/new /files/$i; sync; echo $i >/making; mv /making /made; rm -f /files/$((i-20)) /files/$((i-20)).sum; done";

/// Says what is wrong with the files and the numbers, if anything is, and how many there have been.
const CHECK: &str = "made=$(cat /made); i=$made; while [ $i -gt 0 ] && [ $i -gt $((made-15)) ]; do \
     [ \"$(md5sum </files/$i)\" = \"$(cat /files/$i.sum)\" ] || echo file $i; i=$((i-1)); done; \
     grep after /received; pidof awk >/dev/null || echo the connection is gone; echo $made $(tail -n 1 /received)";

/// A pod under load that is taken down and restored again and again loses nothing, and does nothing twice. `CLOISTER_RESTORES`
/// says how often.
#[test]
fn restored_again_and_again_under_load_it_loses_nothing() {
    let restores = number_of("CLOISTER_RESTORES", 1);
    let stage = Stage::with_busybox("load");
    run(&stage, &["--net", "none", "--name", "pod-0"], LOAD);
    let mut last = (0, 0);
    let file = stage.folder("snapshots").join("snapshot");
    let path = file.to_str().unwrap();
    for number in 1..=restores {
        let (before, after) = (format!("pod-{}", number - 1), format!("pod-{number}"));
        last = eventually("some progress", || {
            let said = stage
                .cloister(&["exec", &before, "sh", "-c", CHECK])
                .expect(0)
                .stdout;
            let words: Vec<&str> = said.split_whitespace().collect();
            let [made, received] = words[..] else {
                assert!(number == 1, "after {} restores: {said}", number - 1);
                return None;
            };
            let now: (u64, u64) = (made.parse().unwrap(), received.parse().unwrap());
            (now.0 > last.0 && now.1 > last.1).then_some(now)
        });
        stage.cloister(&["snapshot", &before, path]).expect(0);
        stage.cloister(&["rm", "-f", &before]).expect(0);
        stage.cloister(&["restore", "--name", &after, path]).expect(0);
        fs::remove_file(&file).unwrap();
    }
    println!("{restores} restores, {} files, {} numbers", last.0, last.1);
    let said = stage
        .cloister(&["exec", &format!("pod-{restores}"), "sh", "-c", CHECK])
        .expect(0);
    assert_eq!(said.stdout.split_whitespace().count(), 2, "{said:#?}");
    stage
        .cloister(&["rm", "-f", &format!("pod-{restores}")])
        .expect(0);
}

#[test]
fn forks_share_nothing() {
    let stage = Stage::with_busybox("fork");
    let before = Footprint::of_host(&stage);
    run(&stage, &["--name", "original"], RANDOM);
    prints_on(&stage, "original");
    let forks = stage.json(&["fork", "--json", "-n", "3", "original"]);
    let names: Vec<&str> = forks
        .as_array()
        .unwrap()
        .iter()
        .map(|fork| fork["name"].as_str().unwrap())
        .collect();
    assert_eq!(names.len(), 3);
    let (mut seen, mut addresses) = (HashSet::new(), HashSet::new());
    for name in names.iter().copied().chain(["original"]) {
        // What was drawn before the fork and printed after it is in each of them: one line, the first that a fork prints.
        let early = usize::from(name != "original");
        for line in prints_on(&stage, name).into_iter().skip(early) {
            assert!(
                seen.insert(line.clone()),
                "{name} printed what another one did: {line}"
            );
        }
        let exec = |script: &str| {
            let output = stage.cloister(&["exec", name, "sh", "-c", script]).expect(0);
            output.stdout.trim().to_owned()
        };
        assert!(seen.insert(exec("head -c 32 /dev/urandom | md5sum")));
        // Files of one are not the others'.
        assert_eq!(exec(&format!("ls / | grep -c own; echo >/own-{name}")), "0");
        let address = exec("ip -4 -o addr show eth0 | sed 's/.*inet \\([^ ]*\\).*/\\1/'");
        assert!(
            !address.contains('\n'),
            "{name} has more than one address: {address}"
        );
        assert!(addresses.insert(address), "two have the same address");
        exec("ping -c 1 -w 60 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')");
    }
    for name in names.iter().copied().chain(["original"]) {
        stage.cloister(&["rm", "-f", name]).expect(0);
    }
    before.assert_unchanged();
}

#[test]
fn a_full_disk_leaves_the_container_running_and_no_file() {
    let stage = Stage::with_busybox("full");
    run(&stage, &["--net", "none", "--name", "original"], COUNTING);
    prints_on(&stage, "original");
    let disk = stage.folder("disk");
    let mount = |args: &[&str]| {
        let status = Command::new("mount").args(args).arg(&disk).status().unwrap();
        assert!(status.success());
    };
    mount(&["-t", "tmpfs", "-o", "size=4m", "full"]);
    let file = disk.join("snapshot");
    let output = stage
        .cloister(&["snapshot", "original", file.to_str().unwrap()])
        .expect(1);
    assert!(output.stderr.contains("No space left"), "{output:#?}");
    assert_eq!(fs::read_dir(&disk).unwrap().count(), 0);
    counted(&prints_on(&stage, "original"));
    // With room it works.
    mount(&["-o", "remount,size=600m"]);
    stage
        .cloister(&["snapshot", "original", file.to_str().unwrap()])
        .expect(0);
    counted(&prints_on(&stage, "original"));
    stage.cloister(&["rm", "-f", "original"]).expect(0);
    assert!(
        Command::new("umount")
            .arg("-l")
            .arg(&disk)
            .status()
            .unwrap()
            .success()
    );
}

/// A page of a pod's web server.
fn fetch(port: u16) -> String {
    eventually("the web server answers", || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
        let mut page = String::new();
        stream.read_to_string(&mut page).ok()?;
        page.rsplit_once("\r\n\r\n").map(|(_, body)| body.to_owned())
    })
}

/// Serves a page, and adds each line that it is given to a file that it has deleted, of which it says what is in it.
const LISTENING: &str = "mkdir -p /www; echo a page >/www/index.html; httpd -p 80 -h /www; \
     echo first >/gone; exec 3<>/gone; rm /gone; \
     while read line; do echo $line >>/proc/$$/fd/3; echo heard $(uniq /proc/$$/fd/3); done";

/// One container that has a terminal, an open stdin, a DAX window, a published port and a deleted file that is open; its
/// snapshot, and another one on that.
#[test]
fn whatever_it_was_run_with_it_goes_on_also_from_a_snapshot_on_another_one() {
    let stage = Stage::with_busybox("options");
    let before = Footprint::of_host(&stage);
    let options = [
        "-it",
        "--dax",
        "64m",
        "-p",
        "127.0.0.1:18090:80",
        "--name",
        "original",
    ];
    run(&stage, &options, LISTENING);
    let says = |name: &str, line: &str, answer: &str| {
        let mut child = stage.on_a_terminal(&format!("attach {name}"));
        let wanted = format!("heard {answer}");
        eventually(&format!("{name} answers"), || {
            // Once may be too early for the client; a line that comes twice shows once.
            child.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
            std::thread::sleep(Duration::from_millis(500));
            let said = stage.cloister(&["logs", name]).expect(0).stdout;
            said.lines().any(|said| said.trim_end() == wanted).then_some(())
        });
        child.signal(Signal::KILL);
        let _ = child.finish();
    };
    // An empty line adds one that does not show.
    says("original", "\r", "first");
    assert_eq!(fetch(18090), "a page\n");
    let folder = stage.folder("snapshots");
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (whole, later, latest) = (path("whole"), path("later"), path("latest"));
    stage.cloister(&["snapshot", "original", &whole]).expect(0);
    stage
        .cloister(&["exec", "original", "sh", "-c", "echo between >/between"])
        .expect(0);
    let written = stage.json(&["snapshot", "--json", "--base", &whole, "original", &later]);
    assert_eq!(written["base"], whole);
    // Far less than all of it.
    let on_disk = |path: &str| fs::metadata(path).unwrap().blocks();
    assert!(
        on_disk(&later) * 2 < on_disk(&whole),
        "{} of {}",
        on_disk(&later),
        on_disk(&whole)
    );
    // Nothing shows of the copy of the deleted file, and what it is a copy of is as it was.
    let listed = stage
        .cloister(&["exec", "original", "ls", "-A", "/"])
        .expect(0)
        .stdout;
    assert!(!listed.contains("cloister-open"), "{listed}");
    says("original", "\r", "first");
    stage.cloister(&["rm", "-f", "original"]).expect(0);

    // On its base, with another port, noting what it touches.
    let restore = [
        "restore",
        "--prefetch",
        "-p",
        "127.0.0.1:18091:80",
        "--name",
        "copy",
        &later,
    ];
    stage.cloister(&restore).expect(0);
    says("copy", "second\r", "first second");
    assert_eq!(fetch(18091), "a page\n");
    let read = |name: &str, file: &str| stage.cloister(&["exec", name, "cat", file]).expect(0).stdout;
    assert_eq!(read("copy", "/between"), "between\n");
    let touched = format!("{later}.touched");
    eventually("what it touches is noted", || fs::metadata(&touched).ok());
    let noted = fs::read(&touched).unwrap();
    // A third on these two, of a container that was made of the second: only its own pages are looked at.
    stage
        .cloister(&["snapshot", "--base", &later, "copy", &latest])
        .expect(0);
    stage.cloister(&["rm", "-f", "copy"]).expect(0);

    let refused = |words: &[&str], why: &[&str]| {
        let output = stage.cloister(words).expect(1);
        for why in why {
            assert!(output.stderr.contains(why), "{why}: {output:#?}");
        }
        assert!(!output.stderr.contains("panicked"), "{output:#?}");
    };
    // The base is needed, and no other will do.
    let moved = path("moved");
    fs::rename(&whole, &moved).unwrap();
    refused(
        &["restore", &latest],
        &["later holds only", "whole", "No such file", "--base"],
    );
    refused(
        &["restore", "--base", &latest, &latest],
        &["latest is not its base"],
    );
    fs::copy(&latest, &whole).unwrap();
    refused(&["restore", &latest], &["whole is another one"]);
    let stored = first_page(&moved);
    damage(Path::new(&moved), stored);
    refused(
        &["restore", "--base", &moved, &latest],
        &["checksum of its base's RAM"],
    );
    damage(Path::new(&moved), stored);

    // With it, wherever it is, all three together are what the last one was; and what was noted is of use.
    stage
        .cloister(&[
            "restore",
            "--prefetch",
            "--base",
            &moved,
            "--name",
            "last",
            &later,
        ])
        .expect(0);
    says("last", "third\r", "first third");
    assert_eq!(fs::read(&touched).unwrap(), noted);
    stage.cloister(&["rm", "-f", "last"]).expect(0);
    stage
        .cloister(&["restore", "--base", &moved, "--name", "last", &latest])
        .expect(0);
    says("last", "third\r", "first second third");
    assert_eq!(read("last", "/between"), "between\n");
    // What would take away its own base is refused, and all is as before.
    refused(
        &["snapshot", "--base", &latest, "--base", &moved, "last", &moved],
        &["cannot be replaced"],
    );
    refused(
        &["snapshot", "--base", &touched, "last", &whole],
        &["touched", "no image"],
    );
    says("last", "fourth\r", "first second third fourth");
    stage.cloister(&["rm", "-f", "last"]).expect(0);
    fs::remove_dir_all(folder).unwrap();
    before.assert_unchanged();
}

/// A tap of the host's, until it is dropped.
struct Tap(&'static str);

impl Tap {
    fn make(name: &'static str) -> Self {
        ip(&["tuntap", "add", name, "mode", "tap"]);
        ip(&["link", "set", name, "up"]);
        Self(name)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        ip(&["link", "del", self.0]);
    }
}

fn ip(args: &[&str]) {
    assert!(
        Command::new("ip").args(args).status().unwrap().success(),
        "ip {args:?}"
    );
}

#[test]
fn a_container_on_a_tap_goes_on_on_another_one() {
    let stage = Stage::with_busybox("tap");
    let (one, other) = (Tap::make("tap-snap-1"), Tap::make("tap-snap-2"));
    let on = |tap: &Tap| format!("tap={}", tap.0);
    let options = ["--net", &on(&one), "--cap-add", "NET_ADMIN", "--name", "original"];
    run(&stage, &options, COUNTING);
    prints_on(&stage, "original");
    let hardware = |name: &str| {
        let read = stage.cloister(&["exec", name, "cat", "/sys/class/net/eth0/address"]);
        read.expect(0).stdout
    };
    let address = hardware("original");
    let file = stage.folder("snapshots").join("snapshot");
    let path = file.to_str().unwrap();
    stage.cloister(&["snapshot", "original", path]).expect(0);
    for (words, why) in [
        (vec!["fork", "original"], "which copies cannot share"),
        (vec!["restore", path], "--net tap=NAME"),
        (vec!["restore", "--net", "none", path], "it has a network card"),
        (vec!["restore", "--net", "tap=nowhere", path], "nowhere"),
        (
            vec!["restore", "--net", "tap=tap-snap-2", "-p", "18092:80", path],
            "needs a network of type nat",
        ),
    ] {
        let output = stage.cloister(&words).expect(1);
        assert!(output.stderr.contains(why), "{why}: {output:#?}");
    }
    counted(&prints_on(&stage, "original"));
    // The original keeps its own.
    stage
        .cloister(&["restore", "--net", &on(&other), "--name", "copy", path])
        .expect(0);
    counted(&prints_on(&stage, "copy"));
    assert_eq!(hardware("copy"), address);
    // Its frames reach that tap.
    let received = || {
        let text = fs::read_to_string("/sys/class/net/tap-snap-2/statistics/rx_packets").unwrap();
        text.trim().parse::<u64>().unwrap()
    };
    let before = received();
    let script = "ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up; ping -c 1 -w 2 192.0.2.1 || true";
    stage.cloister(&["exec", "copy", "sh", "-c", script]).expect(0);
    eventually("a frame comes", || (received() > before).then_some(()));
    for name in ["original", "copy"] {
        stage.cloister(&["rm", "-f", name]).expect(0);
    }
}

/// Where the first stored page of a snapshot's RAM is.
fn first_page(path: &str) -> u64 {
    let file = File::open(path).unwrap();
    let mut page = vec![0; 4096];
    let stored = (1..).map(|number| number * 4096 + (1 << 20)).find(|at| {
        file.read_exact_at(&mut page, *at).unwrap();
        page.iter().any(|byte| *byte != 0)
    });
    stored.unwrap()
}

/// Changes a byte.
fn damage(file: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn what_is_no_snapshot_is_refused_by_name() {
    let stage = Stage::with_busybox("refused");
    let shared = stage.folder("shared");
    let volume = format!("{}:/shared", shared.display());
    run(
        &stage,
        &["--net", "none", "--name", "original", "-v", &volume],
        COUNTING,
    );
    prints_on(&stage, "original");
    let file = stage.scratch("snapshot");
    let path = file.to_str().unwrap();
    stage.cloister(&["snapshot", "original", path]).expect(0);
    let listed = || stage.cloister(&["ps", "-a", "-q"]).expect(0).stdout;
    let before = listed();
    let refused = |words: &[&str], why: &str| {
        let output = stage.cloister(words).expect(1);
        assert!(output.stderr.contains(why), "{why}: {output:#?}");
        assert!(!output.stderr.contains("panicked"), "{output:#?}");
    };
    // It names a folder of the host's.
    refused(&["restore", path], shared.to_str().unwrap());
    let len = fs::metadata(&file).unwrap().len();
    for (at, why) in [
        (3, "no image"),
        (9, "epoch"),
        (100, "checksum of its header"),
        (len - 1, "checksum of its files"),
    ] {
        damage(&file, at);
        refused(&["restore", "--allow-folders", path], why);
        damage(&file, at);
    }
    // Somewhere in its RAM.
    let at = first_page(path);
    damage(&file, at);
    refused(&["restore", "--allow-folders", path], "checksum of its RAM");
    damage(&file, at);
    let cut = stage.scratch("cut");
    fs::copy(&file, &cut).unwrap();
    File::options()
        .write(true)
        .open(&cut)
        .unwrap()
        .set_len(len - 1)
        .unwrap();
    refused(
        &["restore", "--allow-folders", cut.to_str().unwrap()],
        "its end is missing",
    );
    let other = stage.file("other", b"something else");
    refused(&["restore", other.to_str().unwrap()], "no image");
    refused(&["restore", "/nonexistent"], "No such file");
    refused(&["snapshot", "nobody", path], "nobody");
    refused(
        &["restore", "--allow-folders", "--net", "nat", path],
        "no network card",
    );
    assert_eq!(listed(), before);
    // Whole it is good still, and the volume is the same folder.
    fs::write(shared.join("hello"), "from the host\n").unwrap();
    stage
        .cloister(&["restore", "--allow-folders", "--name", "copy", path])
        .expect(0);
    let read = stage
        .cloister(&["exec", "copy", "cat", "/shared/hello"])
        .expect(0);
    assert_eq!(read.stdout, "from the host\n");
    counted(&prints_on(&stage, "copy"));
    for name in ["original", "copy"] {
        stage.cloister(&["rm", "-f", name]).expect(0);
    }
}
