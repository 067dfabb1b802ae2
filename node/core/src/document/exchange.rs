//! What a document takes in and what it asks for.

use std::time::Duration;

use bytes::Bytes;

use crate::ids::{ConnectionId, Seq};
use crate::wire::relay::{ToEdge, UpdateKind};

/// An edge as the owner knows it: one stream of one node, or the owner's own edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EdgeId(pub u64);

/// A client's socket, anywhere in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer {
    /// The edge that holds it.
    pub edge: EdgeId,
    /// The socket there.
    pub connection: ConnectionId,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// An edge opened its channel; `since` is what all its sockets have (V1 state vector), or empty.
    Attach {
        /// The edge.
        edge: EdgeId,
        /// State vector or nothing.
        since: Bytes,
    },
    /// An edge closed its channel or is gone.
    Detach {
        /// The edge.
        edge: EdgeId,
    },
    /// A socket joined.
    Join {
        /// The socket.
        peer: Peer,
        /// The authenticated user, or empty.
        author: String,
    },
    /// A socket left.
    Leave {
        /// The socket.
        peer: Peer,
    },
    /// A client wants what it lacks.
    Step1 {
        /// The socket.
        peer: Peer,
        /// V1 state vector.
        state_vector: Bytes,
    },
    /// A client's edit.
    Update {
        /// The socket.
        peer: Peer,
        /// Counts the socket's updates.
        number: u64,
        /// Answer to a step 1, or a single change.
        kind: UpdateKind,
        /// V1 update.
        update: Bytes,
    },
    /// What a client that may only read has: receipted if the document has it, too.
    Compare {
        /// The socket.
        peer: Peer,
        /// As in [`Input::Update`].
        number: u64,
        /// V1 update.
        update: Bytes,
    },
    /// A message of a client's application to the others.
    Stateless {
        /// The socket.
        peer: Peer,
        /// The application's own.
        payload: Bytes,
    },
    /// A client's presence, received at `now`.
    Awareness {
        /// The socket.
        peer: Peer,
        /// Payload as in y-protocols.
        payload: Bytes,
        /// Any monotonic clock, always the same.
        now: Duration,
    },
    /// A client asks for everyone's presence.
    QueryAwareness {
        /// The socket.
        peer: Peer,
    },
    /// Time passes: presence that was not renewed ends.
    Expire {
        /// The clock of [`Input::Awareness`].
        now: Duration,
    },
    /// What an earlier memory of this document held when the store lost its last moments: whatever of it is missing here
    /// is written again.
    Restore {
        /// V1 update of that whole state.
        state: Bytes,
    },
    /// Every update up to this position is durable.
    Committed {
        /// The position.
        seq: Seq,
    },
    /// The store does not answer; the next [`Input::Committed`] says that it does again.
    StoreAway,
}

impl Input {
    /// Whether it may be about the content of the document.
    pub(super) const fn needs_content(&self) -> bool {
        match self {
            Self::Attach { .. }
            | Self::Join { .. }
            | Self::Step1 { .. }
            | Self::Update { .. }
            | Self::Compare { .. }
            | Self::Restore { .. } => true,
            Self::Detach { .. }
            | Self::Leave { .. }
            | Self::Stateless { .. }
            | Self::Awareness { .. }
            | Self::QueryAwareness { .. }
            | Self::Expire { .. }
            | Self::Committed { .. }
            | Self::StoreAway => false,
        }
    }
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send to every attached edge; a sender named in it is `from`, known only to its own edge.
    FanOut {
        /// The socket that sent it, which already has it.
        from: Option<Peer>,
        /// V1 update.
        update: Bytes,
    },
    /// Send presence to every attached edge.
    Presence {
        /// Awareness payload.
        payload: Bytes,
    },
    /// Send to one edge.
    Send {
        /// The edge.
        to: EdgeId,
        /// What.
        message: ToEdge,
    },
    /// Append to the log and report [`Input::Committed`].
    Append {
        /// Its position.
        seq: Seq,
        /// The client's bytes as they came.
        update: Bytes,
        /// The authenticated user, or empty.
        author: String,
    },
    /// An update was not admitted; count it.
    NotAdmitted {
        /// For the metric: `invalid`, `conflict`, `gap`, `resync`, `degraded`, `full` or `unsaved`.
        reason: &'static str,
    },
    /// Throw the document away and open it again from the store.
    Reload,
}
