//! Mock experts: answers that depend on the request alone, after a time and with errors as told.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue},
};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::{net::TcpListener, time::sleep};

use super::Random;

/// Largest request body that is read, in bytes.
const MAX_BODY: usize = 64 << 20;

/// How the mocks behave.
#[derive(Debug, Clone)]
pub struct Behaviour {
    /// Mean time to an answer.
    pub latency: Duration,
    /// Share by which that time varies both ways, uniformly; 0 to 1.
    pub jitter: f64,
    /// Share of requests that are answered 500; 0 to 1.
    pub error_rate: f64,
    /// Bytes of filler in an answer.
    pub size: usize,
    /// Makes jitter and errors the same in each run.
    pub seed: u64,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self { latency: Duration::from_millis(20), jitter: 0.2, error_rate: 0.0, size: 2048, seed: 1 }
    }
}

/// Serves mock experts on every path, until the future is dropped.
pub async fn serve(listener: TcpListener, behaviour: Behaviour) {
    let random = Arc::new(Mutex::new(Random(behaviour.seed)));
    let behaviour = Arc::new(behaviour);
    super::serve(listener, move |request| answer(request, behaviour.clone(), random.clone())).await;
}

async fn answer(
    request: Request<Incoming>,
    behaviour: Arc<Behaviour>,
    random: Arc<Mutex<Random>>,
) -> Response<Full<Bytes>> {
    if request.method() != Method::POST {
        return match request.uri().path() {
            "/livez" => Response::new("ok\n".into()),
            _ => status(StatusCode::METHOD_NOT_ALLOWED),
        };
    }
    let path = request.uri().path().to_owned();
    let Ok(body) = Limited::new(request.into_body(), MAX_BODY).collect().await else {
        return status(StatusCode::BAD_REQUEST);
    };
    let (vary, fail) = {
        let mut random = random.lock().unwrap_or_else(PoisonError::into_inner);
        (random.unit() * 2.0 - 1.0, random.unit())
    };
    let latency = behaviour.latency.mul_f64((1.0 + behaviour.jitter * vary).max(0.0));
    if !latency.is_zero() {
        sleep(latency).await;
    }
    if fail <= behaviour.error_rate {
        return status(StatusCode::INTERNAL_SERVER_ERROR);
    }
    let digest =
        Sha256::new().chain_update(&path).chain_update(b"\n").chain_update(body.to_bytes()).finalize();
    let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let seed = digest.iter().take(8).fold(0, |seed, byte| seed << 8 | u64::from(*byte));
    let text = super::filler(seed, behaviour.size);
    let mut reply = Response::new(json!({"path": path, "digest": hex, "text": text}).to_string().into());
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    reply
}

fn status(status: StatusCode) -> Response<Full<Bytes>> {
    let mut reply = Response::new(Full::default());
    *reply.status_mut() = status;
    reply
}
