//! Why a rollout stands where it stands, from the custom resource alone. Pure.
//!
//! Whatever is said here is read from the status, or made again by the functions that the operator uses.

use std::fmt::Write as _;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Serialize;

use super::{backtest::kind, dataset::compared, date, record::as_it_stood};
use crate::{
    api::{
        Basis, Benefit, Carry, Change, Direction, KpiStatus, Numbers, OptimizationRollout,
        OptimizationStatus, Phase, Step, Verdict, What,
    },
    decision::{
        judge::{self, Test, Trial},
        machine,
        report::{described, stalled},
        resolve::Rollout,
    },
};

/// How a rollout stands and why.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Namespace and name.
    pub rollout: String,
    /// Phase, as the status has it.
    pub phase: Phase,
    /// Where it stands.
    pub stands: String,
    /// What it waits for.
    pub waits: String,
    /// When the operator looks again at the latest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_decision_at: Option<Time>,
    /// The optimizations.
    pub optimizations: Vec<OptimizationStatus>,
    /// What each KPI's change was measured to be.
    pub benefits: Vec<Benefit>,
    /// The KPIs as they are judged now.
    pub kpis: Vec<Told>,
    /// The last decisions, oldest first.
    pub decisions: Vec<Decided>,
}

/// One decision.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Decided {
    /// Its id, by which its event is named.
    pub id: i64,
    /// When it was taken.
    pub time: Time,
    /// What was decided.
    pub what: What,
    /// Why.
    pub why: String,
    /// The evidence that it rests on, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evidence: Option<String>,
    /// The numbers of each KPI.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kpis: Vec<Told>,
}

/// The numbers of one KPI, and where they come from.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Told {
    /// Name of the KPI.
    pub name: String,
    /// Its kind, where the specification still has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    /// The optimization that alone can move it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// The verdict.
    pub verdict: Verdict,
    /// Why it is what it is, and what it rests on; of a decision the decision itself says it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Events and requests of both arms, of each share of requests that is compared.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub counts: Vec<Carry>,
    /// The bounds of a latency in seconds, one for each of `counts`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bounds: Vec<String>,
    /// The usual share of events that was learned, one for each of `counts`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub usual: Vec<f64>,
    /// The canary's value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary: Option<f64>,
    /// The baseline's value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<f64>,
    /// The relative change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub change: Option<Change>,
    /// The log evidence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_evidence: Option<f64>,
    /// Where it alarms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alarm_at: Option<f64>,
    /// How that is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alarm_formula: Option<String>,
    /// Ratio that is called equal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tolerated: Option<f64>,
    /// How that is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tolerated_formula: Option<String>,
}

/// How the log evidence itself is made; the counts of each tick are those of `backtest`.
const EVIDENCE: &str =
    "  The evidence of an errorRatio or a latency is made tick by tick from canary x of n and baseline y of m in that tick. With r0 the
  tolerated ratio of odds, p the usual share (1e-15 where it is 0) and o(r, b) = r b / (1 - b + r b), seven weights, one for each k of
  1.25, 1.6, 2, 3, 5, 10 and 30, begin with 4/5; at tick t > 1 each gets 1/5 / ((t-1) t) more; then it is multiplied by
  (o(r0 k, p) / o(r0, b))^x ((1 - o(r0 k, p)) / (1 - o(r0, b)))^(n-x) (p / b)^y ((1 - p) / (1 - b))^(m-y), where b is such that
  n o(r0, b) + m b = n o(r0 k, p) + m p.
  Of a latency r0 is at tick t no less than 1.5^exp(-(t-1) interval / (3 warmUp)). With the odds u(x, n) = (x + 1/2) / (n - x + 1/2)
  and v(x, n) = 1/(x + 1/2) + 1/(n - x + 1/2), at the edge of a burst x counts up to the share whose odds are
  u(x', n') exp(2 sqrt(v(x', n') + v(e, n))), where e of n has the odds u(x', n'), or to what x' = 0 makes of it where that is more,
  and r0 is multiplied by what u(y, m) has changed beyond a factor of exp(2 sqrt(v(y', m') + v(y, m))); x', n', y' and m' are those
  of the tick before, which for the first tick is the one that `from` names.
  After tick t the evidence is ln(mean of the weights + 1/5 / t), less ln(number of bounds) of a latency. It alarms where it reaches
  ln(1/alpha) while the shares differ by minimumEffect or more (2/5 of it at a latency's last bound) and the odds by a factor of
  r0^(1 + 0.75 / sqrt(t)) or more, in the whole stage or in its latest ticks, of which each older one weighs 0.9 times as much; there
  t is 10 at most. The evidence of a gauge is the highest ln(1/p) + ln of the look's share so far, p that of Student's t on the pods'
  means or slopes. The share of look q is 3/4 of 9/10 for the means and q = 1, 3/4 of 1/10 / ((q-1) q) for the means later, 1/4 of
  6 / (pi^2 q^2) for the slopes and their own q. To see each tick:
";

/// Explains a rollout. `rollout` is absent where the specification cannot be followed.
pub fn explain(object: &OptimizationRollout, rollout: Option<&Rollout>) -> Explanation {
    let status = object.status.clone().unwrap_or_default();
    let name = object.metadata.name.clone().unwrap_or_default();
    let ready = status.conditions.iter().find(|condition| condition.type_ == "Ready");
    let note = ready.map(|condition| condition.message.clone()).unwrap_or_default();
    let waits = match stalled(&status) {
        Some((reason, message)) => format!("{reason}: {message}"),
        None => note,
    };
    let stands = match &status.stage {
        None => "no stage runs".to_owned(),
        Some(stage) => {
            let planned = rollout
                .map(|rollout| (rollout.stages.len(), rollout.stages.iter().find(|p| p.name == stage.name)));
            let (of, bake) = match planned {
                Some((of, Some(planned))) => {
                    (format!(" ({} of {of})", stage.index + 1), format!(" of {}", planned.duration))
                }
                _ => (String::new(), String::new()),
            };
            format!(
                "stage {}{of}, attempt {}, {:?}: observed for {}{bake}; {} % of production traffic wanted on the canary, {} there",
                stage.name,
                stage.attempt,
                stage.step,
                stage.observed,
                status.weight.desired,
                status.weight.effective
            )
        }
    };
    let running = match (rollout, &status.stage) {
        (Some(rollout), Some(stage)) => trials(rollout, &status, stage.exposed_at.as_ref()),
        _ => vec![],
    };
    let decided = |decision: &crate::api::Decision| {
        let basis = decision.basis.as_ref();
        let then = match (rollout, basis) {
            (Some(rollout), Some(basis)) => {
                let stood = as_it_stood(rollout, basis);
                trials(rollout, &stood, stood.stage.as_ref().and_then(|stage| stage.exposed_at.as_ref()))
            }
            _ => vec![],
        };
        let tell = |basis: &Basis| {
            let of = |numbers: &Numbers| {
                tell(rollout, (basis.attempt, basis.stages), &then, numbers, String::new())
            };
            basis.kpis.iter().map(of).collect::<Vec<_>>()
        };
        Decided {
            id: decision.id,
            time: decision.time.clone(),
            what: decision.what,
            why: decision.why.clone(),
            evidence: basis.map(|basis| rests_on(basis, &then)),
            kpis: basis.map(tell).unwrap_or_default(),
        }
    };
    let attempt = status.stage.as_ref().map_or((1, 0), |stage| (stage.attempt, stage.stages));
    let kpi = |known: &KpiStatus| {
        let message = format!("{:?}: {}", known.reason, known.message);
        tell(rollout, attempt, &running, &Numbers::from(known), message)
    };
    Explanation {
        rollout: format!("{}/{name}", object.metadata.namespace.clone().unwrap_or_default()),
        phase: status.phase,
        stands,
        waits,
        next_decision_at: status.next_decision_at.clone(),
        kpis: status.kpis.iter().map(kpi).collect(),
        decisions: status.decisions.iter().map(decided).collect(),
        benefits: status.benefits.clone(),
        optimizations: status.optimizations.clone(),
    }
}

/// The trials of a stage, whatever the time: those that the operator makes once the first tick has settled.
fn trials(rollout: &Rollout, status: &crate::api::RolloutStatus, exposed: Option<&Time>) -> Vec<Trial> {
    // A year after exposure every KPI has begun.
    let late =
        exposed.and_then(|time| time.0.checked_add(k8s_openapi::jiff::SignedDuration::from_hours(8784)).ok());
    let mut status = status.clone();
    if let Some(stage) = &mut status.stage
        && !matches!(stage.step, Step::Promoting | Step::Restoring)
    {
        stage.step = Step::Observing;
    }
    let inquiry = late.and_then(|late| machine::inquiry(rollout, &status, late));
    inquiry.map(|inquiry| inquiry.trials.into_iter().map(|(trial, _)| trial).collect()).unwrap_or_default()
}

/// Such as `stage canary, attempt 1, of memory: experts-canary (1 pod) against experts-baseline (1 pod), from … to …`.
fn rests_on(basis: &Basis, trials: &[Trial]) -> String {
    let arms = trials.first().map(|trial| format!(": {}", compared(&trial.arms))).unwrap_or_default();
    format!(
        "stage {}, attempt {}, with {}{arms}, from {} to {}",
        basis.stage,
        basis.attempt,
        basis.on.join(", "),
        date(basis.from),
        date(basis.until)
    )
}

fn tell(
    rollout: Option<&Rollout>,
    (attempt, stages): (i32, i32),
    trials: &[Trial],
    numbers: &Numbers,
    message: String,
) -> Told {
    let trial = trials.iter().find(|trial| trial.kpi.name == numbers.name);
    let kpi = rollout.and_then(|rollout| rollout.all_kpis().find(|kpi| kpi.name == numbers.name));
    let alarm_formula = rollout.zip(kpi.filter(|kpi| kpi.is_tested())).map(|(rollout, kpi)| {
        let probability = rollout.analysis.false_rollback_probability;
        let (share, stages) = (rollout.alpha_share(kpi), machine::stages(rollout, stages));
        let at = judge::alarm_at(probability, share, stages, attempt);
        format!(
            "ln(1/alpha) = {at:.4}, alpha = {probability} (analysis.falseRollbackProbability) x {share:.4} (share of this KPI) / {stages} \
             (stages) x {} (attempt {attempt}) = {:.3e}",
            if attempt <= 1 { "0.9".to_owned() } else { format!("0.1 / ({} x {attempt})", attempt - 1) },
            (-at).exp()
        )
    });
    let learned = trial.and_then(|trial| trial.preflight.as_ref());
    Told {
        name: numbers.name.clone(),
        kind: kpi.map(|kpi| kind(&kpi.test)),
        owner: kpi.and_then(|kpi| kpi.owner.clone()),
        verdict: numbers.verdict,
        message,
        counts: numbers.counts.clone(),
        bounds: learned.map(|preflight| preflight.bounds.clone()).unwrap_or_default(),
        usual: learned.map(|preflight| preflight.shares.clone()).unwrap_or_default(),
        canary: numbers.canary,
        baseline: numbers.baseline,
        change: numbers.change,
        log_evidence: numbers.log_evidence,
        alarm_at: numbers.alarm_at,
        alarm_formula,
        tolerated: numbers.tolerated,
        tolerated_formula: kpi.and_then(|kpi| tolerance(&kpi.test, trial)),
    }
}

/// Where the tolerated ratio comes from.
fn tolerance(test: &Test, trial: Option<&Trial>) -> Option<String> {
    let tolerance = match test {
        Test::ErrorRatio { tolerance, .. } | Test::Latency { tolerance, .. } => *tolerance,
        Test::Gauge { tolerance, direction: Direction::LowerIsBetter, .. } => {
            return Some(format!("1 + tolerance {tolerance}"));
        }
        Test::Gauge { tolerance, direction: Direction::HigherIsBetter, .. } => {
            return Some(format!(
                "1 / (1 + tolerance {tolerance}), or 1 - tolerance where a value is 0 or less"
            ));
        }
        Test::Threshold { .. } => return None,
    };
    let trial = trial?;
    let baseline = trial.arms.baseline.as_ref()?;
    let (kc, kb) = (trial.arms.canary.pods, baseline.pods);
    let spread = trial.preflight.as_ref().map(|preflight| (preflight.pods, preflight.spread.clone()));
    let (pods, spread) = spread.unwrap_or((0, vec![judge::CAUTIOUS]));
    let each: Vec<_> = spread
        .iter()
        .map(|tau| {
            let by_spread = judge::effective_tolerance(1.0, *tau, kc, kb);
            let r0 = judge::effective_tolerance(tolerance, *tau, kc, kb);
            let z = judge::Z;
            let whence = if by_spread > tolerance { "the spread of pods decides" } else { "the tolerance decides" };
            format!("max(tolerance {tolerance}, exp({z} x {tau} x sqrt(1/{kc} + 1/{kb})) = {by_spread:.4}) = {r0:.4}: {whence}")
        })
        .collect();
    let cautious = trial.preflight.as_ref().and_then(|preflight| preflight.cautious_until).map(|until| {
        let r0 = judge::effective_tolerance(tolerance, judge::CAUTIOUS, kc, kb);
        format!(
            "; up to {} tau was {} and the ratio {r0:.4}, since the pods' past was too short",
            date(until),
            judge::CAUTIOUS
        )
    });
    let learned = match pods {
        0 => "tau is the cautious end of the range, since too few pods or too little of their past were there to learn it".to_owned(),
        pods => format!("tau was learned from {pods} pods"),
    };
    Some(format!("{}; {learned}{}", each.join(", and "), cautious.unwrap_or_default()))
}

impl Explanation {
    /// As text.
    pub fn text(&self) -> String {
        let mut text = format!("{}: {:?}\n  {}\n", self.rollout, self.phase, self.stands);
        // Writing to a String cannot fail.
        if !self.waits.is_empty() {
            let _ = writeln!(text, "  {}", self.waits);
        }
        if let Some(at) = &self.next_decision_at {
            let _ = writeln!(text, "  the operator looks again at {} at the latest", at.0);
        }
        text.push_str("\nOptimizations\n");
        for optimization in &self.optimizations {
            let place = match optimization.stage.as_str() {
                "" => String::new(),
                stage => format!(" in stage {stage}"),
            };
            let _ = writeln!(
                text,
                "  {}: {:?}{place} since {}",
                optimization.name, optimization.state, optimization.since.0
            );
            for (head, line) in [("why", &optimization.reason), ("benefit", &optimization.benefit)] {
                if !line.is_empty() {
                    let _ = writeln!(text, "    {head}: {line}");
                }
            }
        }
        if !self.benefits.is_empty() {
            text.push_str("\nMeasured changes, with 95 % confidence intervals\n");
        }
        for benefit in &self.benefits {
            let by = benefit.optimizations.join(", ");
            let jointly = if benefit.optimizations.len() > 1 { " jointly" } else { "" };
            let _ = writeln!(text, "  {}: {} by {by}{jointly}", benefit.kpi, described(benefit.overall));
            for stage in &benefit.stages {
                let _ = writeln!(text, "    stage {}: {}", stage.stage, described(stage.change));
            }
        }
        if !self.kpis.is_empty() {
            text.push_str("\nKPIs now\n");
        }
        for kpi in &self.kpis {
            kpi.write(&mut text, "  ");
        }
        text.push_str("\nDecisions\n");
        for decision in &self.decisions {
            let _ = writeln!(
                text,
                "  {} {} {:?}\n    {}",
                decision.id, decision.time.0, decision.what, decision.why
            );
            if let Some(evidence) = &decision.evidence {
                let _ = writeln!(text, "    evidence of {evidence}");
            }
            for kpi in &decision.kpis {
                kpi.write(&mut text, "      ");
            }
        }
        if self
            .kpis
            .iter()
            .chain(self.decisions.iter().flat_map(|d| &d.kpis))
            .any(|kpi| kpi.log_evidence.is_some())
        {
            let (namespace, name) = self.rollout.split_once('/').unwrap_or_default();
            let _ = writeln!(
                text,
                "\nTo recompute by hand\n{EVIDENCE}    kubectl synthex backtest {name} -n {namespace} --stage STAGE --prometheus URL"
            );
        }
        text
    }
}

impl Told {
    fn write(&self, text: &mut String, indent: &str) {
        let of = match (self.kind, &self.owner) {
            (Some(kind), Some(owner)) => format!(" ({kind} of {owner})"),
            (Some(kind), None) => format!(" ({kind}, shared)"),
            _ => String::new(),
        };
        let message = if self.message.is_empty() { String::new() } else { format!(", {}", self.message) };
        let _ = writeln!(text, "{indent}{}{of}: {:?}{message}", self.name, self.verdict);
        for (kind, counts) in self.counts.iter().enumerate() {
            let slower =
                self.bounds.get(kind).map(|bound| format!("slower than {bound} s: ")).unwrap_or_default();
            let usual = self.usual.get(kind).map(|usual| format!(", usually {usual}")).unwrap_or_default();
            let _ = writeln!(
                text,
                "{indent}  {slower}canary {:.0} of {:.0}, baseline {:.0} of {:.0}{usual}",
                counts.canary.events, counts.canary.total, counts.baseline.events, counts.baseline.total
            );
        }
        if self.counts.is_empty()
            && let Some(canary) = self.canary
        {
            let against = self.baseline.map(|baseline| format!(", baseline {baseline}")).unwrap_or_default();
            let _ = writeln!(text, "{indent}  canary {canary}{against}");
        }
        if let Some(change) = self.change {
            let _ = writeln!(text, "{indent}  change {}", described(change));
        }
        if let Some(tolerated) = self.tolerated {
            let made = self.tolerated_formula.as_ref().map(|made| format!(" = {made}")).unwrap_or_default();
            let of = if self.counts.is_empty() { "" } else { " of odds" };
            let _ = writeln!(text, "{indent}  tolerated ratio{of} r0 {tolerated}{made}");
        }
        if let (Some(evidence), Some(alarm)) = (self.log_evidence, self.alarm_at) {
            let sign = if evidence >= alarm { ">=" } else { "<" };
            let made = self.alarm_formula.as_ref().map(|made| format!(" = {made}")).unwrap_or_default();
            let _ = writeln!(text, "{indent}  log evidence {evidence} {sign} {alarm}{made}");
        }
    }
}
