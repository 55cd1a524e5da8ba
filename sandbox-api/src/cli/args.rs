// SPDX-License-Identifier: Apache-2.0
//! The command line. What docker has is called as docker calls it.

use super::parse;
use crate::pod::detach_keys::Keys;
use crate::pod::state::{Network, Publish};
use crate::runtime::capabilities::{self, Change};
use crate::runtime::spec::Volume;
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Runs each container in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(
    name = "cloister",
    version,
    about,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// Folder of images and containers' data
    #[arg(
        long,
        global = true,
        env = "CLOISTER_ROOT",
        default_value = "/var/lib/cloister",
        value_name = "DIR"
    )]
    pub root: PathBuf,
    /// Folder of running containers' state
    #[arg(
        long,
        global = true,
        env = "CLOISTER_STATE",
        default_value = "/run/cloister",
        value_name = "DIR"
    )]
    pub state: PathBuf,
    /// How much to say on stderr about what happens: error, warn, info, debug or trace
    #[arg(
        long,
        global = true,
        env = "CLOISTER_LOG",
        default_value = "warn",
        value_name = "LEVEL"
    )]
    pub log_level: log::LevelFilter,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a virtual machine and run a command of an image in it
    Run(Box<RunArgs>),
    /// Make a container, and do not start it
    Create(Box<RunArgs>),
    /// Start stopped containers
    Start(StartArgs),
    /// Stop containers and start them again
    Restart(RestartArgs),
    /// Get a running container's input and output
    Attach(AttachArgs),
    /// List containers, and the pods that containerd made
    #[command(visible_alias = "list")]
    Ps(PsArgs),
    /// Run another command in a running container, also of a pod that containerd made
    Exec(ExecArgs),
    /// Show what a container has printed
    Logs(LogsArgs),
    /// Ask containers to stop, and kill those that do not
    Stop(StopArgs),
    /// Send a signal to containers
    Kill(KillArgs),
    /// Remove stopped containers
    Rm(RmArgs),
    /// Wait until containers stop, then print their exit codes
    Wait(Names),
    /// Show all that is known about containers, pods or images, as JSON
    Inspect(Names),
    /// Show what running containers use, those of pods, too
    #[command(visible_alias = "top")]
    Stats(StatsArgs),
    /// Show what the guest kernel of a pod has said
    Console(ConsoleArgs),
    /// Show what happens to the pods that containerd made
    Events(EventsArgs),
    /// Put what is known of a pod into one archive
    DebugBundle(DebugBundleArgs),
    /// List images
    Images(ImagesArgs),
    /// Remove images
    Rmi(RmiArgs),
    /// Fetch an image from a registry
    Pull(PullArgs),
    /// Take images from an archive or an OCI layout into the store
    Load(LoadArgs),
    /// Make, list and remove what `run` clones virtual machines from
    #[command(subcommand)]
    Template(TemplateArgs),
    /// Write a running container with its virtual machine into a file; it goes on afterwards
    Snapshot(SnapshotArgs),
    /// Have a container go on from a snapshot, in the background
    Restore(RestoreArgs),
    /// Copy a running container with its virtual machine; each copy goes on in the background
    Fork(ForkArgs),
    /// Say whether this host can run virtual machines, and what to do if not
    Check(JsonArg),
    /// Have containerd make pods through cloisterd: its drop-in, the shim's name, RuntimeClasses, a unit
    Install(InstallArgs),
    /// Undo what install did
    Uninstall(UninstallArgs),
    /// Print a completion script for a shell
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print versions
    Version(JsonArg),
    /// Hosts the VM of a detached container
    #[command(hide = true)]
    HostPod {
        /// The container's id
        id: String,
        /// Start the container when somebody has attached
        #[arg(long)]
        awaited: bool,
        /// Go on from this snapshot; once more for each that it stands on
        #[arg(long)]
        snapshot: Vec<PathBuf>,
        /// The memory that it touches first
        #[arg(long)]
        prefetch: Option<PathBuf>,
    },
}

/// `snapshot`.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// The container
    pub container: String,
    /// Where to write it; a file that is there is replaced when all is written
    pub file: PathBuf,
    /// Write only the memory that differs from this snapshot, which is needed to restore the new one. What that one stands
    /// on is looked for beside it; give it by further --base if it is elsewhere
    #[arg(long, value_name = "SNAPSHOT")]
    pub base: Vec<PathBuf>,
    /// Print what was written as JSON
    #[arg(long)]
    pub json: bool,
}

/// `restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The snapshot
    pub file: PathBuf,
    /// A snapshot on which it was taken with --base, if that is not beside it under its old name
    #[arg(long, value_name = "SNAPSHOT")]
    pub base: Vec<PathBuf>,
    /// Note beside the snapshot, in FILE.touched, which memory it touches first; where that is noted already, have it ready
    #[arg(long)]
    pub prefetch: bool,
    /// Name of the container; made up if left out
    #[arg(long)]
    pub name: Option<String>,
    /// Remove the container when it ends
    #[arg(long)]
    pub rm: bool,
    /// Network: nat, or tap=NAME; what the snapshot has if left out, but a tap has to be named
    #[arg(long, visible_alias = "network", value_parser = parse::network)]
    pub net: Option<Network>,
    /// Publish a TCP port of the pod. Those of the original are not published
    #[arg(short, long, value_name = "[IP:]HOSTPORT:PORT", value_parser = parse::publish)]
    pub publish: Vec<Publish>,
    /// Give it the folders of this host that the snapshot names; without this a snapshot that names some is refused
    #[arg(long)]
    pub allow_folders: bool,
    /// Print the container's id and name as JSON
    #[arg(long)]
    pub json: bool,
}

/// `fork`.
#[derive(Debug, Args)]
pub struct ForkArgs {
    /// The container
    pub container: String,
    /// How many copies
    #[arg(short = 'n', long, default_value = "1", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub copies: u16,
    /// Remove each copy when it ends
    #[arg(long)]
    pub rm: bool,
    /// Print the copies' ids and names as JSON
    #[arg(long)]
    pub json: bool,
}

/// `template`.
#[derive(Debug, Subcommand)]
pub enum TemplateArgs {
    /// Boot a virtual machine once and keep it: `run` with the same options clones it instead of booting
    Build(TemplateBuildArgs),
    /// List templates
    Ls(JsonArg),
    /// Remove templates; what was cloned from them lives on
    Rm(TemplateNames),
}

/// `template build`: what distinguishes virtual machines, as `run` has it.
#[derive(Debug, Args)]
pub struct TemplateBuildArgs {
    /// Processors of the virtual machine, 1 to 32
    #[arg(long, default_value = "1", value_parser = parse::cpus)]
    pub cpus: u8,
    /// Memory of the virtual machine, such as 512m or 2g
    #[arg(short, long, default_value = "512m", value_parser = parse::vm_memory)]
    pub memory: u64,
    /// Window for files of the image
    #[arg(long, value_name = "SIZE", value_parser = parse::dax_window)]
    pub dax: Option<u64>,
    /// Network: none, nat, or tap=NAME
    #[arg(long, visible_alias = "network", default_value = "nat", value_parser = parse::network)]
    pub net: Network,
    /// Guest kernel; it must be one of ours
    #[arg(long, env = "CLOISTER_KERNEL", value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initramfs with the agent
    #[arg(long, env = "CLOISTER_INITRD", value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// More words for the guest kernel's command line
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    pub kernel_arg: Vec<String>,
    /// Longest time the virtual machine may take until its agent is ready
    #[arg(long, default_value = "60s", value_name = "TIME", value_parser = parse::seconds)]
    pub init_timeout: u64,
}

/// `template rm`.
#[derive(Debug, Args)]
pub struct TemplateNames {
    /// Names, as `template ls` shows them
    #[arg(required = true)]
    pub names: Vec<String>,
}

/// `install`.
#[derive(Debug, Args)]
pub struct InstallArgs {
    /// Install into this folder, which will be a node's file system
    #[arg(long, default_value = "/", value_name = "DIR")]
    pub destdir: PathBuf,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Replace files of others; each is kept as FILE.before-cloister
    #[arg(long)]
    pub force: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `uninstall`.
#[derive(Debug, Args)]
pub struct UninstallArgs {
    /// Where install was told to install
    #[arg(long, default_value = "/", value_name = "DIR")]
    pub destdir: PathBuf,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// When to ask the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PullPolicy {
    /// When the image is not here
    Missing,
    /// Every time
    Always,
    /// Never
    Never,
}

/// `run`.
#[derive(Debug, Args)]
#[command(
    disable_help_flag = true,
    override_usage = "cloister run [OPTIONS] IMAGE [COMMAND [ARG]...]\n       cloister run [OPTIONS] --rootfs DIR COMMAND [ARG]...",
    after_long_help = "IMAGE is a name (busybox, localhost:5000/app:1), or one of\n  oci:DIR[:TAG]              a folder in OCI image layout\n  docker-archive:FILE[:TAG]  what `docker save` writes\n  oci-archive:FILE[:TAG]     a tar of an OCI layout\n  dir:PATH                   a root file system as it stands; writes go to a layer above it\n  /PATH, ./PATH, FILE.tar    any of these, found out by looking\n\nThe exit status is the command's own; 125 if the VM or container could not be had or was lost,\n126 if the command cannot be executed, 127 if it is not there."
)]
pub struct RunArgs {
    /// Print help
    #[arg(long, action = ArgAction::Help)]
    pub help: Option<bool>,
    /// Keep stdin open
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Run in the background and print the container's id
    #[arg(short, long)]
    pub detach: bool,
    /// Keys that leave the container running in the background
    #[arg(long, default_value = "", hide_default_value = true, value_name = "KEYS", value_parser = Keys::parse)]
    pub detach_keys: Keys,
    /// Remove the container when it ends
    #[arg(long)]
    pub rm: bool,
    /// Name of the container
    #[arg(long)]
    pub name: Option<String>,
    /// Set an environment variable (KEY=VALUE, or KEY for the caller's value, or to remove it if the caller has none)
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Share a folder or file of the host
    #[arg(short, long, value_name = "HOST:CONTAINER[:ro]", value_parser = parse::volume)]
    pub volume: Vec<Volume>,
    /// Share a folder (type=bind,source=…,target=…[,readonly]) or mount a tmpfs (type=tmpfs,target=…)
    #[arg(long, value_parser = parse::mount)]
    pub mount: Vec<parse::MountFlag>,
    /// Mount a tmpfs
    #[arg(long, value_name = "PATH[:OPTIONS]", value_parser = parse::tmpfs)]
    pub tmpfs: Vec<(PathBuf, String)>,
    /// Processors of the virtual machine, 1 to 32
    #[arg(long, default_value = "1", value_parser = parse::cpus)]
    pub cpus: u8,
    /// Memory of the virtual machine, such as 512m or 2g
    #[arg(short, long, default_value = "512m", value_parser = parse::vm_memory)]
    pub memory: u64,
    /// Let the guest map files of the image of 1m and more straight from the host's page cache, so many bytes of them
    /// at a time; costs a 64th of it of the guest's memory
    #[arg(long, value_name = "SIZE", value_parser = parse::dax_window)]
    pub dax: Option<u64>,
    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Run this program instead of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// Network: none, nat (an address behind the host's), or tap=NAME (an existing tap device)
    #[arg(long, visible_alias = "network", default_value = "nat", value_parser = parse::network)]
    pub net: Network,
    /// Make a TCP port of the container reachable on the host
    #[arg(short, long, value_name = "[IP:]HOSTPORT:PORT", value_parser = parse::publish)]
    pub publish: Vec<Publish>,
    /// Host name of the container
    #[arg(short = 'h', long, value_parser = parse::hostname)]
    pub hostname: Option<String>,
    /// Make the root file system read-only
    #[arg(long)]
    pub read_only: bool,
    /// Let the container do anything in its virtual machine
    #[arg(long)]
    pub privileged: bool,
    /// Give a capability, or ALL
    #[arg(long, value_name = "CAPABILITY", value_parser = capabilities::parse)]
    pub cap_add: Vec<Change>,
    /// Take a capability, or ALL
    #[arg(long, value_name = "CAPABILITY", value_parser = capabilities::parse)]
    pub cap_drop: Vec<Change>,
    /// seccomp=unconfined, seccomp=builtin, seccomp=FILE.json, or no-new-privileges
    #[arg(long, value_name = "OPTION", value_parser = parse::security)]
    pub security_opt: Vec<parse::SecurityFlag>,
    /// "host": see all processes of the virtual machine
    #[arg(long, value_name = "NAMESPACE", value_parser = ["host"])]
    pub pid: Option<String>,
    /// Label of the container
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = parse::label)]
    pub label: Vec<(String, String)>,
    /// Signal that asks the container to stop
    #[arg(long, value_name = "SIGNAL", value_parser = parse::signal)]
    pub stop_signal: Option<i32>,
    /// Guest kernel (ELF or bzImage)
    #[arg(long, env = "CLOISTER_KERNEL", value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initramfs with the agent
    #[arg(long, env = "CLOISTER_INITRD", value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// More words for the guest kernel's command line
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    pub kernel_arg: Vec<String>,
    /// Longest time the virtual machine may take until its agent is ready
    #[arg(long, default_value = "60s", value_name = "TIME", value_parser = parse::seconds)]
    pub init_timeout: u64,
    /// When to fetch the image
    #[arg(long, value_enum, default_value = "missing")]
    pub pull: PullPolicy,
    /// Speak plain HTTP to the registry
    #[arg(long)]
    pub insecure: bool,
    /// Do not show the progress of a pull
    #[arg(short, long)]
    pub quiet: bool,
    /// Use this folder as root file system instead of an image
    #[arg(long, value_name = "DIR")]
    pub rootfs: Option<PathBuf>,
    /// The image, the command and its arguments
    #[arg(
        value_name = "IMAGE [COMMAND [ARG]...]",
        trailing_var_arg = true,
        required_unless_present = "rootfs"
    )]
    pub words: Vec<String>,
}

/// `ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Show stopped ones, too
    #[arg(short, long)]
    pub all: bool,
    /// Print ids only
    #[arg(short, long)]
    pub quiet: bool,
    /// Do not shorten ids and commands
    #[arg(long)]
    pub no_trunc: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Only the pods that containerd made; with --quiet and --json, too, which are about containers otherwise
    #[arg(short, long)]
    pub pods: bool,
}

/// `console`.
#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// Wait for more until the VM ends
    #[arg(short, long)]
    pub follow: bool,
    /// Print the bytes as the guest wrote them, also those that do something to a terminal
    #[arg(long)]
    pub raw: bool,
    /// The pod, or a container of it
    pub pod: String,
}

/// `events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Also what came after a time (RFC 3339) or within a time span (10m), as far as it is kept
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Print what is kept, and do not wait for more
    #[arg(long)]
    pub no_follow: bool,
    /// Print a JSON object a line
    #[arg(long)]
    pub json: bool,
    /// Only these pods
    pub pods: Vec<String>,
}

/// `debug-bundle`.
#[derive(Debug, Args)]
#[command(
    after_long_help = "The archive (tar.gz) has the pod's record, timings, VM exits and threads, the guest kernel's last words, the pod's events,\nthe daemon's metrics and configuration, and the host's memory and limits. It has no environments, arguments or annotations\nof containers, and is a few hundred KiB at most."
)]
pub struct DebugBundleArgs {
    /// Write to this file, which must not be there yet, or to stdout (-)
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// The pod, or a container of it
    pub pod: String,
}

/// `exec`.
#[derive(Debug, Args)]
#[command(override_usage = "cloister exec [OPTIONS] CONTAINER COMMAND [ARG]...")]
pub struct ExecArgs {
    /// Keep stdin open
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Do not wait for the command
    #[arg(short, long)]
    pub detach: bool,
    /// Keys that leave the command running in the background
    #[arg(long, default_value = "", hide_default_value = true, value_name = "KEYS", value_parser = Keys::parse)]
    pub detach_keys: Keys,
    /// Set an environment variable (as with `run`)
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub env: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User, by name or number; by number only in containers of containerd's
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// The container, the command and its arguments
    #[arg(value_name = "CONTAINER COMMAND [ARG]...", trailing_var_arg = true, required = true, num_args = 2..)]
    pub words: Vec<String>,
}

/// `start`.
#[derive(Debug, Args)]
pub struct StartArgs {
    /// Show its output, and pass signals on
    #[arg(short, long)]
    pub attach: bool,
    /// Pass stdin on, too
    #[arg(short, long)]
    pub interactive: bool,
    /// Keys that leave the container running in the background
    #[arg(long, default_value = "", hide_default_value = true, value_name = "KEYS", value_parser = Keys::parse)]
    pub detach_keys: Keys,
    /// The containers
    #[arg(required = true)]
    pub containers: Vec<String>,
}

/// `restart`.
#[derive(Debug, Args)]
pub struct RestartArgs {
    /// Seconds to wait before killing
    #[arg(short, long, visible_alias = "timeout", default_value = "10", value_parser = parse::seconds)]
    pub time: u64,
    /// Signal to send instead of the container's own stop signal
    #[arg(short, long, value_parser = parse::signal)]
    pub signal: Option<i32>,
    /// The containers
    #[arg(required = true)]
    pub containers: Vec<String>,
}

/// `attach`.
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// Keys that leave the container running in the background
    #[arg(long, default_value = "", hide_default_value = true, value_name = "KEYS", value_parser = Keys::parse)]
    pub detach_keys: Keys,
    /// Do not pass stdin on
    #[arg(long)]
    pub no_stdin: bool,
    /// Pass signals on
    #[arg(long, default_value_t = true, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set)]
    pub sig_proxy: bool,
    /// The container
    pub container: String,
}

/// `logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Wait for more
    #[arg(short, long)]
    pub follow: bool,
    /// Show only the last so many lines (or all)
    #[arg(short = 'n', long, default_value = "all")]
    pub tail: String,
    /// Show only what came after a time (RFC 3339) or within a time span (10m)
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Show times
    #[arg(short, long)]
    pub timestamps: bool,
    /// The container
    pub container: String,
}

/// `stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Seconds to wait before killing
    #[arg(short, long, visible_alias = "timeout", default_value = "10", value_parser = parse::seconds)]
    pub time: u64,
    /// Signal to send instead of the container's own stop signal
    #[arg(short, long, value_parser = parse::signal)]
    pub signal: Option<i32>,
    /// The containers
    #[arg(required = true)]
    pub containers: Vec<String>,
}

/// `kill`.
#[derive(Debug, Args)]
pub struct KillArgs {
    /// Signal, by name or number
    #[arg(short, long, default_value = "KILL", value_parser = parse::signal)]
    pub signal: i32,
    /// The containers
    #[arg(required = true)]
    pub containers: Vec<String>,
}

/// `rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// Kill running ones first
    #[arg(short, long)]
    pub force: bool,
    /// The containers
    #[arg(required = true)]
    pub containers: Vec<String>,
}

/// Names of containers.
#[derive(Debug, Args)]
pub struct Names {
    /// Names, ids, or starts of ids
    #[arg(required = true)]
    pub names: Vec<String>,
}

/// `stats`.
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// Print once and end
    #[arg(long)]
    pub no_stream: bool,
    /// Print JSON once and end
    #[arg(long)]
    pub json: bool,
    /// The containers; all running ones if none is given
    pub containers: Vec<String>,
}

/// `images`.
#[derive(Debug, Args)]
pub struct ImagesArgs {
    /// Print ids only
    #[arg(short, long)]
    pub quiet: bool,
    /// Do not shorten ids
    #[arg(long)]
    pub no_trunc: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `rmi`.
#[derive(Debug, Args)]
pub struct RmiArgs {
    /// Remove all names of an image given by id
    #[arg(short, long)]
    pub force: bool,
    /// The images
    #[arg(required = true)]
    pub images: Vec<String>,
}

/// `pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// Speak plain HTTP to the registry
    #[arg(long)]
    pub insecure: bool,
    /// Print nothing but the name
    #[arg(short, long)]
    pub quiet: bool,
    /// The image
    pub image: String,
}

/// `load`.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// An archive, an OCI layout, or one of IMAGE's forms; stdin if absent
    #[arg(short, long, value_name = "SOURCE")]
    pub input: Option<String>,
    /// Print names only
    #[arg(short, long)]
    pub quiet: bool,
    /// The same as --input
    #[arg(value_name = "SOURCE", conflicts_with = "input")]
    pub source: Option<String>,
}

/// `--json`.
#[derive(Debug, Args)]
pub struct JsonArg {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_as_docker_reads_it() {
        let line = "cloister run -it --rm -e A=1 -v /a:/b:ro -p 80:80 -m 1g -h box busybox sh -c ls -l";
        let cli = Cli::try_parse_from(line.split(' ')).unwrap();
        let Command::Run(run) = cli.command else {
            panic!("{cli:?}")
        };
        assert!(run.interactive && run.tty && run.rm && !run.detach);
        assert_eq!(run.words, ["busybox", "sh", "-c", "ls", "-l"]);
        assert_eq!(run.hostname.as_deref(), Some("box"));
        assert_eq!(run.memory, 1 << 30);
        let cli = Cli::try_parse_from(["cloister", "run", "img", "--help"]).unwrap();
        let Command::Run(run) = cli.command else {
            panic!("{cli:?}")
        };
        assert_eq!(run.words, ["img", "--help"]);
        for wrong in [
            "cloister run",
            "cloister run --memory 99999999t x",
            "cloister run --bogus x",
            "cloister run --cpus 0 x",
        ] {
            assert!(Cli::try_parse_from(wrong.split(' ')).is_err(), "{wrong}");
        }
    }

    #[test]
    fn start_and_attach() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).map(|cli| cli.command);
        let Ok(Command::Attach(attach)) = parse("cloister attach --sig-proxy=false --no-stdin web") else {
            panic!()
        };
        assert!(!attach.sig_proxy && attach.no_stdin);
        assert_eq!(attach.detach_keys, Keys::default());
        let Ok(Command::Attach(attach)) = parse("cloister attach --sig-proxy web") else {
            panic!()
        };
        assert!(attach.sig_proxy && !attach.no_stdin);
        assert_eq!(attach.container, "web");
        let Ok(Command::Start(start)) = parse("cloister start -ai --detach-keys=ctrl-x web") else {
            panic!()
        };
        assert!(start.attach && start.interactive);
        assert_eq!(start.detach_keys, Keys::parse("ctrl-x").unwrap());
        let Ok(Command::Create(create)) = parse("cloister create -it --name web busybox sh") else {
            panic!()
        };
        assert_eq!(create.words, ["busybox", "sh"]);
        for wrong in [
            "cloister start",
            "cloister attach",
            "cloister attach a b",
            "cloister attach --detach-keys=ctrl-1 web",
            "cloister run --detach-keys ctrl- web",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn exec_and_rootfs() {
        let cli = Cli::try_parse_from("cloister exec -it web ls -la".split(' ')).unwrap();
        let Command::Exec(exec) = cli.command else {
            panic!("{cli:?}")
        };
        assert_eq!(exec.words, ["web", "ls", "-la"]);
        assert!(Cli::try_parse_from(["cloister", "exec", "web"]).is_err());
        let cli = Cli::try_parse_from("cloister run --rootfs /r ls -l".split(' ')).unwrap();
        let Command::Run(run) = cli.command else {
            panic!("{cli:?}")
        };
        assert_eq!(run.words, ["ls", "-l"]);
    }
}
