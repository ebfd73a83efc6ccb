//! A cluster as tests and the demo see it: a kubeconfig and kubectl. Works the same on the harness's own clusters and on any other
//! that KUBECONFIG names; it changes nothing on the machine, only objects in the cluster.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::host;
use crate::paths::{Profile, bin, workspace};
use crate::process::search_path;
use crate::progress::wait;

/// A running cluster.
#[derive(Clone, Debug)]
pub struct Cluster {
    kubeconfig: PathBuf,
}

impl Cluster {
    /// The harness's own cluster of a profile, whether or not it is up.
    pub fn managed(profile: Profile) -> Cluster {
        Cluster { kubeconfig: profile.kubeconfig() }
    }

    /// The cluster that KUBECONFIG names. This is how tests find theirs.
    ///
    /// # Errors
    /// KUBECONFIG is not set.
    pub fn connect() -> Result<Cluster> {
        let kubeconfig = std::env::var_os("KUBECONFIG").filter(|value| !value.is_empty());
        let kubeconfig = kubeconfig.context(
            "KUBECONFIG is not set: run `cargo cluster test`, or bring a cluster up with `cargo cluster up` and set it as told",
        )?;
        Ok(Cluster { kubeconfig: kubeconfig.into() })
    }

    /// The kubeconfig, for clients and for programs' environment.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A kubectl command on this cluster, ready to be run: the harness's own kubectl, or else the one in PATH.
    pub fn command(&self, args: &[&str]) -> Command {
        let own = bin("kubectl");
        let program =
            if own.exists() { own } else { host::find("kubectl").unwrap_or_else(|| "kubectl".into()) };
        let mut command = Command::new(program);
        command.args(args).env("KUBECONFIG", &self.kubeconfig).env("PATH", search_path());
        // What it learns of a cluster of ours is of no use after it, and would pile up in the user's home.
        if let Some(ours) = Profile::ALL.into_iter().find(|profile| profile.kubeconfig() == self.kubeconfig) {
            command.env("KUBECACHEDIR", ours.data().join("kubectl"));
        }
        command
    }

    /// Runs kubectl and gives what it wrote and how it ended.
    ///
    /// # Errors
    /// It can't be started.
    pub fn output(&self, args: &[&str]) -> Result<Output> {
        self.command(args).stdin(Stdio::null()).output().context("cannot start kubectl")
    }

    /// Runs kubectl and gives its standard output.
    ///
    /// # Errors
    /// It can't be started or does not exit with 0; the message holds what it wrote.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        finish(args, &self.output(args)?)
    }

    /// Applies manifests (YAML or JSON, several documents) by server-side apply.
    ///
    /// # Errors
    /// The API server refuses one; the message says why.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        let args = ["apply", "--server-side", "--force-conflicts", "--filename=-"];
        self.feed(&args, manifests)
    }

    /// Runs kubectl with a standard input.
    ///
    /// # Errors
    /// As of [`Cluster::kubectl`].
    pub fn feed(&self, args: &[&str], input: &str) -> Result<String> {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start kubectl")?;
        // It reads everything before it writes much, so one thread is enough. If it ended already, its own message says more.
        if let Some(mut stdin) = child.stdin.take() {
            let _ = stdin.write_all(input.as_bytes());
        }
        finish(args, &child.wait_with_output()?)
    }

    /// A namespace of its own for one test: `PREFIX-RANDOM`, removed (without waiting) when the value is dropped.
    ///
    /// # Errors
    /// The API server refuses it.
    pub fn namespace(&self, prefix: &str) -> Result<Namespace> {
        let object = serde_json::json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": format!("{prefix}-")}});
        let args = ["create", "--filename=-", "--output=jsonpath={.metadata.name}"];
        let name = self.feed(&args, &object.to_string())?;
        Ok(Namespace { cluster: self.clone(), name })
    }

    /// Asks `probe` until it gives a value, at most for `timeout`; until then it says in words what is missing.
    ///
    /// # Errors
    /// Time is up, with the last answer, and pods and events of `namespace`.
    pub fn eventually<T>(
        &self,
        what: &str,
        namespace: &str,
        timeout: Duration,
        mut probe: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        let result = wait(what, timeout, || Ok(probe().map_err(|error| format!("{error:#}"))));
        result.with_context(|| self.picture(namespace))
    }

    /// Waits until a Deployment has all its pods available in their newest form.
    ///
    /// # Errors
    /// As of [`Cluster::eventually`].
    pub fn rolled_out(&self, namespace: &str, deployment: &str, timeout: Duration) -> Result<()> {
        let limit = format!("--timeout={}s", timeout.as_secs().max(1));
        let args =
            ["--namespace", namespace, "rollout", "status", &format!("deployment/{deployment}"), &limit];
        self.kubectl(&args).map(drop).with_context(|| self.picture(namespace))
    }

    /// Pods and last events of a namespace, for an error message.
    pub fn picture(&self, namespace: &str) -> String {
        let ask = |args: &[&str]| {
            let text = self.kubectl(args).unwrap_or_else(|error| error.to_string());
            let lines: Vec<_> = text.lines().collect();
            lines[lines.len().saturating_sub(30)..].join("\n")
        };
        format!(
            "pods of {namespace}:\n{}\nevents of {namespace}:\n{}",
            ask(&["--namespace", namespace, "get", "pods", "--output=wide"]),
            ask(&["--namespace", namespace, "get", "events", "--sort-by=.lastTimestamp"]),
        )
    }

    /// Asks an HTTP server behind a Service, through the API server: `path` begins with a slash.
    ///
    /// # Errors
    /// Nobody answers, or not with success.
    pub fn get(&self, namespace: &str, service: &str, port: u16, path: &str) -> Result<String> {
        self.kubectl(&[
            "get",
            "--raw",
            &format!("/api/v1/namespaces/{namespace}/services/{service}:{port}/proxy{path}"),
        ])
    }

    /// Asks the cluster's Prometheus for the value of an expression now: one `(labels, value)` for each series.
    ///
    /// # Errors
    /// Prometheus does not answer, or refuses the expression.
    pub fn query(&self, expression: &str) -> Result<Vec<(serde_json::Value, String)>> {
        let path = format!("/api/v1/query?query={}", encode(expression));
        let answer: serde_json::Value =
            serde_json::from_str(&self.get("monitoring", "prometheus", 9090, &path)?)?;
        let series = answer["data"]["result"].as_array().with_context(|| format!("no vector: {answer}"))?;
        let value = |series: &serde_json::Value| {
            (series["metric"].clone(), series["value"][1].as_str().unwrap_or_default().to_owned())
        };
        Ok(series.iter().map(value).collect())
    }

    /// Asks the cluster's Prometheus for the value of an expression at a Unix time, and gives its answer as it is.
    ///
    /// # Errors
    /// Prometheus does not answer, or refuses the expression.
    pub fn query_at(&self, expression: &str, time: f64) -> Result<serde_json::Value> {
        let path = format!("/api/v1/query?time={time}&query={}", encode(expression));
        Ok(serde_json::from_str(&self.get("monitoring", "prometheus", 9090, &path)?)?)
    }

    /// Installs the operator as a user would and waits until it is available. One that is there already is started anew, since its
    /// image may have changed under the same name.
    ///
    /// # Errors
    /// The API server refuses the manifests, or the operator does not become available within a minute.
    pub fn install_operator(&self) -> Result<()> {
        let manifests = workspace().join("manifests").display().to_string();
        let operator = ["--namespace", "synthex-system", "deployment/synthex-operator"];
        let found = self.kubectl(&[&["get"], &operator[..]].concat()).is_ok();
        self.kubectl(&["apply", "--server-side", "--force-conflicts", "--kustomize", &manifests])?;
        if found {
            self.kubectl(&[&["rollout", "restart"], &operator[..]].concat())?;
        }
        self.rolled_out("synthex-system", "synthex-operator", Duration::from_secs(60))
    }
}

/// Percent-encodes a query parameter.
fn encode(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

fn finish(args: &[&str], output: &Output) -> Result<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    if !output.status.success() {
        bail!("kubectl {}: {}: {}", args.join(" "), output.status, text(&output.stderr));
    }
    Ok(text(&output.stdout))
}

/// A namespace that is removed when this value is dropped.
#[derive(Debug)]
pub struct Namespace {
    cluster: Cluster,
    name: String,
}

impl Namespace {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs kubectl in this namespace.
    ///
    /// # Errors
    /// As of [`Cluster::kubectl`].
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.cluster.kubectl(&[&["--namespace", &self.name], args].concat())
    }

    /// Applies manifests, whose objects name no other namespace.
    ///
    /// # Errors
    /// As of [`Cluster::apply`].
    pub fn apply(&self, manifests: &str) -> Result<String> {
        let args = ["--namespace", &self.name, "apply", "--server-side", "--force-conflicts", "--filename=-"];
        self.cluster.feed(&args, manifests)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // A test that failed has said so already; what it leaves behind dies with the cluster.
        let _ = self.cluster.kubectl(&["delete", "namespace", &self.name, "--wait=false"]);
    }
}

#[cfg(test)]
mod tests {
    use super::encode;

    #[test]
    fn expressions_survive_a_query_string() {
        assert_eq!(encode("up{a=\"b c\"}"), "up%7Ba%3D%22b%20c%22%7D");
    }
}
