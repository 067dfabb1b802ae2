//! The parts of a node, wired together, without its listeners.
//!
//! [`crate::server`] gives it a real store and sockets; the simulation gives it what fails on purpose.

use std::sync::Arc;

use futures::stream::FuturesUnordered;
use tokio::task::JoinHandle;

use crate::bus::Bus;
use crate::documents::Documents;
use crate::edge::Edge;
use crate::handoff::Handoff;
use crate::isolation;
use crate::log::Log;
use crate::members::Members;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::peers::Peers;
use crate::peers::link::Dial;
use crate::store::{Registration, Store};
use crate::tasks::Tasks;

/// What a node is made of.
pub struct Surroundings {
    /// Durable storage.
    pub store: Arc<dyn Store>,
    /// Forgetful storage.
    pub bus: Arc<dyn Bus>,
    /// The way to other nodes.
    pub dial: Arc<dyn Dial>,
    /// Who it is.
    pub registration: Registration,
    /// Slots of the cluster.
    pub slots: u16,
    /// No other member can exist.
    pub alone: bool,
    /// How much memory there is.
    pub memory: Memory,
    /// What is counted.
    pub metrics: Metrics,
    /// Where its tasks run.
    pub tasks: Tasks,
    /// Decides what it leaves to chance.
    pub seed: u64,
}

/// A running node.
pub struct Node {
    /// This node among the others.
    pub members: Arc<Members>,
    /// The documents owned and open here.
    pub documents: Arc<Documents>,
    /// The sockets of clients.
    pub edge: Arc<Edge>,
    /// Moves slots, and leaves the cluster.
    pub handoff: Arc<Handoff>,
}

/// The tasks of a node that must not end. The first that does says why the node must.
pub type Running = FuturesUnordered<JoinHandle<anyhow::Result<()>>>;

impl Node {
    /// Wires the parts and starts their tasks. Registers as a member as soon as the store answers.
    pub fn start(surroundings: Surroundings) -> (Self, Running) {
        let Surroundings {
            store,
            bus,
            dial,
            registration,
            slots,
            alone,
            memory,
            metrics,
            tasks,
            seed,
        } = surroundings;
        let members = Members::new(store.clone(), metrics.clone(), registration, slots, alone);
        let (log, log_task) = Log::new(
            store.clone(),
            members.clone(),
            metrics.clone(),
            tasks.clone(),
        );
        let documents = Documents::new(
            store.clone(),
            members.clone(),
            log,
            bus,
            memory,
            metrics.clone(),
            tasks.clone(),
        );
        let peers = Peers::new(dial, members.clone(), metrics.clone(), tasks.clone());
        let edge = Edge::new(
            documents.clone(),
            members.clone(),
            peers.clone(),
            metrics.clone(),
            tasks.clone(),
            seed,
        );
        let handoff = Handoff::new(
            store,
            members.clone(),
            documents.clone(),
            edge.clone(),
            peers.clone(),
            metrics,
        );
        let running = [
            tasks.spawn(members.clone().keep_lease()),
            tasks.spawn(endless(members.clone().follow_map())),
            tasks.spawn(endless(members.clone().adopt())),
            tasks.spawn(endless(peers.clone().follow_members())),
            tasks.spawn(endless(isolation::endure(
                members.clone(),
                peers,
                edge.clone(),
            ))),
            tasks.spawn(endless(log_task)),
            tasks.spawn(endless(documents.clone().follow_map())),
            tasks.spawn(endless(documents.clone().measure())),
            tasks.spawn(endless(documents.clone().keep_within_memory())),
            tasks.spawn(endless(handoff.clone().balance())),
            tasks.spawn(endless(handoff.clone().finish_drains())),
        ];
        let node = Self {
            members,
            documents,
            edge,
            handoff,
        };
        (node, running.into_iter().collect())
    }
}

async fn endless(task: impl Future<Output = ()>) -> anyhow::Result<()> {
    task.await;
    Ok(())
}
