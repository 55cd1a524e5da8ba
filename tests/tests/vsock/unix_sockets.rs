// SPDX-License-Identifier: Apache-2.0
//! The host's programs at the cell's unix sockets.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use cloister_devices::vsock::{Vsock, VsockConfig, VsockError, VsockHandle};
use cloister_tests::driver::{Machine, TIMEOUT, wait_until};

use super::assert_asleep;
use super::guest::{GUEST_CID, Guest, Packet, op};

/// A directory of its own, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cloister-vsock-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("v.sock")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn device(directory: &Directory) -> (Box<Vsock>, VsockHandle) {
    let (device, handle) = Vsock::new(VsockConfig {
        uds_path: Some(directory.socket()),
        ..VsockConfig::new(GUEST_CID)
    })
    .unwrap();
    (Box::new(device), handle)
}

fn client(directory: &Directory, line: &[u8]) -> UnixStream {
    let mut client = UnixStream::connect(directory.socket()).unwrap();
    client.set_read_timeout(Some(TIMEOUT)).unwrap();
    client.write_all(line).unwrap();
    client
}

#[test]
fn a_client_is_connected_to_the_port_it_names() {
    let directory = Directory::new("connect");
    let machine = Machine::new();
    let (device, handle) = device(&directory);
    // Before the driver is there, and with data right behind the line.
    let early = client(&directory, b"CONNECT 7\nhello");
    let mut guest = Guest::start(&machine, device);
    let mut stream = guest.accept_connection(7);
    let packet = guest.receive();
    stream.handle(&mut guest, packet);
    assert_eq!(stream.received, b"hello");
    let mut early = BufReader::new(early);
    let mut line = String::new();
    early.read_line(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", stream.host_port));
    stream.send_some(&mut guest, b"hi");
    early.read_exact(&mut [0; 2]).unwrap();

    let mut refused = client(&directory, b"CONNECT 8\n");
    let request = guest.receive();
    guest.send(&Packet::new(op::RST, 8, request.src_port));
    assert_eq!(refused.read(&mut [0; 16]).unwrap(), 0);

    let mut wrong = client(&directory, b"CONNECT eight\n");
    assert_eq!(wrong.read(&mut [0; 16]).unwrap(), 0);
    guest.expect_silence();
    assert_asleep(&handle);
}

#[test]
fn silent_clients_do_not_keep_others_out_for_ever() {
    let directory = Directory::new("silent");
    let machine = Machine::new();
    let (device, handle) = device(&directory);
    let mut guest = Guest::start(&machine, device);
    let mut silent: Vec<UnixStream> = (0..70).map(|_| client(&directory, b"CONN")).collect();
    assert_asleep(&handle);
    silent.truncate(10);
    let _client = client(&directory, b"CONNECT 7\n");
    guest.accept_connection(7);
    assert_asleep(&handle);
}

#[test]
fn the_guest_reaches_a_listener_by_its_port() {
    let directory = Directory::new("listen");
    let machine = Machine::new();
    let (device, handle) = device(&directory);
    let listener = UnixListener::bind(directory.0.join("v.sock_52")).unwrap();
    let mut guest = Guest::start(&machine, device);
    guest.send(&Packet::new(op::REQUEST, 5, 53));
    guest.expect(op::RST, 5, 53);
    let mut stream = guest.connect(5, 52);
    let (mut host, _) = listener.accept().unwrap();
    stream.send_some(&mut guest, b"up");
    let mut two = [0; 2];
    host.read_exact(&mut two).unwrap();
    assert_eq!(&two, b"up");
    drop(host);
    assert_eq!(guest.receive().op, op::SHUTDOWN);
    // In-process listeners go first.
    let ours = handle.listen(52).unwrap();
    guest.connect(6, 52);
    assert_eq!(ours.accept().unwrap().1, 6);
}

#[test]
fn the_socket_is_not_taken_from_another_and_goes_with_the_device() {
    let directory = Directory::new("exists");
    let (first, _handle) = device(&directory);
    let second = Vsock::new(VsockConfig {
        uds_path: Some(directory.socket()),
        ..VsockConfig::new(GUEST_CID)
    });
    assert!(matches!(second, Err(VsockError::Listen { .. })));
    drop(first);
    assert!(wait_until(|| !directory.socket().exists()));
}
