//! Frames between the edge that holds a client's socket and the owner of its document.
//!
//! One stream per pair of nodes carries any number of *channels*, one per document and edge, chosen by the
//! edge. The owner sends one copy of an update per edge, never per client. The same messages go
//! through memory when edge and owner are one process.
//!
//! A frame is `kind: u8, channel: u32` and then the fields of its message in order; integers are
//! little-endian, byte strings have their length (`u32`) in front except the last one, which
//! takes the rest. Kinds are only ever added to.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::ids::{ConnectionId, DocumentId, Epoch};

/// A channel of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Channel(pub u32);

/// How an update reached the edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpdateKind {
    /// The answer to a step 1: everything the client has and the server lacked.
    Step2,
    /// A single change.
    Update,
}

/// From the edge to the owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToOwner {
    /// Opens the channel. `since` is the state vector (V1) of what every socket of the edge has;
    /// empty when no socket has anything yet.
    Attach {
        /// The document.
        document: DocumentId,
        /// State vector, or empty.
        since: Bytes,
    },
    /// Closes the channel.
    Detach,
    /// A socket that may read joined; the owner answers with its step 1 and the presence.
    Join {
        /// The socket.
        connection: ConnectionId,
        /// The authenticated user, or empty.
        author: String,
    },
    /// The socket is gone, and its presence with it.
    Leave {
        /// The socket.
        connection: ConnectionId,
    },
    /// The client's state vector: it wants a step 2.
    Step1 {
        /// The socket.
        connection: ConnectionId,
        /// V1 state vector.
        state_vector: Bytes,
    },
    /// The client's edit.
    Update {
        /// The socket.
        connection: ConnectionId,
        /// Counts this socket's updates, from 1, over all owners.
        number: u64,
        /// How it came.
        kind: UpdateKind,
        /// V1 update.
        update: Bytes,
    },
    /// The client's presence.
    Awareness {
        /// The socket.
        connection: ConnectionId,
        /// Awareness payload as in y-protocols.
        payload: Bytes,
    },
    /// The client asks for everyone's presence.
    QueryAwareness {
        /// The socket.
        connection: ConnectionId,
    },
    /// From the owner to the node that it is about to hand a document to: read it now, so that the
    /// tail is all that is left to read then. Answered by [`ToEdge::Preloaded`], on a channel that has no document.
    Preload {
        /// The document.
        document: DocumentId,
    },
    /// The step 2 of a client that may only read: a receipt says that the document has all that is
    /// in it. Nothing of it is applied.
    Compare {
        /// The socket.
        connection: ConnectionId,
        /// As in [`ToOwner::Update`].
        number: u64,
        /// V1 update.
        update: Bytes,
    },
    /// A message of the client's application to the others.
    Stateless {
        /// The socket.
        connection: ConnectionId,
        /// UTF-8.
        payload: Bytes,
    },
    /// Asks for the map of slots, which the edge cannot read from the store. Answered by [`ToEdge::Map`], on a channel that
    /// has no document.
    AskMap,
}

/// From the owner to the edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToEdge {
    /// The channel is open; `catch_up` is what happened since the state vector in `Attach`, for
    /// every socket that was synced (empty when there was none).
    Attached {
        /// The epoch of the owner.
        epoch: Epoch,
        /// State vector (V1) of the document now.
        state_vector: Bytes,
    },
    /// An update that every synced socket of the edge lacks: what an earlier owner's end made it miss.
    CatchUp {
        /// V1 update.
        update: Bytes,
    },
    /// An edit, for every socket but its sender.
    FanOut {
        /// The sender, when it is a socket of this edge.
        except: Option<ConnectionId>,
        /// V1 update.
        update: Bytes,
    },
    /// Presence, for every socket.
    Presence {
        /// Awareness payload.
        payload: Bytes,
    },
    /// Presence, for one socket.
    PresenceTo {
        /// The socket.
        connection: ConnectionId,
        /// Awareness payload.
        payload: Bytes,
    },
    /// Asks the client for what the owner lacks.
    Step1 {
        /// The socket.
        connection: ConnectionId,
        /// V1 state vector of the owner.
        state_vector: Bytes,
    },
    /// What the client lacks; committed.
    Step2 {
        /// The socket.
        connection: ConnectionId,
        /// V1 update.
        update: Bytes,
    },
    /// Every update of the socket up to this number is durable, or contained in one that is.
    Receipt {
        /// The socket.
        connection: ConnectionId,
        /// Number of the update.
        upto: u64,
    },
    /// The socket sent something that will never be accepted; close it.
    Refused {
        /// The socket.
        connection: ConnectionId,
        /// For the client and the log.
        reason: String,
    },
    /// A message of an application, for every other socket whose family knows such messages.
    Stateless {
        /// The sender, when it is a socket of this edge.
        except: Option<ConnectionId>,
        /// UTF-8.
        payload: Bytes,
    },
    /// The document is not (any more) here; look at the map for an owner of at least this epoch.
    Moved {
        /// What the answering node knows.
        epoch: Epoch,
    },
    /// The document cannot be served. Clients are told; the channel is closed.
    Unavailable {
        /// Why.
        cause: Unavailable,
        /// For the client and the log.
        reason: String,
    },
    /// Answers one [`ToOwner::Preload`], whether or not the document could be read.
    Preloaded,
    /// Answers [`ToOwner::AskMap`].
    Map {
        /// A [`SharedMap`](super::map::SharedMap).
        map: Bytes,
    },
    /// What the client lacks of the last committed state, while the store is away. A [`ToEdge::Step2`] follows:
    /// edits that are fanned out meanwhile may build on what this leaves out.
    CommittedStep2 {
        /// The socket.
        connection: ConnectionId,
        /// V1 update.
        update: Bytes,
    },
    /// The beginning of what a client lacks, committed. More parts follow, and at last a [`ToEdge::Step2`] or
    /// [`ToEdge::CommittedStep2`] with the rest.
    Part {
        /// The socket.
        connection: ConnectionId,
        /// V1 update.
        update: Bytes,
    },
    /// Too much waits for its commit: read no more edits.
    Pause,
    /// Ends [`ToEdge::Pause`].
    Resume,
    /// What is stored is damaged, and what follows is its good part; edits are refused. Comes before [`ToEdge::Attached`].
    ReadOnly {
        /// For the client and the log.
        reason: String,
    },
}

/// Why a document cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// It was deleted.
    Deleted,
    /// Its stored rows are damaged.
    Degraded,
    /// The store does not answer; try again.
    Store,
    /// The owner has no memory left for it; try again later.
    Full,
}

/// Why bytes are no relay frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RelayError {
    /// Shorter than its fields.
    #[error("relay frame ends early")]
    Truncated,
    /// A peer of a newer version; the frame cannot be understood.
    #[error("relay frame of unknown kind {0}")]
    UnknownKind(u8),
    /// A text that is not UTF-8 or no document id.
    #[error("relay frame has a bad text")]
    BadText,
}

impl ToOwner {
    /// Makes the frame.
    pub fn encode(&self, channel: Channel) -> Bytes {
        let mut out = frame(self.kind(), channel);
        match self {
            Self::Attach { document, since } => {
                put_sized(&mut out, document.as_str().as_bytes());
                out.put_slice(since);
            }
            Self::Detach | Self::AskMap => {}
            Self::Preload { document } => out.put_slice(document.as_str().as_bytes()),
            Self::Join { connection, author } => {
                out.put_u64_le(connection.0);
                out.put_slice(author.as_bytes());
            }
            Self::Leave { connection } | Self::QueryAwareness { connection } => {
                out.put_u64_le(connection.0);
            }
            Self::Step1 {
                connection,
                state_vector: bytes,
            }
            | Self::Awareness {
                connection,
                payload: bytes,
            }
            | Self::Stateless {
                connection,
                payload: bytes,
            } => {
                out.put_u64_le(connection.0);
                out.put_slice(bytes);
            }
            Self::Compare {
                connection,
                number,
                update,
            } => {
                out.put_u64_le(connection.0);
                out.put_u64_le(*number);
                out.put_slice(update);
            }
            Self::Update {
                connection,
                number,
                kind,
                update,
            } => {
                out.put_u64_le(connection.0);
                out.put_u64_le(*number);
                out.put_u8(u8::from(*kind == UpdateKind::Step2));
                out.put_slice(update);
            }
        }
        out.freeze()
    }

    /// Reads a frame; the byte strings share its memory.
    ///
    /// # Errors
    /// When the bytes are no frame of this version.
    pub fn decode(frame: Bytes) -> Result<(Channel, Self), RelayError> {
        let (kind, channel, mut rest) = head(frame)?;
        let message = match kind {
            1 => {
                let document = sized(&mut rest)?;
                let document =
                    DocumentId::new(text(&document)?).map_err(|_| RelayError::BadText)?;
                Self::Attach {
                    document,
                    since: rest,
                }
            }
            2 => Self::Detach,
            3 => {
                let connection = connection(&mut rest)?;
                Self::Join {
                    connection,
                    author: text(&rest)?.to_owned(),
                }
            }
            4 => Self::Leave {
                connection: connection(&mut rest)?,
            },
            5 => {
                let connection = connection(&mut rest)?;
                Self::Step1 {
                    connection,
                    state_vector: rest,
                }
            }
            6 => {
                let connection = connection(&mut rest)?;
                let number = number(&mut rest)?;
                let kind = if byte(&mut rest)? == 1 {
                    UpdateKind::Step2
                } else {
                    UpdateKind::Update
                };
                Self::Update {
                    connection,
                    number,
                    kind,
                    update: rest,
                }
            }
            7 => {
                let connection = connection(&mut rest)?;
                Self::Awareness {
                    connection,
                    payload: rest,
                }
            }
            8 => Self::QueryAwareness {
                connection: connection(&mut rest)?,
            },
            12 => Self::AskMap,
            9 => Self::Preload {
                document: DocumentId::new(text(&rest)?).map_err(|_| RelayError::BadText)?,
            },
            10 => {
                let connection = connection(&mut rest)?;
                let number = number(&mut rest)?;
                Self::Compare {
                    connection,
                    number,
                    update: rest,
                }
            }
            11 => {
                let connection = connection(&mut rest)?;
                Self::Stateless {
                    connection,
                    payload: rest,
                }
            }
            unknown => return Err(RelayError::UnknownKind(unknown)),
        };
        Ok((channel, message))
    }

    const fn kind(&self) -> u8 {
        match self {
            Self::Attach { .. } => 1,
            Self::Detach => 2,
            Self::Join { .. } => 3,
            Self::Leave { .. } => 4,
            Self::Step1 { .. } => 5,
            Self::Update { .. } => 6,
            Self::Awareness { .. } => 7,
            Self::QueryAwareness { .. } => 8,
            Self::Preload { .. } => 9,
            Self::Compare { .. } => 10,
            Self::Stateless { .. } => 11,
            Self::AskMap => 12,
        }
    }
}

impl ToEdge {
    /// Makes the frame.
    pub fn encode(&self, channel: Channel) -> Bytes {
        let mut out = frame(self.kind(), channel);
        match self {
            Self::Attached {
                epoch,
                state_vector,
            } => {
                out.put_i64_le(epoch.0);
                out.put_slice(state_vector);
            }
            Self::CatchUp { update: bytes } | Self::Presence { payload: bytes } => {
                out.put_slice(bytes);
            }
            Self::FanOut {
                except,
                update: bytes,
            }
            | Self::Stateless {
                except,
                payload: bytes,
            } => {
                out.put_u8(u8::from(except.is_some()));
                out.put_u64_le(except.map_or(0, |connection| connection.0));
                out.put_slice(bytes);
            }
            Self::PresenceTo {
                connection,
                payload: bytes,
            }
            | Self::Step1 {
                connection,
                state_vector: bytes,
            }
            | Self::Step2 {
                connection,
                update: bytes,
            }
            | Self::CommittedStep2 {
                connection,
                update: bytes,
            }
            | Self::Part {
                connection,
                update: bytes,
            } => {
                out.put_u64_le(connection.0);
                out.put_slice(bytes);
            }
            Self::Receipt { connection, upto } => {
                out.put_u64_le(connection.0);
                out.put_u64_le(*upto);
            }
            Self::Refused { connection, reason } => {
                out.put_u64_le(connection.0);
                out.put_slice(reason.as_bytes());
            }
            Self::Moved { epoch } => out.put_i64_le(epoch.0),
            Self::Unavailable { cause, reason } => {
                out.put_u8(match cause {
                    Unavailable::Deleted => 0,
                    Unavailable::Degraded => 1,
                    Unavailable::Store => 2,
                    Unavailable::Full => 3,
                });
                out.put_slice(reason.as_bytes());
            }
            Self::Map { map } => out.put_slice(map),
            Self::ReadOnly { reason } => out.put_slice(reason.as_bytes()),
            Self::Preloaded | Self::Pause | Self::Resume => {}
        }
        out.freeze()
    }

    /// Reads a frame; the byte strings share its memory.
    ///
    /// # Errors
    /// When the bytes are no frame of this version.
    pub fn decode(frame: Bytes) -> Result<(Channel, Self), RelayError> {
        let (kind, channel, mut rest) = head(frame)?;
        let message = match kind {
            33 => {
                let epoch = Epoch(number(&mut rest)?.cast_signed());
                Self::Attached {
                    epoch,
                    state_vector: rest,
                }
            }
            34 => Self::CatchUp { update: rest },
            35 => Self::FanOut {
                except: sender(&mut rest)?,
                update: rest,
            },
            36 => Self::Presence { payload: rest },
            37 => {
                let connection = connection(&mut rest)?;
                Self::PresenceTo {
                    connection,
                    payload: rest,
                }
            }
            38 => {
                let connection = connection(&mut rest)?;
                Self::Step1 {
                    connection,
                    state_vector: rest,
                }
            }
            39 => {
                let connection = connection(&mut rest)?;
                Self::Step2 {
                    connection,
                    update: rest,
                }
            }
            40 => Self::Receipt {
                connection: connection(&mut rest)?,
                upto: number(&mut rest)?,
            },
            41 => {
                let connection = connection(&mut rest)?;
                Self::Refused {
                    connection,
                    reason: text(&rest)?.to_owned(),
                }
            }
            42 => Self::Moved {
                epoch: Epoch(number(&mut rest)?.cast_signed()),
            },
            43 => {
                let cause = match byte(&mut rest)? {
                    0 => Unavailable::Deleted,
                    1 => Unavailable::Degraded,
                    3 => Unavailable::Full,
                    _ => Unavailable::Store,
                };
                Self::Unavailable {
                    cause,
                    reason: text(&rest)?.to_owned(),
                }
            }
            44 => Self::Preloaded,
            45 => Self::Stateless {
                except: sender(&mut rest)?,
                payload: rest,
            },
            46 => Self::Map { map: rest },
            50 => {
                let connection = connection(&mut rest)?;
                Self::CommittedStep2 {
                    connection,
                    update: rest,
                }
            }
            51 => {
                let connection = connection(&mut rest)?;
                Self::Part {
                    connection,
                    update: rest,
                }
            }
            47 => Self::Pause,
            48 => Self::Resume,
            49 => Self::ReadOnly {
                reason: text(&rest)?.to_owned(),
            },
            unknown => return Err(RelayError::UnknownKind(unknown)),
        };
        Ok((channel, message))
    }

    const fn kind(&self) -> u8 {
        match self {
            Self::Attached { .. } => 33,
            Self::CatchUp { .. } => 34,
            Self::FanOut { .. } => 35,
            Self::Presence { .. } => 36,
            Self::PresenceTo { .. } => 37,
            Self::Step1 { .. } => 38,
            Self::Step2 { .. } => 39,
            Self::Receipt { .. } => 40,
            Self::Refused { .. } => 41,
            Self::Moved { .. } => 42,
            Self::Unavailable { .. } => 43,
            Self::Preloaded => 44,
            Self::Stateless { .. } => 45,
            Self::Map { .. } => 46,
            Self::CommittedStep2 { .. } => 50,
            Self::Part { .. } => 51,
            Self::Pause => 47,
            Self::Resume => 48,
            Self::ReadOnly { .. } => 49,
        }
    }
}

fn frame(kind: u8, channel: Channel) -> BytesMut {
    let mut out = BytesMut::with_capacity(64);
    out.put_u8(kind);
    out.put_u32_le(channel.0);
    out
}

fn put_sized(out: &mut BytesMut, bytes: &[u8]) {
    out.put_u32_le(u32::try_from(bytes.len()).expect("document ids are at most 255 bytes"));
    out.put_slice(bytes);
}

fn head(mut frame: Bytes) -> Result<(u8, Channel, Bytes), RelayError> {
    if frame.remaining() < 5 {
        return Err(RelayError::Truncated);
    }
    let kind = frame.get_u8();
    let channel = Channel(frame.get_u32_le());
    Ok((kind, channel, frame))
}

fn byte(rest: &mut Bytes) -> Result<u8, RelayError> {
    rest.try_get_u8().map_err(|_| RelayError::Truncated)
}

fn number(rest: &mut Bytes) -> Result<u64, RelayError> {
    rest.try_get_u64_le().map_err(|_| RelayError::Truncated)
}

fn connection(rest: &mut Bytes) -> Result<ConnectionId, RelayError> {
    number(rest).map(ConnectionId)
}

/// The socket that has an update already, if it is one of the receiving edge.
fn sender(rest: &mut Bytes) -> Result<Option<ConnectionId>, RelayError> {
    let known = byte(rest)? == 1;
    let sender = connection(rest)?;
    Ok(known.then_some(sender))
}

fn sized(rest: &mut Bytes) -> Result<Bytes, RelayError> {
    let length = rest.try_get_u32_le().map_err(|_| RelayError::Truncated)? as usize;
    if rest.remaining() < length {
        return Err(RelayError::Truncated);
    }
    Ok(rest.split_to(length))
}

fn text(bytes: &[u8]) -> Result<&str, RelayError> {
    std::str::from_utf8(bytes).map_err(|_| RelayError::BadText)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANNEL: Channel = Channel(7);
    const ALICE: ConnectionId = ConnectionId(1 << 40);

    #[test]
    fn every_message_survives_the_way_to_the_owner_and_no_prefix_of_it_panics() {
        let bytes = Bytes::from_static(b"\x00\xff bytes");
        let to_owner = [
            ToOwner::Attach {
                document: DocumentId::new("a/b").unwrap(),
                since: bytes.clone(),
            },
            ToOwner::Detach,
            ToOwner::Join {
                connection: ALICE,
                author: "alice".to_owned(),
            },
            ToOwner::Leave { connection: ALICE },
            ToOwner::Step1 {
                connection: ALICE,
                state_vector: bytes.clone(),
            },
            ToOwner::Update {
                connection: ALICE,
                number: 3,
                kind: UpdateKind::Step2,
                update: bytes.clone(),
            },
            ToOwner::Update {
                connection: ALICE,
                number: 4,
                kind: UpdateKind::Update,
                update: bytes.clone(),
            },
            ToOwner::Awareness {
                connection: ALICE,
                payload: bytes.clone(),
            },
            ToOwner::QueryAwareness { connection: ALICE },
            ToOwner::AskMap,
            ToOwner::Preload {
                document: DocumentId::new("a/b").unwrap(),
            },
            ToOwner::Compare {
                connection: ALICE,
                number: 5,
                update: bytes.clone(),
            },
            ToOwner::Stateless {
                connection: ALICE,
                payload: bytes.clone(),
            },
        ];
        for message in to_owner {
            let frame = message.encode(CHANNEL);
            for end in 0..frame.len() {
                let _ = ToOwner::decode(frame.slice(..end));
            }
            assert_eq!(ToOwner::decode(frame), Ok((CHANNEL, message)));
        }
    }

    #[test]
    fn every_message_survives_the_way_to_the_edge_and_no_prefix_of_it_panics() {
        let bytes = Bytes::from_static(b"\x00\xff bytes");
        let to_edge = [
            ToEdge::Attached {
                epoch: Epoch(9),
                state_vector: bytes.clone(),
            },
            ToEdge::CatchUp {
                update: bytes.clone(),
            },
            ToEdge::FanOut {
                except: Some(ALICE),
                update: bytes.clone(),
            },
            ToEdge::FanOut {
                except: None,
                update: bytes.clone(),
            },
            ToEdge::Stateless {
                except: Some(ALICE),
                payload: bytes.clone(),
            },
            ToEdge::Presence {
                payload: bytes.clone(),
            },
            ToEdge::PresenceTo {
                connection: ALICE,
                payload: bytes.clone(),
            },
            ToEdge::Step1 {
                connection: ALICE,
                state_vector: bytes.clone(),
            },
            ToEdge::Step2 {
                connection: ALICE,
                update: bytes.clone(),
            },
            ToEdge::Receipt {
                connection: ALICE,
                upto: 12,
            },
            ToEdge::Refused {
                connection: ALICE,
                reason: "no".to_owned(),
            },
            ToEdge::Moved { epoch: Epoch(-1) },
            ToEdge::Unavailable {
                cause: Unavailable::Degraded,
                reason: "hole".to_owned(),
            },
            ToEdge::Preloaded,
            ToEdge::Map { map: bytes.clone() },
            ToEdge::CommittedStep2 {
                connection: ALICE,
                update: Bytes::from_static(b"\x00\xff"),
            },
            ToEdge::Part {
                connection: ALICE,
                update: Bytes::from_static(b"\x00\xff"),
            },
            ToEdge::Pause,
            ToEdge::Resume,
            ToEdge::ReadOnly {
                reason: "hole".to_owned(),
            },
        ];
        for message in to_edge {
            let frame = message.encode(CHANNEL);
            for end in 0..frame.len() {
                let _ = ToEdge::decode(frame.slice(..end));
            }
            assert_eq!(ToEdge::decode(frame), Ok((CHANNEL, message)));
        }
    }
}
