//! What stock clients sent, as `testdata/client-frames.mjs` recorded it.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;

/// One frame of a client.
pub(super) struct Said {
    /// The recorder's name for what it says.
    pub(super) what: String,
    /// The frame.
    pub(super) frame: Bytes,
}

#[derive(Deserialize)]
struct Recorded {
    /// By family: what each frame says, and the frame in hexadecimal digits.
    clients: BTreeMap<String, Vec<(String, String)>>,
    /// By family: frames of a server, made with the family's own encoders.
    answers: BTreeMap<String, BTreeMap<String, String>>,
}

/// Everything that a client of this family sent, in order.
pub(super) fn said(family: &str) -> Vec<Said> {
    let frames = &recorded().clients[family];
    assert!(!frames.is_empty());
    let said = |(what, frame): &(String, String)| Said {
        what: what.clone(),
        frame: bytes(frame),
    };
    frames.iter().map(said).collect()
}

/// The frame of a server of this family.
pub(super) fn answer(family: &str, what: &str) -> Bytes {
    bytes(&recorded().answers[family][what])
}

fn recorded() -> Recorded {
    serde_json::from_str(include_str!("../../testdata/client-frames.json")).unwrap()
}

fn bytes(digits: &str) -> Bytes {
    let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
    (0..digits.len()).step_by(2).map(byte).collect()
}
