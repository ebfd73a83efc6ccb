//! Tells the world what was decided: status, events, and the verbs that have been answered.

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
    core::Status,
};
use serde_json::{Value, json};

use super::{Error, apply::FIELD_MANAGER, timed};
use crate::{
    api::{Decision, OptimizationRollout, RolloutStatus, What},
    decision::snapshot::Verb,
};

/// Keeps the resource until stable serves at full capacity again.
pub const FINALIZER: &str = "synthex.io/rollout";
/// Longest note that the events API takes, in bytes.
const NOTE: usize = 1024;

/// Replaces the status, if nobody has changed the object since it was read.
pub async fn write_status(
    client: &Client,
    object: &OptimizationRollout,
    status: RolloutStatus,
) -> Result<(), Error> {
    let api = Api::<OptimizationRollout>::namespaced(client.clone(), &object.namespace().unwrap_or_default());
    let mut next = object.clone();
    next.status = Some(status);
    timed("status", api.replace_status(&object.name_any(), &PostParams::default(), &next)).await?;
    Ok(())
}

/// Makes an event of a decision. The event is named by the decision's id, so that none appears twice.
pub async fn announce(
    client: &Client,
    object: &OptimizationRollout,
    decision: &Decision,
) -> Result<(), Error> {
    let namespace = object.namespace().unwrap_or_default();
    let uid = object.uid().unwrap_or_default();
    let warning = matches!(
        decision.what,
        What::AlarmRaised
            | What::OptimizationRolledBack
            | What::Aborted
            | What::VerbRefused
            | What::Warned
            | What::KpiUnreadable
            | What::RolledBack
            | What::Stalled
    );
    let event = Event {
        metadata: ObjectMeta {
            name: Some(format!(
                "{}.{}.{}",
                object.name_any(),
                uid.split('-').next().unwrap_or_default(),
                decision.id
            )),
            namespace: Some(namespace.clone()),
            ..ObjectMeta::default()
        },
        action: Some(format!("{:?}", decision.what)),
        reason: Some(format!("{:?}", decision.what)),
        note: Some(shortened(&decision.why)),
        type_: Some(if warning { "Warning" } else { "Normal" }.to_owned()),
        event_time: Some(MicroTime(decision.time.0)),
        reporting_controller: Some("synthex.io/operator".to_owned()),
        reporting_instance: Some(FIELD_MANAGER.to_owned()),
        regarding: Some(ObjectReference { resource_version: None, ..object.object_ref(&()) }),
        ..Event::default()
    };
    let api = Api::<Event>::namespaced(client.clone(), &namespace);
    match timed("event", api.create(&PostParams::default(), &event)).await {
        Err(error) if error.refusal().is_some_and(Status::is_already_exists) => Ok(()),
        other => other.map(drop),
    }
}

/// Removes the annotations of verbs that have been answered, unless the user has put others since.
pub async fn answer(client: &Client, object: &OptimizationRollout, verbs: &[Verb]) -> Result<(), Error> {
    for verb in verbs {
        let path = format!("/metadata/annotations/{}", verb.annotation().replace('/', "~1"));
        let operations = json!([
            { "op": "test", "path": path, "value": object.annotations().get(verb.annotation()) },
            { "op": "remove", "path": path },
        ]);
        // The operations are ours, and well formed.
        let Ok(operations) = serde_json::from_value(operations) else { continue };
        let api =
            Api::<OptimizationRollout>::namespaced(client.clone(), &object.namespace().unwrap_or_default());
        let patch = Patch::Json::<()>(operations);
        match timed("patch", api.patch_metadata(&object.name_any(), &PatchParams::default(), &patch)).await {
            // The test has failed: another word stands there, to be answered next.
            Err(error) if error.refusal().is_some_and(|status| status.code == 422) => {}
            other => drop(other?),
        }
    }
    Ok(())
}

/// Adds or removes our finalizer, leaving others'.
pub async fn finalizer(client: &Client, object: &OptimizationRollout, wanted: bool) -> Result<(), Error> {
    let mut finalizers = object.finalizers().to_vec();
    finalizers.retain(|finalizer| finalizer != FINALIZER);
    if wanted {
        finalizers.push(FINALIZER.to_owned());
    }
    // The version guards against a finalizer that somebody else has put or taken meanwhile.
    patch(
        client,
        object,
        json!({ "metadata": { "resourceVersion": object.resource_version(), "finalizers": finalizers } }),
    )
    .await
}

async fn patch(client: &Client, object: &OptimizationRollout, body: Value) -> Result<(), Error> {
    let api = Api::<OptimizationRollout>::namespaced(client.clone(), &object.namespace().unwrap_or_default());
    timed("patch", api.patch_metadata(&object.name_any(), &PatchParams::default(), &Patch::Merge(&body)))
        .await?;
    Ok(())
}

fn shortened(note: &str) -> String {
    if note.len() <= NOTE {
        return note.to_owned();
    }
    let end = (0..=NOTE - '…'.len_utf8()).rev().find(|&at| note.is_char_boundary(at)).unwrap_or_default();
    format!("{}…", &note[..end])
}
