// SPDX-License-Identifier: Apache-2.0
//
// /init of the kernel's own boot test (guest-image/test): asks the running kernel for each feature that containers and the
// agent need, prints one line for each that is missing, then a verdict, and reboots. The kernel hands parameters that it
// does not know to init as its environment:
//   wanted=WORDS    devices that must have been found (see want_devices), cpus=N, modules
//   ending=panic    panic (through sysrq) instead of the reboot
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/netlink.h>
#include <linux/seccomp.h>
#include <linux/vm_sockets.h>
#include <mqueue.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static int missing;

static void lack(const char *format, ...)
{
	va_list arguments;

	missing++;
	printf("MISSING: ");
	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	printf(" (%s)\n", strerror(errno));
}

// Reads a whole small file into a static buffer; an empty string if it cannot be read.
static const char *slurp(const char *path)
{
	static char text[65536];
	ssize_t length, total = 0;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	text[0] = 0;
	if (fd < 0)
		return text;
	while ((length = read(fd, text + total, sizeof(text) - 1 - total)) > 0)
		total += length;
	close(fd);
	text[total] = 0;
	return text;
}

// True if `word` stands in `text` between white space or the ends.
static int has_word(const char *text, const char *word)
{
	size_t length = strlen(word);

	for (const char *at = text; (at = strstr(at, word)); at += length)
		if ((at == text || strchr(" \t\n", at[-1])) && (!at[length] || strchr(" \t\n", at[length])))
			return 1;
	return 0;
}

static void want_mount(const char *type, const char *where, const char *options)
{
	mkdir(where, 0755);
	if (mount(type, where, type, 0, options))
		lack("mount of %s", type);
}

static void want_words(const char *path, const char *const *words)
{
	const char *text = slurp(path);

	for (; *words; words++)
		if (!has_word(text, *words)) {
			errno = ENOENT;
			lack("%s in %s", *words, path);
		}
}

static void want_fd(const char *what, long fd)
{
	if (fd < 0)
		lack("%s", what);
	else
		close((int)fd);
}

// Each namespace is made in a child, so that this process stays where it is.
static void want_namespace(const char *name, int flag)
{
	pid_t child = fork();
	int status;

	if (child == 0)
		_exit(unshare(flag) ? errno : 0);
	if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) {
		lack("%s namespace", name);
		return;
	}
	errno = WEXITSTATUS(status);
	if (errno)
		lack("%s namespace", name);
}

static void want_seccomp(void)
{
	struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog program = { .len = 1, .filter = &allow };
	pid_t child = fork();
	int status = 0;

	if (child == 0) {
		if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
			_exit(1);
		_exit(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) ? 1 : 0);
	}
	waitpid(child, &status, 0);
	if (status) {
		errno = ENOSYS;
		lack("seccomp filter");
	}
}

// A cgroup v2 device program, as every OCI runtime loads one: "r0 = 1; exit".
static void want_device_program(void)
{
	struct bpf_insn code[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 1 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr attributes;
	long program, cgroup;

	memset(&attributes, 0, sizeof(attributes));
	attributes.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE;
	attributes.insns = (unsigned long)code;
	attributes.insn_cnt = 2;
	attributes.license = (unsigned long)"Apache-2.0";
	// The verifier gives up with EAGAIN when the task has work pending; everybody who loads programs tries again.
	do
		program = syscall(SYS_bpf, BPF_PROG_LOAD, &attributes, sizeof(attributes));
	while (program < 0 && errno == EAGAIN);
	if (program < 0) {
		lack("cgroup device program");
		return;
	}
	mkdir("/cgroup/test", 0755);
	cgroup = open("/cgroup/test", O_RDONLY | O_DIRECTORY);
	memset(&attributes, 0, sizeof(attributes));
	attributes.target_fd = (unsigned)cgroup;
	attributes.attach_bpf_fd = (unsigned)program;
	attributes.attach_type = BPF_CGROUP_DEVICE;
	if (syscall(SYS_bpf, BPF_PROG_ATTACH, &attributes, sizeof(attributes)))
		lack("attaching a cgroup device program");
	close((int)cgroup);
	close((int)program);
	rmdir("/cgroup/test");
}

static void want_overlay(void)
{
	want_mount("tmpfs", "/layers", "mode=755");
	mkdir("/layers/lower", 0755);
	mkdir("/layers/upper", 0755);
	mkdir("/layers/work", 0755);
	mkdir("/layers/merged", 0755);
	close(open("/layers/lower/file", O_CREAT | O_WRONLY, 0644));
	if (setxattr("/layers/lower/file", "trusted.test", "1", 1, 0))
		lack("trusted xattr on tmpfs");
	if (setxattr("/layers/lower/file", "user.test", "1", 1, 0))
		lack("user xattr on tmpfs");
	if (mount("overlay", "/layers/merged", "overlay", 0,
		  "lowerdir=/layers/lower,upperdir=/layers/upper,workdir=/layers/work"))
		lack("mount of overlay");
	else if (unlink("/layers/merged/file"))
		lack("whiteout in overlay");
}

// Inserts the modules of a kernel that has them, in the order of their list, as the agent does.
static void insert_modules(void)
{
	char path[512], *order = strdup(slurp("/lib/modules/cloister/order"));
	int count = 0;

	for (char *name = strtok(order, "\n"); name; name = strtok(NULL, "\n"), count++) {
		int fd;

		snprintf(path, sizeof(path), "/lib/modules/cloister/%s", name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		// A driver may say that this machine lacks its device, as ptp_kvm does without KVM.
		if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != ENODEV && errno != EOPNOTSUPP))
			lack("module %s", name);
		close(fd);
	}
	free(order);
	printf("test-init: %d modules inserted\n", count);
	if (!count)
		lack("modules");
}

// Devices that the loader of the test named; wanted=blk,net says which must have been found.
static void want_devices(void)
{
	static const struct {
		const char *word, *path;
	} devices[] = {
		{ "blk", "/sys/block/vda/size" },
		{ "net", "/sys/class/net/eth0/address" },
		{ "rng", "/sys/class/misc/hw_random/rng_current" },
		{ "console", "/sys/class/tty/hvc0/dev" },
		{ "balloon", "/sys/bus/virtio/drivers/virtio_balloon/uevent" },
	};
	const char *wanted = getenv("wanted");
	const char *at;

	if (!wanted)
		return;
	for (size_t i = 0; i < sizeof(devices) / sizeof(devices[0]); i++)
		if (strstr(wanted, devices[i].word) && access(devices[i].path, F_OK))
			lack("device %s: %s", devices[i].word, devices[i].path);
	if (strstr(wanted, "vsock")) {
		unsigned int cid = 0;
		int fd = open("/dev/vsock", O_RDONLY | O_CLOEXEC);

		if (fd < 0 || ioctl(fd, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &cid) || cid < 3 || cid == VMADDR_CID_ANY)
			lack("device vsock: context %u", cid);
		close(fd);
	}
	at = strstr(wanted, "cpus=");
	if (at && sysconf(_SC_NPROCESSORS_ONLN) != atol(at + 5)) {
		errno = 0;
		lack("processors: %ld online", sysconf(_SC_NPROCESSORS_ONLN));
	}
}

// Everything that the kernel of this project must have built in.
static void want_features(void)
{
	static const char *const filesystems[] = {
		"tmpfs", "proc", "sysfs", "devtmpfs", "devpts", "cgroup2", "mqueue", "hugetlbfs", "bpf", "overlay", "fuse",
		"fuseblk", "virtiofs", "ext4", "xfs", "erofs", "binfmt_misc", "configfs", "securityfs", NULL,
	};
	static const char *const controllers[] = { "cpuset", "cpu", "io", "memory", "hugetlb", "pids", NULL };
	struct io_uring_params ring;
	const char *text;

	want_mount("devpts", "/dev/pts", "newinstance,ptmxmode=0666");
	want_mount("mqueue", "/mqueue", NULL);
	want_mount("cgroup2", "/cgroup", NULL);
	want_mount("hugetlbfs", "/huge", NULL);
	want_mount("bpf", "/bpf", NULL);
	want_mount("binfmt_misc", "/proc/sys/fs/binfmt_misc", NULL);

	want_words("/proc/filesystems", filesystems);
	want_words("/cgroup/cgroup.controllers", controllers);

	want_namespace("user", CLONE_NEWUSER);
	want_namespace("pid", CLONE_NEWPID);
	want_namespace("net", CLONE_NEWNET);
	want_namespace("ipc", CLONE_NEWIPC);
	want_namespace("uts", CLONE_NEWUTS);
	want_namespace("mount", CLONE_NEWNS);
	want_namespace("cgroup", CLONE_NEWCGROUP);
	want_namespace("time", 0x80);

	want_fd("vsock", socket(AF_VSOCK, SOCK_STREAM, 0));
	want_fd("unix socket", socket(AF_UNIX, SOCK_SEQPACKET, 0));
	want_fd("packet socket", socket(AF_PACKET, SOCK_RAW, 0));
	want_fd("IPv4", socket(AF_INET, SOCK_STREAM, 0));
	want_fd("IPv6", socket(AF_INET6, SOCK_DGRAM, 0));
	want_fd("netfilter netlink", socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER));
	want_fd("socket diagnosis", socket(AF_NETLINK, SOCK_RAW, NETLINK_SOCK_DIAG));
	memset(&ring, 0, sizeof(ring));
	want_fd("io_uring", syscall(SYS_io_uring_setup, 8, &ring));
	want_fd("memfd", memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
	want_fd("secret memory", syscall(SYS_memfd_secret, 0));
	want_fd("userfaultfd", syscall(SYS_userfaultfd, O_CLOEXEC));
	want_fd("inotify", inotify_init1(IN_CLOEXEC));
	want_fd("fanotify", fanotify_init(FAN_CLASS_NOTIF, O_RDONLY));
	want_fd("message queue", mq_open("/test", O_CREAT | O_RDWR, 0600, NULL));
	want_fd("pidfd", syscall(SYS_pidfd_open, getpid(), 0));
	want_fd("pseudo terminal", open("/dev/pts/ptmx", O_RDWR | O_NOCTTY));
	want_fd("/dev/fuse", open("/dev/fuse", O_RDWR));
	want_fd("/dev/net/tun", open("/dev/net/tun", O_RDWR));
	want_fd("/dev/loop-control", open("/dev/loop-control", O_RDWR));
	want_fd("/dev/mapper/control", open("/dev/mapper/control", O_RDWR));
	want_fd("/proc/config.gz", open("/proc/config.gz", O_RDONLY));
	if (shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600) < 0)
		lack("System V shared memory");
	if (syscall(SYS_add_key, "user", "test", "x", 1, -3 /* KEY_SPEC_SESSION_KEYRING */) < 0)
		lack("keys");
	if (syscall(SYS_landlock_create_ruleset, NULL, 0, 1) < 1)
		lack("Landlock");
	want_seccomp();
	want_device_program();
	want_overlay();

	// The kernel turns huge pages off by itself below 512 MiB.
	text = slurp("/sys/kernel/mm/transparent_hugepage/enabled");
	if (!strstr(text, "[madvise]"))
		lack("transparent huge pages by madvise: %s", text);
}

int main(void)
{
	const char *ending = getenv("ending"), *wanted = getenv("wanted");
	const char *text;
	struct timespec up;

	want_mount("proc", "/proc", NULL);
	want_mount("sysfs", "/sys", NULL);
	want_mount("devtmpfs", "/dev", NULL);
	clock_gettime(CLOCK_BOOTTIME, &up);
	// The kernel's own clock stands still while it patches itself; the TSC has run since the machine was made.
	printf("test-init: in user space after %ld.%03ld s of guest time, %llu k TSC ticks\n", (long)up.tv_sec,
	       up.tv_nsec / 1000000, __builtin_ia32_rdtsc() / 1000);
	if (wanted && strstr(wanted, "modules"))
		insert_modules();
	else
		want_features();
	want_devices();
	text = slurp("/sys/devices/system/clocksource/clocksource0/current_clocksource");
	printf("test-init: clock source %s", text);
	text = slurp("/proc/meminfo");
	printf("test-init: %.*s\n", (int)strcspn(text, "\n"), text);
	if (missing)
		printf("test-init: FAILED, %d missing\n", missing);
	else
		printf("test-init: PASSED\n");
	fflush(stdout);
	tcdrain(1);

	if (ending && !strcmp(ending, "panic")) {
		int fd = open("/proc/sysrq-trigger", O_WRONLY);

		if (fd < 0 || write(fd, "c", 1) != 1)
			lack("sysrq");
	}
	reboot(RB_AUTOBOOT);
	return 1;
}
