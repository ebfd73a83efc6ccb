//! From a variant to the bodies of its Kubernetes objects, ready for server-side apply. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::resolve::{Rollout, hash};
use crate::api::{DeletionPolicy, GROUP, Staging};

/// Label and its value that mark everything the operator owns.
pub const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "synthex-operator");
/// Label that names the rollout.
pub const ROLLOUT_LABEL: &str = "synthex.io/rollout";
/// Label that names the variant.
pub const VARIANT_LABEL: &str = "synthex.io/variant";
/// Annotation of a pod template: hash of the template, by which pods of an older one are told apart.
pub const TEMPLATE_ANNOTATION: &str = "synthex.io/template";
/// Annotation of a pod, touched so that the kubelet remounts a changed ConfigMap at once.
pub const TOUCHED_ANNOTATION: &str = "synthex.io/config";
/// Annotation of the stable Deployment: the promoted optimizations.
pub const PROMOTED_ANNOTATION: &str = "synthex.io/promoted";
/// Annotation of the stable Deployment: the optimizations that were rolled back.
pub const ROLLED_BACK_ANNOTATION: &str = "synthex.io/rolled-back";
/// Annotation of every object: hash of the body that was last applied.
pub const APPLIED_ANNOTATION: &str = "synthex.io/applied";

const MOCK_EXPERTS_PORT: i32 = 8000;

/// One configuration of the workload, deployed side by side with the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Variant {
    /// Production as the user knows it: the promoted optimizations only.
    Stable,
    /// Stable's configuration on pods of the canary's age.
    Baseline,
    /// The optimizations of this pass on.
    Canary,
    /// Baseline, apart from production.
    StagingBaseline,
    /// Canary, apart from production.
    StagingCanary,
    /// Mock experts of staging.
    StagingExperts,
    /// Load generator of staging.
    StagingLoad,
}

impl Variant {
    /// All variants.
    pub const ALL: [Self; 7] = [
        Self::Stable,
        Self::Baseline,
        Self::Canary,
        Self::StagingBaseline,
        Self::StagingCanary,
        Self::StagingExperts,
        Self::StagingLoad,
    ];
    /// The variants that carry production traffic.
    pub const PRODUCTION: [Self; 3] = [Self::Canary, Self::Baseline, Self::Stable];

    /// Value of the variant's label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Stable => "stable",
            Self::Baseline => "baseline",
            Self::Canary => "canary",
            Self::StagingBaseline => "staging-baseline",
            Self::StagingCanary => "staging-canary",
            Self::StagingExperts => "staging-experts",
            Self::StagingLoad => "staging-load",
        }
    }

    /// The variant of a label.
    pub fn from_label(label: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|variant| variant.label() == label)
    }

    /// Name of its Deployment, ConfigMap and, in staging, Service.
    pub fn object_name(self, rollout: &str) -> String {
        match self {
            Self::Stable => rollout.to_owned(),
            other => format!("{rollout}-{}", other.label()),
        }
    }

    /// Whether its pods run the runtime with a configuration.
    pub fn has_config(self) -> bool {
        !matches!(self, Self::StagingExperts | Self::StagingLoad)
    }

    /// Whether its pods carry production traffic.
    pub fn serves(self) -> bool {
        Self::PRODUCTION.contains(&self)
    }
}

/// A variant as it is wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// Which one.
    pub variant: Variant,
    /// Pods wanted now.
    pub replicas: i32,
    /// The configuration file and its hash, for variants that have one.
    pub config: Option<(String, String)>,
    /// Hash of the pod template.
    pub template: String,
    /// Bodies to apply, in this order.
    pub objects: Vec<Value>,
}

/// What a variant is rendered from.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// Which one.
    pub variant: Variant,
    /// Pods.
    pub replicas: i32,
    /// The optimizations that are on.
    pub on: BTreeSet<String>,
    /// The staging stage that runs, for staging variants.
    pub staging: Option<&'a Staging>,
    /// How often the arms have been given new pods, so that evidence starts afresh.
    pub replaced: i32,
    /// Annotations of the Deployment.
    pub annotations: BTreeMap<&'static str, String>,
}

/// What pods of a variant are recognised by: a target without its objects.
pub fn outline(rollout: &Rollout, wanted: &Wanted<'_>) -> Target {
    outlined(rollout, wanted).0
}

/// The outline and the pod template.
fn outlined(rollout: &Rollout, wanted: &Wanted<'_>) -> (Target, Value) {
    let Wanted { variant, replicas, on, staging, .. } = wanted;
    let overlay = staging.filter(|_| variant.has_config()).map(|staging| rollout.staging_overlay(staging));
    let config = variant.has_config().then(|| {
        let file = rollout.config_file(on, overlay.as_ref());
        let hash = synthex_runtime::config::hash(file.as_bytes());
        (file, hash)
    });
    let (template, hash) = pod_template(rollout, wanted);
    let target = Target { variant: *variant, replicas: *replicas, config, template: hash, objects: vec![] };
    (target, template)
}

/// Renders a variant.
pub fn render(rollout: &Rollout, wanted: &Wanted<'_>) -> Target {
    let (target, template) = outlined(rollout, wanted);
    let Target { variant, replicas, .. } = target;
    let mut objects = vec![];
    if let Some((file, _)) = &target.config {
        objects.push(config_map(rollout, variant, file));
    }
    objects.push(deployment(rollout, wanted, replicas, template));
    match variant {
        Variant::Stable => objects.push(service(rollout, variant, rollout.port, "http")),
        Variant::StagingBaseline | Variant::StagingCanary => {
            objects.push(service(rollout, variant, i32::from(rollout.serving_port), "http"));
        }
        Variant::StagingExperts => objects.push(service(rollout, variant, MOCK_EXPERTS_PORT, "http")),
        Variant::Baseline | Variant::Canary | Variant::StagingLoad => {}
    }
    Target { objects: objects.into_iter().map(sealed).collect(), ..target }
}

/// Hash of all that is compared: the configurations of both arms and the pod template, without what gives them new pods.
pub fn subject(rollout: &Rollout, canary: &Wanted<'_>, baseline: &Wanted<'_>) -> String {
    let part = |wanted: &Wanted<'_>| {
        let first = Wanted { replaced: 0, replicas: 0, ..wanted.clone() };
        let target = outline(rollout, &first);
        format!("{}\n{}", target.template, target.config.map(|(_, hash)| hash).unwrap_or_default())
    };
    hash(&format!("{}\n{}", part(canary), part(baseline)))
}

fn labels(rollout: &Rollout, variant: Variant) -> Value {
    json!({
        MANAGED_BY.0: MANAGED_BY.1,
        ROLLOUT_LABEL: rollout.name,
        VARIANT_LABEL: variant.label(),
    })
}

fn metadata(rollout: &Rollout, variant: Variant) -> Value {
    let mut metadata = json!({
        "name": variant.object_name(&rollout.name),
        "namespace": rollout.namespace,
        "labels": labels(rollout, variant),
    });
    // What is to outlive the rollout must not be collected with it.
    if variant != Variant::Stable || rollout.deletion_policy == DeletionPolicy::Delete {
        metadata["ownerReferences"] = json!([{
            "apiVersion": format!("{GROUP}/v1alpha1"),
            "kind": "OptimizationRollout",
            "name": rollout.name,
            "uid": rollout.uid,
            "controller": true,
            "blockOwnerDeletion": true,
        }]);
    }
    metadata
}

/// Writes the hash of a body into it, so that an unchanged body need not be sent again.
fn sealed(mut body: Value) -> Value {
    let hash = hash(&body.to_string());
    body["metadata"]["annotations"][APPLIED_ANNOTATION] = json!(hash);
    body
}

fn config_map(rollout: &Rollout, variant: Variant, file: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(rollout, variant),
        "data": { "config.yaml": file },
    })
}

fn service(rollout: &Rollout, variant: Variant, port: i32, target: &str) -> Value {
    let selector = if variant == Variant::Stable {
        json!({ ROLLOUT_LABEL: rollout.name, "synthex.io/track": "production" })
    } else {
        json!({ ROLLOUT_LABEL: rollout.name, VARIANT_LABEL: variant.label() })
    };
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(rollout, variant),
        "spec": {
            "selector": selector,
            "ports": [{ "name": "http", "port": port, "targetPort": target, "protocol": "TCP" }],
        },
    })
}

fn deployment(rollout: &Rollout, wanted: &Wanted<'_>, replicas: i32, template: Value) -> Value {
    let mut metadata = metadata(rollout, wanted.variant);
    if !wanted.annotations.is_empty() {
        metadata["annotations"] = json!(wanted.annotations);
    }
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": 2,
            "selector": { "matchLabels": { ROLLOUT_LABEL: rollout.name, VARIANT_LABEL: wanted.variant.label() } },
            // Additions come before removals.
            "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": "25%", "maxUnavailable": 0 } },
            "template": template,
        },
    })
}

/// The pod template and its hash, which it also carries.
fn pod_template(rollout: &Rollout, wanted: &Wanted<'_>) -> (Value, String) {
    let variant = wanted.variant;
    let mut labels = labels(rollout, variant);
    if variant.serves() {
        labels["synthex.io/track"] = json!("production");
    }
    let mut template = json!({
        "metadata": { "labels": labels, "annotations": {} },
        "spec": {
            "automountServiceAccountToken": false,
            // Longer than the runtime's own drain (5 s of serving on, 25 s for the last requests).
            "terminationGracePeriodSeconds": 40,
            "securityContext": { "runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [container(rollout, wanted)],
        },
    });
    if variant.has_config() {
        template["metadata"]["annotations"] = json!({
            "prometheus.io/scrape": "true",
            "prometheus.io/port": rollout.admin_port.to_string(),
            "prometheus.io/path": "/metrics",
        });
        template["spec"]["volumes"] =
            json!([{ "name": "config", "configMap": { "name": variant.object_name(&rollout.name) } }]);
        if wanted.replaced > 0 {
            template["metadata"]["annotations"]["synthex.io/replaced"] = json!(wanted.replaced.to_string());
        }
        json_patch::merge(&mut template, &Value::Object(rollout.pod_template.clone()));
    }
    let hash = hash(&template.to_string());
    template["metadata"]["annotations"][TEMPLATE_ANNOTATION] = json!(hash);
    (template, hash)
}

fn container(rollout: &Rollout, wanted: &Wanted<'_>) -> Value {
    let mut container = json!({
        "name": "runtime",
        "image": rollout.image,
        "imagePullPolicy": "IfNotPresent",
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"] },
        },
    });
    let load = wanted.staging.map(|staging| staging.load.clone()).unwrap_or_default();
    match wanted.variant {
        Variant::StagingExperts => {
            container["name"] = json!("experts");
            container["command"] = json!(["/usr/local/bin/synthex-load"]);
            container["args"] = json!([
                "experts",
                "--listen",
                format!("0.0.0.0:{MOCK_EXPERTS_PORT}"),
                "--latency",
                load.expert_latency.to_string(),
            ]);
            container["ports"] = json!([{ "name": "http", "containerPort": MOCK_EXPERTS_PORT }]);
            container["readinessProbe"] = probe("/livez", "http", 2);
        }
        Variant::StagingLoad => {
            let target =
                |arm: Variant| format!("http://{}:{}", arm.object_name(&rollout.name), rollout.serving_port);
            container["name"] = json!("load");
            container["command"] = json!(["/usr/local/bin/synthex-load"]);
            container["args"] = json!([
                "run",
                "--target",
                target(Variant::StagingBaseline),
                "--target",
                target(Variant::StagingCanary),
                "--rate",
                load.requests_per_second.to_string(),
                // Connections of their own, so that every pod gets its share.
                "--connection",
                "fresh",
                // Each query its own, so that caches fill, as they do in production.
                "--distinct",
                "0",
            ]);
        }
        _ => {
            container["args"] = json!(["--config", "/etc/synthex/config.yaml"]);
            container["ports"] = json!([
                { "name": "http", "containerPort": rollout.serving_port },
                { "name": "admin", "containerPort": rollout.admin_port },
            ]);
            container["readinessProbe"] = probe("/readyz", "admin", 1);
            container["livenessProbe"] = probe("/livez", "admin", 10);
            // The directory, never a subPath, which would not follow the ConfigMap.
            container["volumeMounts"] =
                json!([{ "name": "config", "mountPath": "/etc/synthex", "readOnly": true }]);
            if !rollout.resources.is_null() {
                container["resources"] = rollout.resources.clone();
            }
        }
    }
    container
}

fn probe(path: &str, port: &str, period: i32) -> Value {
    json!({ "httpGet": { "path": path, "port": port }, "periodSeconds": period, "timeoutSeconds": 2, "failureThreshold": 3 })
}
