//! Harness of the tests.

pub mod cache;
pub mod charts;
pub mod checker;
pub mod clients;
pub mod command;
pub mod dashboards;
pub mod images;
pub mod kubernetes;
pub mod nodes;
pub mod postgres;
pub mod process;
pub mod redis;
pub mod tools;
