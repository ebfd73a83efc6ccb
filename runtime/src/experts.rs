//! Experts: how each kind is asked, what its answer is, and when it is asked again or not at all.
//!
//! Knows upstream protocols and connections; knows nothing of the client's HTTP, of caches or of quorums. Every answer
//! is bounded, and every wait ends with the caller's limit.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, Uri,
    header::{ACCEPT, CONTENT_TYPE, HOST, HeaderName, HeaderValue},
};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::time::{sleep, timeout_at};

use crate::{
    config::{self, Dispatch, Kind},
    connections::{self, Address, Answer, Arriving, Route},
    metrics::{Outcome, Service},
    query::Query,
    secrets::Credential,
};

pub(crate) mod breaker;
mod mcp;
mod retries;

use breaker::Breaker;
use retries::Budget;

/// Where an expert, or another service, is.
#[derive(Debug, Clone)]
pub(crate) struct Upstream {
    pub(crate) address: Address,
    /// Path and query that are posted to.
    pub(crate) path: Uri,
    pub(crate) host: HeaderValue,
}

impl Upstream {
    /// `None` for what is no URL, which [`config::Config::parse`] refuses already.
    pub(crate) fn of(expert: &config::Expert) -> Option<Self> {
        Self::at(&expert.url, |path| {
            let base = path.trim_end_matches('/');
            match (expert.kind, &expert.tool) {
                (Kind::Http, Some(tool)) => format!("{base}/tools/{tool}"),
                (Kind::OpenAi, _) => format!("{base}/chat/completions"),
                (Kind::Http | Kind::Mcp, _) => path.to_owned(),
            }
        })
    }

    /// As [`Self::of`]; `path` says what is posted to, given the URL's own path and query.
    pub(crate) fn at(url: &str, path: impl FnOnce(&str) -> String) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let authority = uri.authority()?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let tls = uri.scheme_str() == Some("https");
        let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
        Some(Self {
            address: Address { host, port, tls },
            path: path(uri.path_and_query()?.as_str()).parse().ok()?,
            host: HeaderValue::from_str(authority.as_str()).ok()?,
        })
    }
}

/// An expert, ready to be asked.
#[derive(Debug)]
pub(crate) struct Expert {
    pub(crate) config: config::Expert,
    upstream: Upstream,
    pub(crate) route: Route,
    pub(crate) metrics: Service,
    /// All that decides an answer but the query: whose answer a cached answer is.
    pub(crate) identity: Arc<str>,
    credential: Option<Arc<Credential>>,
    retries: config::Retries,
    learnt: Arc<Learnt>,
}

/// What was learnt about an expert, and is kept when a new configuration leaves the expert as it is.
#[derive(Debug)]
struct Learnt {
    breaker: Breaker,
    budget: Budget,
    mcp: mcp::State,
}

/// Why an expert has no answer.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) outcome: Outcome,
    /// For whoever asked.
    pub(crate) detail: String,
    /// What the expert answered, if its status is the failure.
    pub(crate) status: Option<StatusCode>,
    /// How long the expert, or its breaker, wants to be left alone.
    pub(crate) after: Option<Duration>,
    /// Nothing was done: asking again, or somebody else, is safe.
    pub(crate) safe: bool,
}

/// A failure of a single attempt.
struct Failed {
    failure: Failure,
    /// The expert is unwell, rather than the request.
    unwell: bool,
}

impl Failed {
    fn new(outcome: Outcome, detail: String) -> Self {
        let failure = Failure { outcome, detail, status: None, after: None, safe: false };
        // A full pool and an error that the expert chose to answer say nothing about its health.
        Self { failure, unwell: !matches!(outcome, Outcome::Busy | Outcome::Status) }
    }

    fn timeout(waited: Duration) -> Self {
        Self::new(Outcome::Timeout, format!("no answer within {waited:?}"))
    }

    /// A status that is no success.
    fn status(status: StatusCode, headers: &HeaderMap) -> Self {
        let mut failed = Self::new(Outcome::Status, format!("the expert answered {status}"));
        failed.unwell = status.is_server_error();
        failed.failure.safe =
            matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        failed.failure.status = Some(status);
        let now = SystemTime::UNIX_EPOCH + SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        failed.failure.after = retries::after(headers, now);
        failed
    }
}

impl From<connections::Error> for Failed {
    fn from(error: connections::Error) -> Self {
        let outcome = match error {
            connections::Error::Busy(_) => Outcome::Busy,
            connections::Error::Connect(_) | connections::Error::Broken(_) => Outcome::Connect,
            connections::Error::TooLarge => Outcome::Invalid,
        };
        let mut failed = Self::new(outcome, error.to_string());
        failed.failure.safe = matches!(error, connections::Error::Connect(_) | connections::Error::Busy(_));
        failed
    }
}

/// One query, as the experts need it.
pub(crate) struct Question<'a> {
    pub(crate) query: &'a Query<'a>,
    /// The query as JSON.
    pub(crate) body: Bytes,
    /// Name of the query in the experts' logs.
    pub(crate) id: HeaderValue,
}

impl Expert {
    /// `before` is the expert of the same configuration that this one takes the place of, if there is one.
    pub(crate) fn new(
        config: &config::Expert,
        dispatch: &Dispatch,
        upstream: Upstream,
        route: Route,
        metrics: Service,
        before: Option<&Self>,
    ) -> Result<Self, String> {
        let credential = match before {
            Some(before) => before.credential.clone(),
            None => config.credential.as_ref().map(Credential::new).transpose()?.map(Arc::new),
        };
        let learnt = match before {
            Some(before)
                if before.retries == dispatch.retries && before.learnt.breaker.is(&dispatch.breaker) =>
            {
                before.learnt.clone()
            }
            _ => Arc::new(Learnt {
                breaker: Breaker::new(dispatch.breaker.clone(), Instant::now()),
                budget: Budget::new(dispatch.retries.budget_percent),
                mcp: mcp::State::default(),
            }),
        };
        let part = |part: &Option<String>| part.clone().unwrap_or_default();
        let identity = format!(
            "{}\n{:?}\n{}\n{}\n{}\n{}",
            config.name,
            config.kind,
            config.url,
            part(&config.tool),
            part(&config.argument),
            part(&config.model)
        );
        Ok(Self {
            config: config.clone(),
            upstream,
            route,
            metrics,
            identity: identity.into(),
            credential,
            retries: dispatch.retries.clone(),
            learnt,
        })
    }

    /// Asks a query, within the expert's time-out and the query's deadline.
    pub(crate) async fn ask(
        &self,
        question: Question<'_>,
        started: Instant,
        deadline: Instant,
    ) -> Result<Arc<RawValue>, Failure> {
        let question = &question;
        self.attempts(started, deadline, || async move {
            match self.config.kind {
                Kind::Http => self.post(question.body.clone(), question).await,
                Kind::OpenAi => self.post(self.completion(question.query), question).await,
                Kind::Mcp => mcp::call(self, question).await,
            }
        })
        .await
    }

    /// Asks for a chat completion as the client wrote it. The answer may be any that is the client's business: a
    /// success, or an error of the request.
    pub(crate) async fn chat(
        &self,
        body: Bytes,
        id: HeaderValue,
        accept: HeaderValue,
        started: Instant,
        deadline: Instant,
    ) -> Result<Response<Arriving>, Failure> {
        self.attempts(started, deadline, || {
            let mut request = self.request(body.clone(), id.clone());
            request.headers_mut().insert(ACCEPT, accept.clone());
            async move {
                let response = self.route.open(request, &self.metrics).await?;
                match response.status() {
                    // Our credential is refused, which the client must not take for its own.
                    StatusCode::UNAUTHORIZED
                    | StatusCode::FORBIDDEN
                    | StatusCode::PROXY_AUTHENTICATION_REQUIRED
                    | StatusCode::TOO_MANY_REQUESTS => {
                        Err(Failed::status(response.status(), response.headers()))
                    }
                    status if status.is_success() || status.is_client_error() => Ok(response),
                    status => Err(Failed::status(status, response.headers())),
                }
            }
        })
        .await
    }

    /// Tries until there is an answer, or a failure after which trying again is not safe, not allowed or too late.
    async fn attempts<T, F>(
        &self,
        started: Instant,
        deadline: Instant,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failed>>,
    {
        let limit = deadline.min(started + self.config.timeout);
        let Learnt { breaker, budget, .. } = &*self.learnt;
        budget.earn();
        let mut retry = 0;
        loop {
            let pass = breaker.admit(Instant::now()).map_err(|left| {
                let detail =
                    format!("not asked, since it failed several times in a row; next trial in {left:?}");
                Failure { after: Some(left), safe: true, ..Failed::new(Outcome::Open, detail).failure }
            })?;
            let result = timeout_at(limit.into(), attempt()).await;
            let Failed { failure, unwell } = match result {
                Ok(Ok(answer)) => {
                    breaker.record(pass, true, started);
                    return Ok(answer);
                }
                Ok(Err(failed)) => failed,
                Err(_) => Failed::timeout(limit.saturating_duration_since(started)),
            };
            let now = Instant::now();
            // A full pool is no result at all: a trial that met one leaves the breaker as it is.
            if failure.outcome != Outcome::Busy && breaker.record(pass, !unwell, now) {
                self.metrics.breaker_opened.inc();
                tracing::warn!(
                    expert = self.config.name,
                    outcome = failure.outcome.as_str(),
                    "failed several times in a row, and is not asked for a while"
                );
            }
            let pause = failure.after.unwrap_or_else(|| retries::pause(self.retries.backoff, retry));
            // Who waited for a connection in vain has waited enough.
            let again = failure.safe && failure.outcome != Outcome::Busy && retry < self.retries.max;
            if !again || now + pause >= limit || !budget.spend() {
                return Err(failure);
            }
            retry += 1;
            self.metrics.retries.inc();
            sleep(pause).await;
        }
    }

    async fn post(&self, body: Bytes, question: &Question<'_>) -> Result<Arc<RawValue>, Failed> {
        let request = self.request(body, question.id.clone());
        let answer = self.route.send(request, &self.metrics).await?;
        if !answer.status.is_success() {
            return Err(Failed::status(answer.status, &answer.headers));
        }
        json(&answer)
    }

    fn request(&self, body: Bytes, id: HeaderValue) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.upstream.path.clone();
        let headers: &mut HeaderMap = request.headers_mut();
        headers.insert(HOST, self.upstream.host.clone());
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(HeaderName::from_static("x-request-id"), id);
        if let Some(credential) = &self.credential {
            let (name, value) = credential.header();
            headers.insert(name, value);
        }
        request
    }

    /// A query as a chat completion: one message of the user, with the title above the content.
    fn completion(&self, query: &Query<'_>) -> Bytes {
        #[derive(Serialize)]
        struct Completion<'a> {
            model: &'a str,
            messages: [Message; 1],
        }
        #[derive(Serialize)]
        struct Message {
            role: &'static str,
            content: String,
        }
        let content = match query.title.is_empty() {
            true => query.content.clone().into_owned(),
            false => format!("{}\n\n{}", query.title, query.content),
        };
        let model = self.config.model.as_deref().unwrap_or_default();
        let completion = Completion { model, messages: [Message { role: "user", content }] };
        let body = serde_json::to_vec(&completion);
        // Only texts: serde_json has no error for these.
        debug_assert!(body.is_ok());
        body.unwrap_or_default().into()
    }

    /// Reads the credential again, where it comes from a file.
    pub(crate) fn refresh(&self) {
        if let Some(Err(reason)) = self.credential.as_ref().map(|credential| credential.refresh()) {
            tracing::warn!(
                expert = self.config.name,
                reason,
                "the credential is not renewed; the old one stays"
            );
        }
    }

    /// Shows the breaker's state in the metrics.
    pub(crate) fn show(&self, now: Instant) {
        self.metrics.breaker(self.learnt.breaker.state(now));
    }
}

fn json(answer: &Answer) -> Result<Arc<RawValue>, Failed> {
    serde_json::from_slice::<Box<RawValue>>(&answer.body)
        .map(Arc::from)
        .map_err(|error| Failed::new(Outcome::Invalid, format!("the answer is no JSON document: {error}")))
}
