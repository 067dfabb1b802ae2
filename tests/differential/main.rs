//! `yrs` against Yjs: the same histories in both, of every type, and the same documents at their end.
//!
//! The gate for any other version of either. Stock Yjs clients edit, an owner (scanner, causal admission, `yrs`)
//! takes what they send in the order of its log and is loaded anew every few updates; someone edits with
//! `yrs` beside them; the clients go on from that. Then state vector, deletes and content are the same
//! everywhere, and stay so when either reads what the other encoded.
//!
//! `COLLAB_HISTORIES` says how many, `COLLAB_HISTORIES_FROM` the first seed.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a helper of a test fails as the test does, and says how much was compared"
)]

use std::time::Instant;

use collab_core::replica::new_doc;
use collab_core::scan::{Places, scan_update};
use collab_tests::clients::Script;
use serde::Deserialize;
use serde_json::{Value, json};
use yrs::types::text::YChange;
use yrs::types::{Attrs, ToJson};
use yrs::updates::decoder::Decode;
use yrs::{
    Any, Array, ArrayPrelim, ClientID, Doc, GetString, Map, MapPrelim, OffsetKind, Options, Out,
    ReadTxn, StateVector, Text, TextPrelim, Transact, TransactionMut, Update, WriteTxn, Xml,
    XmlElementPrelim, XmlFragment, XmlTextPrelim, any,
};

/// Histories in which everything is compared.
const HISTORIES: u64 = 2_000;
/// Histories with edits between the halves of a character.
const SPLIT_HISTORIES: u64 = 200;
/// Edits of the clients before, and again after, somebody edits with `yrs`.
const EDITS: u64 = 20;

#[tokio::test]
async fn yrs_and_yjs_make_the_same_of_the_same_history() {
    let mut yjs = Yjs::start();
    let begun = Instant::now();
    let (from, count) = (
        number("COLLAB_HISTORIES_FROM", 1),
        number("COLLAB_HISTORIES", HISTORIES),
    );
    let mut updates = 0;
    for seed in from..from + count {
        let played = play(&mut yjs, seed, Splits::Avoided).await;
        updates += played.updates;
        let Played {
            owner, yjs: theirs, ..
        } = played;
        assert!(
            theirs.agreed,
            "seed {seed}: the Yjs clients differ among themselves"
        );
        same(seed, &owner.doc, &theirs.state);
        // Each reads what the other encoded.
        let ours = encode(&owner.doc);
        let reread = yjs.read(&ours).await;
        same(seed, &owner.doc, &reread);
        // And neither takes the other's way to write the same for something else.
        for again in [theirs.state.update(), reread.update(), ours] {
            let scan = scan_update(&again).unwrap();
            assert_eq!(owner.places.conflict(&scan), None, "seed {seed}");
        }
        let mut copy = Owner::default();
        copy.admit(seed, &theirs.state.update());
        same(seed, &copy.doc, &theirs.state);
        let mut copy = Owner::default();
        copy.admit(seed, &reread.update());
        same(seed, &copy.doc, &theirs.state);
    }
    println!(
        "{count} histories, {updates} updates, {:?}",
        begun.elapsed()
    );
}

/// Half a character becomes U+FFFD, and where another one edits at the same moment Yjs itself does not always
/// end with one text. So what is held here is that nobody loses count: the owner takes everything, is
/// loaded anew, and has the same clocks, the same deletes and as many units of text.
#[tokio::test]
async fn a_character_that_is_cut_in_half_costs_that_character_only() {
    let mut yjs = Yjs::start();
    let mut cut = 0;
    for seed in 1..=SPLIT_HISTORIES {
        let Played {
            owner, yjs: theirs, ..
        } = play(&mut yjs, seed, Splits::Sought).await;
        assert_eq!(clocks(&owner.doc), theirs.state.vector, "seed {seed}");
        assert_eq!(
            deletes(&encode(&owner.doc)),
            theirs.state.deletes,
            "seed {seed}"
        );
        let (ours, theirs) = (content(&owner.doc), theirs.state.content);
        assert_eq!(units(&ours).len(), units(&theirs).len(), "seed {seed}");
        cut += u64::from(theirs["text"].to_string().contains('\u{FFFD}'));
    }
    assert!(
        cut > SPLIT_HISTORIES / 20,
        "only {cut} histories cut a character"
    );
}

/// Whether edits of a history fall between the halves of a character.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Splits {
    Avoided,
    Sought,
}

struct Played {
    owner: Owner,
    yjs: End,
    updates: usize,
}

/// One history, to its end.
async fn play(yjs: &mut Yjs, seed: u64, splits: Splits) -> Played {
    let mut random = Random(seed);
    let splits = splits == Splits::Sought;
    let log = yjs
        .ask::<Log>(&json!({ "begin": seed, "edits": EDITS, "splits": splits }))
        .await
        .log;
    let known = random.below(log.len() + 1);
    let others = edits_with_yrs(seed, &mut random, &log[..known]);
    let end: End = yjs.ask(&json!({ "others": others, "edits": EDITS })).await;
    let reload_every = 1 + random.below(8);
    let mut owner = Owner::default();
    let updates: Vec<&String> = log.iter().chain(&others).chain(&end.log).collect();
    for (n, update) in updates.iter().enumerate() {
        owner.admit(seed, &bytes(update));
        if n % reload_every == 0 {
            owner = owner.reloaded(seed);
        }
    }
    let updates = updates.len();
    Played {
        owner,
        yjs: end,
        updates,
    }
}

/// Someone who knows the first part of a log, and what they write, as hex.
fn edits_with_yrs(seed: u64, random: &mut Random, known: &[String]) -> Vec<String> {
    let doc = Doc::with_options(Options {
        client_id: ClientID::new(1 + random.next() % ((1 << 53) - 1)),
        offset_kind: OffsetKind::Utf16,
        ..Options::default()
    });
    for update in known {
        apply(seed, &doc, &bytes(update));
    }
    let edits = random.below(8);
    let edited = (0..edits).map(|_| {
        let mut txn = doc.transact_mut();
        edit(random, &mut txn);
        hex(&txn.encode_update_v1())
    });
    edited.filter(|update| update != "0000").collect()
}

fn edit(random: &mut Random, txn: &mut TransactionMut<'_>) {
    let (text, map) = (txn.get_or_insert_text("text"), txn.get_or_insert_map("map"));
    let (array, xml) = (
        txn.get_or_insert_array("array"),
        txn.get_or_insert_xml_fragment("xml"),
    );
    let not_bold = || Attrs::from([("bold".into(), Any::Null)]);
    let blue = || Attrs::from([("color".into(), Any::from("blue"))]);
    let [from, to] = places(random, &units(&json!({ "text": delta(&text, txn) })));
    let at = |random: &mut Random, len: u32| u32::try_from(random.below(len as usize + 1)).unwrap();
    match random.below(14) {
        0 => text.insert(txn, from, "yrs "),
        1 => text.insert(txn, from, "ä日😀"),
        2 => text.insert_with_attributes(txn, from, "blue", blue()),
        3 if from < to => text.format(txn, from, to - from, blue()),
        4 if from < to => text.format(txn, from, to - from, not_bold()),
        5 if from < to => text.remove_range(txn, from, to - from),
        6 => drop(text.insert_embed(txn, from, any!({ "image": [1, 2.5, null, "x"] }))),
        7 => {
            let place = at(random, array.len(txn));
            array.insert_range(txn, place, [Any::Null, Any::from(1.5), Any::from("two")]);
        }
        8 if 0 < array.len(txn) => {
            let place = random.below(array.len(txn) as usize);
            array.remove_range(txn, u32::try_from(place).unwrap(), 1);
        }
        9 => {
            let nested = array.push_back(txn, MapPrelim::default());
            nested.insert(txn, "deeper", ArrayPrelim::from([1, 2, 3]));
        }
        10 => {
            map.insert(txn, "a", any!({ "a": [true, { "b": (-1) }] }));
            map.insert(txn, "nested", TextPrelim::new("nested"));
        }
        11 => drop(map.remove(txn, "a")),
        12 => {
            let place = at(random, xml.len(txn));
            let paragraph = xml.insert(txn, place, XmlElementPrelim::empty("p"));
            paragraph.insert_attribute(txn, "id", "1");
            paragraph.push_back(txn, XmlTextPrelim::new("in XML"));
        }
        13 if 0 < xml.len(txn) => xml.remove_range(txn, 0, 1),
        _ => {}
    }
}

/// Two places between characters, in order.
fn places(random: &mut Random, units: &[u16]) -> [u32; 2] {
    let mut place = || {
        let at = random.below(units.len() + 1);
        let inside = units
            .get(at)
            .is_some_and(|unit| (0xDC00..0xE000).contains(unit));
        u32::try_from(at - usize::from(inside)).unwrap()
    };
    let mut places = [place(), place()];
    places.sort_unstable();
    places
}

fn same(seed: u64, ours: &Doc, theirs: &State) {
    assert_eq!(clocks(ours), theirs.vector, "state vector, seed {seed}");
    assert_eq!(
        deletes(&encode(ours)),
        theirs.deletes,
        "deletes, seed {seed}"
    );
    let (ours, theirs) = (content(ours), &theirs.content);
    for part in ["text", "map", "array", "xml"] {
        assert_eq!(
            floats(&ours[part]),
            normal(part, &theirs[part]),
            "{part}, seed {seed}"
        );
    }
}

/// A document at its owner.
struct Owner {
    doc: Doc,
    places: Places,
}

impl Default for Owner {
    fn default() -> Self {
        Self {
            doc: new_doc(),
            places: Places::default(),
        }
    }
}

impl Owner {
    fn admit(&mut self, seed: u64, update: &[u8]) {
        let scan = scan_update(update);
        let scan = scan.unwrap_or_else(|error| panic!("seed {seed}: {error}: {}", hex(update)));
        let conflict = self.places.conflict(&scan);
        assert_eq!(conflict, None, "seed {seed}: {}", hex(update));
        let missing = scan.missing(|client| self.places.next_clock(client));
        assert_eq!(missing, None, "seed {seed}: {}", hex(update));
        assert_eq!(
            self.places.take(&scan),
            Ok(()),
            "seed {seed}: {}",
            hex(update)
        );
        apply(seed, &self.doc, update);
    }

    /// What another owner loads.
    fn reloaded(&self, seed: u64) -> Self {
        let mut other = Self::default();
        other.admit(seed, &encode(&self.doc));
        other
    }
}

fn apply(seed: u64, doc: &Doc, update: &[u8]) {
    let decoded = Update::decode_v1(update).unwrap();
    let mut txn = doc.transact_mut();
    txn.apply_update(decoded).unwrap();
    assert!(!txn.has_missing_updates(), "seed {seed}: {}", hex(update));
}

fn encode(doc: &Doc) -> Vec<u8> {
    doc.transact()
        .encode_state_as_update_v1(&StateVector::default())
}

fn clocks(doc: &Doc) -> Vec<(u64, u32)> {
    let vector = doc.transact().state_vector();
    let mut clocks: Vec<_> = vector
        .iter()
        .map(|(client, clock)| (client.get(), *clock))
        .collect();
    clocks.sort_unstable();
    clocks
}

/// The deletes at the end of an update: of each client start and length of its ranges.
type Deletes = Vec<(u64, Vec<(u32, u32)>)>;

fn deletes(update: &[u8]) -> Deletes {
    let update = Update::decode_v1(update).unwrap();
    let ranges = update.delete_set().iter();
    let mut deletes: Deletes = ranges
        .map(|(client, ranges)| {
            let mut ranges: Vec<_> = ranges
                .iter()
                .map(|range| (range.start, range.end - range.start))
                .collect();
            ranges.sort_unstable();
            (client.get(), ranges)
        })
        .collect();
    deletes.sort_unstable();
    deletes
}

fn content(doc: &Doc) -> Value {
    let mut txn = doc.transact_mut();
    let (text, map) = (txn.get_or_insert_text("text"), txn.get_or_insert_map("map"));
    let (array, xml) = (
        txn.get_or_insert_array("array"),
        txn.get_or_insert_xml_fragment("xml"),
    );
    json!({
        "text": delta(&text, &txn),
        "map": map.to_json(&txn),
        "array": array.to_json(&txn),
        "xml": xml.get_string(&txn),
    })
}

/// As Quill and Yjs write formatted text.
fn delta(text: &yrs::TextRef, txn: &impl ReadTxn) -> Value {
    let parts = text.diff(txn, YChange::identity).into_iter().map(|part| {
        let insert = match part.insert {
            Out::Any(any) => serde_json::to_value(any).unwrap(),
            other => panic!("not in a history: {other:?}"),
        };
        let attributes = part.attributes.map(|attributes| json!(*attributes));
        json!({ "insert": insert, "attributes": attributes.unwrap_or_default() })
    });
    normal("text", &Value::Array(parts.collect()))
}

/// One way to write what may be written in several: formatted text in as few parts as it has formats.
fn normal(part: &str, value: &Value) -> Value {
    if part != "text" {
        return floats(value);
    }
    let mut parts: Vec<(Value, Value)> = Vec::new();
    for part in value.as_array().unwrap() {
        let attributes = match &part["attributes"] {
            Value::Object(attributes) if !attributes.is_empty() => floats(&part["attributes"]),
            _ => Value::Null,
        };
        match (parts.last_mut(), &part["insert"]) {
            (Some((Value::String(last), same)), Value::String(more)) if *same == attributes => {
                last.push_str(more);
            }
            (_, insert) => parts.push((floats(insert), attributes)),
        }
    }
    json!(parts)
}

/// The UTF-16 units of the text in a content; an embed is one.
fn units(content: &Value) -> Vec<u16> {
    let parts = content["text"].as_array().unwrap().iter();
    let inserts = parts.map(|part| part.get("insert").unwrap_or(&part[0]));
    inserts
        .flat_map(|insert| insert.as_str().unwrap_or(".").encode_utf16())
        .collect()
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

/// The process that plays the Yjs side.
struct Yjs(Script);

#[derive(Deserialize)]
struct Log {
    log: Vec<String>,
}

/// How a history ended for its Yjs clients.
#[derive(Deserialize)]
struct End {
    log: Vec<String>,
    agreed: bool,
    #[serde(flatten)]
    state: State,
}

/// A document as Yjs has it.
#[derive(Deserialize)]
struct State {
    update: String,
    vector: Vec<(u64, u32)>,
    deletes: Deletes,
    content: Value,
}

impl State {
    fn update(&self) -> Vec<u8> {
        bytes(&self.update)
    }
}

impl Yjs {
    fn start() -> Self {
        Self(Script::start("histories", &json!({})).unwrap())
    }

    async fn ask<T: serde::de::DeserializeOwned>(&mut self, question: &Value) -> T {
        self.0.tell(question).await.unwrap();
        self.0
            .next()
            .await
            .unwrap()
            .expect("it runs until it is dropped")
    }

    async fn read(&mut self, update: &[u8]) -> State {
        self.ask(&json!({ "read": hex(update) })).await
    }
}

/// Xorshift: a seed gives the same edits everywhere and always.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from((self.next() >> 11) % end as u64).unwrap()
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |number| number.parse().expect("a number"))
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("two hexadecimal digits");
    (0..hex.len()).step_by(2).map(digits).collect()
}
