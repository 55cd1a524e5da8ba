// SPDX-License-Identifier: Apache-2.0
//! The last steps of a container's process before it becomes the program: find it, set its environment, execute it.
//!
//! Runs in the forked child, inside the container's namespaces, as its user. In place of libcontainer's default one for
//! two reasons: the errors carry the words docker and containerd look for to choose between exit codes 126 and 127, and
//! the environment is handed over as it was given, in its order, without passing through this process's own.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use cloister_protocol::pod::Seccomp;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use rustix::fs::{Access, AtFlags, CWD, accessat};

use crate::helper::say;

/// Search path of a container that has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// See the module.
#[derive(Clone)]
pub struct AgentExecutor(Rc<Inner>);

struct Inner {
    control: File,
    /// Say on stderr that the program did not execute: for a container's first process nobody listens any more.
    on_stderr: bool,
    program: RefCell<PathBuf>,
    env: RefCell<HashMap<String, String>>,
    /// Profile to load last of all.
    seccomp: Option<Seccomp>,
}

impl AgentExecutor {
    /// `control` is the helper's control pipe.
    pub fn new(control: File, on_stderr: bool, seccomp: Option<Seccomp>) -> Self {
        let (program, env) = (RefCell::default(), RefCell::default());
        Self(Rc::new(Inner {
            control,
            on_stderr,
            program,
            env,
            seccomp,
        }))
    }
}

fn args(spec: &Spec) -> Option<&[String]> {
    spec.process()
        .as_ref()?
        .args()
        .as_deref()
        .filter(|args| !args.is_empty())
}

fn env(spec: &Spec) -> &[String] {
    spec.process()
        .as_ref()
        .and_then(|p| p.env().as_deref())
        .unwrap_or_default()
}

/// Whether this process may execute `path`, with the reason if not.
fn executable(path: &Path) -> Result<(), &'static str> {
    match path.metadata() {
        Err(e) if e.raw_os_error() == Some(libc::EACCES) => Err("permission denied"),
        Err(e) if e.raw_os_error() == Some(libc::ENOTDIR) => Err("not a directory"),
        Err(e) if e.raw_os_error() == Some(libc::ELOOP) => Err("too many levels of symbolic links"),
        Err(_) => Err("no such file or directory"),
        Ok(meta) if meta.is_dir() => Err("is a directory"),
        Ok(_) => accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS).map_err(|_| "permission denied"),
    }
}

/// Finds the program as execvp(3) would; the error is worded as runc's.
fn find(name: &str, search: &str) -> Result<PathBuf, String> {
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(reason @ "no such file or directory") => {
                Err(format!("exec: {name:?}: stat {name}: {reason}"))
            }
            Err(reason) => Err(format!("exec: {name:?}: {reason}")),
        };
    }
    let mut denied = false;
    for dir in search.split(':') {
        let path = Path::new(if dir.is_empty() { "." } else { dir }).join(name);
        match executable(&path) {
            Ok(()) => return Ok(path),
            Err("permission denied") => denied = true,
            Err(_) => {}
        }
    }
    if denied {
        return Err(format!("exec: {name:?}: permission denied"));
    }
    Err(format!("exec: {name:?}: executable file not found in $PATH"))
}

/// The environment for execve: the spec's entries in their order, then what libcontainer added (HOME). Of a repeated
/// name the last value counts, in the place of the first.
fn environment(given: &[String], complete: &HashMap<String, String>) -> Vec<CString> {
    let mut seen = std::collections::HashSet::new();
    let mut result = Vec::with_capacity(given.len() + 1);
    let values: HashMap<&str, &str> = given.iter().filter_map(|e| e.split_once('=')).collect();
    for (name, _) in given.iter().filter_map(|e| e.split_once('=')) {
        if seen.insert(name) {
            result.extend(
                values
                    .get(name)
                    .and_then(|value| CString::new(format!("{name}={value}")).ok()),
            );
        }
    }
    for (name, value) in complete {
        if seen.insert(name) {
            result.extend(CString::new(format!("{name}={value}")).ok());
        }
    }
    if !seen.contains("HOME") {
        result.push(c"HOME=/".to_owned());
    }
    result
}

impl Executor for AgentExecutor {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let fail = |reason: String| {
            say(&self.0.control, 'X', &reason);
            Err(ExecutorValidationError::ArgValidationError(reason))
        };
        let Some(args) = args(spec) else {
            return fail("exec: no command was given".to_owned());
        };
        let search = env(spec)
            .iter()
            .rev()
            .find_map(|e| e.strip_prefix("PATH="))
            .unwrap_or(DEFAULT_PATH);
        match find(&args[0], search) {
            Ok(path) => {
                *self.0.program.borrow_mut() = path;
                Ok(())
            }
            Err(reason) => fail(reason),
        }
    }

    fn setup_envs(&self, envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        *self.0.env.borrow_mut() = envs;
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let args = args(spec).ok_or(ExecutorError::InvalidArg)?;
        let text = |s: &OsStr| CString::new(s.as_bytes()).map_err(|_| ExecutorError::InvalidArg);
        let program = text(self.0.program.borrow().as_os_str())?;
        let args = args
            .iter()
            .map(|a| text(OsStr::new(a)))
            .collect::<Result<Vec<_>, _>>()?;
        let env = environment(env(spec), &self.0.env.borrow());
        let pointers = |strings: &[CString]| {
            strings
                .iter()
                .map(|s| s.as_ptr())
                .chain([std::ptr::null()])
                .collect::<Vec<_>>()
        };
        let (argv, envp) = (pointers(&args), pointers(&env));
        if let Some(seccomp) = &self.0.seccomp {
            crate::seccomp::load(seccomp).map_err(|reason| {
                say(&self.0.control, 'X', &reason);
                if self.0.on_stderr {
                    eprintln!("{reason}");
                }
                ExecutorError::Other(reason)
            })?;
        }
        // PID 1 ignores SIGPIPE and so did the helper; programs expect the default.
        // SAFETY: one thread; sets no handler.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        // SAFETY: both arrays are NULL-terminated arrays of C strings, all of which live until the call returns.
        unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
        let error = io::Error::last_os_error();
        let reason = format!("exec {}: {}", program.to_string_lossy(), reason(&error));
        say(&self.0.control, 'X', &reason);
        if self.0.on_stderr {
            eprintln!("{reason}");
        }
        Err(ExecutorError::Other(reason))
    }
}

/// The words of C, without the number Rust adds.
fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOEXEC) => "exec format error".to_owned(),
        Some(libc::ENOENT) => "no such file or directory".to_owned(),
        Some(libc::EACCES) => "permission denied".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_a_shell_finds_them() {
        assert_eq!(find("sh", "/nowhere:/bin").unwrap(), Path::new("/bin/sh"));
        assert_eq!(find("/bin/sh", "").unwrap(), Path::new("/bin/sh"));
    }

    #[test]
    fn errors_carry_the_words_docker_looks_for() {
        assert_eq!(
            find("no-such-thing", "/bin").unwrap_err(),
            "exec: \"no-such-thing\": executable file not found in $PATH"
        );
        assert_eq!(
            find("/no/x", "").unwrap_err(),
            "exec: \"/no/x\": stat /no/x: no such file or directory"
        );
        assert_eq!(
            find("/etc/passwd", "").unwrap_err(),
            "exec: \"/etc/passwd\": permission denied"
        );
        assert_eq!(
            find("passwd", "/etc").unwrap_err(),
            "exec: \"passwd\": permission denied"
        );
        assert_eq!(find("/etc", "").unwrap_err(), "exec: \"/etc\": is a directory");
        assert_eq!(
            find("/etc/passwd/x", "").unwrap_err(),
            "exec: \"/etc/passwd/x\": not a directory"
        );
    }

    #[test]
    fn there_is_always_a_home() {
        assert_eq!(environment(&[], &HashMap::new()), [c"HOME=/".to_owned()]);
    }

    #[test]
    fn the_environment_keeps_its_order_and_the_last_value() {
        let given = ["B=1", "A=2", "B=3=4", "nonsense", "C="].map(str::to_owned);
        let complete = HashMap::from([
            ("HOME".to_owned(), "/root".to_owned()),
            ("A".to_owned(), "no".to_owned()),
        ]);
        let got: Vec<_> = environment(&given, &complete)
            .into_iter()
            .map(|s| s.into_string().unwrap())
            .collect();
        assert_eq!(got, ["B=3=4", "A=2", "C=", "HOME=/root"]);
    }
}
