// SPDX-License-Identifier: Apache-2.0
//! Takes requests for the Controller service to the process that has the pod: the daemon, or a worker.
//!
//! Requests and answers go through as the bytes that came, with their headers, in whatever dialect they are: only the pod's id
//! is read, and of Create what says which worker it needs. A request whose worker ends meanwhile is answered by the daemon as one
//! for a pod that has ended; so a Wait that went to the worker ends with the worker.

use super::super::config::DEFAULT_SANDBOXER;
use super::super::controller::Service;
use super::super::controller::api::controller_server::ControllerServer;
use super::super::isulad::dialect;
use super::super::node::Node;
use super::super::pod_plan::{PodPlan, read_options};
use super::process::Cgroup;
use super::{Wanted, Worker, cgroup};
use crate::clock::Millis;
use http::{HeaderMap, Request, Response, Uri};
use http_body_util::{BodyExt, Collected, Full, LengthLimitError, Limited};
use hyper::body::Bytes;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Code, Status};
use tower::{Service as _, ServiceExt};

/// Largest request and answer: tonic's own limit.
const MAX_MESSAGE: usize = 4 << 20;
/// Time from a connection's end until the process is seen to have ended, and its pods are taken over.
const DEATH: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Clone)]
pub struct Router {
    own: ControllerServer<Service>,
    node: Arc<Node>,
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Router")
    }
}

/// A request, complete.
struct Call {
    uri: Uri,
    headers: HeaderMap,
    bytes: Bytes,
}

/// A worker's answer, complete.
struct Answer {
    head: http::response::Parts,
    body: Collected<Bytes>,
}

impl Call {
    fn request(&self) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::from(self.bytes.clone()));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = self.uri.clone();
        *request.version_mut() = http::Version::HTTP_2;
        *request.headers_mut() = self.headers.clone();
        request
    }

    fn method(&self) -> &str {
        self.uri.path().rsplit('/').next().unwrap_or_default()
    }

    /// The message in a gRPC request: a byte that says whether it is compressed, four of its length, and itself.
    fn message(&self) -> Option<&[u8]> {
        let (head, message) = self.bytes.split_first_chunk::<5>()?;
        let [compressed, length @ ..] = *head;
        let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
        (compressed == 0 && length == message.len()).then_some(message)
    }
}

impl Answer {
    fn code(&self) -> Code {
        // The status of a call that failed at once is in the headers.
        let status = Status::from_header_map(&self.head.headers)
            .or_else(|| Status::from_header_map(self.body.trailers()?));
        status.map_or(Code::Unknown, |status| status.code())
    }

    fn response(self) -> Response<Body> {
        Response::from_parts(self.head, Body::new(self.body))
    }
}

/// Why a request did not come whole, with the code that gRPC has for it.
fn unread(error: &(dyn std::error::Error + 'static)) -> Status {
    if error.is::<LengthLimitError>() {
        Status::resource_exhausted(format!("the request is larger than {MAX_MESSAGE} bytes"))
    } else {
        Status::cancelled(format!("the request broke off: {error}"))
    }
}

impl Worker {
    /// Hands a request on.
    async fn call(&self, call: &Call) -> Result<Answer, String> {
        let request = call.request().map(Body::new);
        let answer = self.channel.clone().oneshot(request);
        let (head, body) = answer.await.map_err(|e| crate::error::chain(&e))?.into_parts();
        let body = Limited::new(body, MAX_MESSAGE).collect().await;
        let body = body.map_err(|e| e.to_string())?;
        Ok(Answer { head, body })
    }
}

impl Router {
    /// The service of a node.
    pub fn new(node: Arc<Node>) -> Self {
        Self {
            own: ControllerServer::new(Service(Arc::clone(&node))),
            node,
        }
    }

    async fn route(self, request: Request<Body>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let bytes = match Limited::new(body, MAX_MESSAGE).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => return unread(&*error).into_http(),
        };
        let call = Call {
            uri: head.uri,
            headers: head.headers,
            bytes,
        };
        // What cannot be read is refused by the service.
        let id = call.message().and_then(dialect::pod_of);
        let Some(id) = id else {
            return self.own(&call).await;
        };
        if call.method() == "Create"
            && let Some(wanted) = self.wanted(&call, &id)
        {
            // To its end, even if the caller gives up: no process is left that nobody knows.
            let created = tokio::spawn(self.create(call, id, wanted)).await;
            return created.unwrap_or_else(|e| Status::internal(e.to_string()).into_http());
        }
        match self.node.workers.of(&id) {
            Some(worker) => self.forward(call, &id, &worker).await,
            None => self.own(&call).await,
        }
    }

    async fn own(mut self, call: &Call) -> Response<Body> {
        let Ok(answer) = self.own.call(call.request()).await;
        answer
    }

    async fn forward(self, call: Call, id: &str, worker: &Arc<Worker>) -> Response<Body> {
        let error = match worker.call(&call).await {
            Ok(answer) => return answer.response(),
            Err(error) => error,
        };
        match worker.ended(DEATH).await {
            // Its pod is ours now, unless it had not come up: then this is all that is said of it.
            Some(how) if call.method() == "Start" => {
                Status::unavailable(format!("sandbox {id}: its worker {how}")).into_http()
            }
            Some(_) => self.own(&call).await,
            None => {
                log::warn!(
                    "sandbox {id}: its worker {} does not answer: {error}",
                    worker.about.name
                );
                Status::unavailable(format!("sandbox {id}: its worker does not answer: {error}")).into_http()
            }
        }
    }

    /// Which worker a pod that can be had needs; none for one that the daemon hosts, or refuses.
    fn wanted(&self, call: &Call, id: &str) -> Option<Wanted> {
        let request = dialect::read_create(call.message()?).ok()?;
        let name = match request.sandboxer.as_str() {
            "" => DEFAULT_SANDBOXER,
            name => name,
        };
        let profile = self.node.sandboxer(name).ok()?;
        let pods = profile.pods_per_worker;
        if pods == 0 || self.node.knows(id) || Node::check_id(id).is_err() {
            return None;
        }
        let plan = PodPlan::new(read_options(request.options.as_ref()).ok()?, &profile).ok()?;
        let cgroup = (pods == 1)
            .then(|| cgroup::path_of(&plan.cgroup_parent))
            .flatten();
        Some(Wanted {
            sandboxer: name.to_owned(),
            pods,
            cgroup: cgroup.map(|parent| Cgroup {
                parent,
                name: format!("cloister-{id}"),
            }),
        })
    }

    /// A worker that is on its way out is given up for a fresh one, once.
    async fn create(self, call: Call, id: String, wanted: Wanted) -> Response<Body> {
        let workers = &self.node.workers;
        let mut failure = String::new();
        for fresh in [false, true] {
            let (worker, is_new) = workers.place(&id, &wanted, fresh);
            if let Err(error) = workers.start(&self.node, &worker).await {
                let told = format!("sandbox {id}: cannot start a worker for it: {error}");
                return Status::unavailable(told).into_http();
            }
            match worker.call(&call).await {
                Ok(answer) if answer.code() == Code::Unavailable => {
                    worker.close();
                    "its worker ends".clone_into(&mut failure);
                    workers.forget_pod(&id, &worker, Millis::MAX);
                }
                Ok(answer) => {
                    if answer.code() != Code::Ok && is_new {
                        workers.forget_pod(&id, &worker, Millis::MAX);
                    }
                    return answer.response();
                }
                Err(error) => {
                    let ended = worker.ended(DEATH).await;
                    failure = ended.map_or(error, |how| format!("its worker {how}"));
                    workers.forget_pod(&id, &worker, Millis::MAX);
                }
            }
        }
        Status::unavailable(format!("sandbox {id}: {failure}")).into_http()
    }
}

impl tower::Service<Request<Body>> for Router {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let router = self.clone();
        Box::pin(async move { Ok(router.route(request).await) })
    }
}

impl NamedService for Router {
    const NAME: &'static str = <ControllerServer<Service> as NamedService>::NAME;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(bytes: &'static [u8]) -> Call {
        Call {
            uri: Uri::from_static("/containerd.services.sandbox.v1.Controller/Wait"),
            headers: HeaderMap::new(),
            bytes: Bytes::from_static(bytes),
        }
    }

    #[test]
    fn a_message_is_taken_from_its_frame() {
        assert_eq!(call(b"\0\0\0\0\x02ab").message(), Some(&b"ab"[..]));
        assert_eq!(call(b"\0\0\0\0\0").message(), Some(&b""[..]));
        assert_eq!(call(b"").method(), "Wait");
        for bytes in [
            &b""[..],
            b"\0\0\0\0",
            // Compressed, cut, with something behind it.
            b"\x01\0\0\0\x01a",
            b"\0\0\0\0\x02a",
            b"\0\0\0\0\x01ab",
            b"\0\xff\xff\xff\xffab",
        ] {
            assert_eq!(call(bytes).message(), None, "{bytes:?}");
        }
    }
}
