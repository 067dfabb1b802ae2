//! Defects on purpose, to see that the tests find them.
//!
//! They exist only in programs that were compiled with the feature `mutants` of this package
//! (`just mutants`); in all others [`Mutant::is_active`] is `false` for the compiler, and what it guards is
//! not there. At most one of them is active, chosen once per process.

use std::borrow::Cow;
use std::sync::OnceLock;

/// Whether this program was compiled with the defects.
pub const COMPILED_IN: bool = cfg!(feature = "mutants");

static CHOSEN: OnceLock<Mutant> = OnceLock::new();

/// A defect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// What a client could take for a receipt does not wait for the commit.
    AckBeforeCommit,
    /// The fence lets every epoch and incarnation write.
    NoEpochCheck,
    /// One update in a thousand is not sent to the other clients.
    UpdateDropped,
    /// An opening passes over the last row of the log.
    RowSkippedOnLoad,
    /// A snapshot says that it holds one row more than it does.
    SnapshotWithGap,
    /// A node counts its lease from the answer of the store.
    LeaseFromReply,
    /// A second batch of a slot does not wait for the first.
    TwoBatchesPerSlot,
    /// A position that holds other bytes counts as written.
    ConflictIsSuccess,
    /// The receipt of an update that adds nothing does not wait for what came before.
    ReceiptOfNothingAtOnce,
    /// A node that was cut off itself adopts as soon as the store answers again.
    AdoptionAfterOutage,
    /// A pin leaves the epoch of the slot as it is that it takes a document from.
    PinKeepsEpoch,
    /// The write rule looks at a slot without locking it, as a fence with `exists` does.
    ExistsFence,
    /// Who ends the lease of another one looks at the two members without locking them.
    EarlyFenceUnlocked,
}

impl Mutant {
    /// Each of them.
    pub const ALL: [Self; 13] = [
        Self::AckBeforeCommit,
        Self::NoEpochCheck,
        Self::UpdateDropped,
        Self::RowSkippedOnLoad,
        Self::SnapshotWithGap,
        Self::LeaseFromReply,
        Self::TwoBatchesPerSlot,
        Self::ConflictIsSuccess,
        Self::ReceiptOfNothingAtOnce,
        Self::AdoptionAfterOutage,
        Self::PinKeepsEpoch,
        Self::ExistsFence,
        Self::EarlyFenceUnlocked,
    ];

    /// Its name, as in the code.
    pub fn name(self) -> String {
        format!("{self:?}")
    }

    /// The mutant of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mutant| mutant.name() == name)
    }

    /// Makes it the one that is active in this process. The first choice stays.
    ///
    /// # Panics
    /// When the program was compiled without the defects: a test of it would say nothing.
    pub fn choose(self) {
        #[allow(
            clippy::assertions_on_constants,
            reason = "it differs from build to build"
        )]
        {
            assert!(COMPILED_IN, "this program was compiled without mutants");
        }
        CHOSEN.get_or_init(|| self);
    }

    /// A statement; with the defect it says `to` where it said `from`.
    ///
    /// # Panics
    /// When the defect is active and the statement does not say `from`.
    pub fn rewrites(self, statement: &'static str, from: &str, to: &str) -> Cow<'static, str> {
        if !self.is_active() {
            return Cow::Borrowed(statement);
        }
        assert!(statement.contains(from), "{statement} does not say {from}");
        Cow::Owned(statement.replace(from, to))
    }

    /// Whether the defect is to be there.
    pub fn is_active(self) -> bool {
        COMPILED_IN && CHOSEN.get() == Some(&self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_mutants() {
        for mutant in Mutant::ALL {
            assert_eq!(Mutant::parse(&mutant.name()), Some(mutant));
            assert!(!mutant.is_active());
        }
    }
}
