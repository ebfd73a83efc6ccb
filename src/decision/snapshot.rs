//! Everything that was observed, in the terms in which decisions are taken. Pure data and questions about it.

use std::{collections::BTreeMap, fmt};

use k8s_openapi::jiff::Timestamp;

use super::render::{Target, Variant};
use crate::api::RolloutStatus;

/// The state of the world at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Status as it stands in the API server.
    pub status: RolloutStatus,
    /// What the user asks for by annotation.
    pub verbs: Vec<Verb>,
    /// Since when the resource is being deleted.
    pub deleting_since: Option<Timestamp>,
    /// What the API server says against the last writes, where it has refused one.
    pub refused: Option<String>,
    /// The variants that exist.
    pub variants: BTreeMap<Variant, Observed>,
}

/// A user's word, put as the annotation `synthex.io/<verb>=<value>`. In order of precedence.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verb {
    /// `abort=<stage>`: ends the pass, every optimization of it off.
    Abort(String),
    /// `rollback=<optimization>`.
    Rollback(String),
    /// `retry=<optimization>`: one that was rolled back has a pass of its own.
    Retry(String),
    /// `promote=<stage>` or `promote=force:<stage>`.
    Promote(String),
}

impl Verb {
    /// The verb and its argument in an annotation.
    pub fn parse(annotation: &str, value: &str) -> Option<Self> {
        let value = value.trim().to_owned();
        match annotation {
            "synthex.io/abort" => Some(Self::Abort(value)),
            "synthex.io/rollback" => Some(Self::Rollback(value)),
            "synthex.io/retry" => Some(Self::Retry(value)),
            "synthex.io/promote" => Some(Self::Promote(value)),
            _ => None,
        }
    }

    /// Name of the annotation.
    pub fn annotation(&self) -> &'static str {
        match self {
            Self::Abort(_) => "synthex.io/abort",
            Self::Rollback(_) => "synthex.io/rollback",
            Self::Retry(_) => "synthex.io/retry",
            Self::Promote(_) => "synthex.io/promote",
        }
    }
}

impl fmt::Display for Verb {
    /// As it is put: `abort=canary`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Abort(value) => write!(f, "abort={value}"),
            Self::Rollback(value) => write!(f, "rollback={value}"),
            Self::Retry(value) => write!(f, "retry={value}"),
            Self::Promote(value) => write!(f, "promote={value}"),
        }
    }
}

/// One variant as it was found.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// `spec.replicas` of its Deployment.
    pub replicas: i32,
    /// Annotations of the Deployment that carry verdicts: promoted, rolled back.
    pub verdicts: (Vec<String>, Vec<String>),
    /// Its pods, those that end included.
    pub pods: Vec<Pod>,
}

/// One pod.
#[derive(Clone, Debug, Default)]
pub struct Pod {
    /// Name.
    pub name: String,
    /// Whether the Ready condition is True.
    pub ready: bool,
    /// Since when it has run without being Ready.
    pub not_ready_since: Option<Timestamp>,
    /// Whether it has been told to end.
    pub terminating: bool,
    /// Hash of the template that it was made from.
    pub template: String,
    /// Hash of the configuration in force, where it was asked and answered.
    pub config: Option<String>,
    /// Restarts of its container.
    pub restarts: i32,
    /// Whether its container was killed for want of memory.
    pub oom_killed: bool,
}

impl Observed {
    /// Pods that serve: Ready and not told to end.
    pub fn serving(&self) -> i32 {
        count(self.pods.iter().filter(|pod| pod.ready && !pod.terminating))
    }

    /// Whether exactly the wanted pods exist, each Ready, of the wanted template and with the wanted configuration in force.
    pub fn exposed(&self, target: &Target) -> bool {
        self.replicas == target.replicas
            && count(self.pods.iter()) == target.replicas
            && self.taken(target) == target.replicas
    }

    /// Pods that serve with the wanted template and configuration.
    pub fn taken(&self, target: &Target) -> i32 {
        let hash = target.config.as_ref().map(|(_, hash)| hash);
        count(self.pods.iter().filter(|pod| {
            pod.ready
                && !pod.terminating
                && pod.template == target.template
                && hash.is_none_or(|hash| pod.config.as_ref() == Some(hash))
        }))
    }
}

fn count<T>(items: impl Iterator<Item = T>) -> i32 {
    i32::try_from(items.count()).unwrap_or(i32::MAX)
}
