// SPDX-License-Identifier: Apache-2.0
//! `events`: what happens to pods.

use super::target::short;
use super::{Context, Known, Outcome};
use crate::cli::args::EventsArgs;
use crate::cli::table::printable;
use crate::cli::{Failure, print};
use crate::clock::{self, Millis};
use crate::daemon::event_log::Event;

pub fn events(context: &Context, args: &EventsArgs) -> Outcome {
    let known = Known::pods(context)?;
    let daemon = known.daemon(context)?;
    let now = clock::now();
    let since = match &args.since {
        None if args.no_follow => Millis::MIN,
        // As with docker: what happens from now on.
        None => now,
        Some(text) => clock::parse_since(text, now)
            .ok_or_else(|| Failure::new(format!("--since: {text:?} is neither a time nor a time span")))?,
    };
    let mut pending = Vec::new();
    let mut show = |piece: &[u8]| {
        pending.extend_from_slice(piece);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            let event: Event = serde_json::from_slice(&line)?;
            if event.at < since || !(args.pods.is_empty() || args.pods.iter().any(|name| is_of(&event, name)))
            {
                continue;
            }
            if args.json {
                print(&String::from_utf8_lossy(&line))?;
            } else {
                print(&format!("{}\n", text(&event)))?;
            }
        }
        Ok(true)
    };
    if args.no_follow {
        show(&daemon.get("/events")?)?;
        return Ok(0);
    }
    daemon.follow("/events?follow", show)?;
    Err(Failure::new("cloisterd has ended"))
}

/// Whether it is about the pod that is named. That need not be there any more.
fn is_of(event: &Event, name: &str) -> bool {
    let full = name.split_once('/');
    event.pod.starts_with(name)
        || event.name == name
        || full.is_some_and(|(namespace, name)| event.namespace == namespace && event.name == name)
}

/// One line of it.
pub fn text(event: &Event) -> String {
    let mut line = format!("{} {}", clock::rfc3339(event.at), event.kind.name());
    let words = [&event.namespace, &event.name].map(|word| printable(word));
    let name: Vec<&str> = words
        .iter()
        .map(String::as_str)
        .filter(|word| !word.is_empty())
        .collect();
    if !name.is_empty() {
        line.push_str(&format!(" {}", name.join("/")));
    }
    line.push_str(&format!(" pod={}", short(&event.pod)));
    if let Some(container) = &event.container {
        line.push_str(&format!(" container={}", printable(short(container))));
    }
    if let Some(status) = event.exit_status {
        line.push_str(&format!(" status={status}"));
    }
    if let Some(first) = event.message.as_ref().and_then(|message| message.lines().next()) {
        line.push_str(&format!(": {}", printable(first)));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::event_log::Kind;
    use crate::daemon::metrics::PodLabels;

    #[test]
    fn an_event_is_a_line() {
        let pod = PodLabels {
            id: "0123456789abcdef".into(),
            pod: "web".into(),
            namespace: "shop".into(),
        };
        let mut event = Event::now(Kind::Stopped, &pod)
            .with_status(137)
            .with_message("the agent died\x1b[2J\n  | Kernel panic");
        event.at = 1_704_164_645_000;
        assert_eq!(
            text(&event),
            "2024-01-02T03:04:05.000Z stopped shop/web pod=0123456789ab status=137: the agent died\\u{1b}[2J"
        );
        for (name, is_its) in [
            ("web", true),
            ("shop/web", true),
            ("0123", true),
            ("we", false),
            ("other/web", false),
        ] {
            assert_eq!(is_of(&event, name), is_its, "{name}");
        }
        let unnamed = Event {
            name: String::new(),
            namespace: String::new(),
            ..Event::now(Kind::Oom, &pod).of_container("c0ffee")
        };
        let line = text(&unnamed);
        assert!(line.ends_with(" oom pod=0123456789ab container=c0ffee"), "{line}");
    }
}
