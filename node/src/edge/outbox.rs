//! What waits for a socket to take it.
//!
//! A room adds frames and flushes them at the end of its turn: they are written at once, without a turn of the socket's
//! task, if the socket takes them and nothing goes before. Else the task takes all there are and writes them together.
//! Nothing is allocated for a socket that is idle.

use std::fmt::Debug;
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
/// More is written by the socket's task: others in the room do not wait for it.
const DIRECT_BYTES_MAX: usize = 64 * 1024;

/// Writes to a socket from beside its task.
pub trait Direct: Debug + Send + Sync {
    /// Sends messages, if nothing goes before them.
    fn send(&self, frames: &[Bytes]) -> Sent;
}

/// What became of messages that were sent directly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The system has all of them.
    All,
    /// They will be sent whole, once the socket's task flushes.
    Part,
    /// Nothing.
    Nothing,
}

/// The frames of one socket, and what else its rooms have to say to it.
#[derive(Debug, Default)]
pub(super) struct Outbox(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    direct: Option<Arc<dyn Direct>>,
    frames: Vec<Bytes>,
    /// Frames and bytes that were put and not yet [sent](Taker::sent).
    unsent: (usize, usize),
    /// As many of them are in the socket and wait for a flush.
    in_socket: (usize, usize),
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
    /// All frames there were, with those that are in the socket already: so many frames and bytes together.
    Frames(usize, usize),
}

impl Outbox {
    /// An empty one.
    pub(super) fn new(direct: Option<Arc<dyn Direct>>) -> (Arc<Self>, Taker) {
        let inner = Inner {
            direct,
            ..Inner::default()
        };
        let outbox = Arc::new(Self(Mutex::new(inner)));
        (outbox.clone(), Taker(outbox))
    }

    /// Adds a frame for the socket's task. A socket that is gone leaves by itself.
    pub(super) fn put(&self, frame: Bytes) {
        let mut inner = self.lock();
        inner.add([frame]);
        wake(inner);
    }

    /// Sends what was added, or has the socket's task do it. Answers how many frames were sent.
    fn flush(&self) -> usize {
        let mut inner = self.lock();
        let (count, bytes) = inner.unsent;
        let task_has_none = count == inner.frames.len();
        let sent = match &inner.direct {
            Some(direct) if 0 < count && task_has_none && bytes <= DIRECT_BYTES_MAX => {
                direct.send(&inner.frames)
            }
            _ => Sent::Nothing,
        };
        if sent == Sent::Nothing {
            if !inner.frames.is_empty() {
                wake(inner);
            }
            return 0;
        }
        inner.frames = Vec::new();
        if sent == Sent::All {
            inner.unsent = (0, 0);
            inner.tell_who_awaits();
        } else {
            inner.in_socket = (count, bytes);
            wake(inner);
        }
        count
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
        self.lock().is_full()
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
            if inner.frames.is_empty() && inner.in_socket.0 == 0 {
                let known = inner.taker.as_ref();
                if !known.is_some_and(|taker| taker.will_wake(context.waker())) {
                    inner.taker = Some(context.waker().clone());
                }
                return Poll::Pending;
            }
            std::mem::swap(batch, &mut inner.frames);
            let (count, bytes) = std::mem::take(&mut inner.in_socket);
            drop(inner);
            let bytes = bytes + batch.iter().map(Bytes::len).sum::<usize>();
            Poll::Ready(Taken::Frames(count + batch.len(), bytes))
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
        inner.tell_who_awaits();
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

impl Inner {
    /// Adds frames, all at once, to be [flushed](Outbox::flush). Answers whether they are the first since.
    fn add(&mut self, frames: impl IntoIterator<Item = Bytes>) -> bool {
        if self.closed {
            return false;
        }
        let before = self.frames.len();
        self.frames.extend(frames);
        let added = &self.frames[before..];
        let (count, bytes) = (added.len(), added.iter().map(Bytes::len).sum::<usize>());
        self.unsent.0 += count;
        self.unsent.1 += bytes;
        before == 0 && 0 < count
    }

    fn is_full(&self) -> bool {
        let (frames, bytes) = self.unsent;
        SOCKET_QUEUE_FRAMES_MAX <= frames || SOCKET_QUEUE_BYTES_MAX <= bytes
    }

    fn tell_who_awaits(&mut self) {
        if self.unsent.0 == 0 {
            for (room, connection) in self.awaited.drain(..) {
                let _ = room.send(FromSocket::Drained { connection });
            }
        }
    }
}

/// The sockets that a room has something for, and flushes together at the end of its turn.
#[derive(Debug, Default)]
pub(super) struct Turn(Mutex<Vec<Arc<Outbox>>>);

impl Turn {
    /// Adds frames for a socket.
    pub(super) fn add(&self, outbox: &Arc<Outbox>, frames: impl IntoIterator<Item = Bytes>) {
        if outbox.lock().add(frames) {
            self.lock().push(outbox.clone());
        }
    }

    /// Adds frames for a socket, unless it is [full](Outbox::is_full). Answers whether it was not.
    pub(super) fn offer(
        &self,
        outbox: &Arc<Outbox>,
        frames: impl IntoIterator<Item = Bytes>,
    ) -> bool {
        let mut inner = outbox.lock();
        if inner.is_full() {
            return false;
        }
        if inner.add(frames) {
            self.lock().push(outbox.clone());
        }
        true
    }

    /// Ends the turn. Answers how many frames were sent.
    pub(super) fn end(&self) -> usize {
        let mut outboxes = std::mem::take(&mut *self.lock());
        let sent = outboxes.drain(..).map(|outbox| outbox.flush()).sum();
        if outboxes.capacity() <= KEPT_FRAMES {
            *self.lock() = outboxes;
        }
        sent
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Outbox>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        let (outbox, queue) = Outbox::new(None);
        let mut batch = Vec::new();
        assert!(queue.take(&mut batch).now_or_never().is_none());
        let half = Bytes::from(vec![0; SOCKET_QUEUE_BYTES_MAX / 2]);
        outbox.put(half.clone());
        assert!(!outbox.is_full());
        outbox.put(half.clone());
        let Taken::Frames(count, bytes) = queue.take(&mut batch).await else {
            panic!("frames")
        };
        assert_eq!((count, bytes), (2, SOCKET_QUEUE_BYTES_MAX));
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
        let (outbox, queue) = Outbox::new(None);
        let mut batch = Vec::new();
        assert!(!outbox.lock().add([]));
        assert!(queue.take(&mut batch).now_or_never().is_none());
        assert!(outbox.lock().add(["one".into()]));
        assert!(!outbox.lock().add(["two".into(), "three".into()]));
        assert!(matches!(queue.take(&mut batch).await, Taken::Frames(3, 11)));
        assert_eq!(batch, ["one", "two", "three"]);
        drop(queue);
        outbox
            .lock()
            .add([Bytes::from(vec![0; SOCKET_QUEUE_BYTES_MAX])]);
        assert!(!outbox.is_full(), "nobody takes it");
    }

    /// A socket that does with messages what it is told to.
    #[derive(Debug)]
    struct Told(Mutex<(Sent, Vec<Bytes>)>);

    impl Told {
        fn does(&self, sent: Sent) {
            self.0.lock().unwrap().0 = sent;
        }
    }

    impl Direct for Told {
        fn send(&self, frames: &[Bytes]) -> Sent {
            let mut inner = self.0.lock().unwrap();
            if inner.0 != Sent::Nothing {
                inner.1.extend_from_slice(frames);
            }
            inner.0
        }
    }

    #[tokio::test]
    async fn a_turn_is_sent_directly_unless_something_goes_before() {
        let socket = Arc::new(Told(Mutex::new((Sent::All, Vec::new()))));
        let (outbox, queue) = Outbox::new(Some(socket.clone()));
        let (turn, mut batch) = (Turn::default(), Vec::new());
        let add = |frame: &'static str| turn.add(&outbox, [frame.into()]);
        let (room, mut told) = queue::unbounded();

        add("1");
        add("2");
        outbox.tell_when_sent(room.clone(), ConnectionId(7));
        assert_eq!((turn.end(), turn.end()), (2, 0));
        assert!(matches!(told.try_recv(), Ok(FromSocket::Drained { .. })));
        assert!(queue.take(&mut batch).now_or_never().is_none());
        let kept = outbox.lock().frames.capacity();
        assert_eq!(kept, 0, "an idle socket takes no memory");

        // The socket has it, and its task is to see that it goes out.
        socket.does(Sent::Part);
        add("3");
        outbox.tell_when_sent(room, ConnectionId(7));
        assert_eq!(turn.end(), 1);
        add("4");
        assert_eq!(turn.end(), 0);
        assert!(matches!(queue.take(&mut batch).await, Taken::Frames(2, 2)));
        assert_eq!(batch, ["4"]);

        // Its task has that in hand.
        socket.does(Sent::All);
        add("5");
        assert_eq!(turn.end(), 0);
        batch.clear();
        queue.sent(2, 2, &mut batch);
        assert!(told.try_recv().is_err());
        assert!(matches!(queue.take(&mut batch).await, Taken::Frames(1, 1)));
        batch.clear();
        queue.sent(1, 1, &mut batch);
        assert!(matches!(told.try_recv(), Ok(FromSocket::Drained { .. })));

        socket.does(Sent::Nothing);
        add("6");
        assert_eq!(turn.end(), 0);
        assert!(matches!(queue.take(&mut batch).await, Taken::Frames(1, 1)));
        assert_eq!(socket.0.lock().unwrap().1, ["1", "2", "3"]);
    }

    #[tokio::test]
    async fn an_end_goes_before_frames_and_who_waits_is_woken() {
        let (outbox, queue) = Outbox::new(None);
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
        assert!(matches!(queue.take(&mut batch).await, Taken::Frames(1, 5)));
        drop(queue);
        outbox.put(Bytes::from(vec![0; SOCKET_QUEUE_BYTES_MAX]));
        assert!(!outbox.is_full(), "nobody takes it");
    }
}
