// SPDX-License-Identifier: Apache-2.0
//! Against the client of the crate ttrpc, which does what containerd's does.

use super::super::streams::{Hub, Pumps, Stdio};
use super::*;
use cloister_protocol::stream::StreamId;
use cloister_protocol::ttrpc::asynchronous::transport::{Listener, Socket};
use cloister_protocol::ttrpc::asynchronous::{Client, Server, StreamInner};
use std::path::PathBuf;

struct Bed {
    path: PathBuf,
    hub: Arc<Hub>,
    server: Server,
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

struct Nothing;
#[async_trait::async_trait]
impl cloister_protocol::task::Task for Nothing {}

async fn bed() -> Bed {
    let path = std::env::temp_dir().join(format!("cloister-streaming-{}", crate::ids::random_hex(6)));
    let hub = Hub::new();
    let incoming = divert(UnixListener::bind(&path).unwrap(), Arc::clone(hub.desk()));
    let mut server = Server::new()
        .add_listener(Listener::new(incoming))
        .register_service(cloister_protocol::create_task(Arc::new(Nothing)));
    server.start().await.unwrap();
    Bed { path, hub, server }
}

impl Bed {
    async fn client(&self) -> Client {
        Client::new(Socket::new(UnixStream::connect(&self.path).await.unwrap()))
    }

    /// As containerd opens a stream. The connection lives as long as the client.
    async fn open(&self, name: &str) -> (Client, StreamInner) {
        let client = self.client().await;
        let mut stream = client.new_stream(request("Stream"), true, true).await.unwrap();
        put(&stream, &StreamInit { id: name.into() }).await;
        let known = Any::decode(&*stream.recv().await.unwrap()).unwrap();
        assert_eq!(known.type_url, "google.protobuf.Empty");
        (client, stream)
    }

    /// A process of which the guest's ends of stdin and stdout are answered.
    async fn process(&self, stdin: &str, stdout: &str) -> (Pumps, Vec<UnixStream>) {
        let address = |name: &str| match name {
            "" => String::new(),
            name => format!("ttrpc+unix://{}?streaming_id={name}", self.path.display()),
        };
        let stdio = Stdio::from_request(&address(stdin), &address(stdout), "").unwrap();
        let (pumps, names) = Pumps::start(&self.hub, stdio, false).unwrap();
        let mut ends = Vec::new();
        for name in names.iter().filter(|name| !name.is_empty()) {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            let id = StreamId::from_name(name).unwrap();
            std::io::Write::write_all(&mut &theirs, &id.header()).unwrap();
            self.hub.accepted(ours);
            theirs.set_nonblocking(true).unwrap();
            ends.push(UnixStream::from_std(theirs).unwrap());
        }
        (pumps, ends)
    }
}

fn request(method: &str) -> ttrpc::proto::Request {
    let mut request = ttrpc::proto::Request::new();
    request.service = SERVICE.to_owned();
    request.method = method.to_owned();
    request
}

async fn put<M: prost::Message + Name>(stream: &StreamInner, message: &M) {
    let any = Any {
        type_url: M::full_name(),
        value: message.encode_to_vec(),
    };
    stream.send(any.encode_to_vec()).await.unwrap();
}

async fn get<M: prost::Message + Name + Default>(stream: &mut StreamInner) -> M {
    unpacked(&Any::decode(&*stream.recv().await.unwrap()).unwrap()).unwrap()
}

async fn allow(stream: &StreamInner, update: i32) {
    put(stream, &WindowUpdate { update }).await;
}

/// The process has ended. Its end is not told before the client has closed the stream, of which this is the end.
async fn ends(pumps: Pumps, client: Client, mut stream: StreamInner) {
    let finish = tokio::spawn(pumps.finish(Duration::from_secs(60)));
    let end = stream.recv().await;
    assert!(matches!(end, Err(ttrpc::Error::Eof)), "{end:?}");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!finish.is_finished(), "the client may be at the last bytes");
    drop((client, stream));
    tokio::time::timeout(Duration::from_secs(10), finish)
        .await
        .expect("the end is told")
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn output_comes_as_it_is_allowed_and_ends() {
    let bed = bed().await;
    let (client, mut stream) = bed.open("c-stdout").await;
    let (pumps, mut guest) = bed.process("", "c-stdout").await;
    let payload: Vec<u8> = (0..300_000u32).map(|n| n.to_le_bytes()[0]).collect();
    let sent = payload.clone();
    let mut guest = guest.remove(0);
    let writer = tokio::spawn(async move { guest.write_all(&sent).await.unwrap() });
    allow(&stream, 10).await;
    let mut came = get::<Data>(&mut stream).await.data;
    assert_eq!(came, payload[..10]);
    while came.len() < payload.len() {
        allow(&stream, 64 << 10).await;
        let most = came.len() + (64 << 10);
        while came.len() < most.min(payload.len()) {
            came.extend(get::<Data>(&mut stream).await.data);
        }
        assert!(came.len() <= most);
    }
    assert_eq!(came, payload);
    writer.await.unwrap();
    ends(pumps, client, stream).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn input_keeps_its_order_and_ends_with_close_io() {
    let bed = bed().await;
    // The process is there first.
    let (pumps, mut ends) = bed.process("c-stdin", "").await;
    let (_client, mut stream) = bed.open("c-stdin").await;
    let mut guest = ends.remove(0);
    let reader = tokio::spawn(async move {
        let mut came = Vec::new();
        guest.read_to_end(&mut came).await.unwrap();
        came
    });
    let payload: Vec<u8> = (0..20_000u32).flat_map(u32::to_le_bytes).collect();
    let mut allowed = 0;
    for piece in payload.chunks(100) {
        while allowed < piece.len() {
            allowed += usize::try_from(get::<WindowUpdate>(&mut stream).await.update).unwrap();
        }
        allowed -= piece.len();
        put(&stream, &Data { data: piece.to_vec() }).await;
    }
    pumps.close_input();
    let came = reader.await.unwrap();
    assert!(came == payload, "{} bytes came", came.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_connects_again_gets_the_rest() {
    let bed = bed().await;
    let (client, mut stream) = bed.open("c-stdout").await;
    let (pumps, mut guest) = bed.process("", "c-stdout").await;
    guest[0].write_all(b"first").await.unwrap();
    allow(&stream, 5).await;
    assert_eq!(get::<Data>(&mut stream).await.data, b"first");
    drop((client, stream));
    guest[0].write_all(b"second").await.unwrap();
    let (client, mut stream) = bed.open("c-stdout").await;
    allow(&stream, 100).await;
    assert_eq!(get::<Data>(&mut stream).await.data, b"second");
    drop(guest);
    ends(pumps, client, stream).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_says_nothing_ends_its_stream() {
    let bed = bed().await;
    let (client, stream) = bed.open("there-stdout").await;
    let (pumps, guest) = bed.process("", "there-stdout").await;
    drop(guest);
    ends(pumps, client, stream).await;
    let (pumps, guest) = bed.process("", "late-stdout").await;
    drop(guest);
    tokio::time::timeout(Duration::from_secs(5), pumps.finish(Duration::from_secs(30)))
        .await
        .expect("nobody waits for a client that is not there");
    let (_client, mut stream) = bed.open("late-stdout").await;
    assert!(matches!(stream.recv().await, Err(ttrpc::Error::Eof)));
}

#[tokio::test(flavor = "multi_thread")]
async fn others_are_let_through_and_what_is_wrong_is_refused() {
    let mut bed = bed().await;
    let mut stream = bed
        .client()
        .await
        .new_stream(request("Other"), true, true)
        .await
        .unwrap();
    let refused = stream.recv().await.unwrap_err();
    assert!(
        matches!(&refused, ttrpc::Error::RpcStatus(status) if status.code() == Code::UNIMPLEMENTED),
        "{refused:?}"
    );
    // A frame that promises too much, one that is none, and a name that is too long.
    let mut huge = vec![0xff; HEADER];
    huge.extend(BEGIN);
    huge.extend(SERVICE.as_bytes());
    let mut none = vec![0, 0, 0, 44, 0, 0, 0, 1, MESSAGE_TYPE_REQUEST, 0];
    none.extend(BEGIN);
    none.extend(SERVICE.as_bytes());
    none.extend([0, 0, 0, 1, 0xff, 0, 0, 0, 1, 99, 0, 7]);
    for bytes in [huge, none] {
        let mut socket = UnixStream::connect(&bed.path).await.unwrap();
        socket.write_all(&bytes).await.unwrap();
        let mut said = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(5), socket.read_to_end(&mut said))
            .await
            .expect("the connection is closed");
    }
    let client = bed.client().await;
    let mut long = client.new_stream(request("Stream"), true, true).await.unwrap();
    put(&long, &StreamInit { id: "x".repeat(300) }).await;
    let refused = long.recv().await.unwrap_err();
    assert!(
        matches!(&refused, ttrpc::Error::RpcStatus(status) if status.code() == Code::INVALID_ARGUMENT),
        "{refused:?}"
    );
    // The Task service is there all the while.
    let task = cloister_protocol::task::TaskClient::new(bed.client().await);
    let answer = task
        .state(ttrpc::context::with_timeout(0), &Default::default())
        .await
        .unwrap_err();
    assert!(format!("{answer:?}").contains("is not supported"), "{answer:?}");
    bed.server.shutdown().await.unwrap();
    let gone = async {
        while UnixStream::connect(&bed.path).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), gone).await.unwrap();
}

#[test]
fn only_such_addresses_name_streams() {
    for (address, stream) in [
        ("ttrpc+unix:///run/x.sock?streaming_id=a-stdout", Some("a-stdout")),
        ("ttrpc+unix:///run/x.sock?streaming_id=", None),
        ("grpc+vsock://3:1?streaming_id=a", None),
        ("/run/fifo", None),
        ("", None),
    ] {
        assert_eq!(name(address), stream, "{address}");
    }
    assert!(Stdio::from_request("", "grpc+vsock://3:1?streaming_id=a", "").is_err());
}

#[test]
fn a_request_is_for_streams_from_its_first_bytes_on() {
    let mut request = vec![0, 0, 0, 60, 0, 0, 0, 1, MESSAGE_TYPE_REQUEST, 0];
    request.extend(BEGIN);
    request.extend(SERVICE.as_bytes());
    for count in 0..=request.len() {
        assert!(may_become_stream(&request[..count]), "{count} bytes");
    }
    for (at, byte) in [(3, 42), (10, 0x12), (11, 41), (request.len() - 1, b'x')] {
        let mut other = request.clone();
        other[at] = byte;
        assert!(!may_become_stream(&other), "byte {at}");
    }
}
