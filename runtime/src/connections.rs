//! `connections.unified`: connections to experts, held in pools with hard bounds.
//!
//! Owns every upstream socket; knows nothing of queries, caches or clients. Optimized, one pool serves all experts: it
//! speaks HTTP/2 where the other side does, remembers addresses, and a request that waits too long for a connection
//! fails as busy. The baseline is a pool of HTTP/1.1 connections per expert in which a request just waits. Which of the
//! two an expert's requests take is set by expert and by percent; a pool that nobody is sent to any more drains.
//!
//! The slots of a pool bound its connections in use, and idle ones make room for new ones. An HTTP/1.1 connection carries one request at a time
//! and has a slot for as long; an HTTP/2 connection carries [`MAX_STREAMS`] and has one while it carries any.

use std::{
    error::Error as _,
    path::Path,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    HeaderMap, Request, Response, StatusCode, Uri,
    body::{Body, Frame, Incoming, SizeHint},
    client::conn::{TrySendError, http1, http2},
    header::{CONTENT_LENGTH, HOST, HeaderValue},
    http::uri::{Authority, Scheme},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::{
    config::{self, Config, Http2},
    metrics::{Manager, Service},
};

mod dial;

use dial::{Dialer, Resolved, Sender};

/// Largest answer of an expert that is read, in bytes.
pub(crate) const MAX_ANSWER: usize = 4 << 20;
/// Requests at once on one HTTP/2 connection; servers allow a hundred and more.
const MAX_STREAMS: usize = 100;

/// Bounds of one pool, and how it opens connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Connections to one host.
    pub(crate) per_host: usize,
    /// Connections to all hosts.
    pub(crate) total: Option<usize>,
    /// How long an idle connection is kept.
    pub(crate) keep_alive: Duration,
    /// Age after which a connection is given no more requests, so that traffic follows the other side's pods.
    pub(crate) max_age: Option<Duration>,
    /// How long a request waits for a free connection; without it, as long as its caller waits.
    pub(crate) acquire_timeout: Option<Duration>,
    /// How long a name's addresses are remembered; without it, not at all.
    pub(crate) dns_ttl: Option<Duration>,
    pub(crate) http2: Http2,
    /// A file of roots to trust besides the public ones.
    pub(crate) ca_file: Option<String>,
}

impl Limits {
    fn unified(config: &Config) -> Self {
        let unified = &config.optimizations.connections.unified;
        Self {
            per_host: unified.per_host as usize,
            total: Some(unified.total as usize),
            keep_alive: unified.keep_alive,
            max_age: Some(unified.max_age),
            acquire_timeout: Some(unified.acquire_timeout),
            dns_ttl: Some(unified.dns_ttl).filter(|ttl| !ttl.is_zero()),
            http2: unified.http2,
            ca_file: config.tls.ca_file.clone(),
        }
    }

    fn baseline(config: &Config) -> Self {
        Self {
            per_host: config.baseline.per_host as usize,
            total: None,
            keep_alive: config.baseline.keep_alive,
            max_age: None,
            acquire_timeout: None,
            dns_ttl: None,
            http2: Http2::Never,
            ca_file: config.tls.ca_file.clone(),
        }
    }
}

/// Where a connection goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    /// Name or IP address, without brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) tls: bool,
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
    /// Whose it is; `None`: everybody's.
    owner: Option<String>,
    limits: Limits,
    dialer: Dialer,
    total: Option<Arc<Semaphore>>,
    /// Connections that are idle or in use.
    open: Arc<AtomicUsize>,
    retired: AtomicBool,
    next_id: AtomicU64,
    hosts: Vec<Host>,
}

#[derive(Debug)]
struct Host {
    address: Address,
    known: Resolved,
    slots: Arc<Semaphore>,
    /// It may speak HTTP/2, as far as is known.
    multiplexes: AtomicBool,
    /// Held while a connection is opened that others may share, so that many who wait open one.
    dialing: tokio::sync::Mutex<()>,
    open: Mutex<Connections>,
}

#[derive(Debug, Default)]
struct Connections {
    /// Connections that wait for their next request; the newest is last.
    idle: Vec<Single>,
    shared: Vec<Shared>,
}

/// An HTTP/1.1 connection.
#[derive(Debug)]
struct Single {
    sender: http1::SendRequest<Full<Bytes>>,
    opened: Instant,
    since: Instant,
    _counted: Counted,
}

/// An HTTP/2 connection.
#[derive(Debug)]
struct Shared {
    id: u64,
    sender: http2::SendRequest<Full<Bytes>>,
    streams: usize,
    /// Held while there are streams.
    slots: Option<Slots>,
    opened: Instant,
    /// When the last stream ended.
    since: Instant,
    _counted: Counted,
}

/// The right to one connection.
#[derive(Debug)]
struct Slots {
    _host: OwnedSemaphorePermit,
    _total: Option<OwnedSemaphorePermit>,
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

/// One request's use of a connection. Given back with [`Lease::release`] when the answer was read to its end; dropped
/// before, it closes a connection of its own, since an answer that nobody reads to its end blocks it.
#[derive(Debug)]
struct Lease {
    way: Way,
    reused: bool,
    hold: Hold,
}

#[derive(Debug)]
enum Hold {
    Single(Box<Single>, Slots),
    Stream(http2::SendRequest<Full<Bytes>>, Stream),
}

/// One stream of a shared connection, until it is dropped.
#[derive(Debug)]
struct Stream {
    way: Way,
    id: u64,
}

impl Drop for Stream {
    fn drop(&mut self) {
        let (pool, mut open) = (&self.way.pool, self.way.host().lock());
        let Some(i) = open.shared.iter().position(|shared| shared.id == self.id) else { return };
        let shared = &mut open.shared[i];
        shared.streams -= 1;
        if shared.streams == 0 {
            shared.since = Instant::now();
            shared.slots = None;
            if pool.retired.load(Ordering::Acquire) || shared.sender.is_closed() || pool.is_old(shared.opened)
            {
                open.shared.swap_remove(i);
            }
        }
    }
}

impl Lease {
    /// Puts a connection whose answer was read to its end back.
    fn release(self) {
        let Hold::Single(mut single, slots) = self.hold else { return };
        let pool = &self.way.pool;
        if pool.retired.load(Ordering::Acquire) || single.sender.is_closed() || pool.is_old(single.opened) {
            return;
        }
        single.since = Instant::now();
        let host = self.way.host();
        host.lock().idle.push(*single);
        // Retired just now: nobody would ever look at this connection again.
        if pool.retired.load(Ordering::Acquire) {
            host.lock().idle.clear();
        }
        // Only here are the slots given back, so that who waits for them finds the idle connection.
        drop(slots);
    }

    /// Closes the connection to further requests.
    fn discard(self) {
        if let Hold::Stream(_, stream) = &self.hold {
            self.way.host().lock().shared.retain(|shared| shared.id != stream.id);
        }
    }

    /// Sends a request. With an error comes the request itself if nothing of it was sent.
    async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Unsent> {
        match &mut self.hold {
            Hold::Single(single, _) => single.sender.try_send_request(request).await.map_err(unsent),
            Hold::Stream(sender, _) => {
                let (request, host) = absolute(request, self.way.host().address.tls);
                let sent = sender.try_send_request(request).await.map_err(unsent);
                sent.map_err(|(error, request)| {
                    // As it was, for a connection that may speak HTTP/1.1.
                    let request = request.zip(host).map(|(mut request, host)| {
                        request.headers_mut().insert(HOST, host);
                        relative(request)
                    });
                    (error, request)
                })
            }
        }
    }
}

type Unsent = (hyper::Error, Option<Request<Full<Bytes>>>);

fn unsent(mut error: TrySendError<Request<Full<Bytes>>>) -> Unsent {
    let message = error.take_message();
    (error.into_error(), message)
}

/// A request as HTTP/2 wants it: scheme and authority in the URI, no `host`, which is given back.
fn absolute(mut request: Request<Full<Bytes>>, tls: bool) -> (Request<Full<Bytes>>, Option<HeaderValue>) {
    let host = request.headers_mut().remove(HOST);
    let authority = host.as_ref().and_then(|host| Authority::try_from(host.as_bytes()).ok());
    if let Some(authority) = authority {
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        parts.scheme = Some(if tls { Scheme::HTTPS } else { Scheme::HTTP });
        parts.authority = Some(authority);
        // A path, a scheme and an authority are always a URI.
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    }
    (request, host)
}

fn relative(mut request: Request<Full<Bytes>>) -> Request<Full<Bytes>> {
    if let Some(path) = request.uri().path_and_query().cloned() {
        *request.uri_mut() = path.into();
    }
    request
}

impl Pool {
    fn new(owner: Option<String>, limits: Limits, addresses: Vec<Address>) -> Result<Self, String> {
        let tls = addresses.iter().any(|address| address.tls);
        let roots = tls.then(|| dial::trust(limits.ca_file.as_deref().map(Path::new))).transpose()?;
        let dialer = Dialer::new(limits.http2, limits.dns_ttl, roots)?;
        let hosts = addresses.into_iter().map(|address| Host {
            known: Resolved::default(),
            slots: Arc::new(Semaphore::new(limits.per_host)),
            multiplexes: AtomicBool::new(dialer.may_multiplex(&address)),
            dialing: tokio::sync::Mutex::default(),
            open: Mutex::default(),
            address,
        });
        let hosts = hosts.collect();
        Ok(Self {
            owner,
            dialer,
            total: limits.total.map(|n| Arc::new(Semaphore::new(n))),
            open: Arc::default(),
            retired: AtomicBool::new(false),
            next_id: AtomicU64::new(0),
            hosts,
            limits,
        })
    }

    fn is_old(&self, opened: Instant) -> bool {
        self.limits.max_age.is_some_and(|age| opened.elapsed() >= age)
    }

    /// Closes the connection that was idle for longest when a new one would be above the total.
    fn make_room(&self) {
        if self.limits.total.is_none_or(|total| self.open.load(Ordering::Relaxed) < total) {
            return;
        }
        let oldest = self
            .hosts
            .iter()
            .filter_map(|host| Some((host.lock().oldest()?, host)))
            .min_by_key(|(since, _)| *since);
        if let Some((since, host)) = oldest {
            host.lock().close(since);
        }
    }

    /// Closes what is idle too long, or too old.
    pub(crate) fn sweep(&self) {
        let over = |opened: Instant, since: Instant| {
            since.elapsed() >= self.limits.keep_alive || self.is_old(opened)
        };
        for host in &self.hosts {
            let mut open = host.lock();
            open.idle.retain(|idle| !over(idle.opened, idle.since) && !idle.sender.is_closed());
            open.shared.retain(|shared| {
                !shared.sender.is_closed() && (shared.streams > 0 || !over(shared.opened, shared.since))
            });
        }
    }

    /// Closes idle connections now and the others as their requests end. Requests that hold this pool go on.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
        for host in &self.hosts {
            let mut open = host.lock();
            open.idle.clear();
            open.shared.retain(|shared| shared.streams > 0);
        }
    }
}

impl Connections {
    /// Since when the connection that is idle for longest is.
    fn oldest(&self) -> Option<Instant> {
        let shared = self.shared.iter().filter(|shared| shared.streams == 0).map(|shared| shared.since);
        self.idle.iter().map(|idle| idle.since).chain(shared).min()
    }

    /// Closes the connection that is idle since then, if it still is.
    fn close(&mut self, since: Instant) {
        if let Some(i) = self.idle.iter().position(|idle| idle.since == since) {
            self.idle.remove(i);
        } else {
            self.shared.retain(|shared| shared.streams > 0 || shared.since != since);
        }
    }
}

impl Host {
    fn lock(&self) -> std::sync::MutexGuard<'_, Connections> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A host of a pool.
#[derive(Debug, Clone)]
struct Way {
    pool: Arc<Pool>,
    host: usize,
}

impl Way {
    fn host(&self) -> &Host {
        &self.pool.hosts[self.host]
    }

    /// A stream of a connection that carries some already, which needs no slots; with slots, also of one that is idle.
    fn join(&self, slots: &mut Option<Slots>) -> Option<Lease> {
        let pool = &self.pool;
        let mut open = self.host().lock();
        let usable = |shared: &&mut Shared| {
            (shared.streams > 0 || slots.is_some())
                && shared.streams < MAX_STREAMS
                && !shared.sender.is_closed()
                && !pool.is_old(shared.opened)
        };
        // The busiest, so that the others may end.
        let shared = open.shared.iter_mut().filter(usable).max_by_key(|shared| shared.streams)?;
        if shared.streams == 0 {
            shared.slots = slots.take();
        }
        shared.streams += 1;
        let (id, sender) = (shared.id, shared.sender.clone());
        drop(open);
        Some(Lease {
            way: self.clone(),
            reused: true,
            hold: Hold::Stream(sender, Stream { way: self.clone(), id }),
        })
    }

    /// The idle connection that was used last, if it is neither closed nor idle too long.
    fn pop(&self) -> Option<Single> {
        let limits = &self.pool.limits;
        let mut open = self.host().lock();
        while let Some(idle) = open.idle.pop() {
            if idle.since.elapsed() < limits.keep_alive
                && !idle.sender.is_closed()
                && !self.pool.is_old(idle.opened)
            {
                return Some(idle);
            }
        }
        None
    }

    /// Waits for the right to a connection, then takes one that is open or opens one. With `fresh` none that was idle.
    async fn acquire(&self, fresh: bool, service: &Service) -> Result<Lease, Error> {
        let (pool, host) = (&self.pool, self.host());
        if let Some(lease) = self.join(&mut None) {
            return Ok(lease);
        }
        let slots = async {
            // The host's slot first: who waits for a full host must not take the total away from the others. Neither
            // semaphore is ever closed, so acquiring cannot fail; an error would only mean that no permit is held.
            let _host = host.slots.clone().acquire_owned().await.ok()?;
            let _total = match &pool.total {
                Some(total) => Some(total.clone().acquire_owned().await.ok()?),
                None => None,
            };
            Some(Slots { _host, _total })
        };
        let slots = match pool.limits.acquire_timeout {
            Some(limit) => timeout(limit, slots).await.map_err(|_| Error::Busy(limit))?,
            None => slots.await,
        };
        let slots = slots.ok_or_else(|| Error::Connect("the pool is closed".to_owned()))?;

        // Who waits here for another's dialling finds the other's connection, or, if that speaks HTTP/1.1 after all,
        // dials like everybody.
        let dialing = match host.multiplexes.load(Ordering::Relaxed) {
            true => Some(host.dialing.lock().await),
            false => None,
        };
        let mut slots = Some(slots);
        if let Some(lease) = self.join(&mut slots) {
            return Ok(lease);
        }
        let Some(slots) = slots else { return Err(Error::Connect("the slot is gone".to_owned())) };
        while let Some(mut single) = (!fresh).then(|| self.pop()).flatten() {
            // Fails when the expert has closed it meanwhile; waits only for the last answer's own end.
            if single.sender.ready().await.is_ok() {
                let hold = Hold::Single(Box::new(single), slots);
                return Ok(Lease { way: self.clone(), reused: true, hold });
            }
        }
        pool.make_room();
        let counted = Counted::new(&pool.open);
        let sender = pool.dialer.connect(&host.address, &host.known, service).await;
        let opened = Instant::now();
        let hold = match sender.map_err(|error| Error::Connect(error.to_string()))? {
            Sender::H1(sender) => {
                host.multiplexes.store(false, Ordering::Relaxed);
                Hold::Single(Box::new(Single { sender, opened, since: opened, _counted: counted }), slots)
            }
            Sender::H2(sender) => {
                let id = pool.next_id.fetch_add(1, Ordering::Relaxed);
                let slots = Some(slots);
                host.lock().shared.push(Shared {
                    id,
                    sender: sender.clone(),
                    streams: 1,
                    slots,
                    opened,
                    since: opened,
                    _counted: counted,
                });
                Hold::Stream(sender, Stream { way: self.clone(), id })
            }
        };
        drop(dialing);
        Ok(Lease { way: self.clone(), reused: false, hold })
    }
}

/// The way, or the two ways, to one service.
#[derive(Debug, Clone)]
pub(crate) struct Route(Arc<Ways>);

#[derive(Debug)]
enum Ways {
    One(Way, Manager),
    /// So many of a hundred requests go the unified way.
    Both {
        own: Way,
        unified: Way,
        percent: u32,
        turn: AtomicU32,
    },
}

impl Route {
    /// The way of the next request.
    fn way(&self) -> (&Way, Manager) {
        match &*self.0 {
            Ways::One(way, manager) => (way, *manager),
            Ways::Both { own, unified, percent, turn } => {
                // Spread evenly, since 61 and 100 have no common divisor.
                match turn.fetch_add(61, Ordering::Relaxed) % 100 < *percent {
                    true => (unified, Manager::Unified),
                    false => (own, Manager::Own),
                }
            }
        }
    }

    /// The pools that its requests may take.
    pub(crate) fn pools(&self) -> impl Iterator<Item = &Arc<Pool>> {
        let (first, second) = match &*self.0 {
            Ways::One(way, _) => (way, None),
            Ways::Both { own, unified, .. } => (own, Some(unified)),
        };
        [Some(first), second].into_iter().flatten().map(|way| &way.pool)
    }
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
    lease: Option<Lease>,
}

impl Arriving {
    /// Puts the connection back at the body's end, which `is_end_stream` knows only where a length was announced.
    fn settle(&mut self, ended: bool) {
        if (ended || self.body.is_end_stream())
            && let Some(lease) = self.lease.take()
        {
            lease.release();
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
        lease.release();
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
            let mut arriving = Arriving { body, lease: Some(lease) };
            arriving.settle(false);
            arriving
        }))
    }

    async fn exchange(
        &self,
        mut request: Request<Full<Bytes>>,
        service: &Service,
    ) -> Result<(Response<Incoming>, Lease), Error> {
        let (way, manager) = self.way();
        let mut fresh = false;
        loop {
            let started = Instant::now();
            let lease = way.acquire(fresh, service).await;
            service.acquire.observe(started.elapsed().as_secs_f64());
            let mut lease = lease?;
            service.acquired(manager, lease.reused);
            match lease.send(request).await {
                Ok(response) => return Ok((response, lease)),
                // The expert closed an idle connection before anything was sent on it: not the request's fault, and
                // safe to send elsewhere, once.
                Err((_, Some(unsent))) if lease.reused && !fresh => {
                    lease.discard();
                    (request, fresh) = (unsent, true);
                }
                Err((error, _)) => return Err(error.into()),
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

/// A service that requests are sent to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) address: Address,
}

/// The routes to `targets`, in their order. Pools of `old` that would be the same go on. Fails where `tls.caFile`
/// cannot be used.
pub(crate) fn routes(
    config: &Config,
    targets: &[Target],
    old: &[&Route],
) -> Result<Vec<Route>, config::Error> {
    let unified = &config.optimizations.connections.unified;
    let migrates = |target: &Target| {
        unified.enabled
            && unified.percent > 0
            && unified.services.iter().any(|s| s == "*" || *s == target.name)
    };
    let pool = |owner: Option<&str>, limits: &Limits, addresses: Vec<Address>| {
        let known = old.iter().flat_map(|route| route.pools()).find(|pool| {
            pool.owner.as_deref() == owner
                && pool.limits == *limits
                && pool.hosts.iter().map(|host| &host.address).eq(&addresses)
        });
        match known {
            Some(pool) => Ok(pool.clone()),
            None => Pool::new(owner.map(str::to_owned), limits.clone(), addresses)
                .map(Arc::new)
                .map_err(|reason| config::Error::one("tls.caFile", reason)),
        }
    };

    let mut shared: Vec<Address> = Vec::new();
    for target in targets.iter().filter(|target| migrates(target)) {
        if !shared.contains(&target.address) {
            shared.push(target.address.clone());
        }
    }
    let everybodys = match shared.is_empty() {
        true => None,
        false => Some(pool(None, &Limits::unified(config), shared.clone())?),
    };
    let baseline = Limits::baseline(config);
    let route = |target: &Target| {
        let own = || {
            let pool = pool(Some(&target.name), &baseline, vec![target.address.clone()])?;
            Ok(Way { pool, host: 0 })
        };
        let host = shared.iter().position(|address| migrates(target) && *address == target.address);
        let ways = match everybodys.clone().zip(host).map(|(pool, host)| Way { pool, host }) {
            None => Ways::One(own()?, Manager::Own),
            Some(unified_way) if unified.percent == 100 => Ways::One(unified_way, Manager::Unified),
            Some(unified_way) => Ways::Both {
                own: own()?,
                unified: unified_way,
                percent: unified.percent,
                turn: AtomicU32::new(0),
            },
        };
        Ok(Route(Arc::new(ways)))
    };
    targets.iter().map(route).collect()
}

#[cfg(test)]
mod tests;
