//! Sockets: the accept loops of both ports, the life of a connection, and the graceful end.
//!
//! Owns every downstream socket; what is said on it belongs to `api`. On SIGTERM readiness goes first, then,
//! after `drain.delay`, the listener, and last the connections, each after the answer that it is waiting for.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::Context;
use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{sleep, sleep_until, timeout},
};

use crate::{
    api::{self, Port, Route},
    monitoring, reload, results,
    state::Runtime,
};

/// Connections open at once on one port; more wait in the kernel's queue.
const MAX_CONNECTIONS: u32 = 10_000;
/// Largest header of a request, in bytes; a larger one is answered 431.
const MAX_HEADER: usize = 32 << 10;
/// Most headers of a request; more are answered 431.
const MAX_HEADERS: usize = 100;
/// Largest read buffer of a connection, in bytes.
const MAX_BUFFER: usize = 64 << 10;

/// How long clients may take, and connections live.
#[derive(Debug, Clone)]
pub struct Patience {
    /// Age after which a connection's next answer is its last, so that traffic follows the pods.
    pub age: Duration,
    /// Time to send a request's header, and to keep an idle connection. Longer than `age`, since a server that closes
    /// an idle connection races with the client's next request on it.
    pub header: Duration,
    /// Time to send a request's body.
    pub body: Duration,
    /// Time to take an answer, on top of the query's own deadline.
    pub answer: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            age: Duration::from_secs(60),
            header: Duration::from_secs(65),
            body: Duration::from_secs(10),
            answer: Duration::from_secs(60),
        }
    }
}

/// What a process is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// The configuration file; its directory is watched.
    pub config: PathBuf,
    /// This process's name in the header `x-synthex-instance`.
    pub instance: String,
    /// Reads the allocator's count of allocations so far, where there is one.
    pub allocations: Option<fn() -> Option<u64>>,
    /// How long clients may take.
    pub patience: Patience,
}

/// A started process: both ports listen.
#[derive(Debug)]
pub struct Server {
    runtime: Arc<Runtime>,
    options: Options,
    serving: TcpListener,
    admin: TcpListener,
}

/// Every route: whether it is on the admin port alone, its method and its path. `GET` routes answer `HEAD` as well.
pub fn routes() -> impl Iterator<Item = (bool, hyper::Method, &'static str)> {
    Route::ALL.into_iter().map(|route| (!route.is_on(Port::Serving), route.method(), route.path()))
}

/// What a port's connections are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    /// Still accepts; every answer is its connection's last.
    Leaving,
    /// Accepts no more; idle connections are closed.
    Closing,
}

impl Server {
    /// Reads the configuration and binds both ports. An error says what is wrong with which file or address.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let path = options.config.display().to_string();
        let file =
            reload::read(&options.config).with_context(|| format!("cannot read the configuration {path}"))?;
        let runtime = Runtime::new(&file, &options.instance, options.allocations)
            .with_context(|| format!("the configuration {path} is refused"))?;
        let config = &runtime.snapshot().config.server;
        // Both set SO_REUSEADDR, so that a restart need not wait for old connections.
        let serving = TcpListener::bind(config.listen).await;
        let serving =
            serving.with_context(|| format!("cannot listen on {} (server.listen)", config.listen))?;
        let admin = TcpListener::bind(config.admin).await;
        let admin = admin.with_context(|| format!("cannot listen on {} (server.admin)", config.admin))?;
        Ok(Self { runtime, options, serving, admin })
    }

    /// Addresses of the serving and the admin port.
    pub fn addresses(&self) -> anyhow::Result<(SocketAddr, SocketAddr)> {
        Ok((self.serving.local_addr()?, self.admin.local_addr()?))
    }

    /// Serves until `stop` completes, then drains: first `/readyz` says no, after `server.drain.delay` no connection
    /// is accepted any more, and after `server.drain.timeout` at the latest this returns. The result is whether every
    /// query was answered.
    pub async fn run(self, stop: impl Future<Output = ()>) -> bool {
        let Self { runtime, options, serving, admin } = self;
        let (phase, phases) = watch::channel(Phase::Serving);
        let (stop_watch, stopped) = watch::channel(false);
        // Each is aborted by dropping its handle's set at the end.
        let mut helpers = tokio::task::JoinSet::new();
        helpers.spawn(reload::watch(runtime.clone(), options.config.clone()));
        helpers.spawn(monitoring::run(runtime.clone(), runtime.changes()));
        helpers.spawn(runtime.clone().housekeep(stopped.clone()));
        let results = tokio::spawn(results::run(runtime.clone(), stopped));
        // The admin port serves to the very end, since that is when people look.
        let (_admin_phase, admin_phases) = watch::channel(Phase::Serving);
        helpers.spawn(listen(admin, runtime.clone(), Port::Admin, options.patience.clone(), admin_phases));
        let serve = listen(serving, runtime.clone(), Port::Serving, options.patience.clone(), phases);
        tokio::pin!(serve);

        tokio::select! {
            () = stop => {}
            _ = &mut serve => {}
        }
        runtime.draining.store(true, Ordering::Relaxed);
        phase.send_replace(Phase::Leaving);
        let drain = runtime.snapshot().config.server.drain.clone();
        tracing::info!(delay = ?drain.delay, timeout = ?drain.timeout, "draining");
        tokio::select! {
            () = sleep(drain.delay) => {}
            _ = &mut serve => {}
        }
        phase.send_replace(Phase::Closing);
        let drained = timeout(drain.timeout, serve).await.is_ok();
        let left = runtime.inflight.load(Ordering::Relaxed);
        match drained {
            true => tracing::info!("drained"),
            false => {
                tracing::warn!(queries = left, "connections are cut, since server.drain.timeout is over")
            }
        }
        stop_watch.send_replace(true);
        // It has a time-out of its own, and cannot fail.
        let _ = results.await;
        drained || left == 0
    }
}

/// Accepts until the phase is closing, then waits for the last connection.
async fn listen(
    listener: TcpListener,
    runtime: Arc<Runtime>,
    port: Port,
    patience: Patience,
    mut phases: watch::Receiver<Phase>,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS as usize));
    let told = phases.clone();
    let spawn = |stream: TcpStream, slot: OwnedSemaphorePermit| {
        tokio::spawn(connection(stream, runtime.clone(), port, patience.clone(), told.clone(), slot));
    };
    loop {
        tokio::select! {
            accepted = accept(&listener, &slots) => match accepted {
                Ok((stream, slot)) => spawn(stream, slot),
                Err(error) => {
                    // Out of file descriptors, most likely: without a pause this loop would spin.
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(Duration::from_millis(100)).await;
                }
            },
            () = closing(&mut phases) => break,
        }
    }
    // Who is in the kernel's queue believes to be connected: serve them too, or they would see a reset.
    while let Some(Ok((stream, slot))) = futures::FutureExt::now_or_never(accept(&listener, &slots)) {
        spawn(stream, slot);
    }
    drop(listener);
    // All slots are free when the last connection is gone.
    let _ = slots.acquire_many(MAX_CONNECTIONS).await;
}

/// Completes when the port closes.
async fn closing(phases: &mut watch::Receiver<Phase>) {
    // An error means that nobody can tell the phase any more, which is the end as well.
    let _ = phases.wait_for(|phase| *phase == Phase::Closing).await;
}

async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let slot = slots.clone().acquire_owned().await.map_err(std::io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    // Without it small answers wait for the client's delayed acknowledgement. Fails only on a dead socket.
    let _ = stream.set_nodelay(true);
    Ok((stream, slot))
}

async fn connection(
    stream: TcpStream,
    runtime: Arc<Runtime>,
    port: Port,
    patience: Patience,
    mut phases: watch::Receiver<Phase>,
    slot: OwnedSemaphorePermit,
) {
    let opened = Instant::now();
    let leaving = phases.clone();
    let service = service_fn(|request: Request<Incoming>| {
        let (runtime, patience, leaving) = (&runtime, &patience, &leaving);
        async move {
            let mut reply = api::serve(runtime, port, request, patience.body).await;
            api::sign(&mut reply, &runtime.instance);
            if opened.elapsed() >= patience.age || *leaving.borrow() != Phase::Serving {
                api::close(&mut reply);
            }
            Ok::<_, std::convert::Infallible>(reply)
        }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(patience.header);
    http.max_headers(MAX_HEADERS).max_header_size(MAX_HEADER).max_buf_size(MAX_BUFFER);
    let connection = http.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    // A client that takes no answer would hold its connection for ever: no other time-out sees it.
    let dispatch = &runtime.snapshot().config.dispatch;
    let deadline = dispatch.deadline.max(dispatch.stream_deadline);
    let longest = patience.age + patience.header + patience.body + deadline + patience.answer;
    let mut told = false;
    loop {
        tokio::select! {
            // Errors are the client's: it went away, was too slow or spoke no HTTP, which hyper has told it.
            _ = connection.as_mut() => break,
            () = sleep_until((opened + longest).into()) => break,
            () = closing(&mut phases), if !told => {
                told = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
    drop(slot);
}
