//! The plugin's way to the API server: reads one rollout, and puts a verb on it.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use kube::{
    Api, Client, Config, ResourceExt,
    api::{Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::json;

use crate::{api::OptimizationRollout, decision::snapshot::Verb, effects::timed};

/// Owner of the annotations that the plugin puts.
const FIELD_MANAGER: &str = "kubectl-synthex";

/// How often a verb is put where the operator writes the object at the same time.
const TRIES: u32 = 5;

/// Which cluster and namespace, in kubectl's own words.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Access {
    /// Namespace of the rollout; the context's unless given.
    #[arg(short, long, global = true, help_heading = "Cluster")]
    namespace: Option<String>,
    /// Kubeconfig file; $KUBECONFIG or ~/.kube/config unless given.
    #[arg(long, global = true, help_heading = "Cluster")]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig.
    #[arg(long, global = true, help_heading = "Cluster")]
    context: Option<String>,
    /// Cluster of the kubeconfig.
    #[arg(long, global = true, help_heading = "Cluster")]
    cluster: Option<String>,
    /// User of the kubeconfig.
    #[arg(long, global = true, help_heading = "Cluster")]
    user: Option<String>,
}

impl Access {
    async fn api(&self) -> Result<Api<OptimizationRollout>> {
        // An error here means that a provider is installed already, which is all that is wanted.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let kubeconfig = match &self.kubeconfig {
            Some(path) => Kubeconfig::read_from(path),
            None => Kubeconfig::read(),
        };
        let options = KubeConfigOptions {
            context: self.context.clone(),
            cluster: self.cluster.clone(),
            user: self.user.clone(),
        };
        let kubeconfig =
            kubeconfig.context("no kubeconfig can be read; give --kubeconfig or set KUBECONFIG")?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &options).await.context("kubeconfig")?;
        let namespace = self.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).context("no client for the API server")?;
        Ok(Api::namespaced(client, &namespace))
    }

    /// Reads a rollout.
    ///
    /// # Errors
    /// When the API server cannot be reached or has none of this name.
    pub async fn rollout(&self, name: &str) -> Result<OptimizationRollout> {
        let api = self.api().await?;
        timed("get", api.get(name)).await.with_context(|| format!("oro/{name}"))
    }

    /// Puts a verb on a rollout, and says how to see what becomes of it.
    ///
    /// # Errors
    /// When the API server cannot be reached or refuses, or another word of the same kind waits for its answer.
    pub async fn put(&self, name: &str, verb: &Verb) -> Result<String> {
        let word = verb.to_string();
        let value = word.split_once('=').map_or("", |(_, value)| value);
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        let api = self.api().await?;
        let mut tries = TRIES;
        let namespace = loop {
            tries -= 1;
            let seen = timed("get", api.get_metadata(name)).await.with_context(|| format!("oro/{name}"))?;
            if let Some(other) = seen.annotations().get(verb.annotation()).filter(|other| *other != value) {
                bail!(
                    "oro/{name}: {}={other} has not been answered yet, and would be lost; try again in a moment",
                    verb.annotation()
                );
            }
            // A merge, not an apply: an apply would take back a verb that this manager has put and that is not answered yet. With the
            // version, so that no word is overwritten that somebody has put since.
            let body = json!({ "metadata": {
                "resourceVersion": seen.resource_version(),
                "annotations": { verb.annotation(): value },
            } });
            match timed("patch", api.patch_metadata(name, &params, &Patch::Merge(&body))).await {
                Err(error) if error.is_conflict() && tries > 0 => {}
                patched => {
                    break patched.with_context(|| format!("oro/{name}"))?.namespace().unwrap_or_default();
                }
            }
        };
        Ok(format!(
            "oro/{name} asked: synthex.io/{word}\nThe operator answers with an event; see what it did:\n  \
             kubectl events -n {namespace} --for oro/{name}\n  kubectl synthex explain {name} -n {namespace}\n"
        ))
    }
}
