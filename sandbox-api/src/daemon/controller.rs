// SPDX-License-Identifier: Apache-2.0
//! containerd's sandbox Controller service (containerd.services.sandbox.v1) over gRPC: requests and errors in its words, the
//! work in [`Sandbox`]. What iSulad says otherwise is in [`isulad`].

/// The generated server side.
pub mod api {
    #![allow(missing_docs, warnings, clippy::all, clippy::pedantic, clippy::unwrap_used)]
    include!(concat!(
        env!("OUT_DIR"),
        "/containerd.services.sandbox.v1.Controller.rs"
    ));
}

use super::config::DEFAULT_SANDBOXER;
use super::isulad::dialect::{
    PrepareRequest, PrepareResponse, PurgeRequest, PurgeResponse, StatusAnswer, Told, UpdateResourcesRequest,
    UpdateResourcesResponse,
};
use super::isulad::{self, tasks};
use super::node::{self, Node};
use super::pod_plan::{PodPlan, Refusal, UPDATED_RESOURCES, read_options, read_update};
use super::sandbox::{self, Phase, Sandbox};
use crate::clock::{self, Millis};
use crate::pod::resize;
use crate::pod::task::TaskService;
use cloister_protocol::RESOURCES_TYPE_URL;
use cloister_protocol::protobuf::MessageField;
use cloister_protocol::protobuf::well_known_types::any::Any;
use cloister_protocol::task::UpdateTaskRequest;
use cloister_protocol::ttrpc;
use cloister_protocol::{METRICS_PACKAGE, pack};
use containerd_client::services::v1::sandbox::*;
use containerd_client::types::{Metric, Platform};
use prost_types::Timestamp;
use std::collections::HashMap;
use std::sync::Arc;
use tonic::{Request, Response, Status};
use tracing::Instrument;

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
            node::Error::Closed => Self::unavailable(error.to_string()),
            node::Error::Exists(_) => Self::already_exists(error.to_string()),
            node::Error::Sandbox(source) => source.into(),
        }
    }
}

impl From<&sandbox::Error> for Status {
    fn from(error: &sandbox::Error) -> Self {
        match error {
            sandbox::Error::Phase { .. } => Self::failed_precondition(error.to_string()),
            sandbox::Error::Io { source, .. } if source.kind() == std::io::ErrorKind::InvalidInput => {
                Self::invalid_argument(error.to_string())
            }
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

/// containerd's namespace, which its clients put into the metadata; iSulad puts none.
fn namespace<T>(request: &Request<T>) -> Result<&str, Status> {
    let Some(value) = request.metadata().get("containerd-namespace") else {
        return Ok(isulad::NAMESPACE);
    };
    value
        .to_str()
        .ok()
        .filter(|name| !name.is_empty())
        .ok_or_else(|| Status::invalid_argument("namespace is required"))
}

fn is_isulad<T>(request: &Request<T>) -> bool {
    namespace(request).is_ok_and(|name| name == isulad::NAMESPACE)
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

fn address(sandbox: &Sandbox, is_draft: bool) -> String {
    let scheme = if is_draft { "unix" } else { "ttrpc+unix" };
    format!("{scheme}://{}", sandbox.socket().display())
}

/// The Task service of a pod that takes containers.
fn service(sandbox: &Sandbox) -> Result<&Arc<TaskService>, Status> {
    sandbox
        .service()
        .ok_or_else(|| Status::failed_precondition(format!("sandbox {}: not ready", sandbox.id())))
}

fn task_error(error: ttrpc::Error) -> Status {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            Status::new(tonic::Code::from_i32(status.code.value()), status.message)
        }
        other => Status::unknown(other.to_string()),
    }
}

impl Service {
    fn find<T>(&self, request: &Request<T>, id: &str) -> Result<Arc<Sandbox>, Status> {
        let namespace = namespace(request)?;
        self.0
            .find(namespace, id)
            .ok_or_else(|| Status::not_found(format!("sandbox {id}: not found")))
    }
}

#[tonic::async_trait]
impl api::controller_server::Controller for Service {
    async fn create(
        &self,
        request: Request<Told<ControllerCreateRequest>>,
    ) -> Answer<ControllerCreateResponse> {
        let namespace = namespace(&request)?.to_owned();
        let request = request.into_inner().message;
        let name = sandboxer(&request.sandboxer);
        let profile = self.0.sandboxer(name)?;
        let plan = PodPlan::new(read_options(request.options.as_ref())?, &profile)?;
        let id = request.sandbox_id;
        let sandbox = self.0.create(&namespace, &id, name, &request.netns_path, plan)?;
        sandbox.span().in_scope(|| log::info!("sandbox {id}: created"));
        Ok(Response::new(ControllerCreateResponse { sandbox_id: id }))
    }

    async fn start(&self, request: Request<Told<ControllerStartRequest>>) -> Answer<ControllerStartResponse> {
        let sandbox = self.find(&request, &request.get_ref().sandbox_id)?;
        // containerd has one where it traces its calls.
        let traceparent = request
            .metadata()
            .get("traceparent")
            .and_then(|value| value.to_str().ok());
        let started = async {
            sandbox.start(&self.0, traceparent).await?;
            log::info!("sandbox {}: ready", sandbox.id());
            Ok(())
        };
        started
            .instrument(sandbox.span())
            .await
            .map_err(|error: Arc<sandbox::Error>| Status::from(&*error))?;
        let record = sandbox.record();
        Ok(Response::new(ControllerStartResponse {
            sandbox_id: record.id,
            pid: std::process::id(),
            created_at: Some(timestamp(record.created)),
            labels: HashMap::new(),
            address: address(&sandbox, request.get_ref().is_draft),
            version: TASK_VERSION,
        }))
    }

    async fn platform(
        &self,
        request: Request<Told<ControllerPlatformRequest>>,
    ) -> Answer<ControllerPlatformResponse> {
        if !is_isulad(&request) {
            self.find(&request, &request.get_ref().sandbox_id)?;
        }
        let platform = Platform {
            os: "linux".into(),
            architecture: "amd64".into(),
            ..Default::default()
        };
        Ok(Response::new(ControllerPlatformResponse {
            platform: Some(platform),
        }))
    }

    async fn stop(&self, request: Request<Told<ControllerStopRequest>>) -> Answer<ControllerStopResponse> {
        let sandbox = match self.find(&request, &request.get_ref().sandbox_id) {
            // It stops and removes also what did not start.
            Err(_) if is_isulad(&request) => return Ok(Response::new(ControllerStopResponse {})),
            found => found?,
        };
        let stopped = async {
            sandbox.stop().await;
            log::info!("sandbox {}: stopped", sandbox.id());
        };
        stopped.instrument(sandbox.span()).await;
        Ok(Response::new(ControllerStopResponse {}))
    }

    async fn wait(&self, request: Request<Told<ControllerWaitRequest>>) -> Answer<ControllerWaitResponse> {
        let sandbox = self.find(&request, &request.get_ref().sandbox_id)?;
        let exit = sandbox.wait().await;
        Ok(Response::new(ControllerWaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)),
        }))
    }

    async fn status(&self, request: Request<Told<ControllerStatusRequest>>) -> Answer<StatusAnswer> {
        let sandbox = self.find(&request, &request.get_ref().sandbox_id)?;
        let is_draft = request.get_ref().is_draft;
        let record = sandbox.record();
        let is_ready = sandbox.phase() == Phase::Ready;
        let mut info = HashMap::new();
        if request.get_ref().verbose {
            let json = serde_json::to_string(&record).map_err(|e| Status::internal(e.to_string()))?;
            info.insert("cloister".to_owned(), json);
        }
        let status = ControllerStatusResponse {
            sandbox_id: record.id,
            pid: std::process::id(),
            state: if is_ready { READY } else { NOT_READY }.to_owned(),
            info,
            created_at: Some(timestamp(record.created)),
            exited_at: record.exit.map(|exit| timestamp(exit.at)),
            extra: None,
            address: if is_ready {
                address(&sandbox, is_draft)
            } else {
                String::new()
            },
            version: TASK_VERSION,
        };
        Ok(Response::new(StatusAnswer::new(status, is_draft)))
    }

    async fn shutdown(
        &self,
        request: Request<Told<ControllerShutdownRequest>>,
    ) -> Answer<ControllerShutdownResponse> {
        let sandbox = match self.find(&request, &request.get_ref().sandbox_id) {
            Err(_) if is_isulad(&request) => return Ok(Response::new(ControllerShutdownResponse {})),
            found => found?,
        };
        let removed = async {
            sandbox.remove().await;
            self.0.forget(&sandbox);
            log::info!("sandbox {}: removed", sandbox.id());
        };
        removed.instrument(sandbox.span()).await;
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
        if let Some(roots) = tasks::read(request.get_ref()) {
            service(&sandbox)?.prepare_only(roots.map_err(Status::invalid_argument)?);
        }
        let extensions = request.into_inner().sandbox.unwrap_or_default().extensions;
        if let Some(extension) = extensions.get(UPDATED_RESOURCES)
            && let Some((limits, overhead)) = read_update(extension)?
        {
            let resized = async {
                sandbox.resize(limits, overhead).await?;
                log::info!("sandbox {}: resized", sandbox.id());
                Ok(())
            };
            resized
                .instrument(sandbox.span())
                .await
                .map_err(|error: Arc<sandbox::Error>| Status::from(&*error))?;
        }
        Ok(Response::new(ControllerUpdateResponse {}))
    }

    async fn prepare(&self, request: Request<PrepareRequest>) -> Answer<PrepareResponse> {
        let sandbox = self.find(&request, &request.get_ref().sandbox_id)?;
        let request = request.into_inner();
        // An exec comes with all it needs.
        if !request.exec_id.is_empty() {
            return Ok(Response::new(PrepareResponse::default()));
        }
        let service = service(&sandbox)?;
        let spec = request.spec.unwrap_or_default().value;
        let bundle = sandbox
            .make_bundle(&request.container_id, &spec)
            .map_err(|error| Status::from(&error))?;
        let roots = request.rootfs.iter();
        let roots = roots.map(|root| tasks::mount(&root.r#type, &root.source, &root.options));
        service.prepare(&request.container_id, roots.collect());
        Ok(Response::new(PrepareResponse {
            bundle: bundle.display().to_string(),
        }))
    }

    async fn purge(&self, request: Request<PurgeRequest>) -> Answer<PurgeResponse> {
        // What is gone with its pod is purged.
        let Ok(sandbox) = self.find(&request, &request.get_ref().sandbox_id) else {
            return Ok(Response::new(PurgeResponse {}));
        };
        let request = request.get_ref();
        if request.exec_id.is_empty() {
            if let Some(service) = sandbox.service() {
                service.purge(&request.container_id);
            }
            sandbox.remove_bundle(&request.container_id);
        }
        Ok(Response::new(PurgeResponse {}))
    }

    async fn update_resources(
        &self,
        request: Request<UpdateResourcesRequest>,
    ) -> Answer<UpdateResourcesResponse> {
        let sandbox = self.find(&request, &request.get_ref().sandbox_id)?;
        let request = request.into_inner();
        let value = request.resources.unwrap_or_default().value;
        serde_json::from_slice::<oci_spec::runtime::LinuxResources>(&value)
            .map_err(|e| Status::invalid_argument(format!("resources: {e}")))?;
        let update = UpdateTaskRequest {
            id: request.container_id,
            resources: MessageField::some(Any {
                type_url: RESOURCES_TYPE_URL.to_owned(),
                value,
                ..Default::default()
            }),
            ..Default::default()
        };
        service(&sandbox)?
            .update_container(update)
            .instrument(sandbox.span())
            .await
            .map_err(task_error)?;
        Ok(Response::new(UpdateResourcesResponse {}))
    }
}
