//! Links over WebSocket, on the internal listener.

use std::future::ready;
use std::io::ErrorKind;

use async_trait::async_trait;
use axum::extract::ws::{Message as AxumMessage, WebSocket};
use bytes::Bytes;
use collab_core::limits::FRAME_BYTES_MAX;
use futures::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};
use uuid::Uuid;

use super::link::{Dial, Frame, Link, LinkError};

/// Path of the stream on the internal listener.
pub const STREAM_PATH: &str = "/peer/v1/stream";
/// Says which incarnation answers.
pub const INCARNATION_HEADER: &str = "x-collab-incarnation";
/// Snapshots of large documents pass as one message.
pub const STREAM_MESSAGE_BYTES_MAX: usize = 16 * FRAME_BYTES_MAX;

/// Dials with the token of the cluster.
#[derive(Clone, Debug)]
pub struct WebSocketDial {
    /// Sent as bearer token.
    pub token: Option<String>,
}

#[async_trait]
impl Dial for WebSocketDial {
    async fn dial(&self, address: &str) -> Result<Link, LinkError> {
        let mut request = format!("ws://{address}{STREAM_PATH}")
            .into_client_request()
            .map_err(failed)?;
        if let Some(token) = &self.token
            && let Ok(value) = format!("Bearer {token}").parse()
        {
            request.headers_mut().insert("authorization", value);
        }
        let config = WebSocketConfig::default()
            .max_message_size(Some(STREAM_MESSAGE_BYTES_MAX))
            .max_frame_size(Some(STREAM_MESSAGE_BYTES_MAX));
        let connect = tokio_tungstenite::connect_async_with_config(request, Some(config), true);
        let (socket, response) = connect.await.map_err(failed)?;
        let answers = response.headers().get(INCARNATION_HEADER);
        let answers = answers.and_then(|answers| Uuid::try_parse_ascii(answers.as_bytes()).ok());
        let (sink, stream) = socket.split();
        let sent = |frame| match frame {
            Frame::Data(data) => Message::Binary(data),
            Frame::Alive => Message::Ping(Bytes::new()),
        };
        let received = |message| match message {
            Ok(Message::Binary(data)) => Ok(Frame::Data(data)),
            Ok(_) => Ok(Frame::Alive),
            Err(error) => Err(failed(error)),
        };
        let open =
            |message: &Result<Message, Error>| ready(!matches!(message, Ok(Message::Close(_))));
        Ok(Link {
            answers,
            outgoing: Box::pin(
                sink.sink_map_err(failed)
                    .with(move |frame| ready(Ok(sent(frame)))),
            ),
            incoming: Box::pin(stream.take_while(open).map(received)),
        })
    }
}

/// The link of a node that dialled this one.
pub fn accepted(socket: WebSocket) -> Link {
    let (sink, stream) = socket.split();
    let failed = |error: axum::Error| LinkError::Broken(error.to_string());
    let sent = |frame| match frame {
        Frame::Data(data) => AxumMessage::Binary(data),
        Frame::Alive => AxumMessage::Ping(Bytes::new()),
    };
    let received = move |message| match message {
        Ok(AxumMessage::Binary(data)) => Ok(Frame::Data(data)),
        Ok(_) => Ok(Frame::Alive),
        Err(error) => Err(failed(error)),
    };
    let open = |message: &Result<AxumMessage, axum::Error>| {
        ready(!matches!(message, Ok(AxumMessage::Close(_))))
    };
    Link {
        answers: None,
        outgoing: Box::pin(
            sink.sink_map_err(failed)
                .with(move |frame| ready(Ok(sent(frame)))),
        ),
        incoming: Box::pin(stream.take_while(open).map(received)),
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "it stands where an error is mapped"
)]
fn failed(error: Error) -> LinkError {
    match &error {
        Error::Io(io) if io.kind() == ErrorKind::ConnectionRefused => LinkError::Refused,
        error => LinkError::Broken(error.to_string()),
    }
}
