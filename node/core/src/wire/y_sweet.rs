//! What y-sweet's client adds to the frames of y-websocket: a receipt that it asks for.
//!
//! Message 102 holds a byte array, the client's version of the document. The client sends it when it
//! connects, after each of its edits, and when it heard nothing for 2 s; whoever returns it says that
//! all before it is saved. A client to which it was returned once closes a socket that is silent for
//! 3 s after it asked again, so one that cannot be returned yet is answered with
//! [`super::y_websocket::KEEPALIVE`].

use bytes::Bytes;

use super::y_websocket;

/// Type of the message.
pub(super) const SAVED: u64 = 102;

/// Frame that returns the payload of a client's "saved" message.
pub fn saved(payload: &[u8]) -> Bytes {
    y_websocket::frame(&[SAVED], payload)
}

/// Whether a text is the id of a document: y-sweet puts ids into paths as they are.
pub fn is_id(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    !text.is_empty() && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::super::recorded::{self, Said};
    use super::super::y_websocket::{Message, parse};
    use super::*;

    #[test]
    fn the_client_is_understood() {
        let mut versions = Vec::new();
        for Said { what, frame } in recorded::said("y-sweet") {
            let mut messages = parse(&frame);
            let message = messages.next().unwrap().unwrap();
            assert!(messages.next().is_none(), "{what}");
            match (what.as_str(), message) {
                ("saved", Message::Saved { payload }) => versions.push(payload.to_vec()),
                ("step1", Message::SyncStep1 { .. })
                | ("step2", Message::SyncStep2 { .. })
                | ("update", Message::Update { .. })
                | ("awareness", Message::Awareness(_)) => {}
                (what, said) => panic!("{what} was read as {said:?}"),
            }
        }
        // When it connects, and after its edit.
        assert_eq!(versions, [[0], [1]]);
        assert_eq!(saved(&[1]), recorded::answer("y-sweet", "saved"));
    }

    #[test]
    fn ids_are_safe_in_a_path() {
        assert!(is_id("Ab9-_"));
        for text in ["", "a/b", "a.b", "ä", "a b", "a\0"] {
            assert!(!is_id(text), "{text:?}");
        }
    }
}
