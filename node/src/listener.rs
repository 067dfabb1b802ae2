//! Takes the connections of clients: how many there may be, and how long they may take to say what they want.
//!
//! A connection has its place here as long as it is open, also after it became a WebSocket. Who finds none is
//! told to come back (503, or 429 when it is its address that has too many), so that those who are in stay
//! well, and so that the process never runs out of file descriptors for what it needs itself.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use collab_core::limits::{HEADERS_WITHIN, OWN_FILES};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tower::ServiceExt;

use crate::metrics::Metrics;

/// Before accepting is tried again after the system refused.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);
/// How long someone who is turned away may take to hear it.
const FAREWELL: Duration = Duration::from_secs(1);

/// How many connections there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// In all.
    pub max: usize,
    /// From one address; `None`: as many as there are places.
    pub per_address_max: Option<usize>,
}

impl Places {
    /// As many as wished for, and as the limit of open files has room for beside the node's own.
    #[must_use]
    pub fn within_open_files(self) -> Self {
        let Some(files) = open_files_max() else {
            return self;
        };
        let room = files.saturating_sub(OWN_FILES).max(files / 2);
        if room < self.max {
            tracing::info!(
                open_files = files,
                connections = room,
                "the limit of open files allows fewer connections than --connections-max"
            );
        }
        Self {
            max: self.max.min(room),
            ..self
        }
    }
}

/// The limit of open files (`RLIMIT_NOFILE`), where the system tells it.
fn open_files_max() -> Option<usize> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Serves clients until the process ends.
pub async fn serve(listener: TcpListener, router: Router, places: Places, metrics: Metrics) {
    let taken = Arc::new(Taken::default());
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADERS_WITHIN);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) if is_of_the_connection(&error) => continue,
            Err(error) => {
                tracing::warn!(%error, "no connection can be accepted now");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        // Small frames must not wait for the acknowledgement of earlier ones.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "no TCP_NODELAY");
        }
        match taken.take(peer.ip(), places) {
            Ok(place) => {
                let stream = TokioIo::new(Placed { stream, place });
                let service = router
                    .clone()
                    .map_request(|request: Request<Incoming>| request.map(Body::new));
                let served = http
                    .serve_connection(stream, TowerToHyperService::new(service))
                    .with_upgrades();
                tokio::spawn(async move {
                    if let Err(error) = served.await {
                        tracing::debug!(%error, "a connection ended");
                    }
                });
            }
            Err(full) => {
                metrics
                    .connections_refused
                    .with_label_values(&[full.reason()])
                    .inc();
                tokio::spawn(timeout(FAREWELL, turn_away(stream, full)));
            }
        }
    }
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Full {
    Node,
    Address,
}

impl Full {
    const fn reason(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Address => "address",
        }
    }
}

async fn turn_away(mut stream: TcpStream, full: Full) -> io::Result<()> {
    let (status, why) = match full {
        Full::Node => (
            "503 Service Unavailable",
            "this node has as many connections as it may have",
        ),
        Full::Address => (
            "429 Too Many Requests",
            "this address has as many connections as it may have",
        ),
    };
    let length = why.len() + 1;
    let answer = format!(
        "HTTP/1.1 {status}\r\nretry-after: 5\r\nconnection: close\r\ncontent-type: text/plain\r\ncontent-length: {length}\r\n\r\n{why}\n"
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await?;
    // What is not read would make the system take the answer back.
    let mut rest = [0; 1024];
    while 0 < stream.read(&mut rest).await? {}
    Ok(())
}

/// Errors of `accept` that are about one connection only.
fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset
    )
}

/// The places that are taken.
#[derive(Debug, Default)]
struct Taken(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    by_address: HashMap<IpAddr, usize>,
}

impl Taken {
    fn take(self: &Arc<Self>, address: IpAddr, places: Places) -> Result<Place, Full> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if places.max <= taken.all {
            return Err(Full::Node);
        }
        let of_address = taken.by_address.entry(address).or_default();
        if places.per_address_max.is_some_and(|max| max <= *of_address) {
            return Err(Full::Address);
        }
        *of_address += 1;
        taken.all += 1;
        drop(taken);
        Ok(Place {
            taken: self.clone(),
            address,
        })
    }
}

/// A place that is given back when this is dropped.
#[derive(Debug)]
pub struct Place {
    taken: Arc<Taken>,
    address: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.taken.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all -= 1;
        if let Some(of_address) = taken.by_address.get_mut(&self.address) {
            *of_address -= 1;
            if *of_address == 0 {
                taken.by_address.remove(&self.address);
            }
        }
    }
}

/// A connection with its place.
pub struct Placed {
    stream: TcpStream,
    place: Place,
}

impl Placed {
    /// The place is to be kept as long as the connection is.
    pub fn into_parts(self) -> (TcpStream, Place) {
        (self.stream, self.place)
    }
}

impl AsyncRead for Placed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Placed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, from)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, from)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_free_again_when_its_connection_ends() {
        let [here, there] = [[127, 0, 0, 1], [127, 0, 0, 2]].map(IpAddr::from);
        let places = Places {
            max: 3,
            per_address_max: Some(2),
        };
        let taken = Arc::new(Taken::default());
        let first = taken.take(here, places).unwrap();
        let _second = taken.take(here, places).unwrap();
        assert_eq!(taken.take(here, places).unwrap_err(), Full::Address);
        let _third = taken.take(there, places).unwrap();
        assert_eq!(taken.take(there, places).unwrap_err(), Full::Node);
        drop(first);
        assert!(taken.take(here, places).is_ok());
        assert_eq!(taken.0.lock().unwrap().by_address.len(), 2);
    }
}
