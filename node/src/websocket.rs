//! The server's side of a client's WebSocket (RFC 6455).
//!
//! Turns of many messages cost one call of the system: all that waits for a client is written together, and all that it
//! sent is read at once, into memory that the sockets of a thread share. Whoever has messages for a client writes them
//! itself, as long as the system takes them: a turn of the socket's own task would cost as much again. A socket that is idle
//! holds no buffer. There are no extensions: compression is a way to bombs of a thousand to one.

use std::cell::RefCell;
use std::io::{self, ErrorKind, IoSlice};
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use axum::extract::FromRequestParts;
use axum::extract::ws::Message;
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Buf, Bytes};
use futures::{Sink, Stream};
use hyper::upgrade::{OnUpgrade, Parts as UpgradedParts};
use hyper_util::rt::TokioIo;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::io::poll_read_buf;

mod inbox;
mod outgoing;

use crate::edge::{Direct, Sent};
use crate::listener::{Place, Placed};
use inbox::Inbox;
use outgoing::Outgoing;

/// So much is read at once.
const READ_BYTES: usize = 64 * 1024;
/// Room that is made at once for a message that is longer.
const LONG_READ_BYTES: usize = 1024 * 1024;
/// As much may wait for the end of a turn. A client that takes less is not answered its pings either.
const WAITING_BYTES_MAX: usize = 64 * 1024;
/// Parts that are written at once.
const SLICES: usize = 64;

thread_local! {
    /// What is read passes through here, and is copied to as much memory as it takes.
    static READ: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
    /// What is sent directly is put together here, and seldom has to wait.
    static SENT: RefCell<Outgoing> = RefCell::default();
}

/// A request for a WebSocket.
pub struct Upgrade {
    upgrade: OnUpgrade,
    accept: HeaderValue,
}

/// A request that is none, or one that this side cannot serve.
#[derive(Debug)]
pub struct NotWebSocket(&'static str);

impl IntoResponse for NotWebSocket {
    fn into_response(self) -> Response {
        let headers = [
            (header::UPGRADE, "websocket"),
            (header::SEC_WEBSOCKET_VERSION, "13"),
        ];
        (StatusCode::UPGRADE_REQUIRED, headers, self.0).into_response()
    }
}

impl<S: Sync> FromRequestParts<S> for Upgrade {
    type Rejection = NotWebSocket;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, NotWebSocket> {
        let names = |header: HeaderName, token: &str| {
            let values = parts.headers.get_all(header).into_iter();
            let mut words = values
                .filter_map(|value| value.to_str().ok())
                .flat_map(|value| value.split(','));
            words.any(|word| word.trim().eq_ignore_ascii_case(token))
        };
        let asked = parts.method == Method::GET
            && names(header::CONNECTION, "upgrade")
            && names(header::UPGRADE, "websocket");
        if !asked {
            return Err(NotWebSocket("this address speaks WebSocket\n"));
        }
        if !names(header::SEC_WEBSOCKET_VERSION, "13") {
            return Err(NotWebSocket("the version of WebSocket is not 13\n"));
        }
        let key = parts.headers.get(header::SEC_WEBSOCKET_KEY);
        let accept = key.map(|key| derive_accept_key(key.as_bytes()));
        let accept = accept.and_then(|accept| HeaderValue::try_from(accept).ok());
        let accept = accept.ok_or(NotWebSocket("Sec-WebSocket-Key is missing\n"))?;
        let upgrade = parts.extensions.remove::<OnUpgrade>();
        let upgrade = upgrade.ok_or(NotWebSocket("this connection cannot be upgraded\n"))?;
        Ok(Self { upgrade, accept })
    }
}

impl Upgrade {
    /// Accepts, and serves the socket once it is there, with a way to send beside its task. Boxed: it passes through several
    /// futures, each with room for it.
    pub fn on_upgrade<F>(
        self,
        serve: impl FnOnce(Box<Socket>, Arc<dyn Direct>) -> F + Send + 'static,
    ) -> Response
    where
        F: Future<Output = ()> + Send + 'static,
    {
        tokio::spawn(async move {
            match self.upgrade.await {
                Ok(upgraded) => {
                    if let Ok(parts) = upgraded.downcast() {
                        let socket = Box::new(Socket::new(parts));
                        let direct = socket.writer.clone();
                        serve(socket, direct).await;
                    } else {
                        tracing::error!("a socket that the listener of clients did not accept");
                    }
                }
                Err(error) => tracing::debug!(%error, "a client left while its socket was opened"),
            }
        });
        let headers = [
            (header::CONNECTION, HeaderValue::from_static("upgrade")),
            (header::UPGRADE, HeaderValue::from_static("websocket")),
            (header::SEC_WEBSOCKET_ACCEPT, self.accept),
        ];
        (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Continuation = 0,
    Text = 1,
    Binary = 2,
    Close = 8,
    Ping = 9,
    Pong = 10,
}

impl Kind {
    fn of(code: u8) -> Option<Self> {
        let all = [
            Self::Continuation,
            Self::Text,
            Self::Binary,
            Self::Close,
            Self::Ping,
            Self::Pong,
        ];
        all.into_iter().find(|kind| *kind as u8 == code)
    }

    fn is_control(self) -> bool {
        8 <= self as u8
    }
}

/// Why a socket has ended.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The connection broke.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The client broke the rules, and was told so.
    #[error("{0}")]
    Violation(String),
}

/// A client's socket. Pings are answered by it; a message that is too large closes it (1009).
pub struct Socket {
    reader: OwnedReadHalf,
    inbox: Inbox,
    writer: Arc<Writer>,
    /// Nothing is read any more.
    ended: bool,
    _place: Place,
}

/// The side of a socket that writes.
#[derive(Debug)]
struct Writer(Mutex<Writing>);

#[derive(Debug)]
struct Writing {
    stream: OwnedWriteHalf,
    outgoing: Outgoing,
    /// A close frame is the last one.
    closed: bool,
}

impl Socket {
    fn new(parts: UpgradedParts<TokioIo<Placed>>) -> Self {
        let (stream, place) = parts.io.into_inner().into_parts();
        let (reader, stream) = stream.into_split();
        let mut inbox = Inbox::default();
        inbox.bytes().extend_from_slice(&parts.read_buf);
        let writing = Writing {
            stream,
            outgoing: Outgoing::default(),
            closed: false,
        };
        Self {
            reader,
            inbox,
            writer: Arc::new(Writer(Mutex::new(writing))),
            ended: false,
            _place: place,
        }
    }

    /// Reads what there is; `false`: the client has closed.
    fn poll_read(&mut self, context: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let missing = self.inbox.missing();
        let (io, bytes) = (Pin::new(&mut self.reader), self.inbox.bytes());
        if READ_BYTES < missing {
            bytes.reserve(missing.min(LONG_READ_BYTES));
            return poll_read_buf(io, context, bytes).map_ok(|read| 0 < read);
        }
        READ.with_borrow_mut(|memory| {
            let mut read = ReadBuf::new(memory);
            ready!(io.poll_read(context, &mut read))?;
            bytes.extend_from_slice(read.filled());
            Poll::Ready(Ok(!read.filled().is_empty()))
        })
    }

    /// The client has closed, or is to be: says so, if it is not too late for that.
    fn end(&mut self, context: &mut Context<'_>, code: Option<u16>, reason: &str) {
        self.ended = true;
        let mut writing = self.writer.lock();
        writing.push(Kind::Close, &close_payload(code, reason));
        let _ = writing.poll_write(context);
    }
}

impl Writer {
    fn lock(&self) -> MutexGuard<'_, Writing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Direct for Writer {
    fn send(&self, frames: &[Bytes]) -> Sent {
        let mut writing = self.lock();
        if writing.closed || writing.outgoing.has_remaining() {
            return Sent::Nothing;
        }
        let Writing {
            stream, outgoing, ..
        } = &mut *writing;
        SENT.with_borrow_mut(|sent| {
            for frame in frames {
                sent.push(Kind::Binary, frame);
            }
            // The runtime's record of what the socket would take stays where it lies, out of the cache: the system knows.
            let stream: &TcpStream = (*stream).as_ref();
            let stream = SockRef::from(stream);
            let written = write(sent, |slices| {
                Poll::Ready(match slices {
                    [slice] => stream.send(slice),
                    slices => stream.send_vectored(slices),
                })
            });
            // If it was not, the socket's task learns why.
            if matches!(written, Poll::Ready(Ok(()))) {
                Sent::All
            } else {
                mem::swap(sent, outgoing);
                Sent::Part
            }
        })
    }
}

impl Writing {
    fn push(&mut self, kind: Kind, payload: &Bytes) {
        if !self.closed {
            self.closed = kind == Kind::Close;
            self.outgoing.push(kind, payload);
        }
    }

    fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let written = write(&mut self.outgoing, |slices| {
            let stream = Pin::new(&mut self.stream);
            match slices {
                [slice] => stream.poll_write(context, slice),
                slices => stream.poll_write_vectored(context, slices),
            }
        });
        if written.is_ready() {
            // Most sockets have nothing to send at any moment.
            self.outgoing = Outgoing::default();
        }
        written
    }
}

/// Writes all there is, as much as the system takes `once` at a time.
fn write(
    outgoing: &mut Outgoing,
    mut once: impl FnMut(&[IoSlice<'_>]) -> Poll<io::Result<usize>>,
) -> Poll<io::Result<()>> {
    while outgoing.has_remaining() {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let count = outgoing.chunks_vectored(&mut slices);
        let written = ready!(once(&slices[..count]))?;
        if written == 0 {
            return Poll::Ready(Err(ErrorKind::WriteZero.into()));
        }
        outgoing.advance(written);
    }
    Poll::Ready(Ok(()))
}

impl Stream for Socket {
    type Item = Result<Message, SocketError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if let Poll::Ready(Err(error)) = this.writer.lock().poll_write(context) {
            this.ended = true;
            return Poll::Ready(Some(Err(error.into())));
        }
        while !this.ended {
            match this.inbox.next() {
                Ok(Some(message)) => {
                    match &message {
                        Message::Ping(payload) => {
                            let mut writing = this.writer.lock();
                            if writing.outgoing.remaining() < WAITING_BYTES_MAX {
                                writing.push(Kind::Pong, payload);
                                let _ = writing.poll_write(context);
                            }
                        }
                        Message::Close(frame) => {
                            let code = frame.as_ref().map(|frame| frame.code);
                            this.end(context, code, "");
                        }
                        _ => {}
                    }
                    return Poll::Ready(Some(Ok(message)));
                }
                Ok(None) => {}
                Err(violation) => {
                    let reason = violation.to_string();
                    this.end(context, Some(violation.code()), &reason);
                    return Poll::Ready(Some(Err(SocketError::Violation(reason))));
                }
            }
            match ready!(this.poll_read(context)) {
                Ok(true) => {}
                Ok(false) => this.ended = true,
                Err(error) => {
                    this.ended = true;
                    return Poll::Ready(Some(Err(error.into())));
                }
            }
        }
        Poll::Ready(None)
    }
}

impl Sink<Message> for Socket {
    type Error = io::Error;

    fn poll_ready(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut writing = self.writer.lock();
        if writing.outgoing.remaining() < WAITING_BYTES_MAX {
            Poll::Ready(Ok(()))
        } else {
            writing.poll_write(context)
        }
    }

    fn start_send(self: Pin<&mut Self>, message: Message) -> io::Result<()> {
        let (kind, payload) = match message {
            Message::Binary(bytes) => (Kind::Binary, bytes),
            Message::Text(text) => (Kind::Text, text.into()),
            Message::Ping(bytes) => (Kind::Ping, bytes),
            Message::Pong(bytes) => (Kind::Pong, bytes),
            Message::Close(frame) => {
                let code = frame.as_ref().map(|frame| frame.code);
                let reason = frame.as_ref().map_or("", |frame| frame.reason.as_str());
                (Kind::Close, close_payload(code, reason))
            }
        };
        self.writer.lock().push(kind, &payload);
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writer.lock().poll_write(context)
    }

    fn poll_close(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut writing = self.writer.lock();
        ready!(writing.poll_write(context))?;
        Pin::new(&mut writing.stream).poll_shutdown(context)
    }
}

/// What a close frame carries: nothing, or a code and a reason of at most 123 bytes.
fn close_payload(code: Option<u16>, reason: &str) -> Bytes {
    code.map_or_else(Bytes::new, |code| {
        let reason = &reason[..reason.floor_char_boundary(123)];
        [&code.to_be_bytes(), reason.as_bytes()].concat().into()
    })
}
