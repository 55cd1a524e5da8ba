// SPDX-License-Identifier: Apache-2.0
//! A VM whose init is a shell script of the test's: `say WORDS` in it is heard by [`Guest::heard`], `read -r go` waits
//! for [`Guest::go`].

use cloister_boot::x86_64::Description;
use cloister_tests::e2e::{PATIENCE, archive, eventually, guest_file};
use cloister_vmm::config::BASE_COMMAND_LINE;
use cloister_vmm::{Boot, Cell, CellConfig, CellHost, CellHostConfig, CellState, KernelBoot, StopReason};
use std::collections::HashMap;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

const PROLOGUE: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
export PATH=/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
say() { echo \"SAY $*\"; }
";

const EPILOGUE: &str = "
say end
reboot -f
";

/// What goes into the initramfs.
pub struct Init {
    name: &'static str,
    files: Vec<(String, Vec<u8>)>,
}

impl Init {
    pub fn new(name: &'static str, script: &str) -> Self {
        let busybox = fs::read("/bin/busybox").expect("busybox-static is missing: run ci/setup");
        let script = format!("{PROLOGUE}{script}{EPILOGUE}");
        Self {
            name,
            files: vec![
                ("bin/busybox".to_owned(), busybox),
                ("init".to_owned(), script.into_bytes()),
            ],
        }
    }

    pub fn add(&mut self, name: String, content: Vec<u8>) {
        self.files.push((name, content));
    }

    fn pack(&self) -> File {
        let files: Vec<(&str, &[u8])> = self
            .files
            .iter()
            .map(|(name, content)| (name.as_str(), content.as_slice()))
            .collect();
        let path = std::env::temp_dir().join(format!("e2e-{}-{}.cpio", std::process::id(), self.name));
        fs::write(&path, archive(&files)).unwrap();
        let file = File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        file
    }
}

/// A program of the host as /sbin's, with the libraries that it needs at the places where it looks for them.
pub fn with_libraries(program: &str) -> Vec<(String, Vec<u8>)> {
    let listed = Command::new("ldd").arg(program).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let libraries = listed
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(|path| (path.trim_start_matches('/').to_owned(), fs::read(path).unwrap()));
    let name = PathBuf::from(program).file_name().unwrap().to_owned();
    let mut files: Vec<_> = libraries.collect();
    assert!(!files.is_empty(), "{program} is missing or static");
    files.push((
        format!("sbin/{}", name.to_str().unwrap()),
        fs::read(program).unwrap(),
    ));
    files
}

/// The shared threads, with one VM behind them: what is made once is there now.
pub fn host() -> CellHost {
    let host = CellHost::new(CellHostConfig::default()).unwrap();
    let guest = Guest::start(&host, &Init::new("first", ""), |_| {});
    assert_eq!(guest.ends(), StopReason::Reset);
    host
}

/// Has the kernel boot with other words than the usual.
pub fn command_line(config: &mut CellConfig, words: &str) {
    let Boot::Kernel(boot) = &mut config.boot else {
        panic!("not booted from a kernel")
    };
    boot.command_line = format!("{BASE_COMMAND_LINE} {words}");
}

/// A running VM.
pub struct Guest {
    pub cell: Cell,
    heard: std::cell::RefCell<HashMap<String, usize>>,
}

impl Guest {
    pub fn start(host: &CellHost, init: &Init, adapt: impl FnOnce(&mut CellConfig)) -> Self {
        let boot = KernelBoot {
            kernel: File::open(guest_file("vmlinux")).unwrap(),
            initrd: Some(init.pack()),
            command_line: String::new(),
            description: Description::MpTable,
        };
        let mut config = CellConfig::new(init.name, Boot::Kernel(boot));
        config.memory_mib = 128;
        command_line(&mut config, "console=ttyS0");
        adapt(&mut config);
        let cell = Cell::create(config, host).unwrap();
        cell.start().unwrap();
        Self {
            cell,
            heard: std::cell::RefCell::default(),
        }
    }

    /// All that the guest said.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.cell.console_tail().bytes()).into_owned()
    }

    fn said(&self) -> Vec<String> {
        let console = self.console();
        // The last line may not be whole.
        let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole
            .lines()
            .filter_map(|line| line.trim_end().strip_prefix("SAY "))
            .map(str::to_owned)
            .collect()
    }

    pub fn has_said(&self, words: &str) -> bool {
        self.said().iter().any(|line| line == words)
    }

    /// Waits until the guest says `word` once more than it has been heard, and answers what follows it.
    #[track_caller]
    pub fn heard(&self, word: &str) -> String {
        let mut heard = self.heard.borrow_mut();
        let skip = heard.entry(word.to_owned()).or_default();
        let answer = eventually(word, || {
            // In this order: what it said last was said before it ended.
            let ended = self.cell.state();
            let of_word = |line: &String| line.split(' ').next() == Some(word);
            let found = self.said().into_iter().filter(of_word).nth(*skip);
            if found.is_none()
                && let CellState::Stopped(reason) = ended
            {
                panic!("{reason}, and never said {word}: {}", self.console());
            }
            found
        });
        *skip += 1;
        answer[word.len()..].trim_start().to_owned()
    }

    /// Lets a script that waits go on.
    pub fn go(&self) {
        assert_eq!(self.cell.serial_input(b"go\n"), 3);
    }

    #[track_caller]
    pub fn ends(&self) -> StopReason {
        let reason = self.cell.wait(Some(PATIENCE)).expect("does not end");
        assert!(self.cell.wait_taken_down(Some(PATIENCE)), "is not taken down");
        reason
    }
}
