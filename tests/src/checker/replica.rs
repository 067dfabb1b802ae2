//! Convergence: replicas of a document are equal in state vector, delete set and content, whoever holds them.

use super::content::Content;
use serde::Deserialize;
use std::collections::BTreeMap;

/// What somebody holds of a document.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Replica {
    /// Who.
    #[serde(default, skip)]
    pub witness: String,
    /// Of which document.
    #[serde(default, skip)]
    pub document: String,
    /// Clients and their clocks, in any order. A clock of 0 is the same as none.
    pub state_vector: Vec<(u64, u64)>,
    /// Deleted ranges as client, first clock and length, in any order and however divided.
    pub deletes: Vec<(u64, u64, u64)>,
    /// What it shows.
    pub content: Content,
}

impl Replica {
    /// The same with one spelling of clocks and ranges.
    fn canonical(&self) -> Self {
        let mut state_vector = self.state_vector.clone();
        state_vector.retain(|(_, clock)| 0 < *clock);
        state_vector.sort_unstable();
        let mut ranges = self.deletes.clone();
        ranges.sort_unstable();
        let mut merged = Vec::<(u64, u64, u64)>::new();
        for (client, clock, len) in ranges.into_iter().filter(|(.., len)| 0 < *len) {
            match merged.last_mut() {
                Some(last) if client == last.0 && clock <= last.1 + last.2 => {
                    last.2 = last.2.max(clock + len - last.1);
                }
                _ => merged.push((client, clock, len)),
            }
        }
        Self {
            state_vector,
            deletes: merged,
            ..self.clone()
        }
    }
}

/// Every replica that differs from the first of its document, and in what.
pub fn differences<'replica>(replicas: impl IntoIterator<Item = &'replica Replica>) -> Vec<String> {
    let mut first = BTreeMap::<&str, &Replica>::new();
    let mut differences = Vec::new();
    for replica in replicas {
        let reference = *first.entry(&replica.document).or_insert(replica);
        let (ours, theirs) = (replica.canonical(), reference.canonical());
        let what = if ours.content != theirs.content {
            "the content"
        } else if ours.state_vector != theirs.state_vector {
            "the state vector"
        } else if ours.deletes != theirs.deletes {
            "the delete set"
        } else {
            continue;
        };
        differences.push(format!(
            "{}: {what} of {} differs from that of {}:\n{ours:?}\n{theirs:?}",
            replica.document, replica.witness, reference.witness,
        ));
    }
    differences
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_may_be_divided_and_ordered_in_any_way() {
        let one = replica(&[(1, 9)], &[(1, 2, 3), (1, 7, 1)], "a;");
        let same = replica(
            &[(2, 0), (1, 9)],
            &[(1, 7, 1), (1, 4, 1), (1, 2, 2), (3, 0, 0)],
            "a;",
        );
        assert!(differences([&one, &same]).is_empty());
    }

    #[test]
    fn a_difference_of_any_kind_is_found() {
        let one = replica(&[(1, 9)], &[(1, 2, 3)], "a;");
        for (other, what) in [
            (replica(&[(1, 9)], &[(1, 2, 3)], "b;"), "content"),
            (replica(&[(1, 8)], &[(1, 2, 3)], "a;"), "state vector"),
            (replica(&[(1, 9)], &[(1, 2, 2)], "a;"), "delete set"),
        ] {
            let found = differences([&one, &other]);
            assert!(found.len() == 1 && found[0].contains(what), "{found:?}");
        }
    }

    #[test]
    fn documents_are_not_compared_with_each_other() {
        let one = replica(&[(1, 9)], &[], "a;");
        let mut other = replica(&[(2, 1)], &[], "b;");
        other.document = "e".into();
        assert!(differences([&one, &other]).is_empty());
    }

    fn replica(clocks: &[(u64, u64)], deletes: &[(u64, u64, u64)], text: &str) -> Replica {
        Replica {
            witness: "somebody".into(),
            document: "d".into(),
            state_vector: clocks.into(),
            deletes: deletes.into(),
            content: Content::of_text(text),
        }
    }
}
