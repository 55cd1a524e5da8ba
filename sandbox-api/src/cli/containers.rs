// SPDX-License-Identifier: Apache-2.0
//! `ps`, `logs`, `stop`, `kill`, `rm`, `wait`.

use super::args::{LogsArgs, PsArgs};
use super::pods::target::{self, Target, Verb};
use super::pods::{self, Known};
use super::table::{printable, render, truncate};
use super::{Context, Failure, Outcome, client, parse, print, print_json};
use crate::clock;
use crate::pod::log::{Show, show};
use crate::pod::state::{Publish, Record, Status};
use std::io;
use std::time::Duration;

/// Time for a hosting process to end its VM once the container has ended.
pub const HOST_END: Duration = Duration::from_secs(30);

pub(super) fn status_text(record: &Record, now: clock::Millis) -> String {
    let ago = |time: Option<clock::Millis>| clock::human(now.saturating_sub(time.unwrap_or(now)));
    match record.status {
        Status::Created => "Created".to_owned(),
        Status::Running => format!("Up {}", ago(record.started)),
        Status::Exited => format!(
            "Exited ({}) {} ago",
            record.exit_code.unwrap_or(0),
            ago(record.finished)
        ),
    }
}

fn ports_text(ports: &[Publish]) -> String {
    let one = |p: &Publish| {
        format!(
            "{}->{}/tcp",
            std::net::SocketAddr::new(p.host_ip, p.host_port),
            p.container_port
        )
    };
    ports.iter().map(one).collect::<Vec<_>>().join(", ")
}

pub fn ps(context: &Context, args: &PsArgs) -> Outcome {
    if args.pods {
        return pods::list::ps(context, args);
    }
    let mut records = context.pods()?.list()?;
    if !args.all {
        records.retain(|record| record.status == Status::Running);
    }
    if args.json {
        print_json(&records)?;
        return Ok(0);
    }
    let id = |record: &Record| {
        if args.no_trunc {
            record.id.clone()
        } else {
            record.short_id().to_owned()
        }
    };
    if args.quiet {
        let ids: String = records.iter().map(|record| format!("{}\n", id(record))).collect();
        print(&ids)?;
        return Ok(0);
    }
    let now = clock::now();
    let rows: Vec<Vec<String>> = records
        .iter()
        .map(|record| {
            let command = record.command.join(" ");
            let command = if args.no_trunc {
                command
            } else {
                truncate(&command, 20)
            };
            vec![
                id(record),
                printable(&record.image),
                format!("\"{}\"", printable(&command)),
                format!("{} ago", clock::human(now.saturating_sub(record.created))),
                status_text(record, now),
                ports_text(&record.plan.publish),
                record.name.clone(),
            ]
        })
        .collect();
    let containers = render(
        &[
            "CONTAINER ID",
            "IMAGE",
            "COMMAND",
            "CREATED",
            "STATUS",
            "PORTS",
            "NAMES",
        ],
        &rows,
    );
    let of_containerd = pods::list::chosen(context, args)?;
    let text = match (rows.is_empty(), of_containerd.is_empty()) {
        (_, true) => containers,
        (true, false) => pods::list::table(&of_containerd, args, now),
        (false, false) => format!("{containers}\n{}", pods::list::table(&of_containerd, args, now)),
    };
    print(&text)?;
    Ok(0)
}

pub fn logs(context: &Context, args: &LogsArgs) -> Outcome {
    let pods = context.pods()?;
    let tail = match args.tail.as_str() {
        "all" => None,
        number => Some(
            number
                .parse()
                .map_err(|_| Failure::new(format!("--tail: {number:?} is not a number")))?,
        ),
    };
    let since =
        match &args.since {
            None => None,
            Some(text) => Some(clock::parse_since(text, clock::now()).ok_or_else(|| {
                Failure::new(format!("--since: {text:?} is neither a time nor a time span"))
            })?),
        };
    let how = Show {
        tail,
        since,
        timestamps: args.timestamps,
        follow: args.follow,
        ..Show::default()
    };
    let (pod, container) = match target::find(context, &pods, &args.container)? {
        Some(Target::Own(record)) => return own_logs(&pods, &record, &how),
        Some(Target::Container(pod, container)) => (pod, *container),
        Some(Target::Pod(pod)) => {
            let only = target::only_container(&pod)?;
            (pod, only)
        }
        None => return Err(target::not_found(context, &args.container)),
    };
    let known = Known::pods(context)?;
    pods::logs(context, known.daemon.as_ref(), &pod, &container, how)
}

fn own_logs(pods: &crate::pod::state::Pods, record: &Record, how: &Show) -> Outcome {
    let running =
        || pods.is_hosted(&record.id) && pods.load(&record.id).is_ok_and(|r| r.status != Status::Exited);
    let shown = show(
        &pods.log(&record.id),
        how,
        &mut io::stdout(),
        &mut io::stderr(),
        &running,
    );
    match shown {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(141),
        result => {
            result?;
            Ok(0)
        }
    }
}

/// Asks a container to end, and kills it after so many seconds.
pub fn stop(context: &Context, name: &str, seconds: u64, signal: Option<i32>) -> Outcome<()> {
    let pods = context.pods()?;
    let record = target::own(context, &pods, name, Verb::Stop)?;
    if record.status != Status::Exited {
        let runtime = client::runtime()?;
        let stopped = runtime.block_on(async {
            let task = client::connect(&pods, &record).await?;
            let signal = signal.unwrap_or(record.plan.stop_signal);
            // One that has just ended is what is wanted.
            let _ = client::kill(&task, record.container_id(), signal, false).await;
            if !client::wait_exit(&task, record.container_id(), Duration::from_secs(seconds)).await? {
                let _ = client::kill(&task, record.container_id(), libc::SIGKILL, true).await;
                client::wait_exit(&task, record.container_id(), Duration::from_secs(10)).await?;
            }
            Ok::<(), Failure>(())
        });
        if pods.is_hosted(&record.id) {
            stopped?;
            client::wait_ended(&pods, &record.id, Some(HOST_END))?;
        }
    }
    Ok(())
}

pub fn kill(context: &Context, name: &str, signal: i32) -> Outcome<()> {
    let (pods, record) = client::running(context, name, Verb::Kill)
        .map_err(|failure| Failure::new(format!("cannot kill container: {name}: {}", failure.message)))?;
    client::runtime()?.block_on(async {
        let task = client::connect(&pods, &record).await?;
        client::kill(&task, record.container_id(), signal, false).await
    })?;
    if signal == libc::SIGKILL {
        client::wait_ended(&pods, &record.id, Some(HOST_END))?;
    }
    print(&format!("{name}\n"))
}

pub fn rm(context: &Context, name: &str, force: bool) -> Outcome<()> {
    let pods = context.pods()?;
    if force && target::find(context, &pods, name)?.is_none() {
        return Ok(());
    }
    let record = target::own(context, &pods, name, Verb::Remove)?;
    if pods.is_hosted(&record.id) {
        if !force {
            return Err(Failure::new(format!(
                "cannot remove container \"{}\": container is running: stop the container before removing or force remove",
                record.name
            )));
        }
        let asked = client::runtime()?.block_on(async {
            let task = client::connect(&pods, &record).await?;
            client::kill(&task, record.container_id(), libc::SIGKILL, true).await
        });
        if let Err(failure) = asked {
            log::debug!("{}", failure.message);
            end_host(&pods, &record)?;
        }
        client::wait_ended(&pods, &record.id, Some(HOST_END))?;
    }
    pods.remove(&record.id)?;
    print(&format!("{name}\n"))
}

/// Ends a hosting process that does not answer, such as one that is still starting.
fn end_host(pods: &crate::pod::state::Pods, record: &Record) -> Outcome<()> {
    let pid = record
        .pid
        .and_then(|pid| i32::try_from(pid).ok())
        .and_then(rustix::process::Pid::from_raw);
    let Some(pid) = pid else { return Ok(()) };
    // The descriptor first, then the look at the lock: the process meant is the one that holds it.
    let handle = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
    if let Ok(handle) = handle
        && pods.is_hosted(&record.id)
    {
        rustix::process::pidfd_send_signal(&handle, rustix::process::Signal::TERM)
            .map_err(io::Error::from)?;
    }
    Ok(())
}

pub fn wait(context: &Context, name: &str) -> Outcome<()> {
    let pods = context.pods()?;
    let record = target::own(context, &pods, name, Verb::Wait)?;
    let code = match client::wait_ended(&pods, &record.id, None)? {
        Some(ended) => ended.exit_code.unwrap_or(0),
        None => {
            return Err(Failure::new(format!(
                "container {name} was removed when it ended; its exit code is gone"
            )));
        }
    };
    print(&format!("{code}\n"))
}

/// The container that needs an image, for `rmi`.
pub fn user_of(pods: &crate::pod::state::Pods, image: &crate::image::Image) -> Option<String> {
    let records = pods.list().ok()?;
    records
        .iter()
        .find(|record| record.image_id.as_ref() == Some(&image.id))
        .map(|record| record.short_id().to_owned())
}

/// A signal by what the image says, else SIGTERM.
pub fn stop_signal(image: Option<&str>) -> i32 {
    image
        .and_then(|text| parse::signal(text).ok())
        .unwrap_or(libc::SIGTERM)
}
