//! Starting, recognizing and ending processes. A process is known by its id and its start time together, and is signalled
//! through a pidfd, so that a recycled id is never hit.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A process that the harness started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Process {
    /// What it is, as in the name of its log file.
    pub(crate) name: String,
    /// Process id.
    pub(crate) pid: i32,
    /// Start in clock ticks since boot, field 22 of `/proc/PID/stat`.
    pub(crate) started: u64,
}

impl Process {
    /// Whether this very process still runs. A zombie is dead: on some machines nobody reaps it for seconds.
    pub(crate) fn alive(&self) -> bool {
        stat(self.pid).is_some_and(|(state, started)| started == self.started && !matches!(state, 'Z' | 'X'))
    }

    /// Resident memory in bytes.
    pub(crate) fn memory(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
    }

    fn signal(&self, signal: Signal) {
        signal_if(self.pid, signal, || self.alive());
    }
}

/// Sends `signal` to `pid` if `ours` holds once the process is pinned by a pidfd.
pub(crate) fn signal_if(pid: i32, signal: Signal, ours: impl FnOnce() -> bool) {
    let Some(id) = Pid::from_raw(pid) else { return };
    let Ok(pinned) = pidfd_open(id, PidfdFlags::empty()) else { return };
    if ours() {
        // The only failure left is that it ended meanwhile, which is what we want.
        let _ = pidfd_send_signal(&pinned, signal);
    }
}

/// State letter and start time of a process, or nothing if there is none.
fn stat(pid: i32) -> Option<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in brackets and may hold anything, so the rest starts after the last bracket.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let started = fields.nth(18)?.parse().ok()?;
    Some((state, started))
}

/// What to start and where.
pub(crate) struct Daemon<'a> {
    /// Name of the process and of its log file.
    pub(crate) name: &'a str,
    /// Program and arguments.
    pub(crate) command: Vec<String>,
    /// Network namespace to enter; none is the machine's own.
    pub(crate) netns: Option<PathBuf>,
    /// Standard input, if it is to have one.
    pub(crate) stdin: Option<Stdio>,
}

impl<'a> Daemon<'a> {
    /// A program with its arguments, in the machine's own network.
    pub(crate) fn new(name: &'a str, program: &Path, args: Vec<String>) -> Daemon<'a> {
        let mut command = vec![program.display().to_string()];
        command.extend(args);
        Daemon { name, command, netns: None, stdin: None }
    }

    /// Starts it. Output goes to `logs/NAME.log`.
    pub(crate) fn spawn(self, logs: &Path) -> Result<Process> {
        use std::os::unix::process::CommandExt;
        fs::create_dir_all(logs)?;
        let log = File::create(logs.join(format!("{}.log", self.name)))?;
        let mut command = match &self.netns {
            Some(netns) => enter(netns, &self.command[0]),
            None => Command::new(&self.command[0]),
        };
        let child = command
            .args(&self.command[1..])
            .env("PATH", search_path())
            .stdin(self.stdin.unwrap_or(Stdio::null()))
            .stdout(log.try_clone()?)
            .stderr(log)
            // A group of its own: Ctrl-C in the terminal that ran `up` must not reach it.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", self.command[0]))?;
        let pid = i32::try_from(child.id())?;
        let Some((_, started)) = stat(pid) else { bail!("{} ended at once", self.name) };
        Ok(Process { name: self.name.to_owned(), pid, started })
    }
}

/// A command that runs in a network namespace. Not `ip netns exec`: that mounts /sys anew and hides the cgroups.
pub(crate) fn enter(netns: &Path, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", netns.display())).arg("--").arg(program);
    command
}

/// PATH with the administrator's directories, which an ordinary user's shell may lack.
pub(crate) fn search_path() -> String {
    format!("{}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin", std::env::var("PATH").unwrap_or_default())
}

/// Ends processes, the youngest first: asks, waits at most `patience`, then forces.
pub(crate) fn stop(processes: &[Process], patience: Duration) -> Result<()> {
    for process in processes.iter().rev() {
        process.signal(Signal::TERM);
    }
    if !await_end(processes, patience) {
        for process in processes.iter().rev() {
            process.signal(Signal::KILL);
        }
        if !await_end(processes, Duration::from_secs(10)) {
            let stuck: Vec<_> =
                processes.iter().filter(|p| p.alive()).map(|p| format!("{} ({})", p.name, p.pid)).collect();
            bail!("these processes do not end: {}", stuck.join(", "));
        }
    }
    Ok(())
}

fn await_end(processes: &[Process], patience: Duration) -> bool {
    let start = Instant::now();
    while processes.iter().any(Process::alive) {
        if start.elapsed() > patience {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Runs a command to its end and gives its standard output.
///
/// # Errors
/// It can't be started or does not exit with 0; the message holds the command and what it wrote.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let output = command
        .env("PATH", search_path())
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            String::from_utf8_lossy(&output.stdout)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The last lines of a log, for an error message.
pub(crate) fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recycled_id_is_not_the_process() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let (_, started) = stat(pid).unwrap();
        let me = Process { name: "me".into(), pid, started };
        assert!(me.alive());
        assert!(!Process { started: started + 1, ..me }.alive());
    }

    #[test]
    fn stop_ends_a_process_that_ignores_the_first_signal() {
        let dir = std::env::temp_dir().join(format!("synthex-cluster-process-{}", std::process::id()));
        let script = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
        let daemon = Daemon::new("stubborn", Path::new("/bin/sh"), vec!["-c".into(), script.into()]);
        let process = daemon.spawn(&dir).unwrap();
        crate::progress::wait("the trap", Duration::from_secs(5), || {
            Ok(if tail(&dir.join("stubborn.log")) == "ready" { Ok(()) } else { Err("no trap yet".into()) })
        })
        .unwrap();
        stop(std::slice::from_ref(&process), Duration::from_millis(200)).unwrap();
        assert!(!process.alive());
        fs::remove_dir_all(dir).unwrap();
    }
}
