//! What the harness needs from the machine and changes on it: packages, kernel settings, mounts, control groups. Everything that is changed here
//! is put back by the `restore`/`remove` functions beside it.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;

use crate::paths::{Profile, RUN};
use crate::process::{run, search_path, signal_if};
use crate::progress::{step, wait};

/// The control group below which the kubelet puts every pod.
pub(crate) const CGROUP: &str = "synthex-cluster";

/// Settings that the kubelet changes for the whole machine.
const SYSCTLS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// Places outside of our own in which containerd, CNI and the kubelet leave traces, since they can't be told another.
const SHARED: [&str; 8] = [
    "/run/containerd",
    "/var/lib/cni",
    "/var/lib/containerd",
    "/var/lib/kubelet",
    "/var/log/containers",
    "/var/log/pods",
    "/etc/cni",
    "/opt/containerd",
];

/// Stops unless this is root: namespaces, mounts and control groups need it.
pub(crate) fn require_root() -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    bail!("this must run as root: it makes network namespaces, mounts and control groups")
}

/// A program in PATH or in the administrator's directories.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    search_path().split(':').map(|dir| Path::new(dir).join(program)).find(|file| file.is_file())
}

/// Where the CNI plugins are: Debian's place or the usual one.
pub(crate) fn cni_plugins() -> Option<&'static str> {
    ["/usr/lib/cni", "/opt/cni/bin"].into_iter().find(|dir| Path::new(dir).join("bridge").is_file())
}

/// Installs the Debian packages that are missing, without letting any of them start a service.
///
/// # Errors
/// There is no apt, or it fails.
pub(crate) fn install_packages(profile: Profile) -> Result<()> {
    let has = |program: &str| find(program).is_some();
    let mut wanted = vec![("openssl", has("openssl"))];
    if profile == Profile::Node {
        wanted.extend([
            ("containerd", has("containerd")),
            ("runc", has("runc")),
            ("containernetworking-plugins", cni_plugins().is_some()),
            ("nftables", has("nft")),
            ("conntrack", has("conntrack")),
            ("iproute2", has("ip")),
            ("util-linux", has("nsenter")),
            ("ca-certificates", Path::new("/etc/ssl/certs/ca-certificates.crt").exists()),
        ]);
    }
    let missing: Vec<_> =
        wanted.into_iter().filter(|(_, there)| !there).map(|(package, _)| package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !has("apt-get") {
        bail!(
            "these are missing and there is no apt-get to install them: {names} (names of the Debian packages)"
        );
    }
    step(&format!("install {names}"), || {
        let apt = |args: &[&str]| {
            run(Command::new("apt-get")
                .args(args)
                .env("DEBIAN_FRONTEND", "noninteractive")
                .env("RUNLEVEL", "1"))
        };
        let policy = ServicePolicy::deny()?;
        apt(&["update", "-q"])?;
        let mut install = vec!["install", "-q", "-y", "--no-install-recommends"];
        install.extend(&missing);
        apt(&install)?;
        drop(policy);
        // It would start at the next boot. Where there is no systemd there is nothing to switch off.
        if missing.contains(&"containerd") {
            let _ = Command::new("systemctl").args(["disable", "--quiet", "containerd"]).output();
        }
        Ok(())
    })
}

/// While it lives, Debian's maintainer scripts start no service.
struct ServicePolicy {
    file: Option<&'static str>,
}

impl ServicePolicy {
    fn deny() -> Result<ServicePolicy> {
        let file = "/usr/sbin/policy-rc.d";
        // Somebody's own policy stays in force: containers usually have one that says no.
        if Path::new(file).exists() {
            return Ok(ServicePolicy { file: None });
        }
        fs::write(file, "#!/bin/sh\nexit 101\n")?;
        fs::set_permissions(file, fs::Permissions::from_mode(0o755))?;
        Ok(ServicePolicy { file: Some(file) })
    }
}

impl Drop for ServicePolicy {
    fn drop(&mut self) {
        if let Some(file) = self.file {
            let _ = fs::remove_file(file);
        }
    }
}

fn sysctl(name: &str) -> PathBuf {
    Path::new("/proc/sys").join(name)
}

/// The machine-wide settings as they are now.
pub(crate) fn sysctls() -> BTreeMap<PathBuf, String> {
    let read = |name: &&str| Some((sysctl(name), fs::read_to_string(sysctl(name)).ok()?.trim().to_owned()));
    SYSCTLS.iter().filter_map(read).collect()
}

/// Puts settings back.
pub(crate) fn restore_sysctls(saved: &BTreeMap<PathBuf, String>) -> Result<()> {
    for (file, value) in saved {
        fs::write(file, value).with_context(|| format!("cannot put {} back to {value}", file.display()))?;
    }
    Ok(())
}

/// The shared places that do not exist now.
pub(crate) fn absent() -> Vec<PathBuf> {
    SHARED.map(PathBuf::from).into_iter().filter(|path| !path.exists()).collect()
}

/// Removes our traces from the shared places, and those places which were not there before and are empty now.
pub(crate) fn clean_shared(made: &[PathBuf], data: &Path) {
    // Results that name a namespace of ours, and links into our logs: no other cluster's.
    for entry in entries(Path::new("/var/lib/cni/results")) {
        if fs::read_to_string(entry.path()).is_ok_and(|text| text.contains(RUN)) {
            let _ = fs::remove_file(entry.path());
        }
    }
    for entry in entries(Path::new("/var/log/containers")) {
        if fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(data)) {
            let _ = fs::remove_file(entry.path());
        }
    }
    made.iter().for_each(|path| prune(path));
}

/// Removes a directory tree as far as it holds no files.
fn prune(dir: &Path) {
    for entry in entries(dir) {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            prune(&entry.path());
        }
    }
    // Fails when something is left in it, and then it stays.
    let _ = fs::remove_dir(dir);
}

fn entries(dir: &Path) -> impl Iterator<Item = fs::DirEntry> {
    fs::read_dir(dir).into_iter().flatten().flatten()
}

/// Detaches every mount at or below `dir`.
pub(crate) fn unmount_below(dir: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    // The last mounted first. The kernel writes blanks as \040; our own paths are compared in the same spelling.
    let wanted = dir.display().to_string().replace(' ', "\\040");
    let below = |point: &&str| *point == wanted || point.starts_with(&format!("{wanted}/"));
    let points: Vec<_> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).filter(below).collect();
    for point in points.iter().rev() {
        let path = point.replace("\\040", " ");
        unmount(&*path, UnmountFlags::DETACH).with_context(|| format!("cannot unmount {path}"))?;
    }
    Ok(())
}

/// Our control group in every hierarchy of this machine (one with version 2, about ten with version 1).
fn cgroups() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let hierarchy = |line: &str| {
        let (fields, kind) = line.split_once(" - ")?;
        let point = fields.split(' ').nth(4)?;
        matches!(kind.split(' ').next()?, "cgroup" | "cgroup2").then(|| Path::new(point).join(CGROUP))
    };
    Ok(mounts.lines().filter_map(hierarchy).collect())
}

/// Makes our control group.
pub(crate) fn create_cgroups() -> Result<()> {
    for dir in cgroups()? {
        fs::create_dir_all(&dir)
            .with_context(|| format!("cannot make the control group {}", dir.display()))?;
    }
    Ok(())
}

/// Ends all processes in our control group (those of the pods) and removes it.
pub(crate) fn remove_cgroups() -> Result<()> {
    let groups = cgroups()?;
    wait("ending the pods' processes", Duration::from_secs(20), || {
        for group in &groups {
            kill_group(group);
        }
        let left: Vec<_> = groups.iter().filter(|group| !remove_group(group)).collect();
        Ok(if left.is_empty() { Ok(()) } else { Err(format!("control groups are still busy: {left:?}")) })
    })
}

fn kill_group(group: &Path) {
    let members = || fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    for pid in members().lines().filter_map(|line| line.parse().ok()) {
        signal_if(pid, Signal::KILL, || members().lines().any(|line| line.parse() == Ok(pid)));
    }
    for entry in entries(group).filter(|entry| entry.path().is_dir()) {
        kill_group(&entry.path());
    }
}

fn remove_group(group: &Path) -> bool {
    for entry in entries(group).filter(|entry| entry.path().is_dir()) {
        remove_group(&entry.path());
    }
    fs::remove_dir(group).err().is_none_or(|error| error.kind() == ErrorKind::NotFound)
}

/// Ends containerd's helpers of this containerd socket: they outlive containerd by design. Their sockets are removed too.
pub(crate) fn end_shims(socket: &Path, tasks: &Path) -> Result<()> {
    let socket = socket.display().to_string();
    let is_shim = |pid: i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        words.first().is_some_and(|program| program.contains("containerd-shim"))
            && words.iter().any(|word| *word == socket)
    };
    // Each container's directory names the socket of its helper, which lies in a place shared with other containerds.
    for task in entries(tasks) {
        if let Ok(address) = fs::read_to_string(task.path().join("address")) {
            let _ = fs::remove_file(address.trim().trim_start_matches("unix://"));
        }
    }
    wait("ending containerd's helpers", Duration::from_secs(10), || {
        let pids =
            entries(Path::new("/proc")).filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let shims: Vec<_> = pids.filter(|pid| is_shim(*pid)).collect();
        for pid in &shims {
            signal_if(*pid, Signal::KILL, || is_shim(*pid));
        }
        Ok(if shims.is_empty() { Ok(()) } else { Err(format!("these stay: {shims:?}")) })
    })
}

/// Removes a directory tree; it is no error if there is none.
pub(crate) fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
