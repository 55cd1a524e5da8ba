// SPDX-License-Identifier: Apache-2.0
//! What a name on the command line means: a container of `cloister run`, a pod that containerd made, or a container of one.
//!
//! Ids can be cut short as long as they are unique. A pod is also `NAME` or `NAMESPACE/NAME`, a container of one also
//! `POD/CONTAINER` with its Kubernetes name. What is named in full goes before what only begins so.

use super::{Known, report};
use crate::cli::table::printable;
use crate::cli::{Context, Failure, Outcome};
use crate::daemon::report::{Container, Pod};
use crate::daemon::sandbox::Phase;
use crate::pod::state::{self, Record};

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// Of `cloister run`.
    Own(Box<Record>),
    /// A pod of containerd's.
    Pod(Box<Pod>),
    /// A container of one.
    Container(Box<Pod>, Box<Container>),
}

/// What a user wants to do to what is not his to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// `start`, `restart`.
    Start,
    /// `stop`.
    Stop,
    /// `kill`.
    Kill,
    /// `rm`.
    Remove,
    /// `attach`.
    Attach,
    /// `wait`.
    Wait,
    /// `snapshot`, `fork`.
    Snapshot,
}

/// A pod's full name.
pub fn pod_name(pod: &Pod) -> String {
    printable(&match (pod.namespace.as_str(), pod.name.as_str()) {
        ("", "") => pod.short_id().to_owned(),
        ("", name) => name.to_owned(),
        (namespace, name) => format!("{namespace}/{name}"),
    })
}

/// A container's full name.
pub fn container_name(pod: &Pod, container: &Container) -> String {
    let own = if container.name.is_empty() {
        short(&container.id)
    } else {
        &container.name
    };
    format!("{}/{}", pod_name(pod), printable(own))
}

/// The 12 digits that docker shows.
pub fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

impl Target {
    fn describe(&self) -> String {
        match self {
            Self::Own(record) => format!("container {} ({})", record.short_id(), record.name),
            Self::Pod(pod) => format!("pod {} ({})", pod.short_id(), pod_name(pod)),
            Self::Container(pod, container) => {
                format!(
                    "container {} ({})",
                    short(&container.id),
                    container_name(pod, container)
                )
            }
        }
    }

    /// Why this cannot be done here, and where it can.
    fn refuse(&self, verb: Verb) -> Failure {
        let (pod, id, of_pod) = match self {
            Self::Own(record) => return Failure::new(format!("container {} is not a pod", record.name)),
            Self::Pod(pod) => (pod, short(&pod.id), true),
            Self::Container(pod, container) => (pod, short(&container.id), false),
        };
        let kubectl = |command: &str| {
            if pod.name.is_empty() {
                String::new()
            } else {
                format!(
                    "`kubectl {command} {} -n {}` or ",
                    printable(&pod.name),
                    printable(&pod.namespace)
                )
            }
        };
        let (done, instead) = match (verb, of_pod) {
            (Verb::Start, true) => ("starts", format!("{}`crictl runp`", kubectl("get pod"))),
            (Verb::Start, false) => ("starts", format!("`crictl start {id}`")),
            (Verb::Stop | Verb::Kill, true) => {
                ("ends", format!("{}`crictl stopp {id}`", kubectl("delete pod")))
            }
            (Verb::Stop, false) => ("stops", format!("`crictl stop {id}`")),
            (Verb::Kill, false) => ("kills", format!("`crictl stop --timeout 0 {id}`")),
            (Verb::Remove, true) => ("removes", format!("{}`crictl rmp {id}`", kubectl("delete pod"))),
            (Verb::Remove, false) => ("removes", format!("`crictl rm {id}`")),
            (Verb::Attach, _) => ("attaches to", format!("{}`crictl attach`", kubectl("attach -it"))),
            (Verb::Wait, _) => ("reports the end of", "`cloister events`".to_owned()),
            (Verb::Snapshot, _) => {
                return Failure::new(format!(
                    "{} was made by containerd: only containers of `cloister run` can be copied",
                    self.describe()
                ));
            }
        };
        Failure::new(format!(
            "{} was made by containerd, which alone {done} it: use {instead}",
            self.describe()
        ))
    }
}

/// A container that must be of `cloister run`: containerd's pods are refused.
pub fn own(context: &Context, pods: &state::Pods, name: &str, verb: Verb) -> Outcome<Record> {
    match find(context, pods, name)? {
        Some(Target::Own(record)) => Ok(*record),
        Some(other) => Err(other.refuse(verb)),
        None => Err(state::Error::NotFound(name.to_owned()).into()),
    }
}

/// What the name means; None if nothing has it.
pub fn find(context: &Context, pods: &state::Pods, name: &str) -> Outcome<Option<Target>> {
    let own = pods.list()?;
    let plain = name.strip_prefix('/').unwrap_or(name);
    if let Some(record) = own.iter().find(|own| own.id == plain || own.name == plain) {
        return Ok(Some(Target::Own(Box::new(record.clone()))));
    }
    choose(&own, &Known::pods(context)?.pods, plain)
}

/// The pod that is meant, or that the container meant is in.
pub fn pod(context: &Context, name: &str) -> Outcome<(Known, Pod)> {
    let known = Known::pods(context)?;
    match choose(&[], &known.pods, name)? {
        Some(Target::Pod(pod) | Target::Container(pod, _)) => Ok((known, *pod)),
        _ => Err(Failure::new(format!("No such pod: {name}"))),
    }
}

/// The one container of a pod that is meant by the pod's name.
pub fn only_container(pod: &Pod) -> Outcome<Container> {
    match pod.containers.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(no_container(pod)),
        several => {
            let names: Vec<String> = several
                .iter()
                .map(|container| container_name(pod, container))
                .collect();
            Err(Failure::new(format!(
                "pod {} has several containers: name one of {}",
                pod_name(pod),
                names.join(", ")
            )))
        }
    }
}

/// Why there is no container in a pod.
fn no_container(pod: &Pod) -> Failure {
    let reason = pod.exit.as_ref().and_then(|exit| exit.reason.as_deref());
    Failure::new(match reason.and_then(|reason| reason.lines().next()) {
        Some(reason) => format!("pod {} has stopped: {}", pod_name(pod), printable(reason)),
        None => format!("pod {} has no container", pod_name(pod)),
    })
}

/// Nothing has this name. Of a container whose pod has stopped, which containerd has removed since, that is said instead.
pub fn not_found(context: &Context, name: &str) -> Failure {
    let known = Known::pods(context).ok();
    let of = name.rsplit_once('/').map(|(of, _)| of);
    let stopped = known.iter().flat_map(|known| &known.pods).find(|pod| {
        pod.phase >= Phase::Stopped && of.is_some_and(|of| means_pod(pod, of) || pod.id.starts_with(of))
    });
    stopped.map_or_else(|| state::Error::NotFound(name.to_owned()).into(), no_container)
}

fn choose(own: &[Record], pods: &[Pod], name: &str) -> Outcome<Option<Target>> {
    if name.is_empty() {
        return Ok(None);
    }
    let named: Vec<Target> = targets(pods)
        .filter(|target| match target {
            Target::Own(_) => false,
            Target::Pod(pod) => means_pod(pod, name),
            Target::Container(pod, container) => means_container(pod, container, name),
        })
        .collect();
    let found = if named.is_empty() {
        let own = own.iter().map(|record| Target::Own(Box::new(record.clone())));
        own.chain(targets(pods))
            .filter(|target| match target {
                Target::Own(record) => record.id.starts_with(name),
                Target::Pod(pod) => pod.id.starts_with(name),
                Target::Container(_, container) => container.id.starts_with(name),
            })
            .collect()
    } else {
        // One pod follows another of the same name.
        let living: Vec<Target> = named.iter().filter(|target| lives(target)).cloned().collect();
        if living.len() == 1 { living } else { named }
    };
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        [one, another, ..] => Err(Failure::new(format!(
            "{name:?} means {} and {}: give more digits of the id",
            one.describe(),
            another.describe()
        ))),
    }
}

fn targets(pods: &[Pod]) -> impl Iterator<Item = Target> + '_ {
    pods.iter().flat_map(|pod| {
        let boxed = Box::new(pod.clone());
        let containers = pod
            .containers
            .iter()
            .map(move |container| Target::Container(boxed.clone(), Box::new(container.clone())));
        std::iter::once(Target::Pod(Box::new(pod.clone()))).chain(containers)
    })
}

fn lives(target: &Target) -> bool {
    match target {
        Target::Own(_) => true,
        Target::Pod(pod) => pod.phase < Phase::Stopped,
        Target::Container(pod, container) => pod.phase < Phase::Stopped && container.exit_status.is_none(),
    }
}

fn means_pod(pod: &Pod, name: &str) -> bool {
    let full = name.split_once('/');
    pod.id == name
        || (!pod.name.is_empty() && pod.name == name)
        || full.is_some_and(|(namespace, name)| pod.namespace == namespace && pod.name == name)
}

fn means_container(pod: &Pod, container: &report::Container, name: &str) -> bool {
    let full = name.rsplit_once('/');
    container.id == name
        || full.is_some_and(|(of, name)| {
            !container.name.is_empty()
                && container.name == name
                && (means_pod(pod, of) || pod.id.starts_with(of))
        })
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn container(id: &str, name: &str) -> Container {
        Container {
            id: id.into(),
            name: name.into(),
            image: "img".into(),
            bundle: "/b".into(),
            pid: 9,
            terminal: false,
            started: Some(1),
            exit_status: None,
            ended: None,
            execs: 0,
        }
    }

    pub fn pod(id: &str, name: &str, containers: Vec<Container>) -> Pod {
        Pod {
            id: id.into(),
            name: name.into(),
            namespace: "shop".into(),
            containerd_namespace: "k8s.io".into(),
            sandboxer: "cloister".into(),
            phase: Phase::Ready,
            created: 0,
            started: Some(1),
            exit: None,
            vcpus: 2,
            memory: 256 << 20,
            memory_used: Some(64 << 20),
            containers,
            task_socket: "/s".into(),
            process: None,
        }
    }

    #[test]
    fn names_ids_and_their_beginnings() {
        let own = [state::tests::record("aabbcc")];
        let pods = [
            pod(
                "aacc00",
                "web",
                vec![container("c0ffee", "app"), container("c0de", "")],
            ),
            pod("dd0000", "db", vec![container("ffff", "app")]),
        ];
        let id = |name: &str| match choose(&own, &pods, name).unwrap() {
            None => String::new(),
            Some(Target::Own(record)) => record.id,
            Some(Target::Pod(pod)) => pod.id,
            Some(Target::Container(_, container)) => container.id,
        };
        for (name, found) in [
            ("web", "aacc00"),
            ("shop/web", "aacc00"),
            ("other/web", ""),
            ("aac", "aacc00"),
            ("aab", "aabbcc"),
            ("c0f", "c0ffee"),
            ("web/app", "c0ffee"),
            ("shop/web/app", "c0ffee"),
            ("dd/app", "ffff"),
            ("app", ""),
            ("web/", ""),
            ("", ""),
        ] {
            assert_eq!(id(name), found, "{name:?}");
        }
        for (name, both) in [("aa", ["aabbcc", "aacc00"]), ("c0", ["c0ffee", "c0de"])] {
            let failure = choose(&own, &pods, name).unwrap_err();
            for id in both {
                assert!(failure.message.contains(id), "{failure:?}");
            }
        }
    }

    #[test]
    fn the_living_one_of_a_name() {
        let mut pods = [pod("aa", "web", vec![]), pod("bb", "web", vec![])];
        assert!(choose(&[], &pods, "web").is_err());
        pods[0].phase = Phase::Stopped;
        assert_eq!(
            choose(&[], &pods, "web").unwrap(),
            Some(Target::Pod(Box::new(pods[1].clone())))
        );
        pods[1].phase = Phase::Stopped;
        assert!(choose(&[], &pods, "web").is_err());
    }

    #[test]
    fn what_is_containerds_is_refused_with_a_way() {
        let web = pod("aacc00", "web", vec![container("c0ffee", "app")]);
        let whole = Target::Pod(Box::new(web.clone()));
        let part = Target::Container(Box::new(web.clone()), Box::new(web.containers[0].clone()));
        for (target, verb, words) in [
            (
                &whole,
                Verb::Stop,
                ["kubectl delete pod web -n shop", "crictl stopp aacc00"],
            ),
            (&whole, Verb::Remove, ["kubectl delete pod", "crictl rmp aacc00"]),
            (
                &part,
                Verb::Kill,
                ["shop/web/app", "crictl stop --timeout 0 c0ffee"],
            ),
            (&part, Verb::Remove, ["made by containerd", "crictl rm c0ffee"]),
        ] {
            let message = target.refuse(verb).message;
            for word in words {
                assert!(message.contains(word), "{message}");
            }
        }
        let unnamed = Target::Pod(Box::new(pod("aa", "", vec![])));
        assert!(!unnamed.refuse(Verb::Stop).message.contains("kubectl"));
    }

    #[test]
    fn a_pods_only_container() {
        assert!(only_container(&pod("a", "web", vec![])).is_err());
        let one = pod("a", "web", vec![container("c", "app")]);
        assert_eq!(only_container(&one).unwrap().id, "c");
        let two = pod("a", "web", vec![container("c", "app"), container("d", "log")]);
        let message = only_container(&two).unwrap_err().message;
        assert!(message.contains("shop/web/app, shop/web/log"), "{message}");
    }
}
