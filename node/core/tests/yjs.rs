//! The scanner and `yrs` against sessions recorded from Yjs (`testdata/yjs-updates.json`).

use std::collections::BTreeMap;

use collab_core::scan::{Novelty, Places, ScanError, scan_state_vector, scan_update};
use serde::Deserialize;
use serde_json::Value;
use yrs::block::ClientID;
use yrs::types::{Attrs, ToJson};
use yrs::updates::decoder::Decode;
use yrs::{
    Any, Array, ArrayPrelim, Doc, GetString, Map, MapPrelim, OffsetKind, Options, ReadTxn,
    StateVector, Text, TextPrelim, Transact, TransactionMut, Update, WriteTxn, Xml,
    XmlElementPrelim, XmlFragment, XmlTextPrelim, any,
};

/// A server's log of what three Yjs clients typed, and what Yjs made of it.
#[derive(Deserialize)]
struct Session {
    log: Vec<String>,
    state: String,
    vector: String,
    text: String,
    xml: String,
    map: Value,
    array: Value,
}

#[test]
fn what_yjs_writes_is_admitted_and_read_as_yjs_reads_it() {
    for session in sessions() {
        for moves in [false, true] {
            let mut owner = Owner::default();
            for update in &session.log {
                owner.admit(&bytes(update));
                if moves {
                    owner = owner.reloaded();
                }
            }
            assert_content(&owner.doc, &session);
        }

        let mut owner = Owner::default();
        owner.admit(&bytes(&session.state));
        assert_content(&owner.doc, &session);
    }
}

#[test]
fn what_yrs_writes_is_admitted() {
    for session in sessions() {
        let mut owner = Owner::default();
        let mut since = StateVector::default();
        for (number, update) in session.log.iter().enumerate() {
            owner.admit(&bytes(update));
            if number % 7 == 0 {
                let txn = owner.doc.transact();
                let (whole, vector) = (
                    txn.encode_diff_v1(&StateVector::default()),
                    txn.state_vector(),
                );
                let mut copy = Owner::default();
                copy.admit(&whole);
                let since_then = txn.encode_diff_v1(&since);
                assert_eq!(
                    scan_update(&since_then).unwrap().missing(clocks(&since)),
                    None
                );
                since = vector;
            }
        }
    }
}

/// The server edits too, through `yrs`: every kind of content it can write.
#[test]
fn what_yrs_types_is_admitted() {
    let owner = Owner::default();
    let mut copy = Owner::default();
    let doc = &owner.doc;
    let (text, array) = (
        doc.get_or_insert_text("text"),
        doc.get_or_insert_array("array"),
    );
    let (map, xml) = (
        doc.get_or_insert_map("map"),
        doc.get_or_insert_xml_fragment("xml"),
    );
    let bold = || Attrs::from([("bold".into(), Any::Bool(true))]);
    let edits: [&dyn Fn(&mut TransactionMut<'_>); 12] = [
        &|txn| text.insert(txn, 0, "aä日😀 text"),
        &|txn| text.insert_with_attributes(txn, 2, "bold", bold()),
        &|txn| text.format(txn, 1, 5, bold()),
        &|txn| {
            text.insert_embed(txn, 3, any!({ "image": [1, 2.5, null, "x"] }));
        },
        &|txn| text.remove_range(txn, 2, 3),
        &|txn| {
            let nested = array.push_back(txn, MapPrelim::default());
            nested.insert(txn, "deeper", ArrayPrelim::from([1, 2, 3]));
            array.insert_range(
                txn,
                0,
                [
                    Any::Null,
                    Any::Undefined,
                    Any::from(1.5),
                    Any::from(1_i64 << 60),
                ],
            );
        },
        &|txn| {
            map.insert(txn, "bytes", vec![0_u8, 255]);
            map.insert(txn, "text", TextPrelim::new("nested"));
            map.insert(txn, "any", any!({ "a": [true, { "b": (-1) }] }));
        },
        &|txn| {
            map.remove(txn, "text");
        },
        &|txn| {
            array.push_back(txn, Doc::new());
        },
        &|txn| {
            let paragraph = xml.push_back(txn, XmlElementPrelim::empty("p"));
            paragraph.insert_attribute(txn, "id", "1");
            paragraph.push_back(txn, XmlTextPrelim::new("in XML"));
        },
        &|txn| array.remove_range(txn, 0, 2),
        &|txn| xml.remove_range(txn, 0, 1),
    ];
    for edit in edits {
        let mut txn = doc.transact_mut();
        edit(&mut txn);
        let update = txn.encode_update_v1();
        drop(txn);
        copy.admit(&update);
    }
    assert_eq!(
        owner.doc.transact().state_vector(),
        copy.doc.transact().state_vector()
    );
    assert_eq!(
        text.get_string(&owner.doc.transact()),
        copy.doc
            .get_or_insert_text("text")
            .get_string(&copy.doc.transact())
    );
}

#[test]
fn the_same_again_is_nothing_new() {
    for session in sessions() {
        let mut owner = Owner::default();
        owner.admit(&bytes(&session.state));
        let vector = owner.doc.transact().state_vector();
        for update in &session.log {
            let update = bytes(update);
            let scan = scan_update(&update).unwrap();
            assert_ne!(scan.novelty(clocks(&vector)), Novelty::New);
            assert_eq!(scan.missing(clocks(&vector)), None);
        }
        let entries: BTreeMap<_, _> = scan_state_vector(&bytes(&session.vector))
            .unwrap()
            .map(|id| (id.client, id.clock))
            .collect();
        assert_eq!(
            entries,
            vector
                .iter()
                .map(|(client, clock)| (client.get(), *clock))
                .collect()
        );
    }
}

/// A frame that got lost on the way: what comes after it from the same client is a gap, until then
/// nothing is.
#[test]
fn an_update_that_lacks_its_predecessor_is_a_gap() {
    let mut gaps = 0;
    for session in sessions() {
        for lost in 0..session.log.len() {
            let mut owner = Owner::default();
            for update in &session.log[..lost] {
                owner.admit(&bytes(update));
            }
            let lost_update = bytes(&session.log[lost]);
            let vector = owner.doc.transact().state_vector();
            let next = session
                .log
                .get(lost + 1)
                .map(|update| bytes(update))
                .unwrap_or_default();
            let Ok(scan) = scan_update(&next) else {
                continue;
            };
            if scan.missing(clocks(&vector)).is_some() {
                gaps += 1;
                owner.admit(&lost_update);
                let vector = owner.doc.transact().state_vector();
                assert_eq!(scan.missing(clocks(&vector)), None);
            }
        }
    }
    assert!(gaps > 100, "{gaps}");
}

#[test]
fn what_was_cut_is_refused() {
    for session in sessions() {
        for update in session.log.iter().chain([&session.state]) {
            let update = bytes(update);
            for end in 0..update.len() {
                let scan = scan_update(&update[..end]);
                assert!(
                    matches!(scan, Err(ScanError::Malformed { .. })),
                    "{update:?} cut at {end}"
                );
            }
        }
    }
}

/// Taking what can be taken, again and again, gets there whatever is lost or out of order.
#[test]
fn the_admissible_part_is_admitted() {
    let (mut gaps, mut skips) = (0, 0);
    for session in sessions() {
        // A client that lacks some updates, so that it has others pending, and sends its all.
        let pending = fresh();
        for update in session
            .log
            .iter()
            .enumerate()
            .filter(|(n, _)| n % 5 != 3)
            .map(|(_, update)| update)
        {
            let mut txn = pending.transact_mut();
            let _ = txn.apply_update(Update::decode_v1(&bytes(update)).unwrap());
        }
        let all = yjs_step_2(&pending);
        let mut owner = Owner::default();
        let scan = scan_update(&all).unwrap();
        gaps += usize::from(scan.missing(clocks(&StateVector::default())).is_some());
        skips += scan.summary().skips;
        let taken = scan.admissible(clocks(&StateVector::default()));
        owner.admit(&taken);
        for update in &session.log {
            owner.admit(&bytes(update));
        }
        assert_content(&owner.doc, &session);
    }
    assert!(gaps > 6 && skips > 6, "{gaps} gaps, {skips} skips");
}

/// A step 2 from before: it starts with what came in the meantime.
#[test]
fn the_whole_completes_any_part() {
    let mut overlaps = 0;
    for session in sessions() {
        let whole = bytes(&session.state);
        let scan = scan_update(&whole).unwrap();
        for part in (0..session.log.len()).step_by(3) {
            let mut owner = Owner::default();
            for update in &session.log[..part] {
                owner.admit(&bytes(update));
            }
            let vector = owner.doc.transact().state_vector();
            overlaps += usize::from(scan.missing(clocks(&vector)).is_some());
            owner.admit(&scan.admissible(clocks(&vector)));
            assert_content(&owner.doc, &session);
        }
    }
    assert!(overlaps > 0, "{overlaps}");
}

/// The structs and deletes of a document, and those that it could not integrate.
fn yjs_step_2(doc: &Doc) -> Vec<u8> {
    doc.transact()
        .encode_state_as_update_v1(&StateVector::default())
}

/// A document that counts text as Yjs does.
fn fresh() -> Doc {
    Doc::with_options(Options {
        offset_kind: OffsetKind::Utf16,
        ..Options::default()
    })
}

fn sessions() -> Vec<Session> {
    serde_json::from_str(include_str!("../testdata/yjs-updates.json"))
        .expect("it is JSON of sessions")
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("two hexadecimal digits");
    (0..hex.len()).step_by(2).map(digits).collect()
}

fn clocks(vector: &StateVector) -> impl Fn(u64) -> u32 {
    |client| vector.get(&ClientID::new(client))
}

/// A document at its owner.
struct Owner {
    doc: Doc,
    places: Places,
}

impl Default for Owner {
    fn default() -> Self {
        Self {
            doc: fresh(),
            places: Places::default(),
        }
    }
}

impl Owner {
    fn admit(&mut self, update: &[u8]) {
        let vector = self.doc.transact().state_vector();
        let scan = scan_update(update).unwrap_or_else(|error| panic!("{error}: {update:?}"));
        assert_eq!(scan.missing(clocks(&vector)), None, "{update:?}");
        assert_eq!(self.places.conflict(&scan), None, "{update:?}");
        assert_eq!(self.places.take(&scan), Ok(()), "{update:?}");
        let mut txn = self.doc.transact_mut();
        txn.apply_update(Update::decode_v1(update).expect("it was scanned"))
            .expect("it was admitted");
        assert!(!txn.has_missing_updates(), "{update:?}");
        for (client, clock) in txn.state_vector().iter() {
            assert_eq!(self.places.next_clock(client.get()), *clock);
        }
        if scan.novelty(clocks(&vector)) == Novelty::Nothing {
            assert!(!txn.has_changes(), "{update:?}");
        }
    }

    /// What another owner loads.
    fn reloaded(&self) -> Self {
        let mut other = Self::default();
        other.admit(
            &self
                .doc
                .transact()
                .encode_state_as_update_v1(&StateVector::default()),
        );
        other
    }
}

fn assert_content(doc: &Doc, session: &Session) {
    let mut txn = doc.transact_mut();
    let text = txn.get_or_insert_text("text");
    let xml = txn.get_or_insert_xml_fragment("xml");
    let map = txn.get_or_insert_map("map");
    let array = txn.get_or_insert_array("array");
    assert_eq!(text.get_string(&txn), session.text);
    assert_eq!(xml.get_string(&txn), session.xml);
    assert_eq!(json(&map.to_json(&txn)), floats(&session.map));
    assert_eq!(json(&array.to_json(&txn)), floats(&session.array));
}

fn json(any: &yrs::Any) -> Value {
    floats(&serde_json::to_value(any).expect("it is JSON"))
}

/// JavaScript has one kind of number.
fn floats(value: &Value) -> Value {
    match value {
        Value::Number(number) => number.as_f64().into(),
        Value::Array(values) => values.iter().map(floats).collect(),
        Value::Object(values) => values
            .iter()
            .map(|(key, value)| (key.clone(), floats(value)))
            .collect(),
        other => other.clone(),
    }
}
