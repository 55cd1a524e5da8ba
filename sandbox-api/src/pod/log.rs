// SPDX-License-Identifier: Apache-2.0
//! The container's log, in the form of docker's json-file: one object per line, `{"log":…,"stream":…,"time":…}`. Logs that
//! containerd writes are shown, too: `TIME STREAM F TEXT` per line, with P for F where the line of output goes on.
//!
//! A line of output is one entry; one longer than 16 KiB is cut into several, of which only the last ends in a newline.
//! Bytes that are not UTF-8 are replaced in the log only, never on the terminal. Files: `container.log`, and
//! `container.log.1` when the first grew beyond its share: a container cannot fill the disk with its output.

use crate::clock;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes of one file, half of what a log may take.
pub const MAX_FILE: u64 = 16 << 20;
const MAX_ENTRY: usize = 16 << 10;

#[derive(serde::Serialize, serde::Deserialize)]
struct Entry<'a> {
    log: std::borrow::Cow<'a, str>,
    stream: std::borrow::Cow<'a, str>,
    time: String,
}

/// Writes a log. Cheap to share behind a mutex.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
    size: u64,
    max: u64,
}

/// Cuts one stream into lines. Holds at most 16 KiB.
#[derive(Debug, Default)]
pub struct Lines {
    partial: Vec<u8>,
}

impl Writer {
    /// Opens the log for appending.
    ///
    /// # Errors
    /// The disk.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::with_limit(path, MAX_FILE)
    }

    fn with_limit(path: &Path, max: u64) -> io::Result<Self> {
        let file = File::options().append(true).create(true).mode(0o600).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self {
            path: path.to_owned(),
            file,
            size,
            max,
        })
    }

    /// Adds output of a stream.
    ///
    /// # Errors
    /// The disk; the output is then lost to the log, and the next call tries again.
    pub fn write(&mut self, stream: &str, lines: &mut Lines, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = MAX_ENTRY.saturating_sub(lines.partial.len());
            let end = bytes.iter().take(room).position(|b| *b == b'\n');
            let take = end.map_or(room.min(bytes.len()), |end| end + 1);
            let (now, later) = bytes.split_at(take);
            lines.partial.extend_from_slice(now);
            bytes = later;
            if end.is_some() || lines.partial.len() >= MAX_ENTRY {
                self.flush(stream, lines)?;
            }
        }
        Ok(())
    }

    /// Writes what waits for its newline.
    ///
    /// # Errors
    /// The disk.
    pub fn flush(&mut self, stream: &str, lines: &mut Lines) -> io::Result<()> {
        if lines.partial.is_empty() {
            return Ok(());
        }
        let partial = std::mem::take(&mut lines.partial);
        let entry = Entry {
            log: String::from_utf8_lossy(&partial),
            stream: stream.into(),
            time: clock::rfc3339_now(),
        };
        let mut line = serde_json::to_vec(&entry)?;
        line.push(b'\n');
        if self.size.saturating_add(line.len() as u64) > self.max {
            let old = old_path(&self.path);
            fs::rename(&self.path, old)?;
            *self = Self::with_limit(&self.path, self.max)?;
        }
        self.file.write_all(&line)?;
        self.size = self.size.saturating_add(line.len() as u64);
        Ok(())
    }
}

fn old_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

/// How a log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// docker's json-file, ours.
    #[default]
    Json,
    /// Of Kubernetes' runtimes.
    Cri,
}

impl Format {
    /// An entry; None for a line that a full disk or a crash has cut off.
    fn read(self, line: &str) -> Option<Entry<'_>> {
        match self {
            Self::Json => serde_json::from_str(line).ok(),
            Self::Cri => {
                let mut words = line.splitn(4, ' ');
                let (time, stream, tags) = (words.next()?, words.next()?, words.next()?);
                let text = words.next().unwrap_or_default();
                let log = match tags.split(':').next() {
                    Some("F") => format!("{text}\n").into(),
                    Some("P") => text.into(),
                    _ => return None,
                };
                Some(Entry {
                    log,
                    stream: stream.into(),
                    time: time.to_owned(),
                })
            }
        }
    }
}

/// Which part of a log to show, and how.
#[derive(Clone, Debug, Default)]
pub struct Show {
    /// How it is written.
    pub format: Format,
    /// Only the last so many entries.
    pub tail: Option<usize>,
    /// Only those from this time on, ms since 1970.
    pub since: Option<clock::Millis>,
    /// A time before each line.
    pub timestamps: bool,
    /// Wait for more while the container runs.
    pub follow: bool,
}

/// Copies a log to `out` and `err`. `running` tells whether more may come.
///
/// # Errors
/// The log cannot be read or the output not written.
pub fn show(
    path: &Path,
    show: &Show,
    out: &mut dyn Write,
    err: &mut dyn Write,
    running: &dyn Fn() -> bool,
) -> io::Result<()> {
    let mut print = |line: &str| -> io::Result<()> {
        let Some(entry) = show.format.read(line) else {
            return Ok(());
        };
        if let Some(since) = show.since
            && clock::parse_since(&entry.time, 0).is_some_and(|time| time < since)
        {
            return Ok(());
        }
        let sink: &mut dyn Write = if entry.stream == "stderr" {
            &mut *err
        } else {
            &mut *out
        };
        if show.timestamps {
            write!(sink, "{} ", entry.time)?;
        }
        sink.write_all(entry.log.as_bytes())?;
        sink.flush()
    };

    let mut skip = 0;
    let mut first = BufReader::new(match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    });
    let old = File::open(old_path(path)).ok();
    if let Some(tail) = show.tail {
        let mut count = 0;
        for file in old.iter().chain([first.get_ref()]) {
            let mut reader = BufReader::new(file);
            count += reader.by_ref_lines()?;
            let mut file = file;
            file.seek(SeekFrom::Start(0))?;
        }
        skip = usize::saturating_sub(count, tail);
    }
    if let Some(old) = old {
        for line in BufReader::new(old).lines() {
            let line = line?;
            if skip > 0 {
                skip -= 1;
            } else {
                print(&line)?;
            }
        }
    }
    let mut line = String::new();
    loop {
        // Asked before the reading: what was written up to then is read below.
        let more = show.follow && running();
        while first.read_line(&mut line)? > 0 {
            if !line.ends_with('\n') {
                // Half a line: the rest follows.
                if more { break } else { return Ok(()) }
            }
            if skip > 0 {
                skip -= 1;
            } else {
                print(line.trim_end_matches('\n'))?;
            }
            line.clear();
        }
        if !more {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
        // Rotated away under us: the rest of the old file was read above.
        let renewed = File::open(path).ok().and_then(|new| {
            let differs = new.metadata().ok()?.ino() != first.get_ref().metadata().ok()?.ino();
            differs.then_some(new)
        });
        if let Some(new) = renewed {
            while first.read_line(&mut line)? > 0 {
                print(line.trim_end_matches('\n'))?;
                line.clear();
            }
            first = BufReader::new(new);
        }
    }
}

trait CountLines {
    fn by_ref_lines(&mut self) -> io::Result<usize>;
}

impl<R: BufRead> CountLines for R {
    fn by_ref_lines(&mut self) -> io::Result<usize> {
        let mut count = 0;
        loop {
            let buffer = self.fill_buf()?;
            if buffer.is_empty() {
                return Ok(count);
            }
            count += buffer.iter().filter(|b| **b == b'\n').count();
            let len = buffer.len();
            self.consume(len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bed(PathBuf);
    impl Bed {
        fn new() -> Self {
            let dir = std::env::temp_dir().join(format!("cloister-log-{}", crate::ids::random_hex(6)));
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }
        fn log(&self) -> PathBuf {
            self.0.join("container.log")
        }
        fn show(&self, how: &Show) -> (String, String) {
            let (mut out, mut err) = (Vec::new(), Vec::new());
            show(&self.log(), how, &mut out, &mut err, &|| false).unwrap();
            (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
        }
    }
    impl Drop for Bed {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn streams_lines_and_tails() {
        let bed = Bed::new();
        let mut writer = Writer::open(&bed.log()).unwrap();
        let (mut out, mut err) = (Lines::default(), Lines::default());
        writer.write("stdout", &mut out, b"one\ntw").unwrap();
        writer.write("stderr", &mut err, b"oops\n").unwrap();
        writer.write("stdout", &mut out, b"o\nthree").unwrap();
        writer.flush("stdout", &mut out).unwrap();
        assert_eq!(
            bed.show(&Show::default()),
            ("one\ntwo\nthree".into(), "oops\n".into())
        );
        let tail = Show {
            tail: Some(2),
            ..Show::default()
        };
        assert_eq!(bed.show(&tail), ("two\nthree".into(), String::new()));
        let none = Show {
            tail: Some(0),
            ..Show::default()
        };
        assert_eq!(bed.show(&none), (String::new(), String::new()));
        let later = Show {
            since: Some(clock::now() + 60_000),
            ..Show::default()
        };
        assert_eq!(bed.show(&later).0, "");
        let stamped = bed
            .show(&Show {
                timestamps: true,
                tail: Some(1),
                ..Show::default()
            })
            .0;
        assert!(stamped.ends_with("Z three"), "{stamped}");
    }

    #[test]
    fn long_lines_and_odd_bytes() {
        let bed = Bed::new();
        let mut writer = Writer::open(&bed.log()).unwrap();
        let mut lines = Lines::default();
        let long = "x".repeat(40_000) + "\n";
        writer.write("stdout", &mut lines, long.as_bytes()).unwrap();
        writer.write("stdout", &mut lines, &[0xff, b'\n']).unwrap();
        assert_eq!(bed.show(&Show::default()).0, format!("{long}\u{fffd}\n"));
        assert!(lines.partial.is_empty());
    }

    #[test]
    fn the_disk_is_not_filled() {
        let bed = Bed::new();
        let mut writer = Writer::with_limit(&bed.log(), 1000).unwrap();
        let mut lines = Lines::default();
        for i in 0..200 {
            writer
                .write("stdout", &mut lines, format!("line {i}\n").as_bytes())
                .unwrap();
        }
        let total: u64 = fs::read_dir(&bed.0)
            .unwrap()
            .map(|e| e.unwrap().metadata().unwrap().len())
            .sum();
        assert!(total <= 2000, "{total}");
        let shown = bed.show(&Show::default()).0;
        assert!(shown.ends_with("line 199\n"));
        assert_eq!(
            bed.show(&Show {
                tail: Some(3),
                ..Show::default()
            })
            .0,
            "line 197\nline 198\nline 199\n"
        );
    }

    #[test]
    fn follows_until_the_end() {
        let bed = Bed::new();
        let mut writer = Writer::with_limit(&bed.log(), 400).unwrap();
        let mut lines = Lines::default();
        writer.write("stdout", &mut lines, b"start\n").unwrap();
        let running = std::sync::atomic::AtomicBool::new(true);
        let mut shown = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for i in 0..20 {
                    writer
                        .write("stdout", &mut lines, format!("line {i}\n").as_bytes())
                        .unwrap();
                    std::thread::sleep(Duration::from_millis(5));
                }
                running.store(false, std::sync::atomic::Ordering::SeqCst);
            });
            let how = Show {
                follow: true,
                ..Show::default()
            };
            show(&bed.log(), &how, &mut shown, &mut io::sink(), &|| {
                running.load(std::sync::atomic::Ordering::SeqCst)
            })
            .unwrap();
        });
        let shown = String::from_utf8(shown).unwrap();
        assert!(
            shown.starts_with("start\n") && shown.ends_with("line 19\n"),
            "{shown}"
        );
    }

    #[test]
    fn logs_of_containerd() {
        let bed = Bed::new();
        fs::write(
            bed.log(),
            "2024-01-01T00:00:00.5Z stdout P half \n2024-01-01T00:00:01Z stdout F a  line\n2024-01-01T00:00:02Z stderr F oops\n\
             2024-01-01T00:00:03Z stdout F \n2024-01-01T00:00:04Z stdout F:x end\nbroken\n2024-01-01T00:00:05Z stdout",
        )
        .unwrap();
        let all = Show {
            format: Format::Cri,
            ..Show::default()
        };
        assert_eq!(bed.show(&all), ("half a  line\n\nend\n".into(), "oops\n".into()));
        let late = Show {
            since: clock::parse_since("2024-01-01T00:00:03Z", 0),
            timestamps: true,
            ..all
        };
        assert_eq!(
            bed.show(&late).0,
            "2024-01-01T00:00:03Z \n2024-01-01T00:00:04Z end\n"
        );
    }

    #[test]
    fn a_damaged_line_is_skipped() {
        let bed = Bed::new();
        fs::write(
            bed.log(),
            "{\"log\":\"a\\n\",\"stream\":\"stdout\",\"time\":\"2024-01-01T00:00:00Z\"}\ngarbage\n{\"lo",
        )
        .unwrap();
        assert_eq!(bed.show(&Show::default()).0, "a\n");
    }
}
