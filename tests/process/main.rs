//! Tier process: the parts that need real stores, against real stores.

#![allow(
    clippy::unwrap_used,
    reason = "a helper of a test fails as the test does"
)]
#![allow(
    clippy::print_stdout,
    reason = "what was measured is part of a test's result"
)]

mod balance;
mod cluster;
mod doctor;
mod families;
mod hardship;
mod hostile;
mod memory;
mod moves;
mod newcomers;
mod peer;
mod store_conformance;
mod write_rule;
