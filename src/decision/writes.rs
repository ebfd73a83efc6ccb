//! From a plan to the writes that make the world so, in their order. Pure: the shell sends them, the simulated worlds play them,
//! both the same list.

use std::collections::BTreeMap;

use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

use super::{
    machine::Plan,
    render::{APPLIED_ANNOTATION, Target, Variant},
    snapshot::Snapshot,
};

/// Objects by kind and name, as they were found.
pub type Objects = BTreeMap<(String, String), Value>;

/// Seconds for which a pod that was touched has time to take its configuration.
const TOUCH_EVERY: i64 = 5;

/// One write to the API server.
#[derive(Clone, Debug, PartialEq)]
pub enum Write<'a> {
    /// Server-side apply of a body.
    Apply(&'a Value),
    /// Replicas of a Deployment, and nothing else of it.
    Scale {
        /// Name.
        deployment: String,
        /// Its replicas.
        replicas: i32,
    },
    /// A new value of a pod's annotation, so that the kubelet remounts the pod's configuration at once (0.2 s instead of up to a
    /// minute).
    Touch {
        /// Name of the pod.
        pod: &'a str,
        /// A value that is another every five seconds: the same once more is no change, and no event that would have us
        /// look and touch again.
        value: String,
    },
    /// Deletion of an object and, in the background, of what it owns.
    Delete {
        /// Kind: Deployment, Service or ConfigMap.
        kind: &'static str,
        /// Name.
        name: String,
    },
}

/// The objects that a plan would create, by kind and name.
pub fn creates(objects: &Objects, plan: &Plan) -> Vec<(String, String)> {
    plan.targets
        .iter()
        .flat_map(|target| &target.objects)
        .map(key)
        .filter(|key| !objects.contains_key(key))
        .collect()
}

/// The writes of a plan for the rollout of this name: configurations first, since a switch that does harm must be off at once,
/// then pods, then removals. What already is as wanted is not written.
pub fn writes<'a>(
    rollout: &str,
    snapshot: &'a Snapshot,
    objects: &Objects,
    plan: &'a Plan,
    now: Timestamp,
) -> Vec<Write<'a>> {
    let missing = |body: &Value| !objects.get(&key(body)).is_some_and(|seen| stands(seen, body));
    let mut writes = vec![];
    let deployment = Variant::Stable.object_name(rollout);
    writes.extend(plan.scale.map(|replicas| Write::Scale { deployment, replicas }));
    for target in &plan.targets {
        let before = writes.len();
        writes.extend(of_kind(target, "ConfigMap").filter(|body| missing(body)).map(Write::Apply));
        let rewritten = writes.len() > before;
        touch(&mut writes, snapshot, target, rewritten, now);
    }
    for kind in ["Service", "Deployment"] {
        let bodies = plan.targets.iter().flat_map(|target| of_kind(target, kind));
        writes.extend(bodies.filter(|body| missing(body)).map(Write::Apply));
    }
    writes.extend(removals(rollout, objects, &plan.remove));
    writes
}

/// The deletions that remove these variants of the rollout of this name.
pub fn removals<'a>(rollout: &str, objects: &Objects, variants: &[Variant]) -> Vec<Write<'a>> {
    let names = variants.iter().map(|variant| variant.object_name(rollout));
    names
        .flat_map(|name| {
            ["Deployment", "Service", "ConfigMap"]
                .into_iter()
                .filter(|kind| objects.contains_key(&((*kind).to_owned(), name.clone())))
                .map(|kind| Write::Delete { kind, name: name.clone() })
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Touches the pods that do not have the configuration in force yet.
fn touch<'a>(
    writes: &mut Vec<Write<'a>>,
    snapshot: &'a Snapshot,
    target: &Target,
    rewritten: bool,
    now: Timestamp,
) {
    let (Some((_, hash)), Some(seen)) = (&target.config, snapshot.variants.get(&target.variant)) else {
        return;
    };
    let behind = seen.pods.iter().filter(|pod| {
        !pod.terminating && (rewritten || pod.config.as_ref().is_some_and(|config| config != hash))
    });
    let value = format!("{hash}-{}", now.as_second() / TOUCH_EVERY);
    writes.extend(behind.map(|pod| Write::Touch { pod: &pod.name, value: value.clone() }));
}

fn of_kind<'a>(target: &'a Target, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    target.objects.iter().filter(move |body| body["kind"] == kind)
}

/// Kind and name of a body.
pub fn key(body: &Value) -> (String, String) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    (text(&body["kind"]), text(&body["metadata"]["name"]))
}

/// Whether an object is what was last applied, and nobody has changed what we set. The hash tells of fields that we no longer
/// set, the comparison of those that somebody else has set.
fn stands(seen: &Value, body: &Value) -> bool {
    let hash = |object: &Value| object["metadata"]["annotations"][APPLIED_ANNOTATION].clone();
    hash(seen) == hash(body) && covers(seen, body, true)
}

/// Whether `seen` holds everything that `body` sets. Quantities may be written in another form, so containers' resources are
/// left to the hash.
fn covers(seen: &Value, body: &Value, top: bool) -> bool {
    match (seen, body) {
        (Value::Object(seen), Value::Object(body)) => body.iter().all(|(name, wanted)| {
            (top && matches!(name.as_str(), "apiVersion" | "kind"))
                || name == "resources"
                || seen.get(name).is_some_and(|seen| covers(seen, wanted, false))
                || is_empty(wanted)
        }),
        (Value::Array(seen), Value::Array(body)) => {
            seen.len() == body.len() && seen.iter().zip(body).all(|(s, b)| covers(s, b, false))
        }
        (seen, body) => seen == body,
    }
}

/// The API server drops empty maps and lists, and reads false and zero as unset.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Bool(is) => !is,
        Value::Null => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_object_stands_until_somebody_changes_what_we_set() {
        let body = json!({"kind": "Deployment", "metadata": {"name": "a", "annotations": {APPLIED_ANNOTATION: "h"}}, "spec": {"replicas": 2, "list": [{"x": 1}], "off": false}});
        let seen = json!({"metadata": {"name": "a", "uid": "u", "annotations": {APPLIED_ANNOTATION: "h", "other": "y"}}, "spec": {"replicas": 2, "extra": 1, "list": [{"x": 1, "y": 2}]}});
        assert!(stands(&seen, &body));
        for (pointer, value) in [
            ("/spec/replicas", json!(3)),
            ("/spec/list", json!([])),
            ("/spec/list/0/x", json!(2)),
            ("/metadata/annotations", json!({APPLIED_ANNOTATION: "older"})),
        ] {
            let mut changed = seen.clone();
            *changed.pointer_mut(pointer).unwrap() = value;
            assert!(!stands(&changed, &body), "{pointer}");
        }
    }
}
