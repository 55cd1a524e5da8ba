// SPDX-License-Identifier: Apache-2.0
//! The steps of an operation, each of them timed: for the metrics, and as spans of a trace.
//!
//! ```text
//!  Steps::new ──▶ next("network") ──▶ next("boot") ──▶ done()
//!       │               │                  │            failed(code, why)
//!       └── a span ──── its child ──────── its child    dropped: given up by the caller
//! ```

use super::metrics::{Metrics, PodLabels};
use super::telemetry::remote_parent;
use crate::pod::task::{CREATE, CREATE_STEPS, START, START_STEPS, Timed};
use std::time::{Duration, Instant};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// A pod's start: from nothing to an agent that takes containers.
pub const POD_START: &str = "pod_start";
/// Its steps, in order; the last one of pods that are cloned from a smaller template.
pub const POD_START_STEPS: [&str; 7] = [
    "network",
    "create",
    "boot",
    "configure",
    "forward",
    "serve",
    "grow",
];
/// All operations with their steps.
pub const OPERATIONS: [(&str, &[&str]); 3] = [
    (POD_START, &POD_START_STEPS),
    (CREATE, &CREATE_STEPS),
    (START, &START_STEPS),
];
/// The codes they fail with.
pub const ERRORS: [&str; 2] = [INTERNAL, CANCELLED];
/// The code of an operation that was not possible.
const INTERNAL: &str = "internal";
/// The code of an operation that its caller gave up.
const CANCELLED: &str = "cancelled";

/// How long a step took, as it is kept with the pod.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StepTime {
    /// Its name.
    pub step: String,
    /// Microseconds.
    pub micros: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Steps {
    metrics: Metrics,
    operation: &'static str,
    begun: Instant,
    span: Span,
    step: Option<(&'static str, Instant, Span)>,
    ended: Vec<StepTime>,
    /// A code and a message, if it failed.
    outcome: Option<(&'static str, String)>,
}

impl Steps {
    /// Begins an operation on a pod, or on a container of it; `traceparent` is the caller's header of that name.
    pub fn new(
        metrics: &Metrics,
        operation: &'static str,
        pod: &PodLabels,
        container: Option<&str>,
        traceparent: Option<&str>,
    ) -> Self {
        let span = tracing::info_span!(
            parent: None, "operation",
            otel.name = operation,
            otel.status_code = tracing::field::Empty,
            otel.status_description = tracing::field::Empty,
            pod_id = pod.id,
            pod_name = pod.pod,
            pod_namespace = pod.namespace,
            container_id = container,
        );
        // It fails where there are no traces.
        let _ = span.set_parent(remote_parent(traceparent));
        Self {
            metrics: metrics.clone(),
            operation,
            begun: Instant::now(),
            span,
            step: None,
            ended: Vec::new(),
            outcome: Some((CANCELLED, "given up by the caller".to_owned())),
        }
    }

    /// The step before ends, and this one begins.
    pub fn next(&mut self, name: &'static str) {
        self.end_step();
        let span = tracing::info_span!(parent: &self.span, "step", otel.name = name);
        self.step = Some((name, Instant::now(), span));
    }

    /// All went well. Answers how long each step took.
    pub fn done(mut self) -> Vec<StepTime> {
        self.outcome = None;
        self.end_step();
        std::mem::take(&mut self.ended)
    }

    /// It failed: with a gRPC code's name, and why.
    pub fn failed(mut self, code: &'static str, why: &str) {
        self.outcome = Some((code, why.to_owned()));
    }

    fn end_step(&mut self) {
        if let Some((name, begun, span)) = self.step.take() {
            let took = begun.elapsed();
            self.metrics.phase(self.operation, name, took);
            self.ended.push(StepTime {
                step: name.to_owned(),
                micros: micros(took),
            });
            drop(span);
        }
    }
}

impl Timed for Steps {
    fn next(&mut self, step: &'static str) {
        Self::next(self, step);
    }

    fn done(self: Box<Self>, failure: Option<&str>) {
        match failure {
            None => drop(Self::done(*self)),
            Some(why) => self.failed(INTERNAL, why),
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.end_step();
        let code = self.outcome.as_ref().map(|(code, _)| *code);
        if let Some((_, why)) = &self.outcome {
            self.span.record("otel.status_code", "ERROR");
            self.span.record("otel.status_description", why.as_str());
        }
        self.metrics.operation(self.operation, self.begun.elapsed(), code);
    }
}

#[cfg(test)]
mod tests {
    use super::super::metrics::tests::metrics;
    use super::*;

    #[test]
    fn each_way_out_is_counted() {
        let metrics = metrics();
        let steps = || {
            let mut steps = Steps::new(&metrics, POD_START, &PodLabels::default(), None, Some("nonsense"));
            steps.next("network");
            steps.next("boot");
            steps
        };
        let times = steps().done();
        let names: Vec<&str> = times.iter().map(|time| time.step.as_str()).collect();
        assert_eq!(names, ["network", "boot"]);
        steps().failed("internal", "why");
        drop(steps());
        let text = metrics.encode();
        for line in [
            "cloister_phase_seconds_count{operation=\"pod_start\",phase=\"network\"} 3",
            "cloister_phase_seconds_count{operation=\"pod_start\",phase=\"boot\"} 3",
            "cloister_operation_seconds_count{operation=\"pod_start\",outcome=\"ok\"} 1",
            "cloister_operation_seconds_count{operation=\"pod_start\",outcome=\"error\"} 2",
            "cloister_errors_total{operation=\"pod_start\",kind=\"internal\"} 1",
            "cloister_errors_total{operation=\"pod_start\",kind=\"cancelled\"} 1",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
