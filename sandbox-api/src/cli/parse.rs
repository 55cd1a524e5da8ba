// SPDX-License-Identifier: Apache-2.0
//! Values of flags, in docker's grammar.

use crate::pod::state::{Network, Publish};
use crate::runtime::seccomp;
use crate::runtime::spec::Volume;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

/// Least memory of a VM: less does not boot.
pub const MIN_MEMORY: u64 = 64 << 20;
/// DAX windows are multiples of it.
const DAX_UNIT: u64 = 2 << 20;

/// A number of bytes: `512m`, `2g`, `1.5GiB` (powers of 1024; no unit is bytes).
pub fn memory(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text
        .bytes()
        .take_while(|b| b.is_ascii_digit() || *b == b'.')
        .count();
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let unit = unit
        .strip_suffix("ib")
        .or_else(|| unit.strip_suffix('b'))
        .unwrap_or(&unit);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        other => return Err(format!("unknown unit {other:?}: use b, k, m, g or t, as in 512m")),
    };
    let wrong = || format!("{text:?} is not a size such as 512m or 2g");
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let too_large = || format!("{text} is more memory than any machine has");
    if whole.is_empty() || fraction.contains('.') || !whole.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let mut bytes = whole.checked_mul(1 << shift).ok_or_else(too_large)?;
    if !fraction.is_empty() {
        let kept = fraction.get(..fraction.len().min(9)).unwrap_or(fraction);
        let numerator: u64 = kept.parse().map_err(|_| wrong())?;
        let denominator = 10_u64.pow(u32::try_from(kept.len()).unwrap_or(9));
        let part = u128::from(numerator) * (1_u128 << shift) / u128::from(denominator);
        bytes = bytes
            .checked_add(u64::try_from(part).map_err(|_| too_large())?)
            .ok_or_else(too_large)?;
    }
    if bytes > 1 << 52 {
        return Err(too_large());
    }
    Ok(bytes)
}

/// `--memory`.
pub fn vm_memory(text: &str) -> Result<u64, String> {
    let bytes = memory(text)?;
    if bytes < MIN_MEMORY {
        return Err(format!("{text} is too little: a VM needs 64m at least"));
    }
    Ok(bytes)
}

/// `--dax`: Linux maps 2 MiB at a time.
pub fn dax_window(text: &str) -> Result<u64, String> {
    let bytes = memory(text)?;
    if !(DAX_UNIT..=1 << 40).contains(&bytes) {
        return Err(format!("{text} is not between 2m and 1t"));
    }
    Ok(bytes.next_multiple_of(DAX_UNIT))
}

/// `--cpus`: vCPUs are whole.
pub fn cpus(text: &str) -> Result<u8, String> {
    let whole = text.strip_suffix(".0").unwrap_or(text);
    match whole.parse::<u8>() {
        Ok(n @ 1..=32) => Ok(n),
        _ => Err(format!(
            "{text:?} is not a whole number of processors from 1 to 32"
        )),
    }
}

/// `-v HOST:CONTAINER[:ro|rw]`.
pub fn volume(text: &str) -> Result<Volume, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, mode) = match parts.as_slice() {
        [source, target] => (*source, *target, ""),
        [source, target, mode] => (*source, *target, *mode),
        _ => return Err(format!("{text:?} is not HOST:CONTAINER or HOST:CONTAINER:ro")),
    };
    let mut read_only = false;
    for option in mode.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" => read_only = true,
            "rw" => read_only = false,
            // Nothing to do for them here.
            "z" | "Z" | "rprivate" | "private" | "cached" | "delegated" | "consistent" => {}
            other => return Err(format!("{text:?}: unknown option {other:?}, use ro or rw")),
        }
    }
    checked(text, PathBuf::from(source), PathBuf::from(target), read_only)
}

fn checked(text: &str, source: PathBuf, target: PathBuf, read_only: bool) -> Result<Volume, String> {
    if !(source.is_absolute() || source.starts_with(".") || source.starts_with("..")) {
        return Err(format!(
            "{text:?}: named volumes are not supported; give a path of the host, as in ./{}:{}",
            source.display(),
            target.display()
        ));
    }
    if !target.is_absolute() || target == Path::new("/") {
        return Err(format!(
            "{text:?}: the path in the container must be absolute and not /"
        ));
    }
    if target
        .components()
        .any(|part| part == std::path::Component::ParentDir)
    {
        return Err(format!(
            "{text:?}: the path in the container must not contain \"..\""
        ));
    }
    Ok(Volume {
        source,
        target,
        read_only,
    })
}

/// `--mount type=bind|tmpfs,source=…,target=…[,readonly]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountFlag {
    /// A volume.
    Bind(Volume),
    /// A tmpfs.
    Tmpfs(PathBuf, String),
}

/// Parses [`MountFlag`].
pub fn mount(text: &str) -> Result<MountFlag, String> {
    let (mut kind, mut source, mut target, mut read_only, mut size) = ("volume", None, None, false, None);
    for field in text.split(',') {
        let (key, value) = field.split_once('=').unwrap_or((field, ""));
        match key {
            "type" => kind = value,
            "source" | "src" => source = Some(value),
            "target" | "dst" | "destination" => target = Some(value),
            "readonly" | "ro" => read_only = !matches!(value, "false" | "0"),
            "tmpfs-size" => size = Some(memory(value)?),
            other => return Err(format!("{text:?}: unknown key {other:?}")),
        }
    }
    let target = PathBuf::from(target.ok_or_else(|| format!("{text:?}: target= is missing"))?);
    match (kind, source) {
        ("bind", Some(source)) => Ok(MountFlag::Bind(checked(text, source.into(), target, read_only)?)),
        ("bind", None) => Err(format!("{text:?}: source= is missing")),
        ("tmpfs", _) => Ok(MountFlag::Tmpfs(
            target,
            size.map(|size| format!("size={size}")).unwrap_or_default(),
        )),
        (other, _) => Err(format!(
            "{text:?}: type {other:?} is not supported, use bind or tmpfs"
        )),
    }
}

/// `--tmpfs PATH[:OPTIONS]`.
pub fn tmpfs(text: &str) -> Result<(PathBuf, String), String> {
    let (path, options) = text.split_once(':').unwrap_or((text, ""));
    if !path.starts_with('/') || path == "/" {
        return Err(format!("{text:?}: the path must be absolute and not /"));
    }
    Ok((PathBuf::from(path), options.to_owned()))
}

/// `--net none|nat|tap=NAME`.
pub fn network(text: &str) -> Result<Network, String> {
    match text {
        "none" => Ok(Network::None),
        "nat" | "bridge" | "default" => Ok(Network::Nat),
        other => match other.strip_prefix("tap=") {
            Some(name) if (1..=crate::net::tap::MAX_NAME).contains(&name.len()) => {
                Ok(Network::Tap(name.to_owned()))
            }
            _ => Err(format!("{text:?} is not a network: use none, nat or tap=NAME")),
        },
    }
}

/// `-p [IP:]HOST:CONTAINER[/tcp]`.
pub fn publish(text: &str) -> Result<Publish, String> {
    let wrong = |why: &str| format!("{text:?}: {why}; use [IP:]HOSTPORT:PORT");
    let ports = match text.rsplit_once('/') {
        Some((ports, "tcp")) => ports,
        Some((_, other)) => {
            return Err(wrong(&format!(
                "protocol {other:?} cannot be published, only tcp"
            )));
        }
        None => text,
    };
    let (rest, container) = ports
        .rsplit_once(':')
        .ok_or_else(|| wrong("the host's port is missing"))?;
    let (ip, host) = match rest.rsplit_once(':') {
        Some((ip, host)) => {
            let ip = ip.trim_start_matches('[').trim_end_matches(']');
            (ip.parse::<IpAddr>().map_err(|_| wrong("no such address"))?, host)
        }
        None => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), rest),
    };
    let port = |text: &str| {
        text.parse::<u16>()
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| wrong("no such port"))
    };
    Ok(Publish {
        host_ip: ip,
        host_port: port(host)?,
        container_port: port(container)?,
    })
}

/// `-e KEY=VALUE`, or `-e KEY` for the caller's own value. The bare KEY, which removes the image's, if the caller has none.
pub fn env(text: &str, own: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    match text.split_once('=') {
        Some(("", _)) => Err(format!("invalid environment variable: {text}")),
        Some(_) => Ok(text.to_owned()),
        None if text.is_empty() => Err("invalid environment variable: it is empty".to_owned()),
        None => Ok(own(text).map_or_else(|| text.to_owned(), |value| format!("{text}={value}"))),
    }
}

/// The lines of an `--env-file`: comments, empty lines and names without a value skipped.
pub fn env_file(content: &str, own: impl Fn(&str) -> Option<String> + Copy) -> Result<Vec<String>, String> {
    let mut settings = Vec::new();
    for line in content.lines() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let name = line.split('=').next().unwrap_or(line);
        if name.contains(char::is_whitespace) {
            return Err(format!("variable {name:?} contains whitespaces"));
        }
        settings.extend(Some(env(line, own)?).filter(|setting| setting.contains('=')));
    }
    Ok(settings)
}

/// `--security-opt`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecurityFlag {
    /// seccomp=
    Seccomp(seccomp::Choice),
    /// no-new-privileges
    NoNewPrivileges(bool),
    /// What turns off something that the guest's kernel does not have.
    Nothing,
}

/// An option of docker's: KEY, KEY=VALUE, or KEY:VALUE. A profile's file is read.
pub fn security(text: &str) -> Result<SecurityFlag, String> {
    let (key, value) = text
        .split_once('=')
        .or_else(|| text.split_once(':'))
        .unwrap_or((text, ""));
    match (key, value) {
        ("seccomp", "unconfined") => Ok(SecurityFlag::Seccomp(seccomp::Choice::Unconfined)),
        ("seccomp", "builtin") => Ok(SecurityFlag::Seccomp(seccomp::Choice::Builtin)),
        ("seccomp", file) if !file.is_empty() => {
            let bytes =
                std::fs::read(file).map_err(|e| format!("opening seccomp profile ({file}) failed: {e}"))?;
            let profile = seccomp::Profile::parse(&bytes)
                .map_err(|e| format!("{file} is not a seccomp profile: {e}"))?;
            Ok(SecurityFlag::Seccomp(seccomp::Choice::Profile(Box::new(profile))))
        }
        ("no-new-privileges", "" | "true") => Ok(SecurityFlag::NoNewPrivileges(true)),
        ("no-new-privileges", "false") => Ok(SecurityFlag::NoNewPrivileges(false)),
        ("apparmor", "unconfined") | ("label", "disable") => Ok(SecurityFlag::Nothing),
        ("apparmor" | "label", _) => Err(format!(
            "{key}: the kernel of the virtual machine has no such security module"
        )),
        _ => Err(format!("invalid --security-opt: {text:?}")),
    }
}

/// A signal by name (`TERM`, `SIGTERM`) or number.
pub fn signal(text: &str) -> Result<i32, String> {
    const NAMES: [(&str, i32); 31] = [
        ("HUP", libc::SIGHUP),
        ("INT", libc::SIGINT),
        ("QUIT", libc::SIGQUIT),
        ("ILL", libc::SIGILL),
        ("TRAP", libc::SIGTRAP),
        ("ABRT", libc::SIGABRT),
        ("BUS", libc::SIGBUS),
        ("FPE", libc::SIGFPE),
        ("KILL", libc::SIGKILL),
        ("USR1", libc::SIGUSR1),
        ("SEGV", libc::SIGSEGV),
        ("USR2", libc::SIGUSR2),
        ("PIPE", libc::SIGPIPE),
        ("ALRM", libc::SIGALRM),
        ("TERM", libc::SIGTERM),
        ("STKFLT", libc::SIGSTKFLT),
        ("CHLD", libc::SIGCHLD),
        ("CONT", libc::SIGCONT),
        ("STOP", libc::SIGSTOP),
        ("TSTP", libc::SIGTSTP),
        ("TTIN", libc::SIGTTIN),
        ("TTOU", libc::SIGTTOU),
        ("URG", libc::SIGURG),
        ("XCPU", libc::SIGXCPU),
        ("XFSZ", libc::SIGXFSZ),
        ("VTALRM", libc::SIGVTALRM),
        ("PROF", libc::SIGPROF),
        ("WINCH", libc::SIGWINCH),
        ("IO", libc::SIGIO),
        ("PWR", libc::SIGPWR),
        ("SYS", libc::SIGSYS),
    ];
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=64).contains(&number) {
            Ok(number)
        } else {
            Err(format!("invalid signal: {text}"))
        };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    // SIGRTMIN+3, systemd's way to ask for a halt.
    let real_time = name
        .strip_prefix("RTMIN")
        .map(|rest| (34, rest))
        .or_else(|| name.strip_prefix("RTMAX").map(|rest| (64, rest)));
    if let Some((base, rest)) = real_time {
        let offset = if rest.is_empty() {
            Some(0)
        } else {
            rest.parse::<i32>().ok()
        };
        if let Some(number) = offset
            .and_then(|offset| offset.checked_add(base))
            .filter(|n| (34..=64).contains(n))
        {
            return Ok(number);
        }
    }
    Err(format!("invalid signal: {text}"))
}

/// `-l KEY[=VALUE]`.
pub fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    if key.is_empty() {
        Err(format!("invalid label {text:?}"))
    } else {
        Ok((key.to_owned(), value.to_owned()))
    }
}

/// `--hostname`: what the guest's sethostname(2) and /etc/hosts can take.
pub fn hostname(text: &str) -> Result<String, String> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    if (1..=63).contains(&text.len()) && text.bytes().all(good) {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "{text:?} is not a host name of 1 to 63 letters, digits, dots and hyphens"
        ))
    }
}

/// A time span such as `30s`, `2m` or a number of seconds.
pub fn seconds(text: &str) -> Result<u64, String> {
    let (number, factor) = match text.strip_suffix('s') {
        Some(number) => (number, 1),
        None => match text.strip_suffix('m') {
            Some(number) => (number, 60),
            None => (text, 1),
        },
    };
    let value = number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(factor))
        .filter(|n| *n <= 86_400);
    value.ok_or_else(|| format!("{text:?} is not a time such as 30s or 2m"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("123", 123),
            ("1k", 1024),
            ("512m", 512 << 20),
            ("512MB", 512 << 20),
            ("2g", 2 << 30),
            ("1.5GiB", 3 << 29),
            ("4096t", 1 << 52),
        ] {
            assert_eq!(memory(text), Ok(bytes), "{text}");
        }
        // Firecracker #6076: MiB to bytes wrapped around.
        for text in [
            "17592186044416m",
            "18446744073709551616",
            "99999999999999999999g",
            "8192t",
            "4097t",
        ] {
            assert!(memory(text).unwrap_err().contains("more memory"), "{text}");
        }
        for text in ["", "m", "-1", "1x", "1.2.3m", ".5g", "0x10", "1 2"] {
            assert!(memory(text).is_err(), "{text}");
        }
        assert!(vm_memory("63m").is_err());
        assert_eq!(vm_memory("64m"), Ok(64 << 20));
        assert_eq!(dax_window("2m"), Ok(2 << 20));
        assert_eq!(dax_window("64m"), Ok(64 << 20));
        assert_eq!(dax_window("2049k"), Ok(4 << 20));
        for text in ["1m", "0", "2t", "x"] {
            assert!(dax_window(text).is_err(), "{text}");
        }
    }

    #[test]
    fn processors() {
        assert_eq!(cpus("2"), Ok(2));
        assert_eq!(cpus("2.0"), Ok(2));
        for text in ["0", "33", "1.5", "-1", "256", "many", ""] {
            assert!(cpus(text).is_err(), "{text}");
        }
    }

    #[test]
    fn volumes() {
        let volume_of = |source: &str, target: &str, read_only| Volume {
            source: source.into(),
            target: target.into(),
            read_only,
        };
        assert_eq!(volume("/a:/b"), Ok(volume_of("/a", "/b", false)));
        assert_eq!(volume("./a:/b:ro"), Ok(volume_of("./a", "/b", true)));
        assert_eq!(volume("/a:/b:ro,z"), Ok(volume_of("/a", "/b", true)));
        for text in [
            "",
            "/a",
            "/a:b",
            "/a:/",
            "name:/b",
            "/a:/b:bogus",
            "/a:/b:ro:x",
            "/a:/b/../c",
        ] {
            assert!(volume(text).is_err(), "{text}");
        }
        assert_eq!(
            mount("type=bind,src=/a,dst=/b,readonly"),
            Ok(MountFlag::Bind(volume_of("/a", "/b", true)))
        );
        assert_eq!(
            mount("type=tmpfs,target=/t,tmpfs-size=1m"),
            Ok(MountFlag::Tmpfs("/t".into(), "size=1048576".into()))
        );
        for text in [
            "",
            "type=bind,target=/b",
            "type=volume,source=a,target=/b",
            "type=bind,source=/a",
            "bogus=1",
        ] {
            assert!(mount(text).is_err(), "{text}");
        }
        assert_eq!(tmpfs("/run:size=1m"), Ok(("/run".into(), "size=1m".into())));
        assert!(tmpfs("run").is_err());
    }

    #[test]
    fn networks_and_ports() {
        assert_eq!(network("none"), Ok(Network::None));
        assert_eq!(network("tap=tap0"), Ok(Network::Tap("tap0".into())));
        for text in ["", "tap=", "tap=0123456789abcdef", "host"] {
            assert!(network(text).is_err(), "{text}");
        }
        let port = publish("8080:80").unwrap();
        assert_eq!(
            (
                port.host_ip.to_string().as_str(),
                port.host_port,
                port.container_port
            ),
            ("0.0.0.0", 8080, 80)
        );
        assert_eq!(
            publish("127.0.0.1:1:2/tcp").unwrap().host_ip.to_string(),
            "127.0.0.1"
        );
        assert_eq!(publish("[::1]:1:2").unwrap().host_ip.to_string(), "::1");
        for text in ["", "80", "0:80", "80:0", "1:2/udp", "x:1:2", "70000:1"] {
            assert!(publish(text).is_err(), "{text}");
        }
    }

    #[test]
    fn environment() {
        let own = |name: &str| (name == "HOME").then(|| "/h".to_owned());
        assert_eq!(env("A=b=c", own), Ok("A=b=c".into()));
        assert_eq!(env("HOME", own), Ok("HOME=/h".into()));
        assert_eq!(env("UNSET", own), Ok("UNSET".into()));
        assert!(env("=x", own).is_err() && env("", own).is_err());
        assert_eq!(
            env_file("# c\n\nA=1\n  HOME\nUNSET\nB=x y\n", own).unwrap(),
            ["A=1", "HOME=/h", "B=x y"]
        );
        assert!(env_file("A B=1", own).is_err());
    }

    #[test]
    fn security_options() {
        use SecurityFlag::{NoNewPrivileges, Nothing, Seccomp};
        for (text, option) in [
            ("seccomp=unconfined", Seccomp(seccomp::Choice::Unconfined)),
            ("seccomp:unconfined", Seccomp(seccomp::Choice::Unconfined)),
            ("seccomp=builtin", Seccomp(seccomp::Choice::Builtin)),
            ("no-new-privileges", NoNewPrivileges(true)),
            ("no-new-privileges:true", NoNewPrivileges(true)),
            ("no-new-privileges=false", NoNewPrivileges(false)),
            ("apparmor=unconfined", Nothing),
        ] {
            assert_eq!(security(text), Ok(option), "{text}");
        }
        for (text, named) in [
            ("seccomp=/no/file", "/no/file"),
            ("seccomp=/etc/passwd", "not a seccomp profile"),
            ("seccomp", "invalid"),
            ("apparmor=mine", "apparmor"),
            ("bogus=1", "bogus"),
        ] {
            assert!(security(text).unwrap_err().contains(named), "{text}");
        }
    }

    #[test]
    fn signals() {
        for (text, number) in [
            ("TERM", 15),
            ("SIGTERM", 15),
            ("sigkill", 9),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
        ] {
            assert_eq!(signal(text), Ok(number), "{text}");
        }
        for text in ["", "0", "65", "-9", "FOO", "RTMIN+99", "RTMINX"] {
            assert!(signal(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_and_times() {
        assert!(hostname("my-box.local").is_ok());
        for text in ["", "a b", "x\ny", &"x".repeat(64)] {
            assert!(hostname(text).is_err(), "{text:?}");
        }
        assert_eq!(
            (seconds("5"), seconds("30s"), seconds("2m")),
            (Ok(5), Ok(30), Ok(120))
        );
        for text in ["", "x", "-1", "99999999m"] {
            assert!(seconds(text).is_err(), "{text}");
        }
        assert_eq!(label("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(label("=x").is_err());
    }
}
