//! The verdict over a run, from three witnesses that cannot copy from each other: the clients' own histories
//! ([`Ledger`]), the claims and appends as the store wrote them down, and the log that is left at the end ([`Log`]).
//!
//! Everything acknowledged is there exactly once in every replica and nothing that was acknowledged as deleted is anywhere;
//! all replicas agree in state vector, delete set and content, whoever loaded them; a document's log is contiguous, its
//! epochs never fall, no older owner wrote after a newer one, and no receipt came before its row. A run in which too little was
//! acknowledged before the fault proves nothing and is an error. All but [`everything_acknowledged_is_there`] is free of I/O.

use anyhow::{Result, ensure};

use crate::clients::{Reading, read, reload};

mod content;
mod ledger;
mod log;
mod replica;

pub use content::{Content, Verdict};
pub use ledger::{Edit, Event, Ledger, Op, Silence, Writer};
pub use log::{Claim, Log, Row, tokens_of};
pub use replica::{Replica, differences};

/// With fewer acknowledged edits per second before the fault a run is void.
pub const ACKED_PER_SECOND_MIN: f64 = 50.0;

/// A run as its witnesses saw it.
#[derive(Debug, Clone, Default)]
pub struct Run {
    /// The clients.
    pub ledger: Ledger,
    /// The store.
    pub log: Log,
    /// What is held at the end by whoever is not in the ledger: the owner, a cold reload, a fresh client.
    pub replicas: Vec<Replica>,
    /// A span of undisturbed traffic before the first fault, in ms since 1970.
    pub before_ms: (f64, f64),
}

/// What the witnesses say together. Lists are empty after a good run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Sums over all documents, each judged by the replica that is worst for it.
    pub acked: usize,
    /// See [`Verdict::unacked_present`].
    pub unacked_present: usize,
    /// See [`Verdict::unacked_absent`].
    pub unacked_absent: usize,
    /// Lost tokens, with their document and who misses them.
    pub lost: Vec<String>,
    /// Doubled tokens.
    pub doubled: Vec<String>,
    /// Tokens that came back.
    pub revived: Vec<String>,
    /// What nobody wrote.
    pub strange: Vec<String>,
    /// Replicas that differ.
    pub differences: Vec<String>,
    /// What the store's witnesses object to.
    pub faults: Vec<String>,
}

impl Run {
    /// Weighs everything.
    ///
    /// # Errors
    /// When the run says nothing: too little traffic before the fault, or a document that nobody holds at the end.
    pub fn judge(&self) -> Result<Report> {
        let (from, until) = self.before_ms;
        let rate = self.ledger.acked_per_second(from, until);
        ensure!(
            ACKED_PER_SECOND_MIN <= rate,
            "void: {rate:.0} acknowledged edits per second before the fault, {ACKED_PER_SECOND_MIN} are needed"
        );
        let mut report = Report {
            differences: differences(self.replicas()),
            faults: self.log.faults(&self.ledger),
            ..Report::default()
        };
        let mut documents: Vec<&str> = self.ledger.writers.keys().map(|key| &*key.0).collect();
        documents.dedup();
        for document in documents {
            let held = self.replicas().filter(|held| held.document == document);
            let mut verdicts = held.map(|held| (held, self.ledger.judge(document, &held.content)));
            let Some((first, verdict)) = verdicts.next() else {
                anyhow::bail!("void: nobody holds {document} at the end");
            };
            report.acked += verdict.acked;
            report.unacked_present += verdict.unacked_present;
            report.unacked_absent += verdict.unacked_absent;
            report.add(document, first, &verdict);
            verdicts.for_each(|(held, verdict)| report.add(document, held, &verdict));
        }
        Ok(report)
    }

    fn replicas(&self) -> impl Iterator<Item = &Replica> {
        self.ledger.replicas().chain(&self.replicas)
    }
}

impl Report {
    /// Fails unless nothing is wrong.
    ///
    /// # Errors
    /// With the first few of everything that is.
    pub fn clean(&self) -> Result<()> {
        let wrong = [
            ("lost", &self.lost),
            ("doubled", &self.doubled),
            ("revived", &self.revived),
            ("strange", &self.strange),
            ("different", &self.differences),
            ("faults", &self.faults),
        ];
        let said: Vec<String> = wrong
            .iter()
            .filter(|(_, list)| !list.is_empty())
            .map(|(name, list)| {
                let some: Vec<&str> = list.iter().take(5).map(String::as_str).collect();
                format!("{} {name}:\n  {}", list.len(), some.join("\n  "))
            })
            .collect();
        ensure!(said.is_empty(), "{}", said.join("\n"));
        Ok(())
    }

    fn add(&mut self, document: &str, held: &Replica, verdict: &Verdict) {
        let say = |token: &String| format!("{document}: {token:?}, says {}", held.witness);
        self.lost.extend(verdict.lost.iter().map(say));
        self.doubled.extend(verdict.doubled.iter().map(say));
        self.revived.extend(verdict.revived.iter().map(say));
        self.strange.extend(verdict.strange.iter().map(say));
    }
}

/// Compares four witnesses of each document: its writers' own replicas, a fresh client, what REST exports as text, and what
/// Yjs makes of the state that REST exports. They must be equal, and hold every acknowledged edit exactly once.
///
/// # Errors
/// With the first difference.
pub async fn everything_acknowledged_is_there(
    reading: &Reading<'_>,
    ledger: &Ledger,
) -> Result<()> {
    for ((document, number), writer) in &ledger.writers {
        ensure!(
            writer.replica.is_some(),
            "writer {number} of {document} did not say what it holds"
        );
    }
    let fresh = read(reading).await?;
    let reloaded = reload(reading).await?;
    let held = fresh.values().map(|fresh| &fresh.replica);
    let stored = reloaded.iter().map(|reloaded| &reloaded.replica);
    let differences = differences(ledger.replicas().chain(held).chain(stored));
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    for reloaded in &reloaded {
        let document = reloaded.replica.document.as_str();
        ledger.judge(document, &reloaded.replica.content).clean()?;
        ensure!(
            reloaded.exported == reloaded.replica.content.text,
            "the exported text differs in {document}"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::ledger::tests::ledger;
    use super::*;

    #[test]
    fn a_run_is_judged_by_each_replica() {
        let mut run = run();
        assert_eq!(run.judge().unwrap().acked, 1);
        run.judge().unwrap().clean().unwrap();
        run.replicas[0].content = Content::default();
        let report = run.judge().unwrap();
        assert_eq!(report.lost, ["d: \"w0n0;\", says the owner"]);
        assert!(report.clean().is_err());
    }

    #[test]
    fn replicas_that_differ_are_no_good_run() {
        let mut run = run();
        let mut other = run.replicas[0].clone();
        other.state_vector.push((7, 1));
        run.replicas.push(other);
        assert!(run.judge().unwrap().clean().is_err());
    }

    #[test]
    fn a_run_without_enough_traffic_or_witnesses_is_void() {
        let mut quiet = run();
        quiet.before_ms.1 = 1000.0;
        assert!(quiet.judge().unwrap_err().to_string().contains("void"));
        let mut unheld = run();
        unheld.replicas.clear();
        assert!(unheld.judge().unwrap_err().to_string().contains("void"));
    }

    fn run() -> Run {
        let held = Replica {
            witness: "the owner".into(),
            document: "d".into(),
            content: Content::of_text("w0n0;"),
            ..Replica::default()
        };
        let claim = Claim {
            slot: 7,
            owner: "n".into(),
            epoch: 1,
            at_ms: 0.0,
        };
        let row = Row {
            document: "d".into(),
            seq: 1,
            slot: 7,
            epoch: 1,
            at_ms: 0.5,
            crc32c: 0,
            tokens: vec!["w0n0;".into()],
        };
        Run {
            ledger: ledger(&[
                r#""kind":"edit","op":"insert","token":"w0n0;","version":1"#,
                r#""kind":"ack","version":1"#,
            ]),
            log: Log {
                claims: vec![claim],
                appended: vec![row.clone()],
                rows: vec![row],
                ..Log::default()
            },
            replicas: vec![held],
            before_ms: (0.0, 10.0),
        }
    }
}
