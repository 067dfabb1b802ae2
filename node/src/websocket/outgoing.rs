//! Messages in, bytes for a client out (RFC 6455 section 5). No I/O.
//!
//! Short messages are copied behind each other, so that one call of the system writes many. Long ones stay where they
//! lie, which is the same place for all sockets that are sent them, and go in frames that take turns with what else the
//! system has to send.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::Kind;

/// A longer message is written from where it lies.
const COPIED_BYTES_MAX: usize = 1024;
/// A message longer than this is sent in frames of this size.
const FRAGMENT_BYTES: usize = 64 * 1024;

/// What is to be written.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    /// Written first.
    parts: VecDeque<Bytes>,
    /// What comes after them, and grows.
    end: BytesMut,
    bytes: usize,
}

impl Outgoing {
    /// Adds a message.
    pub(super) fn push(&mut self, kind: Kind, payload: &Bytes) {
        if payload.len() <= COPIED_BYTES_MAX {
            self.head(kind, true, payload.len());
            self.end.extend_from_slice(payload);
            self.bytes += payload.len();
            return;
        }
        let mut rest = payload.clone();
        let mut kind = kind;
        while !rest.is_empty() {
            let fragment = rest.split_to(rest.len().min(FRAGMENT_BYTES));
            self.head(kind, rest.is_empty(), fragment.len());
            kind = Kind::Continuation;
            self.parts.push_back(self.end.split().freeze());
            self.bytes += fragment.len();
            self.parts.push_back(fragment);
        }
    }

    /// Writes what stands before a payload.
    fn head(&mut self, kind: Kind, is_last: bool, len: usize) {
        let before = self.end.len();
        self.end.put_u8(kind as u8 | if is_last { 0x80 } else { 0 });
        match u16::try_from(len) {
            Ok(len) if len < 126 => self.end.put_u8(len.to_be_bytes()[1]),
            Ok(len) => {
                self.end.put_u8(126);
                self.end.put_u16(len);
            }
            Err(_) => {
                self.end.put_u8(127);
                self.end.put_u64(len as u64);
            }
        }
        self.bytes += self.end.len() - before;
    }
}

impl Buf for Outgoing {
    fn remaining(&self) -> usize {
        self.bytes
    }

    fn chunk(&self) -> &[u8] {
        self.parts.front().map_or(&self.end, |part| part)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let chunks = self.parts.iter().map(Bytes::as_ref).chain([&*self.end]);
        let chunks = chunks.filter(|chunk| !chunk.is_empty());
        let filled = slices.iter_mut().zip(chunks);
        filled
            .map(|(slice, chunk)| *slice = IoSlice::new(chunk))
            .count()
    }

    fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while let Some(part) = self.parts.front_mut() {
            if written < part.len() {
                return part.advance(written);
            }
            written -= part.len();
            self.parts.pop_front();
        }
        self.end.advance(written);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_messages_lie_behind_each_other() {
        let mut outgoing = Outgoing::default();
        outgoing.push(Kind::Binary, &"one".into());
        outgoing.push(Kind::Ping, &Bytes::new());
        outgoing.push(Kind::Binary, &vec![7; 126].into());
        let expected = [&b"\x82\x03one\x89\x00\x82\x7e\x00\x7e"[..], &[7; 126]].concat();
        assert_eq!(outgoing.chunk(), expected);
        assert_eq!(outgoing.remaining(), expected.len());
    }

    #[test]
    fn a_long_message_is_sent_in_parts_from_where_it_lies() {
        let mut outgoing = Outgoing::default();
        let long = Bytes::from(vec![7; 2 * FRAGMENT_BYTES + 1]);
        outgoing.push(Kind::Binary, &"one".into());
        outgoing.push(Kind::Binary, &long);
        outgoing.push(Kind::Binary, &"two".into());
        let mut slices = [IoSlice::new(&[]); 8];
        let count = outgoing.chunks_vectored(&mut slices);
        let lens: Vec<usize> = slices[..count].iter().map(|slice| slice.len()).collect();
        assert_eq!(lens, [15, FRAGMENT_BYTES, 10, FRAGMENT_BYTES, 2, 1, 5]);
        assert_eq!(slices[1].as_ptr(), long.as_ptr());
        let expected = [
            &b"\x82\x03one\x02\x7f\0\0\0\0\0\x01\0\0"[..],
            &long[..FRAGMENT_BYTES],
            b"\0\x7f\0\0\0\0\0\x01\0\0",
            &long[..FRAGMENT_BYTES],
            b"\x80\x01\x07\x82\x03two",
        ]
        .concat();
        for size in [1, 1_000, 100_000, usize::MAX] {
            let mut outgoing = Outgoing::default();
            for message in ["one".into(), long.clone(), "two".into()] {
                outgoing.push(Kind::Binary, &message);
            }
            let mut written = Vec::new();
            while outgoing.has_remaining() {
                let chunk = outgoing.chunk();
                let size = size.min(chunk.len());
                written.extend_from_slice(&chunk[..size]);
                outgoing.advance(size);
            }
            assert!(written == expected, "by {size} bytes");
        }
    }
}
