// SPDX-License-Identifier: Apache-2.0
//! `cloister` as its users meet it: containers of a real image, each in a VM, on the host that `ci/e2e` chose.

use cloister_tests::e2e::{
    Child, Footprint, Output, PATIENCE, Stage, anonymous_kib, checkout, eventually, guest_file,
};
use rustix::process::Signal;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

const IMAGE: &str = "localhost/busybox";
/// Most tests have no use for a network.
const RUN: &[&str] = &["run", "--rm", "--net", "none"];

fn run(stage: &Stage, options: &[&str], command: &[&str]) -> Output {
    stage.cloister(&[RUN, options, &[IMAGE], command].concat())
}

/// Reads until this was said.
fn read_until(stream: &mut impl Read, said: &str) -> String {
    let mut text = Vec::new();
    let mut piece = [0; 256];
    while !String::from_utf8_lossy(&text).contains(said) {
        let count = stream.read(&mut piece).unwrap();
        assert!(
            count > 0,
            "the end came before {said:?}: {}",
            String::from_utf8_lossy(&text)
        );
        text.extend_from_slice(&piece[..count]);
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Text that differs everywhere, in lines of 4 KiB.
fn pattern(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut text = Vec::with_capacity(bytes);
    while text.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        text.extend(state.to_le_bytes().map(|byte| 0x40 | (byte & 0x3f)));
    }
    for newline in text.chunks_mut(4096).filter_map(<[u8]>::last_mut) {
        *newline = b'\n';
    }
    text
}

/// Not by assert_eq, which would print them.
#[track_caller]
fn assert_same(found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "number of bytes");
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "first byte that differs");
}

#[test]
fn exit_codes_are_those_of_docker() {
    let stage = Stage::with_templates("codes");
    let before = Footprint::of_host(&stage);
    run(&stage, &[], &["sh", "-c", "exit 42"]).expect(42);
    let output = run(&stage, &[], &["/etc/passwd"]).expect(126);
    assert!(output.stderr.contains("/etc/passwd"), "{output:#?}");
    let output = run(&stage, &[], &["no-such-program"]).expect(127);
    assert!(output.stderr.contains("no-such-program"), "{output:#?}");
    assert_eq!(stage.json(&["ps", "-a", "--json"]).as_array().unwrap().len(), 0);
    before.assert_unchanged();
}

#[test]
fn what_cannot_be_run_is_refused() {
    let stage = Stage::with_busybox("refused");
    let scratch = stage.folder("layout");
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let before = Footprint::of_host(&stage);

    run(&stage, &["--bogus"], &["true"]).expect_refusal(&["--bogus"]);
    let missing = path(&stage.scratch("missing.tar"));
    stage
        .cloister(&[RUN, &[&missing]].concat())
        .expect_refusal(&["missing.tar"]);
    stage
        .cloister(&[RUN, &["--pull", "never", "localhost/nowhere"]].concat())
        .expect_refusal(&["localhost/nowhere"]);
    run(&stage, &["--kernel", "/no/kernel"], &["true"]).expect_refusal(&["/no/kernel", "--kernel"]);
    run(&stage, &["--kernel", "/etc/passwd"], &["true"]).expect_refusal(&["not a kernel"]);
    run(&stage, &["--memory", "60000g"], &["true"]).expect_refusal(&["memory"]);
    run(&stage, &["--memory", "lots"], &["true"]).expect_refusal(&["lots"]);
    before.assert_unchanged();

    // Images: not one, one cut off, one whose configuration was changed by a letter.
    let whole = fs::read(Stage::busybox()).unwrap();
    let archives = [
        ("garbage.tar", pattern(1 << 16)),
        ("half.tar", whole[..whole.len() / 2].to_vec()),
    ];
    for (name, content) in archives {
        let archive = path(&stage.file(name, &content));
        stage
            .cloister(&[RUN, &[&archive, "true"]].concat())
            .expect_refusal(&[name]);
    }
    let unpacked = Command::new("tar")
        .arg("-xf")
        .arg(Stage::busybox())
        .arg("-C")
        .arg(&scratch)
        .status();
    assert!(unpacked.unwrap().success());
    let mut digest = None;
    for entry in fs::read_dir(scratch.join("blobs/sha256")).unwrap().flatten() {
        let blob = fs::read(entry.path()).unwrap();
        if let Ok(text) = String::from_utf8(blob)
            && text.contains("rootfs")
        {
            fs::write(entry.path(), text.replace("PATH=/bin", "PATH=/bun")).unwrap();
            digest = entry.file_name().into_string().ok();
        }
    }
    // Of an image that is not in the store yet.
    let other = Stage::empty("tampered", 64);
    let layout = format!("oci:{}", path(&scratch));
    other
        .cloister(&[RUN, &[&layout, "true"]].concat())
        .expect_refusal(&["does not match its digest", &digest.unwrap()]);
    assert_eq!(other.json(&["images", "--json"]).as_array().unwrap().len(), 0);
    drop(other);
    before.assert_unchanged();
}

/// An image's user, folder, variables and entry point; each form in which an image is named; Debian's kernel instead of ours.
#[test]
fn images_run_as_they_say_in_every_form() {
    const CONFIG: &str = r#"{ "User": "7:50000", "WorkingDir": "/made/here", "Env": ["PATH=/bin", "A=b"],
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo $(id -u):$(id -g) $(pwd) $A"] }"#;
    let stage = Stage::with_templates("forms");
    let root = stage.folder("root");
    fs::create_dir(root.join("bin")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for name in ["sh", "id"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    let (config, archive) = (
        stage.file("config.json", CONFIG.as_bytes()),
        stage.scratch("own.tar"),
    );
    let made = Command::new(checkout("tests/demo/oci-archive"))
        .args([
            archive.as_path(),
            Path::new("localhost/own:latest"),
            &config,
            &root,
        ])
        .status();
    assert!(made.unwrap().success());
    let layout = stage.folder("layout");
    let unpacked = Command::new("tar")
        .arg("-xf")
        .arg(&archive)
        .arg("-C")
        .arg(&layout)
        .status();
    assert!(unpacked.unwrap().success());
    let before = Footprint::of_host(&stage);
    for (form, path) in [("oci-archive:", &archive), ("oci:", &layout), ("", &archive)] {
        let image = format!("{form}{}", path.display());
        let output = stage.cloister(&[RUN, &[&image]].concat()).expect(0);
        assert_eq!(output.stdout, "7:50000 /made/here b\n", "{image}");
    }
    // What is asked for counts more.
    let asked = ["-u", "0", "-w", "/bin", "-e", "A=c", "localhost/own"];
    let output = stage.cloister(&[RUN, &asked].concat()).expect(0);
    assert_eq!(output.stdout, "0:0 /bin c\n");
    // A folder as it stands, which stays so.
    let image = format!("dir:{}", root.display());
    let words = [
        image.as_str(),
        "/bin/sh",
        "-c",
        "echo 1 > /new && echo $((6 * 7))",
    ];
    let output = stage.cloister(&[RUN, &words].concat()).expect(0);
    assert_eq!(output.stdout, "42\n");
    assert!(!root.join("new").exists());
    let [kernel, initrd] = ["bzImage", "initramfs.cpio"].map(|name| guest_file(&format!("debian/{name}")));
    let debians = [
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
    ];
    let options = [&debians[..], &["--memory", "512m", "--init-timeout", "600"]].concat();
    let output = run(&stage, &options, &["uname", "-r"]).expect(0);
    assert!(output.stdout.contains("-cloud-amd64"), "{output:#?}");
    before.assert_unchanged();
}

#[test]
fn a_guest_kernel_that_panics_says_so() {
    let stage = Stage::with_busybox("panic");
    let before = Footprint::of_host(&stage);
    // Neither an init nor a root file system.
    let output = run(&stage, &["--kernel-arg", "rdinit=/nonexistent"], &["true"]);
    output.expect_refusal(&[
        "before its agent was ready",
        "guest kernel panic",
        "Unable to mount root fs",
    ]);
    before.assert_unchanged();
}

/// PID 1 takes no signal that it does not ask for, SIGKILL least of all, so a container that may write to its memory
/// makes it run into zeros: a fault of its own kills an init, too.
#[test]
fn an_agent_that_dies_says_so() {
    let stage = Stage::with_busybox("agent");
    let before = Footprint::of_host(&stage);
    let script = "set -- $(awk '/ r-xp / { gsub(\"-\", \" \", $1); print $1; exit }' /proc/1/maps); \
        dd if=/dev/zero of=/proc/1/mem conv=notrunc bs=4096 seek=$((0x$1 / 4096)) count=$(((0x$2 - 0x$1) / 4096)); \
        while :; do echo not yet; sleep 0.1; done";
    let options = ["--privileged", "--pid", "host"];
    let output = run(&stage, &options, &["sh", "-c", script]).expect(125);
    for named in [
        "under its container",
        "the agent died: guest kernel panic: Attempted to kill init! exitcode=0x0000000b",
    ] {
        assert!(
            output.stderr.contains(named),
            "does not say {named:?}: {output:#?}"
        );
    }
    assert!(!output.stderr.contains("panicked"), "{output:#?}");
    before.assert_unchanged();

    // In the background, with all that a pod has on the host.
    let command = [IMAGE, "sh", "-c", script];
    let started = [
        &["run", "-d", "--name", "hurt", "-p", "127.0.0.1:18081:80"],
        &options[..],
        &command,
    ];
    stage.cloister(&started.concat()).expect(0);
    assert_eq!(stage.cloister(&["wait", "hurt"]).expect(0).stdout, "125\n");
    let state = stage.json(&["inspect", "hurt"])[0]["State"].clone();
    assert_eq!(
        (&state["Running"], &state["ExitCode"]),
        (&false.into(), &125.into())
    );
    assert!(
        state["Error"].as_str().unwrap().contains("the agent died"),
        "{state}"
    );
    stage.cloister(&["rm", "hurt"]).expect(0);
    before.assert_unchanged();
}

#[test]
fn streams_and_flags_reach_the_container() {
    let stage = Stage::with_templates("streams");
    let before = Footprint::of_host(&stage);
    let options = [
        "-i",
        "-e",
        "WORD=a b",
        "-w",
        "/tmp",
        "-u",
        "nobody",
        "--hostname",
        "cell",
        "--entrypoint",
        "sh",
    ];
    let script = "echo \"$WORD|$PWD|$(id -u):$(id -g)|$(hostname)\"; echo complaint >&2; cat; echo end";
    let arguments = [RUN, &options, &[IMAGE, "-c", script]].concat();
    let output = stage.cloister_with(&arguments, b"from stdin\n").expect(0);
    assert_eq!(output.stdout, "a b|/tmp|65534:65534|cell\nfrom stdin\nend\n");
    assert_eq!(output.stderr, "complaint\n");
    before.assert_unchanged();
}

#[test]
fn system_calls_are_filtered() {
    let stage = Stage::with_templates("seccomp");
    let profile = br#"{"defaultAction":"SCMP_ACT_ALLOW","archMap":[{"architecture":"SCMP_ARCH_X86_64"}],
        "syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":28}]}"#;
    let profile = stage.file("profile.json", profile);
    let before = Footprint::of_host(&stage);
    // What the kernel itself lets everybody do: only a filter refuses it. Then processes that clone others.
    let script = "awk '/^(CapEff|CapBnd|NoNewPrivs|Seccomp|Seccomp_filters):/ { print $1 $2 }' /proc/self/status; \
        unshare -U echo own namespace; mount -t tmpfs none /var/www && umount /var/www && echo mounted; \
        mkdir /tmp/made && echo made; true | cat; echo end";
    let shell = ["sh", "-c", script];
    let status = |filters: u8, no_new: u8, effective: &str, bounding: &str| {
        let seccomp = if filters == 0 { 0 } else { 2 };
        format!(
            "CapEff:{effective}\nCapBnd:{bounding}\nNoNewPrivs:{no_new}\nSeccomp:{seccomp}\nSeccomp_filters:{filters}\n"
        )
    };
    let none = "0000000000000000";
    let usual = "00000000a80425fb";
    let refused = |output: &Output, what: &str| {
        assert!(output.stderr.contains(what), "{output:#?}");
    };

    let output = run(&stage, &[], &shell).expect(0);
    assert_eq!(output.stdout, status(1, 0, usual, usual) + "made\nend\n");
    refused(&output, "unshare(0x10000000): Operation not permitted");
    refused(&output, "mount: permission denied");
    let output = run(
        &stage,
        &["-u", "nobody", "--security-opt", "no-new-privileges"],
        &shell,
    )
    .expect(0);
    assert_eq!(output.stdout, status(1, 1, none, usual) + "made\nend\n");
    refused(&output, "unshare(0x10000000): Operation not permitted");

    let output = run(&stage, &["--security-opt", "seccomp=unconfined"], &shell).expect(0);
    assert_eq!(
        output.stdout,
        status(0, 0, usual, usual) + "own namespace\nmade\nend\n"
    );
    let output = run(&stage, &["--cap-add", "sys_admin", "--cap-drop", "MKNOD"], &shell).expect(0);
    let expected =
        status(1, 0, "00000000a02425fb", "00000000a02425fb") + "own namespace\nmounted\nmade\nend\n";
    assert_eq!(output.stdout, expected, "{}", output.stderr);
    let output = run(&stage, &["--privileged"], &shell).expect(0);
    let expected =
        status(0, 0, "000001ffffffffff", "000001ffffffffff") + "own namespace\nmounted\nmade\nend\n";
    assert_eq!(output.stdout, expected, "{}", output.stderr);

    let option = format!("seccomp={}", profile.display());
    let output = run(&stage, &["--security-opt", &option], &shell).expect(0);
    assert_eq!(output.stdout, status(1, 0, usual, usual) + "own namespace\nend\n");
    assert!(output.stderr.contains("No space left on device"), "{output:#?}");
    run(&stage, &["--security-opt", "seccomp=/no/file"], &["true"]).expect_refusal(&["/no/file"]);

    // Another process in the container is no freer.
    let started = [
        "run", "-d", "--name", "filtered", "--net", "none", IMAGE, "sleep", "1000",
    ];
    stage.cloister(&started).expect(0);
    let output = stage
        .cloister(&[&["exec", "filtered"], &shell[..]].concat())
        .expect(0);
    assert_eq!(output.stdout, status(1, 0, usual, usual) + "made\nend\n");
    refused(&output, "unshare(0x10000000): Operation not permitted");
    let output = stage
        .cloister(
            &[
                &["exec", "-u", "nobody", "filtered"],
                &shell[..2],
                &["cat /proc/self/status"],
            ]
            .concat(),
        )
        .expect(0);
    assert!(output.stdout.contains("Seccomp_filters:\t1\n"), "{output:#?}");
    for set in ["CapPrm", "CapEff"] {
        assert!(
            output.stdout.contains(&format!("{set}:\t{none}\n")),
            "{output:#?}"
        );
    }
    stage.cloister(&["rm", "-f", "filtered"]).expect(0);
    before.assert_unchanged();
}

#[test]
fn volumes_are_as_writable_as_asked() {
    let stage = Stage::with_templates("volumes");
    let (writable, read_only) = (stage.folder("writable"), stage.folder("read-only"));
    let kept = stage.file("read-only/kept", b"as it was\n");
    let single = stage.file("single", b"one file\n");
    let before = Footprint::of_host(&stage);
    let volumes = [
        format!("{}:/writable", writable.display()),
        format!("{}:/read-only:ro", read_only.display()),
        format!("{}:/etc/single:ro", single.display()),
    ];
    let options: Vec<&str> = volumes.iter().flat_map(|volume| ["-v", volume]).collect();
    let script = "cat /read-only/kept /etc/single; \
        echo changed >/read-only/kept || echo no write; rm -f /read-only/kept || echo no removal; \
        touch /read-only/new || echo no file; chmod 777 /read-only/kept || echo no mode; \
        mount -o remount,rw /read-only || echo no remount; echo changed >/etc/single || echo no write; \
        echo written >/writable/file";
    let output = run(&stage, &options, &["sh", "-c", script]).expect(0);
    let expected = "as it was\none file\nno write\nno removal\nno file\nno mode\nno remount\nno write\n";
    assert_eq!(output.stdout, expected, "{}", output.stderr);
    assert!(output.stderr.contains("Read-only file system"), "{output:#?}");
    assert_eq!(fs::read(&kept).unwrap(), b"as it was\n");
    assert_eq!(fs::read_dir(&read_only).unwrap().count(), 1);
    assert_eq!(fs::read(&single).unwrap(), b"one file\n");
    assert_eq!(fs::read(writable.join("file")).unwrap(), b"written\n");
    before.assert_unchanged();
}

#[test]
fn the_life_of_a_container_in_the_background() {
    let stage = Stage::with_templates("life");
    let before = Footprint::of_host(&stage);
    let script = "trap 'exit 5' TERM; echo hello; echo oops >&2; while :; do sleep 0.1; done";
    let started = [
        "run", "-d", "--name", "web", "--net", "none", IMAGE, "sh", "-c", script,
    ];
    let id = stage.cloister(&started).expect(0).stdout.trim().to_owned();
    assert_eq!(id.len(), 64);

    let listed = stage.json(&["ps", "--json"]);
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(
        (&listed[0]["id"], &listed[0]["name"]),
        (&id.as_str().into(), &"web".into())
    );
    assert_eq!(listed[0]["status"], "running");
    run(&stage, &["--name", "web"], &["true"]).expect_refusal(&["web", "already in use", &id]);

    let output = stage
        .cloister(&["exec", "web", "sh", "-c", "echo out; echo err >&2; exit 3"])
        .expect(3);
    assert_eq!(
        (output.stdout.as_str(), output.stderr.as_str()),
        ("out\n", "err\n")
    );
    let output = stage.cloister_with(
        &[
            "exec",
            "-i",
            "-w",
            "/tmp",
            "-e",
            "A=1",
            "web",
            "sh",
            "-c",
            "cat; echo $PWD $A",
        ],
        b"in\n",
    );
    assert_eq!(output.expect(0).stdout, "in\n/tmp 1\n");
    stage.cloister(&["exec", "web", "no-such-program"]).expect(127);

    eventually("the log", || {
        stage
            .cloister(&["logs", "web"])
            .stderr
            .contains("oops")
            .then_some(())
    });
    let logs = stage.cloister(&["logs", &id[..12]]).expect(0);
    assert_eq!(
        (logs.stdout.as_str(), logs.stderr.as_str()),
        ("hello\n", "oops\n")
    );
    let inspected = stage.json(&["inspect", "web"]);
    assert_eq!(inspected[0]["State"]["Running"], true);
    assert_eq!(inspected[0]["Config"]["Image"], IMAGE);
    let stats = stage.json(&["stats", "--json"]);
    assert_eq!(stats[0]["name"], "web");
    assert!(stats[0]["memory_bytes"].as_u64().unwrap() > 0, "{stats}");
    assert!(stats[0]["pids"].as_u64().unwrap() > 0, "{stats}");
    // A clone's own pages, at least.
    assert!(stats[0]["vm_bytes"].as_u64().unwrap() > 1 << 20, "{stats}");

    let output = stage.cloister(&["rm", "web"]).expect(1);
    assert!(output.stderr.contains("running"), "{output:#?}");
    assert_eq!(stage.cloister(&["stop", "web"]).expect(0).stdout, "web\n");
    assert_eq!(stage.json(&["ps", "--json"]).as_array().unwrap().len(), 0);
    let inspected = stage.json(&["inspect", "web"]);
    assert_eq!(
        (
            &inspected[0]["State"]["Running"],
            &inspected[0]["State"]["ExitCode"]
        ),
        (&false.into(), &5.into())
    );
    assert_eq!(stage.cloister(&["logs", "web"]).expect(0).stdout, "hello\n");
    let output = stage.cloister(&["exec", "web", "true"]);
    assert!(
        output.code != 0 && output.stderr.contains("not running"),
        "{output:#?}"
    );
    stage.cloister(&["rm", "web"]).expect(0);
    stage.cloister(&["inspect", "web"]).expect(1);
    before.assert_unchanged();
}

#[test]
fn a_killed_container_is_137() {
    let stage = Stage::with_templates("kill");
    let before = Footprint::of_host(&stage);
    let started = [
        "run", "-d", "--name", "sleeper", "--net", "none", IMAGE, "sleep", "1000",
    ];
    stage.cloister(&started).expect(0);
    stage.cloister(&["kill", "sleeper"]).expect(0);
    assert_eq!(stage.cloister(&["wait", "sleeper"]).expect(0).stdout, "137\n");
    assert_eq!(stage.json(&["inspect", "sleeper"])[0]["State"]["ExitCode"], 137);
    stage.cloister(&["rm", "sleeper"]).expect(0);
    before.assert_unchanged();
}

#[test]
fn a_killed_host_process_leaves_nothing_for_long() {
    let stage = Stage::with_busybox("orphan");
    let before = Footprint::of_host(&stage);
    stage
        .cloister(&["run", "-d", "--name", "orphan", IMAGE, "sleep", "1000"])
        .expect(0);
    let pid = stage.json(&["inspect", "orphan"])[0]["State"]["Pid"]
        .as_i64()
        .unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    // The next command sees it.
    let state = eventually("the end of the host process", || {
        let state = stage.json(&["inspect", "orphan"])[0]["State"].clone();
        (state["Running"] == false).then_some(state)
    });
    assert_eq!(state["ExitCode"], 137);
    assert!(state["Error"].as_str().unwrap().contains("killed"), "{state}");
    stage.cloister(&["rm", "orphan"]).expect(0);
    before.assert_unchanged();
}

#[test]
fn a_terminal_and_its_keys() {
    let stage = Stage::with_templates("terminal");
    let before = Footprint::of_host(&stage);
    let inner = "stty size; test -t 0 && test -t 1 && test -t 2 && tty; trap \"echo caught; exit 9\" INT; \
        echo up; while :; do sleep 0.1; done";
    let line = format!("stty rows 33 cols 77; exec cloister run --rm -it --net none {IMAGE} sh -c '{inner}'");
    let mut command = Command::new("script");
    command.args(["-qec", &line, "/dev/null"]).env("SHELL", "/bin/sh");
    let mut child = stage.start_command(command);
    let said = read_until(child.stdout.as_mut().unwrap(), "up\r\n");
    assert!(said.contains("33 77\r\n") && said.contains("/dev/"), "{said}");
    // Ctrl-C, as a key of a raw terminal.
    child.stdin.as_mut().unwrap().write_all(b"\x03").unwrap();
    read_until(child.stdout.as_mut().unwrap(), "caught");
    child.finish().expect(9);
    before.assert_unchanged();
}

/// Types until the answer comes: what was typed before the terminal was raw is echoed and gone.
fn type_in(child: &mut Child, keys: &[u8]) {
    child.stdin.as_mut().unwrap().write_all(keys).unwrap();
}

#[test]
fn a_container_is_left_and_come_back_to() {
    let stage = Stage::with_templates("attach");
    let before = Footprint::of_host(&stage);
    let running = || stage.json(&["inspect", "shell"])[0]["State"]["Running"] == true;

    // In the foreground, and left.
    let mut child = stage.on_a_terminal(&format!("run -it --name shell --net none {IMAGE} sh"));
    read_until(child.stdout.as_mut().unwrap(), "# ");
    type_in(&mut child, b"kept=yes\r");
    read_until(child.stdout.as_mut().unwrap(), "# ");
    type_in(&mut child, b"\x10\x11");
    read_until(child.stdout.as_mut().unwrap(), "read escape sequence");
    child.finish().expect(0);
    assert!(running());

    // Come back to, with other keys.
    let mut child = stage.on_a_terminal("attach --detach-keys=ctrl-x shell");
    // Nobody prints a prompt again.
    eventually("the shell answers", || {
        type_in(&mut child, b"\r");
        let mut piece = [0; 256];
        let count = child.stdout.as_mut().unwrap().read(&mut piece).unwrap();
        String::from_utf8_lossy(&piece[..count])
            .contains("# ")
            .then_some(())
    });
    type_in(&mut child, b"echo I am $kept here\r");
    read_until(child.stdout.as_mut().unwrap(), "I am yes here");
    type_in(&mut child, b"\x18");
    child.finish().expect(0);
    assert!(running());

    // Another command in it, left as well.
    let mut child = stage.on_a_terminal("exec -it shell sh");
    read_until(child.stdout.as_mut().unwrap(), "# ");
    type_in(&mut child, b"\x10\x11");
    child.finish().expect(0);

    let output = stage.cloister(&["attach", "shell"]).expect(1);
    assert!(output.stderr.contains("not a TTY"), "{output:#?}");
    let mut child = stage.on_a_terminal("attach shell");
    type_in(&mut child, b"exit 5\r");
    child.finish().expect(5);
    let output = stage.cloister(&["attach", "shell"]).expect(1);
    assert!(
        output
            .stderr
            .contains("You cannot attach to a stopped container, start it first"),
        "{output:#?}"
    );
    stage.cloister(&["rm", "shell"]).expect(0);
    before.assert_unchanged();
}

#[test]
fn containers_are_started_again() {
    let stage = Stage::with_templates("start");
    let before = Footprint::of_host(&stage);
    let script = "echo run >>/tmp/runs; wc -l </tmp/runs; cat; echo no >&2; exit 3";
    let create = [
        "create", "-i", "--name", "job", "--net", "none", IMAGE, "sh", "-c", script,
    ];
    let id = stage.cloister(&create).expect(0).stdout.trim().to_owned();
    assert_eq!(stage.json(&["ps", "-a", "--json"])[0]["status"], "created");
    for times in ["1", "2"] {
        // What it wrote is still there; the log has both runs.
        let mut child = stage.start(&["start", "-a", "-i", "job"]);
        let said = read_until(child.stdout.as_mut().unwrap(), "\n");
        assert_eq!(said, format!("{times}\n"));
        child.stdin.as_mut().unwrap().write_all(b"typed\n").unwrap();
        read_until(child.stdout.as_mut().unwrap(), "typed\n");
        // Its input is open for others, so it is asked to end.
        stage.cloister(&["exec", "job", "killall", "cat"]).expect(0);
        let output = child.finish().expect(3);
        assert!(output.stderr.ends_with("no\n"), "{output:#?}");
        assert_eq!(stage.json(&["inspect", "job"])[0]["State"]["ExitCode"], 3);
    }
    assert_eq!(
        stage.cloister(&["logs", "job"]).expect(0).stdout,
        "1\ntyped\n2\ntyped\n"
    );

    assert_eq!(stage.cloister(&["start", "job"]).expect(0).stdout, "job\n");
    assert_eq!(
        stage.cloister(&["start", &id]).expect(0).stdout,
        format!("{id}\n")
    );
    let child = stage.start(&["attach", "--no-stdin", "job"]);
    // A signal is passed on to the container, whose shell dies of it.
    eventually("the client listens", || {
        let caught = fs::read_to_string(format!("/proc/{}/status", child.pid())).ok()?;
        let line = caught.lines().find(|line| line.starts_with("SigCgt:"))?;
        let mask = u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok()?;
        (mask & (1 << (Signal::HUP.as_raw() - 1)) != 0).then_some(())
    });
    stage.cloister(&["restart", "-t", "0", "job"]).expect(0);
    child.finish().expect(137);
    assert_eq!(stage.json(&["ps", "--json"]).as_array().unwrap().len(), 1);

    let output = stage.cloister(&["start", "nowhere"]).expect(1);
    assert!(
        output.stderr.contains("No such container: nowhere"),
        "{output:#?}"
    );
    let output = stage.cloister(&["start", "-a", "job", "job"]).expect(1);
    assert!(output.stderr.contains("multiple containers"), "{output:#?}");
    stage.cloister(&["rm", "-f", "job"]).expect(0);
    before.assert_unchanged();
}

#[test]
fn signals_to_the_command_line() {
    let stage = Stage::with_templates("signals");
    let before = Footprint::of_host(&stage);
    let start = |script: &str| -> Child {
        let mut child = stage.start(&[RUN, &[IMAGE, "sh", "-c", script]].concat());
        read_until(child.stdout.as_mut().unwrap(), "up\n");
        eventually("it runs", || {
            (stage.json(&["ps", "--json"])[0]["status"] == "running").then_some(())
        });
        child
    };
    // The container gets it, once the command line knows that it runs: its first words may come before that.
    let child = start("trap 'exit 7' INT; sleep 1; echo up; while :; do sleep 0.1; done");
    child.signal(Signal::INT);
    child.finish().expect(7);
    // One that does not listen: the first two are its business, the third ends the VM.
    let child = start("sleep 1; echo up; exec sleep 1000");
    for _ in 0..3 {
        child.signal(Signal::INT);
        // Or the kernel makes one of them.
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
    let output = child.finish();
    assert!(
        output.code != 0 && output.stderr.contains("forcefully"),
        "{output:#?}"
    );
    before.assert_unchanged();

    // Before there is a container.
    let child = stage.start(&[RUN, &[IMAGE, "true"]].concat());
    let _record = eventually("a record", || {
        fs::read_dir(stage.state().join("pods")).unwrap().next()
    });
    child.signal(Signal::INT);
    child.finish().expect(130);
    before.assert_unchanged();
}

#[test]
fn a_flood_of_output_loses_no_byte() {
    let stage = Stage::with_busybox("flood");
    let content = pattern(50 << 20);
    let file = stage.file("flood", &content);
    let before = Footprint::of_host(&stage);
    let volume = format!("{}:/flood:ro", file.display());
    let output = run(&stage, &["-v", &volume], &["cat", "/flood"]).expect(0);
    assert_same(output.stdout.as_bytes(), &content);
    assert_eq!(output.stderr, "");
    // In and out again.
    let content = &content[..4 << 20];
    let mut child = stage.start(&[RUN, &["-i", IMAGE, "cat"]].concat());
    let mut stdin = child.stdin.take().unwrap();
    let input = content.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input).unwrap());
    let output = child.finish().expect(0);
    writer.join().unwrap();
    assert_same(output.stdout.as_bytes(), content);
    before.assert_unchanged();
}

#[test]
fn a_reader_that_does_not_read_holds_up_the_writer() {
    let stage = Stage::with_busybox("slow");
    let before = Footprint::of_host(&stage);
    let script = "exec yes $(head -c 3000 /dev/zero | tr '\\0' x)";
    let mut child = stage.start(&[RUN, &["--name", "flood", IMAGE, "sh", "-c", script]].concat());
    read_until(child.stdout.as_mut().unwrap(), "xxx");
    // Until it stands still: what is under way is in the log.
    let id = stage.json(&["ps", "--json"])[0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let log = stage.root().join("pods").join(id).join("container.log");
    let mut last = (0, 0);
    eventually("the writer stands still", || {
        let size = fs::metadata(&log).unwrap().len();
        last = if size == last.0 {
            (size, last.1 + 1)
        } else {
            (size, 0)
        };
        (last.1 > 60).then_some(())
    });
    assert!((1..8 << 20).contains(&last.0), "{} bytes are under way", last.0);
    let kib = anonymous_kib(child.pid());
    assert!(kib < 64 << 10, "{kib} KiB for what nobody reads");
    stage.cloister(&["kill", "flood"]);
    child.finish().expect(137);
    before.assert_unchanged();
}

fn fetch(address: &str) -> String {
    eventually("a page", || {
        let mut stream = TcpStream::connect(address).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").ok()?;
        let mut page = String::new();
        stream.read_to_string(&mut page).ok()?;
        (!page.is_empty()).then_some(page)
    })
}

#[test]
fn a_web_server_behind_nat() {
    let stage = Stage::with_busybox("nat");
    let before = Footprint::of_host(&stage);
    let script = "echo a page from a pod >/var/www/index.html; exec httpd -f -p 80 -h /var/www";
    let options = [
        "run",
        "-d",
        "--name",
        "web",
        "--net",
        "nat",
        "-p",
        "127.0.0.1:18080:80",
    ];
    stage
        .cloister(&[&options, &[IMAGE, "sh", "-c", script][..]].concat())
        .expect(0);
    let network = stage.json(&["inspect", "web"])[0]["NetworkSettings"].clone();
    let address = network["IPAddress"].as_str().unwrap();
    let page = fetch(&format!("{address}:80"));
    assert!(
        page.contains(" 200 OK\r\n") && page.ends_with("a page from a pod\n"),
        "{page}"
    );
    assert!(fetch("127.0.0.1:18080").ends_with("a page from a pod\n"));

    // The other way.
    let listener = TcpListener::bind((network["Gateway"].as_str().unwrap(), 0)).unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        read_until(&mut stream, "\r\n\r\n");
        stream
            .write_all(b"HTTP/1.0 200 OK\r\n\r\na page from the host\n")
            .unwrap();
        peer.ip().to_string()
    });
    let output = stage
        .cloister(&["exec", "web", "wget", "-q", "-O", "-", &url])
        .expect(0);
    assert_eq!(output.stdout, "a page from the host\n");
    assert_eq!(server.join().unwrap(), address);
    stage.cloister(&["rm", "-f", "web"]).expect(0);
    before.assert_unchanged();
}

/// KiB of a process's mappings of files whose name ends so: in memory, and its part of it where others map the same pages.
fn mapped_kib(pid: &str, name: &str) -> (u64, u64) {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut wanted, mut rss, mut pss) = (false, 0, 0);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (key, value) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if key.ends_with(':') {
            let kib = || value.parse::<u64>().unwrap();
            match key {
                "Rss:" if wanted => rss += kib(),
                "Pss:" if wanted => pss += kib(),
                _ => {}
            }
        } else {
            wanted = line.trim_end_matches(" (deleted)").ends_with(name);
        }
    }
    (rss, pss)
}

/// With a DAX window a file of an image is read from the host's pages, the same ones by all pods, and not cached in their RAM.
#[test]
fn pods_with_a_dax_window_share_an_images_pages() {
    const KIB: u64 = 24 << 10;
    let stage = Stage::with_busybox("dax");
    let before = Footprint::of_host(&stage);
    let root = stage.folder("rootfs");
    fs::create_dir(root.join("bin")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for name in ["sh", "md5sum", "sleep", "grep"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    fs::write(
        root.join("in-the-image"),
        pattern(usize::try_from(KIB << 10).unwrap()),
    )
    .unwrap();
    let script = "md5sum /in-the-image && exec sleep 100000";
    let mut sums = Vec::new();
    let figures = [("plain", None), ("one", Some("64m")), ("other", Some("64m"))].map(|(name, window)| {
        let mut options = vec!["run", "-d", "--net", "none", "--name", name];
        options.extend(window.map(|size| ["--dax", size]).iter().flatten());
        let words = ["--rootfs", root.to_str().unwrap(), "sh", "-c", script];
        stage.cloister(&[&options, &words[..]].concat()).expect(0);
        sums.push(eventually("the sum", || {
            let said = stage.cloister(&["logs", name]).expect(0).stdout;
            said.ends_with('\n').then_some(said)
        }));
        (
            name,
            stage.json(&["inspect", name])[0]["State"]["Pid"].to_string(),
        )
    });
    let figures = figures.map(|(name, pid)| {
        let said = stage
            .cloister(&["exec", name, "grep", "^Cached:", "/proc/meminfo"])
            .expect(0);
        let cached: u64 = said.stdout.split_whitespace().nth(1).unwrap().parse().unwrap();
        let (file, share) = mapped_kib(&pid, "/in-the-image");
        println!(
            "{name}: {cached} KiB cached in RAM, {file} of the file mapped, {share} of them its own part"
        );
        (cached, file, share)
    });
    let [plain, one, other] = figures;
    assert!(
        sums.iter().all(|sum| *sum == sums[0] && !sum.is_empty()),
        "{sums:?}"
    );
    assert_eq!(plain.1, 0);
    for pod in [one, other] {
        assert!(pod.1 >= KIB && pod.0 + KIB * 3 / 4 <= plain.0, "{figures:?}");
        // Half of each page is its own, at most; a page may be mapped at a third place.
        assert!(pod.2 <= KIB / 2, "{figures:?}");
    }
    for name in ["plain", "one", "other"] {
        stage.cloister(&["rm", "-f", name]).expect(0);
    }
    before.assert_unchanged();
}

#[test]
fn two_processors_and_four_gigabytes() {
    let stage = Stage::with_busybox("large");
    let before = Footprint::of_host(&stage);
    let script = "nproc; awk '/MemTotal/ { print $2 }' /proc/meminfo";
    let output = run(&stage, &["--cpus", "2", "--memory", "4g"], &["sh", "-c", script]).expect(0);
    let words: Vec<u64> = output
        .stdout
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    assert_eq!(words[0], 2);
    // Less what the kernel keeps for itself.
    assert!((4_000_000..=4 << 20).contains(&words[1]), "{words:?}");
    before.assert_unchanged();
}

#[test]
fn a_host_without_disk_space() {
    // Less than the image takes: just below 2 MiB.
    let stage = Stage::empty("full", 1);
    stage.cloister(&["ps"]).expect(0);
    let archive = Stage::busybox();
    let before = Footprint::of_host(&stage);
    let run =
        |script: &str| stage.cloister(&[RUN, &[archive.to_str().unwrap(), "sh", "-c", script]].concat());
    run("true").expect_refusal(&["No space left on device"]);
    assert_eq!(stage.json(&["images", "--json"]).as_array().unwrap().len(), 0);
    before.assert_unchanged();
    // Nothing half-done stands in the way later.
    stage.resize(16);
    let script = "dd if=/dev/zero of=/big bs=1M count=64 2>/dev/null || echo full; rm /big; echo goes on";
    assert_eq!(run(script).expect(0).stdout, "full\ngoes on\n");
    before.assert_unchanged();
}
