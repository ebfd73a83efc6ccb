//! `POST /v1/chat/completions`: OpenAI's API, passed through to the experts that serve the model.
//!
//! The body goes to the expert as it came, and the answer comes back piece by piece at the pace at which the client
//! takes it. A client that goes away takes the call to the expert with it. Errors have OpenAI's shape, since its SDKs
//! read no other.

use std::{
    borrow::Cow,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::Either;
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::{Body, Frame, Incoming, SizeHint},
    header::{ACCEPT, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER},
};
use serde::{Deserialize, Serialize};
use tokio::time::{Sleep, sleep_until};

use super::{InFlight, Refusal, Reply, admit, read};
use crate::{
    connections::Arriving,
    experts::{Expert, Failure},
    metrics::{Outcome, Verdict},
    query,
    state::{Runtime, Snapshot},
};

/// All that is looked at in a request.
#[derive(Deserialize)]
struct Completion<'a> {
    #[serde(borrow)]
    model: Cow<'a, str>,
}

/// An error, as OpenAI's SDKs read it.
#[derive(Serialize)]
struct Shape<'a> {
    error: Details<'a>,
}

#[derive(Serialize)]
struct Details<'a> {
    message: &'a str,
    r#type: &'a str,
    param: Option<&'a str>,
    code: &'a str,
}

/// The JSON text of an error.
pub(super) fn error(status: StatusCode, code: &str, message: &str) -> Vec<u8> {
    let kind = match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        status if status.is_client_error() => "invalid_request_error",
        _ => "server_error",
    };
    let error = Details { message, r#type: kind, param: None, code };
    // Only texts: serde_json has no error for these.
    serde_json::to_vec(&Shape { error }).unwrap_or_default()
}

pub(super) async fn completions(
    runtime: &Arc<Runtime>,
    request: Request<Incoming>,
    body_timeout: Duration,
) -> Reply {
    let snapshot = runtime.snapshot();
    match pass(runtime, &snapshot, request, body_timeout).await {
        Ok(reply) => reply,
        Err(refusal) => {
            runtime.metrics.count(refusal.verdict);
            refusal.in_openai_shape()
        }
    }
}

async fn pass(
    runtime: &Arc<Runtime>,
    snapshot: &Snapshot,
    request: Request<Incoming>,
    body_timeout: Duration,
) -> Result<Reply, Refusal> {
    let started = Instant::now();
    let in_flight = admit(runtime, snapshot, request.headers(), started)?;
    let accept = request.headers().get(ACCEPT).cloned().unwrap_or(HeaderValue::from_static("*/*"));
    let body = read(snapshot, request.into_body(), body_timeout).await?;
    let model = model(&body)?;
    let named = |expert: &&Arc<Expert>| expert.config.model.as_deref() == Some(&*model);
    let experts: Vec<Arc<Expert>> = snapshot.experts.iter().filter(named).cloned().collect();

    let id = runtime.id();
    let deadline = started + snapshot.config.dispatch.stream_deadline;
    // Only visible characters, as all our ids.
    let id = HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("-"));
    let mut failed = None;
    for expert in experts {
        let asked = Instant::now();
        let result = expert.chat(body.clone(), id.clone(), accept.clone(), asked, deadline).await;
        expert.metrics.duration.observe(asked.elapsed().as_secs_f64());
        let failure = match result {
            Ok(response) => return Ok(passing(runtime, expert, response, in_flight, id, deadline)),
            Err(failure) => failure,
        };
        expert.metrics.count(failure.outcome);
        // The next expert of the model stands in, where that repeats nothing.
        let safe = failure.safe;
        failed = Some(refused(&expert, failure));
        if !safe {
            break;
        }
    }
    Err(failed.unwrap_or_else(|| unknown(snapshot, &model)))
}

fn model(body: &[u8]) -> Result<Cow<'_, str>, Refusal> {
    let invalid = |detail: String| {
        Refusal::invalid(StatusCode::BAD_REQUEST, "invalid_request", "The request cannot be read", detail)
    };
    // What is not looked at is passed on, so it must at least be text of a sane shape.
    let text =
        std::str::from_utf8(body).map_err(|error| invalid(format!("the body is no UTF-8: {error}")))?;
    if query::depth(text) > query::MAX_DEPTH {
        return Err(invalid(format!("the body is nested deeper than {} levels", query::MAX_DEPTH)));
    }
    if text.trim_ascii_start().starts_with('[') {
        return Err(invalid("the body is a list, and must be an object".to_owned()));
    }
    serde_json::from_str::<Completion<'_>>(text)
        .map(|completion| completion.model)
        .map_err(|error| invalid(format!("the body is not a chat completion: {error}")))
}

fn unknown(snapshot: &Snapshot, model: &str) -> Refusal {
    let known: Vec<&str> = snapshot.experts.iter().filter_map(|e| e.config.model.as_deref()).collect();
    let detail = format!("there is no model {model:?}; there are: {}", known.join(", "));
    Refusal::invalid(StatusCode::NOT_FOUND, "model_not_found", "No expert has this model", detail)
}

fn refused(expert: &Expert, failure: Failure) -> Refusal {
    let (status, kind) = match failure.outcome {
        Outcome::Timeout => (StatusCode::GATEWAY_TIMEOUT, "timeout"),
        Outcome::Busy => (StatusCode::SERVICE_UNAVAILABLE, "busy"),
        Outcome::Open => (StatusCode::SERVICE_UNAVAILABLE, "unwell"),
        _ => match failure.status {
            Some(
                status @ (StatusCode::TOO_MANY_REQUESTS
                | StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::GATEWAY_TIMEOUT),
            ) => (status, "expert"),
            _ => (StatusCode::BAD_GATEWAY, "expert"),
        },
    };
    let after =
        failure.after.or((status == StatusCode::SERVICE_UNAVAILABLE).then_some(Duration::from_secs(1)));
    Refusal {
        status,
        kind,
        title: "The expert gave no answer",
        detail: format!("expert {}: {}", expert.config.name, failure.detail).into(),
        verdict: Verdict::Error,
        after,
        close: false,
    }
}

/// The reply whose body is the expert's.
fn passing(
    runtime: &Arc<Runtime>,
    expert: Arc<Expert>,
    response: Response<Arriving>,
    in_flight: InFlight,
    id: HeaderValue,
    deadline: Instant,
) -> Reply {
    let (head, arriving) = response.into_parts();
    let kind = head.headers.get(CONTENT_TYPE).map_or(&b""[..], |kind| kind.as_bytes());
    let (verdict, outcome) = match head.status.is_success() {
        true => (Verdict::Ok, Outcome::Ok),
        false => (Verdict::Invalid, Outcome::Status),
    };
    let mut passing = Passing {
        events: kind.starts_with(b"text/event-stream"),
        at_end: verdict,
        verdict: Verdict::Invalid,
        outcome,
        patience: expert.config.timeout,
        waiting: false,
        sleep: Box::pin(sleep_until(deadline.into())),
        deadline,
        runtime: runtime.clone(),
        expert,
        arriving: Some(arriving),
        _in_flight: in_flight,
    };
    passing.settle(false);
    let mut reply = Response::new(Either::Right(passing));
    *reply.status_mut() = head.status;
    let headers: &mut HeaderMap = reply.headers_mut();
    for name in [CONTENT_TYPE, CONTENT_ENCODING, RETRY_AFTER] {
        if let Some(value) = head.headers.get(&name) {
            headers.insert(name, value.clone());
        }
    }
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(HeaderName::from_static("x-request-id"), id);
    reply
}

/// An expert's answer on its way to the client. Nothing is read ahead of the client, and each wait for the expert is
/// bounded. Dropped before its end it cancels the call.
pub(crate) struct Passing {
    /// Absent when the end came, or an error.
    arriving: Option<Arriving>,
    /// The answer is a stream of events, in which an error can still be told.
    events: bool,
    /// How the query ended, if the body comes to its end.
    at_end: Verdict,
    /// How the query ended as far as is known: a client that goes away ends it by its own fault.
    verdict: Verdict,
    outcome: Outcome,
    /// Longest wait for the next piece.
    patience: Duration,
    /// `sleep` is set for the piece that is waited for.
    waiting: bool,
    sleep: Pin<Box<Sleep>>,
    deadline: Instant,
    runtime: Arc<Runtime>,
    expert: Arc<Expert>,
    _in_flight: InFlight,
}

impl Passing {
    /// Notes the end as soon as it is known, since nobody asks again after the last piece.
    fn settle(&mut self, ended: bool) {
        if ended || self.arriving.as_ref().is_some_and(Body::is_end_stream) {
            self.arriving = None;
            self.verdict = self.at_end;
        }
    }

    fn fail(&mut self, outcome: Outcome, detail: String) -> Option<Result<Frame<Bytes>, String>> {
        self.arriving = None;
        (self.verdict, self.outcome) = (Verdict::Error, outcome);
        let detail = format!("expert {}: {detail}", self.expert.config.name);
        tracing::debug!(detail, "a completion broke off");
        Some(match self.events {
            true => {
                let error = error(StatusCode::BAD_GATEWAY, "expert", &detail);
                // Two line ends first: the break may have come within an event.
                let event = [b"\n\ndata: ", error.as_slice(), b"\n\n"].concat();
                Ok(Frame::data(event.into()))
            }
            false => Err(detail),
        })
    }
}

impl Body for Passing {
    type Data = Bytes;
    type Error = String;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, String>>> {
        let this = &mut *self;
        let Some(arriving) = &mut this.arriving else { return Poll::Ready(None) };
        match Pin::new(arriving).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                this.waiting = false;
                this.settle(false);
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(this.fail(Outcome::Connect, error.to_string())),
            Poll::Ready(None) => {
                this.settle(true);
                Poll::Ready(None)
            }
            Poll::Pending => {
                // From here on, not from the last piece on: the client may have taken its time in between.
                if !std::mem::replace(&mut this.waiting, true) {
                    let limit = this.deadline.min(Instant::now() + this.patience);
                    this.sleep.as_mut().reset(limit.into());
                }
                match this.sleep.as_mut().poll(cx) {
                    Poll::Pending => Poll::Pending,
                    Poll::Ready(()) => {
                        let detail = match Instant::now() >= this.deadline {
                            true => "the answer took longer than dispatch.streamDeadline".to_owned(),
                            false => format!("nothing came for {:?}", this.patience),
                        };
                        Poll::Ready(this.fail(Outcome::Timeout, detail))
                    }
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.arriving.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.arriving.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        self.runtime.metrics.count(self.verdict);
        self.expert.metrics.count(self.outcome);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mutations;

    const BODIES: &[&str] = &[
        r#"{"model":"m","messages":[{"role":"user","content":"\u00e9\n"}],"stream":true,"temperature":0.5}"#,
        r#" {"tools":[{"type":"function","function":{"parameters":{"a":[1,[2]]}}}],"model":"\"m\""}"#,
    ];

    proptest! {
        /// Whatever is passed on is a JSON object with one model, of bounded depth.
        #[test]
        fn any_body_is_passed_on_or_refused(
            body in prop_oneof![3 => mutations::of(BODIES), 1 => prop::collection::vec(any::<u8>(), 0..200)]
        ) {
            match model(&body) {
                Ok(model) => {
                    let text = std::str::from_utf8(&body).expect("UTF-8");
                    prop_assert!(query::depth(text) <= query::MAX_DEPTH);
                    // Where another reader reads it at all, it finds the same model: numbers and lone surrogates in
                    // what is not looked at are the expert's to judge.
                    if let Ok(value) = serde_json::from_str::<serde_json::Value>(text) {
                        prop_assert_eq!(value["model"].as_str(), Some(&*model));
                    }
                }
                Err(refusal) => {
                    prop_assert_eq!(refusal.status, StatusCode::BAD_REQUEST);
                    prop_assert!(!refusal.detail.is_empty());
                }
            }
        }
    }
}
