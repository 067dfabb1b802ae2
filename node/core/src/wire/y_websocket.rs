//! The frames of y-websocket 3 and 4, and the receipt that y-sweet clients add to them.
//!
//! A frame is one message or, from y-websocket 4, several. A message is an unsigned integer, its
//! type, and then
//!
//! | type | body |
//! |--|--|
//! | 0 sync | 0 + state vector (step 1), 1 + update (step 2), 2 + update; each a byte array |
//! | 1 awareness | byte array: number of entries, then client id, clock, JSON for each |
//! | 2 auth | 0 + reason: permission denied; only ever sent by a server |
//! | 3 query awareness | nothing |
//! | 102 saved | byte array, returned unchanged when all that came before it is durable |
//!
//! Updates are V1. What is inside them is the business of [`crate::scan`].

use bytes::Bytes;

use super::json::is_json;
use super::varint::{ReadError, Reader, write_var_bytes, write_var_uint};
use crate::limits::{AWARENESS_BYTES_MAX, AWARENESS_CLIENTS_MAX, SAVED_BYTES_MAX};

const SYNC: u64 = 0;
const AWARENESS: u64 = 1;
const AUTH: u64 = 2;
const QUERY_AWARENESS: u64 = 3;
const SAVED: u64 = 102;

const STEP_1: u64 = 0;
const STEP_2: u64 = 1;
const UPDATE: u64 = 2;
const PERMISSION_DENIED: u64 = 0;

/// A frame that means nothing, an awareness message without entries: clients close a socket on which
/// they hear nothing for 30 s, and do not see pings.
pub const KEEPALIVE: &[u8] = &[1, 1, 0];

/// One message of a frame; what it carries is borrowed from the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// Presence of one or more clients.
    Awareness(Awareness<'a>),
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
    /// A client's presence that other clients could not parse. Close the socket (1007).
    #[error("presence of client {client} is not JSON, or nested too deep")]
    PresenceNotJson {
        /// The client that the entry is about.
        client: u64,
    },
    /// Something in it is larger than allowed. Close the socket (1009).
    #[error("{what} is larger than {max}")]
    TooLarge {
        /// What is.
        what: &'static str,
        /// The largest that is allowed.
        max: u64,
    },
}

impl FrameError {
    /// Whether the client broke the protocol, so that its socket is to be closed.
    pub fn is_violation(&self) -> bool {
        !matches!(self, Self::Unknown { .. })
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
    fn read(reader: &mut Reader<'a>) -> Result<Self, FrameError> {
        match reader.var_uint()? {
            SYNC => Self::read_sync(reader),
            AWARENESS => Ok(Self::Awareness(Awareness::parse(reader.var_bytes()?)?)),
            AUTH => match reader.var_uint()? {
                PERMISSION_DENIED => Ok(Self::PermissionDenied {
                    reason: reader.var_str()?,
                }),
                kind => Err(FrameError::Unknown { kind }),
            },
            QUERY_AWARENESS => Ok(Self::QueryAwareness),
            SAVED => {
                let payload = reader.var_bytes()?;
                at_most(
                    "payload of a saved message",
                    payload.len() as u64,
                    SAVED_BYTES_MAX as u64,
                )?;
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

/// Presence that was checked: each entry is whole and has JSON that clients can parse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Awareness<'a> {
    payload: &'a [u8],
}

/// What is known of one client's presence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AwarenessEntry<'a> {
    /// Id of the client, as in the document.
    pub client: u64,
    /// Version of the entry. A newer one replaces an older, and a "gone" one of the same clock.
    pub clock: u32,
    /// State in JSON; `null` when the client is gone.
    pub state: &'a str,
}

impl<'a> Awareness<'a> {
    /// Checks the payload of an awareness message.
    ///
    /// # Errors
    /// When it is malformed or larger than the limits, or a state is not JSON.
    pub fn parse(payload: &'a [u8]) -> Result<Self, FrameError> {
        let mut reader = Reader::new(payload);
        let count = reader.var_uint()?;
        at_most("number of presence entries", count, AWARENESS_CLIENTS_MAX)?;
        for _ in 0..count {
            let entry = AwarenessEntry::read(&mut reader)?;
            at_most(
                "presence of a client",
                entry.state.len() as u64,
                AWARENESS_BYTES_MAX as u64,
            )?;
            if !is_json(entry.state) {
                return Err(FrameError::PresenceNotJson {
                    client: entry.client,
                });
            }
        }
        Ok(Self { payload })
    }

    /// The bytes as they came, for a message of other clients.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// The entries, in their order.
    pub fn entries(&self) -> impl Iterator<Item = AwarenessEntry<'a>> + use<'a> {
        let mut reader = Reader::new(self.payload);
        // Cannot fail, as it did not in `parse`.
        let count = reader.var_uint().unwrap_or_default();
        (0..count).map_while(move |_| AwarenessEntry::read(&mut reader).ok())
    }
}

impl<'a> AwarenessEntry<'a> {
    /// Says that a client is gone. `clock` is that of its last entry, so that the client, should it
    /// still be there, comes back with its next one.
    pub fn gone(client: u64, clock: u32) -> Self {
        Self {
            client,
            clock,
            state: "null",
        }
    }

    /// Whether the client is gone.
    pub fn is_gone(&self) -> bool {
        self.state == "null"
    }

    fn read(reader: &mut Reader<'a>) -> Result<Self, FrameError> {
        let client = reader.var_uint()?;
        let clock = reader.var_uint()?;
        let clock = u32::try_from(clock).map_err(|_| FrameError::TooLarge {
            what: "clock of a presence entry",
            max: u32::MAX.into(),
        })?;
        Ok(Self {
            client,
            clock,
            state: reader.var_str()?,
        })
    }
}

/// Payload of an awareness message with these entries.
pub fn awareness_payload<'a>(entries: impl IntoIterator<Item = AwarenessEntry<'a>>) -> Vec<u8> {
    let (mut count, mut written) = (0, Vec::new());
    for entry in entries {
        count += 1;
        write_var_uint(&mut written, entry.client);
        write_var_uint(&mut written, entry.clock.into());
        write_var_bytes(&mut written, entry.state.as_bytes());
    }
    let mut payload = Vec::with_capacity(written.len() + 2);
    write_var_uint(&mut payload, count);
    payload.extend_from_slice(&written);
    payload
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

/// Frame of presence; see [`awareness_payload`].
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

/// Frame that returns the payload of a client's "saved" message.
pub fn saved(payload: &[u8]) -> Bytes {
    frame(&[SAVED], payload)
}

fn frame(kinds: &[u64], body: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(kinds.len() + body.len() + 8);
    for &kind in kinds {
        write_var_uint(&mut out, kind);
    }
    write_var_bytes(&mut out, body);
    out.into()
}

fn at_most(what: &'static str, size: u64, max: u64) -> Result<(), FrameError> {
    if size <= max {
        Ok(())
    } else {
        Err(FrameError::TooLarge { what, max })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use yrs::StateVector;
    use yrs::sync::{AwarenessUpdate, Message as TheirMessage, SyncMessage};
    use yrs::updates::decoder::Decode;
    use yrs::updates::encoder::Encode;

    use super::*;

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
            (KEEPALIVE, Message::Awareness(Awareness { payload: &[0] })),
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
            (&[2, 0, 1, 0xFF], FrameError::Malformed(ReadError::Utf8)),
            (&[1, 0], truncated.clone()),
            (&[1, 1, 1], truncated.clone()),
            (&[1, 4, 1, 5, 1, 9], truncated.clone()),
        ] {
            let error = parse(frame).next().unwrap().unwrap_err();
            assert_eq!(error, expected, "{frame:?}");
            assert!(error.is_violation());
        }
    }

    #[test]
    fn sizes_are_bounded() {
        let too_large =
            |frame: &[u8]| matches!(parse(frame).next(), Some(Err(FrameError::TooLarge { .. })));
        assert!(!too_large(&saved(&[0; SAVED_BYTES_MAX])));
        assert!(too_large(&saved(&[0; SAVED_BYTES_MAX + 1])));

        let of_length = |len: usize| format!("\"{}\"", "a".repeat(len - 2));
        let state = |len| {
            awareness(&awareness_payload([AwarenessEntry {
                client: 1,
                clock: 1,
                state: &of_length(len),
            }]))
        };
        assert!(!too_large(&state(AWARENESS_BYTES_MAX)));
        assert!(too_large(&state(AWARENESS_BYTES_MAX + 1)));

        // 4 bytes that declare many entries.
        let mut many = Vec::new();
        write_var_uint(&mut many, AWARENESS_CLIENTS_MAX + 1);
        assert!(too_large(&awareness(&many)));

        let mut clock = vec![1, 5];
        write_var_uint(&mut clock, 1 << 32);
        assert!(too_large(&awareness(&clock)));
    }

    #[test]
    fn presence_that_breaks_other_clients_is_refused() {
        for state in ["", "{", "undefined", &"[".repeat(5_000)] {
            let frame = awareness(&awareness_payload([AwarenessEntry {
                client: 5,
                clock: 1,
                state,
            }]));
            let error = parse(&frame).next().unwrap().unwrap_err();
            assert_eq!(error, FrameError::PresenceNotJson { client: 5 });
        }
    }

    #[test]
    fn a_client_that_left_is_nulled_under_its_last_clock() {
        let payload =
            awareness_payload([AwarenessEntry::gone(1, 7), AwarenessEntry::gone(1 << 40, 0)]);
        let theirs = AwarenessUpdate::decode_v1(&payload).unwrap();
        let entries: Vec<_> = Awareness::parse(&payload).unwrap().entries().collect();
        assert!(entries.iter().all(AwarenessEntry::is_gone));
        assert_eq!(theirs.clients.len(), 2);
        for entry in entries {
            let their_entry = &theirs.clients[&yrs::block::ClientID::new(entry.client)];
            assert_eq!(
                (their_entry.clock, &*their_entry.json),
                (entry.clock, entry.state)
            );
        }
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

        #[test]
        fn presence_survives(
            entries in proptest::collection::vec((0..=crate::limits::CLIENT_ID_MAX, any::<u32>(), "[a-zä😀]*"), 0..5)
        ) {
            let states: Vec<String> = entries.iter().map(|(.., name)| format!("{{\"name\":\"{name}\"}}")).collect();
            let entries: Vec<_> = entries
                .iter()
                .zip(&states)
                .map(|((client, clock, _), state)| AwarenessEntry { client: *client, clock: *clock, state })
                .collect();
            let payload = awareness_payload(entries.iter().copied());
            let frame = awareness(&payload);
            let [Message::Awareness(read)] = messages(&frame)[..] else { panic!("one message") };
            prop_assert_eq!(read.payload(), &payload);
            prop_assert_eq!(read.entries().collect::<Vec<_>>(), entries);
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
