// SPDX-License-Identifier: Apache-2.0
//! The messages of the early draft that iSulad spoke until 2025, under the names of containerd's.
//!
//! In all of the draft's requests field 1 is the sandboxer and field 2 the pod's id; in containerd's, field 1 is the id, field
//! 2 never a string, and field 10 the sandboxer. That tells them apart ([`is_draft`]). Answers have the same fields in both,
//! but for Status. The rest of the daemon sees containerd's messages only.

use containerd_client::services::v1::sandbox::*;
use containerd_client::types::Mount;
use prost::Message;
use prost::bytes::{Buf, BufMut};
use prost_types::{Any, Timestamp};
use std::collections::HashMap;
use std::marker::PhantomData;
use std::ops::Deref;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// A request in containerd's terms, and whether it came in the draft's.
#[derive(Debug)]
pub struct Told<T> {
    /// The request.
    pub message: T,
    /// Its sender speaks the draft.
    pub is_draft: bool,
}

impl<T> Deref for Told<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.message
    }
}

/// A request that the draft has, too.
pub trait InDraft: Message + Default + Sized {
    /// The draft's.
    type Draft: Message + Default + Into<Self>;
}

/// An answer.
pub trait Answer: Send + 'static {
    /// As it is sent.
    fn bytes(&self) -> Vec<u8>;
}

impl<T: Message + 'static> Answer for T {
    fn bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }
}

/// The answer to Status, in the dialect of who asked.
#[derive(Debug)]
pub enum StatusAnswer {
    /// containerd's.
    Current(ControllerStatusResponse),
    /// The draft's.
    Draft(DraftStatus),
}

impl StatusAnswer {
    /// The answer to one who does or does not speak the draft.
    pub fn new(status: ControllerStatusResponse, is_draft: bool) -> Self {
        if !is_draft {
            return Self::Current(status);
        }
        Self::Draft(DraftStatus {
            sandbox_id: status.sandbox_id,
            pid: status.pid,
            state: status.state,
            task_address: status.address,
            info: status.info,
            created_at: status.created_at,
            exited_at: status.exited_at,
            extra: status.extra,
        })
    }
}

impl Answer for StatusAnswer {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Current(message) => message.encode_to_vec(),
            Self::Draft(message) => message.encode_to_vec(),
        }
    }
}

/// Reads requests of either kind and writes answers.
#[derive(Debug)]
pub struct DialectCodec<A, R>(PhantomData<(A, R)>);

impl<A, R> Default for DialectCodec<A, R> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<A: Answer, R: InDraft + Send + 'static> Codec for DialectCodec<A, Told<R>> {
    type Encode = A;
    type Decode = Told<R>;
    type Encoder = Half<A>;
    type Decoder = Half<R>;

    fn encoder(&mut self) -> Half<A> {
        Half(PhantomData)
    }

    fn decoder(&mut self) -> Half<R> {
        Half(PhantomData)
    }
}

/// One direction of the codec.
#[derive(Debug)]
pub struct Half<T>(PhantomData<T>);

impl<A: Answer> Encoder for Half<A> {
    type Item = A;
    type Error = Status;

    fn encode(&mut self, answer: A, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let bytes = answer.bytes();
        to.reserve(bytes.len());
        to.put_slice(&bytes);
        Ok(())
    }
}

impl<R: InDraft + Send + 'static> Decoder for Half<R> {
    type Item = Told<R>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Told<R>>, Status> {
        let bytes = from.copy_to_bytes(from.remaining());
        read(&bytes)
            .map(Some)
            .map_err(|error| Status::invalid_argument(error.to_string()))
    }
}

fn read<R: InDraft>(bytes: &[u8]) -> Result<Told<R>, prost::DecodeError> {
    let is_draft = is_draft(bytes);
    let message = if is_draft {
        R::Draft::decode(bytes)?.into()
    } else {
        R::decode(bytes)?
    };
    Ok(Told { message, is_draft })
}

/// Reads a request to create a pod, of either kind.
///
/// # Errors
/// It is none.
pub fn read_create(bytes: &[u8]) -> Result<ControllerCreateRequest, prost::DecodeError> {
    Ok(read::<ControllerCreateRequest>(bytes)?.message)
}

/// The id of the pod that a request of either kind is about; none if it names none.
pub fn pod_of(mut bytes: &[u8]) -> Option<String> {
    let wanted = if is_draft(bytes) { 2 } else { 1 };
    let mut id = None;
    while !bytes.is_empty() {
        match next_field(&mut bytes)? {
            (field, Some(text)) if field == wanted => id = Some(text),
            _ => {}
        }
    }
    String::from_utf8(id?.to_vec()).ok()
}

/// Whether a request is the draft's: field 2 is a string such as an id, and there is no field 10.
fn is_draft(mut bytes: &[u8]) -> bool {
    let mut has_id = false;
    while !bytes.is_empty() {
        let Some((field, content)) = next_field(&mut bytes) else {
            return false;
        };
        match (field, content) {
            (10, _) => return false,
            // A mount begins with the tag of its own first field, a control character.
            (2, Some(text)) => has_id = !text.is_empty() && text.iter().all(u8::is_ascii_graphic),
            _ => {}
        }
    }
    has_id
}

/// Takes a field: its number, and its content if that is a string, bytes or a message. None where there is none.
fn next_field<'a>(bytes: &mut &'a [u8]) -> Option<(u64, Option<&'a [u8]>)> {
    let key = prost::encoding::decode_varint(bytes).ok()?;
    let length = match key & 7 {
        0 => {
            prost::encoding::decode_varint(bytes).ok()?;
            return Some((key >> 3, None));
        }
        1 => 8,
        2 => usize::try_from(prost::encoding::decode_varint(bytes).ok()?).ok()?,
        5 => 4,
        _ => return None,
    };
    let (content, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some((key >> 3, (key & 7 == 2).then_some(content)))
}

/// Requests of the draft that have nothing but their pod.
#[derive(Clone, PartialEq, Message)]
pub struct DraftPod {
    /// Sandboxer.
    #[prost(string, tag = "1")]
    pub sandboxer: String,
    /// Pod.
    #[prost(string, tag = "2")]
    pub sandbox_id: String,
}

macro_rules! only_their_pod {
    ($($request:ident)*) => {$(
        impl InDraft for $request {
            type Draft = DraftPod;
        }

        impl From<DraftPod> for $request {
            fn from(draft: DraftPod) -> Self {
                Self { sandboxer: draft.sandboxer, sandbox_id: draft.sandbox_id }
            }
        }
    )*};
}
only_their_pod!(ControllerStartRequest ControllerPlatformRequest ControllerWaitRequest ControllerShutdownRequest);

/// Create.
#[derive(Clone, PartialEq, Message)]
pub struct DraftCreate {
    /// Sandboxer.
    #[prost(string, tag = "1")]
    pub sandboxer: String,
    /// Pod.
    #[prost(string, tag = "2")]
    pub sandbox_id: String,
    /// Root file systems.
    #[prost(message, repeated, tag = "3")]
    pub rootfs: Vec<Mount>,
    /// Configuration.
    #[prost(message, optional, tag = "4")]
    pub options: Option<Any>,
    /// Network namespace.
    #[prost(string, tag = "5")]
    pub netns_path: String,
}

impl InDraft for ControllerCreateRequest {
    type Draft = DraftCreate;
}

impl From<DraftCreate> for ControllerCreateRequest {
    fn from(draft: DraftCreate) -> Self {
        Self {
            sandboxer: draft.sandboxer,
            sandbox_id: draft.sandbox_id,
            rootfs: draft.rootfs,
            options: draft.options,
            netns_path: draft.netns_path,
            ..Default::default()
        }
    }
}

/// Stop.
#[derive(Clone, PartialEq, Message)]
pub struct DraftStop {
    /// Sandboxer.
    #[prost(string, tag = "1")]
    pub sandboxer: String,
    /// Pod.
    #[prost(string, tag = "2")]
    pub sandbox_id: String,
    /// Patience.
    #[prost(uint32, tag = "3")]
    pub timeout_secs: u32,
}

impl InDraft for ControllerStopRequest {
    type Draft = DraftStop;
}

impl From<DraftStop> for ControllerStopRequest {
    fn from(draft: DraftStop) -> Self {
        Self {
            sandboxer: draft.sandboxer,
            sandbox_id: draft.sandbox_id,
            timeout_secs: draft.timeout_secs,
        }
    }
}

/// Status.
#[derive(Clone, PartialEq, Message)]
pub struct DraftStatusRequest {
    /// Sandboxer.
    #[prost(string, tag = "1")]
    pub sandboxer: String,
    /// Pod.
    #[prost(string, tag = "2")]
    pub sandbox_id: String,
    /// With more in `info`.
    #[prost(bool, tag = "3")]
    pub verbose: bool,
}

impl InDraft for ControllerStatusRequest {
    type Draft = DraftStatusRequest;
}

impl From<DraftStatusRequest> for ControllerStatusRequest {
    fn from(draft: DraftStatusRequest) -> Self {
        Self {
            sandboxer: draft.sandboxer,
            sandbox_id: draft.sandbox_id,
            verbose: draft.verbose,
        }
    }
}

/// The answer to Status.
#[derive(Clone, PartialEq, Message)]
pub struct DraftStatus {
    /// Pod.
    #[prost(string, tag = "1")]
    pub sandbox_id: String,
    /// The daemon.
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    /// SANDBOX_READY or SANDBOX_NOTREADY.
    #[prost(string, tag = "3")]
    pub state: String,
    /// Where the Task service listens.
    #[prost(string, tag = "4")]
    pub task_address: String,
    /// More.
    #[prost(map = "string, string", tag = "5")]
    pub info: HashMap<String, String>,
    /// When it was created.
    #[prost(message, optional, tag = "6")]
    pub created_at: Option<Timestamp>,
    /// When it ended.
    #[prost(message, optional, tag = "7")]
    pub exited_at: Option<Timestamp>,
    /// Nothing.
    #[prost(message, optional, tag = "8")]
    pub extra: Option<Any>,
}

/// Prepare: a container, or an exec, that is about to be created.
#[derive(Clone, PartialEq, Message)]
pub struct PrepareRequest {
    /// Sandboxer.
    #[prost(string, tag = "1")]
    pub sandboxer: String,
    /// Pod.
    #[prost(string, tag = "2")]
    pub sandbox_id: String,
    /// Container.
    #[prost(string, tag = "3")]
    pub container_id: String,
    /// Exec; empty for the container itself.
    #[prost(string, tag = "4")]
    pub exec_id: String,
    /// The OCI specification, or an exec's process, as JSON.
    #[prost(message, optional, tag = "5")]
    pub spec: Option<Any>,
    /// Root file system.
    #[prost(message, repeated, tag = "6")]
    pub rootfs: Vec<Mount>,
    /// Fifo.
    #[prost(string, tag = "7")]
    pub stdin: String,
    /// Fifo.
    #[prost(string, tag = "8")]
    pub stdout: String,
    /// Fifo.
    #[prost(string, tag = "9")]
    pub stderr: String,
    /// With a terminal.
    #[prost(bool, tag = "10")]
    pub terminal: bool,
}

/// Its answer.
#[derive(Clone, PartialEq, Message)]
pub struct PrepareResponse {
    /// The folder to give to Task.Create.
    #[prost(string, tag = "1")]
    pub bundle: String,
}

/// Purge: it is over.
#[derive(Clone, PartialEq, Message)]
pub struct PurgeRequest {
    /// Sandboxer.
    #[prost(string, tag = "1")]
    pub sandboxer: String,
    /// Pod.
    #[prost(string, tag = "2")]
    pub sandbox_id: String,
    /// Container.
    #[prost(string, tag = "3")]
    pub container_id: String,
    /// Exec; empty for the container itself.
    #[prost(string, tag = "4")]
    pub exec_id: String,
}

/// Its answer.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct PurgeResponse {}

/// UpdateResources.
#[derive(Clone, PartialEq, Message)]
pub struct UpdateResourcesRequest {
    /// Sandboxer.
    #[prost(string, tag = "1")]
    pub sandboxer: String,
    /// Pod.
    #[prost(string, tag = "2")]
    pub sandbox_id: String,
    /// Container.
    #[prost(string, tag = "3")]
    pub container_id: String,
    /// OCI's LinuxResources as JSON.
    #[prost(message, optional, tag = "4")]
    pub resources: Option<Any>,
    /// Annotations.
    #[prost(map = "string, string", tag = "5")]
    pub annotations: HashMap<String, String>,
}

/// Its answer.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct UpdateResourcesResponse {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        let draft = DraftCreate {
            sandboxer: "cloister".into(),
            sandbox_id: "abc-1".into(),
            rootfs: vec![Mount {
                source: "/r".into(),
                ..Default::default()
            }],
            options: Some(Any {
                type_url: String::new(),
                value: b"{}".to_vec(),
            }),
            netns_path: "/n".into(),
        };
        let told: Told<ControllerCreateRequest> = read(&draft.encode_to_vec()).unwrap();
        assert!(told.is_draft);
        assert_eq!(
            (
                told.sandboxer.as_str(),
                told.sandbox_id.as_str(),
                told.netns_path.as_str()
            ),
            ("cloister", "abc-1", "/n")
        );
        assert_eq!(pod_of(&draft.encode_to_vec()).as_deref(), Some("abc-1"));
        assert_eq!((told.rootfs.len(), told.options.clone()), (1, draft.options));
        let stop = DraftStop {
            sandboxer: "c".into(),
            sandbox_id: "a".into(),
            timeout_secs: 7,
        };
        let told: Told<ControllerStopRequest> = read(&stop.encode_to_vec()).unwrap();
        assert_eq!((told.is_draft, told.timeout_secs), (true, 7));

        let current = ControllerCreateRequest {
            sandbox_id: "abc-1".into(),
            rootfs: vec![Mount {
                r#type: "bind".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let named = ControllerCreateRequest {
            sandboxer: "cloister".into(),
            ..current.clone()
        };
        for request in [current, named] {
            let told: Told<ControllerCreateRequest> = read(&request.encode_to_vec()).unwrap();
            assert_eq!(pod_of(&request.encode_to_vec()).as_deref(), Some("abc-1"));
            assert_eq!((told.is_draft, told.message), (false, request));
        }
        let verbose = ControllerStatusRequest {
            sandbox_id: "a".into(),
            verbose: true,
            ..Default::default()
        };
        let told: Told<ControllerStatusRequest> = read(&verbose.encode_to_vec()).unwrap();
        assert_eq!((told.is_draft, told.verbose), (false, true));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for bytes in [
            &[0xff][..],
            &[0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            &[0x12, 3, b'a'],
            &[0x13],
            &[0x0a, 0x80],
            &[0x12, 1, b'a', 0x0a, 9],
        ] {
            assert!(!is_draft(bytes), "{bytes:?}");
            assert!(read::<ControllerStopRequest>(bytes).is_err(), "{bytes:?}");
            assert_eq!(pod_of(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn a_status_in_each_dialect() {
        let status = ControllerStatusResponse {
            sandbox_id: "a".into(),
            state: "SANDBOX_READY".into(),
            address: "unix:///s".into(),
            created_at: Some(Timestamp { seconds: 5, nanos: 0 }),
            ..Default::default()
        };
        let bytes = StatusAnswer::new(status.clone(), true).bytes();
        let draft = DraftStatus::decode(bytes.as_slice()).unwrap();
        assert_eq!(
            (draft.task_address.as_str(), draft.created_at.unwrap().seconds),
            ("unix:///s", 5)
        );
        let bytes = StatusAnswer::new(status.clone(), false).bytes();
        assert_eq!(
            ControllerStatusResponse::decode(bytes.as_slice()).unwrap(),
            status
        );
    }
}
