//! Defects on purpose, to see that the tests find them.
//!
//! They exist only in programs that were compiled with `COLLAB_MUTANTS` in the environment
//! (`just mutants`); in all others [`Mutant::is_active`] is `false` for the compiler, and what it guards is
//! not there. At most one of them is active, chosen once per process.

use std::sync::OnceLock;

/// Whether this program was compiled with the defects.
pub const COMPILED_IN: bool = option_env!("COLLAB_MUTANTS").is_some();

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
    /// An opening passes over the first row of the log.
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
}

impl Mutant {
    /// Each of them.
    pub const ALL: [Self; 10] = [
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
