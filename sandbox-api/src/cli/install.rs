// SPDX-License-Identifier: Apache-2.0
//! `install` and `uninstall`: what a node needs besides the programs for containerd to have its pods made here.
//!
//! # Theory of operation
//!
//! ```text
//!  what is wanted ─┬─ compared with what is there and with the record of what we wrote ─▶ plan ─▶ done ─▶ record
//!                  └─ something of somebody else's is in the way ─▶ nothing is done
//! ```
//! The record (`/var/lib/cloister/install.json`) has each file's digest: a file that is no longer as we wrote it is its
//! editor's, and neither replaced nor removed. So both commands can be repeated.

use super::args::{InstallArgs, UninstallArgs};
use super::{Failure, Outcome, install_files, print, print_json, shim};
use crate::daemon::config::{Config, DEFAULT_PATH, DEFAULT_TEXT};
use crate::files;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const RECORD: &str = "/var/lib/cloister/install.json";
const CONTAINERD: &str = "/etc/containerd/config.toml";
const DROP_INS: &str = "/etc/containerd/conf.d";
const DROP_IN: &str = "/etc/containerd/conf.d/cloister.toml";
const CLASSES: &str = "/etc/cloister/runtimeclass.yaml";
const UNIT: &str = "/etc/systemd/system/cloisterd.service";
/// Where a package has it.
const PACKAGED_UNIT: &str = "/usr/lib/systemd/system/cloisterd.service";
const IMPORTS: &str = "imports = [\"/etc/containerd/conf.d/*.toml\"] # added by `cloister install`\n";

/// What was installed: by path, as on the node.
#[derive(Debug, Default, PartialEq, Deserialize, Serialize)]
struct Record {
    files: BTreeMap<PathBuf, Made>,
    /// Folders, from the outermost on.
    folders: Vec<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Made {
    /// A file, by the SHA-256 of its bytes.
    File(String),
    /// A symbolic link.
    Link(PathBuf),
    /// A line in a file of somebody else's.
    Line,
}

/// Something that is wanted.
enum Wish {
    File {
        text: String,
        keep_edited: bool,
    },
    Link(PathBuf),
    /// containerd's configuration must import ours.
    Imports,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Action {
    Create,
    Update,
    Unchanged,
    /// It is not ours, or no longer.
    Keep,
    Remove,
}

#[derive(Debug, Serialize)]
struct Step {
    path: PathBuf,
    action: Action,
    /// What will be there; not shown.
    #[serde(skip)]
    made: Option<Made>,
    #[serde(skip)]
    text: String,
}

/// A node's file system, or a folder that will be one.
struct Target<'a>(&'a Path);

impl Target<'_> {
    fn at(&self, path: &Path) -> PathBuf {
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn record(&self) -> Outcome<Record> {
        match fs::read(self.at(Path::new(RECORD))) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes)
                .map_err(|e| Failure::new(format!("{RECORD} is damaged: {e}; remove it to start anew")))?),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Record::default()),
            Err(e) => Err(failed("read", Path::new(RECORD))(e)),
        }
    }

    fn save(&self, record: &Record) -> Outcome<()> {
        let path = self.at(Path::new(RECORD));
        files::replace(&path, &serde_json::to_vec_pretty(record)?).map_err(failed("write", &path))
    }

    fn read(&self, path: &Path) -> Outcome<Option<String>> {
        match fs::read_to_string(self.at(path)) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed("read", path)(e)),
        }
    }

    /// Folders that must be made for a file, from the outermost on.
    fn missing_folders(&self, path: &Path) -> Vec<PathBuf> {
        let mut missing: Vec<PathBuf> = path
            .ancestors()
            .skip(1)
            .take_while(|folder| !self.at(folder).exists())
            .map(Path::to_owned)
            .collect();
        missing.reverse();
        missing
    }

    fn write(&self, path: &Path, text: &str) -> Outcome<()> {
        let at = self.at(path);
        files::replace(&at, text.as_bytes()).map_err(failed("write", &at))?;
        fs::set_permissions(&at, fs::Permissions::from_mode(0o644)).map_err(failed("write", &at))
    }
}

fn failed<'a>(verb: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Failure + 'a {
    move |error| Failure::new(format!("cannot {verb} {}: {error}", path.display()))
}

fn digest(text: &str) -> String {
    Sha256::digest(text)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

pub fn install(args: &InstallArgs) -> Outcome {
    let program = std::env::current_exe().and_then(|path| path.canonicalize())?;
    let target = Target(&args.destdir);
    let steps = install_at(&target, &program, args.force, args.dry_run)?;
    if args.json {
        print_json(&steps)?;
        return Ok(0);
    }
    print(&table(&steps, args.dry_run))?;
    if !args.dry_run && steps.iter().any(|step| step.action != Action::Unchanged) {
        print(&format!(
            "Next, on the node:\n  systemctl daemon-reload && systemctl enable --now cloisterd\n  systemctl restart containerd\nand once for the cluster:\n  kubectl apply -f {CLASSES}\n"
        ))?;
    }
    Ok(0)
}

/// The files that a node needs.
fn wishes(target: &Target<'_>, program: &Path) -> Outcome<Vec<(PathBuf, Wish)>> {
    let config = Config::load_or_default(&target.at(Path::new(DEFAULT_PATH)))
        .map_err(|e| Failure::new(crate::error::chain(&e)))?;
    let file = |path: &str, text, keep_edited| (PathBuf::from(path), Wish::File { text, keep_edited });
    let mut wishes = vec![
        file(DEFAULT_PATH, DEFAULT_TEXT.to_owned(), true),
        file(DROP_IN, install_files::containerd(&config), false),
        (CONTAINERD.into(), Wish::Imports),
        file(CLASSES, install_files::runtime_classes(&config), false),
    ];
    let folder = program.parent().unwrap_or(Path::new("/usr/bin"));
    if !target.at(Path::new(PACKAGED_UNIT)).exists() {
        wishes.push(file(UNIT, install_files::unit(&folder.join("cloisterd")), false));
    }
    // Where containerd looks: its PATH, as systemd sets it.
    let packaged = Path::new("/usr/bin").join(shim::NAME);
    if fs::read_link(target.at(&packaged)).is_err() {
        wishes.push((
            Path::new("/usr/local/bin").join(shim::NAME),
            Wish::Link(program.to_owned()),
        ));
    }
    Ok(wishes)
}

fn install_at(target: &Target<'_>, program: &Path, force: bool, dry_run: bool) -> Outcome<Vec<Step>> {
    let mut record = target.record()?;
    let mut steps = Vec::new();
    let mut in_the_way = Vec::new();
    for (path, wish) in wishes(target, program)? {
        match plan(target, &record, &path, wish, force) {
            Ok(step) => steps.push(step),
            Err(failure) => in_the_way.push(failure.message),
        }
    }
    if !in_the_way.is_empty() {
        in_the_way.push("nothing was changed".to_owned());
        return Err(Failure::new(in_the_way.join("\ncloister: ")));
    }
    if !dry_run {
        // The record first: what it does not know is never removed.
        let paths = steps
            .iter()
            .map(|step| step.path.as_path())
            .chain([Path::new(RECORD)]);
        for folder in paths
            .flat_map(|path| target.missing_folders(path))
            .collect::<Vec<_>>()
        {
            let at = target.at(&folder);
            if !at.exists() {
                fs::create_dir(&at).map_err(failed("make", &at))?;
                record.folders.push(folder);
            }
        }
        for step in &steps {
            carry_out(target, step, &mut record, force)?;
            target.save(&record)?;
        }
    }
    Ok(steps)
}

fn plan(target: &Target<'_>, record: &Record, path: &Path, wish: Wish, force: bool) -> Outcome<Step> {
    let ours = record.files.get(path);
    let step = |action, made, text| {
        Ok(Step {
            path: path.to_owned(),
            action,
            made,
            text,
        })
    };
    let refused = || {
        Err(Failure::new(format!(
            "{} is there and not as `cloister install` left it: move it away, or use --force, which keeps it as {}",
            path.display(),
            backup(path).display()
        )))
    };
    match wish {
        Wish::File { text, keep_edited } => {
            let made = Made::File(digest(&text));
            match target.read(path)? {
                None => step(Action::Create, Some(made), text),
                Some(found) if found == text => step(Action::Unchanged, ours.is_some().then_some(made), text),
                Some(found) if ours == Some(&Made::File(digest(&found))) => {
                    step(Action::Update, Some(made), text)
                }
                Some(_) if keep_edited => step(Action::Keep, None, text),
                Some(_) if force => step(Action::Update, Some(made), text),
                Some(_) => refused(),
            }
        }
        Wish::Link(to) => {
            let found = fs::symlink_metadata(target.at(path))
                .ok()
                .map(|_| fs::read_link(target.at(path)).ok());
            let made = Made::Link(to.clone());
            match found {
                None => step(Action::Create, Some(made), String::new()),
                Some(Some(found)) if found == to => {
                    step(Action::Unchanged, ours.is_some().then_some(made), String::new())
                }
                Some(Some(found)) if ours == Some(&Made::Link(found.clone())) => {
                    step(Action::Update, Some(made), String::new())
                }
                Some(_) if force => step(Action::Update, Some(made), String::new()),
                Some(_) => refused(),
            }
        }
        Wish::Imports => match target.read(path)? {
            None => {
                let text = format!("version = 3\n{IMPORTS}");
                let made = Made::File(digest(&text));
                step(Action::Create, Some(made), text)
            }
            Some(found) => match with_imports(&found)? {
                None => step(Action::Unchanged, ours.cloned(), found),
                Some(text) => step(Action::Update, Some(Made::Line), text),
            },
        },
    }
}

/// containerd's configuration with ours imported, if it is not yet.
fn with_imports(text: &str) -> Outcome<Option<String>> {
    let fail = |why: String| Err(Failure::new(format!("{CONTAINERD} {why}")));
    let table: toml::Table = match text.parse() {
        Ok(table) => table,
        Err(error) => return fail(format!("is no TOML: {error}")),
    };
    match table.get("version").and_then(toml::Value::as_integer) {
        Some(3) => {}
        Some(other) => {
            return fail(format!(
                "has version {other}, which is not containerd 2's: see `containerd config migrate`"
            ));
        }
        None => return fail("names no version: see `containerd config migrate`".to_owned()),
    }
    match table
        .get("imports")
        .map(|imports| imports.as_array().cloned().unwrap_or_default())
    {
        Some(imports) if imports.iter().filter_map(toml::Value::as_str).any(imports_ours) => Ok(None),
        // What is between these brackets is somebody's.
        Some(imports) if !imports.is_empty() => fail(format!(
            "imports other files only: add \"{DROP_INS}/*.toml\" to its `imports`"
        )),
        found => {
            // Before the first table, in place of an empty one.
            let mut lines: Vec<&str> = text.split_inclusive('\n').collect();
            if found.is_some() {
                let empty = |line: &&str| line.trim_start().starts_with("imports") && line.contains("[]");
                match lines.iter().position(empty) {
                    Some(at) => drop(lines.remove(at)),
                    None => {
                        return fail(format!(
                            "has an empty `imports`: write \"{DROP_INS}/*.toml\" into it"
                        ));
                    }
                }
            }
            let at = lines
                .iter()
                .position(|line| line.trim_start().starts_with("version"))
                .map_or(0, |at| at + 1);
            let break_line = at > 0 && lines.get(at - 1).is_some_and(|line| !line.ends_with('\n'));
            lines.insert(at, IMPORTS);
            if break_line {
                lines.insert(at, "\n");
            }
            let text = lines.concat();
            // Not in the middle of something that only looked like a line of its own.
            let sound = text
                .parse::<toml::Table>()
                .is_ok_and(|table| table.get("imports").is_some());
            if sound {
                Ok(Some(text))
            } else {
                fail(format!("is too unusual to change: add `{}`", IMPORTS.trim_end()))
            }
        }
    }
}

/// Whether a pattern in `imports` has our drop-in; relative ones begin at the file that imports.
fn imports_ours(pattern: &str) -> bool {
    let pattern = Path::new("/etc/containerd").join(pattern);
    [
        DROP_IN,
        "/etc/containerd/conf.d/*.toml",
        "/etc/containerd/conf.d/*",
    ]
    .iter()
    .any(|known| pattern == Path::new(known))
}

fn backup(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".before-cloister");
    name.into()
}

fn carry_out(target: &Target<'_>, step: &Step, record: &mut Record, force: bool) -> Outcome<()> {
    let at = target.at(&step.path);
    let changes = matches!(step.action, Action::Create | Action::Update);
    // A file of somebody else's that is changed is kept as it was.
    let foreign = step.action == Action::Update && !record.files.contains_key(&step.path);
    if foreign && (force || step.made == Some(Made::Line)) && !backup(&at).exists() {
        fs::copy(&at, backup(&at)).map_err(failed("copy", &at))?;
    }
    match &step.made {
        Some(Made::Link(to)) if changes => {
            if step.action == Action::Update {
                fs::remove_file(&at).map_err(failed("remove", &at))?;
            }
            std::os::unix::fs::symlink(to, &at).map_err(failed("make", &at))?;
        }
        Some(_) if changes => target.write(&step.path, &step.text)?,
        _ => {}
    }
    if let Some(made) = &step.made {
        record.files.insert(step.path.clone(), made.clone());
    }
    Ok(())
}

pub fn uninstall(args: &UninstallArgs) -> Outcome {
    let steps = uninstall_at(&Target(&args.destdir), args.dry_run)?;
    if args.json {
        print_json(&steps)?;
    } else if steps.is_empty() {
        print("Nothing was installed by `cloister install`.\n")?;
    } else {
        print(&table(&steps, args.dry_run))?;
        if !args.dry_run {
            print(
                "Next: systemctl disable --now cloisterd; systemctl daemon-reload; systemctl restart containerd\n",
            )?;
        }
    }
    Ok(0)
}

fn uninstall_at(target: &Target<'_>, dry_run: bool) -> Outcome<Vec<Step>> {
    let record = target.record()?;
    let mut steps = Vec::new();
    for (path, made) in &record.files {
        let at = target.at(path);
        let found = fs::symlink_metadata(&at).is_ok();
        let mut text = String::new();
        let as_left = match made {
            Made::File(sum) => target.read(path)?.is_some_and(|found| digest(&found) == *sum),
            Made::Link(to) => fs::read_link(&at).is_ok_and(|found| found == *to),
            Made::Line => {
                let whole = target.read(path)?.unwrap_or_default();
                text = whole.replacen(IMPORTS, "", 1);
                text != whole
            }
        };
        let action = match (found, as_left) {
            (false, _) => continue,
            (true, false) => Action::Keep,
            (true, true) if *made == Made::Line => Action::Update,
            (true, true) => Action::Remove,
        };
        if !dry_run {
            match action {
                Action::Update => target.write(path, &text)?,
                Action::Remove => fs::remove_file(&at).map_err(failed("remove", &at))?,
                _ => {}
            }
        }
        steps.push(Step {
            path: path.clone(),
            action,
            made: None,
            text: String::new(),
        });
    }
    if !dry_run {
        match fs::remove_file(target.at(Path::new(RECORD))) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", Path::new(RECORD))(e));
            }
            _ => {}
        }
        // Those that others have put something into stay.
        for folder in record.folders.iter().rev() {
            let _ = fs::remove_dir(target.at(folder));
        }
    }
    Ok(steps)
}

fn table(steps: &[Step], dry_run: bool) -> String {
    let word = |action| match (action, dry_run) {
        (Action::Create, false) => "created",
        (Action::Create, true) => "would create",
        (Action::Update, false) => "updated",
        (Action::Update, true) => "would update",
        (Action::Remove, false) => "removed",
        (Action::Remove, true) => "would remove",
        (Action::Unchanged, _) => "unchanged",
        (Action::Keep, _) => "kept, it was edited",
    };
    steps
        .iter()
        .map(|step| format!("{}: {}\n", step.path.display(), word(step.action)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRAM: &str = "/opt/cloister/bin/cloister";

    struct Node(PathBuf);

    impl Node {
        fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("cloister-install-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&root);
            fs::create_dir_all(&root).unwrap();
            Self(root)
        }

        fn install(&self, force: bool) -> Result<Vec<(String, Action)>, String> {
            install_at(&Target(&self.0), Path::new(PROGRAM), force, false)
                .map(brief)
                .map_err(|f| f.message)
        }

        fn uninstall(&self) -> Vec<(String, Action)> {
            brief(uninstall_at(&Target(&self.0), false).unwrap())
        }

        fn put(&self, path: &str, text: &str) {
            let at = Target(&self.0).at(Path::new(path));
            fs::create_dir_all(at.parent().unwrap()).unwrap();
            fs::write(at, text).unwrap();
        }

        fn text(&self, path: &str) -> String {
            fs::read_to_string(Target(&self.0).at(Path::new(path))).unwrap()
        }

        /// All paths, folders included.
        fn tree(&self) -> Vec<String> {
            let mut found = Vec::new();
            let mut folders = vec![self.0.clone()];
            while let Some(folder) = folders.pop() {
                for entry in fs::read_dir(folder).unwrap() {
                    let path = entry.unwrap().path();
                    found.push(format!("/{}", path.strip_prefix(&self.0).unwrap().display()));
                    if fs::symlink_metadata(&path).unwrap().is_dir() {
                        folders.push(path);
                    }
                }
            }
            found.sort();
            found
        }
    }

    impl Drop for Node {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn brief(steps: Vec<Step>) -> Vec<(String, Action)> {
        steps
            .into_iter()
            .map(|step| (step.path.display().to_string(), step.action))
            .collect()
    }

    fn all(steps: &[(String, Action)], action: Action) -> bool {
        steps.iter().all(|(_, done)| *done == action)
    }

    #[test]
    fn a_bare_node_there_and_back() {
        let node = Node::new("bare");
        assert!(node.uninstall().is_empty());
        let dry = install_at(&Target(&node.0), Path::new(PROGRAM), false, true).unwrap();
        assert!(all(&brief(dry), Action::Create));
        assert!(node.tree().is_empty(), "a dry run leaves nothing");
        let steps = node.install(false).unwrap();
        assert_eq!(steps.len(), 6);
        assert!(all(&steps, Action::Create), "{steps:?}");
        assert!(with_imports(&node.text(CONTAINERD)).unwrap().is_none());
        assert!(
            node.text(UNIT)
                .contains("ExecStart=\"/opt/cloister/bin/cloisterd\"")
        );
        let link = fs::read_link(node.0.join("usr/local/bin").join(shim::NAME)).unwrap();
        assert_eq!(link, Path::new(PROGRAM));
        assert_eq!(
            Config::load(&node.0.join("etc/cloister/config.toml"))
                .unwrap()
                .sandboxer
                .len(),
            1
        );
        assert!(all(&node.install(false).unwrap(), Action::Unchanged));
        assert!(all(&node.uninstall(), Action::Remove));
        assert!(node.tree().is_empty(), "{:?}", node.tree());
    }

    #[test]
    fn another_configuration_changes_what_follows_from_it() {
        let node = Node::new("config");
        node.install(false).unwrap();
        node.put(DEFAULT_PATH, "[sandboxer.big]\n");
        let steps = node.install(false).unwrap();
        let changed: Vec<&str> = steps
            .iter()
            .filter(|s| s.1 == Action::Update)
            .map(|s| s.0.as_str())
            .collect();
        assert_eq!(changed, [DROP_IN, CLASSES]);
        assert!(node.text(DROP_IN).contains("sandboxer = \"big\""));
        // What was edited stays.
        let kept: Vec<(String, Action)> = node
            .uninstall()
            .into_iter()
            .filter(|s| s.1 == Action::Keep)
            .collect();
        assert_eq!(kept, [(DEFAULT_PATH.to_owned(), Action::Keep)]);
        assert_eq!(node.tree(), ["/etc", "/etc/cloister", DEFAULT_PATH]);
        node.put(DEFAULT_PATH, "bogus = 1\n");
        let told = node.install(false).unwrap_err();
        assert!(told.contains("config.toml:1: unknown key \"bogus\""), "{told}");
    }

    #[test]
    fn containerds_own_configuration_survives() {
        let node = Node::new("containerd");
        let before = "# mine\nversion = 3\nroot = '/data'\n\n[plugins.a]\n  version = 5\n";
        node.put(CONTAINERD, before);
        node.install(false).unwrap();
        let now = node.text(CONTAINERD);
        assert_eq!(now.replacen(IMPORTS, "", 1), before);
        assert!(now.starts_with("# mine\nversion = 3\nimports = "), "{now}");
        assert_eq!(node.text(&format!("{CONTAINERD}.before-cloister")), before);
        assert!(all(&node.install(false).unwrap(), Action::Unchanged));
        // Edited meanwhile: only our line goes.
        node.put(CONTAINERD, &format!("{now}# later\n"));
        node.uninstall();
        assert_eq!(node.text(CONTAINERD), format!("{before}# later\n"));
    }

    #[test]
    fn what_cannot_be_changed_is_refused_and_nothing_done() {
        for (text, why) in [
            ("version = 2\n", "version 2"),
            ("root = '/x'\n", "names no version"),
            ("version = \n", "is no TOML"),
            (
                "version = 3\nimports = ['/etc/containerd/mine.toml']\n",
                "add \"/etc/containerd/conf.d/*.toml\"",
            ),
            ("version = 3\nimports = [\n]\n", "empty `imports`"),
        ] {
            let node = Node::new("refused");
            node.put(CONTAINERD, text);
            let tree = node.tree();
            let told = node.install(true).unwrap_err();
            assert!(
                told.contains(why) && told.contains("nothing was changed"),
                "{text:?}: {told}"
            );
            assert_eq!(node.tree(), tree);
        }
        for text in [
            "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n",
            "version = 3\nimports = ['conf.d/*.toml']\n",
        ] {
            assert!(with_imports(text).unwrap().is_none(), "{text}");
        }
        for text in [
            "version = 3",
            "version = 3\nimports = []\n[plugins]\n",
            "imports = []\nversion = 3\n",
        ] {
            let changed = with_imports(text).unwrap().unwrap();
            assert!(with_imports(&changed).unwrap().is_none(), "{changed}");
        }
    }

    #[test]
    fn files_of_others_are_in_the_way() {
        let node = Node::new("others");
        node.put(DROP_IN, "# mine\n");
        node.put(&format!("/usr/local/bin/{}", shim::NAME), "#!/bin/sh\n");
        let told = node.install(false).unwrap_err();
        assert!(
            told.contains(DROP_IN) && told.contains(shim::NAME) && told.contains("--force"),
            "{told}"
        );
        assert!(!node.tree().iter().any(|path| path == RECORD));
        node.install(true).unwrap();
        assert_eq!(node.text(&format!("{DROP_IN}.before-cloister")), "# mine\n");
        assert!(all(&node.install(false).unwrap(), Action::Unchanged));
        node.uninstall();
        assert!(!node.tree().iter().any(|path| path == DROP_IN));
    }

    #[test]
    fn a_package_has_unit_and_shim_already() {
        let node = Node::new("package");
        node.put(PACKAGED_UNIT, "[Unit]\n");
        fs::create_dir_all(node.0.join("usr/bin")).unwrap();
        std::os::unix::fs::symlink("cloister", node.0.join("usr/bin").join(shim::NAME)).unwrap();
        let paths: Vec<String> = node
            .install(false)
            .unwrap()
            .into_iter()
            .map(|step| step.0)
            .collect();
        assert_eq!(paths, [DEFAULT_PATH, DROP_IN, CONTAINERD, CLASSES]);
    }
}
