//! Tier 2: exactly these calls to the API server, and what its answers mean. The API server is a tower-test mock.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests, helpers too")]

use std::pin::pin;

use http::{Request, Response, StatusCode};
use kube::{Client, client::Body};
use serde_json::{Value, json};
use synthex_operator::{
    api::{Decision, OptimizationRollout, RolloutStatus},
    decision::snapshot::Verb,
    effects::{Error, report},
};

/// One call that is expected, and the answer to it.
struct Exchange {
    method: &'static str,
    path: &'static str,
    /// JSON pointers into the body and what must stand there.
    sent: Vec<(&'static str, Value)>,
    answer: (StatusCode, Value),
}

const OBJECT: &str = "/apis/synthex.io/v1alpha1/namespaces/shop/optimizationrollouts/experts";
const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/shop/events";

fn object() -> OptimizationRollout {
    serde_json::from_value(json!({
        "apiVersion": "synthex.io/v1alpha1",
        "kind": "OptimizationRollout",
        "metadata": {
            "name": "experts", "namespace": "shop", "uid": "0a1b2c3d-0000-0000-0000-000000000000", "resourceVersion": "7",
            "finalizers": ["others/finalizer"]
        },
        "spec": { "workload": { "runtime": { "config": {} } } },
    }))
    .unwrap()
}

fn decision() -> Decision {
    serde_json::from_value(json!({
        "id": 4, "time": "2026-01-02T03:04:05Z", "what": "OptimizationRolledBack", "why": "é".repeat(2000)
    }))
    .unwrap()
}

fn refusal(status: StatusCode, reason: &str) -> (StatusCode, Value) {
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": reason, "reason": reason, "code": status.as_u16()
    });
    (status, body)
}

/// Runs `call` against an API server that expects exactly one exchange.
async fn run<T>(exchange: Exchange, call: impl AsyncFnOnce(Client) -> T) -> T {
    let (service, handle) = tower_test::mock::pair::<Request<Body>, Response<Body>>();
    let server = tokio::spawn(async move {
        let mut handle = pin!(handle);
        let (request, respond) = handle.next_request().await.expect("a call");
        assert_eq!((request.method().as_str(), request.uri().path()), (exchange.method, exchange.path));
        let body: Value =
            serde_json::from_slice(&request.into_body().collect_bytes().await.unwrap()).unwrap();
        for (pointer, wanted) in exchange.sent {
            assert_eq!(body.pointer(pointer), Some(&wanted), "{pointer} in {body}");
        }
        let (status, body) = exchange.answer;
        respond.send_response(
            Response::builder().status(status).body(Body::from(body.to_string().into_bytes())).unwrap(),
        );
        assert!(handle.next_request().await.is_none(), "one call is wanted, and no more");
    });
    let result = call(Client::new(service, "shop")).await;
    server.await.unwrap();
    result
}

#[tokio::test]
async fn a_status_is_written_only_over_the_version_that_was_read() {
    let exchange = Exchange {
        method: "PUT",
        path: "/apis/synthex.io/v1alpha1/namespaces/shop/optimizationrollouts/experts/status",
        sent: vec![("/metadata/resourceVersion", json!("7"))],
        answer: refusal(StatusCode::CONFLICT, "Conflict"),
    };
    let result = run(exchange, async |client| {
        report::write_status(&client, &object(), RolloutStatus::default()).await
    })
    .await;
    assert!(result.as_ref().is_err_and(Error::is_conflict), "{result:?}");
}

#[tokio::test]
async fn an_event_is_named_by_its_decision_and_an_event_that_is_there_is_no_error() {
    let exchange = Exchange {
        method: "POST",
        path: EVENTS,
        sent: vec![
            ("/metadata/name", json!("experts.0a1b2c3d.4")),
            ("/reason", json!("OptimizationRolledBack")),
            ("/type", json!("Warning")),
            // 1,024 bytes at most, cut between characters.
            ("/note", json!(format!("{}…", "é".repeat(510)))),
        ],
        answer: refusal(StatusCode::CONFLICT, "AlreadyExists"),
    };
    run(exchange, async |client| report::announce(&client, &object(), &decision()).await).await.unwrap();
}

#[tokio::test]
async fn an_event_that_is_refused_is_an_error() {
    let exchange = Exchange {
        method: "POST",
        path: EVENTS,
        sent: vec![],
        answer: refusal(StatusCode::FORBIDDEN, "Forbidden"),
    };
    let result = run(exchange, async |client| report::announce(&client, &object(), &decision()).await).await;
    assert_eq!(result.unwrap_err().kind(), "api");
}

#[tokio::test]
async fn the_finalizer_leaves_others_and_guards_against_a_race() {
    for (wanted, list) in
        [(true, json!(["others/finalizer", report::FINALIZER])), (false, json!(["others/finalizer"]))]
    {
        let exchange = Exchange {
            method: "PATCH",
            path: OBJECT,
            sent: vec![("/metadata/finalizers", list), ("/metadata/resourceVersion", json!("7"))],
            answer: (StatusCode::OK, serde_json::to_value(object()).unwrap()),
        };
        run(exchange, async |client| report::finalizer(&client, &object(), wanted).await).await.unwrap();
    }
}

#[tokio::test]
async fn an_answered_verb_is_removed_unless_the_user_has_put_another() {
    let answers = [
        (StatusCode::OK, serde_json::to_value(object()).unwrap()),
        refusal(StatusCode::UNPROCESSABLE_ENTITY, "Invalid"),
    ];
    for answer in answers {
        let path = json!("/metadata/annotations/synthex.io~1abort");
        let exchange = Exchange {
            method: "PATCH",
            path: OBJECT,
            sent: vec![
                ("/0", json!({ "op": "test", "path": path, "value": "canary" })),
                ("/1", json!({ "op": "remove", "path": path })),
            ],
            answer,
        };
        let mut object = object();
        object.metadata.annotations = Some([("synthex.io/abort".into(), "canary".into())].into());
        let verbs = [Verb::Abort("canary".into())];
        run(exchange, async |client| report::answer(&client, &object, &verbs).await).await.unwrap();
    }
}
