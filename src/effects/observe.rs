//! Reads the world: Kubernetes objects and the configuration that the runtime's pods have in force. Reads only.

use std::time::Duration;

use futures::{StreamExt, stream};
use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        core::v1::{ConfigMap, ContainerStatus, Pod, Service},
    },
    serde::de::DeserializeOwned,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ListParams, PartialObjectMeta},
};
use serde::{Deserialize, Serialize};

use super::{Error, timed};
use crate::{
    api::OptimizationRollout,
    decision::{
        render::{
            MANAGED_BY, PROMOTED_ANNOTATION, ROLLED_BACK_ANNOTATION, ROLLOUT_LABEL, TEMPLATE_ANNOTATION,
            VARIANT_LABEL, Variant,
        },
        snapshot::{self, Observed, Snapshot, Verb},
        writes::Objects,
    },
};

/// Pods asked for their configuration at the same time.
const ASKED_AT_ONCE: usize = 16;
/// How long a pod may take to tell its configuration.
const POD_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest answer that is read from a pod, in bytes.
const POD_ANSWER: usize = 64 * 1024;

/// What was read, in two forms: for decisions, and raw for comparing with what is to be applied.
#[derive(Debug, Default)]
pub struct World {
    /// For decisions.
    pub snapshot: Snapshot,
    /// Deployments, ConfigMaps and Services of the rollout, by kind and name.
    pub objects: Objects,
}

/// Reads everything that concerns a rollout. With `admin_port`, the pods are asked for the configuration in force.
pub async fn observe(
    client: &Client,
    http: &reqwest::Client,
    object: &OptimizationRollout,
    admin_port: Option<u16>,
) -> Result<World, Error> {
    let namespace = object.namespace().unwrap_or_default();
    let selector = format!("{}={},{ROLLOUT_LABEL}={}", MANAGED_BY.0, MANAGED_BY.1, object.name_any());
    let (deployments, config_maps, services, pods) = futures::try_join!(
        list::<Deployment>(client, &namespace, &selector),
        list::<ConfigMap>(client, &namespace, &selector),
        list::<Service>(client, &namespace, &selector),
        list::<Pod>(client, &namespace, &selector),
    )?;
    let mut world = World::default();
    world.snapshot.status = object.status.clone().unwrap_or_default();
    world.snapshot.verbs =
        object.annotations().iter().filter_map(|(key, value)| Verb::parse(key, value)).collect();
    world.snapshot.deleting_since = object.metadata.deletion_timestamp.as_ref().map(|time| time.0);
    for deployment in &deployments {
        let Some(variant) = variant(deployment) else { continue };
        let names = |key: &str| {
            let text = deployment.annotations().get(key).map(String::as_str).unwrap_or_default();
            text.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
        };
        let seen = world.snapshot.variants.entry(variant).or_default();
        seen.replicas = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
        seen.verdicts = (names(PROMOTED_ANNOTATION), names(ROLLED_BACK_ANNOTATION));
    }
    keep(&mut world.objects, deployments);
    keep(&mut world.objects, config_maps);
    keep(&mut world.objects, services);
    let mut questions = vec![];
    for pod in pods.iter().filter(|pod| !ended(pod)) {
        let Some(variant) = variant(pod) else { continue };
        questions.push(async move {
            let config = match admin_port {
                Some(port) if variant.has_config() => config_in_force(http, pod, port).await,
                _ => None,
            };
            (variant, seen(pod, config))
        });
    }
    let answers: Vec<_> = stream::iter(questions).buffered(ASKED_AT_ONCE).collect().await;
    for (variant, pod) in answers {
        // Pods may outlive their Deployment for a moment; the variant exists as long as either does.
        world.snapshot.variants.entry(variant).or_insert_with(Observed::default).pods.push(pod);
    }
    Ok(world)
}

/// The objects among `wanted` (kind, name) that exist but are not this rollout's.
pub async fn foreign(
    client: &Client,
    namespace: &str,
    wanted: &[(String, String)],
) -> Result<Vec<String>, Error> {
    let mut found = vec![];
    for (kind, name) in wanted {
        let exists = match kind.as_str() {
            "Deployment" => exists::<Deployment>(client, namespace, name).await?,
            "ConfigMap" => exists::<ConfigMap>(client, namespace, name).await?,
            _ => exists::<Service>(client, namespace, name).await?,
        };
        if exists {
            found.push(format!("{kind} {name}"));
        }
    }
    Ok(found)
}

async fn exists<K>(client: &Client, namespace: &str, name: &str) -> Result<bool, Error>
where
    K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned,
{
    let api = Api::<PartialObjectMeta<K>>::namespaced(client.clone(), namespace);
    Ok(timed("get", api.get_opt(name)).await?.is_some())
}

async fn list<K>(client: &Client, namespace: &str, selector: &str) -> Result<Vec<K>, Error>
where
    K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned,
{
    let api = Api::<K>::namespaced(client.clone(), namespace);
    Ok(timed("list", api.list(&ListParams::default().labels(selector))).await?.items)
}

fn keep<K: Resource<DynamicType = ()> + Serialize>(objects: &mut Objects, found: Vec<K>) {
    for object in found {
        let key = (K::kind(&()).into_owned(), object.name_any());
        // A typed object that cannot be written as JSON does not exist; were there one, it would only be applied again.
        objects.insert(key, serde_json::to_value(object).unwrap_or_default());
    }
}

fn variant<K: ResourceExt>(object: &K) -> Option<Variant> {
    object.labels().get(VARIANT_LABEL).and_then(|label| Variant::from_label(label))
}

/// Evicted and completed pods are records, not pods that serve.
fn ended(pod: &Pod) -> bool {
    matches!(pod.status.as_ref().and_then(|status| status.phase.as_deref()), Some("Failed" | "Succeeded"))
}

fn seen(pod: &Pod, config: Option<String>) -> snapshot::Pod {
    let status = pod.status.clone().unwrap_or_default();
    let conditions = status.conditions.unwrap_or_default();
    let condition = |kind: &str| conditions.iter().find(|condition| condition.type_ == kind);
    let ready = condition("Ready");
    let is_ready = ready.is_some_and(|condition| condition.status == "True");
    let containers = status.container_statuses.unwrap_or_default();
    // On a node that is gone the Ready condition falls, but nobody is left to write the container's: that is no signal. Nor is a
    // container that has never run, since its image is pulled or its node has no room: time counts from its start.
    let running = |container: &ContainerStatus| {
        let running = container.state.as_ref().and_then(|state| state.running.as_ref());
        running.and_then(|running| running.started_at.clone())
    };
    let ran = |container: &&ContainerStatus| {
        !container.ready && (container.restart_count > 0 || running(container).is_some())
    };
    let since = ready
        .filter(|condition| condition.status == "False")
        .zip(containers.iter().find(ran))
        .and_then(|(condition, container)| {
            let first_start = running(container).filter(|_| container.restart_count == 0);
            condition.last_transition_time.clone().max(first_start)
        });
    let oom = |container: &ContainerStatus| {
        [&container.state, &container.last_state].into_iter().flatten().any(|state| {
            state.terminated.as_ref().is_some_and(|ended| ended.reason.as_deref() == Some("OOMKilled"))
        })
    };
    snapshot::Pod {
        name: pod.name_any(),
        ready: is_ready,
        not_ready_since: since.map(|time| time.0),
        // A pod that is being evicted is on its way out by nobody's fault.
        terminating: pod.metadata.deletion_timestamp.is_some()
            || condition("DisruptionTarget").is_some_and(|c| c.status == "True"),
        template: pod.annotations().get(TEMPLATE_ANNOTATION).cloned().unwrap_or_default(),
        config,
        restarts: containers.iter().map(|container| container.restart_count).sum(),
        oom_killed: containers.iter().any(oom),
    }
}

/// Asks a pod for the hash of the configuration that it has in force.
async fn config_in_force(http: &reqwest::Client, pod: &Pod, port: u16) -> Option<String> {
    #[derive(Deserialize)]
    struct Answer {
        hash: String,
    }
    let ip: std::net::IpAddr = pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()?;
    let url = format!("http://{}/config", std::net::SocketAddr::new(ip, port));
    let read = async {
        let mut response = http.get(url).send().await.ok()?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.ok()? {
            body.extend_from_slice(&chunk);
            if body.len() > POD_ANSWER {
                return None;
            }
        }
        serde_json::from_slice::<Answer>(&body).ok()
    };
    tokio::time::timeout(POD_TIMEOUT, read).await.ok()?.map(|answer| answer.hash)
}
