//! Tier 4, a real node. Here: that the node itself does what the product's tests build on.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, ensure};
use synthex_cluster::{Cluster, Namespace};

const PATIENCE: Duration = Duration::from_secs(30);

/// Three pods of the probe behind a Service, with a ConfigMap mounted and scraping asked for, under `restricted` pod security.
const PROBE: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: probe}
data: {text: one}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: probe}
spec:
  replicas: 3
  selector: {matchLabels: {app: probe}}
  template:
    metadata:
      labels: {app: probe}
      annotations: {prometheus.io/scrape: "true", prometheus.io/port: "8080", prometheus.io/path: /metrics}
    spec:
      securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
      containers:
        - name: probe
          image: synthex-probe:dev
          readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
          securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
          volumeMounts: [{name: config, mountPath: /config}]
      volumes: [{name: config, configMap: {name: probe}}]
---
apiVersion: v1
kind: Service
metadata: {name: probe}
spec:
  selector: {app: probe}
  ports: [{port: 80, targetPort: 8080}]
"#;

fn probes(cluster: &Cluster) -> Result<Namespace> {
    let namespace = cluster.namespace("smoke")?;
    namespace.kubectl(&[
        "label",
        "namespace",
        namespace.name(),
        "pod-security.kubernetes.io/enforce=restricted",
    ])?;
    namespace.apply(PROBE)?;
    cluster.rolled_out(namespace.name(), "probe", PATIENCE)?;
    Ok(namespace)
}

fn pods(namespace: &Namespace) -> Result<BTreeSet<String>> {
    let names = namespace.kubectl(&["get", "pods", "--output=jsonpath={.items[*].metadata.name}"])?;
    Ok(names.split(' ').map(str::to_owned).collect())
}

/// What a pod sees at `path` of its own server.
fn within(cluster: &Cluster, namespace: &Namespace, pod: &str, path: &str) -> Result<String> {
    cluster.kubectl(&[
        "get",
        "--raw",
        &format!("/api/v1/namespaces/{}/pods/{pod}:8080/proxy{path}", namespace.name()),
    ])
}

#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn names_resolve_in_pods_and_services_balance() -> Result<()> {
    let cluster = Cluster::connect()?;
    let namespace = probes(&cluster)?;
    let all = pods(&namespace)?;
    ensure!(all.len() == 3, "{all:?}");
    let client = &all.iter().collect::<Vec<_>>()[0];
    for host in ["probe", &format!("probe.{}.svc.cluster.local", namespace.name())] {
        let mut seen = BTreeSet::new();
        cluster.eventually("an answer from each pod", namespace.name(), PATIENCE, || {
            seen.insert(within(&cluster, &namespace, client, &format!("/get/{host}:80/"))?);
            ensure!(seen == all, "so far: {seen:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn a_changed_config_map_reaches_touched_pods_soon() -> Result<()> {
    let cluster = Cluster::connect()?;
    let namespace = probes(&cluster)?;
    namespace.kubectl(&["patch", "configmap", "probe", "--patch={\"data\":{\"text\":\"two\"}}"])?;
    namespace.kubectl(&["annotate", "pods", "--all", "synthex.io/touched=now"])?;
    // The kubelet's own round takes up to a minute; a touched pod is looked at at once.
    for pod in pods(&namespace)? {
        cluster.eventually("the new text", namespace.name(), Duration::from_secs(10), || {
            let text = within(&cluster, &namespace, &pod, "/file/config/text")?;
            ensure!(text == "two", "{pod} has {text:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn prometheus_scrapes_annotated_pods() -> Result<()> {
    let cluster = Cluster::connect()?;
    let namespace = probes(&cluster)?;
    let all = pods(&namespace)?;
    cluster.eventually("a series of each pod", namespace.name(), PATIENCE, || {
        let series = cluster.query(&format!("probe_up{{namespace={:?}}} == 1", namespace.name()))?;
        let scraped: BTreeSet<_> =
            series.iter().filter_map(|(labels, _)| labels["pod"].as_str().map(str::to_owned)).collect();
        ensure!(scraped == all, "so far: {series:?}");
        Ok(())
    })
}
