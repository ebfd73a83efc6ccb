//! Makes the world as a plan wants it: server-side apply, touches and deletions. Idempotent; decides nothing.

use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Pod, Service},
};
use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PropagationPolicy},
    core::Status,
};
use serde_json::{Value, json};

use super::{Error, timed};
use crate::decision::{
    render::TOUCHED_ANNOTATION,
    writes::{self, Write},
};

/// Owner of the fields that the operator writes.
pub const FIELD_MANAGER: &str = "synthex-operator";

/// Sends writes, in their order. One that the API server refuses does not keep the others back, each of which is safe by itself; only
/// pods are not touched then, since what they are to take may not be there.
///
/// # Errors
/// The first refusal, once all have been tried. Any other error ends it at once.
pub async fn apply(client: &Client, namespace: &str, writes: &[Write<'_>]) -> Result<(), Error> {
    let mut refused = Ok(());
    for write in writes {
        if refused.is_err() && matches!(write, Write::Touch { .. }) {
            continue;
        }
        let written = match write {
            Write::Apply(body) => apply_one(client, namespace, body).await,
            Write::Scale { deployment, replicas } => scale(client, namespace, deployment, *replicas).await,
            Write::Touch { pod, value } => touch(client, namespace, pod, value).await,
            Write::Delete { kind, name } => delete(client, namespace, kind, name).await,
        };
        match written {
            Err(error) if error.refused().is_some() => refused = refused.and(Err(error)),
            Err(error) => return refused.and(Err(error)),
            Ok(()) => {}
        }
    }
    refused
}

async fn apply_one(client: &Client, namespace: &str, body: &Value) -> Result<(), Error> {
    let (kind, name) = writes::key(body);
    let api = api(client, namespace, &kind);
    timed("apply", api.patch(&name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(body))).await?;
    tracing::debug!(kind, name, "applied");
    Ok(())
}

async fn scale(client: &Client, namespace: &str, deployment: &str, replicas: i32) -> Result<(), Error> {
    let body = json!({ "spec": { "replicas": replicas } });
    let how = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    let api = Api::<Deployment>::namespaced(client.clone(), namespace);
    let patched = timed("patch", api.patch_metadata(deployment, &how, &Patch::Merge(&body))).await;
    gone_is_fine(patched.map(drop))
}

async fn touch(client: &Client, namespace: &str, pod: &str, value: &str) -> Result<(), Error> {
    let api = Api::<Pod>::namespaced(client.clone(), namespace);
    let body = json!({ "metadata": { "annotations": { TOUCHED_ANNOTATION: value } } });
    let patched =
        timed("patch", api.patch_metadata(pod, &PatchParams::default(), &Patch::Merge(&body))).await;
    gone_is_fine(patched.map(drop))
}

async fn delete(client: &Client, namespace: &str, kind: &str, name: &str) -> Result<(), Error> {
    let how =
        DeleteParams { propagation_policy: Some(PropagationPolicy::Background), ..DeleteParams::default() };
    gone_is_fine(timed("delete", api(client, namespace, kind).delete(name, &how)).await.map(drop))
}

fn api(client: &Client, namespace: &str, kind: &str) -> Api<DynamicObject> {
    let resource = match kind {
        "Deployment" => ApiResource::erase::<Deployment>(&()),
        "ConfigMap" => ApiResource::erase::<ConfigMap>(&()),
        _ => ApiResource::erase::<Service>(&()),
    };
    Api::namespaced_with(client.clone(), namespace, &resource)
}

fn gone_is_fine(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(error) if error.refusal().is_some_and(Status::is_not_found) => Ok(()),
        other => other,
    }
}
