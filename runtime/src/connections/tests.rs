use std::{collections::HashSet, future::Future};

use futures::future::join_all;
use rcgen::CertifiedKey;
use rustls::{ServerConfig, crypto::aws_lc_rs, pki_types::PrivateKeyDer};
use serde_json::{Value, json};
use tokio::{io::copy_bidirectional, net::TcpListener, net::TcpStream};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::{
    load::experts::{Behaviour, serve},
    metrics::Metrics,
};

async fn mock() -> Address {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let latency = Duration::from_millis(2);
    tokio::spawn(serve(listener, Behaviour { latency, ..Behaviour::default() }));
    Address { host: "127.0.0.1".to_owned(), port, tls: false }
}

fn request() -> Request<Full<Bytes>> {
    Request::post("/path").header("host", "mock").body(Full::new(Bytes::from_static(b"{}"))).expect("valid")
}

/// Routes to services `s0`, `s1` and so on; `unified` is `null` for the baseline.
fn ways(
    addresses: &[Address],
    unified: Value,
    old: &[Route],
    ca_file: Option<&str>,
) -> Result<Vec<Route>, config::Error> {
    let experts: Vec<Value> =
        (0..addresses.len()).map(|i| json!({"name": format!("s{i}"), "url": "http://unused"})).collect();
    let mut file = json!({"experts": experts, "tls": {"caFile": ca_file}});
    if !unified.is_null() {
        file["optimizations"] = json!({"connections": {"unified": unified}});
        file["optimizations"]["connections"]["unified"]["enabled"] = true.into();
    }
    let config = Config::parse(file.to_string().as_bytes()).expect("valid");
    let targets = addresses.iter().enumerate();
    let targets = targets.map(|(i, address)| Target { name: format!("s{i}"), address: address.clone() });
    routes(&config, &targets.collect::<Vec<_>>(), &old.iter().collect::<Vec<_>>())
}

fn service() -> Service {
    Metrics::new(None).service("mock")
}

fn pools(routes: &[Route]) -> HashSet<*const Pool> {
    routes.iter().flat_map(Route::pools).map(Arc::as_ptr).collect()
}

fn first(route: &Route) -> &Arc<Pool> {
    route.pools().next().expect("every route has a pool")
}

fn held(host: &Host) -> usize {
    let open = host.lock();
    open.idle.len() + open.shared.len()
}

fn idle(pool: &Pool) -> usize {
    pool.hosts.iter().map(|host| host.lock().idle.len()).sum()
}

async fn until(holds: impl Fn() -> bool) {
    while !holds() {
        tokio::task::yield_now().await;
    }
}

async fn sent(route: &Route, service: &Service) {
    let answer = route.send(request(), service).await.expect("answered");
    assert!(answer.status.is_success() && answer.body.starts_with(b"{"));
}

#[tokio::test]
async fn neither_total_nor_per_host_is_exceeded() {
    for http2 in ["never", "priorKnowledge"] {
        for (per_host, total) in [(1, 1), (1, 2), (2, 3), (4, 4), (30, 100)] {
            let unified =
                json!({"perHost": per_host, "total": total, "http2": http2, "acquireTimeout": "10s"});
            let addresses = [mock().await, mock().await, mock().await];
            let routes = ways(&addresses, unified, &[], None).expect("no file");
            let service = service();
            let pool = first(&routes[0]).clone();
            join_all((0..90).map(|i| {
                let (route, service, pool) = (&routes[i % 3], &service, &pool);
                async move {
                    sent(route, service).await;
                    assert!(pool.open.load(Ordering::Relaxed) <= total);
                    assert!(pool.hosts.iter().all(|h| held(h) <= per_host));
                }
            }))
            .await;
            let kept: usize = pool.hosts.iter().map(held).sum();
            assert_eq!(pool.open.load(Ordering::Relaxed), kept);
            assert!(kept > 0 && pool.total.as_ref().is_some_and(|slots| slots.available_permits() == total));
            pool.retire();
            assert_eq!(pool.open.load(Ordering::Relaxed), 0);
            // A retired pool still serves who holds it, and keeps nothing.
            sent(&routes[0], &service).await;
            assert_eq!(pool.open.load(Ordering::Relaxed), 0);
        }
    }
}

#[tokio::test]
async fn many_requests_share_one_http2_connection() {
    let address = mock().await;
    let routes = ways(&[address], json!({"http2": "priorKnowledge"}), &[], None).expect("no file");
    let service = service();
    join_all((0..MAX_STREAMS).map(|_| sent(&routes[0], &service))).await;
    assert_eq!(service.opened.get(), 1, "those who came while it was opened waited for it");
    // One more than it carries opens another.
    join_all((0..=MAX_STREAMS).map(|_| sent(&routes[0], &service))).await;
    assert_eq!(service.opened.get(), 2);
    let host = &first(&routes[0]).hosts[0];
    assert!(host.lock().shared.iter().all(|shared| shared.streams == 0 && shared.slots.is_none()));
    // A caller that gives up leaves the connection to the others.
    let gone = tokio::time::timeout(Duration::from_micros(200), sent(&routes[0], &service)).await;
    assert!(gone.is_err());
    assert!(host.lock().shared.iter().all(|shared| shared.streams == 0));
    sent(&routes[0], &service).await;
    assert_eq!(service.opened.get(), 2);
}

#[tokio::test]
async fn a_body_puts_its_connection_back_at_its_end_only() {
    let routes = ways(&[mock().await], Value::Null, &[], None).expect("no file");
    let (service, pool) = (service(), first(&routes[0]));
    let response = routes[0].open(request(), &service).await.expect("answered");
    assert_eq!(idle(pool), 0, "the body is still on its way");
    let whole = response.into_body().collect().await.expect("read").to_bytes();
    assert!(whole.starts_with(b"{"));
    assert_eq!(idle(pool), 1);
    drop(routes[0].open(request(), &service).await.expect("answered"));
    assert_eq!((idle(pool), service.opened.get()), (0, 1), "an answer that is not read to its end");
}

#[tokio::test]
async fn services_migrate_one_by_one_and_by_percent() {
    let (one, two) = (mock().await, mock().await);
    let addresses = [one.clone(), two, one];
    let own = ways(&addresses, Value::Null, &[], None).expect("no file");
    assert_eq!(pools(&own).len(), 3, "a pool per expert, also for equal addresses");
    let all = ways(&addresses, json!({}), &own, None).expect("no file");
    assert_eq!(pools(&all).len(), 1);
    assert_eq!(first(&all[0]).hosts.len(), 2, "equal addresses share a host");
    let some = ways(&addresses, json!({"services": ["s1"]}), &own, None).expect("no file");
    assert_eq!(pools(&some).intersection(&pools(&own)).count(), 2, "who does not migrate keeps the pool");
    let none = ways(&addresses, json!({"percent": 0}), &own, None).expect("no file");
    assert_eq!(pools(&none), pools(&own));

    for percent in [1, 25, 50, 99] {
        let half = ways(&addresses, json!({"percent": percent}), &own, None).expect("no file");
        assert_eq!(pools(&half).len(), 4);
        let unified = (0..1000).filter(|_| half[0].way().1 == Manager::Unified).count();
        assert_eq!(unified, 10 * percent);
        sent(&half[0], &service()).await;
    }
    // Something else changes: the same pools go on.
    let again = ways(&addresses, json!({}), &all, None).expect("no file");
    assert_eq!(pools(&again), pools(&all));
    let other = ways(&addresses, json!({"perHost": 7}), &all, None).expect("no file");
    assert!(pools(&other).is_disjoint(&pools(&all)));
}

#[tokio::test]
async fn connections_end_with_their_time() {
    for (unified, over) in [
        (json!({"keepAlive": "20ms"}), true),
        (json!({"keepAlive": "20ms", "http2": "priorKnowledge"}), true),
        (json!({"maxAge": "20ms"}), true),
        (json!({"maxAge": "20ms", "http2": "priorKnowledge"}), true),
        (json!({}), false),
    ] {
        let routes = ways(&[mock().await], unified.clone(), &[], None).expect("no file");
        let (service, pool) = (service(), first(&routes[0]));
        sent(&routes[0], &service).await;
        if over {
            until(|| {
                pool.sweep();
                pool.open.load(Ordering::Relaxed) == 0
            })
            .await;
        }
        sent(&routes[0], &service).await;
        assert_eq!(service.opened.get(), 1 + u64::from(over), "{unified}");
    }
}

#[tokio::test]
async fn addresses_are_remembered_and_asked_for_again() {
    let mut address = mock().await;
    address.host = "localhost".to_owned();
    for (unified, lookups) in [
        (Value::Null, 3),
        (json!({"dnsTtl": "0s"}), 3),
        (json!({"dnsTtl": "5m"}), 1),
        (json!({"dnsTtl": "1ns"}), 3),
    ] {
        let routes = ways(std::slice::from_ref(&address), unified.clone(), &[], None).expect("no file");
        let service = service();
        for _ in 0..3 {
            sent(&routes[0], &service).await;
            // Makes the next one open a connection.
            first(&routes[0]).hosts[0].lock().idle.clear();
        }
        assert_eq!((service.lookups.get(), service.opened.get()), (lookups, 3), "{unified}");
    }
    // What is remembered does not accept any more: the system is asked again.
    let routes = ways(std::slice::from_ref(&address), json!({"dnsTtl": "5m"}), &[], None).expect("no file");
    let service = service();
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("bound");
    routes[0].way().0.host().known.remember(vec![closed]).await;
    sent(&routes[0], &service).await;
    assert_eq!(service.lookups.get(), 1);
}

/// TLS in front of a mock, which offers the protocols of `alpn`; and the file of the authority.
async fn behind_tls(alpn: &[&[u8]]) -> (Address, tempfile::TempDir, String) {
    let CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("made");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("ca.pem");
    std::fs::write(&file, cert.pem()).expect("written");
    let builder = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
    let builder =
        builder.with_safe_default_protocol_versions().expect("known versions").with_no_client_auth();
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).expect("a key");
    let mut tls = builder.with_single_cert(vec![cert.der().clone()], key).expect("they fit");
    tls.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let plain = mock().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let (acceptor, far) = (acceptor.clone(), TcpStream::connect(("127.0.0.1", plain.port)));
            tokio::spawn(async move {
                let (Ok(mut near), Ok(mut far)) = (acceptor.accept(near).await, far.await) else { return };
                let _ = copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
    let file = file.display().to_string();
    (Address { host: "localhost".to_owned(), port, tls: true }, folder, file)
}

#[tokio::test]
async fn tls_agrees_on_the_protocol() {
    for (alpn, unified, one_for_all) in [
        (&[&b"h2"[..], b"http/1.1"][..], json!({}), true),
        (&[b"h2", b"http/1.1"], json!({"http2": "never"}), false),
        (&[b"h2", b"http/1.1"], Value::Null, false),
        (&[b"http/1.1"], json!({}), false),
        (&[], json!({}), false),
    ] {
        let (address, _folder, file) = behind_tls(alpn).await;
        let routes = ways(&[address], unified.clone(), &[], Some(&file)).expect("a good file");
        let service = service();
        join_all((0..10).map(|_| sent(&routes[0], &service))).await;
        let opened = service.opened.get();
        assert_eq!(opened == 1, one_for_all, "{unified}: {opened}");
        sent(&routes[0], &service).await;
        assert_eq!(service.opened.get(), opened, "{unified}");
    }
}

async fn fails(sending: impl Future<Output = Result<Answer, Error>>) -> String {
    match sending.await {
        Ok(answer) => panic!("answered {}", answer.status),
        Err(error) => error.to_string(),
    }
}

#[tokio::test]
async fn nobody_unknown_is_trusted() {
    let (address, _folder, file) = behind_tls(&[b"h2"]).await;
    let service = service();
    let stranger = ways(std::slice::from_ref(&address), json!({}), &[], None).expect("no file");
    let error = fails(stranger[0].send(request(), &service)).await;
    assert!(error.contains("UnknownIssuer"), "{error}");
    let wrong_name = Address { host: "127.0.0.1".to_owned(), ..address.clone() };
    let routes = ways(&[wrong_name], json!({}), &[], Some(&file)).expect("a good file");
    let error = fails(routes[0].send(request(), &service)).await;
    assert!(error.contains("not valid for name"), "{error}");
    assert_eq!(service.opened.get(), 0);
}

#[tokio::test]
async fn a_bad_file_of_authorities_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("empty"), "").expect("written");
    std::fs::write(path("broken"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .expect("written");
    let address = Address { host: "localhost".to_owned(), port: 1, tls: true };
    for (name, words) in [("missing", "No such file"), ("empty", "no certificate"), ("broken", "ertificate")]
    {
        let error = ways(std::slice::from_ref(&address), json!({}), &[], Some(&path(name)))
            .expect_err(name)
            .to_string();
        assert!(error.starts_with("tls.caFile: ") && error.contains(words), "{error}");
    }
    // Nobody speaks TLS: nobody reads it.
    ways(&[Address { tls: false, ..address }], json!({}), &[], Some(&path("missing"))).expect("not needed");
}
