//! The second and third witness: who claimed which slot when, every append, and what the log holds at the end.

use super::ledger::{Ledger, Op};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// How far the clocks of clients and database may differ, in ms: they are read on one machine.
const CLOCKS_DIFFER_MS: f64 = 50.0;

/// A change of a slot's owner, as the store wrote it down.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// The slot.
    pub slot: u16,
    /// The process that owns it from now on.
    pub owner: String,
    /// The version of the ownership.
    pub epoch: i64,
    /// By the store's clock, in ms since 1970.
    pub at_ms: f64,
}

/// A row of the log.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The document.
    pub document: String,
    /// Its place in the document's log.
    pub seq: i64,
    /// The slot of the document.
    pub slot: u16,
    /// The ownership it was written under.
    pub epoch: i64,
    /// By the store's clock while the slot was locked, in ms since 1970.
    pub at_ms: f64,
    /// CRC-32C of the bytes.
    pub crc32c: u32,
    /// The tokens that its bytes hold, see [`tokens_of`].
    pub tokens: Vec<String>,
}

/// What the store says of a run.
#[derive(Debug, Clone, Default)]
pub struct Log {
    /// Every change of an owner.
    pub claims: Vec<Claim>,
    /// Every row that was ever committed.
    pub appended: Vec<Row>,
    /// The same of a primary that died without passing everything on: receipts may rest on what only it had, and its
    /// owners must have written that again.
    pub appended_before_failover: Vec<Row>,
    /// The rows at the end; older ones may be cut off behind snapshots.
    pub rows: Vec<Row>,
    /// Position of the oldest snapshot that is kept, by document.
    pub snapshots: BTreeMap<String, i64>,
}

impl Log {
    /// Everything that must not be, as sentences.
    pub fn faults(&self, ledger: &Ledger) -> Vec<String> {
        let mut faults = self.of_claims();
        faults.extend(self.of_rows());
        faults.extend(self.of_what_is_kept());
        faults.extend(self.of_receipts(ledger));
        faults
    }

    /// Epochs of a slot rise with time, by one each.
    fn of_claims(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut last = BTreeMap::<u16, &Claim>::new();
        for claim in &self.claims {
            if let Some(before) = last.insert(claim.slot, claim)
                && claim.epoch != before.epoch + 1
            {
                faults.push(format!(
                    "slot {}: epoch {} was claimed after {}",
                    claim.slot, claim.epoch, before.epoch
                ));
            }
        }
        faults
    }

    /// A document's rows are contiguous, epochs never fall along them, and none was written after a newer claim.
    fn of_rows(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut claimed = BTreeMap::<(u16, i64), f64>::new();
        for claim in &self.claims {
            claimed.insert((claim.slot, claim.epoch), claim.at_ms);
        }
        let mut rows: Vec<&Row> = self.appended.iter().collect();
        rows.sort_by_key(|row| (&row.document, row.seq));
        for pair in rows.windows(2) {
            let (before, row) = (pair[0], pair[1]);
            if before.document != row.document {
                continue;
            }
            let name = format!("{} seq {}", row.document, row.seq);
            if row.seq == before.seq {
                faults.push(format!("{name}: written twice"));
            } else if row.seq != before.seq + 1 {
                faults.push(format!("{name}: follows {}", before.seq));
            }
            if row.epoch < before.epoch {
                faults.push(format!(
                    "{name}: epoch {} after {}",
                    row.epoch, before.epoch
                ));
            }
        }
        for row in rows {
            let later = claimed
                .range((row.slot, row.epoch + 1)..=(row.slot, i64::MAX))
                .next();
            if let Some(((_, epoch), at)) = later
                && *at < row.at_ms
            {
                faults.push(format!(
                    "{} seq {}: epoch {} wrote {:.1} ms after the claim of epoch {epoch}",
                    row.document,
                    row.seq,
                    row.epoch,
                    row.at_ms - at
                ));
            }
        }
        faults
    }

    /// What is left at the end is what was written, less only what a kept snapshot covers.
    fn of_what_is_kept(&self) -> Vec<String> {
        let key = |row: &Row| (row.document.clone(), row.seq);
        let kept: HashMap<_, &Row> = self.rows.iter().map(|row| (key(row), row)).collect();
        let written: HashMap<_, &Row> = self.appended.iter().map(|row| (key(row), row)).collect();
        let mut faults = Vec::new();
        for (key, row) in &written {
            let covered = self.snapshots.get(&key.0).is_some_and(|seq| key.1 <= *seq);
            match kept.get(key) {
                Some(kept) if kept.epoch == row.epoch && kept.crc32c == row.crc32c => {}
                Some(_) => faults.push(format!("{} seq {}: was changed", key.0, key.1)),
                None if covered => {}
                None => faults.push(format!("{} seq {}: is gone", key.0, key.1)),
            }
        }
        let foreign = kept.keys().filter(|key| !written.contains_key(*key));
        faults.extend(foreign.map(|(document, seq)| {
            format!("{document} seq {seq}: is there, and was never appended")
        }));
        faults.sort_unstable();
        faults
    }

    /// An acknowledged insertion that nobody deleted is in a row that is older than its receipt; a client's
    /// insertions are in the log in its own order.
    fn of_receipts(&self, ledger: &Ledger) -> Vec<String> {
        let mut first = HashMap::<(&str, &str), &Row>::new();
        let mut rows: Vec<&Row> = self.appended.iter().collect();
        rows.sort_by_key(|row| (&row.document, row.seq));
        for row in rows {
            for token in &row.tokens {
                first.entry((&row.document, token)).or_insert(row);
            }
        }
        let mut once = HashMap::<(&str, &str), f64>::new();
        for row in &self.appended_before_failover {
            for token in &row.tokens {
                let at_ms = once.entry((&row.document, token)).or_insert(row.at_ms);
                *at_ms = at_ms.min(row.at_ms);
            }
        }
        let mut faults = Vec::new();
        for ((document, number), writer) in &ledger.writers {
            let deleted: BTreeSet<&str> = ledger
                .of(document)
                .flat_map(|writer| &writer.edits)
                .filter(|edit| edit.op == Op::Delete)
                .map(|edit| edit.token.as_str())
                .collect();
            let mut last = i64::MIN;
            for edit in writer.edits.iter().filter(|edit| edit.op == Op::Insert) {
                let key = (document.as_str(), edit.token.as_str());
                let row = first.get(&key);
                let once = once.get(&key).copied().unwrap_or(f64::INFINITY);
                match (row, edit.acked_ms) {
                    // What was taken out before it was sent goes without its text.
                    (None, Some(_)) if !deleted.contains(edit.token.as_str()) => {
                        faults.push(format!(
                            "{document}: {:?} was acknowledged and is in no row",
                            edit.token
                        ));
                    }
                    (Some(row), Some(acked)) if acked + CLOCKS_DIFFER_MS < row.at_ms.min(once) => {
                        let how = if edit.echoed { " by its echo" } else { "" };
                        faults.push(format!(
                            "{document}: {:?} was acknowledged{how} {:.0} ms before it was written",
                            edit.token,
                            row.at_ms - acked
                        ));
                    }
                    _ => {}
                }
                // Nor does the first row with the text of a deleted token say when it was written: an earlier one
                // may have had it without its text.
                if let Some(row) = row.filter(|_| !deleted.contains(edit.token.as_str())) {
                    if row.seq < last {
                        faults.push(format!(
                            "{document}: {:?} of writer {number} is at {}, after a later edit at {last}",
                            edit.token, row.seq
                        ));
                    }
                    last = last.max(row.seq);
                }
            }
        }
        faults
    }
}

/// The tokens of typists (`w`, number, `n`, number, any ending, `;`) in the bytes of an update.
pub fn tokens_of(bytes: &[u8]) -> Vec<String> {
    let digits = |at: usize| {
        bytes[at..]
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .count()
    };
    let mut tokens = Vec::new();
    for start in (0..bytes.len()).filter(|at| bytes[*at] == b'w') {
        let writer = digits(start + 1);
        let n = start + 1 + writer;
        if writer == 0 || bytes.get(n) != Some(&b'n') || digits(n + 1) == 0 {
            continue;
        }
        let end = bytes[n..].iter().position(|byte| *byte == b';');
        if let Some(token) = end.and_then(|end| std::str::from_utf8(&bytes[start..=n + end]).ok()) {
            tokens.push(token.to_owned());
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::super::ledger::{Edit, tests::ledger};
    use super::*;

    #[test]
    fn a_right_log_has_no_faults() {
        let log = log([
            (1, 1, 10.0, "w0n0;"),
            (2, 1, 20.0, "w0n1;"),
            (3, 2, 40.0, "w0n2;"),
        ]);
        assert_eq!(log.faults(&acked()), [""; 0]);
    }

    #[test]
    fn holes_doubles_and_falling_epochs_are_found() {
        let rows = |second, epoch| log([(1, 2, 40.0, "w0n0;"), (second, epoch, 50.0, "w0n1;")]);
        assert!(has(&rows(3, 2), "follows 1"));
        assert!(has(&rows(1, 2), "written twice"));
        assert!(has(&rows(2, 1), "epoch 1 after 2"));
    }

    #[test]
    fn a_write_after_a_newer_claim_is_found() {
        assert!(has(
            &log([(1, 1, 31.0, "w0n0;")]),
            "1.0 ms after the claim of epoch 2"
        ));
    }

    #[test]
    fn epochs_that_fall_or_jump_are_found() {
        let mut log = log([]);
        log.claims[1].epoch = 3;
        assert!(has(&log, "epoch 3 was claimed after 1"));
        log.claims[1].epoch = 1;
        assert!(has(&log, "epoch 1 was claimed after 1"));
    }

    #[test]
    fn rows_that_vanish_change_or_appear_are_found() {
        let mut log = log([(1, 1, 1.0, "w0n0;"), (2, 1, 2.0, "w0n1;")]);
        log.rows.remove(0);
        assert!(has(&log, "seq 1: is gone"));
        log.snapshots.insert("d".into(), 1);
        assert!(!has(&log, "is gone"));
        log.rows[0].crc32c = 9;
        assert!(has(&log, "seq 2: was changed"));
        log.rows[0].seq = 7;
        assert!(has(&log, "seq 7: is there, and was never appended"));
    }

    #[test]
    fn a_receipt_without_or_before_its_row_is_found() {
        assert!(has(
            &log([(1, 1, 1.0, "w0n0;")]),
            "\"w0n1;\" was acknowledged and is in no row"
        ));
        let late = log([(1, 1, 1.0, "w0n0;"), (2, 2, 200.0, "w0n1;")]);
        assert!(has(&late, "before it was written"));
    }

    #[test]
    fn a_receipt_may_rest_on_a_row_that_was_lost_and_written_again() {
        let mut log = log([(1, 1, 1.0, "w0n0;"), (2, 2, 200.0, "w0n1;")]);
        log.appended_before_failover = vec![Row {
            at_ms: 2.0,
            ..log.appended[1].clone()
        }];
        assert_eq!(log.faults(&acked()), [""; 0]);
        log.appended_before_failover[0].at_ms = 199.0;
        assert!(has(&log, "before it was written"));
        let again = (log.appended.pop(), log.rows.pop());
        assert!(again.0.is_some() && has(&log, "is in no row"));
    }

    #[test]
    fn a_clients_edits_out_of_order_are_found() {
        let log = log([(1, 1, 1.0, "w0n1;"), (2, 1, 2.0, "w0n0;")]);
        assert!(has(&log, "after a later edit"));
        let mut deleted = acked();
        let token = "w0n1;".to_owned();
        let edit = Edit {
            op: Op::Delete,
            token,
            made_ms: 1.0,
            sent_ms: None,
            acked_ms: None,
            echoed: false,
        };
        deleted.writer("d", 1).edits.push(edit);
        assert_eq!(log.faults(&deleted), [""; 0]);
    }

    #[test]
    fn tokens_are_found_in_whatever_surrounds_them() {
        let bytes = "\u{1}w0n12;w3n4é;\u{7}quillwn1;w1nx;w2n".as_bytes();
        assert_eq!(tokens_of(bytes), ["w0n12;", "w3n4é;"]);
    }

    fn has(log: &Log, what: &str) -> bool {
        log.faults(&acked())
            .iter()
            .any(|fault| fault.contains(what))
    }

    /// Writer 0 has w0n0 and w0n1, acknowledged at 100 ms and a little.
    fn acked() -> Ledger {
        let mut ledger = ledger(&[
            r#""kind":"edit","op":"insert","token":"w0n0;","version":1"#,
            r#""kind":"edit","op":"insert","token":"w0n1;","version":2"#,
        ]);
        for edit in &mut ledger.writer("d", 0).edits {
            edit.acked_ms = Some(100.0);
        }
        ledger
    }

    /// Slot 7, claimed at 0 and at 30 ms, and rows of its document d: seq, epoch, time, token.
    fn log<const N: usize>(rows: [(i64, i64, f64, &str); N]) -> Log {
        let claim = |epoch, at_ms| Claim {
            slot: 7,
            owner: "n".into(),
            epoch,
            at_ms,
        };
        let row = |(seq, epoch, at_ms, token): (i64, i64, f64, &str)| Row {
            document: "d".into(),
            seq,
            slot: 7,
            epoch,
            at_ms,
            crc32c: 0,
            tokens: vec![token.into()],
        };
        let rows: Vec<Row> = rows.into_iter().map(row).collect();
        Log {
            appended_before_failover: Vec::new(),
            claims: vec![claim(1, 0.0), claim(2, 30.0)],
            appended: rows.clone(),
            rows,
            snapshots: BTreeMap::new(),
        }
    }
}
