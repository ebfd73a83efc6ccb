//! Tier 3, a real API server. Here: that the API server itself does what the product's tests build on.

use std::time::Duration;

use anyhow::{Result, ensure};
use synthex_cluster::Cluster;

const CRD: &str = r#"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: smokes.test.synthex.io}
spec:
  group: test.synthex.io
  scope: Namespaced
  names: {kind: Smoke, plural: smokes}
  versions:
    - name: v1
      served: true
      storage: true
      schema:
        openAPIV3Schema:
          type: object
          properties:
            spec:
              type: object
              properties: {low: {type: integer}, high: {type: integer}}
              x-kubernetes-validations:
                - {rule: "self.low <= self.high", message: "low must not be above high"}
"#;

fn smoke(low: i32) -> String {
    format!(
        "{{apiVersion: test.synthex.io/v1, kind: Smoke, metadata: {{name: smoke}}, spec: {{low: {low}, high: 5}}}}"
    )
}

#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn rules_in_a_crd_are_enforced() -> Result<()> {
    let cluster = Cluster::connect()?;
    let namespace = cluster.namespace("smoke")?;
    cluster.apply(CRD)?;
    cluster.kubectl(&[
        "wait",
        "--for=condition=Established",
        "crd/smokes.test.synthex.io",
        "--timeout=10s",
    ])?;
    let applied = cluster
        .eventually("the new kind", namespace.name(), Duration::from_secs(10), || namespace.apply(&smoke(1)));
    let refused = namespace.apply(&smoke(6));
    cluster.kubectl(&["delete", "crd", "smokes.test.synthex.io"])?;
    applied?;
    let message = refused.expect_err("the rule must refuse it").to_string();
    ensure!(message.contains("low must not be above high"), "{message}");
    Ok(())
}

#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn controllers_make_pods_of_a_deployment() -> Result<()> {
    let cluster = Cluster::connect()?;
    let namespace = cluster.namespace("smoke")?;
    namespace.kubectl(&["create", "deployment", "smoke", "--image=none:dev", "--replicas=2"])?;
    cluster.eventually("two pods", namespace.name(), Duration::from_secs(10), || {
        let pods = namespace.kubectl(&["get", "pods", "--output=name"])?;
        ensure!(pods.lines().count() == 2, "there are: {pods}");
        Ok(())
    })
}
