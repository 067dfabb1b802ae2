//! Where the tasks of a node run.
//!
//! On the runtime, as any others. The simulation gives each of its nodes a gate that every turn of every
//! task passes, so that one node stands still or dies while the world goes on; and it has heavy work
//! done at once, since a pool of threads has an order of its own.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, Waker};

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::{AbortHandle, JoinError, JoinHandle};

/// Spawns the tasks of one node. A clone spawns for the same node.
#[derive(Clone, Default)]
pub struct Tasks {
    gate: Option<Arc<dyn Gate>>,
}

/// What stands between the tasks of a node and their turns.
pub trait Gate: Send + Sync + 'static {
    /// Whether a task may take its turn now. If not, `waker` is to be woken once it may.
    fn admits(&self, waker: &Waker) -> bool;

    /// A task of the node was spawned.
    fn spawned(&self, task: AbortHandle);
}

impl Tasks {
    /// Tasks whose turns pass a gate.
    pub fn behind(gate: Arc<dyn Gate>) -> Self {
        Self { gate: Some(gate) }
    }

    /// Runs a task beside the others, whether or not somebody waits for its end.
    pub fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        let Some(gate) = self.gate.clone() else {
            return tokio::spawn(task);
        };
        let behind = gate.clone();
        let handle = tokio::spawn(async move {
            let mut task = pin!(task);
            poll_fn(|context| {
                if gate.admits(context.waker()) {
                    task.as_mut().poll(context)
                } else {
                    Poll::Pending
                }
            })
            .await
        });
        behind.spawned(handle.abort_handle());
        handle
    }

    /// Does work that takes the processor for long where it stands, while the other tasks of the thread go on elsewhere.
    pub fn compute_here<T>(&self, work: impl FnOnce() -> T) -> T {
        let flavor = Handle::current().runtime_flavor();
        if self.gate.is_none() && flavor == RuntimeFlavor::MultiThread {
            tokio::task::block_in_place(work)
        } else {
            work()
        }
    }

    /// Does work that takes the processor for long, apart from the threads that serve sockets.
    ///
    /// # Errors
    /// When the work panicked.
    pub async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        match self.gate {
            None => tokio::task::spawn_blocking(work).await,
            Some(_) => Ok(work()),
        }
    }
}
