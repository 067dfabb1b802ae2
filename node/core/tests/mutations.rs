//! Mutated updates: what the scanner lets through must not break a document.
//!
//! `COLLAB_MUTATIONS=1000000 cargo test --release -p collab-core --test mutations` looks longer.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use collab_core::scan::{Places, scan_update};
use collab_core::wire::varint::{write_var_bytes, write_var_uint};
use serde::Deserialize;
use yrs::block::ClientID;
use yrs::updates::decoder::Decode;
use yrs::{
    Array, Doc, GetString, Map, OffsetKind, Options, ReadTxn, StateVector, Transact, Update,
};

/// A log that a server had of Yjs clients.
#[derive(Deserialize)]
struct Session {
    log: Vec<String>,
    state: String,
}

/// A document, and an update that it could be sent next.
struct Base {
    state: Vec<u8>,
    vector: StateVector,
    places: Places,
    next: Vec<u8>,
}

impl Base {
    fn new(state: Vec<u8>, next: Vec<u8>) -> Self {
        let vector = Update::decode_v1(&state)
            .expect("it was encoded")
            .state_vector();
        let mut places = Places::default();
        let taken = scan_update(&state).map(|scan| places.take(&scan));
        assert_eq!(taken, Ok(Ok(())), "it was a document");
        Self {
            state,
            vector,
            places,
            next,
        }
    }
}

#[test]
fn no_mutation_that_is_admitted_breaks_a_document() {
    let mutations = mutations_wanted();
    let bases = bases();
    let watch = Watch::start();
    let mut random = Random(0x5EED);
    let mut admitted = 0;
    let mut broken = BTreeMap::<Stage, Vec<String>>::new();
    std::panic::set_hook(Box::new(|_| {}));
    for _ in 0..mutations {
        let base = random.pick(&bases);
        let update = if random.below(4) == 0 {
            random.compose(base)
        } else {
            random.mutate(&base.next, &bases)
        };
        let clock = |client| base.vector.get(&ClientID::new(client));
        let Ok(scan) = scan_update(&update) else {
            continue;
        };
        let update = if scan.missing(clock).is_some() {
            scan.admissible(clock)
        } else {
            update.clone()
        };
        let scan = scan_update(&update).expect("what is admissible is sound");
        assert_eq!(scan.missing(clock), None, "{update:?}");
        if scan.is_empty() || base.places.clone().take(&scan).is_err() {
            continue;
        }
        admitted += 1;
        let case = format!("{update:?} on {:?}", base.state);
        watch.now_at(&case);
        if let Err(stage) = live_with(base, &update) {
            broken.entry(stage).or_default().push(case);
        }
    }
    let _ = std::panic::take_hook();
    eprintln!("{mutations} mutations, {admitted} admitted");
    for (stage, cases) in &broken {
        let shortest = cases.iter().min_by_key(|case| case.len());
        eprintln!(
            "{stage:?} {} times, the shortest: {shortest:?}",
            cases.len()
        );
    }
    assert!(
        admitted > mutations / 50,
        "only {admitted} of {mutations} were admitted"
    );
    assert!(broken.is_empty());
}

/// Where a document broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Applying,
    NotAllIntegrated,
    Encoding,
    ScanningOwnState,
    Reloading,
    ReloadedDiffers,
    Reading,
    GoingOn,
}

/// What an owner does with an update, and later with the document.
fn live_with(base: &Base, update: &[u8]) -> Result<(), Stage> {
    let doc = fresh();
    apply(&doc, &base.state).expect("the state of a session can be applied");
    if at(Stage::Applying, || apply(&doc, update))?.is_err() {
        return Err(Stage::Applying);
    }
    if doc.transact().has_missing_updates() {
        return Err(Stage::NotAllIntegrated);
    }
    let state = at(Stage::Encoding, || {
        doc.transact().encode_state_as_update_v1(&base.vector);
        doc.transact()
            .encode_state_as_update_v1(&StateVector::default())
    })?;
    match scan_update(&state) {
        Ok(own) if own.missing(|_| 0).is_none() && Places::default().take(&own).is_ok() => {}
        _ => return Err(Stage::ScanningOwnState),
    }
    let copy = fresh();
    if at(Stage::Reloading, || apply(&copy, &state))?.is_err() {
        return Err(Stage::Reloading);
    }
    // The order of content may differ, with a right origin that is left of the origin: no client
    // writes that, and no one else's content is lost.
    if doc.transact().state_vector() != copy.transact().state_vector() {
        return Err(Stage::ReloadedDiffers);
    }
    at(Stage::Reading, || {
        read(&doc);
        read(&copy);
    })?;
    at(Stage::GoingOn, || {
        let vector = doc.transact().state_vector();
        let next = scan_update(&base.next).expect("it is not mutated");
        if next
            .missing(|client| vector.get(&ClientID::new(client)))
            .is_none()
        {
            let _ = apply(&doc, &base.next);
        }
        empty(&doc);
        empty(&copy);
        doc.transact()
            .encode_state_as_update_v1(&StateVector::default());
    })
}

fn at<T>(stage: Stage, act: impl FnOnce() -> T) -> Result<T, Stage> {
    catch_unwind(AssertUnwindSafe(act)).map_err(|_| stage)
}

/// A document that counts text as Yjs does.
fn fresh() -> Doc {
    Doc::with_options(Options {
        offset_kind: OffsetKind::Utf16,
        ..Options::default()
    })
}

fn apply(doc: &Doc, update: &[u8]) -> Result<(), String> {
    let update = Update::decode_v1(update).map_err(|error| error.to_string())?;
    doc.transact_mut()
        .apply_update(update)
        .map_err(|error| error.to_string())
}

/// Reads text, as the REST API does. (`yrs` reads an array or XML with an emoji as content without end,
/// so nothing of what clients wrote is read that way.)
fn read(doc: &Doc) {
    for root in roots(doc) {
        let text = doc.get_or_insert_text(root.as_str());
        text.get_string(&doc.transact());
    }
}

fn roots(doc: &Doc) -> BTreeSet<String> {
    doc.transact()
        .root_refs()
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// Deletes whatever is in it. (`yrs` never frees a document that has a subdocument.)
fn empty(doc: &Doc) {
    for root in roots(doc) {
        let (array, map) = (
            doc.get_or_insert_array(root.as_str()),
            doc.get_or_insert_map(root.as_str()),
        );
        let mut txn = doc.transact_mut();
        let len = array.len(&txn);
        array.remove_range(&mut txn, 0, len);
        map.clear(&mut txn);
    }
}

fn bases() -> Vec<Base> {
    let sessions: Vec<Session> = serde_json::from_str(include_str!("../testdata/yjs-updates.json"))
        .expect("it is JSON of sessions");
    let mut bases = Vec::new();
    for session in sessions {
        bases.push(Base::new(vec![0, 0], bytes(&session.state)));
        let doc = fresh();
        for next in session.log.iter().map(|hex| bytes(hex)) {
            let state = doc
                .transact()
                .encode_state_as_update_v1(&StateVector::default());
            apply(&doc, &next).expect("the log of a session can be applied");
            bases.push(Base::new(state, next));
        }
    }
    bases
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("two hexadecimal digits");
    (0..hex.len()).step_by(2).map(digits).collect()
}

#[expect(
    clippy::disallowed_methods,
    reason = "how long to look is no input of the core"
)]
fn mutations_wanted() -> usize {
    std::env::var("COLLAB_MUTATIONS")
        .map_or(10_000, |number| number.parse().expect("it is a number"))
}

/// Xorshift, seeded: a failure comes back.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("smaller than a usize")
    }

    fn pick<'t, T>(&mut self, of: &'t [T]) -> &'t T {
        &of[self.below(of.len())]
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[3]
    }

    /// An update of well-formed structs, with whatever references and content.
    fn compose(&mut self, base: &Base) -> Vec<u8> {
        let mut known: BTreeMap<u64, u32> = base
            .vector
            .iter()
            .map(|(client, clock)| (client.get(), *clock))
            .collect();
        let mut client = 7;
        if self.below(4) > 0 && !known.is_empty() {
            client = self.id(&known).0;
        }
        let start = known.get(&client).copied().unwrap_or_default();
        let structs = 1 + self.below(4);
        let mut update = vec![1];
        write_var_uint(&mut update, structs as u64);
        write_var_uint(&mut update, client);
        write_var_uint(&mut update, start.into());
        for _ in 0..structs {
            let len = self.compose_struct(&known, &mut update);
            *known.entry(client).or_default() += len;
        }
        if self.below(2) == 0 {
            update.push(0);
        } else {
            let (client, start) = self.id(&known);
            update.push(1);
            write_var_uint(&mut update, client);
            update.push(1);
            write_var_uint(&mut update, start.into());
            write_var_uint(
                &mut update,
                1 + self.below((known[&client] - start) as usize) as u64,
            );
        }
        update
    }

    /// Appends a struct and gives its length.
    fn compose_struct(&mut self, known: &BTreeMap<u64, u32>, update: &mut Vec<u8>) -> u32 {
        const CONTENTS: &[(u32, &[u8])] = &[
            (2, &[1, 2]),
            (1, &[3, 1, 9]),
            (1, &[4, 1, b'x']),
            (3, &[4, 3, b'x', b'y', b'z']),
            (2, &[4, 4, 0xF0, 0x9F, 0x98, 0x80]),
            (1, &[5, 2, b'{', b'}']),
            (1, &[6, 1, b'b', 4, b't', b'r', b'u', b'e']),
            (1, &[6, 1, b'b', 4, b'n', b'u', b'l', b'l']),
            (1, &[7, 0]),
            (1, &[7, 1]),
            (1, &[7, 2]),
            (1, &[7, 3, 1, b'p']),
            (1, &[7, 6]),
            (1, &[8, 1, 126]),
            (2, &[8, 2, 125, 1, 120]),
            (1, &[9, 1, b'g', 118, 0]),
        ];
        if self.below(10) == 0 {
            update.extend([0, 1]); // collected
            return 1;
        }
        let (len, content) = *self.pick(CONTENTS);
        let origins = if known.is_empty() {
            0
        } else {
            *self.pick(&[0, 0x80, 0x40, 0xC0])
        };
        let key = *self.pick(&[0, 0x20]);
        update.push(content[0] | origins | key);
        for _ in 0..u8::count_ones(origins) {
            self.compose_id(known, update);
        }
        if origins == 0 {
            if known.is_empty() || self.below(2) == 0 {
                update.push(1);
                write_var_bytes(
                    update,
                    self.pick(&["text", "map", "array", "xml", "new"])
                        .as_bytes(),
                );
            } else {
                update.push(0);
                self.compose_id(known, update);
            }
            if key != 0 {
                write_var_bytes(update, self.pick(&["a", "b", "nested"]).as_bytes());
            }
        }
        update.extend(&content[1..]);
        len
    }

    fn compose_id(&mut self, known: &BTreeMap<u64, u32>, update: &mut Vec<u8>) {
        let (client, clock) = self.id(known);
        write_var_uint(update, client);
        write_var_uint(update, clock.into());
    }

    /// Any known clock, the last of its client more often.
    fn id(&mut self, known: &BTreeMap<u64, u32>) -> (u64, u32) {
        let clients: Vec<_> = known.iter().collect();
        let (client, end) = *self.pick(&clients);
        let any = u32::try_from(self.below(*end as usize)).expect("less than a clock");
        (*client, if self.below(3) == 0 { end - 1 } else { any })
    }

    fn mutate(&mut self, update: &[u8], others: &[Base]) -> Vec<u8> {
        /// Kinds, flags and small numbers.
        const TELLING: &[u8] = &[
            0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0x20, 0x44, 0x84, 0x87, 0x88, 0xA8, 0xC1, 0xC4, 0xC7,
            0xE8, 117, 118, 119, 126,
        ];
        let mut update = update.to_vec();
        for _ in 0..=self.below(3) {
            let place = self.below(update.len());
            match self.below(9) {
                0 => update[place] ^= 1 << self.below(8),
                1 => update[place] = self.byte(),
                2 | 3 => update[place] = *self.pick(TELLING),
                4 => update[place] = update[place].wrapping_add(1),
                5 => update[place] = update[place].wrapping_sub(1),
                6 => update.insert(place, *self.pick(TELLING)),
                7 if update.len() > 1 => {
                    update.remove(place);
                }
                _ => {
                    let from = if self.below(2) == 0 {
                        update.clone()
                    } else {
                        self.pick(others).next.clone()
                    };
                    let start = self.below(from.len());
                    let end = (start + 1 + self.below(12)).min(from.len());
                    let until = if self.below(2) == 0 {
                        place
                    } else {
                        (place + end - start).min(update.len())
                    };
                    update.splice(place..until, from[start..end].iter().copied());
                }
            }
        }
        update
    }
}

/// Ends the process with the case at hand when one takes longer than any should.
struct Watch {
    case: Arc<Mutex<String>>,
    moved: Arc<AtomicBool>,
}

impl Watch {
    fn start() -> Self {
        let watch = Self {
            case: Arc::default(),
            moved: Arc::default(),
        };
        let (case, moved) = (Arc::clone(&watch.case), Arc::clone(&watch.moved));
        std::thread::spawn(move || {
            let tick = std::sync::mpsc::channel::<()>();
            while tick.1.recv_timeout(Duration::from_secs(30)).is_err() {
                if !moved.swap(false, Ordering::Relaxed) {
                    eprintln!("no end of {}", case.lock().expect("nobody panics with it"));
                    process::exit(1);
                }
            }
        });
        watch
    }

    fn now_at(&self, case: &str) {
        case.clone_into(&mut self.case.lock().expect("nobody panics with it"));
        self.moved.store(true, Ordering::Relaxed);
    }
}
