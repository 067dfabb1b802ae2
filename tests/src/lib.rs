//! Harness of the tests.

#![allow(
    clippy::missing_panics_doc,
    clippy::match_same_arms,
    reason = "a harness panics when no test could say anything, and names each case"
)]

pub mod cache;
pub mod charts;
pub mod checker;
pub mod clients;
pub mod command;
pub mod dashboards;
pub mod embedded;
pub mod images;
pub mod kubernetes;
pub mod mutants;
pub mod network;
pub mod nodes;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod redis;
pub mod sandbox;
pub mod shim;
pub mod tools;
pub mod witnesses;
