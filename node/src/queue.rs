//! A queue between tasks that takes no memory while it is empty.
//!
//! A node has several for each document and socket, most of them empty at any moment; those of
//! `tokio::sync::mpsc` begin with room for 32 messages, which adds up to more than a small document itself.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use tokio::task::coop::cooperative;

/// Puts messages in; clones put into the same queue.
#[derive(Debug)]
pub struct Sender<T>(Arc<Shared<T>>);

/// A [`Sender`] that does not keep the queue open.
#[derive(Debug)]
pub struct WeakSender<T>(Weak<Shared<T>>);

/// Takes messages out, in order.
#[derive(Debug)]
pub struct Receiver<T>(Arc<Shared<T>>);

/// There is nothing in the queue now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the queue is empty")]
pub struct Empty;

/// Nobody takes any more; the message comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nobody takes from the queue any more")]
pub struct Closed<T>(pub T);

#[derive(Debug)]
struct Shared<T> {
    inner: Mutex<Inner<T>>,
    senders: AtomicUsize,
}

#[derive(Debug)]
struct Inner<T> {
    messages: VecDeque<T>,
    /// Of the one that waits for a message.
    waker: Option<Waker>,
    closed: bool,
}

/// An empty queue.
pub fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        inner: Mutex::new(Inner {
            messages: VecDeque::new(),
            waker: None,
            closed: false,
        }),
        senders: AtomicUsize::new(1),
    });
    (Sender(shared.clone()), Receiver(shared))
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is no message: has the task woken by the next, unless none will come.
    fn wait(&self, inner: &mut Inner<T>, context: &Context<'_>) -> Poll<()> {
        if inner.closed || self.senders.load(Ordering::Acquire) == 0 {
            return Poll::Ready(());
        }
        let known = inner.waker.as_ref();
        if !known.is_some_and(|waker| waker.will_wake(context.waker())) {
            inner.waker = Some(context.waker().clone());
        }
        Poll::Pending
    }
}

impl<T> Sender<T> {
    /// Adds a message.
    ///
    /// # Errors
    /// When nobody will take it.
    pub fn send(&self, message: T) -> Result<(), Closed<T>> {
        let mut inner = self.0.lock();
        if inner.closed {
            return Err(Closed(message));
        }
        inner.messages.push_back(message);
        let waker = inner.waker.take();
        drop(inner);
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    /// Nobody takes any more.
    pub fn is_closed(&self) -> bool {
        self.0.lock().closed
    }

    /// Both put into the same queue.
    pub fn same_channel(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// One that does not keep the queue open.
    pub fn downgrade(&self) -> WeakSender<T> {
        WeakSender(Arc::downgrade(&self.0))
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.senders.fetch_add(1, Ordering::Relaxed);
        Self(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if self.0.senders.fetch_sub(1, Ordering::AcqRel) == 1 {
            let waker = self.0.lock().waker.take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

impl<T> Clone for WeakSender<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> WeakSender<T> {
    /// A sender, if there is another one.
    pub fn upgrade(&self) -> Option<Sender<T>> {
        let shared = self.0.upgrade()?;
        let more = |senders: usize| (0 < senders).then_some(senders + 1);
        shared
            .senders
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
            .ok()?;
        Some(Sender(shared))
    }
}

impl<T> Receiver<T> {
    /// Waits for the next message; `None` once there is none and none will come. Nothing is lost when this is dropped.
    pub async fn recv(&mut self) -> Option<T> {
        // A task that is never out of messages must let others have their turn.
        cooperative(poll_fn(|context| {
            let mut inner = self.0.lock();
            if let Some(message) = inner.take() {
                return Poll::Ready(Some(message));
            }
            self.0.wait(&mut inner, context).map(|()| None)
        }))
        .await
    }

    /// Waits until there is a message, and leaves it there; `false` once there is none and none will come.
    pub async fn ready(&mut self) -> bool {
        cooperative(poll_fn(|context| {
            let mut inner = self.0.lock();
            if !inner.messages.is_empty() {
                return Poll::Ready(true);
            }
            self.0.wait(&mut inner, context).map(|()| false)
        }))
        .await
    }

    /// The next message.
    ///
    /// # Errors
    /// When there is none now.
    pub fn try_recv(&mut self) -> Result<T, Empty> {
        self.0.lock().take().ok_or(Empty)
    }

    /// There is no message now.
    pub fn is_empty(&self) -> bool {
        self.0.lock().messages.is_empty()
    }

    /// Lets nothing in any more; what is there can be taken.
    pub fn close(&mut self) {
        self.0.lock().closed = true;
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        inner.closed = true;
        inner.waker = None;
        let messages = std::mem::take(&mut inner.messages);
        // What they hold may send to this queue as it goes.
        drop(inner);
        drop(messages);
    }
}

impl<T> Inner<T> {
    fn take(&mut self) -> Option<T> {
        let message = self.messages.pop_front()?;
        if self.messages.is_empty() {
            self.messages = VecDeque::new();
        }
        Some(message)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn messages_come_in_order_and_who_waits_is_woken() {
        let (sender, mut receiver) = unbounded();
        assert!(receiver.recv().now_or_never().is_none());
        assert!(receiver.ready().now_or_never().is_none());
        let other = sender.clone();
        let all = tokio::spawn(async move {
            let mut all = Vec::new();
            while let Some(message) = receiver.recv().await {
                all.push(message);
            }
            all
        });
        for message in 0..1_000 {
            if message % 300 == 0 {
                tokio::task::yield_now().await;
            }
            [&sender, &other][message % 2].send(message).unwrap();
        }
        drop((sender, other));
        assert_eq!(all.await.unwrap(), (0..1_000).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_queue_ends_with_its_last_sender_or_its_receiver() {
        let (sender, mut receiver) = unbounded();
        let weak = sender.downgrade();
        weak.upgrade().unwrap().send(1).unwrap();
        drop(sender);
        assert!(weak.upgrade().is_none() && receiver.ready().await);
        assert_eq!(
            (receiver.recv().await, receiver.recv().await),
            (Some(1), None)
        );
        assert!(!receiver.ready().await);

        let (sender, mut receiver) = unbounded();
        sender.send(1).unwrap();
        receiver.close();
        assert_eq!(sender.send(2), Err(Closed(2)));
        assert_eq!(
            (receiver.try_recv(), receiver.try_recv()),
            (Ok(1), Err(Empty))
        );
        drop(receiver);
        assert!(sender.is_closed());
    }

    #[tokio::test]
    async fn who_never_runs_out_of_messages_lets_others_have_their_turn() {
        let (sender, mut receiver) = unbounded();
        for message in 0..10_000 {
            sender.send(message).unwrap();
        }
        let busy = async { while receiver.recv().await.is_some() {} };
        assert!(busy.now_or_never().is_none());
    }

    #[test]
    fn a_burst_leaves_no_memory_behind() {
        let (sender, mut receiver) = unbounded();
        for message in 0..10_000 {
            sender.send(message).unwrap();
        }
        while receiver.try_recv().is_ok() {}
        assert_eq!(receiver.0.lock().messages.capacity(), 0);
    }
}
