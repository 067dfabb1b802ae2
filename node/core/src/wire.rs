//! Frames: one file for each family of clients, and one for the way from edge to owner.
//!
//! Parsing borrows from the frame and trusts nothing in it; encoding makes exactly one message for
//! each frame, because y-websocket 3 reads only the first.

pub mod awareness;
pub mod hocuspocus;
pub mod json;
pub mod map;
pub mod relay;
pub mod varint;
pub mod y_sweet;
pub mod y_websocket;

#[cfg(test)]
mod recorded;
