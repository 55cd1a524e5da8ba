// SPDX-License-Identifier: Apache-2.0
//! cloisterd as a process: what it cannot start with it says in a line, and leaves what is there as it is.

use super::{Code, ControllerClient, ControllerStatusRequest, code, dir, k8s};
use cloister_sandbox_api::daemon::uds;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// A folder with configurations in it.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

/// A daemon that is killed with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Place {
    fn new(name: &str) -> Self {
        let place = Self(dir(name));
        std::fs::write(place.0.join("kernel"), "no kernel").unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A daemon's command line, with this state folder and socket.
    fn command(&self, state: &str, socket: &str, more: &str) -> Command {
        let dir = self.0.display();
        let text = format!(
            "state_dir = '{dir}/{state}'\nsocket = '{dir}/{socket}'\ncontainerd_address = '{dir}/none.sock'\n{more}\
             [sandboxer.cloister]\nkernel = '{dir}/kernel'\ninitrd = '{dir}/kernel'\n"
        );
        let config = self.path("config.toml");
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_cloisterd"));
        command.arg("--config").arg(config).env_remove("NOTIFY_SOCKET");
        command
    }

    /// One that serves.
    async fn daemon(&self, state: &str, socket: &str) -> Daemon {
        let mut command = self.command(state, socket, "");
        let mut daemon = Daemon(command.stderr(Stdio::null()).spawn().unwrap());
        for _ in 0..3000 {
            assert!(daemon.0.try_wait().unwrap().is_none(), "it ended");
            if tokio::net::UnixStream::connect(self.path(socket)).await.is_ok() {
                return daemon;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it does not listen");
    }

    async fn serves(&self, socket: &str) {
        let channel = uds::channel(&self.path(socket)).await.unwrap();
        let request = ControllerStatusRequest {
            sandbox_id: "a".into(),
            ..Default::default()
        };
        let answer = ControllerClient::new(channel).status(k8s(request)).await;
        assert_eq!(code(answer).0, Code::NotFound);
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// What a daemon says that cannot start.
async fn refused(mut command: Command) -> String {
    let output: Output = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap_or_default();
    assert!(last.starts_with("cloisterd: "), "{said}");
    last.to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_does_not_start_and_the_first_goes_on() {
    let place = Place::new("two");
    let first = place.daemon("one", "s.sock").await;
    let said = refused(place.command("two", "s.sock", "")).await;
    let socket = place.path("s.sock");
    assert!(said.contains("another process listens there"), "{said}");
    assert!(said.contains(socket.to_str().unwrap()), "{said}");
    let said = refused(place.command("one", "other.sock", "")).await;
    let number = format!("process {}", first.0.id());
    assert!(
        said.contains("another cloisterd") && said.contains(&number),
        "{said}"
    );
    assert!(!place.path("other.sock").exists());
    place.serves("s.sock").await;

    // One that is killed leaves its sockets, and is in nobody's way.
    drop(first);
    assert!(socket.exists() && place.path("one/admin.sock").exists());
    let _second = place.daemon("one", "s.sock").await;
    place.serves("s.sock").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_it_cannot_use_is_named_and_left_alone() {
    let place = Place::new("unusable");
    std::fs::write(place.path("file"), "mine").unwrap();
    std::os::unix::fs::symlink(place.path("nowhere"), place.path("link")).unwrap();
    for (state, socket, more, told) in [
        (
            "file/state",
            "s.sock",
            "",
            "cannot use the state directory DIR/file/state: Not a directory",
        ),
        (
            "file",
            "s.sock",
            "",
            "cannot use the state directory DIR/file: File exists",
        ),
        (
            "state",
            "file",
            "",
            "cannot listen on DIR/file: something is there that is no socket",
        ),
        (
            "state",
            "link",
            "",
            "cannot listen on DIR/link: something is there that is no socket",
        ),
        (
            "state",
            "file/s.sock",
            "",
            "cannot listen on DIR/file/s.sock: File exists",
        ),
        (
            "new",
            "s.sock",
            "sokcet = 1\n",
            "DIR/config.toml:4: unknown key \"sokcet\" at the top; did you mean \"socket\"?",
        ),
        ("new", "../s.sock", "", "DIR/config.toml:2: socket: "),
    ] {
        let said = refused(place.command(state, socket, more)).await;
        let told = told.replace("DIR", place.0.to_str().unwrap());
        assert!(said.contains(&told), "{said}\nis not\n{told}");
    }
    assert_eq!(place.names(), ["config.toml", "file", "kernel", "link", "state"]);
    assert_eq!(std::fs::read(place.path("file")).unwrap(), b"mine");
    let sockets = [Path::new("state/admin.sock"), Path::new("state/s.sock")];
    assert!(sockets.iter().all(|socket| !place.0.join(socket).exists()));
}
