//! Up, down and status: keeps the order of things and the record; what a profile consists of is in its own module.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cluster::Cluster;
use crate::paths::{self, Profile};
use crate::pki::Pki;
use crate::process::{self, Daemon, Process, tail};
use crate::progress::{step, wait};
use crate::state::State;
use crate::{binaries, control_plane, host, node};

/// A cluster in the making: what has been started so far, and where.
pub(crate) struct Build {
    pub(crate) profile: Profile,
    pub(crate) state: State,
    pub(crate) pki: Pki,
}

impl Build {
    /// Starts a process and writes it into the record.
    pub(crate) fn start(&mut self, daemon: Daemon) -> Result<()> {
        let process = daemon.spawn(&self.profile.data().join("logs"))?;
        self.state.processes.push(process);
        self.state.save(self.profile)
    }

    /// Waits until `probe` has no complaint. If a started process ends meanwhile, its last words are the error.
    pub(crate) fn ready(&self, what: &str, probe: impl Fn() -> Result<(), String>) -> Result<()> {
        step(what, || {
            wait(what, Duration::from_secs(60), || {
                if let Some(dead) = self.state.processes.iter().find(|process| !process.alive()) {
                    let log = self.profile.data().join(format!("logs/{}.log", dead.name));
                    bail!("{} ended; the end of {}:\n{}", dead.name, log.display(), tail(&log));
                }
                Ok(probe())
            })
        })
    }
}

/// One harness at a time works on this machine; the second waits. The lock is on the directory that holds ours, so that no file
/// is left behind.
fn lock() -> Result<File> {
    host::require_root()?;
    let above = Path::new(paths::RUN).parent().unwrap_or(Path::new("/"));
    let directory = File::open(above)?;
    if directory.try_lock().is_err() {
        eprintln!("waiting for another run of the harness to finish");
        directory.lock()?;
    }
    Ok(directory)
}

/// Brings a cluster up, or finds it up. What is half-built or dead is replaced.
///
/// # Errors
/// Not root, a package or program can't be had, another checkout's cluster is up, or something does not come up; the
/// half-built cluster then stays for a look at its logs, until the next `up` or `down`.
pub fn up(profile: Profile) -> Result<Cluster> {
    let _lock = lock()?;
    let start = Instant::now();
    if let Some(state) = State::load(profile)? {
        let alive = state.complete && state.processes.iter().all(Process::alive);
        if alive && state.workspace != paths::workspace() {
            bail!(
                "a {} cluster of the checkout {} is up; `cargo cluster down`, here or there, removes it",
                profile.name(),
                state.workspace.display()
            );
        }
        let cluster = Cluster::managed(profile);
        if alive && cluster.kubectl(&["get", "--raw", "/readyz"]).is_ok() {
            return Ok(cluster);
        }
        step("remove what an earlier run left", || remove(profile, &state))?;
    }
    eprintln!("bringing up the {} cluster", profile.name());
    host::install_packages(profile)?;
    binaries::build()?;
    // Not in the record, so nobody's: left by a reboot.
    host::unmount_below(&profile.data())?;
    host::remove_tree(&profile.data())?;
    fs::create_dir_all(profile.data())?;

    let mut state = State::new(profile);
    state.save(profile)?;
    if profile == Profile::Node {
        state.sysctls = host::sysctls();
        state.made = host::absent();
        state.save(profile)?;
    }
    let pki = step("make certificates", || {
        let dir = profile.data().join("pki");
        match profile {
            Profile::ControlPlane => Pki::create(dir, &[], None),
            Profile::Node => {
                let names = [format!("IP:{}", node::ADDRESS), format!("IP:{}", node::API_SERVICE)];
                Pki::create(dir, &names, Some((node::NAME, node::ADDRESS)))
            }
        }
    })?;
    let mut build = Build { profile, state, pki };
    let cluster = match profile {
        Profile::ControlPlane => control_plane::start_alone(&mut build),
        Profile::Node => node::start(&mut build),
    }
    .with_context(|| format!("the logs are in {}", profile.data().join("logs").display()))?;
    build.state.complete = true;
    build.state.save(profile)?;
    eprintln!("the {} cluster is up ({:.1} s)", profile.name(), start.elapsed().as_secs_f64());
    Ok(cluster)
}

/// Takes a cluster down and puts back what it changed. Without a cluster it does nothing.
///
/// # Errors
/// Not root, or something can't be ended or removed; it may be run again.
pub fn down(profile: Profile) -> Result<()> {
    let _lock = lock()?;
    let Some(state) = State::load(profile)? else { return Ok(()) };
    step(&format!("take the {} cluster down", profile.name()), || remove(profile, &state))
}

fn remove(profile: Profile, state: &State) -> Result<()> {
    // All that they know is thrown away, so a short time for good manners is enough.
    process::stop(&state.processes, Duration::from_secs(1))?;
    if profile == Profile::Node {
        node::end_pods()?;
    }
    host::unmount_below(&profile.run())?;
    host::unmount_below(&state.data)?;
    host::restore_sysctls(&state.sysctls)?;
    host::clean_shared(&state.made, &state.data);
    host::remove_tree(&state.data)?;
    let _ = fs::remove_file(&state.kubeconfig);
    // The record goes last: until here, `down` can be run again.
    host::remove_tree(&profile.run())?;
    // Not empty while the other profile is up.
    let _ = fs::remove_dir(paths::RUN);
    Ok(())
}

/// What is up, in words, with the memory that each process holds.
///
/// # Errors
/// The record can't be read.
pub fn status() -> Result<String> {
    let mut text = String::new();
    for profile in Profile::ALL {
        let Some(state) = State::load(profile)? else {
            text += &format!("{}: down\n", profile.name());
            continue;
        };
        let condition = match (state.complete, state.processes.iter().all(Process::alive)) {
            (true, true) => "up",
            (true, false) => "broken",
            (false, _) => "half-built",
        };
        text += &format!("{}: {condition}, of {}\n", profile.name(), state.workspace.display());
        text += &format!("  KUBECONFIG={}\n", state.kubeconfig.display());
        text += &format!("  logs: {}\n", state.data.join("logs").display());
        for process in &state.processes {
            let memory = process.memory().filter(|_| process.alive());
            let memory = memory.map_or("dead".into(), |bytes| format!("{:4} MiB", bytes >> 20));
            text += &format!("  {:24} pid {:7} {memory}\n", process.name, process.pid);
        }
    }
    Ok(text)
}

/// Whether something of a profile is up, as far as the record says.
pub(crate) fn is_up(profile: Profile) -> Result<bool> {
    Ok(State::load(profile)?.is_some_and(|state| state.complete && state.any_alive()))
}

/// The listening socket for host programs, as a process's standard input.
pub(crate) fn listener() -> Result<(u16, Stdio)> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").context("no free port on 127.0.0.1")?;
    let port = listener.local_addr()?.port();
    Ok((port, Stdio::from(std::os::fd::OwnedFd::from(listener))))
}
