//! Bytes of a client in, messages out (RFC 6455 section 5). No I/O.
//!
//! Nothing that a client declares is believed: memory is taken for bytes that are here. An inbox that has given all it got
//! holds none.

use axum::extract::ws::{CloseFrame, Message};
use bytes::{Buf, Bytes, BytesMut};
use collab_core::limits::FRAME_BYTES_MAX;

use super::Kind;

/// What came and was not yet taken.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    bytes: BytesMut,
    /// The message of which more frames are to come: its kind, and what is here of it.
    begun: Option<(Kind, BytesMut)>,
}

/// A client breaks the rules: its socket is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    /// Of WebSocket itself (1002).
    #[error("{0}")]
    Protocol(&'static str),
    /// A reason that is no text (1007).
    #[error("the reason of a close frame is not UTF-8")]
    NotText,
    /// A message longer than [`FRAME_BYTES_MAX`] (1009).
    #[error("a message of {bytes} bytes, more than {FRAME_BYTES_MAX}")]
    TooLarge {
        /// Its length so far.
        bytes: usize,
    },
}

impl Violation {
    /// How the socket is closed.
    pub(super) const fn code(self) -> u16 {
        match self {
            Self::Protocol(_) => 1002,
            Self::NotText => 1007,
            Self::TooLarge { .. } => 1009,
        }
    }
}

/// What stands before the payload of a frame.
#[derive(Debug)]
struct Header {
    kind: Kind,
    is_last: bool,
    mask: [u8; 4],
    /// Bytes of the header itself.
    size: usize,
    /// Bytes of the payload.
    len: usize,
}

impl Inbox {
    /// Where bytes that are read are put.
    pub(super) const fn bytes(&mut self) -> &mut BytesMut {
        &mut self.bytes
    }

    /// Bytes that the present frame still lacks, as far as is known.
    pub(super) fn missing(&self) -> usize {
        match Header::read(&self.bytes) {
            Ok(Some(header)) => {
                let whole = header.size.saturating_add(header.len);
                whole.saturating_sub(self.bytes.len())
            }
            _ => 0,
        }
    }

    /// Takes the next message, if all of it is here.
    ///
    /// # Errors
    /// When the client breaks the rules; nothing can be taken any more then.
    pub(super) fn next(&mut self) -> Result<Option<Message>, Violation> {
        while let Some(header) = Header::read(&self.bytes)? {
            self.check(&header)?;
            if self.bytes.len() < header.size + header.len {
                return Ok(None);
            }
            self.bytes.advance(header.size);
            let mut payload = self.bytes.split_to(header.len);
            unmask(&mut payload, header.mask);
            if self.bytes.is_empty() {
                self.bytes = BytesMut::new();
            }
            if header.kind.is_control() {
                return control(header.kind, payload.freeze()).map(Some);
            }
            let (kind, message) = match self.begun.take() {
                Some((kind, mut begun)) => {
                    begun.extend_from_slice(&payload);
                    (kind, begun)
                }
                None => (header.kind, payload),
            };
            if header.is_last {
                return Ok(Some(match kind {
                    // What it says is of no use: text is not part of any protocol here.
                    Kind::Text => Message::Text("".into()),
                    _ => Message::Binary(message.freeze()),
                }));
            }
            self.begun = Some((kind, message));
        }
        Ok(None)
    }

    /// Whether a frame may come now.
    fn check(&self, header: &Header) -> Result<(), Violation> {
        if header.kind.is_control() {
            return Ok(());
        }
        let before = match (&self.begun, header.kind) {
            (None, Kind::Continuation) => {
                return Err(Violation::Protocol(
                    "the end of a message without its beginning",
                ));
            }
            (Some((_, begun)), Kind::Continuation) => begun.len(),
            (Some(_), _) => {
                return Err(Violation::Protocol("a message begins within another one"));
            }
            (None, _) => 0,
        };
        let bytes = before.saturating_add(header.len);
        if FRAME_BYTES_MAX < bytes {
            return Err(Violation::TooLarge { bytes });
        }
        Ok(())
    }
}

impl Header {
    /// Reads a header; `None`: not all of it is here.
    fn read(bytes: &[u8]) -> Result<Option<Self>, Violation> {
        let &[first, second, ref rest @ ..] = bytes else {
            return Ok(None);
        };
        if first & 0x70 != 0 {
            return Err(Violation::Protocol("a reserved bit is set"));
        }
        let kind = Kind::of(first & 0x0f).ok_or(Violation::Protocol("a frame of unknown kind"))?;
        if second & 0x80 == 0 {
            return Err(Violation::Protocol("a frame without a mask"));
        }
        let is_last = first & 0x80 != 0;
        let short = second & 0x7f;
        if kind.is_control() && (!is_last || 125 < short) {
            return Err(Violation::Protocol(
                "a control frame that is long or in parts",
            ));
        }
        let (len, min, rest) = match short {
            126 => match rest.split_first_chunk() {
                Some((len, rest)) => (u64::from(u16::from_be_bytes(*len)), 126, rest),
                None => return Ok(None),
            },
            127 => match rest.split_first_chunk() {
                Some((len, rest)) => (u64::from_be_bytes(*len), 1 << 16, rest),
                None => return Ok(None),
            },
            short => (short.into(), 0, rest),
        };
        if len < min {
            return Err(Violation::Protocol(
                "a length that takes more bytes than it must",
            ));
        }
        let Some((&mask, rest)) = rest.split_first_chunk() else {
            return Ok(None);
        };
        Ok(Some(Self {
            kind,
            is_last,
            mask,
            size: bytes.len() - rest.len(),
            len: usize::try_from(len).unwrap_or(usize::MAX),
        }))
    }
}

fn control(kind: Kind, payload: Bytes) -> Result<Message, Violation> {
    Ok(match kind {
        Kind::Ping => Message::Ping(payload),
        Kind::Pong => Message::Pong(payload),
        _ => Message::Close(match payload.split_first_chunk() {
            None if payload.is_empty() => None,
            None => return Err(Violation::Protocol("half a close code")),
            Some((code, reason)) => {
                let code = u16::from_be_bytes(*code);
                if !may_be_sent(code) {
                    return Err(Violation::Protocol("a close code that nobody may send"));
                }
                let reason = str::from_utf8(reason).map_err(|_| Violation::NotText)?;
                let reason = reason.into();
                Some(CloseFrame { code, reason })
            }
        }),
    })
}

/// The close codes that stand in frames (RFC 6455 section 7.4).
const fn may_be_sent(code: u16) -> bool {
    matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999)
}

fn unmask(payload: &mut [u8], mask: [u8; 4]) {
    let mut chunks = payload.chunks_exact_mut(4);
    for chunk in &mut chunks {
        for (byte, mask) in chunk.iter_mut().zip(mask) {
            *byte ^= mask;
        }
    }
    for (byte, mask) in chunks.into_remainder().iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MASK: [u8; 4] = [1, 2, 3, 250];

    #[test]
    fn messages_are_taken_however_their_bytes_are_cut() {
        let long = vec![7; 70_000];
        let bytes = [
            framed(0x82, b"hello"),
            framed(0x89, b"?"),
            framed(0x82, &long),
            framed(0x02, b"in "),
            framed(0x8a, b""),
            framed(0x00, b"three "),
            framed(0x80, b"parts"),
            framed(0x81, b"text"),
            framed(0x88, &[&1001_u16.to_be_bytes()[..], b"bye"].concat()),
        ]
        .concat();
        let close = CloseFrame {
            code: 1001,
            reason: "bye".into(),
        };
        let expected = [
            Message::Binary("hello".into()),
            Message::Ping("?".into()),
            Message::Binary(long.into()),
            Message::Pong(Bytes::new()),
            Message::Binary("in three parts".into()),
            Message::Text("".into()),
            Message::Close(Some(close)),
        ];
        for size in [1, 3, 4_096, bytes.len()] {
            let mut inbox = Inbox::default();
            let mut taken = Vec::new();
            for part in bytes.chunks(size) {
                inbox.bytes().extend_from_slice(part);
                while let Some(message) = inbox.next().unwrap() {
                    taken.push(message);
                }
            }
            assert_eq!(taken, expected, "in parts of {size}");
            assert_eq!(inbox.bytes().capacity(), 0, "it holds nothing");
        }
    }

    #[test]
    fn who_breaks_the_rules_is_told_which() {
        let too_large = (FRAME_BYTES_MAX as u64 + 1).to_be_bytes();
        let too_large = [&[0x82, 0xff][..], &too_large, &MASK].concat();
        let of_two = [framed(2, b"a"), framed(2, b"b")].concat();
        for (bytes, code) in [
            (&[0x82, 3, 1, 1, 0][..], 1002),
            (&framed(0x89, &[0; 126]), 1002),
            (&framed(0x09, b""), 1002),
            (&framed(0xc2, b"a"), 1002),
            (&framed(0x83, b"a"), 1002),
            (&framed(0x80, b"a"), 1002),
            (&of_two, 1002),
            (&[0x82, 0xfe, 0, 125], 1002),
            (&[0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff], 1002),
            (&framed(0x88, &[3]), 1002),
            (&framed(0x88, &1005_u16.to_be_bytes()), 1002),
            (&framed(0x88, &[3, 232, 0xff]), 1007),
            (&too_large, 1009),
            (
                &[
                    0x82, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4,
                ],
                1009,
            ),
        ] {
            let mut inbox = Inbox::default();
            inbox.bytes().extend_from_slice(bytes);
            let refused = inbox.next().unwrap_err();
            assert_eq!(refused.code(), code, "{bytes:?}: {refused}");
        }
    }

    #[test]
    fn a_message_in_parts_is_no_way_around_the_largest_message() {
        let part = framed(0, &vec![0; FRAME_BYTES_MAX / 2 + 1]);
        let mut inbox = Inbox::default();
        inbox.bytes().extend_from_slice(&framed(2, b""));
        inbox.bytes().extend_from_slice(&part);
        assert_eq!(inbox.next(), Ok(None));
        inbox.bytes().extend_from_slice(&part[..20]);
        let bytes = FRAME_BYTES_MAX + 2;
        assert_eq!(inbox.next(), Err(Violation::TooLarge { bytes }));
    }

    #[test]
    fn what_a_frame_lacks_is_known_once_its_header_is_here() {
        let frame = framed(0x82, &[1; 300]);
        let mut inbox = Inbox::default();
        inbox.bytes().extend_from_slice(&frame[..7]);
        assert_eq!(inbox.missing(), 0);
        inbox.bytes().extend_from_slice(&frame[7..108]);
        assert_eq!(inbox.missing(), 200);
    }

    fn framed(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![first];
        match u16::try_from(payload.len()) {
            Ok(len) if len < 126 => frame.push(0x80 | u8::try_from(len).unwrap()),
            Ok(len) => {
                frame.push(0xfe);
                frame.extend(len.to_be_bytes());
            }
            Err(_) => {
                frame.push(0xff);
                frame.extend((payload.len() as u64).to_be_bytes());
            }
        }
        frame.extend(MASK);
        let masked = payload.iter().zip(MASK.iter().cycle());
        frame.extend(masked.map(|(byte, mask)| byte ^ mask));
        frame
    }
}
