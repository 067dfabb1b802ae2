//! Tier process.

mod store_conformance;
mod write_rule;
