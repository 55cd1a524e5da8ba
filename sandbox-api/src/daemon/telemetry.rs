// SPDX-License-Identifier: Apache-2.0
//! Logs and traces.
//!
//! # Theory of operation
//!
//! ```text
//!  log::warn!(…) of all crates ──LogTracer──▶ event ──▶ text | JSON | journald, with the fields of the spans around it
//!  pod_span, Steps ───────────────────────▶ spans ──▶ OTLP: a batch each 5 s, from a thread of its own
//! ```
//! What runs for a pod runs in its [`pod_span`] (`future.instrument(pod_span(…))`), so each line that is logged there says
//! which pod it is about: `pod_id`, `pod_name`, `pod_namespace`; `POD_ID` and so on in journald. The spans of
//! [`super::steps`] go to the collector.

use super::config::{Level, Log, LogFormat, Tracing};
use super::log_format::Json;
use super::metrics::PodLabels;
use async_trait::async_trait;
use http::{Request, Response};
use hyper::body::Bytes;
use opentelemetry::trace::TracerProvider;
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{HttpClient, HttpError, hyper::HyperClient};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use std::io::{self, IsTerminal};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;
use tracing::{Span, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets, filter_fn};
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry};

/// What crates say at these levels and below is for their developers.
const QUIET: [(&str, LevelFilter); 6] = [
    ("ttrpc", LevelFilter::ERROR),
    ("h2", LevelFilter::WARN),
    ("hyper", LevelFilter::WARN),
    ("hyper_util", LevelFilter::WARN),
    ("tonic", LevelFilter::WARN),
    ("opentelemetry", LevelFilter::WARN),
];
/// Time a collector may take for a batch.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there are no logs or traces.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// journald's socket.
    #[error("cannot log to journald; set log.format to \"text\" where there is none")]
    Journald(#[source] io::Error),
    /// The exporter.
    #[error("cannot send traces to {0}")]
    Exporter(String, #[source] opentelemetry_otlp::ExporterBuildError),
    /// Not in a runtime.
    #[error("traces need a runtime to be sent from")]
    Runtime(#[from] tokio::runtime::TryCurrentError),
    /// Done twice.
    #[error("logs are set up already")]
    Twice,
}

/// Sends what is left of the traces when it is dropped; for that the runtime must still be there.
#[derive(Debug, Default)]
pub struct Guard(Option<SdkTracerProvider>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(provider) = self.0.take()
            && let Err(error) = provider.shutdown_with_timeout(Duration::from_secs(2))
        {
            log::info!("the last traces were not sent: {error}");
        }
    }
}

/// Sets up the logs of the process, and its traces. To be called once, in a runtime with more than one thread.
///
/// # Errors
/// See [`Error`].
pub fn init(log: &Log, traces: &Tracing) -> Result<Guard, Error> {
    let provider = provider(traces)?;
    let subscriber = subscriber(log, BoxMakeWriter::new(io::stderr), provider.as_ref())?;
    tracing_log::LogTracer::builder()
        .with_max_level(log::LevelFilter::from(log.level))
        .init()
        .map_err(|_| Error::Twice)?;
    tracing::subscriber::set_global_default(subscriber).map_err(|_| Error::Twice)?;
    Ok(Guard(provider))
}

fn subscriber(
    log: &Log,
    to: BoxMakeWriter,
    provider: Option<&SdkTracerProvider>,
) -> Result<impl Subscriber + Send + Sync + for<'a> LookupSpan<'a>, Error> {
    let traces = provider.map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("cloisterd"))
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_filter(filter_fn(|metadata| {
                metadata.is_span() && metadata.target().starts_with("cloister")
            }))
    });
    Ok(Registry::default().with(logs(log, to)?).with(traces))
}

type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;

fn logs(log: &Log, to: BoxMakeWriter) -> Result<impl Layer<Registry> + Send + Sync, Error> {
    let format = match log.format {
        LogFormat::Auto if stderr_is_journald() => LogFormat::Journald,
        LogFormat::Auto => LogFormat::Text,
        chosen => chosen,
    };
    let layer: BoxedLayer = match format {
        LogFormat::Journald => {
            let layer = tracing_journald::layer().map_err(Error::Journald)?;
            layer
                .with_field_prefix(None)
                .with_syslog_identifier("cloisterd".to_owned())
                .boxed()
        }
        LogFormat::Json => tracing_subscriber::fmt::layer()
            .fmt_fields(tracing_subscriber::fmt::format::JsonFields::new())
            .event_format(Json)
            .with_writer(to)
            .boxed(),
        LogFormat::Text | LogFormat::Auto => tracing_subscriber::fmt::layer()
            .with_ansi(io::stderr().is_terminal())
            .with_target(false)
            .with_writer(to)
            .boxed(),
    };
    let level = match log.level {
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    };
    let quiet = QUIET.map(|(target, most)| (target, level.min(most)));
    Ok(layer.with_filter(Targets::new().with_default(level).with_targets(quiet)))
}

/// Whether stderr is the stream that systemd made for this service (JOURNAL_STREAM, systemd.exec(5)).
fn stderr_is_journald() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    std::fs::metadata("/proc/self/fd/2")
        .is_ok_and(|stderr| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

fn provider(traces: &Tracing) -> Result<Option<SdkTracerProvider>, Error> {
    let Some(endpoint) = &traces.otlp_endpoint else {
        return Ok(None);
    };
    let client = OnRuntime {
        runtime: tokio::runtime::Handle::try_current()?,
        client: HyperClient::with_default_connector(EXPORT_TIMEOUT, None),
    };
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_endpoint(traces_url(endpoint))
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .map_err(|e| Error::Exporter(endpoint.clone(), e))?;
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let resource = Resource::builder()
        .with_service_name("cloisterd")
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("host.name", host.trim().to_owned()),
        ])
        .build();
    let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(traces.sample_ratio)));
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_sampler(sampler)
        .with_resource(resource)
        .build();
    Ok(Some(provider))
}

/// OTLP's path, where the address has none.
fn traces_url(endpoint: &str) -> String {
    let base = endpoint.trim_end_matches('/');
    if base.matches('/').count() > 2 {
        endpoint.to_owned()
    } else {
        format!("{base}/v1/traces")
    }
}

/// The exporter's thread is not a runtime's, which the client needs.
#[derive(Debug)]
struct OnRuntime {
    runtime: tokio::runtime::Handle,
    client: HyperClient,
}

#[async_trait]
impl HttpClient for OnRuntime {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let client = self.client.clone();
        self.runtime
            .spawn(async move { client.send_bytes(request).await })
            .await?
    }
}

/// The span of what runs for a pod.
pub fn pod_span(pod: &PodLabels) -> Span {
    tracing::info_span!(
        target: "pod", parent: None, "pod",
        pod_id = pod.id, pod_name = pod.pod, pod_namespace = pod.namespace
    )
}

/// The trace that a caller told of in the header `traceparent`, for its spans and ours to be one trace.
pub fn remote_parent(traceparent: Option<&str>) -> Context {
    use opentelemetry::propagation::TextMapPropagator;
    let headers: std::collections::HashMap<String, String> = traceparent
        .map(|value| ("traceparent".to_owned(), value.to_owned()))
        .into_iter()
        .collect();
    TraceContextPropagator::new().extract_with_context(&Context::new(), &headers)
}

#[cfg(test)]
mod tests {
    use super::super::metrics::tests::metrics;
    use super::super::steps::Steps;
    use super::*;
    use http_body_util::{BodyExt, Full};
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
    use prost::Message as _;
    use std::sync::{Arc, Mutex};
    use tracing::Instrument;

    fn labels() -> PodLabels {
        PodLabels {
            id: "abc".into(),
            pod: "web-1".into(),
            namespace: "shop".into(),
        }
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Keeps a subscriber beside the tests' own. While there is one in all, tracing asks the thread that comes by a place
    /// first whether anybody wants its spans: a test in another thread, without a subscriber, would say no for all.
    fn several_subscribers() {
        static SECOND: std::sync::OnceLock<tracing::Dispatch> = std::sync::OnceLock::new();
        SECOND.get_or_init(|| tracing::Dispatch::new(Registry::default()));
    }

    /// What is written when `act` runs with these logs.
    fn written(format: LogFormat, level: Level, act: impl FnOnce()) -> String {
        several_subscribers();
        let _ = tracing_log::LogTracer::init();
        let out = Sink::default();
        let log = Log { level, format };
        let subscriber = subscriber(
            &log,
            BoxMakeWriter::new({
                let out = out.clone();
                move || out.clone()
            }),
            None,
        )
        .unwrap();
        tracing::subscriber::with_default(subscriber, act);
        String::from_utf8(out.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn json_lines_name_their_pod() {
        let text = written(LogFormat::Json, Level::Info, || {
            log::warn!("outside\nof any \"pod\"");
            let _in_pod = pod_span(&labels()).entered();
            log::info!("inside");
            log::debug!("not said");
            log::info!(target: "ttrpc::server", "nor this");
            tracing::error!(code = 5, "of tracing's own");
        });
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(lines[0]["message"], "outside\nof any \"pod\"");
        assert_eq!(lines[0]["level"], "warn");
        assert_eq!(lines[0].get("pod_id"), None);
        assert_eq!(
            (
                &lines[1]["message"],
                &lines[1]["pod_id"],
                &lines[1]["pod_name"],
                &lines[1]["pod_namespace"]
            ),
            (&"inside".into(), &"abc".into(), &"web-1".into(), &"shop".into())
        );
        assert!(
            lines[1]["target"].as_str().unwrap().contains("telemetry"),
            "{text}"
        );
        assert!(lines[1]["timestamp"].as_str().unwrap().ends_with('Z'), "{text}");
        assert_eq!(
            (&lines[2]["code"], &lines[2]["pod_id"]),
            (&5.into(), &"abc".into())
        );
    }

    #[test]
    fn text_lines_name_their_pod() {
        let text = written(LogFormat::Text, Level::Debug, || {
            let _in_pod = pod_span(&labels()).entered();
            log::debug!("inside");
        });
        assert!(text.contains("DEBUG") && text.contains("inside"), "{text}");
        assert!(text.contains("pod_name=\"web-1\""), "{text}");
    }

    #[test]
    fn addresses_of_collectors() {
        for (endpoint, url) in [
            ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
            ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
            ("http://c/otlp/v1/traces", "http://c/otlp/v1/traces"),
        ] {
            assert_eq!(traces_url(endpoint), url);
        }
    }

    /// A collector that keeps what it is sent.
    async fn collector() -> (
        String,
        tokio::sync::mpsc::Receiver<(String, ExportTraceServiceRequest)>,
    ) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let sender = sender.clone();
                let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                    let sender = sender.clone();
                    async move {
                        let path = request.uri().path().to_owned();
                        let body = request.into_body().collect().await.unwrap().to_bytes();
                        let spans = ExportTraceServiceRequest::decode(body).unwrap();
                        sender.send((path, spans)).await.unwrap();
                        Ok::<_, std::convert::Infallible>(Response::new(Full::new(Bytes::new())))
                    }
                });
                let stream = hyper_util::rt::TokioIo::new(stream);
                tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(stream, service));
            }
        });
        (address, receiver)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_collector_receives_the_steps_of_a_start() {
        several_subscribers();
        let (address, mut received) = collector().await;
        let traces = Tracing {
            otlp_endpoint: Some(address),
            sample_ratio: 1.0,
        };
        let provider = provider(&traces).unwrap();
        let guard = Guard(provider.clone());
        let quiet = Log {
            level: Level::Error,
            format: LogFormat::Text,
        };
        let subscriber = subscriber(&quiet, BoxMakeWriter::new(io::sink), provider.as_ref()).unwrap();
        let default = tracing::subscriber::set_default(subscriber);
        let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        async {
            let mut steps = Steps::new(&metrics(), "pod_start", &labels(), None, Some(traceparent));
            steps.next("network");
            tokio::task::yield_now().await;
            steps.next("boot");
            steps.done();
            let mut steps = Steps::new(&metrics(), "pod_start", &labels(), None, None);
            steps.next("network");
            steps.failed("internal", "no such bridge");
        }
        .instrument(pod_span(&labels()))
        .await;
        drop(default);
        tokio::task::spawn_blocking(move || drop(guard)).await.unwrap();

        let (path, request) = received.recv().await.unwrap();
        assert_eq!(path, "/v1/traces");
        let resource = &request.resource_spans[0];
        let service = &resource.resource.as_ref().unwrap().attributes;
        assert!(
            service
                .iter()
                .any(|a| a.key == "service.name" && format!("{a:?}").contains("cloisterd"))
        );
        let spans = &resource.scope_spans[0].spans;
        let names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
        assert_eq!(names, ["network", "boot", "pod_start", "network", "pod_start"]);
        let root = &spans[2];
        assert_eq!(
            root.trace_id,
            [
                0x0a, 0xf7, 0x65, 0x19, 0x16, 0xcd, 0x43, 0xdd, 0x84, 0x48, 0xeb, 0x21, 0x1c, 0x80, 0x31,
                0x9c
            ]
        );
        assert!(
            root.attributes
                .iter()
                .any(|a| a.key == "pod_name" && format!("{a:?}").contains("web-1"))
        );
        for step in &spans[..2] {
            assert_eq!(
                (&step.parent_span_id, &step.trace_id),
                (&root.span_id, &root.trace_id),
                "{}",
                step.name
            );
            assert!(step.start_time_unix_nano >= root.start_time_unix_nano);
            assert!(step.end_time_unix_nano <= root.end_time_unix_nano);
        }
        assert!(spans[0].end_time_unix_nano <= spans[1].end_time_unix_nano);
        let failed = spans[4].status.as_ref().unwrap();
        assert_eq!((failed.code, failed.message.as_str()), (2, "no such bridge"));
        assert_ne!(spans[4].trace_id, root.trace_id);
    }

    #[test]
    fn traces_need_a_runtime() {
        let traces = Tracing {
            otlp_endpoint: Some("http://127.0.0.1:1".into()),
            ..Tracing::default()
        };
        assert!(matches!(provider(&traces), Err(Error::Runtime(_))));
        assert!(provider(&Tracing::default()).unwrap().is_none());
    }
}
