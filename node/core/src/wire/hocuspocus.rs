//! The frames of Hocuspocus' provider, 3 and 4: many documents on one socket.
//!
//! A frame is one message: an address, then what y-websocket would send, or one of Hocuspocus' own. The
//! address is the document's name or, so that one socket may hold a document twice, name + NUL +
//! session; an answer carries the address of its question, byte by byte.
//!
//! | type | body |
//! |--|--|
//! | 0 sync, 1 awareness, 3 query awareness | as in [`super::y_websocket`] |
//! | 2 auth, from a client | 0 + token, and from version 4 on the provider's version |
//! | 2 auth, from a server | 0: send the token again; 1 + reason: denied; 2 + scope: granted |
//! | 5 stateless | string, of the application |
//! | 7 close | nothing from a client, a reason from a server: this document, not the socket |
//! | 8 sync status | 1: one more of the client's changes is saved; 0: it was refused |
//!
//! Two frames have no address: 9 (ping) and 10 (pong), a single byte each; only version 4 knows them.

use bytes::Bytes;

use super::varint::{ReadError, Reader, write_var_bytes, write_var_uint};
use super::y_websocket;
use crate::limits::{STATELESS_BYTES_MAX, TOKEN_BYTES_MAX};

const SYNC: u64 = 0;
const AWARENESS: u64 = 1;
const AUTH: u64 = 2;
const QUERY_AWARENESS: u64 = 3;
const STATELESS: u64 = 5;
const CLOSE: u64 = 7;
const SYNC_STATUS: u64 = 8;

const STEP_1: u64 = 0;
const STEP_2: u64 = 1;
const UPDATE: u64 = 2;

const TOKEN: u64 = 0;
const DENIED: u64 = 1;
const GRANTED: u64 = 2;

/// Frame that a provider of version 4 answers with [`PONG`]; version 3 cannot read it.
pub const PING: &[u8] = &[9];
/// The answer to a ping.
pub const PONG: &[u8] = &[10];

/// One frame of a client; what it carries is borrowed from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame<'a> {
    /// Asks for a pong.
    Ping,
    /// Answers a ping.
    Pong,
    /// About one document.
    Message {
        /// Where answers go.
        address: Address<'a>,
        /// What it says.
        message: Message<'a>,
    },
}

/// The document that a message is about, and the session that holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address<'a>(pub &'a str);

impl<'a> Address<'a> {
    /// Name of the document.
    pub fn document(&self) -> &'a str {
        self.0.split_once('\0').map_or(self.0, |(name, _)| name)
    }
}

/// What a client says about one document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// What y-websocket would say: steps 1 and 2, updates, awareness.
    Common(y_websocket::Message<'a>),
    /// Asks for access, or renews it.
    Token {
        /// As the application gave it; empty when it gave none.
        token: &'a str,
        /// Version of the provider, which version 3 does not tell.
        version: Option<&'a str>,
    },
    /// For the applications of the other clients.
    Stateless {
        /// The application's own.
        payload: &'a str,
    },
    /// The client leaves the document.
    Close,
}

/// Why a frame is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A message that this version does not know, or that only servers send. Ignore it.
    #[error("message of unknown type {kind}")]
    Unknown {
        /// The type of the message, or of its body.
        kind: u64,
    },
    /// The frame breaks the protocol. Close the socket (1007).
    #[error(transparent)]
    Malformed(#[from] y_websocket::FrameError),
    /// More than is allowed. Close the socket (1009).
    #[error("{what} of {bytes} bytes is longer than {max} bytes")]
    TooLarge {
        /// What is.
        what: &'static str,
        /// Its length.
        bytes: usize,
        /// The longest that is allowed.
        max: usize,
    },
}

impl From<ReadError> for FrameError {
    fn from(error: ReadError) -> Self {
        Self::Malformed(error.into())
    }
}

impl FrameError {
    /// Whether the client broke the protocol, so that its socket is to be closed.
    pub fn is_violation(&self) -> bool {
        !matches!(self, Self::Unknown { .. })
    }
}

/// What a client may do with a document, in the provider's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// See it.
    ReadOnly,
    /// Change it.
    ReadWrite,
}

/// What became of one change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It is durable.
    Saved,
    /// It is not and will not be.
    Refused,
}

/// Reads a frame. What stands behind its message is passed over: later versions add to messages.
///
/// # Errors
/// When it is not a frame, or not one of a client.
pub fn parse(frame: &[u8]) -> Result<Frame<'_>, FrameError> {
    match frame {
        PING => return Ok(Frame::Ping),
        PONG => return Ok(Frame::Pong),
        _ => {}
    }
    let mut reader = Reader::new(frame);
    let address = Address(reader.var_str()?);
    let mut common = reader;
    let message = match reader.var_uint()? {
        SYNC | AWARENESS | QUERY_AWARENESS => match y_websocket::Message::read(&mut common) {
            Err(y_websocket::FrameError::Unknown { kind }) => {
                return Err(FrameError::Unknown { kind });
            }
            message => Message::Common(message?),
        },
        AUTH => match reader.var_uint()? {
            TOKEN => Message::Token {
                token: at_most("token", reader.var_str()?, TOKEN_BYTES_MAX)?,
                version: if reader.is_empty() {
                    None
                } else {
                    Some(reader.var_str()?)
                },
            },
            kind => return Err(FrameError::Unknown { kind }),
        },
        STATELESS => Message::Stateless {
            payload: at_most("message", reader.var_str()?, STATELESS_BYTES_MAX)?,
        },
        CLOSE => Message::Close,
        kind => return Err(FrameError::Unknown { kind }),
    };
    Ok(Frame::Message { address, message })
}

/// Frame that asks for what the receiver has beyond `state_vector`.
pub fn sync_step1(address: &str, state_vector: &[u8]) -> Bytes {
    frame(address, &[SYNC, STEP_1], Some(state_vector))
}

/// Frame that answers a step 1.
pub fn sync_step2(address: &str, update: &[u8]) -> Bytes {
    frame(address, &[SYNC, STEP_2], Some(update))
}

/// Frame of an edit.
pub fn update(address: &str, update: &[u8]) -> Bytes {
    frame(address, &[SYNC, UPDATE], Some(update))
}

/// Frame of presence; see [`super::awareness::encode`].
pub fn awareness(address: &str, payload: &[u8]) -> Bytes {
    frame(address, &[AWARENESS], Some(payload))
}

/// Frame that asks the client for its token again.
pub fn token_request(address: &str) -> Bytes {
    frame(address, &[AUTH, TOKEN], None)
}

/// Frame that denies a client the document. Its socket stays, and it may try another token.
pub fn permission_denied(address: &str, reason: &str) -> Bytes {
    frame(address, &[AUTH, DENIED], Some(reason.as_bytes()))
}

/// Frame that grants a client the document.
pub fn authenticated(address: &str, scope: Scope) -> Bytes {
    let scope: &[u8] = match scope {
        Scope::ReadOnly => b"readonly",
        Scope::ReadWrite => b"read-write",
    };
    frame(address, &[AUTH, GRANTED], Some(scope))
}

/// Frame of the application of another client.
pub fn stateless(address: &str, payload: &[u8]) -> Bytes {
    frame(address, &[STATELESS], Some(payload))
}

/// Frame that ends the document for a client, which stays away from it until its application connects again.
pub fn close(address: &str, reason: &str) -> Bytes {
    frame(address, &[CLOSE], Some(reason.as_bytes()))
}

/// Frame that lets a client count one unsaved change less, or tells it that one was refused.
pub fn sync_status(address: &str, status: Status) -> Bytes {
    frame(
        address,
        &[SYNC_STATUS, u64::from(status == Status::Saved)],
        None,
    )
}

fn frame(address: &str, kinds: &[u64], body: Option<&[u8]>) -> Bytes {
    let body_bytes = body.map_or(0, <[u8]>::len);
    let mut out = Vec::with_capacity(address.len() + kinds.len() + body_bytes + 16);
    write_var_bytes(&mut out, address.as_bytes());
    for &kind in kinds {
        write_var_uint(&mut out, kind);
    }
    if let Some(body) = body {
        write_var_bytes(&mut out, body);
    }
    out.into()
}

fn at_most<'a>(what: &'static str, text: &'a str, max: usize) -> Result<&'a str, FrameError> {
    if text.len() <= max {
        return Ok(text);
    }
    Err(FrameError::TooLarge {
        what,
        bytes: text.len(),
        max,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::recorded::{self, Said};
    use super::super::y_websocket::Message as Common;
    use super::*;

    /// What the providers sent, by the names that the recorder gave the messages.
    #[test]
    fn providers_of_both_versions_are_understood() {
        for (family, address, version) in [
            ("hocuspocus-3", "notes/1", None),
            ("hocuspocus-4", "notes/1", Some("4.8.0")),
            ("hocuspocus-4-sessions", "notes/1\0session", Some("4.8.0")),
        ] {
            let mut seen = Vec::new();
            for Said { what, frame } in recorded::said(family) {
                let parsed =
                    parse(&frame).unwrap_or_else(|error| panic!("{family} {what}: {error}"));
                let Frame::Message {
                    address: found,
                    message,
                } = parsed
                else {
                    assert_eq!((what.as_str(), parsed), ("pong", Frame::Pong));
                    seen.push(what);
                    continue;
                };
                assert_eq!((found.0, found.document()), (address, "notes/1"), "{what}");
                match (what.as_str(), message) {
                    ("token", said) => {
                        let token = "token of the app";
                        assert_eq!(said, Message::Token { token, version });
                    }
                    ("stateless", said) => {
                        let payload = "from the app";
                        assert_eq!(said, Message::Stateless { payload });
                    }
                    ("step1", Message::Common(Common::SyncStep1 { .. }))
                    | ("step2", Message::Common(Common::SyncStep2 { .. }))
                    | ("update", Message::Common(Common::Update { .. }))
                    | ("awareness", Message::Common(Common::Awareness(_)))
                    | ("close", Message::Close) => {}
                    (what, said) => panic!("{family} {what} was read as {said:?}"),
                }
                seen.push(what);
            }
            let mut all = vec![
                "awareness",
                "close",
                "stateless",
                "step1",
                "step2",
                "token",
                "update",
            ];
            if version.is_some() {
                all.insert(2, "pong");
            }
            seen.sort();
            seen.dedup();
            assert_eq!(seen, all, "{family}");
        }
    }

    /// The provider's own encoders, for what a server sends.
    #[test]
    fn frames_are_those_of_hocuspocus() {
        let a = "notes/1";
        for (what, ours) in [
            ("token request", token_request(a)),
            ("denied", permission_denied(a, "no")),
            ("readonly", authenticated(a, Scope::ReadOnly)),
            ("read-write", authenticated(a, Scope::ReadWrite)),
            ("step1", sync_step1(a, &[0])),
            ("step2", sync_step2(a, &[0, 0])),
            ("update", update(a, &[1, 2, 3])),
            ("awareness", awareness(a, &[0])),
            ("stateless", stateless(a, b"from the app")),
            ("close", close(a, "bye")),
            ("saved", sync_status(a, Status::Saved)),
            ("refused", sync_status(a, Status::Refused)),
        ] {
            assert_eq!(ours, recorded::answer("hocuspocus", what), "{what}");
        }
    }

    #[test]
    fn what_only_servers_send_is_passed_over() {
        for frame in [
            &[1, b'a', 4, 0, 1, 0][..],
            &[1, b'a', 6, 1, b'x'],
            &[1, b'a', 8, 1],
            &[1, b'a', 2, 2, 0],
            &[1, b'a', 0, 3, 0],
            &[1, b'a', 77],
        ] {
            let error = parse(frame).unwrap_err();
            assert!(
                matches!(error, FrameError::Unknown { .. }),
                "{frame:?}: {error}"
            );
            assert!(!error.is_violation());
        }
    }

    #[test]
    fn broken_frames_are_violations() {
        for frame in [
            &[][..],
            &[0],
            &[9, 1],
            &[1, b'a'],
            &[1, 0xFF, 7],
            &[1, b'a', 2, 0],
            &[1, b'a', 2, 0, 2, b'x'],
            &[1, b'a', 0, 0, 2, 1],
            &[1, b'a', 5, 1, 0xFF],
        ] {
            assert!(parse(frame).unwrap_err().is_violation(), "{frame:?}");
        }
    }

    #[test]
    fn texts_are_bounded() {
        let message = |kinds: &[u64], bytes: usize| frame("a", kinds, Some(&vec![b'x'; bytes]));
        for (kinds, max) in [
            (&[AUTH, TOKEN][..], TOKEN_BYTES_MAX),
            (&[STATELESS], STATELESS_BYTES_MAX),
        ] {
            assert!(parse(&message(kinds, max)).is_ok());
            let too_large = message(kinds, max + 1);
            assert!(matches!(
                parse(&too_large),
                Err(FrameError::TooLarge { .. })
            ));
        }
    }

    proptest! {
        /// Nothing in a frame panics.
        #[test]
        fn any_bytes_are_parsed(frame in any::<Vec<u8>>(), kind in 0_u8..12) {
            let _ = parse(&frame);
            let _ = parse(&[&[1, b'a', kind][..], &frame].concat());
        }
    }
}
