//! The record of what was started and changed on this machine. It is written before or right after each change, so that
//! `down` works after a crash of the harness. Touches only its own file.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::paths::{self, Profile};
use crate::process::Process;

/// What one cluster started and changed.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct State {
    /// The checkout that brought the cluster up.
    pub(crate) workspace: PathBuf,
    /// Directory of the data, removed by `down`.
    pub(crate) data: PathBuf,
    /// Kubeconfig for host programs, removed by `down`.
    pub(crate) kubeconfig: PathBuf,
    /// Whether everything came up.
    pub(crate) complete: bool,
    /// Processes in the order of their start.
    pub(crate) processes: Vec<Process>,
    /// Machine-wide kernel settings as they were before.
    pub(crate) sysctls: BTreeMap<PathBuf, String>,
    /// Directories outside of our own that did not exist before.
    pub(crate) made: Vec<PathBuf>,
}

impl State {
    /// The record of a cluster that has nothing yet.
    pub(crate) fn new(profile: Profile) -> State {
        State {
            workspace: paths::workspace().to_path_buf(),
            data: profile.data(),
            kubeconfig: profile.kubeconfig(),
            complete: false,
            processes: Vec::new(),
            sysctls: BTreeMap::new(),
            made: Vec::new(),
        }
    }

    /// Reads the record, if there is one.
    ///
    /// # Errors
    /// The file can't be read, or is not one of ours.
    pub(crate) fn load(profile: Profile) -> Result<Option<State>> {
        let file = profile.run().join("state.json");
        let bytes = match fs::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
        };
        let state = serde_json::from_slice(&bytes).with_context(|| {
            format!(
                "{} is damaged, so what was started is not known; end its processes by hand and remove the file",
                file.display()
            )
        })?;
        Ok(Some(state))
    }

    /// Writes the record in one step: a reader sees the old one or the new one.
    pub(crate) fn save(&self, profile: Profile) -> Result<()> {
        let dir = profile.run();
        fs::create_dir_all(&dir)?;
        let fresh = dir.join("state.json.new");
        fs::write(&fresh, serde_json::to_vec_pretty(self)?)?;
        fs::rename(&fresh, dir.join("state.json")).context("cannot write the record of what was started")
    }

    /// Whether any process of it still runs.
    pub(crate) fn any_alive(&self) -> bool {
        self.processes.iter().any(Process::alive)
    }
}
