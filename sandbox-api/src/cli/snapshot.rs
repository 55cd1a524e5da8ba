// SPDX-License-Identifier: Apache-2.0
//! `snapshot`, `restore`, `fork`.
//!
//! The process that hosts a pod writes its snapshot (`pod::snapshot`), into a file that this one has opened: a nameless one
//! that gets its name at the end, or one in memory for copies that are made at once. Copies open that through this process.

use super::args::{ForkArgs, RestoreArgs, SnapshotArgs};
use super::pods::target::Verb;
use super::run::{self, Launch, Launched};
use super::table::printable;
use super::{Context, Failure, Outcome, client, print, print_json, snapshot_files};
use crate::host_check;
use crate::ids;
use crate::pod::snapshot::{On, Snapshot};
use crate::pod::state::{Network, Pods, Publish, Record};
use cloister_protocol::protobuf::MessageField;
use cloister_protocol::protobuf::well_known_types::any::Any;
use cloister_protocol::task::CheckpointTaskRequest;
use cloister_protocol::ttrpc::context::Context as Call;
use cloister_vmm::image::{self, Image, NewFile};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::slice;

/// What goes behind the name of a snapshot's file to that of what its copies touch first.
const TOUCHED: &str = ".touched";

/// Has a running container written into `file`, whole or on another snapshot.
fn take(context: &Context, name: &str, file: &File, on: &On) -> Outcome<()> {
    let (pods, record) = client::running(context, name, Verb::Snapshot)?;
    client::runtime()?.block_on(async {
        let task = client::connect(&pods, &record).await?;
        let options = Any {
            type_url: "cloister/base".to_owned(),
            value: on.encode()?,
            ..Default::default()
        };
        let path = snapshot_files::paths(slice::from_ref(file));
        let request = CheckpointTaskRequest {
            id: record.container_id().to_owned(),
            path: path.iter().map(|path| path.display().to_string()).collect(),
            options: MessageField::some(options),
            ..Default::default()
        };
        let taken = task.checkpoint(Call::default(), &request).await;
        taken.map(drop).map_err(client::said)
    })
}

pub fn snapshot(context: &Context, args: &SnapshotArgs) -> Outcome {
    let failed = |e| Failure::new(format!("cannot write {}: {e}", args.file.display()));
    let (bases, on) = bases(&args.base)?;
    if snapshot_files::holds(&bases, &args.file) {
        return Err(Failure::new(format!(
            "{} cannot be replaced by what is taken on it: write another file",
            args.file.display()
        )));
    }
    let new = NewFile::create(&args.file).map_err(failed)?;
    take(context, &args.container, new.file(), &on)?;
    let data = new.file().metadata()?;
    new.finish().map_err(failed)?;
    if args.json {
        // Holes take no room.
        let on_disk = std::os::unix::fs::MetadataExt::blocks(&data).saturating_mul(512);
        print_json(&serde_json::json!({
            "file": args.file,
            "bytes": data.len(),
            "bytes_on_disk": on_disk,
            "base": args.base.first(),
        }))?;
    } else {
        print(&format!("{}\n", args.file.display()))?;
    }
    Ok(0)
}

/// What a snapshot is to be taken on, as files that stay open, and as the hosting process is told. Nothing for a whole one.
fn bases(given: &[PathBuf]) -> Outcome<(Vec<File>, On)> {
    let Some((first, others)) = given.split_first() else {
        return Ok((Vec::new(), On::default()));
    };
    let failed = |why: String| Failure::new(format!("cannot take a snapshot on {}: {why}", first.display()));
    let file = snapshot_files::open(first)?;
    let files = snapshot_files::chain(first, file, others)?;
    // A damaged one would make a useless one.
    let copies = files.iter().map(File::try_clone).collect::<Result<Vec<_>, _>>()?;
    let image = Image::open_chain(copies).map_err(|e| failed(crate::error::chain(&e)))?;
    let whole = image.verify().and_then(|()| image.check_depth());
    whole.map_err(|e| failed(crate::error::chain(&e)))?;
    let name = first.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| failed("its name is not text".to_owned()))?;
    let on = On {
        files: snapshot_files::paths(&files),
        name: name.to_owned(),
    };
    Ok((files, on))
}

/// What a copy is to be.
struct Copy<'a> {
    name: Option<&'a str>,
    rm: bool,
    network: Network,
    publish: Vec<Publish>,
    /// Where what it touches first is noted.
    touched: Option<&'a Path>,
}

/// Gives a copy its record and starts its hosting process, which opens `files`.
fn begin(
    context: &Context,
    pods: &Pods,
    snapshot: &Snapshot,
    files: &[File],
    copy: Copy<'_>,
) -> Outcome<(Record, Launched)> {
    let original = &snapshot.facts.record;
    let mut plan = original.plan.clone();
    plan.auto_remove = copy.rm;
    plan.network = copy.network;
    plan.publish = copy.publish;
    let record = Record {
        image: original.image.clone(),
        image_id: original.image_id.clone(),
        layers: original.layers.clone(),
        command: original.command.clone(),
        guest_id: Some(original.container_id().to_owned()),
        ..Record::of(ids::container_id(), plan, Some(std::process::id()))
    };
    // The layers stay from here on: the record names them.
    let hold = context.store()?.hold()?;
    let (record, alive) = pods.reserve(record, copy.name)?;
    drop(hold);
    let how = Launch {
        snapshot: &snapshot_files::paths(files),
        prefetch: copy.touched,
        ..Launch::default()
    };
    let launched = run::launch(context, pods, &record, alive, how)?;
    Ok((record, launched))
}

/// Waits until a copy runs; one that does not leaves nothing.
fn finish(pods: &Pods, record: &Record, launched: Launched) -> Outcome<()> {
    launched.ready().map_err(|failure| {
        if let Err(error) = client::wait_ended(pods, &record.id, Some(super::containers::HOST_END))
            .and_then(|ended| Ok(ended.map(|_| pods.remove(&record.id)).transpose()?))
        {
            log::warn!("{}: {error:?}", record.name);
        }
        failure.with_code(1)
    })
}

fn told(record: &Record) -> serde_json::Value {
    serde_json::json!({"id": record.id, "name": record.name})
}

fn can_run() -> Outcome<()> {
    host_check::can_run().map_err(Failure::new)?;
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new(
            "root is needed to mount images; run cloister as root",
        ));
    }
    Ok(())
}

pub fn restore(context: &Context, args: RestoreArgs) -> Outcome {
    if let Some(name) = &args.name
        && !ids::is_valid_name(name)
    {
        return Err(Failure::new(format!(
            "Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
        )));
    }
    can_run()?;
    let failed = |why: String| Failure::new(format!("cannot restore {}: {why}", args.file.display()));
    let file = File::open(&args.file).map_err(|e| failed(e.to_string()))?;
    let files = snapshot_files::chain(&args.file, file, &args.base)?;
    let snapshot = Snapshot::open(&files, true).map_err(|e| failed(crate::error::chain(&e)))?;
    let wants = snapshot.wants();
    if !args.allow_folders && !wants.is_empty() {
        return Err(failed(format!(
            "it wants folders of this host: {}; give them to it with --allow-folders",
            printable(&wants.join(", "))
        )));
    }
    let network = match (&snapshot.facts.record.plan.network, args.net) {
        (Network::None, None) => Network::None,
        (Network::None, Some(_)) => return Err(failed("it has no network card".to_owned())),
        (_, Some(Network::None)) => {
            return Err(failed("it has a network card; --net none takes none".to_owned()));
        }
        (_, Some(network)) => network,
        (Network::Tap(name), None) => {
            return Err(failed(format!(
                "it was on tap {}; name one with --net tap=NAME",
                printable(name)
            )));
        }
        (Network::Nat, None) => Network::Nat,
    };
    if !args.publish.is_empty() && network != Network::Nat {
        return Err(failed("-p needs a network of type nat".to_owned()));
    }
    // Its hosting process has another working folder.
    let touched = args.prefetch.then(|| {
        let mut path = args.file.canonicalize()?.into_os_string();
        path.push(TOUCHED);
        Ok::<_, std::io::Error>(PathBuf::from(path))
    });
    let touched = touched.transpose()?;
    let pods = context.pods()?;
    let copy = Copy {
        name: args.name.as_deref(),
        rm: args.rm,
        network,
        publish: args.publish,
        touched: touched.as_deref(),
    };
    let (record, launched) = begin(context, &pods, &snapshot, &files, copy)?;
    finish(&pods, &record, launched)?;
    if args.json {
        print_json(&told(&record))?;
    } else {
        print(&format!("{}\n", record.id))?;
    }
    Ok(0)
}

pub fn fork(context: &Context, args: &ForkArgs) -> Outcome {
    can_run()?;
    let (pods, record) = client::running(context, &args.container, Verb::Snapshot)?;
    if let Network::Tap(name) = &record.plan.network {
        return Err(Failure::new(format!(
            "container {} is on tap {name}, which copies cannot share: take a snapshot and restore it with --net",
            record.name
        )));
    }
    let file = image::memory_file()?;
    take(context, &args.container, &file, &On::default())?;
    image::seal(&file)?;
    let files = [file];
    let snapshot = Snapshot::open(&files, false)?;
    let mut begun = Vec::new();
    let mut failure = None;
    for _ in 0..args.copies {
        let copy = Copy {
            name: None,
            rm: args.rm,
            network: record.plan.network.clone(),
            publish: Vec::new(),
            touched: None,
        };
        match begin(context, &pods, &snapshot, &files, copy) {
            Ok(one) => begun.push(one),
            Err(error) => {
                failure = Some(error);
                break;
            }
        }
    }
    let mut copies = Vec::new();
    for (record, launched) in begun {
        match finish(&pods, &record, launched) {
            Ok(()) => copies.push(record),
            Err(error) => failure = Some(error),
        }
    }
    if args.json {
        print_json(&copies.iter().map(told).collect::<Vec<_>>())?;
    } else {
        for copy in &copies {
            print(&format!("{}\n", copy.id))?;
        }
    }
    failure.map_or(Ok(0), Err)
}
