//! MCP over streamable HTTP: a tool is called in the stateless revision, or in a session of the earlier ones.
//!
//! A call is one POST through the runtime's own connections, and its answer either a JSON document or a stream of
//! events of which one is the answer. What a server wants to tell or ask besides is ignored: the runtime declares no
//! capability. <https://modelcontextprotocol.io/specification/2026-07-28/basic/transports>

use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{
    HeaderMap, Response, StatusCode,
    body::Body,
    header::{ACCEPT, CONTENT_TYPE, HeaderName, HeaderValue},
};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{sync::Mutex, time::timeout};

use super::{Expert, Failed, Question};
use crate::{
    config::Protocol,
    connections::{self, Arriving, MAX_ANSWER},
    metrics::Outcome,
};

/// The revision without sessions.
const STATELESS: &str = "2026-07-28";
/// The revisions with sessions over this transport, oldest first.
const SESSION: [&str; 3] = ["2025-03-26", "2025-06-18", "2025-11-25"];
/// JSON-RPC error of a server that does not speak the revision of the request.
const UNSUPPORTED_VERSION: i64 = -32022;

const VERSION_HEADER: HeaderName = HeaderName::from_static("mcp-protocol-version");
const SESSION_HEADER: HeaderName = HeaderName::from_static("mcp-session-id");
const METHOD_HEADER: HeaderName = HeaderName::from_static("mcp-method");
const NAME_HEADER: HeaderName = HeaderName::from_static("mcp-name");

/// What is known of one server.
#[derive(Debug, Default)]
pub(crate) struct State {
    era: ArcSwapOption<Era>,
    /// One negotiation at a time; the others wait for its result.
    negotiating: Mutex<()>,
    /// Ids must not repeat within a session.
    next_id: AtomicU64,
}

/// How a server is spoken to.
#[derive(Debug)]
enum Era {
    Stateless,
    Session { id: Option<HeaderValue>, version: HeaderValue },
}

/// What came back on one POST.
struct Reply {
    status: StatusCode,
    session: Option<HeaderValue>,
    /// The JSON-RPC response, if there was one.
    message: Option<Bytes>,
}

/// A JSON-RPC message.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    method: Option<&'a RawValue>,
    #[serde(borrow, default)]
    result: Option<&'a RawValue>,
    #[serde(borrow, default)]
    error: Option<Error<'a>>,
}

#[derive(Deserialize)]
struct Error<'a> {
    code: i64,
    #[serde(borrow, default)]
    message: Cow<'a, str>,
}

/// The result of `tools/call`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ToolResult<'a> {
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    structured_content: Option<&'a RawValue>,
    #[serde(default)]
    is_error: bool,
    #[serde(borrow, default)]
    result_type: Option<Cow<'a, str>>,
}

/// Calls the expert's tool. The answer is the tool's structured content, or its list of content where it has none.
pub(super) async fn call(expert: &Expert, question: &Question<'_>) -> Result<Arc<RawValue>, Failed> {
    let state = &expert.learnt.mcp;
    let tool = expert.config.tool.as_deref().unwrap_or_default();
    let mut again = true;
    loop {
        let era = era(expert, &question.id).await?;
        let (body, id) = tool_call(expert, question, &era);
        let reply = exchange(expert, Some(&era), ("tools/call", Some(tool)), body, id, &question.id).await?;
        let message = reply.message.as_deref().map(serde_json::from_slice::<Message<'_>>);
        let Some(Ok(message)) = message else {
            // The session is over, or another server stands in the place of the one that was negotiated with. It has
            // done nothing, so that the call can be made anew, once.
            if again && reply.status.is_client_error() {
                again = false;
                forget(state, &era);
                continue;
            }
            return Err(match reply.status.is_success() {
                true => invalid("the answer is no JSON-RPC response".to_owned()),
                false => Failed::status(reply.status, &HeaderMap::new()),
            });
        };
        if let Some(error) = &message.error {
            let gone = match &*era {
                Era::Stateless => error.code == UNSUPPORTED_VERSION,
                // A session that is not known any more has an error of its own in each server.
                Era::Session { .. } => {
                    reply.status == StatusCode::NOT_FOUND || error.code == UNSUPPORTED_VERSION
                }
            };
            if again && gone {
                again = false;
                forget(state, &era);
                continue;
            }
        }
        return answer(&message);
    }
}

fn answer(message: &Message<'_>) -> Result<Arc<RawValue>, Failed> {
    if let Some(Error { code, message }) = &message.error {
        return Err(Failed::new(Outcome::Status, format!("MCP error {code}: {}", short(message))));
    }
    let result = message.result.ok_or_else(|| invalid("the response has no result".to_owned()))?;
    let result: ToolResult<'_> = serde_json::from_str(result.get())
        .map_err(|error| invalid(format!("the result is not one of a tool: {error}")))?;
    if let Some(kind) = result.result_type.as_deref().filter(|kind| *kind != "complete") {
        return Err(invalid(format!("the tool wants more than a query can give ({})", short(kind))));
    }
    if result.is_error {
        let content = result.content.map_or("", RawValue::get);
        return Err(Failed::new(Outcome::Status, format!("the tool failed: {}", short(content))));
    }
    let content = result.structured_content.or(result.content);
    let content = content.ok_or_else(|| invalid("the tool's result has no content".to_owned()))?;
    Ok(Arc::from(content.to_owned()))
}

fn invalid(detail: String) -> Failed {
    Failed::new(Outcome::Invalid, detail)
}

/// The first of what a server wrote: enough to see what it means.
fn short(text: &str) -> Cow<'_, str> {
    const MOST: usize = 300;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]).into(),
        None => text.into(),
    }
}

/// How the server is spoken to, found out if it is not known yet.
async fn era(expert: &Expert, id: &HeaderValue) -> Result<Arc<Era>, Failed> {
    let state = &expert.learnt.mcp;
    if let Some(era) = state.era.load_full() {
        return Ok(era);
    }
    let _one = state.negotiating.lock().await;
    // Somebody may have found it out meanwhile.
    if let Some(era) = state.era.load_full() {
        return Ok(era);
    }
    let era = Arc::new(match expert.config.protocol.unwrap_or_default() {
        Protocol::Stateless => Era::Stateless,
        Protocol::Session => initialize(expert, id).await?,
        Protocol::Auto => match discover(expert, id).await? {
            true => Era::Stateless,
            false => initialize(expert, id).await?,
        },
    });
    let version = match &*era {
        Era::Stateless => STATELESS,
        Era::Session { version, .. } => version.to_str().unwrap_or_default(),
    };
    tracing::info!(expert = expert.config.name, version, "MCP revision agreed");
    state.era.store(Some(era.clone()));
    Ok(era)
}

/// Forgets `era`, unless another was agreed meanwhile.
fn forget(state: &State, era: &Arc<Era>) {
    state.era.rcu(|current| current.clone().filter(|current| !Arc::ptr_eq(current, era)));
}

/// Whether the server speaks the stateless revision. Whatever it answers but a clear yes means no; no answer, or that it
/// is unwell, means that this cannot be told now.
async fn discover(expert: &Expert, id: &HeaderValue) -> Result<bool, Failed> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Discovered<'a> {
        #[serde(borrow)]
        supported_versions: Vec<Cow<'a, str>>,
    }
    let number = expert.learnt.mcp.next_id.fetch_add(1, Ordering::Relaxed);
    let body = format!(
        r#"{{"jsonrpc":"2.0","id":{number},"method":"server/discover","params":{{"_meta":{}}}}}"#,
        meta()
    );
    let method = ("server/discover", None);
    let reply = exchange(expert, Some(&Era::Stateless), method, body.into(), number, id).await?;
    let supported = reply.message.as_deref().and_then(|message| {
        let message: Message<'_> = serde_json::from_slice(message).ok()?;
        serde_json::from_str::<Discovered<'_>>(message.result?.get()).ok()
    });
    Ok(supported.is_some_and(|found| found.supported_versions.iter().any(|version| version == STATELESS)))
}

/// Opens a session.
async fn initialize(expert: &Expert, id: &HeaderValue) -> Result<Era, Failed> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Initialized<'a> {
        #[serde(borrow)]
        protocol_version: Cow<'a, str>,
    }
    let number = expert.learnt.mcp.next_id.fetch_add(1, Ordering::Relaxed);
    let body = format!(
        r#"{{"jsonrpc":"2.0","id":{number},"method":"initialize","params":{{"protocolVersion":"{}","capabilities":{{}},"clientInfo":{}}}}}"#,
        SESSION[SESSION.len() - 1],
        client(),
    );
    let reply = exchange(expert, None, ("initialize", None), body.into(), number, id).await?;
    if reply.message.is_none() && !reply.status.is_success() {
        return Err(Failed::status(reply.status, &HeaderMap::new()));
    }
    let message = reply.message.unwrap_or_default();
    let message: Message<'_> = serde_json::from_slice(&message)
        .map_err(|error| invalid(format!("the answer to initialize is no JSON-RPC response: {error}")))?;
    if let Some(Error { code, message }) = &message.error {
        let detail = format!("the server refuses to initialize: MCP error {code}: {}", short(message));
        return Err(Failed::new(Outcome::Status, detail));
    }
    let version =
        message.result.and_then(|result| serde_json::from_str::<Initialized<'_>>(result.get()).ok());
    let version = version.map(|initialized| initialized.protocol_version).unwrap_or_default();
    let version = SESSION.into_iter().find(|known| *known == version).ok_or_else(|| {
        invalid(format!("the server speaks MCP {:?}; known are {}", short(&version), SESSION.join(", ")))
    })?;
    let era = Era::Session { id: reply.session, version: HeaderValue::from_static(version) };
    let notification = r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#;
    let method = ("notifications/initialized", None);
    let reply = exchange(expert, Some(&era), method, notification.into(), u64::MAX, id).await?;
    match reply.status.is_success() {
        true => Ok(era),
        false => Err(Failed::status(reply.status, &HeaderMap::new())),
    }
}

/// Who the runtime is.
fn client() -> &'static str {
    concat!(r#"{"name":"synthex-runtime","version":""#, env!("CARGO_PKG_VERSION"), r#""}"#)
}

/// What each request of the stateless revision says of its sender.
fn meta() -> String {
    format!(
        r#"{{"io.modelcontextprotocol/protocolVersion":"{STATELESS}","io.modelcontextprotocol/clientInfo":{},"io.modelcontextprotocol/clientCapabilities":{{}}}}"#,
        client()
    )
}

/// The body of a call, and its id.
fn tool_call(expert: &Expert, question: &Question<'_>, era: &Era) -> (Vec<u8>, u64) {
    let id = expert.learnt.mcp.next_id.fetch_add(1, Ordering::Relaxed);
    let tool = expert.config.tool.as_deref().unwrap_or_default();
    let mut body = Vec::with_capacity(question.body.len() + 512);
    // A tool's name has no character that JSON would escape.
    body.extend_from_slice(
        format!(
            r#"{{"jsonrpc":"2.0","id":{id},"method":"tools/call","params":{{"name":"{tool}","arguments":"#
        )
        .as_bytes(),
    );
    match &expert.config.argument {
        None => body.extend_from_slice(&question.body),
        Some(argument) => {
            let arguments = std::collections::BTreeMap::from([(argument.as_str(), &*question.query.content)]);
            // Texts written to memory: serde_json has no error for these.
            let written = serde_json::to_writer(&mut body, &arguments);
            debug_assert!(written.is_ok());
        }
    }
    if matches!(era, Era::Stateless) {
        body.extend_from_slice(b",\"_meta\":");
        body.extend_from_slice(meta().as_bytes());
    }
    body.extend_from_slice(b"}}");
    (body, id)
}

/// Sends one message. Statuses by which a server says that it is unwell or does not let us in are failures here.
async fn exchange(
    expert: &Expert,
    era: Option<&Era>,
    (method, name): (&'static str, Option<&str>),
    body: Vec<u8>,
    number: u64,
    id: &HeaderValue,
) -> Result<Reply, Failed> {
    let mut request = expert.request(body.into(), id.clone());
    let headers = request.headers_mut();
    headers.insert(ACCEPT, HeaderValue::from_static("application/json, text/event-stream"));
    match era {
        None => {}
        Some(Era::Stateless) => {
            headers.insert(VERSION_HEADER, HeaderValue::from_static(STATELESS));
            headers.insert(METHOD_HEADER, HeaderValue::from_static(method));
            if let Some(name) = name.and_then(|name| HeaderValue::from_str(name).ok()) {
                headers.insert(NAME_HEADER, name);
            }
        }
        Some(Era::Session { id, version }) => {
            headers.insert(VERSION_HEADER, version.clone());
            if let Some(id) = id {
                headers.insert(SESSION_HEADER, id.clone());
            }
        }
    }
    let response = expert.route.open(request, &expert.metrics).await?;
    let status = response.status();
    if status.is_server_error()
        || status.is_redirection()
        || matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS)
    {
        return Err(Failed::status(status, response.headers()));
    }
    let session = response.headers().get(SESSION_HEADER).cloned();
    let of = |kind: &str| {
        let value = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        value.is_some_and(|value| value.split(';').next().unwrap_or("").trim().eq_ignore_ascii_case(kind))
    };
    let message = if of("text/event-stream") {
        streamed(response, number).await?
    } else {
        let json = of("application/json");
        let answer = connections::read(response).await?;
        (json && !answer.body.is_empty()).then_some(answer.body)
    };
    // Some other message than the response to ours is none.
    let message = message.filter(|message| responds(message, number) != Some(false));
    Ok(Reply { status, session, message })
}

/// Whether a message is the response to request `number`; nothing if it is no JSON-RPC message.
fn responds(message: &[u8], number: u64) -> Option<bool> {
    let message: Message<'_> = serde_json::from_slice(message).ok()?;
    // An error about a request that could not be read has no id.
    let ours = message.id.map_or(message.error.is_some(), |id| {
        id.get().parse() == Ok(number) || (id.get() == "null" && message.error.is_some())
    });
    Some(message.method.is_none() && ours)
}

/// The response to request `number` in a stream of events.
async fn streamed(response: Response<Arriving>, number: u64) -> Result<Option<Bytes>, Failed> {
    let mut body = response.into_body();
    let mut events = Events::default();
    let mut read = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        read += data.len();
        if read > MAX_ANSWER {
            return Err(connections::Error::TooLarge.into());
        }
        events.push(&data);
        while let Some(event) = events.next() {
            if responds(&event, number) == Some(true) {
                finish(body);
                return Ok(Some(event.into()));
            }
        }
    }
    Ok(None)
}

/// Reads what is left of a stream after the response, which is its end, so that the connection can be used again. It
/// closes the connection instead where more comes than a server should send, or nothing.
fn finish(mut body: Arriving) {
    const LONGEST: Duration = Duration::from_secs(1);
    const MOST: usize = 64 << 10;
    if body.is_end_stream() {
        return;
    }
    tokio::spawn(timeout(LONGEST, async move {
        let mut read = 0;
        while let Some(Ok(frame)) = body.frame().await {
            read += frame.data_ref().map_or(0, Bytes::len);
            if read > MOST {
                return;
            }
        }
    }));
}

/// Server-sent events, of which only the data counts. The caller bounds what is pushed.
/// <https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation>
#[derive(Debug, Default)]
struct Events {
    /// What came and is no whole line yet, after lines that are read.
    pending: Vec<u8>,
    /// Bytes of `pending` that are lines already read.
    taken: usize,
    /// Bytes after those in which no line ends.
    scanned: usize,
    data: Vec<u8>,
    /// The event has a line of data, if only an empty one.
    any: bool,
    /// The last line ended with a carriage return: a line feed right after it belongs to it.
    after_cr: bool,
}

impl Events {
    fn push(&mut self, bytes: &[u8]) {
        self.pending.drain(..self.taken);
        self.taken = 0;
        self.pending.extend_from_slice(bytes);
    }

    /// The data of the next whole event.
    fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            if self.after_cr
                && let Some(byte) = self.pending.get(self.taken)
            {
                self.taken += usize::from(*byte == b'\n');
                self.after_cr = false;
            }
            let rest = &self.pending[self.taken..];
            let found = rest[self.scanned..].iter().position(|byte| matches!(byte, b'\r' | b'\n'));
            let Some(found) = found else {
                self.scanned = rest.len();
                return None;
            };
            let end = self.scanned + found;
            let line = &rest[..end];
            self.after_cr = rest[end] == b'\r';
            self.taken += end + 1;
            self.scanned = 0;
            if line.is_empty() {
                if std::mem::take(&mut self.any) {
                    return Some(std::mem::take(&mut self.data));
                }
            } else if let Some(value) = line.strip_prefix(b"data")
                && value.first().is_none_or(|byte| *byte == b':')
            {
                let value = value.strip_prefix(b":").unwrap_or(value);
                if std::mem::replace(&mut self.any, true) {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn events(pieces: &[&[u8]]) -> Vec<String> {
        let (mut events, mut found) = (Events::default(), Vec::new());
        for piece in pieces {
            events.push(piece);
            while let Some(event) = events.next() {
                found.push(String::from_utf8_lossy(&event).into_owned());
            }
        }
        found
    }

    #[test]
    fn events_are_read_as_the_standard_says() {
        for (text, expected) in [
            ("data: a\n\n", vec!["a"]),
            ("data:a\r\rdata:  b\r\n\r\n", vec!["a", " b"]),
            (": note\nevent: message\nid: 7\ndata: a\ndata: b\n\n", vec!["a\nb"]),
            ("data\ndata\n\n", vec!["\n"]),
            ("data:\n\n", vec![""]),
            ("\n\nid: 1\n\n", vec![]),
            ("datax: a\n\n", vec![]),
            ("data: without an end\n", vec![]),
        ] {
            assert_eq!(events(&[text.as_bytes()]), expected, "{text:?}");
        }
    }

    #[test]
    fn only_the_response_to_a_request_responds() {
        for (text, expected) in [
            (r#"{"jsonrpc":"2.0","id":7,"result":{}}"#, Some(true)),
            (r#"{"jsonrpc":"2.0","id":8,"result":{}}"#, Some(false)),
            (r#"{"jsonrpc":"2.0","id":"7","result":{}}"#, Some(false)),
            (r#"{"jsonrpc":"2.0","id":7,"method":"ping"}"#, Some(false)),
            (r#"{"jsonrpc":"2.0","method":"notifications/progress"}"#, Some(false)),
            (r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"x"}}"#, Some(true)),
            (r#"{"jsonrpc":"2.0","error":{"code":-32700,"message":"x"}}"#, Some(true)),
            (r#"{"result":{}}"#, Some(false)),
            ("[", None),
            ("no JSON", None),
        ] {
            assert_eq!(responds(text.as_bytes(), 7), expected, "{text}");
        }
    }

    #[test]
    fn results_of_tools() {
        for (text, expected) in [
            (r#"{"result":{"content":[{"type":"text","text":"4"}]}}"#, Ok(r#"[{"type":"text","text":"4"}]"#)),
            (
                r#"{"result":{"content":[],"structuredContent":{"sum":4},"resultType":"complete"}}"#,
                Ok(r#"{"sum":4}"#),
            ),
            (r#"{"result":{"content":[{"text":"no such row"}],"isError":true}}"#, Err("no such row")),
            (r#"{"result":{"resultType":"input_required"}}"#, Err("input_required")),
            (r#"{"result":{}}"#, Err("no content")),
            (r#"{"result":"4"}"#, Err("not one of a tool")),
            (r#"{"error":{"code":-32602,"message":"no such tool"}}"#, Err("-32602: no such tool")),
            ("{}", Err("no result")),
        ] {
            let message = serde_json::from_str(text).expect("a message");
            match (answer(&message), expected) {
                (Ok(answer), Ok(expected)) => assert_eq!(answer.get(), expected),
                (Err(failed), Err(words)) => {
                    assert!(failed.failure.detail.contains(words), "{:?}", failed.failure);
                }
                (answer, _) => panic!("{text}: {:?}", answer.map_err(|failed| failed.failure)),
            }
        }
    }

    proptest! {
        /// However a stream is cut into pieces, its events are the same.
        #[test]
        fn pieces_do_not_matter(
            text in "(data|id|:|: |\r|\n|x|é|\\PC){0,60}",
            cuts in proptest::collection::vec(0_usize..200, 0..8),
        ) {
            let whole = text.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(whole.len())).collect();
            cuts.extend([0, whole.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &whole[cut[0]..cut[1]]).collect();
            prop_assert_eq!(events(&pieces), events(&[whole]));
        }

        #[test]
        fn no_message_breaks_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = responds(&bytes, 7);
            if let Ok(message) = serde_json::from_slice(&bytes) {
                let _ = answer(&message);
            }
        }
    }
}
