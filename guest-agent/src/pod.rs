// SPDX-License-Identifier: Apache-2.0
//! Our Pod service: what surrounds the containers.

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use cloister_protocol::pod::{
    BlockRequest, BlockResponse, ConfigureRequest, ConfigureResponse, DnsFiles, InfoRequest, InfoResponse,
    MountRequest, MountResponse, OnlineRequest, OnlineResponse, PingRequest, PingResponse, Pod,
    PowerOffRequest, PowerOffResponse, ReseedRequest, ReseedResponse, SetTimeRequest, SetTimeResponse,
    UnmountRequest, UnmountResponse,
};
use cloister_protocol::ttrpc::asynchronous::TtrpcContext;
use cloister_protocol::{ETC_DIR, PROTOCOL_VERSION, SHM_DIR};
use rustix::mount::{MountFlags, mount_remount};
use rustix::system::{sethostname, uname};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::boot::boottime_ns;
use crate::container::Context;
use crate::error::{Result, failed_precondition, invalid_argument, unknown};
use crate::net::Netlink;
use crate::{cgroup, disk, mount, power};

/// Longest entropy the kernel's generator takes at once.
const MAX_ENTROPY: usize = 512;

/// Where the kernel lists its processors.
const CPUS: &str = "/sys/devices/system/cpu";
/// More than a kernel can be built for.
const MAX_CPUS: u32 = 8192;

/// See the module.
pub struct PodService(Arc<Context>);

impl PodService {
    /// The service of the pod `context` describes.
    pub fn new(context: Arc<Context>) -> Self {
        Self(context)
    }

    fn etc(&self) -> PathBuf {
        if self.0.in_vm {
            PathBuf::from(ETC_DIR)
        } else {
            self.0.run.join("etc")
        }
    }
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> cloister_protocol::ttrpc::Error {
    move |error| match error.kind() {
        io::ErrorKind::InvalidInput => invalid_argument(format!("{what}: {error}")),
        _ => unknown(format!("{what}: {error}")),
    }
}

fn set_time(unix_time_ns: u64) -> Result<()> {
    const SECOND: u64 = 1_000_000_000;
    let seconds = i64::try_from(unix_time_ns / SECOND).unwrap_or(i64::MAX);
    let rest = i64::try_from(unix_time_ns % SECOND).unwrap_or(0);
    clock_settime(
        ClockId::Realtime,
        Timespec {
            tv_sec: seconds,
            tv_nsec: rest,
        },
    )
    .map_err(|e| unknown(format!("the clock was not set: {e}")))
}

/// `rand_pool_info` of linux/random.h with room for the most bytes.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: i32,
    buf_size: i32,
    buf: [u8; MAX_ENTROPY],
}

/// `_IOW('R', 0x03, int[2])`
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `_IO('R', 0x07)`
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

fn add_entropy(seed: &[u8]) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let mut info = RandPoolInfo {
        entropy_count: 0,
        buf_size: 0,
        buf: [0; MAX_ENTROPY],
    };
    let room = info.buf.get_mut(..seed.len()).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("more than {MAX_ENTROPY} bytes of entropy"),
        )
    })?;
    room.copy_from_slice(seed);
    let length = i32::try_from(seed.len()).map_err(io::Error::other)?;
    info.buf_size = length;
    info.entropy_count = length.saturating_mul(8);
    let random = fs::File::options().write(true).open("/dev/urandom")?;
    // SAFETY: the ioctl reads a rand_pool_info with buf_size bytes, which lie within `info`.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes no argument.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The file of a sysctl: parts separated by dots, or by slashes when a part contains dots.
fn sysctl_path(key: &str) -> Option<PathBuf> {
    let parts: Vec<&str> = if key.contains('/') {
        key.split('/').collect()
    } else {
        key.split('.').collect()
    };
    let good = |part: &&str| !part.is_empty() && *part != "." && *part != "..";
    parts
        .iter()
        .all(good)
        .then(|| Path::new("/proc/sys").join(parts.join("/")))
}

fn write_files(dir: &Path, files: &DnsFiles, hostname: &str) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let name = match (files.hostname.is_empty(), hostname.is_empty()) {
        (false, _) => files.hostname.clone(),
        (true, false) => format!("{hostname}\n"),
        (true, true) => String::new(),
    };
    for (file, text) in [
        ("hosts", &files.hosts),
        ("resolv.conf", &files.resolv_conf),
        ("hostname", &name),
    ] {
        if !text.is_empty() {
            // In place, not renamed over: containers have the file bind-mounted.
            fs::write(dir.join(file), text)?;
        }
    }
    Ok(())
}

/// Reads "Key:   123 kB" of /proc/meminfo and /proc/self/status, in bytes.
fn kib_field(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib.saturating_mul(1024))
}

/// The processors in a list like "0-3,5", in its order.
fn parse_cpus(list: &str) -> Vec<u32> {
    let mut cpus = Vec::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        // More than any kernel has is no list of the kernel's.
        if let (Ok(first), Ok(last @ ..MAX_CPUS)) = (first.parse::<u32>(), last.parse::<u32>()) {
            cpus.extend(first..=last);
        }
    }
    cpus
}

/// Those of /sys/devices/system/cpu/`file`, ascending.
fn cpus(file: &str) -> Vec<u32> {
    parse_cpus(&fs::read_to_string(format!("{CPUS}/{file}")).unwrap_or_default())
}

fn online_cpus() -> u32 {
    u32::try_from(cpus("online").len()).unwrap_or(u32::MAX)
}

/// Brings processors online, the lowest first, or takes them offline, the highest first, until there are `wanted`, or the
/// kernel does not go on.
fn set_cpus(wanted: u32) {
    loop {
        let (online, present) = (cpus("online"), cpus("present"));
        let count = u32::try_from(online.len()).unwrap_or(u32::MAX);
        let (cpu, state) = if count < wanted {
            (present.iter().find(|cpu| !online.contains(cpu)), "1")
        } else if count > wanted.max(1) {
            (online.last(), "0")
        } else {
            return;
        };
        let Some(cpu) = cpu else { return };
        let file = format!("{CPUS}/cpu{cpu}/online");
        if let Err(error) = fs::write(&file, state) {
            log::warn!("{state} to {file}: {error}");
            return;
        }
    }
}

/// Writes to `file` of each directory below `dir` whose name is `prefix` and a number. Returns how many took it.
fn write_each(dir: &str, prefix: &str, file: &str, was: &str, value: &str) -> u32 {
    let mut count = 0;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let numbered = name
            .to_str()
            .and_then(|n| n.strip_prefix(prefix))
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
        let path = entry.path().join(file);
        if numbered
            && fs::read_to_string(&path).is_ok_and(|text| text.trim() == was)
            && fs::write(&path, value).is_ok()
        {
            count += 1;
        }
    }
    count
}

#[async_trait]
impl Pod for PodService {
    async fn configure(&self, _: &TtrpcContext, request: ConfigureRequest) -> Result<ConfigureResponse> {
        // The clock first: what follows is logged and stamped.
        if request.unix_time_ns != 0 {
            set_time(request.unix_time_ns)?;
        }
        if !request.entropy.is_empty() {
            add_entropy(&request.entropy).map_err(failed("entropy"))?;
        }
        if request.cloned {
            self.0.events.renew();
            self.0.all().iter().for_each(|container| container.renew_io());
        }
        if !request.hostname.is_empty() {
            sethostname(request.hostname.as_bytes()).map_err(|e| failed("hostname")(e.into()))?;
        }
        write_files(&self.etc(), request.files.get_or_default(), &request.hostname)
            .map_err(failed("DNS files"))?;
        if request.shm_bytes != 0 && self.0.in_vm {
            let size = CString::new(format!("size={}", request.shm_bytes)).unwrap_or_default();
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            mount_remount(SHM_DIR, flags, &size).map_err(|e| failed("size of /dev/shm")(e.into()))?;
        }
        let mut sysctls: Vec<_> = request.sysctls.iter().collect();
        sysctls.sort();
        for (key, value) in sysctls {
            let path = sysctl_path(key).ok_or_else(|| invalid_argument(format!("{key:?} is no sysctl")))?;
            fs::write(path, value).map_err(|e| unknown(format!("sysctl {key}={value}: {e}")))?;
        }
        if !(request.interfaces.is_empty() && request.routes.is_empty() && request.neighbors.is_empty()) {
            let netlink = Netlink::new().map_err(failed("netlink"))?;
            for interface in &request.interfaces {
                netlink.interface(interface).map_err(failed("network"))?;
            }
            // Gateways need on-link routes to stand on.
            let (direct, through): (Vec<_>, Vec<_>) =
                request.routes.iter().partition(|r| r.gateway.is_empty());
            for route in direct.into_iter().chain(through) {
                netlink.route(route).map_err(failed("network"))?;
            }
            for neighbor in &request.neighbors {
                netlink.neighbor(neighbor).map_err(failed("network"))?;
            }
        }
        Ok(ConfigureResponse::new())
    }

    async fn mount(&self, _: &TtrpcContext, request: MountRequest) -> Result<MountResponse> {
        let target = Path::new(&request.target);
        if !target.is_absolute() {
            return Err(invalid_argument(format!(
                "mount target {:?} is not absolute",
                request.target
            )));
        }
        if self.0.in_vm
            && let Err(error) = mount::shared()
        {
            log::warn!("the shared directory is not there: {error}");
        }
        let explain = |e: io::Error| {
            unknown(format!(
                "mount of {} {} on {}: {e}",
                request.type_, request.source, request.target
            ))
        };
        mount::make_target(&request.type_, &request.source, target, &request.options).map_err(explain)?;
        mount::mount_on(&request.type_, &request.source, target, &request.options).map_err(explain)?;
        Ok(MountResponse::new())
    }

    async fn unmount(&self, _: &TtrpcContext, request: UnmountRequest) -> Result<UnmountResponse> {
        use rustix::mount::{UnmountFlags, unmount};
        match unmount(request.target.as_str(), UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(UnmountResponse::new()),
            Err(rustix::io::Errno::BUSY) => Err(failed_precondition(format!(
                "unmount of {}: it is in use",
                request.target
            ))),
            Err(error) => Err(unknown(format!("unmount of {}: {error}", request.target))),
        }
    }

    async fn online(&self, _: &TtrpcContext, request: OnlineRequest) -> Result<OnlineResponse> {
        let mut memory_blocks = 0;
        if request.memory {
            memory_blocks = write_each(
                "/sys/devices/system/memory",
                "memory",
                "state",
                "offline",
                "online",
            );
        }
        if request.cpus != 0 {
            set_cpus(request.cpus);
        }
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Ok(OnlineResponse {
            cpus: online_cpus(),
            memory_blocks,
            memory_total_bytes: kib_field(&memory, "MemTotal"),
            ..Default::default()
        })
    }

    async fn attach_block(&self, _: &TtrpcContext, request: BlockRequest) -> Result<BlockResponse> {
        let disk = disk::attach(request.slot)
            .map_err(|e| unknown(format!("the disk in slot {}: {e}", request.slot)))?;
        Ok(BlockResponse {
            path: disk.path,
            major: disk.major,
            minor: disk.minor,
            size_bytes: disk.size,
            ..Default::default()
        })
    }

    async fn detach_block(&self, _: &TtrpcContext, request: BlockRequest) -> Result<BlockResponse> {
        disk::detach(request.slot).map_err(|e| unknown(format!("the disk in slot {}: {e}", request.slot)))?;
        Ok(BlockResponse::new())
    }

    async fn info(&self, _: &TtrpcContext, _: InfoRequest) -> Result<InfoResponse> {
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let own = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        Ok(InfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL_VERSION,
            kernel: uname().release().to_string_lossy().into_owned(),
            cpus: online_cpus(),
            memory_total_bytes: kib_field(&memory, "MemTotal"),
            memory_available_bytes: kib_field(&memory, "MemAvailable"),
            uptime_ns: boottime_ns(),
            unix_time_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            containers: self.0.container_ids(),
            agent_rss_bytes: kib_field(&own, "VmRSS"),
            controllers: cgroup::controllers(),
            seccomp: true,
            ..Default::default()
        })
    }

    async fn ping(&self, _: &TtrpcContext, request: PingRequest) -> Result<PingResponse> {
        Ok(PingResponse {
            payload: request.payload,
            ..Default::default()
        })
    }

    async fn set_time(&self, _: &TtrpcContext, request: SetTimeRequest) -> Result<SetTimeResponse> {
        set_time(request.unix_time_ns)?;
        Ok(SetTimeResponse::new())
    }

    async fn reseed(&self, _: &TtrpcContext, request: ReseedRequest) -> Result<ReseedResponse> {
        if request.entropy.is_empty() {
            return Err(invalid_argument("no entropy was given"));
        }
        add_entropy(&request.entropy).map_err(failed("entropy"))?;
        Ok(ReseedResponse::new())
    }

    async fn power_off(&self, _: &TtrpcContext, request: PowerOffRequest) -> Result<PowerOffResponse> {
        if !self.0.in_vm {
            return Err(failed_precondition("this agent is not PID 1 of a VM"));
        }
        let context = Arc::clone(&self.0);
        tokio::spawn(async move {
            // Time for the answer to leave.
            tokio::time::sleep(Duration::from_millis(10)).await;
            for container in context.all() {
                container.cgroup.kill();
                container.thaw();
            }
            power::kill_everything().await;
            power::down(request.reboot)
        });
        Ok(PowerOffResponse::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_stay_below_proc_sys() {
        assert_eq!(
            sysctl_path("net.ipv4.ip_forward").unwrap(),
            Path::new("/proc/sys/net/ipv4/ip_forward")
        );
        assert_eq!(
            sysctl_path("net/ipv4/conf/eth0.1/rp_filter").unwrap(),
            Path::new("/proc/sys/net/ipv4/conf/eth0.1/rp_filter")
        );
        for bad in ["", "/", "../x", "net/../../x", "/etc/passwd", "a..b"] {
            assert_eq!(sysctl_path(bad), None, "{bad}");
        }
    }

    #[test]
    fn cpu_lists_are_read() {
        assert_eq!(parse_cpus("0-3,5\n"), [0, 1, 2, 3, 5]);
        assert_eq!(parse_cpus("0"), [0]);
        assert!(parse_cpus("").is_empty());
        assert!(parse_cpus("3-1,x,0-4294967295").is_empty());
    }

    #[test]
    fn kib_fields_are_found() {
        let text = "MemTotal:         1000 kB\nMemTotalX: 5 kB\nMemAvailable:  7 kB\n";
        assert_eq!(kib_field(text, "MemTotal"), 1_024_000);
        assert_eq!(kib_field(text, "MemAvailable"), 7168);
        assert_eq!(kib_field(text, "Swap"), 0);
    }

    #[test]
    fn named_files_are_written_and_no_others() {
        let dir = std::env::temp_dir().join(format!("cloister-etc-{}", std::process::id()));
        let files = DnsFiles {
            hosts: "127.0.0.1 localhost\n".into(),
            ..Default::default()
        };
        write_files(&dir, &files, "pod1").unwrap();
        assert_eq!(
            fs::read_to_string(dir.join("hosts")).unwrap(),
            "127.0.0.1 localhost\n"
        );
        assert_eq!(fs::read_to_string(dir.join("hostname")).unwrap(), "pod1\n");
        assert!(!dir.join("resolv.conf").exists());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn too_much_entropy_is_refused() {
        assert_eq!(
            add_entropy(&[0; MAX_ENTROPY + 1]).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
