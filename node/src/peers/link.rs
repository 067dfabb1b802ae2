//! What a stream between nodes needs of its transport: frames in order, and signs of life.

use std::pin::Pin;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{Sink, Stream};
use uuid::Uuid;

/// What passes on a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A message.
    Data(Bytes),
    /// Sent: the other end is to answer with a sign of life. Received: it lives.
    Alive,
}

/// A connection between two nodes. Its end is the end of `incoming`.
pub struct Link {
    /// The incarnation at the other end, as it says itself; `None` on a link that was accepted, and of an older version.
    pub answers: Option<Uuid>,
    /// Frames to the other end.
    pub outgoing: Pin<Box<dyn Sink<Frame, Error = LinkError> + Send>>,
    /// Frames from there.
    pub incoming: Pin<Box<dyn Stream<Item = Result<Frame, LinkError>> + Send>>,
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody listens there: the process has ended, or has not begun.
    #[error("the connection was refused")]
    Refused,
    /// Another incarnation answers: the process that was there has ended, or has begun again.
    #[error("another incarnation answers there")]
    AnotherAnswers,
    /// There was no sign of life in time.
    #[error("the other end is silent")]
    Silent,
    /// It broke, or was never one.
    #[error("{0}")]
    Broken(String),
}

/// Opens links to other nodes.
#[async_trait]
pub trait Dial: Send + Sync + 'static {
    /// Connects to the internal listener at `address` (`host:port`).
    async fn dial(&self, address: &str) -> Result<Link, LinkError>;
}
