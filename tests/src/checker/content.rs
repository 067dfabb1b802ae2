//! What a replica of a document holds, in a form that does not depend on how a library encodes it, and
//! how that compares with what the writers were promised.
//!
//! Writers put unique tokens into three places of a document: the text `quill`, where each token ends with `;`, the keys
//! of `map`, whose values repeat them, and the elements of `array`.

use super::ledger::{Ledger, Op};
use anyhow::{Result, ensure};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};

/// Content of a replica.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Content {
    /// The text `quill`.
    pub text: String,
    /// The map `map`.
    #[serde(default)]
    pub map: BTreeMap<String, String>,
    /// The array `array`.
    #[serde(default)]
    pub array: Vec<String>,
}

/// How a content compares with a ledger. Lists are sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Acknowledged edits of the document.
    pub acked: usize,
    /// Insertions without a receipt that are there; they may be.
    pub unacked_present: usize,
    /// Insertions without a receipt that are not there; they may be missing.
    pub unacked_absent: usize,
    /// Acknowledged insertions that are not there, and that nobody has deleted.
    pub lost: Vec<String>,
    /// Tokens that are there more than once.
    pub doubled: Vec<String>,
    /// Tokens that are there although their deletion was acknowledged.
    pub revived: Vec<String>,
    /// What is there and nobody wrote.
    pub strange: Vec<String>,
}

impl Content {
    /// One with a text only.
    pub fn of_text(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            ..Self::default()
        }
    }

    /// How often each token is there. A map entry whose value is not its key counts under another name.
    fn tokens(&self) -> HashMap<String, usize> {
        let in_map = self.map.iter().map(|(key, value)| {
            if key == value {
                key.clone()
            } else {
                format!("{key}={value}")
            }
        });
        let in_text = self.text.split_inclusive(';').map(str::to_owned);
        let mut found = HashMap::new();
        for token in in_text.chain(in_map).chain(self.array.iter().cloned()) {
            *found.entry(token).or_default() += 1;
        }
        found
    }
}

impl Verdict {
    /// Fails unless every acknowledged edit is there exactly once and nothing else is.
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

/// What was done with one token: whether it was inserted and deleted, and if so, whether that was acknowledged.
#[derive(Debug, Default, Clone, Copy)]
struct Fate {
    inserted: Option<bool>,
    deleted: Option<bool>,
}

/// Compares the content of `document` with what its writers were promised. Anybody may delete anybody's token.
pub(super) fn judge(ledger: &Ledger, document: &str, content: &Content) -> Verdict {
    let mut verdict = Verdict::default();
    let mut fates: BTreeMap<&str, Fate> = BTreeMap::new();
    for edit in ledger.of(document).flat_map(|writer| &writer.edits) {
        let acked = edit.acked_ms.is_some();
        verdict.acked += usize::from(acked);
        let fate = fates.entry(&edit.token).or_default();
        let done = match edit.op {
            Op::Insert => &mut fate.inserted,
            Op::Delete => &mut fate.deleted,
        };
        *done = Some(acked || *done == Some(true));
    }
    let mut found = content.tokens();
    for (token, fate) in fates {
        let Fate {
            inserted: Some(acked),
            deleted,
        } = fate
        else {
            continue;
        };
        let count = found.remove(token).unwrap_or(0);
        if !acked && deleted.is_none() {
            verdict.unacked_present += usize::from(count == 1);
            verdict.unacked_absent += usize::from(count == 0);
        }
        let list = match count {
            0 if acked && deleted.is_none() => &mut verdict.lost,
            0 => continue,
            1 if deleted == Some(true) => &mut verdict.revived,
            1 => continue,
            _ => &mut verdict.doubled,
        };
        list.push(token.to_owned());
    }
    verdict.strange = found.into_keys().collect();
    verdict.strange.sort_unstable();
    verdict
}

#[cfg(test)]
mod tests {
    use super::super::ledger::tests::ledger;
    use super::*;

    #[test]
    fn an_acknowledged_edit_must_be_there_exactly_once() {
        let ledger = ledger(&[
            r#""kind":"edit","op":"insert","token":"w0n0;","version":1"#,
            r#""kind":"edit","op":"insert","token":"w0n1é;","version":2"#,
            r#""kind":"ack","version":2"#,
            r#""kind":"edit","op":"insert","token":"w0n2\n;","version":3"#,
        ]);
        let text = |text: &str| ledger.judge("d", &Content::of_text(text));
        let clean = Verdict {
            acked: 2,
            unacked_absent: 1,
            ..Verdict::default()
        };
        assert_eq!(text("w0n1é;w0n0;"), clean);
        let present = text("w0n1é;w0n2\n;w0n0;");
        assert_eq!((present.unacked_present, present.unacked_absent), (1, 0));
        assert!(clean.clean().is_ok() && present.clean().is_ok());
        assert_eq!(text("w0n1é;").lost, ["w0n0;"]);
        assert_eq!(text("w0n1é;w0n0;w0n1é;").doubled, ["w0n1é;"]);
        assert_eq!(text("w0n1é;w0w0n0;n5;").strange, ["n5;", "w0w0n0;"]);
        assert!(text("").clean().is_err());
    }

    #[test]
    fn an_acknowledged_deletion_must_not_come_back() {
        let events = [
            r#""kind":"edit","op":"insert","token":"a;","version":1"#,
            r#""kind":"ack","version":1"#,
            r#""kind":"edit","op":"delete","token":"a;","version":2"#,
            r#""kind":"ack","version":2"#,
        ];
        let (there, gone) = (Content::of_text("a;"), Content::default());
        let pending = ledger(&events[..3]);
        assert!(pending.judge("d", &there).clean().is_ok());
        assert!(pending.judge("d", &gone).clean().is_ok());
        let done = ledger(&events);
        assert!(done.judge("d", &gone).clean().is_ok());
        assert_eq!(done.judge("d", &there).revived, ["a;"]);
    }

    #[test]
    fn somebody_elses_deletion_counts_like_the_writers_own() {
        let mut both = ledger(&[
            r#""kind":"edit","op":"insert","token":"a;","version":1"#,
            r#""kind":"ack","version":1"#,
        ]);
        let deletion = |acked_ms| super::super::ledger::Edit {
            op: Op::Delete,
            token: "a;".into(),
            made_ms: 2.0,
            sent_ms: None,
            acked_ms,
            echoed: false,
        };
        both.writer("d", 1).edits.push(deletion(None));
        assert!(both.judge("d", &Content::default()).clean().is_ok());
        both.writer("d", 1).edits.push(deletion(Some(3.0)));
        assert_eq!(both.judge("d", &Content::of_text("a;")).revived, ["a;"]);
    }

    #[test]
    fn a_token_in_two_places_is_doubled_and_a_wrong_value_is_strange() {
        let ledger = ledger(&[
            r#""kind":"edit","op":"insert","token":"a;","version":1"#,
            r#""kind":"ack","version":1"#,
        ]);
        let mut content = Content::of_text("a;");
        content.array = vec!["a;".into()];
        assert_eq!(ledger.judge("d", &content).doubled, ["a;"]);
        content.array.clear();
        content.map.insert("a;".into(), "b;".into());
        assert_eq!(ledger.judge("d", &content).strange, ["a;=b;"]);
    }
}
