//! Which defect a test is to find: `just mutants` says it in the environment.

use collab_core::mutants::Mutant;

/// The variable that names it.
pub const CHOICE: &str = "COLLAB_MUTANT";

/// Makes the defect active that the environment names, if it names one.
///
/// # Panics
/// When there is no such defect, or this program was compiled without them.
pub fn choose() {
    if let Ok(name) = std::env::var(CHOICE) {
        let mutant = Mutant::parse(&name);
        mutant.expect("there is such a mutant").choose();
    }
}
