//! The operator of CollabCluster resources.
//!
//! One pass over a cluster reads (`observe`), decides (`plan`), writes (`apply`) and tells (`status`).
//! It starts from the beginning each time and may die anywhere. The data plane never waits for it.

pub mod admin;
pub mod apply;
pub mod build;
pub mod config;
pub mod control;
pub mod controller;
pub mod lease;
pub mod model;
pub mod observe;
pub mod plan;
pub mod status;
