//! What waits for a socket to take it.
//!
//! A room puts frames, the socket's task takes all there are at once and writes them together. Nothing is allocated for a
//! socket that is idle.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use bytes::Bytes;
use collab_core::ids::ConnectionId;
use collab_core::limits::{SOCKET_QUEUE_BYTES_MAX, SOCKET_QUEUE_FRAMES_MAX};

use super::Close;
use super::room::FromSocket;
use crate::queue;

/// Memory for as many frames is kept; that of a burst is given back.
const KEPT_FRAMES: usize = 16;

/// The frames of one socket, and what else its rooms have to say to it.
#[derive(Debug, Default)]
pub(super) struct Outbox(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    frames: Vec<Bytes>,
    /// Frames and bytes that were put and not yet [sent](Taker::sent).
    unsent: (usize, usize),
    /// Rooms that have done with a connection: it is to be closed.
    ends: Vec<(ConnectionId, Close)>,
    /// The rooms that want to hear when all of it is sent, and for which of their connections.
    awaited: Vec<(queue::Sender<FromSocket>, ConnectionId)>,
    taker: Option<Waker>,
    /// Nobody takes any more.
    closed: bool,
}

/// The end where a socket takes. Dropping it closes the other.
#[derive(Debug)]
pub(super) struct Taker(Arc<Outbox>);

/// What was taken.
#[derive(Debug)]
pub(super) enum Taken {
    /// A room has done with a connection.
    End(ConnectionId, Close),
    /// All frames there were, so many bytes together.
    Frames(usize),
}

impl Outbox {
    /// An empty one.
    pub(super) fn new() -> (Arc<Self>, Taker) {
        let outbox = Arc::new(Self::default());
        (outbox.clone(), Taker(outbox))
    }

    /// Adds a frame. A socket that is gone leaves by itself.
    pub(super) fn put(&self, frame: Bytes) {
        let mut inner = self.lock();
        if inner.closed {
            return;
        }
        inner.unsent.0 += 1;
        inner.unsent.1 += frame.len();
        inner.frames.push(frame);
        wake(inner);
    }

    /// Adds frames, all at once.
    pub(super) fn put_all(&self, frames: impl IntoIterator<Item = Bytes>) {
        let mut inner = self.lock();
        if inner.closed {
            return;
        }
        let before = inner.frames.len();
        inner.frames.extend(frames);
        let added = &inner.frames[before..];
        let (count, bytes) = (added.len(), added.iter().map(Bytes::len).sum::<usize>());
        inner.unsent.0 += count;
        inner.unsent.1 += bytes;
        if 0 < count {
            wake(inner);
        }
    }

    /// A room has done with a connection.
    pub(super) fn end(&self, connection: ConnectionId, close: Close) {
        let mut inner = self.lock();
        if !inner.closed {
            inner.ends.push((connection, close));
            wake(inner);
        }
    }

    /// So much waits that the socket gets the difference instead.
    pub(super) fn is_full(&self) -> bool {
        let (frames, bytes) = self.lock().unsent;
        SOCKET_QUEUE_FRAMES_MAX <= frames || SOCKET_QUEUE_BYTES_MAX <= bytes
    }

    /// Tells a room once all that waits is sent.
    pub(super) fn tell_when_sent(&self, room: queue::Sender<FromSocket>, connection: ConnectionId) {
        self.lock().awaited.push((room, connection));
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taker {
    /// Waits for something, ends first. Frames go to `batch`, which is empty; they count until they are
    /// [sent](Taker::sent). Nothing is lost when this is dropped.
    pub(super) async fn take(&self, batch: &mut Vec<Bytes>) -> Taken {
        poll_fn(|context| {
            let mut inner = self.0.lock();
            if let Some((connection, close)) = inner.ends.pop() {
                return Poll::Ready(Taken::End(connection, close));
            }
            if inner.frames.is_empty() {
                let known = inner.taker.as_ref();
                if !known.is_some_and(|taker| taker.will_wake(context.waker())) {
                    inner.taker = Some(context.waker().clone());
                }
                return Poll::Pending;
            }
            std::mem::swap(batch, &mut inner.frames);
            drop(inner);
            Poll::Ready(Taken::Frames(batch.iter().map(Bytes::len).sum()))
        })
        .await
    }

    /// Counts off what was sent, and tells those who wait for it that nothing is left. `batch` is empty again.
    pub(super) fn sent(&self, frames: usize, bytes: usize, batch: &mut Vec<Bytes>) {
        if KEPT_FRAMES < batch.capacity() {
            *batch = Vec::new();
        }
        let mut inner = self.0.lock();
        inner.unsent.0 -= frames;
        inner.unsent.1 -= bytes;
        if inner.unsent.0 == 0 {
            for (room, connection) in inner.awaited.drain(..) {
                let _ = room.send(FromSocket::Drained { connection });
            }
        }
    }

    /// The oldest frame, counted as sent.
    #[cfg(test)]
    pub(super) fn try_take(&self) -> Option<Bytes> {
        let mut inner = self.0.lock();
        if inner.frames.is_empty() {
            return None;
        }
        let frame = inner.frames.remove(0);
        inner.unsent.0 -= 1;
        inner.unsent.1 -= frame.len();
        Some(frame)
    }
}

impl Drop for Taker {
    fn drop(&mut self) {
        *self.0.lock() = Inner {
            closed: true,
            ..Inner::default()
        };
    }
}

fn wake(mut inner: MutexGuard<'_, Inner>) {
    let taker = inner.taker.take();
    drop(inner);
    if let Some(taker) = taker {
        taker.wake();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn all_that_waits_is_taken_at_once_and_counts_until_it_is_sent() {
        let (outbox, queue) = Outbox::new();
        let mut batch = Vec::new();
        assert!(queue.take(&mut batch).now_or_never().is_none());
        let half = Bytes::from(vec![0; SOCKET_QUEUE_BYTES_MAX / 2]);
        outbox.put(half.clone());
        assert!(!outbox.is_full());
        outbox.put(half.clone());
        let Taken::Frames(bytes) = queue.take(&mut batch).await else {
            panic!("frames")
        };
        assert_eq!((batch.len(), bytes), (2, SOCKET_QUEUE_BYTES_MAX));
        assert!(outbox.is_full());
        let (room, mut told) = queue::unbounded();
        outbox.tell_when_sent(room, ConnectionId(7));
        outbox.put(half.clone());
        batch.clear();
        queue.sent(2, bytes, &mut batch);
        assert!(told.try_recv().is_err() && !outbox.is_full());
        queue.take(&mut batch).await;
        batch.clear();
        queue.sent(1, half.len(), &mut batch);
        assert!(matches!(told.try_recv(), Ok(FromSocket::Drained { .. })));
    }

    #[tokio::test]
    async fn frames_that_are_put_together_are_counted_and_taken_together() {
        let (outbox, queue) = Outbox::new();
        let mut batch = Vec::new();
        outbox.put_all([]);
        assert!(queue.take(&mut batch).now_or_never().is_none());
        outbox.put("one".into());
        outbox.put_all(["two".into(), "three".into()]);
        assert!(matches!(queue.take(&mut batch).await, Taken::Frames(11)));
        assert_eq!(batch, ["one", "two", "three"]);
        drop(queue);
        outbox.put_all([Bytes::from(vec![0; SOCKET_QUEUE_BYTES_MAX])]);
        assert!(!outbox.is_full(), "nobody takes it");
    }

    #[tokio::test]
    async fn an_end_goes_before_frames_and_who_waits_is_woken() {
        let (outbox, queue) = Outbox::new();
        let taken = tokio::spawn(async move {
            let taken = queue.take(&mut Vec::new()).await;
            (taken, queue)
        });
        tokio::task::yield_now().await;
        outbox.end(ConnectionId(7), Close::new(1008, "no"));
        let (taken, queue) = taken.await.unwrap();
        assert!(matches!(taken, Taken::End(ConnectionId(7), _)));
        outbox.put(Bytes::from_static(b"frame"));
        outbox.end(ConnectionId(8), Close::new(1008, "no"));
        let mut batch = Vec::new();
        assert!(matches!(queue.take(&mut batch).await, Taken::End(..)));
        assert!(matches!(queue.take(&mut batch).await, Taken::Frames(5)));
        drop(queue);
        outbox.put(Bytes::from(vec![0; SOCKET_QUEUE_BYTES_MAX]));
        assert!(!outbox.is_full(), "nobody takes it");
    }
}
