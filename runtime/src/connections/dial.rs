//! Opening a connection: name look-up, TCP, TLS, and the protocol that both sides speak.
//!
//! One provider of cryptography for the whole tree (aws-lc-rs). The public roots are compiled in, since the image has
//! no files of its own; a file of more roots comes from the configuration.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    client::conn::{http1, http2},
    rt::{Read, Write},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use prometheus_client::metrics::gauge::Gauge;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{net::TcpStream, sync::Mutex};
use tokio_rustls::TlsConnector;

use super::Address;
use crate::{config::Http2, metrics::Service};

/// Largest header of an answer, in bytes.
const MAX_HEADER: usize = 32 << 10;
/// Largest read buffer of an HTTP/1.1 connection, in bytes.
const MAX_BUFFER: usize = 64 << 10;
/// Bytes of answers that an HTTP/2 connection, and one stream of it, may send ahead of their reader.
const WINDOW: u32 = 1 << 20;
const STREAM_WINDOW: u32 = 256 << 10;
/// An HTTP/2 connection with streams is asked for a sign of life so often, and must give it in so long.
const PING: Duration = Duration::from_secs(20);
const PONG: Duration = Duration::from_secs(10);

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The sending half of a new connection.
#[derive(Debug)]
pub(super) enum Sender {
    H1(http1::SendRequest<Full<Bytes>>),
    H2(http2::SendRequest<Full<Bytes>>),
}

/// How a pool opens connections.
#[derive(Debug)]
pub(super) struct Dialer {
    http2: Http2,
    /// How long a name's addresses are remembered; `None`: not at all.
    dns_ttl: Option<Duration>,
    tls: Option<Arc<ClientConfig>>,
}

/// What is remembered of a host's name.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    /// Locked while the system is asked, so that many who wait for one name ask once.
    addresses: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
    turn: AtomicUsize,
}

/// Counts a socket in the metrics for as long as it is open.
struct Open(Gauge);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The trust that TLS connections need: the public roots, and those of a PEM file.
pub(super) fn trust(ca_file: Option<&Path>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    if let Some(path) = ca_file {
        let wrong = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let certificates = CertificateDer::pem_file_iter(path).map_err(|e| wrong(&e))?;
        let before = roots.len();
        for certificate in certificates {
            roots.add(certificate.map_err(|e| wrong(&e))?).map_err(|e| wrong(&e))?;
        }
        if roots.len() == before {
            return Err(wrong(&"there is no certificate in it; write PEM, from BEGIN CERTIFICATE on"));
        }
    }
    Ok(roots)
}

impl Dialer {
    /// `roots` is needed for hosts that speak TLS only.
    pub(super) fn new(
        http2: Http2,
        dns_ttl: Option<Duration>,
        roots: Option<RootCertStore>,
    ) -> Result<Self, String> {
        let tls = |roots| {
            let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
            let builder = builder.with_safe_default_protocol_versions().map_err(|e| e.to_string())?;
            let mut config = builder.with_root_certificates(roots).with_no_client_auth();
            if http2 != Http2::Never {
                config.alpn_protocols.push(b"h2".to_vec());
            }
            config.alpn_protocols.push(b"http/1.1".to_vec());
            Ok::<_, String>(Arc::new(config))
        };
        Ok(Self { http2, dns_ttl, tls: roots.map(tls).transpose()? })
    }

    /// Whether a connection to `address` may turn out to carry many requests.
    pub(super) fn may_multiplex(&self, address: &Address) -> bool {
        match self.http2 {
            Http2::Never => false,
            Http2::Auto => address.tls,
            Http2::PriorKnowledge => true,
        }
    }

    /// Opens a connection; its metrics follow the socket's own life.
    pub(super) async fn connect(
        &self,
        address: &Address,
        known: &Resolved,
        service: &Service,
    ) -> Result<Sender, Error> {
        let stream = self.tcp(address, known, service).await?;
        stream.set_nodelay(true)?;
        if !address.tls {
            let multiplex = self.http2 == Http2::PriorKnowledge;
            return handshake(TokioIo::new(stream), multiplex, service).await;
        }
        let tls = self.tls.clone().ok_or("this pool was made without TLS")?;
        let name = ServerName::try_from(address.host.clone())?;
        let stream = TlsConnector::from(tls).connect(name, stream).await?;
        let multiplex = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        handshake(TokioIo::new(stream), multiplex, service).await
    }

    async fn tcp(
        &self,
        address: &Address,
        known: &Resolved,
        service: &Service,
    ) -> std::io::Result<TcpStream> {
        let Some(ttl) = self.dns_ttl else {
            service.lookups.inc();
            return TcpStream::connect((address.host.as_str(), address.port)).await;
        };
        let (addresses, remembered) = known.addresses(address, Some(ttl), service).await?;
        match self.first(&addresses, known).await {
            // They may have moved since.
            Err(_) if remembered => {
                let (addresses, _) = known.addresses(address, None, service).await?;
                self.first(&addresses, known).await
            }
            done => done,
        }
    }

    /// The first address that accepts, beginning with another one each time.
    async fn first(&self, addresses: &[SocketAddr], known: &Resolved) -> std::io::Result<TcpStream> {
        let turn = known.turn.fetch_add(1, Ordering::Relaxed);
        let mut last = std::io::Error::other("the name has no address");
        for i in 0..addresses.len() {
            match TcpStream::connect(addresses[(turn + i) % addresses.len()]).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

impl Resolved {
    #[cfg(test)]
    pub(super) async fn remember(&self, addresses: Vec<SocketAddr>) {
        *self.addresses.lock().await = Some((Instant::now(), addresses));
    }

    /// The addresses, and whether they were remembered rather than asked for. Without `ttl` they are asked for.
    async fn addresses(
        &self,
        address: &Address,
        ttl: Option<Duration>,
        service: &Service,
    ) -> std::io::Result<(Vec<SocketAddr>, bool)> {
        let mut known = self.addresses.lock().await;
        if let (Some((since, addresses)), Some(ttl)) = (&*known, ttl)
            && since.elapsed() < ttl
        {
            return Ok((addresses.clone(), true));
        }
        service.lookups.inc();
        *known = None;
        let found = tokio::net::lookup_host((address.host.as_str(), address.port)).await?;
        let addresses: Vec<SocketAddr> = found.collect();
        *known = Some((Instant::now(), addresses.clone()));
        Ok((addresses, false))
    }
}

/// Says hello on a fresh stream.
async fn handshake<S>(stream: S, multiplex: bool, service: &Service) -> Result<Sender, Error>
where
    S: Read + Write + Unpin + Send + 'static,
{
    let counted = || {
        service.opened.inc();
        service.open.inc();
        Open(service.open.clone())
    };
    // An error of a connection is also the error of the requests on it, which report it.
    if multiplex {
        let mut http = http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new()).keep_alive_interval(PING).keep_alive_timeout(PONG);
        http.initial_connection_window_size(WINDOW).initial_stream_window_size(STREAM_WINDOW);
        http.max_header_list_size(MAX_HEADER as u32);
        let (sender, connection) = http.handshake(stream).await?;
        let open = counted();
        tokio::spawn(async move {
            let _ = connection.await;
            drop(open);
        });
        return Ok(Sender::H2(sender));
    }
    let mut http = http1::Builder::new();
    http.max_header_size(MAX_HEADER).max_buf_size(MAX_BUFFER);
    let (sender, connection) = http.handshake(stream).await?;
    let open = counted();
    tokio::spawn(async move {
        let _ = connection.await;
        drop(open);
    });
    Ok(Sender::H1(sender))
}
