//! All that is decided about documents: ids, placement, frames, the owner's state machine.
//!
//! Nothing here does I/O, waits, reads a clock, the environment or a random number; what happens is
//! a function of what is passed in.

// The order of a hash map differs from run to run; clippy.toml bans the methods, this the loops.
#![warn(clippy::iter_over_hash_type)]

pub mod control;
pub mod document;
pub mod ids;
pub mod limits;
pub mod mutants;
pub mod quarantine;
pub mod replica;
pub mod ring;
pub mod scan;
pub mod wire;
