// SPDX-License-Identifier: Apache-2.0
//! The pods that containerd made: they live in `cloisterd`, which is asked over its socket for operators
//! ([`admin`](crate::daemon::admin)). Of a daemon that does not run, its records say what there was.

pub mod bundle;
pub mod console;
pub mod events;
pub mod list;
mod logs;
pub mod target;

pub use logs::logs;

use super::{Context, Failure, Outcome, client};
use crate::daemon::report::Pod;
use crate::daemon::sandbox::{Exit, Phase, Record};
use crate::daemon::{admin, http_client, report, workers};
use crate::pod::state::EXIT_KILLED;
use http::StatusCode;
use http_body_util::BodyExt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// More is no answer of the daemon's.
const MAX_ANSWER: usize = 64 << 20;
/// Time for the daemon to begin its answer: it may have to ask many VMs.
const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon that runs.
#[derive(Debug)]
pub struct Daemon {
    socket: PathBuf,
}

/// The pods that there are.
#[derive(Debug)]
pub struct Known {
    /// Oldest first.
    pub pods: Vec<Pod>,
    /// None if it does not run: its pods are over, but for those in workers.
    pub daemon: Option<Daemon>,
}

/// Why there is no answer.
enum Unanswered {
    /// Nobody listens.
    NotRunning,
    Other(Failure),
}

impl From<Failure> for Unanswered {
    fn from(failure: Failure) -> Self {
        Self::Other(failure)
    }
}

impl Known {
    /// Asks the daemon of the state folder, or looks at what it left there.
    pub fn pods(context: &Context) -> Outcome<Self> {
        let daemon = Daemon {
            socket: admin::socket(&context.state),
        };
        match daemon.collect("/pods") {
            Ok(json) => Ok(Self {
                pods: serde_json::from_slice(&json)?,
                daemon: Some(daemon),
            }),
            Err(Unanswered::NotRunning) => Ok(Self {
                pods: left_behind(&context.state)?,
                daemon: None,
            }),
            Err(Unanswered::Other(failure)) => Err(failure),
        }
    }

    /// The daemon, which must run.
    pub fn daemon(&self, context: &Context) -> Outcome<&Daemon> {
        self.daemon.as_ref().ok_or_else(|| not_running(context))
    }
}

fn not_running(context: &Context) -> Failure {
    Failure::new(format!(
        "cloisterd is not running (nobody answers on {}); its pods ended with it, but for those in workers: start it with `systemctl start cloisterd`",
        admin::socket(&context.state).display()
    ))
}

/// The records of a daemon that does not run, oldest first. What cannot be read is skipped with a warning. Pods in workers go on
/// without it.
fn left_behind(state: &Path) -> Outcome<Vec<Pod>> {
    let dir = &state.join("sandboxes");
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Failure::new(format!("cannot list {}: {e}", dir.display()))),
    };
    let mut pods = Vec::new();
    for entry in entries {
        let path = entry?.path();
        match Record::read(&path) {
            Ok(record) => {
                let mut pod = Pod::from_record(&record, path.join("task.sock"));
                match record
                    .worker
                    .as_deref()
                    .and_then(|name| workers::running(state, name))
                {
                    Some(socket) => {
                        // What it does not tell, the record does.
                        if let Ok(details) = (Daemon { socket }).details(&pod.id) {
                            pod = details.pod;
                        }
                    }
                    None => end(&mut pod),
                }
                pods.push(pod);
            }
            Err(error) => log::warn!("{}: {error}", path.display()),
        }
    }
    pods.sort_by(|a, b| a.created.cmp(&b.created).then_with(|| a.id.cmp(&b.id)));
    Ok(pods)
}

/// What its record says of how a pod ended is so; any other ended with the daemon.
fn end(pod: &mut Pod) {
    let ended = pod.exit.take().filter(|_| pod.phase == Phase::Stopped);
    let exit = ended.unwrap_or(Exit {
        status: EXIT_KILLED,
        at: pod.started.unwrap_or(pod.created),
        reason: None,
    });
    pod.phase = Phase::Stopped;
    pod.exit = Some(Exit {
        reason: exit.reason.or(Some("cloisterd is not running".to_owned())),
        ..exit
    });
}

impl Daemon {
    /// What it answers for a path.
    pub fn get(&self, path: &str) -> Outcome<Vec<u8>> {
        self.collect(path).map_err(|unanswered| self.failure(unanswered))
    }

    /// All that is known of a pod.
    pub fn details(&self, id: &str) -> Outcome<report::Details> {
        Ok(serde_json::from_slice(&self.get(&format!("/pods/{id}"))?)?)
    }

    fn failure(&self, unanswered: Unanswered) -> Failure {
        match unanswered {
            Unanswered::NotRunning => Failure::new("cloisterd has ended"),
            Unanswered::Other(failure) => failure,
        }
    }

    fn collect(&self, path: &str) -> Result<Vec<u8>, Unanswered> {
        let mut answer = Vec::new();
        self.exchange(path, &mut |piece: &[u8]| {
            if answer.len().saturating_add(piece.len()) > MAX_ANSWER {
                return Err(Failure::new(format!("cloisterd answers {path} with too much")));
            }
            answer.extend_from_slice(piece);
            Ok(true)
        })?;
        Ok(answer)
    }

    /// Hands over what it answers piece by piece, until `each` is content, or the answer ends.
    pub fn follow(&self, path: &str, mut each: impl FnMut(&[u8]) -> Outcome<bool>) -> Outcome<()> {
        self.exchange(path, &mut each)
            .map_err(|unanswered| self.failure(unanswered))
    }

    fn exchange(&self, path: &str, each: &mut dyn FnMut(&[u8]) -> Outcome<bool>) -> Result<(), Unanswered> {
        client::runtime()?.block_on(async {
            let failed = |error: &dyn std::fmt::Display| {
                Failure::new(format!(
                    "cannot ask cloisterd at {}: {error}",
                    self.socket.display()
                ))
            };
            let answer = http_client::get(&self.socket, path, PATIENCE)
                .await
                .map_err(|e| match e.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Unanswered::NotRunning,
                    _ => failed(&e).into(),
                })?;
            let status = answer.status();
            let mut body = answer.into_body();
            let mut refusal = Vec::new();
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|e| failed(&e))?;
                let Some(piece) = frame.data_ref() else { continue };
                if status != StatusCode::OK {
                    refusal.extend_from_slice(piece);
                } else if !each(piece)? {
                    break;
                }
            }
            if status == StatusCode::OK {
                return Ok(());
            }
            let refusal = String::from_utf8_lossy(&refusal);
            Err(Failure::new(refusal.trim_end()).into())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(dir: &Path) -> Context {
        Context {
            root: dir.join("lib"),
            state: dir.to_owned(),
        }
    }

    #[test]
    fn a_daemon_that_does_not_run_leaves_its_records() {
        let dir = std::env::temp_dir().join(format!("cloister-left-{}", crate::ids::random_hex(6)));
        let context = context(&dir);
        // Not even the state folder is there: nobody has used the daemon.
        assert!(Known::pods(&context).unwrap().pods.is_empty());
        let made = dir.join("sandboxes/abc");
        std::fs::create_dir_all(&made).unwrap();
        std::fs::create_dir_all(dir.join("sandboxes/junk")).unwrap();
        let record = Record {
            id: "abc".into(),
            namespace: "k8s.io".into(),
            sandboxer: "cloister".into(),
            worker: None,
            plan: crate::daemon::pod_plan::PodPlan {
                name: "web".into(),
                namespace: "shop".into(),
                ..Default::default()
            },
            netns: String::new(),
            phase: Phase::Ready,
            created: 5,
            started: Some(7),
            exit: None,
            steps: Vec::new(),
        };
        std::fs::write(made.join("sandbox.json"), serde_json::to_vec(&record).unwrap()).unwrap();
        // A socket that nobody answers on.
        drop(std::os::unix::net::UnixListener::bind(dir.join("admin.sock")).unwrap());
        let known = Known::pods(&context).unwrap();
        assert_eq!(known.pods.len(), 1);
        let pod = &known.pods[0];
        assert_eq!((pod.name.as_str(), pod.phase), ("web", Phase::Stopped));
        let exit = pod.exit.as_ref().unwrap();
        assert!(exit.reason.as_ref().unwrap().contains("not running"));
        let failure = known.daemon(&context).unwrap_err();
        assert!(
            failure.message.contains("systemctl start cloisterd"),
            "{failure:?}"
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
