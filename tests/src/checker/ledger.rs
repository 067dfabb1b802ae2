//! The first witness: what each client did and was told, in the order and at the times that it says.

use super::content::{self, Content, Verdict};
use super::replica::Replica;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// What an edit did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Wrote its token.
    Insert,
    /// Took out a token, its writer's own or another's.
    Delete,
}

/// One edit of a client. Its version is its place among the client's edits, from 1.
#[derive(Debug, Clone)]
pub struct Edit {
    /// What it did.
    pub op: Op,
    /// Unique in its document.
    pub token: String,
    /// When it was made, in ms since 1970, by a clock that does not go back.
    pub made_ms: f64,
    /// When it was first put on an open socket by itself; edits made offline go with what follows a reconnect.
    pub sent_ms: Option<f64>,
    /// When its first receipt came, of whatever kind.
    pub acked_ms: Option<f64>,
    /// That was the return of its bytes.
    pub echoed: bool,
}

/// One client of one document.
#[derive(Debug, Clone, Default)]
pub struct Writer {
    /// The node that it is connected to.
    pub node: String,
    /// Its edits, in order.
    pub edits: Vec<Edit>,
    /// When receipts came, in ms since 1970.
    pub acks_ms: Vec<f64>,
    /// When its connection was closed, in ms since 1970, and with which code, if by the server. Without those that it closed.
    pub closes: Vec<(f64, Option<u16>)>,
    /// What its client said of its connection, and when, in ms since 1970.
    pub statuses: Vec<(f64, String)>,
    /// How often it went offline by itself.
    pub spells: usize,
    /// When an edit of somebody else came, and the hash of its bytes.
    pub received: Vec<(f64, u32)>,
    /// Hashes of its own edits' bytes, with the time they were made.
    pub hashes: HashMap<u32, f64>,
    /// What it holds at the end.
    pub replica: Option<Replica>,
    /// What the server refused with.
    pub denied: Vec<String>,
}

/// All that clients did and were told, by document and number of the writer.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    /// The writers.
    pub writers: BTreeMap<(String, usize), Writer>,
}

/// The longest time that a writer went without a receipt.
#[derive(Debug, Clone, PartialEq)]
pub struct Silence {
    /// The document.
    pub document: String,
    /// The writer's number.
    pub writer: usize,
    /// The node that the writer is connected to.
    pub node: String,
    /// How long.
    pub longest: Duration,
}

impl Ledger {
    /// Number of acknowledged edits.
    pub fn acked(&self) -> usize {
        self.edits().filter(|edit| edit.acked_ms.is_some()).count()
    }

    /// All edits of all writers.
    pub fn edits(&self) -> impl Iterator<Item = &Edit> {
        self.writers.values().flat_map(|writer| &writer.edits)
    }

    /// The writers of a document.
    pub fn of(&self, document: &str) -> impl Iterator<Item = &Writer> {
        self.writers
            .iter()
            .filter(move |((name, _), _)| name == document)
            .map(|(_, writer)| writer)
    }

    /// A writer, made if it is not known yet.
    pub fn writer(&mut self, document: &str, number: usize) -> &mut Writer {
        self.writers
            .entry((document.to_owned(), number))
            .or_default()
    }

    /// Acknowledged edits per second in a span of time (ms since 1970).
    pub fn acked_per_second(&self, from_ms: f64, until_ms: f64) -> f64 {
        let within = self
            .edits()
            .filter(|edit| {
                edit.acked_ms
                    .is_some_and(|at| from_ms <= at && at < until_ms)
            })
            .count();
        let within = u32::try_from(within).unwrap_or(u32::MAX);
        f64::from(within) * 1000.0 / (until_ms - from_ms)
    }

    /// From an edit to its receipt, of the edits made in a span of time by those who do not go offline by themselves, sorted.
    pub fn latencies_in(&self, from_ms: f64, until_ms: f64) -> Vec<Duration> {
        let online = self.writers.values().filter(|writer| writer.spells == 0);
        let mut latencies: Vec<Duration> = online
            .flat_map(|writer| &writer.edits)
            .filter(|edit| from_ms <= edit.made_ms && edit.made_ms < until_ms)
            .filter_map(|edit| Some(millis(edit.acked_ms? - edit.made_ms)))
            .collect();
        latencies.sort_unstable();
        latencies
    }

    /// As [`Ledger::latencies_in`], of all times.
    pub fn latencies(&self) -> Vec<Duration> {
        self.latencies_in(f64::NEG_INFINITY, f64::INFINITY)
    }

    /// From a moment to the first receipt of an edit made after it, by document, of the writers that `which` chooses;
    /// `None` where none came.
    pub fn next_ack(
        &self,
        after_ms: f64,
        which: impl Fn(&str, &Writer) -> bool,
    ) -> BTreeMap<&str, Option<Duration>> {
        let mut next = BTreeMap::<&str, Option<Duration>>::new();
        for ((document, _), writer) in &self.writers {
            if !which(document, writer) {
                continue;
            }
            let first = writer
                .edits
                .iter()
                .filter(|edit| after_ms <= edit.made_ms)
                .filter_map(|edit| Some(millis(edit.acked_ms? - after_ms)))
                .min();
            let known = next.entry(document).or_default();
            *known = (*known).into_iter().chain(first).min();
        }
        next
    }

    /// From an edit to its arrival at somebody else, of the edits made in a span of time, sorted.
    pub fn fan_outs(&self, from_ms: f64, until_ms: f64) -> Vec<Duration> {
        let mut made = HashMap::new();
        for ((document, _), writer) in &self.writers {
            made.extend(
                writer
                    .hashes
                    .iter()
                    .map(|(hash, at)| ((document.as_str(), *hash), *at)),
            );
        }
        let mut delays: Vec<Duration> = self
            .writers
            .iter()
            .flat_map(|((document, _), writer)| {
                let made = &made;
                writer.received.iter().filter_map(move |(at, hash)| {
                    let made = *made.get(&(document.as_str(), *hash))?;
                    (from_ms <= made && made < until_ms).then(|| millis(at - made))
                })
            })
            .collect();
        delays.sort_unstable();
        delays
    }

    /// Compares the content of a replica of `document` with what its writers were promised.
    pub fn judge(&self, document: &str, content: &Content) -> Verdict {
        content::judge(self, document, content)
    }

    /// What the clients hold at the end.
    pub fn replicas(&self) -> impl Iterator<Item = &Replica> {
        self.writers
            .values()
            .filter_map(|writer| writer.replica.as_ref())
    }

    /// The longest time between two receipts of each writer that overlaps the given span (ms since
    /// 1970), the longest of all first. A writer's pause between edits is part of it.
    pub fn silences(&self, from_ms: f64, until_ms: f64) -> Vec<Silence> {
        let mut silences: Vec<Silence> = self
            .writers
            .iter()
            .map(|((document, number), writer)| Silence {
                document: document.clone(),
                writer: *number,
                node: writer.node.clone(),
                longest: writer.silence(from_ms, until_ms),
            })
            .collect();
        silences.sort_by_key(|silence| std::cmp::Reverse(silence.longest));
        silences
    }

    /// The longest time that a document went without a receipt to any of its writers, within the given span (ms
    /// since 1970). The writers' own pauses between edits are part of it.
    pub fn pause(&self, document: &str, from_ms: f64, until_ms: f64) -> Duration {
        let mut times: Vec<f64> = self
            .of(document)
            .flat_map(|writer| writer.acks_ms.iter().copied())
            .filter(|&at| from_ms <= at && at <= until_ms)
            .chain([from_ms, until_ms])
            .collect();
        times.sort_by(f64::total_cmp);
        let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
        millis(gaps.fold(0.0, f64::max))
    }

    /// The longest time that an edit of a document, made within the given span (ms since 1970), waited for its receipt.
    pub fn longest_wait(&self, document: &str, from_ms: f64, until_ms: f64) -> Duration {
        let edits = self.of(document).flat_map(|writer| &writer.edits);
        let waits = edits
            .filter(|edit| from_ms <= edit.made_ms && edit.made_ms <= until_ms)
            .map(|edit| edit.acked_ms.map_or(f64::MAX, |acked| acked - edit.made_ms));
        millis(waits.fold(0.0, f64::max).min(1e9))
    }

    /// What clients said of their connections within the given span (ms since 1970).
    pub fn statuses(&self, from_ms: f64, until_ms: f64) -> Vec<&str> {
        let all = self.writers.values().flat_map(|writer| &writer.statuses);
        all.filter(|(at, _)| from_ms <= *at && *at <= until_ms)
            .map(|(_, status)| status.as_str())
            .collect()
    }

    /// Takes down what a client says.
    ///
    /// # Panics
    /// When the client contradicts itself: its versions do not count its edits, or a receipt is for an edit not made.
    pub fn enter(&mut self, event: Event) {
        let Event {
            t,
            document,
            writer,
            node,
            what,
        } = event;
        let name = format!("writer {writer} at {node}");
        let writer = self.writers.entry((document.clone(), writer)).or_default();
        writer.node = node;
        match what {
            What::Edit { op, token, version } => {
                writer.edits.push(Edit {
                    op,
                    token,
                    made_ms: t,
                    sent_ms: None,
                    acked_ms: None,
                    echoed: false,
                });
                assert_eq!(writer.edits.len(), version, "versions count the edits");
            }
            What::Sent { version, hash } => {
                writer.edits[version - 1].sent_ms = Some(t);
                writer.hashes.insert(hash, t);
            }
            What::Echo { version } => {
                let edit = &mut writer.edits[version - 1];
                edit.echoed |= edit.acked_ms.is_none();
                edit.acked_ms.get_or_insert(t);
            }
            What::Ack { version } => {
                writer.acks_ms.push(t);
                // Echoes leave gaps of their own, so the first acknowledged one does not end the search.
                for edit in &mut writer.edits[..version] {
                    edit.acked_ms.get_or_insert(t);
                }
            }
            What::Recv { hash } => writer.received.push((t, hash)),
            What::Close { code } => writer.closes.push((t, code)),
            What::Offline => writer.spells += 1,
            What::Denied { reason } => writer.denied.push(reason),
            What::Final { replica } => {
                writer.replica = Some(Replica {
                    witness: name,
                    document,
                    ..replica
                });
            }
            What::Status { status } => writer.statuses.push((t, status)),
        }
    }
}

impl Writer {
    /// The longest time between two receipts that overlaps the given span.
    pub fn silence(&self, from_ms: f64, until_ms: f64) -> Duration {
        let acks = || self.acks_ms.iter().copied();
        let before = acks().rfind(|&at| at <= from_ms).unwrap_or(from_ms);
        let after = acks().find(|&at| until_ms <= at).unwrap_or(until_ms);
        let within = acks().filter(|&at| from_ms < at && at < until_ms);
        let times: Vec<f64> = std::iter::once(before)
            .chain(within)
            .chain([after])
            .collect();
        let longest = times.windows(2).map(|pair| pair[1] - pair[0]);
        millis(longest.fold(0.0, f64::max))
    }
}

/// One line of a client's history.
#[derive(Debug, Deserialize)]
pub struct Event {
    t: f64,
    document: String,
    writer: usize,
    node: String,
    #[serde(flatten)]
    what: What,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum What {
    /// It is about to edit.
    Edit {
        op: Op,
        token: String,
        version: usize,
    },
    /// The edit's bytes are on a socket.
    Sent {
        version: usize,
        hash: u32,
    },
    /// The edit's bytes came back, which is a receipt.
    Echo {
        version: usize,
    },
    /// All edits up to this one are durable.
    Ack {
        version: usize,
    },
    /// An edit of somebody else came.
    Recv {
        hash: u32,
    },
    /// The connection is closed, by the server or the network.
    Close {
        code: Option<u16>,
    },
    /// The client goes offline by itself for a while.
    Offline,
    Denied {
        reason: String,
    },
    /// What it holds at the end.
    Final {
        #[serde(flatten)]
        replica: Replica,
    },
    Status {
        status: String,
    },
}

fn millis(ms: f64) -> Duration {
    Duration::from_secs_f64(ms.max(0.0) / 1000.0)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    #[test]
    fn a_silence_spans_the_fault() {
        let mut ledger = Ledger::default();
        ledger.writer("d", 0).acks_ms = vec![100.0, 200.0, 1900.0, 2000.0];
        let longest = |from, until| ledger.silences(from, until)[0].longest;
        assert_eq!(longest(250.0, 2500.0), Duration::from_millis(1700));
        assert_eq!(longest(110.0, 150.0), Duration::from_millis(100));
        assert_eq!(longest(1950.0, 3000.0), Duration::from_secs(1));
    }

    #[test]
    fn a_pause_is_that_of_the_document_and_not_of_one_writer() {
        let mut ledger = Ledger::default();
        for (number, acks_ms) in [vec![100.0, 500.0], vec![300.0, 900.0]]
            .into_iter()
            .enumerate()
        {
            let writer = ledger.writer("d", number);
            writer.acks_ms = acks_ms;
            writer.statuses = vec![(200.0, "disconnected".to_owned())];
        }
        let pause = |from, until| ledger.pause("d", from, until);
        assert_eq!(pause(100.0, 550.0), Duration::from_millis(200));
        assert_eq!(pause(500.0, 900.0), Duration::from_millis(400));
        assert_eq!(ledger.statuses(0.0, 250.0).len(), 2);
        assert!(ledger.statuses(250.0, 900.0).is_empty());
    }

    #[test]
    fn an_echo_is_a_receipt_for_its_own_edit_only() {
        let ledger = ledger(&[
            r#""kind":"edit","op":"insert","token":"a;","version":1"#,
            r#""kind":"edit","op":"insert","token":"b;","version":2"#,
            r#""kind":"edit","op":"insert","token":"c;","version":3"#,
            r#""kind":"echo","version":2"#,
            r#""kind":"ack","version":2"#,
        ]);
        let acked: Vec<_> = ledger.edits().map(|edit| edit.acked_ms).collect();
        assert_eq!(acked, [Some(4.0), Some(3.0), None]);
        assert!(ledger.judge("d", &Content::of_text("a;")).lost == ["b;"]);
    }

    #[test]
    fn the_next_ack_is_of_an_edit_made_after_the_fault() {
        let ledger = ledger(&[
            r#""kind":"edit","op":"insert","token":"a;","version":1"#,
            r#""kind":"ack","version":1"#,
            r#""kind":"edit","op":"insert","token":"b;","version":2"#,
            r#""kind":"ack","version":2"#,
        ]);
        let next = |after| ledger.next_ack(after, |_, _| true)["d"];
        assert_eq!(next(0.5), Some(Duration::from_micros(2500)));
        assert_eq!(next(2.5), None);
    }

    #[test]
    fn the_rate_counts_receipts_within_the_span() {
        let ledger = ledger(&[
            r#""kind":"edit","op":"insert","token":"a;","version":1"#,
            r#""kind":"ack","version":1"#,
        ]);
        assert!((ledger.acked_per_second(0.0, 10.0) - 100.0).abs() < 1e-9);
        assert!(ledger.acked_per_second(2.0, 10.0) < 1e-9);
    }

    /// Events of writer 0 of document d, one per millisecond.
    pub(in super::super) fn ledger(events: &[&str]) -> Ledger {
        let mut ledger = Ledger::default();
        for (t, event) in events.iter().enumerate() {
            let event = format!(r#"{{"t":{t},"document":"d","writer":0,"node":"n",{event}}}"#);
            ledger.enter(serde_json::from_str(&event).unwrap());
        }
        ledger
    }
}
