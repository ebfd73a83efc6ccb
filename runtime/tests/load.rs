//! The load generator: an open loop that counts everything.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests, helpers too")]

mod common;

use std::{sync::Mutex, time::Duration};

use common::{config, instant, mocks, start};
use serde_json::Value;
use synthex_runtime::load::run::{Arrivals, Connection, Plan, Totals, run};
use tokio::net::TcpListener;

fn plan(target: std::net::SocketAddr) -> Plan {
    Plan {
        targets: vec![format!("http://{target}").parse().unwrap()],
        rate: 200.0,
        wait: Duration::ZERO,
        arrivals: Arrivals::Uniform,
        duration: Some(Duration::from_millis(500)),
        timeout: Duration::from_secs(2),
        connection: Connection::Fresh,
        distinct: 10,
        size: 100,
        seed: 1,
    }
}

async fn last_line(plan: Plan) -> Value {
    let lines = Mutex::new(Vec::new());
    run(plan, Totals::default(), std::future::pending(), |line| lines.lock().unwrap().push(line))
        .await
        .unwrap();
    let last = lines.into_inner().unwrap().pop().unwrap();
    let last: Value = serde_json::from_str(&last).unwrap();
    assert_eq!(last["final"], true);
    last
}

#[tokio::test]
async fn every_planned_query_is_sent_and_counted() {
    let running = start(&config(mocks(instant()).await, |_| {})).await;
    for connection in [Connection::Fresh, Connection::Reuse] {
        for arrivals in [Arrivals::Uniform, Arrivals::Poisson] {
            let last = last_line(Plan { connection, arrivals, ..plan(running.serving) }).await;
            let sent = last["sent"].as_u64().unwrap();
            assert!((70..=140).contains(&sent), "{last}");
            assert_eq!(last["ok"], sent);
            assert_eq!((&last["failed"], &last["dropped"]), (&0.into(), &0.into()));
            assert_eq!(last["byInstance"]["test-pod"]["ok"], sent);
            assert!(last["p50Ms"].as_f64().unwrap() > 0.0);
            assert_eq!(last["target"], format!("http://{}", running.serving));
        }
    }
}

#[tokio::test]
async fn a_target_that_is_away_fails_every_query() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let last = last_line(plan(closed)).await;
    assert_eq!(last["ok"], 0);
    assert_eq!(last["failed"], last["sent"]);
    assert_eq!(last["byInstance"]["-"]["failed"], last["sent"]);
}

/// A target that accepts and says nothing: arrivals go on, and the bound holds.
#[tokio::test]
async fn a_target_that_hangs_stops_no_arrivals() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hangs = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    let last = last_line(Plan { timeout: Duration::from_millis(100), rate: 1000.0, ..plan(hangs) }).await;
    let count = |name: &str| last[name].as_u64().unwrap();
    assert!((490..=510).contains(&(count("sent") + count("dropped"))), "{last}");
    assert_eq!(count("failed"), count("sent"));
    assert!((90.0..=200.0).contains(&last["p50Ms"].as_f64().unwrap()), "{last}");
}

/// A target that is not there yet is waited for, and no query fails for it.
#[tokio::test]
async fn a_target_that_comes_late_is_waited_for() {
    let running = start(&config(mocks(instant()).await, |_| {})).await;
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let late = async {
        // Whether the first attempt finds nobody or somebody, none may fail.
        tokio::task::yield_now().await;
        let listener = TcpListener::bind(address).await.unwrap();
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = tokio::net::TcpStream::connect(running.serving).await.unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut near, &mut far).await });
        }
    };
    let last = tokio::select! {
        last = last_line(Plan { wait: Duration::from_secs(10), ..plan(address) }) => last,
        () = late => unreachable!(),
    };
    assert_eq!((&last["failed"], &last["ok"]), (&0.into(), &last["sent"]), "{last}");
}
