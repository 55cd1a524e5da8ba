// SPDX-License-Identifier: Apache-2.0
//! Those whom the daemon tells: a collector of traces, and journald.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// What came, piece by piece.
#[derive(Clone, Default)]
pub struct Heard(Arc<Mutex<Vec<Vec<u8>>>>);

impl Heard {
    fn add(&self, piece: Vec<u8>) {
        self.0.lock().unwrap().push(piece);
    }

    /// Whether one piece has all these words in it.
    pub fn together(&self, words: &[&str]) -> bool {
        let heard = self.0.lock().unwrap();
        heard.iter().any(|piece| {
            words
                .iter()
                .all(|word| piece.windows(word.len()).any(|part| part == word.as_bytes()))
        })
    }
}

/// A collector of OTLP over HTTP: its address, and what it is sent.
pub fn collector() -> (String, Heard) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let heard = Heard::default();
    let hears = heard.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, hears) = (stream.unwrap(), hears.clone());
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                // Each request: its lines, an empty one, and so many bytes.
                loop {
                    let (mut head, mut length) = (String::new(), 0);
                    loop {
                        let mut line = String::new();
                        if reader.read_line(&mut line).unwrap_or(0) == 0 {
                            return;
                        }
                        if let Some((name, value)) = line.split_once(':')
                            && name.eq_ignore_ascii_case("content-length")
                        {
                            length = value.trim().parse().unwrap();
                        }
                        if line.trim().is_empty() {
                            break;
                        }
                        head.push_str(&line);
                    }
                    let mut body = vec![0; length];
                    reader.read_exact(&mut body).unwrap();
                    hears.add([head.into_bytes(), body].concat());
                    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
                    if (&stream).write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address, heard)
}

const JOURNAL: &str = "/run/systemd/journal/socket";

/// Plays journald; None where there is one.
pub fn journald() -> Option<Heard> {
    if Path::new(JOURNAL).exists() {
        eprintln!("this host has a journald: the daemon's lines to it are NOT looked at");
        return None;
    }
    fs::create_dir_all(Path::new(JOURNAL).parent().unwrap()).unwrap();
    let socket = UnixDatagram::bind(JOURNAL).unwrap();
    let heard = Heard::default();
    let hears = heard.clone();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 256 << 10];
        while let Ok(count) = socket.recv(&mut buffer) {
            hears.add(buffer[..count].to_vec());
        }
    });
    Some(heard)
}

/// Takes it away again.
pub fn journald_ends() {
    let _ = fs::remove_file(JOURNAL);
}
