//! The server's side of a client's WebSocket (RFC 6455).
//!
//! What goes to a thousand sockets is one allocation: each writes its frames from where they lie, several
//! with one call of the system, and a large message in frames that take turns with what else the system
//! has to send. The library behind it neither copies nor keeps buffers for what is not there.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::extract::FromRequestParts;
use axum::extract::ws::{CloseFrame, Message};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use collab_core::limits::FRAME_BYTES_MAX;
use futures::{Sink, Stream};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_websockets::{CloseCode, Config, Error, Limits, ServerBuilder, WebSocketStream};

/// A message longer than this is sent in frames of this size; as much may wait for the end of a turn.
const FRAGMENT_BYTES: usize = 64 * 1024;
/// The code of a close frame without one (RFC 6455 section 7.1.5).
const NO_STATUS: u16 = 1005;

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
    /// Accepts, and serves the socket once it is there.
    pub fn on_upgrade<F>(self, serve: impl FnOnce(Socket) -> F + Send + 'static) -> Response
    where
        F: Future<Output = ()> + Send + 'static,
    {
        tokio::spawn(async move {
            match self.upgrade.await {
                Ok(upgraded) => serve(Socket::new(upgraded)).await,
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

/// A client's socket. Pings are answered by it; a message that is too large closes it (1009).
pub struct Socket(WebSocketStream<TokioIo<Upgraded>>);

impl Socket {
    fn new(upgraded: Upgraded) -> Self {
        let builder = ServerBuilder::new()
            .config(
                Config::default()
                    .frame_size(FRAGMENT_BYTES)
                    .flush_threshold(FRAGMENT_BYTES),
            )
            .limits(Limits::default().max_payload_len(Some(FRAME_BYTES_MAX)));
        Self(builder.serve(TokioIo::new(upgraded)))
    }
}

impl Stream for Socket {
    type Item = Result<Message, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let received = ready!(Pin::new(&mut self.0).poll_next(context));
        if let Some(Err(_)) = received {
            // A close frame that says what was wrong waits to be sent; it may be too late for that.
            let _ = Pin::new(&mut self.0).poll_flush(context);
        }
        Poll::Ready(received.map(|received| received.map(message_of)))
    }
}

impl Sink<Message> for Socket {
    type Error = Error;

    fn poll_ready(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Pin::new(&mut self.0).poll_ready(context)
    }

    fn start_send(mut self: Pin<&mut Self>, message: Message) -> Result<(), Error> {
        let message = match message {
            Message::Binary(bytes) => tokio_websockets::Message::binary(bytes),
            Message::Text(text) => tokio_websockets::Message::text(Bytes::from(text)),
            Message::Ping(bytes) => tokio_websockets::Message::ping(bytes),
            Message::Pong(bytes) => tokio_websockets::Message::pong(bytes),
            Message::Close(frame) => {
                let code = frame
                    .as_ref()
                    .and_then(|frame| CloseCode::try_from(frame.code).ok());
                let reason = frame.as_ref().map_or("", |frame| frame.reason.as_str());
                tokio_websockets::Message::close(code, reason)
            }
        };
        Pin::new(&mut self.0).start_send(message)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Pin::new(&mut self.0).poll_close(context)
    }
}

fn message_of(message: tokio_websockets::Message) -> Message {
    if let Some((code, reason)) = message.as_close() {
        let code = u16::from(code);
        return Message::Close((code != NO_STATUS).then(|| CloseFrame {
            code,
            reason: reason.into(),
        }));
    }
    let message_as: fn(Bytes) -> Message = if message.is_binary() {
        Message::Binary
    } else if message.is_ping() {
        Message::Ping
    } else if message.is_pong() {
        Message::Pong
    } else {
        // What it says is of no use: text is not part of any protocol here.
        |_| Message::Text("".into())
    };
    message_as(message.into_payload().into())
}
