//! What takes bytes from outside, and what must hold of it.

use std::collections::{BTreeMap, BTreeSet};

use axum::http::{HeaderMap, HeaderValue};
use bytes::Bytes;
use collab_core::document::{Document, EdgeId, Effect, Input, Peer};
use collab_core::ids::{ConnectionId, DocumentId, Epoch, Seq};
use collab_core::replica::Replica;
use collab_core::scan::{Places, scan_state_vector, scan_update};
use collab_core::wire::relay::{Channel, ToEdge, ToOwner, Unavailable, UpdateKind};
use collab_core::wire::varint::{Reader, write_var_bytes};
use collab_core::wire::{awareness, hocuspocus, y_sweet, y_websocket};
use collab_node::auth::{Auth, bearer};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::json;
use yrs::updates::decoder::Decode;
use yrs::{Array, Map, ReadTxn, StateVector, Transact, Update, WriteTxn};

use super::random::Random;
use super::{Target, sessions};

/// A target whose inputs are mutations of `seeds`.
fn mutated(
    name: &'static str,
    share: u32,
    taken_min: u64,
    seeds: Vec<Vec<u8>>,
    check: fn(&[u8]) -> bool,
) -> Target {
    let generate = move |random: &mut Random| {
        let seed = random.pick(&seeds).clone();
        random.mutate(&seed, &seeds)
    };
    Target {
        name,
        share,
        generate: Box::new(generate),
        check,
        taken_min,
    }
}

/// What is found sound is an update for `yrs` too, and so is the part of it that may be applied.
pub(super) fn scanner() -> Target {
    mutated("scanner", 2, 10, sessions::updates(), |input| {
        let Ok(scan) = scan_update(input) else {
            return false;
        };
        let update = Update::decode_v1(input).expect("yrs reads what is sound");
        let ends: BTreeMap<u64, u32> = scan.client_ends().collect();
        let vector = update.state_vector();
        if scan.summary().skips == 0 && scan.missing(|_| 0).is_none() {
            for (client, end) in &ends {
                assert_eq!(vector.get(&yrs::ClientID::new(*client)), *end);
            }
        }
        for known in [0, 1, 5, u32::MAX >> 1] {
            let part = scan.admissible(|_| known);
            let part = scan_update(&part).expect("a part is sound");
            assert_eq!(part.missing(|_| known), None);
            let _ = scan.novelty(|_| known);
        }
        let mut places = Places::default();
        if places.take(&scan).is_ok() {
            for (client, end) in ends {
                assert_eq!(places.next_clock(client), end);
            }
        }
        true
    })
}

/// What is understood of a frame lies inside it, and is what it says when it is written again.
pub(super) fn frames() -> Target {
    let mut seeds = Vec::new();
    for update in sessions::updates() {
        seeds.push(y_websocket::update(&update).to_vec());
        seeds.push(y_websocket::sync_step2(&update).to_vec());
        seeds.push(hocuspocus::update("notes/1", &update).to_vec());
    }
    for vector in sessions::vectors() {
        let mut several = y_websocket::sync_step1(&vector).to_vec();
        several.extend_from_slice(&y_websocket::query_awareness());
        seeds.extend([several, y_websocket::sync_step1(&vector).to_vec()]);
    }
    for json in [
        "null",
        "{}",
        r##"{"user":{"name":"Ada 😀","color":"#fff"},"cursor":{"anchor":[1,2.5e3]}}"##,
    ] {
        for client in [1, (1 << 53) - 1] {
            let clock = 7;
            let entry = awareness::Entry {
                client,
                clock,
                json,
            };
            seeds.push(y_websocket::awareness(&awareness::encode([entry; 3])).to_vec());
        }
    }
    seeds.push(y_websocket::permission_denied("no").to_vec());
    seeds.push(y_sweet::saved(&[1, 7]).to_vec());
    seeds.push(hocuspocus::sync_step1("notes/1\0session", &[0]).to_vec());
    seeds.push(hocuspocus::awareness("notes/1", &[0]).to_vec());
    seeds.push(hocuspocus::stateless("notes/1", b"ring").to_vec());
    seeds.push(b"\x07notes/1\x02\x00\x05token\x054.8.0".to_vec());
    seeds.push(b"\x07notes/1\x07".to_vec());
    seeds.push(y_websocket::KEEPALIVE.to_vec());
    mutated("frames", 1, 10, seeds, |input| {
        let mut understood = hocuspocus_frame(input);
        for message in y_websocket::parse(input) {
            let Ok(message) = message else {
                break;
            };
            understood = true;
            let again = match &message {
                y_websocket::Message::SyncStep1 { state_vector } => {
                    y_websocket::sync_step1(state_vector)
                }
                y_websocket::Message::SyncStep2 { update } => y_websocket::sync_step2(update),
                y_websocket::Message::Update { update } => y_websocket::update(update),
                y_websocket::Message::Awareness(entries) => {
                    let payload = awareness::encode(entries.clone());
                    let read = awareness::parse(&payload).expect("it was read before");
                    assert!(read.eq(entries.clone()));
                    y_websocket::awareness(entries.payload())
                }
                y_websocket::Message::PermissionDenied { reason } => {
                    y_websocket::permission_denied(reason)
                }
                y_websocket::Message::QueryAwareness => y_websocket::query_awareness(),
                y_websocket::Message::Saved { payload } => y_sweet::saved(payload),
            };
            let again: Vec<_> = y_websocket::parse(&again).collect();
            assert_eq!(again, [Ok(message)]);
        }
        understood
    })
}

/// As [`frames`], for the family whose frames have an address. Whether it was understood.
fn hocuspocus_frame(input: &[u8]) -> bool {
    let Ok(frame) = hocuspocus::parse(input) else {
        return false;
    };
    let hocuspocus::Frame::Message { address, message } = &frame else {
        return true;
    };
    assert!(address.0.starts_with(address.document()));
    let again = match message {
        hocuspocus::Message::Common(y_websocket::Message::SyncStep1 { state_vector }) => {
            hocuspocus::sync_step1(address.0, state_vector)
        }
        hocuspocus::Message::Common(y_websocket::Message::SyncStep2 { update }) => {
            hocuspocus::sync_step2(address.0, update)
        }
        hocuspocus::Message::Common(y_websocket::Message::Update { update }) => {
            hocuspocus::update(address.0, update)
        }
        hocuspocus::Message::Common(y_websocket::Message::Awareness(entries)) => {
            hocuspocus::awareness(address.0, entries.payload())
        }
        hocuspocus::Message::Stateless { payload } => {
            hocuspocus::stateless(address.0, payload.as_bytes())
        }
        // A server has no words for these.
        _ => return true,
    };
    assert_eq!(hocuspocus::parse(&again).as_ref(), Ok(&frame));
    true
}

/// What one node understands of another is what it would write itself.
pub(super) fn relay() -> Target {
    let channel = Channel(3);
    let some = Bytes::from_static(&[1, 1, 1, 0, 4, 1, 1, b't', 2, b'a', b'b', 0]);
    let (to_owner, to_edge) = (to_owner(&some), to_edge(&some));
    let to_owner = to_owner
        .iter()
        .map(|message| message.encode(channel).to_vec());
    let to_edge = to_edge
        .iter()
        .map(|message| message.encode(channel).to_vec());
    let seeds = to_owner.chain(to_edge).collect();
    mutated("relay", 1, 100, seeds, |input| {
        let frame = Bytes::copy_from_slice(input);
        let to_owner = ToOwner::decode(frame.clone());
        let to_edge = ToEdge::decode(frame);
        let understood = to_owner.is_ok() || to_edge.is_ok();
        if let Ok((channel, message)) = to_owner {
            assert_eq!(
                ToOwner::decode(message.encode(channel)),
                Ok((channel, message))
            );
        }
        if let Ok((channel, message)) = to_edge {
            assert_eq!(
                ToEdge::decode(message.encode(channel)),
                Ok((channel, message))
            );
        }
        understood
    })
}

fn to_owner(some: &Bytes) -> Vec<ToOwner> {
    let connection = ConnectionId(7);
    vec![
        ToOwner::Attach {
            document: DocumentId::new("a/b ä").unwrap(),
            since: some.clone(),
        },
        ToOwner::Detach,
        ToOwner::Join {
            connection,
            author: "ada".to_owned(),
        },
        ToOwner::Leave { connection },
        ToOwner::Step1 {
            connection,
            state_vector: some.clone(),
        },
        ToOwner::Update {
            connection,
            number: 9,
            kind: UpdateKind::Step2,
            update: some.clone(),
        },
        ToOwner::Awareness {
            connection,
            payload: some.clone(),
        },
        ToOwner::QueryAwareness { connection },
        ToOwner::Compare {
            connection,
            number: 10,
            update: some.clone(),
        },
        ToOwner::Stateless {
            connection,
            payload: some.clone(),
        },
    ]
}

fn to_edge(some: &Bytes) -> Vec<ToEdge> {
    let connection = ConnectionId(7);
    let reason = "why".to_owned();
    vec![
        ToEdge::Attached {
            epoch: Epoch(5),
            state_vector: some.clone(),
        },
        ToEdge::CatchUp {
            update: some.clone(),
        },
        ToEdge::Stateless {
            except: Some(connection),
            payload: some.clone(),
        },
        ToEdge::FanOut {
            except: Some(connection),
            update: some.clone(),
        },
        ToEdge::Presence {
            payload: some.clone(),
        },
        ToEdge::PresenceTo {
            connection,
            payload: some.clone(),
        },
        ToEdge::Step1 {
            connection,
            state_vector: some.clone(),
        },
        ToEdge::Step2 {
            connection,
            update: some.clone(),
        },
        ToEdge::Receipt {
            connection,
            upto: 9,
        },
        ToEdge::Refused {
            connection,
            reason: reason.clone(),
        },
        ToEdge::Moved { epoch: Epoch(6) },
        ToEdge::Unavailable {
            cause: Unavailable::Degraded,
            reason,
        },
    ]
}

/// A state vector that is sound is one for `yrs`, which reserves what it declares.
pub(super) fn state_vector() -> Target {
    mutated("state_vector", 1, 10, sessions::vectors(), |input| {
        let Ok(entries) = scan_state_vector(input) else {
            return false;
        };
        let entries: BTreeMap<u64, u32> = entries.map(|id| (id.client, id.clock)).collect();
        let theirs = StateVector::decode_v1(input).expect("yrs reads what is sound");
        assert_eq!(theirs.iter().count(), entries.len());
        true
    })
}

/// No client makes an owner panic, hang or store what cannot be loaded again.
///
/// The input is the updates that clients send one after the other. Mutated is the last but one, the last
/// goes on as if nothing had happened.
pub(super) fn document() -> Target {
    let bases = sessions::bases();
    let others: Vec<_> = bases.iter().map(|base| base.next.clone()).collect();
    let generate = move |random: &mut Random| {
        let base = random.pick(&bases);
        let sent = if random.below(4) == 0 {
            random.compose(base)
        } else {
            random.mutate(&base.next, &others)
        };
        lines(&[&base.state, &sent, &base.next])
    };
    Target {
        name: "document",
        share: 5,
        generate: Box::new(generate),
        check: live_with,
        taken_min: 20,
    }
}

const PEER: Peer = Peer {
    edge: EdgeId(1),
    connection: ConnectionId(1),
};

fn live_with(input: &[u8]) -> bool {
    let mut owner = Owner::new(Document::open(Epoch(1), None, &[], Seq(0)).expect("it is empty"));
    let mut taken = false;
    for (number, update) in read_lines(input).enumerate() {
        let logged = owner.log.len();
        owner.sends(update);
        taken |= number == 1 && logged < owner.log.len();
    }
    owner.is_sound();
    let emptied = emptied(&owner.document.encode_state());
    owner.sends(&emptied);
    owner.is_sound();
    taken
}

/// A document with its log.
struct Owner {
    document: Document,
    log: Vec<(Seq, Bytes)>,
    number: u64,
}

impl Owner {
    fn new(mut document: Document) -> Self {
        document.handle(Input::Attach {
            edge: PEER.edge,
            since: Bytes::new(),
        });
        document.handle(Input::Join {
            peer: PEER,
            author: String::new(),
        });
        Self {
            document,
            log: Vec::new(),
            number: 0,
        }
    }

    fn sends(&mut self, update: &[u8]) {
        self.number += 1;
        let effects = self.document.handle(Input::Update {
            peer: PEER,
            number: self.number,
            kind: UpdateKind::Step2,
            update: Bytes::copy_from_slice(update),
        });
        for effect in effects {
            match effect {
                Effect::Append { seq, update, .. } => {
                    self.log.push((seq, update));
                    self.document.handle(Input::Committed { seq });
                }
                Effect::Reload => panic!("it was admitted and cannot be applied"),
                _ => {}
            }
        }
    }

    /// It can be encoded, read, and opened again from its log and from its state, as the same document.
    fn is_sound(&mut self) {
        let state = self.document.encode_state();
        let own = scan_update(&state).expect("its own state is sound");
        assert_eq!(own.missing(|_| 0), None);
        let ends: BTreeMap<u64, u32> = own.client_ends().collect();
        let last = self.document.assigned_seq();
        let from_log = Document::open(Epoch(2), None, &self.log, last).expect("its log opens");
        let from_state =
            Document::open(Epoch(2), Some((last, &state)), &[], last).expect("its state opens");
        for copy in [&from_log, &from_state] {
            let state = copy.encode_state();
            let copied = scan_update(&state).expect("its own state is sound");
            assert_eq!(copied.client_ends().collect::<BTreeMap<_, _>>(), ends);
            for root in ["text", "map", "array", "xml", "new"] {
                copy.text(root);
            }
        }
        for root in ["text", "map", "array", "xml", "new"] {
            // The order of content may differ, with a right origin that is left of the origin: no
            // client writes that, and no one else's content is lost.
            assert_eq!(self.document.text(root), from_log.text(root));
        }
        let known = self.document.handle(Input::Step1 {
            peer: PEER,
            state_vector: Bytes::from_static(&[1, 1, 1]),
        });
        assert!(!known.is_empty());
    }
}

/// What a client sends that has all of this state and deletes it all.
fn emptied(state: &[u8]) -> Vec<u8> {
    let mut doc = Replica::new();
    let everything = Update::decode_v1(state).expect("it was encoded");
    let scan = scan_update(state).expect("it was encoded");
    doc.apply(&scan, everything).expect("it was encoded");
    let roots: BTreeSet<String> = doc
        .transact()
        .root_refs()
        .map(|(name, _)| name.to_owned())
        .collect();
    let types: Vec<_> = roots
        .iter()
        .map(|root| {
            let name = root.as_str();
            (doc.get_or_insert_array(name), doc.get_or_insert_map(name))
        })
        .collect();
    let mut txn = doc.transact_mut();
    for (array, map) in types {
        let len = array.len(&txn);
        array.remove_range(&mut txn, 0, len);
        map.clear(&mut txn);
    }
    // As a replica does at the end of its own transactions.
    std::mem::take(txn.subdocs_mut());
    txn.encode_update_v1()
}

/// Whatever lies in the rows of a store, opening a document ends, and what opens is a document.
///
/// The input is a snapshot and the log behind it; their checksums are taken for right.
pub(super) fn stored_rows() -> Target {
    let bases = sessions::bases();
    let others: Vec<_> = bases.iter().map(|base| base.next.clone()).collect();
    let generate = move |random: &mut Random| {
        let base = random.pick(&bases);
        match random.below(3) {
            0 => lines(&[&random.mutate(&base.state, &others), &base.next]),
            1 => lines(&[&base.state, &random.compose(base), &base.next]),
            _ => lines(&[&base.state, &random.mutate(&base.next, &others)]),
        }
    };
    Target {
        name: "stored_rows",
        share: 1,
        generate: Box::new(generate),
        check: |input| {
            let mut rows = read_lines(input);
            let snapshot = Bytes::copy_from_slice(rows.next().unwrap_or_default());
            let log: Vec<_> = (6..)
                .map(Seq)
                .zip(rows.map(Bytes::copy_from_slice))
                .collect();
            let last = log.last().map_or(Seq(5), |(seq, _)| *seq);
            let opened = Document::open(Epoch(1), Some((Seq(5), &snapshot)), &log, last);
            let Ok(document) = opened else {
                return false;
            };
            let state = document.encode_state();
            let again = Document::open(Epoch(1), Some((last, &state)), &[], last);
            document.text("text");
            again.expect("its state opens");
            true
        },
        taken_min: 10,
    }
}

const SECRET: &str = "0123456789abcdef";

/// A token opens what its issuer signed, or nothing.
pub(super) fn token() -> Target {
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    let later = jsonwebtoken::get_current_timestamp() + 36_000;
    let mut seeds = Vec::new();
    for claims in [
        json!({"sub": "ada", "exp": later}),
        json!({"sub": "ada", "exp": later, "documents": ["notes", "team/*"], "scope": "read"}),
        json!({"sub": "ada", "exp": 1}),
        json!({"sub": 5, "exp": "later"}),
    ] {
        for algorithm in [Algorithm::HS256, Algorithm::HS512] {
            let token = jsonwebtoken::encode(&Header::new(algorithm), &claims, &key).unwrap();
            seeds.push(format!("Bearer {token}").into_bytes());
        }
    }
    seeds.push(b"Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGEiLCJleHAiOjk5OTk5OTk5OTl9.".to_vec());
    mutated("token", 1, 0, seeds, |input| {
        let auth = Auth::new(Some(SECRET), None);
        let mut headers = HeaderMap::new();
        if let Ok(value) = HeaderValue::from_bytes(input) {
            headers.insert("authorization", value);
        }
        let text = str::from_utf8(input).ok();
        let by_header = auth.claims(&headers, None);
        let by_query = auth.claims(&HeaderMap::new(), text);
        assert!(by_query.is_err(), "a query has no word before its token");
        let Ok(claims) = by_header else {
            return false;
        };
        assert_eq!(claims.sub, "ada");
        let token = bearer(&headers).expect("it was taken");
        let signed = jsonwebtoken::decode_header(token).expect("it was taken");
        assert_eq!(signed.alg, Algorithm::HS256);
        true
    })
}

/// Byte strings one after the other, with their lengths.
fn lines(parts: &[&Vec<u8>]) -> Vec<u8> {
    let mut input = Vec::new();
    for part in parts {
        write_var_bytes(&mut input, part);
    }
    input
}

fn read_lines(input: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut reader = Reader::new(input);
    std::iter::from_fn(move || {
        if reader.is_empty() {
            return None;
        }
        reader.var_bytes().ok()
    })
}
