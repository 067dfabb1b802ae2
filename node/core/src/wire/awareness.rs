//! The payload of presence ("awareness"), the same in every family of clients.
//!
//! It is a number of entries and then, for each, client id, clock and the client's state in JSON.
//! Every peer parses that JSON as it comes, so what a peer could not parse is refused here.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::json::is_json;
use super::varint::{ReadError, Reader, write_var_bytes, write_var_uint};
use crate::limits::{AWARENESS_BYTES_MAX, AWARENESS_CLIENTS_MAX};

/// State of a client that is gone.
pub const GONE: &str = "null";

/// What is known of one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Id of the client, as in the document.
    pub client: u64,
    /// Version of the entry. A newer one replaces an older; [`GONE`] replaces one of equal clock.
    pub clock: u32,
    /// State in JSON, or [`GONE`].
    pub json: &'a str,
}

impl<'a> Entry<'a> {
    /// Whether the client is gone.
    pub fn is_gone(&self) -> bool {
        self.json == GONE
    }

    fn read(reader: &mut Reader<'a>) -> Result<Self, AwarenessError> {
        let client = reader.var_uint()?;
        let clock = u32::try_from(reader.var_uint()?).map_err(|_| AwarenessError::TooLarge {
            what: "clock",
            max: u32::MAX.into(),
        })?;
        let json = reader.var_str()?;
        Ok(Self {
            client,
            clock,
            json,
        })
    }
}

/// Why presence is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AwarenessError {
    /// It is not in the format. Close the socket (1007).
    #[error("malformed: {0}")]
    Malformed(#[from] ReadError),
    /// Other clients could not parse it. Close the socket (1007).
    #[error("state of client {client} is not JSON, or nested too deep")]
    NotJson {
        /// The client that the entry is about.
        client: u64,
    },
    /// More than is allowed. Close the socket (1009).
    #[error("{what} is larger than {max}")]
    TooLarge {
        /// What is.
        what: &'static str,
        /// The largest that is allowed.
        max: u64,
    },
}

/// Checks a whole payload and gives its entries.
///
/// # Errors
/// When it is malformed or larger than the limits, or a state is not JSON.
pub fn parse(payload: &[u8]) -> Result<Entries<'_>, AwarenessError> {
    let mut rest = Reader::new(payload);
    let count = rest.var_uint()?;
    at_most("number of entries", count, AWARENESS_CLIENTS_MAX)?;
    let entries = Entries {
        payload,
        rest,
        count,
    };
    for _ in 0..count {
        let entry = Entry::read(&mut rest)?;
        at_most(
            "state of a client",
            entry.json.len() as u64,
            AWARENESS_BYTES_MAX as u64,
        )?;
        if !is_json(entry.json) {
            return Err(AwarenessError::NotJson {
                client: entry.client,
            });
        }
    }
    Ok(entries)
}

/// The entries of a payload that was checked, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entries<'a> {
    payload: &'a [u8],
    rest: Reader<'a>,
    count: u64,
}

impl<'a> Entries<'a> {
    /// The bytes as they came.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Entry<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        self.count = self.count.checked_sub(1)?;
        // It was read before, by `parse`.
        Entry::read(&mut self.rest).ok()
    }
}

/// Payload with these entries.
pub fn encode<'a>(entries: impl IntoIterator<Item = Entry<'a>>) -> Bytes {
    let (mut count, mut written) = (0, Vec::new());
    for entry in entries {
        count += 1;
        write_var_uint(&mut written, entry.client);
        write_var_uint(&mut written, entry.clock.into());
        write_var_bytes(&mut written, entry.json.as_bytes());
    }
    let mut payload = Vec::with_capacity(written.len() + 3);
    write_var_uint(&mut payload, count);
    payload.extend_from_slice(&written);
    payload.into()
}

/// One payload that says what several said one after the other: of each client the last.
pub fn merge<'a>(payloads: impl IntoIterator<Item = &'a [u8]>) -> Bytes {
    let entries = payloads.into_iter().filter_map(|one| parse(one).ok());
    let newest: BTreeMap<u64, Entry<'a>> = entries
        .flatten()
        .map(|entry| (entry.client, entry))
        .collect();
    encode(newest.into_values())
}

fn at_most(what: &'static str, size: u64, max: u64) -> Result<(), AwarenessError> {
    if size <= max {
        Ok(())
    } else {
        Err(AwarenessError::TooLarge { what, max })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use yrs::block::ClientID;
    use yrs::sync::AwarenessUpdate;
    use yrs::updates::decoder::Decode;

    use super::*;
    use crate::limits::CLIENT_ID_MAX;

    #[test]
    fn sizes_are_bounded() {
        let state = |bytes: usize| {
            encode([Entry {
                client: 1,
                clock: 1,
                json: &format!("\"{}\"", "a".repeat(bytes - 2)),
            }])
        };
        assert!(parse(&state(AWARENESS_BYTES_MAX)).is_ok());
        assert!(too_large(&state(AWARENESS_BYTES_MAX + 1)));

        // Three bytes that declare many entries.
        let mut many = Vec::new();
        write_var_uint(&mut many, AWARENESS_CLIENTS_MAX + 1);
        assert!(too_large(&many));

        let mut clock = vec![1, 5];
        write_var_uint(&mut clock, u64::from(u32::MAX) + 1);
        assert!(too_large(&clock));
    }

    #[test]
    fn what_other_clients_cannot_parse_is_refused() {
        for json in ["", "{", "undefined", &"[".repeat(5_000)] {
            let payload = encode([Entry {
                client: 5,
                clock: 1,
                json,
            }]);
            assert_eq!(
                parse(&payload),
                Err(AwarenessError::NotJson { client: 5 }),
                "{json}"
            );
        }
    }

    #[test]
    fn what_is_cut_is_refused() {
        let payload = encode([
            Entry {
                client: 300,
                clock: 300,
                json: "{}",
            },
            Entry {
                client: 2,
                clock: 0,
                json: GONE,
            },
        ]);
        assert!(parse(&payload).is_ok());
        for end in 0..payload.len() {
            assert_eq!(
                parse(&payload[..end]),
                Err(AwarenessError::Malformed(ReadError::Truncated)),
                "{end}"
            );
        }
    }

    #[test]
    fn what_clients_said_one_after_the_other_is_said_at_once() {
        let entry = |client, clock, json| Entry {
            client,
            clock,
            json,
        };
        let said = [
            encode([entry(7, 1, "1"), entry(2, 1, "1")]),
            encode([entry(7, 2, "2")]),
            encode([entry(2, 1, GONE), entry(5, 9, "5")]),
        ];
        let merged = merge(said.iter().map(Bytes::as_ref));
        let expected = [entry(2, 1, GONE), entry(5, 9, "5"), entry(7, 2, "2")];
        assert_eq!(merged, encode(expected));
    }

    #[test]
    fn a_client_that_left_is_gone_for_yrs_too() {
        let gone = |client, clock| Entry {
            client,
            clock,
            json: GONE,
        };
        let payload = encode([gone(1, 7), gone(1 << 40, 0)]);
        let theirs = AwarenessUpdate::decode_v1(&payload).unwrap();
        assert_eq!(theirs.clients.len(), 2);
        for entry in parse(&payload).unwrap() {
            let their_entry = &theirs.clients[&ClientID::new(entry.client)];
            assert!(entry.is_gone());
            assert_eq!(
                (their_entry.clock, &*their_entry.json),
                (entry.clock, "null")
            );
        }
    }

    proptest! {
        #[test]
        fn presence_survives(
            entries in proptest::collection::vec((0..=CLIENT_ID_MAX, any::<u32>(), "[a-zä😀]*"), 0..5)
        ) {
            let states: Vec<_> = entries.iter().map(|(.., name)| format!("{{\"name\":\"{name}\"}}")).collect();
            let entries: Vec<_> = entries
                .iter()
                .zip(&states)
                .map(|((client, clock, _), json)| Entry { client: *client, clock: *clock, json })
                .collect();
            let payload = encode(entries.iter().copied());
            let parsed = parse(&payload).unwrap();
            prop_assert_eq!(parsed.payload(), &payload);
            prop_assert_eq!(parsed.collect::<Vec<_>>(), entries);
        }
    }

    fn too_large(payload: &[u8]) -> bool {
        matches!(parse(payload), Err(AwarenessError::TooLarge { .. }))
    }
}
