//! Every odd answer of Prometheus, and of what may stand before it, has a named outcome.

#![allow(clippy::unwrap_used)] // In helpers of tests too, which Clippy does not take for tests.

use std::time::{Duration, Instant};

use synthex_operator::{
    decision::judge::{Answer, Series},
    effects::prometheus::Prometheus,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use wiremock::{Mock, MockServer, ResponseTemplate, matchers};

const JSON: &str = "application/json";
const QUERY: &str = r#"requests_total{namespace="shop"}"#;

async fn served(template: ResponseTemplate) -> MockServer {
    let server = MockServer::start().await;
    Mock::given(matchers::method("POST"))
        .and(matchers::path("/api/v1/query_range"))
        .respond_with(template)
        .mount(&server)
        .await;
    server
}

async fn asked(template: ResponseTemplate) -> Answer {
    let server = served(template).await;
    client(&server.uri()).range(QUERY, 60, 120, 15).await
}

fn client(url: &str) -> Prometheus {
    Prometheus::new(url, Duration::from_secs(5)).unwrap()
}

fn json(body: &str) -> ResponseTemplate {
    // set_body_string would force text/plain.
    ResponseTemplate::new(200).set_body_raw(body, JSON)
}

fn matrix(result: &str) -> ResponseTemplate {
    json(&format!(r#"{{"status":"success","data":{{"resultType":"matrix","result":{result}}}}}"#))
}

fn series(answer: Answer) -> Vec<Series> {
    match answer {
        Answer::Series(series) => series,
        odd => panic!("not series: {odd:?}"),
    }
}

/// The message of a malformed answer, which must quote the query.
fn malformed(answer: Answer) -> String {
    match answer {
        Answer::Malformed(why) => {
            assert!(why.contains(QUERY), "does not quote the query: {why}");
            why
        }
        odd => panic!("not malformed: {odd:?}"),
    }
}

fn down(answer: Answer) -> String {
    match answer {
        Answer::Down(why) => why,
        odd => panic!("not down: {odd:?}"),
    }
}

#[tokio::test]
async fn a_matrix_is_read_as_sorted_series() {
    let server = served(matrix(
        r#"[{"metric":{"__name__":"requests_total","pod":"b","instance":"2","job":"j","code":"a\"b"},"values":[[60,"1"],[75.000,"2.5"]]},
            {"metric":{"pod":"a"},"values":[[120,"1e3"]]},
            {"metric":{},"values":[]}]"#,
    ))
    .await;
    let read = series(client(&server.uri()).range(QUERY, 60, 120, 15).await);
    let seen: Vec<_> = read
        .iter()
        .map(|s| (s.pod.as_str(), s.instance.as_str(), s.job.as_str(), s.points.clone()))
        .collect();
    assert_eq!(
        seen,
        [
            ("", "", "", vec![]),
            ("a", "", "", vec![(120, 1000.0)]),
            ("b", "2", "j", vec![(60, 1.0), (75, 2.5)])
        ]
    );
    assert_eq!(read[2].labels, r#"{__name__="requests_total",code="a\"b",instance="2",job="j",pod="b"}"#);
    let requests = server.received_requests().await.unwrap();
    assert_eq!(
        String::from_utf8(requests[0].body.clone()).unwrap(),
        "query=requests_total%7Bnamespace%3D%22shop%22%7D&start=60&end=120&step=15&timeout=5000ms"
    );
}

#[tokio::test]
async fn how_long_a_sample_stands_is_said() {
    let server = served(matrix("[]")).await;
    assert_eq!(series(client(&server.uri()).range_within(QUERY, 60, 120, 15, Some(30)).await), []);
    let requests = server.received_requests().await.unwrap();
    let body = String::from_utf8(requests[0].body.clone()).unwrap();
    assert!(body.ends_with("&lookback_delta=30s"), "{body}");
}

#[tokio::test]
async fn what_is_quoted_of_an_odd_answer_is_short() {
    let answer = json(&format!(r#"{{"status":"{}"}}"#, "text ".repeat(100_000)));
    assert!(malformed(asked(answer).await).len() < 1000);
}

#[tokio::test]
async fn native_histograms_of_ever_new_buckets_are_refused() {
    // Each sample is small, and all have other buckets: as classic buckets they would be 5,001 series of 1,000 samples each.
    let sample = |tick: usize| {
        let bucket = |n: usize| format!(r#"[0,"0","{}.5","1"]"#, 5 * tick + n);
        let buckets: Vec<_> = (0..5).map(bucket).collect();
        format!(r#"[{},{{"count":"5","sum":"1","buckets":[{}]}}]"#, 15 * tick, buckets.join(","))
    };
    let samples: Vec<_> = (0..1000).map(sample).collect();
    let answer = matrix(&format!(r#"[{{"metric":{{"pod":"a"}},"histograms":[{}]}}]"#, samples.join(",")));
    let server = served(answer).await;
    let why = malformed(client(&server.uri()).range(QUERY, 0, 999 * 15, 15).await);
    assert!(why.contains("more than 4000000 buckets in all their samples"), "{why}");
}

#[tokio::test]
async fn no_series_is_an_answer() {
    assert_eq!(series(asked(matrix("[]")).await), []);
}

#[tokio::test]
async fn nan_and_infinities_are_read_as_they_are() {
    let read = series(
        asked(matrix(r#"[{"metric":{"pod":"a"},"values":[[60,"NaN"],[75,"+Inf"],[90,"-Inf"],[105,"0"]]}]"#))
            .await,
    );
    let values: Vec<f64> = read[0].points.iter().map(|(_, value)| *value).collect();
    assert!(values[0].is_nan());
    assert_eq!(values[1..], [f64::INFINITY, f64::NEG_INFINITY, 0.0]);
}

#[tokio::test]
async fn native_histograms_are_read_as_the_buckets_of_classic_ones() {
    // The second sample has values in a bucket that the first had none in.
    let answer = matrix(
        r#"[{"metric":{"pod":"a"},"histograms":[
            [60,{"count":"10","sum":"3","buckets":[[0,"0.25","0.5","4"],[0,"0.5","1","6"]]}],
            [75,{"count":"15","sum":"9","buckets":[[0,"0.125","0.25","1"],[0,"0.25","0.5","5"],[0,"0.5","1","9"]]}]
        ]}]"#,
    );
    let mut found = series(asked(answer).await);
    found.sort_by(|a, b| {
        let le = |series: &Series| series.bucket.as_ref().unwrap().le;
        le(a).total_cmp(&le(b))
    });
    let found: Vec<_> = found
        .iter()
        .map(|series| {
            let bucket = series.bucket.as_ref().unwrap();
            assert!(bucket.native && bucket.histogram == r#"{pod="a"}"# && series.pod == "a", "{series:?}");
            (bucket.text.as_str(), series.points.clone())
        })
        .collect();
    assert_eq!(
        found,
        [
            ("0.25", vec![(60, 0.0), (75, 1.0)]),
            ("0.5", vec![(60, 4.0), (75, 6.0)]),
            ("1", vec![(60, 10.0), (75, 15.0)]),
            ("+Inf", vec![(60, 10.0), (75, 15.0)]),
        ]
    );
}

#[tokio::test]
async fn a_time_that_is_seen_twice_counts_once() {
    let read =
        series(asked(matrix(r#"[{"metric":{"pod":"a"},"values":[[60,"1"],[60,"7"],[75,"2"]]}]"#)).await);
    assert_eq!(read[0].points, [(60, 1.0), (75, 2.0)]);
}

#[tokio::test]
async fn a_content_type_that_a_proxy_rewrote_is_no_matter() {
    let body = r#"{"status":"success","data":{"result":[],"resultType":"matrix"}}"#;
    let template = ResponseTemplate::new(200).set_body_raw(body, "text/plain");
    assert_eq!(series(asked(template).await), []);
}

#[tokio::test]
async fn remarks_on_style_are_passed_over() {
    let body = r#"{"status":"success","data":{"resultType":"matrix","result":[]},"infos":["PromQL info: x"],
        "warnings":["PromQL info: metric might not be a counter, name does not end in _total/_sum/_count"]}"#;
    assert_eq!(series(asked(json(body)).await), []);
}

#[tokio::test]
async fn odd_answers_are_malformed() {
    let data = |kind: &str, result: &str| {
        json(&format!(r#"{{"status":"success","data":{{"resultType":"{kind}","result":{result}}}}}"#))
    };
    let error = |status: u16, kind: &str, error: &str| {
        let body = format!(r#"{{"status":"error","errorType":"{kind}","error":"{error}"}}"#);
        ResponseTemplate::new(status).set_body_raw(body, JSON)
    };
    let many = format!("[{}]", vec![r#"{"metric":{},"values":[]}"#; 50_001].join(","));
    let cases = [
        ("a string", data("string", r#"[60,"up"]"#), "is a string"),
        ("a scalar", data("scalar", r#"[60,"1"]"#), "is a scalar"),
        ("a vector", data("vector", r#"[{"metric":{},"value":[60,"1"]}]"#), "is an instant vector"),
        ("another kind", data("table", "[]"), "unknown variant `table`"),
        ("no data", json(r#"{"status":"success"}"#), "holds no data"),
        ("another API", json(r#"{"kind":"Status","apiVersion":"v1"}"#), "is not the JSON of Prometheus"),
        (
            "a number as value",
            matrix(r#"[{"metric":{},"values":[[60,1]]}]"#),
            "is not the JSON of Prometheus",
        ),
        ("a word as value", matrix(r#"[{"metric":{},"values":[[60,"ten"]]}]"#), r#""ten" is no number"#),
        ("no result", matrix("null"), "is not the JSON of Prometheus"),
        (
            "a native histogram off the grid",
            matrix(r#"[{"metric":{},"histograms":[[61,{"count":"1"}]]}]"#),
            "a sample at 61",
        ),
        (
            "a native histogram without a count",
            matrix(r#"[{"metric":{},"histograms":[[60,{"sum":"1"}]]}]"#),
            "is not the JSON of Prometheus",
        ),
        ("a time off the grid", matrix(r#"[{"metric":{},"values":[[61,"1"]]}]"#), "a sample at 61"),
        ("a time between seconds", matrix(r#"[{"metric":{},"values":[[60.5,"1"]]}]"#), "a sample at 60.5"),
        ("a time outside", matrix(r#"[{"metric":{},"values":[[135,"1"]]}]"#), "a sample at 135"),
        ("a huge time", matrix(r#"[{"metric":{},"values":[[1e300,"1"]]}]"#), "not asked for"),
        ("falling times", matrix(r#"[{"metric":{},"values":[[75,"1"],[60,"1"]]}]"#), "out of order"),
        (
            "one series twice",
            matrix(r#"[{"metric":{"pod":"a"},"values":[]},{"metric":{"pod":"a"},"values":[]}]"#),
            "twice",
        ),
        (
            "a series of two replicas",
            matrix(
                r#"[{"metric":{"pod":"a","prometheus_replica":"0"},"values":[]},{"metric":{"pod":"a","prometheus_replica":"1"},"values":[]}]"#,
            ),
            "deduplicate",
        ),
        ("too many series", matrix(&many), "50001 series"),
        (
            "a part of the samples",
            json(r#"{"status":"success","isPartial":true,"data":{"resultType":"matrix","result":[]}}"#),
            "is partial",
        ),
        (
            "a warning",
            json(
                r#"{"status":"success","data":{"resultType":"matrix","result":[]},"warnings":["store 2 is away\u0007"]}"#,
            ),
            "may be incomplete, since Prometheus warns: store 2 is away;",
        ),
        ("bad PromQL", error(400, "bad_data", "parse error: unexpected end"), "parse error: unexpected end"),
        ("many-to-many", error(422, "execution", "many-to-many matching"), "many-to-many matching"),
        ("an error in a 200", error(200, "bad_data", "parse error"), "parse error"),
        (
            "truncated JSON",
            json(r#"{"status":"success","data":{"resultType":"matrix","result":[{"metr"#),
            "EOF",
        ),
        (
            "HTML",
            ResponseTemplate::new(200).set_body_raw("<html>Please log in</html>", "text/html"),
            "is this the address of Prometheus itself?",
        ),
        ("nothing", json(""), "is not the JSON of Prometheus"),
    ];
    for (name, template, expected) in cases {
        let why = malformed(asked(template).await);
        assert!(why.contains(expected), "{name}: {why}");
    }
}

#[tokio::test]
async fn a_server_that_is_unwell_is_down() {
    let error = |status: u16, kind: &str, error: &str| {
        let body = format!(r#"{{"status":"error","errorType":"{kind}","error":"{error}"}}"#);
        ResponseTemplate::new(status).set_body_raw(body, JSON)
    };
    let status = ResponseTemplate::new;
    let cases = [
        (status(400).set_body_raw("400 Bad Request", "text/html"), "answers with 400 Bad Request"),
        (status(401), "a user and a password"),
        (status(403), "a user and a password"),
        (status(404), "the address of Prometheus itself"),
        (status(302).insert_header("location", "http://elsewhere/"), "give the final address"),
        (status(429), "429 Too Many Requests"),
        (status(500), "500 Internal Server Error"),
        (status(503), "503 Service Unavailable"),
        (status(503).set_body_raw(r#"{"status":"success"}"#, JSON), "503 Service Unavailable"),
        (error(503, "timeout", "query timed out in expression evaluation"), "query timed out"),
        (
            error(503, "unavailable", "starting"),
            "answers with unavailable (503 Service Unavailable): starting",
        ),
        (error(500, "internal", "disk"), "disk"),
        (error(200, "timeout", "too slow"), "too slow"),
        (json(r#"{"status":"error"}"#), "without a reason"),
    ];
    for (template, expected) in cases {
        let why = down(asked(template).await);
        assert!(why.contains(expected), "{expected}: {why}");
    }
}

#[tokio::test]
async fn a_server_that_takes_too_long_is_down() {
    let server = served(matrix("[]").set_delay(Duration::from_secs(60))).await;
    let client = Prometheus::new(&server.uri(), Duration::from_millis(100)).unwrap();
    let why = down(client.range(QUERY, 60, 120, 15).await);
    assert!(why.contains("did not answer within 100ms") && why.contains(QUERY), "{why}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_down_and_its_password_is_not_shown() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let url = format!("http://user:secret@127.0.0.1:{port}/prefix/?token=secret#secret");
    let why = down(client(&url).range(QUERY, 60, 120, 15).await);
    assert!(why.starts_with(&format!("http://127.0.0.1:{port}/prefix cannot be reached: ")), "{why}");
    assert!(why.contains("onnection refused") && !why.contains("secret") && !why.contains("user"), "{why}");
}

#[tokio::test]
async fn a_password_and_a_prefix_are_used() {
    let server = MockServer::start().await;
    Mock::given(matchers::method("POST"))
        .and(matchers::path("/prefix/api/v1/query_range"))
        .and(matchers::basic_auth("user", "secret"))
        .respond_with(matrix("[]"))
        .mount(&server)
        .await;
    let url = server.uri().replace("http://", "http://user:secret@") + "/prefix/";
    assert_eq!(series(client(&url).range(QUERY, 60, 120, 15).await), []);
}

/// Serves one connection: a head, then the same bytes as long as they are taken. Gives the number of bytes that were.
async fn endless(
    head: &'static str,
    bytes: &'static [u8],
    limit: usize,
) -> (String, tokio::task::JoinHandle<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let served = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = [0; 4096];
        let _ = stream.read(&mut request).await;
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut sent = 0;
        while sent < limit && stream.write_all(bytes).await.is_ok() {
            sent += bytes.len();
        }
        sent
    });
    (url, served)
}

#[tokio::test]
async fn a_huge_answer_is_not_read_to_its_end() {
    static BLOCK: [u8; 65536] = [b' '; 65536];
    // Without a length in the head the size is known only once it is read.
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n";
    let (url, served) = endless(head, &BLOCK, 50 << 20).await;
    let why = malformed(client(&url).range(QUERY, 60, 60, 15).await);
    assert!(why.contains("larger than 8 MiB"), "{why}");
    let sent = served.await.unwrap();
    assert!(sent < 32 << 20, "{sent} bytes were taken");
}

#[tokio::test]
async fn an_answer_that_says_it_is_huge_is_not_read_at_all() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 52428800\r\n\r\n";
    let (url, _served) = endless(head, b" ", 1).await;
    let start = Instant::now();
    let why = malformed(client(&url).range(QUERY, 60, 60, 15).await);
    assert!(why.contains("larger than 8 MiB"), "{why}");
    assert!(start.elapsed() < Duration::from_secs(4), "waited for the body");
}

/// Answers a range with a sample per tick of a series, and with megabytes where it has more ticks than it may.
struct Long {
    most: i64,
}

impl wiremock::Respond for Long {
    fn respond(&self, request: &wiremock::Request) -> ResponseTemplate {
        let body = std::str::from_utf8(&request.body).unwrap();
        let url = reqwest::Url::parse(&format!("http://x/?{body}")).unwrap();
        let number = |name: &str| {
            let value = url.query_pairs().find(|(key, _)| key == name).unwrap().1.into_owned();
            value.parse::<f64>().unwrap() as i64
        };
        let (start, end, step) = (number("start"), number("end"), number("step"));
        if (end - start) / step + 1 > self.most {
            return json(&" ".repeat(9 << 20));
        }
        let ticks = (start..=end).step_by(step as usize);
        let values = |from: i64| {
            let values: Vec<_> = ticks
                .clone()
                .filter(|tick| *tick >= from)
                .map(|tick| format!("[{tick},\"{tick}\"]"))
                .collect();
            values.join(",")
        };
        // One series is there from the first tick on, one from the middle.
        let mut result = format!(r#"{{"metric":{{"pod":"b"}},"values":[{}]}}"#, values(0));
        if !values(6000).is_empty() {
            result += &format!(r#",{{"metric":{{"pod":"a"}},"values":[{}]}}"#, values(6000));
        }
        matrix(&format!("[{result}]"))
    }
}

#[tokio::test]
async fn a_range_whose_answer_is_too_large_is_asked_for_in_pieces() {
    // 800 ticks: as a whole; in halves, which are three requests; and not even in pieces of an eighth.
    for (most, expected) in [(1000, 1), (400, 3), (99, 4)] {
        let server = MockServer::start().await;
        Mock::given(matchers::method("POST")).respond_with(Long { most }).mount(&server).await;
        let answer = client(&server.uri()).range(QUERY, 15, 12_000, 15).await;
        let asked = server.received_requests().await.unwrap().len();
        assert_eq!(asked, expected, "{most}");
        if most < 100 {
            assert!(malformed(answer).contains("larger than 8 MiB"));
            continue;
        }
        let found = series(answer);
        let pods: Vec<_> = found.iter().map(|series| (series.pod.as_str(), series.points.len())).collect();
        assert_eq!(pods, [("a", 401), ("b", 800)]);
        assert!(found.iter().all(|series| series.points.iter().all(|(tick, value)| *tick as f64 == *value)));
    }
}

#[tokio::test]
async fn a_round_of_queries_ends_though_the_server_hangs() {
    let server = served(matrix("[]").set_delay(Duration::from_secs(60))).await;
    let client = Prometheus::new(&server.uri(), Duration::from_millis(300)).unwrap().round();
    let answers = futures::future::join_all((0..40).map(|_| client.range(QUERY, 60, 120, 15))).await;
    assert!(answers.into_iter().all(|answer| down(answer).contains("did not answer within")));
    // Eight at once, twice, and eight that begin just before the end.
    let asked = server.received_requests().await.unwrap().len();
    assert!(asked <= 24, "{asked}");
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_down() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n";
    let (url, _served) = endless(head, b"{\"status\":", 10).await;
    let why = down(client(&url).range(QUERY, 60, 120, 15).await);
    assert!(why.contains("cannot be reached"), "{why}");
}

#[tokio::test]
async fn a_range_that_is_none_is_not_asked() {
    let server = served(matrix("[]")).await;
    let client = client(&server.uri());
    for (start, end, step) in [(0, 1000, 1), (15, 0, 15), (0, 15, 0), (i64::MIN, i64::MAX, 1)] {
        let why = malformed(client.range(QUERY, start, end, step).await);
        assert!(why.contains("is not a range of 1 to 1000 ticks"), "{why}");
    }
    assert_eq!(server.received_requests().await.unwrap().len(), 0);
}

#[test]
fn an_address_that_is_none_is_refused() {
    for (url, expected) in [
        ("", "is no URL"),
        ("prometheus:9090", "is not an http or https URL"),
        ("file:///etc/passwd", "is not an http or https URL"),
        ("http://", "is no URL"),
    ] {
        let error = Prometheus::new(url, Duration::from_secs(1)).err().unwrap().to_string();
        assert!(error.contains(expected) && error.contains("http://prometheus"), "{url}: {error}");
    }
}
