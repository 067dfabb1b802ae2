//! The frames of y-websocket 3 and 4, with the receipt that y-sweet's client adds to them.
//!
//! A frame is one message or, from y-websocket 4, several. A message is an unsigned integer, its
//! type, and then
//!
//! | type | body |
//! |--|--|
//! | 0 sync | 0 + state vector (step 1), 1 + update (step 2), 2 + update; each a byte array |
//! | 1 awareness | byte array, see [`super::awareness`] |
//! | 2 auth | 0 + reason: permission denied; only ever sent by a server |
//! | 3 query awareness | nothing |
//! | 102 saved | byte array, returned unchanged when all that came before it is durable: [`super::y_sweet`] |
//!
//! Updates are V1. What is inside them is the business of [`crate::scan`].

use bytes::Bytes;

use super::awareness::{self, AwarenessError, Entries};
use super::varint::{ReadError, Reader, write_var_bytes, write_var_uint};
use super::y_sweet::SAVED;
use crate::limits::SAVED_BYTES_MAX;

const SYNC: u64 = 0;
const AWARENESS: u64 = 1;
const AUTH: u64 = 2;
const QUERY_AWARENESS: u64 = 3;

const STEP_1: u64 = 0;
const STEP_2: u64 = 1;
const UPDATE: u64 = 2;
const PERMISSION_DENIED: u64 = 0;

/// A frame that means nothing, an awareness message without entries: clients close a socket on which
/// they hear nothing for 30 s, and do not see pings.
pub const KEEPALIVE: &[u8] = &[1, 1, 0];

/// One message of a frame; what it carries is borrowed from the frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// "This is what I have": asks for a step 2 with the rest.
    SyncStep1 {
        /// Encoded state vector.
        state_vector: &'a [u8],
    },
    /// The answer to a step 1.
    SyncStep2 {
        /// Encoded update (V1), possibly an empty one.
        update: &'a [u8],
    },
    /// An edit.
    Update {
        /// Encoded update (V1).
        update: &'a [u8],
    },
    /// Presence of any number of clients.
    Awareness(Entries<'a>),
    /// The server refuses what the client wants.
    PermissionDenied {
        /// For the log of the client.
        reason: &'a str,
    },
    /// Asks for the presence of everybody.
    QueryAwareness,
    /// From a client: asks for a receipt. From a server: all that the client sent before is durable.
    Saved {
        /// Chosen by the client.
        payload: &'a [u8],
    },
}

/// Why a frame, or what follows in it, is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A message that this version does not know. Ignore the rest of the frame, as stock clients and
    /// servers do: a newer client may send it.
    #[error("message of unknown type {kind}")]
    Unknown {
        /// The type of the message, or of its body.
        kind: u64,
    },
    /// The frame breaks the protocol. Close the socket (1007).
    #[error("malformed message: {0}")]
    Malformed(#[from] ReadError),
    /// What a client asks to have returned is too large. Close the socket (1009).
    #[error("payload of a saved message has {bytes} bytes, more than {SAVED_BYTES_MAX}")]
    SavedTooLarge {
        /// Its length.
        bytes: usize,
    },
    /// The presence in it is not fit for other clients. Close the socket as the error says.
    #[error("presence: {0}")]
    Awareness(#[from] AwarenessError),
}

impl FrameError {
    /// Whether the client broke the protocol, so that its socket is to be closed.
    pub fn is_violation(&self) -> bool {
        !matches!(self, Self::Unknown { .. })
    }

    /// Whether it is only too large.
    pub fn is_too_large(&self) -> bool {
        matches!(
            self,
            Self::SavedTooLarge { .. } | Self::Awareness(AwarenessError::TooLarge { .. })
        )
    }
}

/// Reads the messages of a frame, one by one; the first error is the last item.
///
/// A frame without any message is malformed.
pub fn parse(frame: &[u8]) -> Messages<'_> {
    Messages {
        rest: Some(Reader::new(frame)),
    }
}

/// The messages of a frame.
#[derive(Debug, Clone)]
pub struct Messages<'a> {
    rest: Option<Reader<'a>>,
}

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>, FrameError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut reader = self.rest.take()?;
        let message = Message::read(&mut reader);
        if message.is_ok() && !reader.is_empty() {
            self.rest = Some(reader);
        }
        Some(message)
    }
}

impl<'a> Message<'a> {
    pub(super) fn read(reader: &mut Reader<'a>) -> Result<Self, FrameError> {
        match reader.var_uint()? {
            SYNC => Self::read_sync(reader),
            AWARENESS => Ok(Self::Awareness(awareness::parse(reader.var_bytes()?)?)),
            AUTH => match reader.var_uint()? {
                PERMISSION_DENIED => Ok(Self::PermissionDenied {
                    reason: reader.var_str()?,
                }),
                kind => Err(FrameError::Unknown { kind }),
            },
            QUERY_AWARENESS => Ok(Self::QueryAwareness),
            SAVED => {
                let payload = reader.var_bytes()?;
                if payload.len() > SAVED_BYTES_MAX {
                    return Err(FrameError::SavedTooLarge {
                        bytes: payload.len(),
                    });
                }
                Ok(Self::Saved { payload })
            }
            kind => Err(FrameError::Unknown { kind }),
        }
    }

    fn read_sync(reader: &mut Reader<'a>) -> Result<Self, FrameError> {
        match reader.var_uint()? {
            STEP_1 => Ok(Self::SyncStep1 {
                state_vector: reader.var_bytes()?,
            }),
            STEP_2 => Ok(Self::SyncStep2 {
                update: reader.var_bytes()?,
            }),
            UPDATE => Ok(Self::Update {
                update: reader.var_bytes()?,
            }),
            kind => Err(FrameError::Unknown { kind }),
        }
    }
}

/// Frame that asks for what the receiver has beyond `state_vector`.
pub fn sync_step1(state_vector: &[u8]) -> Bytes {
    frame(&[SYNC, STEP_1], state_vector)
}

/// Frame that answers a step 1.
pub fn sync_step2(update: &[u8]) -> Bytes {
    frame(&[SYNC, STEP_2], update)
}

/// Frame of an edit.
pub fn update(update: &[u8]) -> Bytes {
    frame(&[SYNC, UPDATE], update)
}

/// Frame of presence; see [`super::awareness::encode`].
pub fn awareness(payload: &[u8]) -> Bytes {
    frame(&[AWARENESS], payload)
}

/// Frame that tells a client that it may not do what it tried.
pub fn permission_denied(reason: &str) -> Bytes {
    frame(&[AUTH, PERMISSION_DENIED], reason.as_bytes())
}

/// Frame that asks for the presence of everybody.
pub fn query_awareness() -> Bytes {
    Bytes::from_static(&[3])
}

pub(super) fn frame(kinds: &[u64], body: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(kinds.len() + body.len() + 8);
    for &kind in kinds {
        write_var_uint(&mut out, kind);
    }
    write_var_bytes(&mut out, body);
    out.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use yrs::StateVector;
    use yrs::sync::{Message as TheirMessage, SyncMessage};
    use yrs::updates::encoder::Encode;

    use super::super::recorded::{self, Said};
    use super::super::y_sweet::saved;
    use super::*;

    #[test]
    fn clients_of_both_versions_are_understood() {
        for family in ["y-websocket-3", "y-websocket-4"] {
            for Said { what, frame } in recorded::said(family) {
                let mut messages = parse(&frame);
                let message = messages.next().unwrap().unwrap();
                assert!(messages.next().is_none(), "{what}");
                match (what.as_str(), message) {
                    ("step1", Message::SyncStep1 { .. })
                    | ("step2", Message::SyncStep2 { .. })
                    | ("update", Message::Update { .. })
                    | ("awareness", Message::Awareness(_)) => {}
                    (what, said) => panic!("{family} {what} was read as {said:?}"),
                }
            }
        }
    }

    #[test]
    fn messages_are_read() {
        let read = [
            (&[0, 0, 1, 0][..], Message::SyncStep1 { state_vector: &[0] }),
            (&[0, 1, 2, 0, 0], Message::SyncStep2 { update: &[0, 0] }),
            (&[0, 2, 3, 1, 2, 3], Message::Update { update: &[1, 2, 3] }),
            (
                &[2, 0, 2, b'n', b'o'],
                Message::PermissionDenied { reason: "no" },
            ),
            (&[3], Message::QueryAwareness),
            (&[102, 1, 7], Message::Saved { payload: &[7] }),
            (
                KEEPALIVE,
                Message::Awareness(awareness::parse(&[0]).unwrap()),
            ),
        ];
        for (frame, message) in read {
            assert_eq!(parse(frame).collect::<Vec<_>>(), [Ok(message)], "{frame:?}");
        }
    }

    #[test]
    fn a_frame_may_hold_several_messages() {
        let frame = [sync_step1(&[0]), query_awareness(), update(&[0, 0])].concat();
        assert_eq!(
            messages(&frame),
            [
                Message::SyncStep1 { state_vector: &[0] },
                Message::QueryAwareness,
                Message::Update { update: &[0, 0] }
            ]
        );
    }

    #[test]
    fn each_message_before_an_error_counts() {
        let frame = [
            sync_step1(&[0]),
            Bytes::from_static(&[77, 1]),
            update(&[0, 0]),
        ]
        .concat();
        let read: Vec<_> = parse(&frame).collect();
        assert_eq!(
            read,
            [
                Ok(Message::SyncStep1 { state_vector: &[0] }),
                Err(FrameError::Unknown { kind: 77 })
            ]
        );
    }

    #[test]
    fn unknown_messages_are_no_violation() {
        for frame in [&[4][..], &[77, 1, 2], &[0, 3, 1, 0], &[2, 1, 0]] {
            let error = parse(frame).next().unwrap().unwrap_err();
            assert!(
                matches!(error, FrameError::Unknown { .. }),
                "{frame:?}: {error}"
            );
            assert!(!error.is_violation());
        }
    }

    #[test]
    fn broken_frames_are_violations() {
        let truncated = FrameError::Malformed(ReadError::Truncated);
        for (frame, expected) in [
            (&[][..], truncated.clone()),
            (&[0], truncated.clone()),
            (&[0, 0], truncated.clone()),
            (&[0, 2, 4, 1, 2, 3], truncated.clone()),
            (&[0x80, 0x00], FrameError::Malformed(ReadError::Integer)),
            (
                &[1, 4, 1, 5, 1, 9],
                FrameError::Awareness(AwarenessError::Malformed(ReadError::Truncated)),
            ),
            (&[2, 0, 1, 0xFF], FrameError::Malformed(ReadError::Utf8)),
        ] {
            let error = parse(frame).next().unwrap().unwrap_err();
            assert_eq!(error, expected, "{frame:?}");
            assert!(error.is_violation());
        }
    }

    #[test]
    fn payloads_to_return_are_bounded() {
        assert!(parse(&saved(&[0; SAVED_BYTES_MAX])).all(|message| message.is_ok()));
        let frame = saved(&[0; SAVED_BYTES_MAX + 1]);
        let too_large = parse(&frame).next();
        assert_eq!(
            too_large,
            Some(Err(FrameError::SavedTooLarge {
                bytes: SAVED_BYTES_MAX + 1
            }))
        );
    }

    #[test]
    fn presence_that_breaks_other_clients_is_a_violation() {
        let payload = awareness::encode([awareness::Entry {
            client: 5,
            clock: 1,
            json: "{",
        }]);
        let frame = awareness(&payload);
        let error = parse(&frame).next().unwrap().unwrap_err();
        assert_eq!(
            error,
            FrameError::Awareness(AwarenessError::NotJson { client: 5 })
        );
        assert!(error.is_violation());
    }

    #[test]
    fn frames_are_those_of_yrs() {
        let denied = TheirMessage::Auth(Some("no".to_owned()));
        let step1 = TheirMessage::Sync(SyncMessage::SyncStep1(StateVector::default()));
        let step2 = TheirMessage::Sync(SyncMessage::SyncStep2(vec![0, 0]));
        let edit = TheirMessage::Sync(SyncMessage::Update(vec![1, 2]));
        assert_eq!(permission_denied("no"), denied.encode_v1());
        assert_eq!(sync_step1(&[0]), step1.encode_v1());
        assert_eq!(sync_step2(&[0, 0]), step2.encode_v1());
        assert_eq!(update(&[1, 2]), edit.encode_v1());
        assert_eq!(query_awareness(), TheirMessage::AwarenessQuery.encode_v1());
        assert_eq!(
            saved(&[5, 6]),
            TheirMessage::Custom(102, vec![5, 6]).encode_v1()
        );
        assert_eq!(awareness(&[0]), KEEPALIVE);
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_parsed(body in any::<Vec<u8>>()) {
            for (frame, message) in [
                (sync_step1(&body), Message::SyncStep1 { state_vector: &body }),
                (sync_step2(&body), Message::SyncStep2 { update: &body }),
                (update(&body), Message::Update { update: &body }),
                (saved(&body), Message::Saved { payload: &body }),
            ] {
                prop_assert_eq!(messages(&frame), [message]);
            }
        }

        /// Nothing in a frame panics, and whatever is understood lies inside the frame.
        #[test]
        fn any_bytes_are_parsed(frame in any::<Vec<u8>>()) {
            prop_assert!(parse(&frame).count() <= frame.len().max(1));
        }
    }

    fn messages(frame: &[u8]) -> Vec<Message<'_>> {
        parse(frame).collect::<Result<_, _>>().unwrap()
    }
}
