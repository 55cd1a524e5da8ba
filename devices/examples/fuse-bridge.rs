// SPDX-License-Identifier: Apache-2.0
//! Serves a directory with the virtio-fs server through this machine's /dev/fuse, so that the server can be tested
//! against a real Linux client without a VM: `fuse-bridge SOURCE MOUNTPOINT [ro] [writeback] [locks] [acl] [btime]
//! [always|never]`. The source appears as `MOUNTPOINT/d`; lines `attach NAME DIRECTORY` and `detach NAME` on standard
//! input change what else does. Ends when it is unmounted. For tests only; needs root.

use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use cloister_devices::fs::{AttachOptions, CachePolicy, FsConfig, Outcome, Reader, Server, Writer};
use cloister_devices::virtio::Slices;
use vm_memory::VolatileSlice;

/// The largest request: 1 MiB of data and its header and arguments.
const BUFFER: usize = (1 << 20) + (64 << 10);

/// Requests that wait for a lock, with their numbers.
type Parked = Vec<(u64, Vec<u8>)>;

fn lock(parked: &Mutex<Parked>) -> MutexGuard<'_, Parked> {
    parked.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, source, mountpoint, rest @ ..] = &arguments[..] else {
        return Err(
            "usage: fuse-bridge SOURCE MOUNTPOINT [ro] [writeback] [locks] [acl] [btime] [always|never]"
                .into(),
        );
    };
    let has = |word: &str| rest.iter().any(|given| given == word);
    let config = FsConfig {
        writeback: has("writeback"),
        remote_locks: has("locks"),
        posix_acl: has("acl"),
        birth_time: has("btime"),
        ..FsConfig::default()
    };
    let cache = match (has("always"), has("never")) {
        (true, _) => CachePolicy::Always,
        (_, true) => CachePolicy::Never,
        _ => CachePolicy::Auto,
    };
    let options = AttachOptions {
        read_only: has("ro"),
        cache,
        ..AttachOptions::default()
    };
    let server = Arc::new(Server::new(config, None)?);
    server.attach("d", &OwnedFd::from(std::fs::File::open(source)?), options)?;

    let fuse = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")?;
    let data = CString::new(format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        fuse.as_raw_fd()
    ))?;
    let target = CString::new(mountpoint.as_str())?;
    // SAFETY: all strings are NUL-terminated and live across the call.
    let mounted = unsafe {
        libc::mount(
            c"cloister".as_ptr(),
            target.as_ptr(),
            c"fuse.cloister".as_ptr(),
            0,
            data.as_ptr().cast(),
        )
    };
    if mounted != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    let parked: Arc<Mutex<Parked>> = Arc::default();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (server, parked) = (Arc::clone(&server), Arc::clone(&parked));
            let fd = fuse.as_raw_fd();
            std::thread::spawn(move || serve(&server, fd, &parked))
        })
        .collect();
    let retry = {
        let (server, parked) = (Arc::clone(&server), Arc::clone(&parked));
        let fd = fuse.as_raw_fd();
        std::thread::spawn(move || {
            let mut output = vec![0; 4096];
            loop {
                std::thread::sleep(std::time::Duration::from_millis(10));
                let waiting = std::mem::take(&mut *lock(&parked));
                for (unique, mut request) in waiting {
                    match handle(&server, &mut request, &mut output) {
                        Outcome::Blocked { .. } => lock(&parked).push((unique, request)),
                        Outcome::Done { len } => reply(fd, &output[..len as usize]),
                        other => panic!("{other:?}"),
                    }
                }
            }
        })
    };
    {
        let server = Arc::clone(&server);
        std::thread::spawn(move || {
            for line in std::io::stdin().lines().map_while(Result::ok) {
                let words: Vec<&str> = line.split_whitespace().collect();
                let result = match &words[..] {
                    ["attach", name, directory] => std::fs::File::open(directory)
                        .map_err(|error| error.to_string())
                        .and_then(|fd| {
                            let attached = server.attach(name, &fd.into(), options);
                            attached.map(drop).map_err(|error| error.to_string())
                        }),
                    ["detach", name] => server.detach(name).map_err(|error| error.to_string()),
                    _ => Err("attach NAME DIRECTORY, or detach NAME".to_owned()),
                };
                if let Err(error) = result {
                    eprintln!("fuse-bridge: {error}");
                }
            }
        });
    }
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")?;
    }
    drop(retry);
    println!("{:?}", server.metrics_snapshot());
    Ok(())
}

fn handle(server: &Server, input: &mut [u8], output: &mut [u8]) -> Outcome {
    let readable = Slices::from(vec![VolatileSlice::from(input)]);
    let writable = Slices::from(vec![VolatileSlice::from(output)]);
    let mut reader = Reader::new(readable);
    let Ok(header) = Server::header(&mut reader) else {
        return Outcome::Malformed;
    };
    server.handle(header, reader, Writer::new(writable))
}

fn reply(fd: i32, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    // SAFETY: the bytes are readable for their length.
    let written = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
    if written < 0 {
        let error = std::io::Error::last_os_error();
        // ENOENT: the request was interrupted meanwhile; ENODEV: unmounted.
        if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) {
            eprintln!(
                "fuse-bridge: the kernel refused a reply of {} bytes: {error}",
                bytes.len()
            );
        }
    }
}

fn serve(server: &Server, fd: i32, parked: &Mutex<Parked>) {
    let mut input = vec![0u8; BUFFER];
    let mut output = vec![0u8; BUFFER];
    loop {
        // SAFETY: the buffer is writable for its length.
        let read = unsafe { libc::read(fd, input.as_mut_ptr().cast(), input.len()) };
        let Ok(length) = usize::try_from(read) else {
            match std::io::Error::last_os_error().raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN | libc::ENOENT) => continue,
                _ => return,
            }
        };
        let request = &mut input[..length];
        let interrupted = |unique: u64| {
            let mut parked = lock(parked);
            let at = parked.iter().position(|(waiting, _)| *waiting == unique)?;
            Some(parked.remove(at).0)
        };
        match handle(server, request, &mut output) {
            Outcome::Done { len } => reply(fd, &output[..len as usize]),
            Outcome::Blocked { unique } => lock(parked).push((unique, request.to_vec())),
            Outcome::Interrupt { unique } => {
                if let Some(unique) = interrupted(unique) {
                    let mut header = Vec::from(16u32.to_ne_bytes());
                    header.extend((-libc::EINTR).to_ne_bytes());
                    header.extend(unique.to_ne_bytes());
                    reply(fd, &header);
                }
            }
            Outcome::Malformed => panic!("the kernel's request was malformed"),
        }
    }
}
