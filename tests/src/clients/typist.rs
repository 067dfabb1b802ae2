//! Typists and the ledger of what they were promised: every edit, when it was made, when it was
//! acknowledged. The ledger judges any text of a document, wherever that text came from.

use super::{Follower, Script};
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// Who types what, where and how fast.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Typing {
    /// `http://…` addresses; writer w of document d is at number d + w, in turn, and stays there.
    pub nodes: Vec<String>,
    /// Names of documents.
    pub documents: Vec<String>,
    /// Writers of each document.
    pub writers: usize,
    /// Edits per second and writer.
    pub rate: f64,
    /// Decides places, deletions and pauses.
    pub seed: u64,
    /// Token of the clients, if the nodes want one.
    pub token: Option<String>,
    /// After the stop, how long to wait for receipts and for writers to agree.
    pub settle_ms: u64,
}

impl Typing {
    /// Two writers per document, five edits per second each.
    pub fn new(nodes: Vec<String>, documents: Vec<String>, seed: u64) -> Self {
        Self {
            nodes,
            documents,
            writers: 2,
            rate: 5.0,
            seed,
            token: None,
            settle_ms: 30_000,
        }
    }

    /// Starts the typists; stop the follower to get the whole ledger.
    ///
    /// # Errors
    /// When Node or the scripts' packages are not installed.
    pub fn start(&self) -> Result<Follower<Ledger>> {
        Ok(Script::start("typist", self)?.follow(Ledger::default(), Ledger::enter))
    }
}

/// What an edit did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Wrote its token.
    Insert,
    /// Took out the token that the same writer had written.
    Delete,
}

/// One edit of a typist. Its version is its place among the writer's edits, from 1.
#[derive(Debug, Clone)]
pub struct Edit {
    /// What it did.
    pub op: Op,
    /// Unique in its document.
    pub token: String,
    /// When it was made, in ms since 1970.
    pub made_ms: f64,
    /// When its receipt came.
    pub acked_ms: Option<f64>,
}

/// One writer of one document.
#[derive(Debug, Clone, Default)]
pub struct Writer {
    /// The node that it is connected to.
    pub node: String,
    /// Its edits, in order.
    pub edits: Vec<Edit>,
    /// When receipts came, in ms since 1970.
    pub acks_ms: Vec<f64>,
    /// When its connection was closed, in ms since 1970, and with which code, if by the server.
    pub closes: Vec<(f64, Option<u16>)>,
    /// What its client said of its connection, and when, in ms since 1970.
    pub statuses: Vec<(f64, String)>,
    /// Its text at the end.
    pub text: Option<String>,
    /// What the server refused with.
    pub denied: Vec<String>,
}

/// All that typists did and were told, by document and number of the writer.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    /// The writers.
    pub writers: BTreeMap<(String, usize), Writer>,
}

/// How a text compares with a ledger.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Acknowledged edits of the document.
    pub acked: usize,
    /// Edits without a receipt, which may be there or not.
    pub unacked: usize,
    /// Acknowledged insertions that are not in the text, and were not deleted.
    pub lost: Vec<String>,
    /// Tokens that are there more than once.
    pub doubled: Vec<String>,
    /// Tokens that are there although their deletion was acknowledged.
    pub revived: Vec<String>,
    /// Pieces of text that nobody typed.
    pub strange: Vec<String>,
}

impl Verdict {
    /// Fails unless every acknowledged edit is in the text exactly once and nothing else is.
    ///
    /// # Errors
    /// With the verdict, else.
    pub fn clean(&self) -> Result<()> {
        let clean = [&self.lost, &self.doubled, &self.revived, &self.strange]
            .iter()
            .all(|list| list.is_empty());
        ensure!(clean, "{self:?}");
        Ok(())
    }
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

    /// From an edit to its receipt, sorted.
    pub fn latencies(&self) -> Vec<Duration> {
        let mut latencies: Vec<Duration> = self
            .edits()
            .filter_map(|edit| Some(millis(edit.acked_ms? - edit.made_ms)))
            .collect();
        latencies.sort_unstable();
        latencies
    }

    /// Compares a text of `document` with what its writers were promised.
    pub fn judge(&self, document: &str, text: &str) -> Verdict {
        let mut found: HashMap<&str, usize> = HashMap::new();
        for token in text.split_inclusive(';') {
            *found.entry(token).or_default() += 1;
        }
        let mut verdict = Verdict::default();
        for writer in self.of(document) {
            let mut tokens: BTreeMap<&str, (Option<f64>, Option<&Edit>)> = BTreeMap::new();
            for edit in &writer.edits {
                match edit.acked_ms {
                    Some(_) => verdict.acked += 1,
                    None => verdict.unacked += 1,
                }
                match edit.op {
                    Op::Insert => _ = tokens.insert(&edit.token, (edit.acked_ms, None)),
                    Op::Delete => tokens.entry(&edit.token).or_default().1 = Some(edit),
                }
            }
            for (token, (inserted, deletion)) in tokens {
                let count = found.remove(token).unwrap_or(0);
                let deleted = deletion.is_some_and(|edit| edit.acked_ms.is_some());
                let list = match count {
                    0 if inserted.is_some() && deletion.is_none() => &mut verdict.lost,
                    0 => continue,
                    1 if deleted => &mut verdict.revived,
                    1 => continue,
                    _ => &mut verdict.doubled,
                };
                list.push(token.to_owned());
            }
        }
        verdict.strange = found.into_keys().map(str::to_owned).collect();
        verdict.strange.sort_unstable();
        verdict
    }

    /// Texts at the end by document, when the writers of each agree.
    ///
    /// # Errors
    /// When two writers of a document differ, or one has not said its text.
    pub fn texts(&self) -> Result<BTreeMap<&str, &str>> {
        let mut texts = BTreeMap::new();
        for ((document, number), writer) in &self.writers {
            let Some(text) = writer.text.as_deref() else {
                anyhow::bail!("writer {number} of {document} did not say its text");
            };
            let first = *texts.entry(document.as_str()).or_insert(text);
            ensure!(
                first == text,
                "the writers of {document} differ:\n{first}\n{text}"
            );
        }
        Ok(texts)
    }

    /// The longest time between two receipts of each writer that overlaps the given span (ms since
    /// 1970), the longest of all first. A writer's pause between edits is part of it.
    pub fn silences(&self, from_ms: f64, until_ms: f64) -> Vec<Silence> {
        let mut silences: Vec<Silence> = self
            .writers
            .iter()
            .map(|((document, number), writer)| {
                let before = writer
                    .acks_ms
                    .iter()
                    .copied()
                    .rfind(|&at| at <= from_ms)
                    .unwrap_or(from_ms);
                let after = writer
                    .acks_ms
                    .iter()
                    .copied()
                    .find(|&at| until_ms <= at)
                    .unwrap_or(until_ms);
                let within = writer
                    .acks_ms
                    .iter()
                    .copied()
                    .filter(|&at| from_ms < at && at < until_ms);
                let times: Vec<f64> = std::iter::once(before)
                    .chain(within)
                    .chain([after])
                    .collect();
                let longest = times
                    .windows(2)
                    .map(|pair| pair[1] - pair[0])
                    .fold(0.0, f64::max);
                Silence {
                    document: document.clone(),
                    writer: *number,
                    node: writer.node.clone(),
                    longest: millis(longest),
                }
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

    /// What clients said of their connections within the given span (ms since 1970).
    pub fn statuses(&self, from_ms: f64, until_ms: f64) -> Vec<&str> {
        let all = self.writers.values().flat_map(|writer| &writer.statuses);
        all.filter(|(at, _)| from_ms <= *at && *at <= until_ms)
            .map(|(_, status)| status.as_str())
            .collect()
    }

    fn of(&self, document: &str) -> impl Iterator<Item = &Writer> {
        self.writers
            .iter()
            .filter(move |((name, _), _)| name == document)
            .map(|(_, writer)| writer)
    }

    fn enter(&mut self, event: Event) {
        let Event {
            t,
            document,
            writer,
            node,
            what,
        } = event;
        let writer = self.writers.entry((document, writer)).or_default();
        writer.node = node;
        match what {
            What::Edit { op, token, version } => {
                writer.edits.push(Edit {
                    op,
                    token,
                    made_ms: t,
                    acked_ms: None,
                });
                assert_eq!(writer.edits.len(), version, "versions count the edits");
            }
            What::Ack { version } => {
                writer.acks_ms.push(t);
                let open = writer.edits[..version]
                    .iter_mut()
                    .rev()
                    .take_while(|edit| edit.acked_ms.is_none());
                open.for_each(|edit| edit.acked_ms = Some(t));
            }
            What::Close { code } => writer.closes.push((t, code)),
            What::Denied { reason } => writer.denied.push(reason),
            What::Final { text } => writer.text = Some(text),
            What::Status { status } => writer.statuses.push((t, status)),
        }
    }
}

#[derive(Debug, Deserialize)]
struct Event {
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
    Edit {
        op: Op,
        token: String,
        version: usize,
    },
    Ack {
        version: usize,
    },
    Close {
        code: Option<u16>,
    },
    Denied {
        reason: String,
    },
    Final {
        text: String,
    },
    Status {
        status: String,
    },
}

fn millis(ms: f64) -> Duration {
    Duration::from_secs_f64(ms.max(0.0) / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledged_edit_must_be_there_exactly_once() {
        let ledger = ledger(&[
            r#""kind":"edit","op":"insert","token":"w0n0;","version":1"#,
            r#""kind":"edit","op":"insert","token":"w0n1é;","version":2"#,
            r#""kind":"ack","version":2"#,
            r#""kind":"edit","op":"insert","token":"w0n2\n;","version":3"#,
        ]);
        let clean = Verdict {
            acked: 2,
            unacked: 1,
            ..Verdict::default()
        };
        assert_eq!(ledger.judge("d", "w0n1é;w0n0;"), clean);
        assert_eq!(ledger.judge("d", "w0n1é;w0n2\n;w0n0;"), clean);
        assert!(clean.clean().is_ok());
        assert_eq!(ledger.judge("d", "w0n1é;").lost, ["w0n0;"]);
        assert_eq!(ledger.judge("d", "w0n1é;w0n0;w0n1é;").doubled, ["w0n1é;"]);
        assert_eq!(
            ledger.judge("d", "w0n1é;w0w0n0;n5;").strange,
            ["n5;", "w0w0n0;"]
        );
        assert!(ledger.judge("d", "").clean().is_err());
    }

    #[test]
    fn an_acknowledged_deletion_must_not_come_back() {
        let events = [
            r#""kind":"edit","op":"insert","token":"a;","version":1"#,
            r#""kind":"ack","version":1"#,
            r#""kind":"edit","op":"delete","token":"a;","version":2"#,
            r#""kind":"ack","version":2"#,
        ];
        let pending = ledger(&events[..3]);
        assert!(pending.judge("d", "a;").clean().is_ok() && pending.judge("d", "").clean().is_ok());
        let done = ledger(&events);
        assert!(done.judge("d", "").clean().is_ok());
        assert_eq!(done.judge("d", "a;").revived, ["a;"]);
    }

    #[test]
    fn a_silence_spans_the_fault() {
        let mut ledger = Ledger::default();
        let acks_ms = vec![100.0, 200.0, 1900.0, 2000.0];
        ledger.writers.insert(
            ("d".into(), 0),
            Writer {
                acks_ms,
                ..Writer::default()
            },
        );
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
            let statuses = vec![(200.0, "disconnected".to_owned())];
            let writer = Writer {
                acks_ms,
                statuses,
                ..Writer::default()
            };
            ledger.writers.insert(("d".into(), number), writer);
        }
        let pause = |from, until| ledger.pause("d", from, until);
        assert_eq!(pause(100.0, 550.0), Duration::from_millis(200));
        assert_eq!(pause(500.0, 900.0), Duration::from_millis(400));
        assert_eq!(ledger.statuses(0.0, 250.0).len(), 2);
        assert!(ledger.statuses(250.0, 900.0).is_empty());
    }

    fn ledger(events: &[&str]) -> Ledger {
        let mut ledger = Ledger::default();
        for (t, event) in events.iter().enumerate() {
            let event = format!(r#"{{"t":{t},"document":"d","writer":0,"node":"n",{event}}}"#);
            ledger.enter(serde_json::from_str(&event).unwrap());
        }
        ledger
    }
}
