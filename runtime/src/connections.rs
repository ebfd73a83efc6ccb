//! `connections.unified`: HTTP/1.1 connections to experts, held in pools with hard bounds.
//!
//! Owns every upstream socket; knows nothing of queries, caches or clients. One connection carries one request at a
//! time, so the connections to a host bound the requests to it. Optimized, one pool serves all experts and a request
//! that waits too long for a connection fails as busy; the baseline is a pool per expert in which it just waits.

use std::{
    error::Error as _,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::{Body, Frame, Incoming, SizeHint},
    client::conn::http1::{self, SendRequest},
    header::CONTENT_LENGTH,
};
use hyper_util::rt::TokioIo;
use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::metrics::Service;

/// Largest answer of an expert that is read, in bytes.
pub(crate) const MAX_ANSWER: usize = 4 << 20;
/// Largest header of an answer, in bytes.
const MAX_HEADER: usize = 32 << 10;
/// Largest read buffer of a connection, in bytes.
const MAX_BUFFER: usize = 64 << 10;

/// Bounds of one pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Connections to one host.
    pub(crate) per_host: usize,
    /// Connections to all hosts.
    pub(crate) total: Option<usize>,
    /// How long an idle connection is kept.
    pub(crate) keep_alive: Duration,
    /// How long a request waits for a free connection; without it, as long as its caller waits.
    pub(crate) acquire_timeout: Option<Duration>,
}

/// Where a connection goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    /// Name or IP address, without brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
}

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("no connection became free within {0:?}")]
    Busy(Duration),
    #[error("cannot connect: {0}")]
    Connect(String),
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("the answer is larger than {MAX_ANSWER} bytes")]
    TooLarge,
}

/// Connections to a set of hosts, within [`Limits`].
#[derive(Debug)]
pub(crate) struct Pool {
    limits: Limits,
    total: Option<Arc<Semaphore>>,
    /// Connections that are idle or in use.
    open: Arc<AtomicUsize>,
    retired: AtomicBool,
    hosts: Vec<Host>,
}

#[derive(Debug)]
struct Host {
    address: Address,
    slots: Arc<Semaphore>,
    idle: Mutex<Vec<Idle>>,
}

/// A connection that waits for its next request; the newest is last.
#[derive(Debug)]
struct Idle {
    sender: SendRequest<Full<Bytes>>,
    since: Instant,
    counted: Counted,
}

/// Counts a connection of the pool for as long as it lives.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts a socket in the metrics for as long as it is open.
struct Open(Gauge);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The right to one connection, and the connection.
#[derive(Debug)]
struct Lease {
    connection: Idle,
    reused: bool,
    _slot: OwnedSemaphorePermit,
    _total: Option<OwnedSemaphorePermit>,
}

impl Pool {
    pub(crate) fn new(limits: Limits, addresses: Vec<Address>) -> Self {
        let hosts = addresses.into_iter().map(|address| Host {
            address,
            slots: Arc::new(Semaphore::new(limits.per_host)),
            idle: Mutex::default(),
        });
        Self {
            total: limits.total.map(|n| Arc::new(Semaphore::new(n))),
            open: Arc::default(),
            retired: AtomicBool::new(false),
            hosts: hosts.collect(),
            limits,
        }
    }

    /// Waits for the right to a connection, then takes an idle one or opens a new one.
    async fn acquire(&self, host: usize, fresh: bool, service: &Service) -> Result<Lease, Error> {
        let host = &self.hosts[host];
        let slots = async {
            // The host's slot first: who waits for a full host must not take the total away from the others. Neither
            // semaphore is ever closed, so acquiring cannot fail; an error would only mean that no permit is held.
            let slot = host.slots.clone().acquire_owned().await.ok()?;
            let total = match &self.total {
                Some(total) => Some(total.clone().acquire_owned().await.ok()?),
                None => None,
            };
            Some((slot, total))
        };
        let slots = match self.limits.acquire_timeout {
            Some(limit) => timeout(limit, slots).await.map_err(|_| Error::Busy(limit))?,
            None => slots.await,
        };
        let (slot, total) = slots.ok_or_else(|| Error::Connect("the pool is closed".to_owned()))?;

        while let Some(mut connection) = (!fresh).then(|| host.pop(self.limits.keep_alive)).flatten() {
            // Fails when the expert has closed it meanwhile; waits only for the last answer's own end.
            if connection.sender.ready().await.is_ok() {
                return Ok(Lease { connection, reused: true, _slot: slot, _total: total });
            }
        }
        self.make_room();
        let counted = Counted::new(&self.open);
        let sender = connect(&host.address, service).await.map_err(|e| Error::Connect(e.to_string()))?;
        let connection = Idle { sender, since: Instant::now(), counted };
        Ok(Lease { connection, reused: false, _slot: slot, _total: total })
    }

    /// Closes the idle connection that waited longest when a new one would be above the total.
    fn make_room(&self) {
        if self.limits.total.is_none_or(|total| self.open.load(Ordering::Relaxed) < total) {
            return;
        }
        let oldest = |host: &&Host| host.lock().first().map(|idle| idle.since);
        let host = self.hosts.iter().filter(|host| oldest(host).is_some()).min_by_key(oldest);
        if let Some(host) = host {
            let mut idle = host.lock();
            if !idle.is_empty() {
                idle.remove(0);
            }
        }
    }

    /// Puts a connection whose answer was read to its end back.
    fn release(&self, host: usize, lease: Lease) {
        let Idle { sender, counted, .. } = lease.connection;
        if self.retired.load(Ordering::Acquire) || sender.is_closed() {
            return;
        }
        self.hosts[host].lock().push(Idle { sender, since: Instant::now(), counted });
        // Retired just now: nobody would ever look at this connection again.
        if self.retired.load(Ordering::Acquire) {
            self.hosts[host].lock().clear();
        }
        // Only here are the slots given back, so that who waits for them finds the idle connection.
    }

    /// Closes what is idle too long.
    pub(crate) fn sweep(&self) {
        for host in &self.hosts {
            host.lock()
                .retain(|idle| idle.since.elapsed() < self.limits.keep_alive && !idle.sender.is_closed());
        }
    }

    /// Closes idle connections now and the others as their requests end. Requests that hold this pool go on.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
        for host in &self.hosts {
            host.lock().clear();
        }
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }
}

impl Host {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection that was used last, if it is neither closed nor idle too long.
    fn pop(&self, keep_alive: Duration) -> Option<Idle> {
        let mut idle = self.lock();
        while let Some(connection) = idle.pop() {
            if connection.since.elapsed() < keep_alive && !connection.sender.is_closed() {
                return Some(connection);
            }
        }
        None
    }
}

/// Opens a connection; its metrics follow the socket's own life.
async fn connect(
    address: &Address,
    service: &Service,
) -> Result<SendRequest<Full<Bytes>>, Box<dyn std::error::Error + Send + Sync>> {
    let stream = TcpStream::connect((address.host.as_str(), address.port)).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = http1::Builder::new()
        .max_header_size(MAX_HEADER)
        .max_buf_size(MAX_BUFFER)
        .handshake(TokioIo::new(stream))
        .await?;
    service.opened.inc();
    service.open.inc();
    let open = Open(service.open.clone());
    tokio::spawn(async move {
        // An error here is also the error of the request on this connection, which reports it.
        let _ = connection.await;
        drop(open);
    });
    Ok(sender)
}

/// A host of a pool.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    pub(crate) pool: Arc<Pool>,
    host: usize,
}

/// An answer, whole in memory.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// An answer's body on its way, at the pace at which it is read. Read to its end it puts the connection back;
/// dropped before, it closes the connection, which is how an expert learns that nobody waits any more.
#[derive(Debug)]
pub(crate) struct Arriving {
    body: Incoming,
    /// Absent when the body is at its end.
    lease: Option<(Route, Lease)>,
}

impl Arriving {
    /// Puts the connection back at the body's end, which `is_end_stream` knows only where a length was announced.
    fn settle(&mut self, ended: bool) {
        if (ended || self.body.is_end_stream())
            && let Some((route, lease)) = self.lease.take()
        {
            route.pool.release(route.host, lease);
        }
    }
}

impl Body for Arriving {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        // The end is often known with the last piece already, and nobody asks for more then.
        self.settle(frame.is_none());
        Poll::Ready(frame.map(|frame| frame.map_err(Error::from)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Route {
    /// Sends a request and reads the whole answer. Dropping the future closes the connection, since an answer that
    /// nobody reads to its end blocks it.
    pub(crate) async fn send(
        &self,
        request: Request<Full<Bytes>>,
        service: &Service,
    ) -> Result<Answer, Error> {
        let (response, lease) = self.exchange(request, service).await?;
        let answer = read(response).await?;
        self.pool.release(self.host, lease);
        Ok(answer)
    }

    /// Sends a request and gives the answer as soon as its head is there.
    pub(crate) async fn open(
        &self,
        request: Request<Full<Bytes>>,
        service: &Service,
    ) -> Result<Response<Arriving>, Error> {
        let (response, lease) = self.exchange(request, service).await?;
        Ok(response.map(|body| {
            let mut arriving = Arriving { body, lease: Some((self.clone(), lease)) };
            arriving.settle(false);
            arriving
        }))
    }

    async fn exchange(
        &self,
        mut request: Request<Full<Bytes>>,
        service: &Service,
    ) -> Result<(Response<Incoming>, Lease), Error> {
        let mut fresh = false;
        loop {
            let started = Instant::now();
            let lease = self.pool.acquire(self.host, fresh, service).await;
            service.acquire.observe(started.elapsed().as_secs_f64());
            let mut lease = lease?;
            match lease.connection.sender.try_send_request(request).await {
                Ok(response) => return Ok((response, lease)),
                Err(mut error) => match error.take_message() {
                    // The expert closed an idle connection before anything was sent on it: not the request's fault,
                    // and safe to send elsewhere, once.
                    Some(unsent) if lease.reused => (request, fresh) = (unsent, true),
                    _ => return Err(error.into_error().into()),
                },
            }
        }
    }
}

/// The innermost cause, which is the one that helps.
fn cause(error: hyper::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(inner) = next {
        text = inner.to_string();
        next = inner.source();
    }
    text
}

impl From<hyper::Error> for Error {
    fn from(error: hyper::Error) -> Self {
        Self::Broken(cause(error))
    }
}

/// Reads an answer to its end, which must come within [`MAX_ANSWER`].
pub(crate) async fn read<B>(response: Response<B>) -> Result<Answer, Error>
where
    B: Body<Data = Bytes, Error: Into<Error>> + Unpin,
{
    let (head, mut body) = response.into_parts();
    let expected = head.headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    if expected.is_some_and(|length| length > MAX_ANSWER) {
        return Err(Error::TooLarge);
    }
    let mut first = Bytes::new();
    let mut whole = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(Into::into)?;
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + whole.len() + data.len() > MAX_ANSWER {
            return Err(Error::TooLarge);
        }
        // Most answers come in one piece, which needs no copy.
        if first.is_empty() && whole.is_empty() {
            first = data;
        } else {
            if whole.is_empty() {
                whole.reserve(expected.unwrap_or(0).clamp(first.len() + data.len(), 256 << 10));
                whole.extend_from_slice(&first);
                first = Bytes::new();
            }
            whole.extend_from_slice(&data);
        }
        if body.is_end_stream() {
            break;
        }
    }
    let body = if whole.is_empty() { first } else { Bytes::from(whole) };
    Ok(Answer { status: head.status, headers: head.headers, body })
}

/// The pools for a list of experts, and each expert's way into them, in the order of `addresses`: one pool for all,
/// or one for each.
pub(crate) fn routes(limits: &Limits, unified: bool, addresses: &[Address]) -> Vec<Route> {
    if !unified {
        let own = |address: &Address| Route {
            pool: Arc::new(Pool::new(limits.clone(), vec![address.clone()])),
            host: 0,
        };
        return addresses.iter().map(own).collect();
    }
    let mut hosts: Vec<Address> = Vec::new();
    let places: Vec<usize> = addresses
        .iter()
        .map(|address| {
            hosts.iter().position(|known| known == address).unwrap_or_else(|| {
                hosts.push(address.clone());
                hosts.len() - 1
            })
        })
        .collect();
    let pool = Arc::new(Pool::new(limits.clone(), hosts));
    places.into_iter().map(|host| Route { pool: pool.clone(), host }).collect()
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::{
        load::experts::{Behaviour, serve},
        metrics::Metrics,
    };

    async fn mocks(count: usize) -> Vec<Address> {
        let mut addresses = Vec::new();
        for _ in 0..count {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let port = listener.local_addr().expect("bound").port();
            addresses.push(Address { host: "127.0.0.1".to_owned(), port });
            tokio::spawn(serve(
                listener,
                Behaviour { latency: Duration::from_millis(2), ..Behaviour::default() },
            ));
        }
        addresses
    }

    fn request() -> Request<Full<Bytes>> {
        Request::post("/").header("host", "mock").body(Full::new(Bytes::from_static(b"{}"))).expect("valid")
    }

    #[tokio::test]
    async fn neither_total_nor_per_host_is_exceeded() {
        for (per_host, total) in [(1, 1), (1, 2), (2, 3), (4, 4), (30, 100)] {
            let limits = Limits {
                per_host,
                total: Some(total),
                keep_alive: Duration::from_secs(30),
                acquire_timeout: Some(Duration::from_secs(10)),
            };
            let routes = routes(&limits, true, &mocks(3).await);
            let service = Metrics::new(None).service("mock");
            let pool = routes[0].pool.clone();
            let sent = (0..90).map(|i| {
                let (route, service, pool) = (&routes[i % 3], &service, &pool);
                async move {
                    let answer = route.send(request(), service).await.expect("answered");
                    assert!(answer.status.is_success());
                    assert!(pool.open.load(Ordering::Relaxed) <= total);
                    assert!(pool.hosts.iter().all(|host| host.lock().len() <= per_host));
                }
            });
            futures::future::join_all(sent).await;
            assert_eq!(
                pool.open.load(Ordering::Relaxed),
                pool.hosts.iter().map(|h| h.lock().len()).sum::<usize>()
            );
            pool.retire();
            assert_eq!(pool.open.load(Ordering::Relaxed), 0);
            // A retired pool still serves who holds it, and keeps nothing.
            routes[0].send(request(), &service).await.expect("answered");
            assert_eq!(pool.open.load(Ordering::Relaxed), 0);
        }
    }

    #[tokio::test]
    async fn a_body_puts_its_connection_back_at_its_end_only() {
        let limits =
            Limits { per_host: 4, total: None, keep_alive: Duration::from_secs(30), acquire_timeout: None };
        let routes = routes(&limits, true, &mocks(1).await);
        let service = Metrics::new(None).service("mock");
        let idle = || routes[0].pool.hosts[0].lock().len();
        let response = routes[0].open(request(), &service).await.expect("answered");
        assert_eq!(idle(), 0, "the body is still on its way");
        let whole = response.into_body().collect().await.expect("read").to_bytes();
        assert!(whole.starts_with(b"{"));
        assert_eq!(idle(), 1);
        drop(routes[0].open(request(), &service).await.expect("answered"));
        assert_eq!((idle(), service.opened.get()), (0, 1), "an answer that is not read to its end");
    }

    #[tokio::test]
    async fn equal_addresses_share_one_host() {
        let limits =
            Limits { per_host: 1, total: None, keep_alive: Duration::from_secs(30), acquire_timeout: None };
        let one = mocks(1).await.remove(0);
        let unified = routes(&limits, true, &[one.clone(), one.clone()]);
        assert!(Arc::ptr_eq(&unified[0].pool, &unified[1].pool) && unified[0].host == unified[1].host);
        let apart = routes(&limits, false, &[one.clone(), one]);
        assert!(!Arc::ptr_eq(&apart[0].pool, &apart[1].pool));
    }

    #[tokio::test]
    async fn idle_connections_end_with_their_time() {
        let limits =
            Limits { per_host: 4, total: None, keep_alive: Duration::from_millis(20), acquire_timeout: None };
        let routes = routes(&limits, true, &mocks(1).await);
        let service = Metrics::new(None).service("mock");
        routes[0].send(request(), &service).await.expect("answered");
        let pool = &routes[0].pool;
        while pool.open.load(Ordering::Relaxed) > 0 {
            pool.sweep();
            tokio::task::yield_now().await;
        }
        routes[0].send(request(), &service).await.expect("answered");
        assert_eq!(service.opened.get(), 2);
    }
}
