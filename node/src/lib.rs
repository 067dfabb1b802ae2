//! A node of the collaboration cluster: edge for every client, owner of its documents.
//!
//! The library is the node without its `main`, for the tests.

pub mod admin;
pub mod api;
pub mod auth;
mod beats;
pub mod bus;
pub mod config;
pub mod doctor;
pub mod documents;
pub mod edge;
pub mod handoff;
pub mod isolation;
pub mod listener;
pub mod log;
pub mod members;
pub mod memory;
pub mod metrics;
pub mod node;
pub mod origin;
pub mod page;
pub mod peers;
pub mod queue;
pub mod server;
pub mod store;
pub mod tasks;
pub mod watched;
pub mod websocket;
