//! Makes the world as a plan wants it: server-side apply, touches and deletions. Idempotent; decides nothing.

use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        core::v1::{ConfigMap, Pod, Service},
    },
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PropagationPolicy},
};
use serde_json::{Value, json};

use super::{Error, observe::World, timed};
use crate::decision::{
    machine::Plan,
    render::{APPLIED_ANNOTATION, TOUCHED_ANNOTATION, Target, Variant},
    resolve::Rollout,
    snapshot::Observed,
};

/// Owner of the fields that the operator writes.
pub const FIELD_MANAGER: &str = "synthex-operator";

/// The objects that a plan would create, by kind and name.
pub fn creates(world: &World, plan: &Plan) -> Vec<(String, String)> {
    plan.targets
        .iter()
        .flat_map(|target| &target.objects)
        .map(key)
        .filter(|key| !world.objects.contains_key(key))
        .collect()
}

/// Applies a plan: configurations first, since a switch that does harm must be off at once, then pods, then removals.
pub async fn apply(
    client: &Client,
    rollout: &Rollout,
    world: &World,
    plan: &Plan,
    now: Timestamp,
) -> Result<(), Error> {
    let namespace = &rollout.namespace;
    for target in &plan.targets {
        let mut rewritten = false;
        for body in of_kind(target, "ConfigMap") {
            rewritten |= apply_one(client, namespace, world, body).await?;
        }
        if let (Some((_, hash)), Some(seen)) = (&target.config, world.snapshot.variants.get(&target.variant))
        {
            touch(client, namespace, seen, hash, rewritten, now).await?;
        }
    }
    for kind in ["Service", "Deployment"] {
        for body in plan.targets.iter().flat_map(|target| of_kind(target, kind)) {
            apply_one(client, namespace, world, body).await?;
        }
    }
    for variant in &plan.remove {
        remove(client, namespace, world, &variant.object_name(&rollout.name)).await?;
    }
    Ok(())
}

/// Removes the stable objects too: nothing of the rollout stays.
pub async fn remove_all(client: &Client, rollout: &Rollout, world: &World) -> Result<(), Error> {
    for variant in Variant::ALL {
        remove(client, &rollout.namespace, world, &variant.object_name(&rollout.name)).await?;
    }
    Ok(())
}

fn of_kind<'a>(target: &'a Target, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    target.objects.iter().filter(move |body| body["kind"] == kind)
}

fn key(body: &Value) -> (String, String) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    (text(&body["kind"]), text(&body["metadata"]["name"]))
}

/// Applies a body unless it was applied before and still stands. Returns whether anything was sent.
async fn apply_one(client: &Client, namespace: &str, world: &World, body: &Value) -> Result<bool, Error> {
    let (kind, name) = key(body);
    if world.objects.get(&(kind.clone(), name.clone())).is_some_and(|seen| stands(seen, body)) {
        return Ok(false);
    }
    let resource = match kind.as_str() {
        "Deployment" => ApiResource::erase::<Deployment>(&()),
        "ConfigMap" => ApiResource::erase::<ConfigMap>(&()),
        _ => ApiResource::erase::<Service>(&()),
    };
    let api = Api::<DynamicObject>::namespaced_with(client.clone(), namespace, &resource);
    timed("apply", api.patch(&name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(body))).await?;
    tracing::debug!(kind, name, "applied");
    Ok(true)
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

/// Touches the pods that do not have the configuration in force yet, so that the kubelet remounts it at once (0.2 s instead of
/// up to a minute).
async fn touch(
    client: &Client,
    namespace: &str,
    seen: &Observed,
    hash: &str,
    rewritten: bool,
    now: Timestamp,
) -> Result<(), Error> {
    let api = Api::<Pod>::namespaced(client.clone(), namespace);
    let behind = seen.pods.iter().filter(|pod| {
        !pod.terminating && (rewritten || pod.config.as_ref().is_some_and(|config| config != hash))
    });
    // A value that was there before would be no change, and so no event for the kubelet.
    let body = json!({ "metadata": { "annotations": { TOUCHED_ANNOTATION: format!("{hash}-{}", now.as_millisecond()) } } });
    for pod in behind {
        let patched =
            timed("patch", api.patch_metadata(&pod.name, &PatchParams::default(), &Patch::Merge(&body)))
                .await;
        gone_is_fine(patched.map(drop))?;
    }
    Ok(())
}

async fn remove(client: &Client, namespace: &str, world: &World, name: &str) -> Result<(), Error> {
    let there = |kind: &str| world.objects.contains_key(&(kind.to_owned(), name.to_owned()));
    let how =
        DeleteParams { propagation_policy: Some(PropagationPolicy::Background), ..DeleteParams::default() };
    if there("Deployment") {
        let api = Api::<Deployment>::namespaced(client.clone(), namespace);
        gone_is_fine(timed("delete", api.delete(name, &how)).await.map(drop))?;
    }
    if there("Service") {
        let api = Api::<Service>::namespaced(client.clone(), namespace);
        gone_is_fine(timed("delete", api.delete(name, &how)).await.map(drop))?;
    }
    if there("ConfigMap") {
        let api = Api::<ConfigMap>::namespaced(client.clone(), namespace);
        gone_is_fine(timed("delete", api.delete(name, &how)).await.map(drop))?;
    }
    Ok(())
}

fn gone_is_fine(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(Error::Kubernetes { source, .. }) if matches!(&*source, kube::Error::Api(status) if status.is_not_found()) => {
            Ok(())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
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
