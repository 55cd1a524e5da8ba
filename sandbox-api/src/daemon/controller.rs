// SPDX-License-Identifier: Apache-2.0
//! containerd's sandbox Controller service (containerd.services.sandbox.v1) over gRPC: requests and errors in its words, the
//! work in [`Sandbox`].

/// The generated server side.
pub mod api {
    #![allow(missing_docs, warnings, clippy::all, clippy::pedantic, clippy::unwrap_used)]
    include!(concat!(
        env!("OUT_DIR"),
        "/containerd.services.sandbox.v1.Controller.rs"
    ));
}

use super::config::DEFAULT_SANDBOXER;
use super::node::{self, Node};
use super::pod_plan::{PodPlan, Refusal, UPDATED_RESOURCES, read_options, read_update};
use super::sandbox::{self, Phase, Sandbox};
use crate::clock::{self, Millis};
use crate::pod::resize;
use cloister_protocol::{METRICS_PACKAGE, pack};
use containerd_client::services::v1::sandbox::*;
use containerd_client::types::{Metric, Platform};
use prost_types::Timestamp;
use std::collections::HashMap;
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// The Task API's version that the address in Start's answer speaks.
const TASK_VERSION: u32 = 3;
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// See the module.
pub struct Service(pub Arc<Node>);

type Answer<T> = Result<Response<T>, Status>;

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Unsupported(_) => Self::unimplemented(refusal.to_string()),
            Refusal::Options(_) => Self::invalid_argument(refusal.to_string()),
            Refusal::TooMuch(_) => Self::out_of_range(refusal.to_string()),
        }
    }
}

impl From<node::Error> for Status {
    fn from(error: node::Error) -> Self {
        match &error {
            node::Error::Id(_) | node::Error::Sandboxer { .. } => Self::invalid_argument(error.to_string()),
            node::Error::Exists(_) => Self::already_exists(error.to_string()),
            node::Error::Sandbox(source) => source.into(),
        }
    }
}

impl From<&sandbox::Error> for Status {
    fn from(error: &sandbox::Error) -> Self {
        match error {
            sandbox::Error::Phase { .. } => Self::failed_precondition(error.to_string()),
            sandbox::Error::Resize { source, .. } => match source {
                resize::Error::TooMuch(_) => Self::out_of_range(error.to_string()),
                _ => Self::unavailable(error.to_string()),
            },
            sandbox::Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                Self::resource_exhausted(error.to_string())
            }
            _ => Self::unknown(error.to_string()),
        }
    }
}

/// containerd's namespace, which its client puts into the metadata.
fn namespace<T>(request: &Request<T>) -> Result<String, Status> {
    let value = request.metadata().get("containerd-namespace");
    let name = value
        .and_then(|value| value.to_str().ok())
        .filter(|name| !name.is_empty());
    name.map(str::to_owned)
        .ok_or_else(|| Status::invalid_argument("namespace is required"))
}

fn timestamp(time: Millis) -> Timestamp {
    Timestamp {
        seconds: time.div_euclid(1000),
        nanos: i32::try_from(time.rem_euclid(1000))
            .unwrap_or(0)
            .saturating_mul(1_000_000),
    }
}

/// Those before 2.x leave the name out; then it is the one that is always there.
fn sandboxer(name: &str) -> &str {
    if name.is_empty() { DEFAULT_SANDBOXER } else { name }
}

fn address(sandbox: &Sandbox) -> String {
    format!("ttrpc+unix://{}", sandbox.socket().display())
}

impl Service {
    fn find<T>(&self, request: &Request<T>, id: &str) -> Result<Arc<Sandbox>, Status> {
        let namespace = namespace(request)?;
        self.0
            .find(&namespace, id)
            .ok_or_else(|| Status::not_found(format!("sandbox {id}: not found")))
    }
}

#[tonic::async_trait]
impl api::controller_server::Controller for Service {
    async fn create(&self, request: Request<ControllerCreateRequest>) -> Answer<ControllerCreateResponse> {
        let namespace = namespace(&request)?;
        let request = request.into_inner();
        let name = sandboxer(&request.sandboxer);
        let profile = self.0.sandboxer(name)?;
        let plan = PodPlan::new(read_options(request.options.as_ref())?, &profile)?;
        let id = request.sandbox_id;
        self.0.create(&namespace, &id, name, &request.netns_path, plan)?;
        log::info!("sandbox {id}: created");
        Ok(Response::new(ControllerCreateResponse { sandbox_id: id }))
    }

    async fn start(&self, request: Request<ControllerStartRequest>) -> Answer<ControllerStartResponse> {
        let sandbox = self.find(&request, &request.get_ref().sandbox_id)?;
        // containerd has one where it traces its calls.
        let traceparent = request
            .metadata()
            .get("traceparent")
            .and_then(|value| value.to_str().ok());
        sandbox
            .start(&self.0, traceparent)
            .await
            .map_err(|error| Status::from(&*error))?;
        let record = sandbox.record();
        log::info!("sandbox {}: ready", record.id);
        Ok(Response::new(ControllerStartResponse {
            sandbox_id: record.id,
            pid: std::process::id(),
            created_at: Some(timestamp(record.created)),
            labels: HashMap::new(),
            address: address(&sandbox),
            version: TASK_VERSION,
        }))
    }

    async fn platform(
        &self,
        request: Request<ControllerPlatformRequest>,
    ) -> Answer<ControllerPlatformResponse> {
        self.find(&request, &request.get_ref().sandbox_id)?;
        let platform = Platform {
            os: "linux".into(),
            architecture: "amd64".into(),
            ..Default::default()
        };
        Ok(Response::new(ControllerPlatformResponse {
            platform: Some(platform),
        }))
    }

    async fn stop(&self, request: Request<ControllerStopRequest>) -> Answer<ControllerStopResponse> {
        let sandbox = self.find(&request, &request.get_ref().sandbox_id)?;
        sandbox.stop().await;
        log::info!("sandbox {}: stopped", sandbox.id());
        Ok(Response::new(ControllerStopResponse {}))
    }

    async fn wait(&self, request: Request<ControllerWaitRequest>) -> Answer<ControllerWaitResponse> {
        let sandbox = self.find(&request, &request.get_ref().sandbox_id)?;
        let exit = sandbox.wait().await;
        Ok(Response::new(ControllerWaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)),
        }))
    }

    async fn status(&self, request: Request<ControllerStatusRequest>) -> Answer<ControllerStatusResponse> {
        let sandbox = self.find(&request, &request.get_ref().sandbox_id)?;
        let record = sandbox.record();
        let is_ready = sandbox.phase() == Phase::Ready;
        let mut info = HashMap::new();
        if request.get_ref().verbose {
            let json = serde_json::to_string(&record).map_err(|e| Status::internal(e.to_string()))?;
            info.insert("cloister".to_owned(), json);
        }
        Ok(Response::new(ControllerStatusResponse {
            sandbox_id: record.id,
            pid: std::process::id(),
            state: if is_ready { READY } else { NOT_READY }.to_owned(),
            info,
            created_at: Some(timestamp(record.created)),
            exited_at: record.exit.map(|exit| timestamp(exit.at)),
            extra: None,
            address: if is_ready {
                address(&sandbox)
            } else {
                String::new()
            },
            version: TASK_VERSION,
        }))
    }

    async fn shutdown(
        &self,
        request: Request<ControllerShutdownRequest>,
    ) -> Answer<ControllerShutdownResponse> {
        let sandbox = self.find(&request, &request.get_ref().sandbox_id)?;
        sandbox.remove().await;
        self.0.forget(&sandbox);
        log::info!("sandbox {}: removed", sandbox.id());
        Ok(Response::new(ControllerShutdownResponse {}))
    }

    async fn metrics(&self, request: Request<ControllerMetricsRequest>) -> Answer<ControllerMetricsResponse> {
        let sandbox = self.find(&request, &request.get_ref().sandbox_id)?;
        let usage = sandbox.usage().await.map_err(|error| Status::from(&*error))?;
        let data = pack(METRICS_PACKAGE, &usage).map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(ControllerMetricsResponse {
            metrics: Some(Metric {
                timestamp: Some(timestamp(clock::now())),
                id: sandbox.id(),
                data: Some(prost_types::Any {
                    type_url: data.type_url,
                    value: data.value,
                }),
            }),
        }))
    }

    async fn update(&self, request: Request<ControllerUpdateRequest>) -> Answer<ControllerUpdateResponse> {
        let sandbox = self.find(&request, &request.get_ref().sandbox_id)?;
        let extensions = request.into_inner().sandbox.unwrap_or_default().extensions;
        if let Some(extension) = extensions.get(UPDATED_RESOURCES)
            && let Some((limits, overhead)) = read_update(extension)?
        {
            sandbox
                .resize(limits, overhead)
                .await
                .map_err(|error| Status::from(&*error))?;
            log::info!("sandbox {}: resized", sandbox.id());
        }
        Ok(Response::new(ControllerUpdateResponse {}))
    }
}
