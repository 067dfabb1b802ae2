//! What a seed draws before it plays: how large its world is, how fast, and what goes wrong there.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// What can go wrong, or be done on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// A process is killed; its pod starts another.
    Kill,
    /// A machine loses its power: nobody is told that its connections ended.
    PowerOff,
    /// A process gets no turns for a while.
    Freeze,
    /// A process is told to stop, and its pod starts another.
    Stop,
    /// The operator drains a node and takes it back.
    Drain,
    /// The operator plans anew.
    Plan,
    /// A node and the database do not hear each other.
    CutStore,
    /// A node does not hear the database, which hears it: commits with an unknown outcome.
    CutStoreReplies,
    /// The database is down.
    Outage,
    /// Commits take seconds.
    SlowCommits,
    /// Another database server takes over; nothing is lost.
    FailOver,
    /// Another database server takes over, which is some statements behind.
    LossyFailOver,
    /// The operator gives a document a slot of its own, or takes it back.
    Pin,
    /// Two nodes do not hear each other.
    CutPeers,
    /// One node does not hear another.
    CutPeersOneWay,
    /// What one node says arrives late at another.
    SlowPeers,
    /// Connections between two nodes break.
    ResetPeers,
    /// A client and the nodes do not hear each other.
    CutClient,
    /// A client does not hear the nodes, or they it.
    CutClientOneWay,
    /// A client's connection breaks.
    ResetClient,
    /// A client is offline for a while, and goes on typing.
    Offline,
    /// Somebody closes the tab, and somebody else comes.
    Depart,
}

impl Fault {
    pub(crate) const ALL: [Self; 22] = [
        Self::Kill,
        Self::PowerOff,
        Self::Freeze,
        Self::Stop,
        Self::Drain,
        Self::Plan,
        Self::CutStore,
        Self::CutStoreReplies,
        Self::Outage,
        Self::SlowCommits,
        Self::FailOver,
        Self::LossyFailOver,
        Self::Pin,
        Self::CutPeers,
        Self::CutPeersOneWay,
        Self::SlowPeers,
        Self::ResetPeers,
        Self::CutClient,
        Self::CutClientOneWay,
        Self::ResetClient,
        Self::Offline,
        Self::Depart,
    ];

    fn needs_two_nodes(self) -> bool {
        use Fault::{CutPeers, CutPeersOneWay, Drain, Plan, ResetPeers, SlowPeers};
        matches!(
            self,
            CutPeers | CutPeersOneWay | SlowPeers | ResetPeers | Plan | Drain
        )
    }
}

/// What a seed plays with.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) seed: u64,
    pub(crate) nodes: usize,
    pub(crate) documents: usize,
    /// Clients of each document.
    pub(crate) clients: usize,
    /// Clients that may read only, and type all the same.
    pub(crate) readers: usize,
    pub(crate) slots: u16,
    /// Between two edits of a client, in ms.
    pub(crate) edit_every: u64,
    /// Edits that take out a token, in percent.
    pub(crate) deletes: u32,
    /// Clients that ask for receipts, in percent; the others watch for echoes.
    pub(crate) explicit: u32,
    /// Longest usual delay of a client's link, in ms.
    pub(crate) client_delay: u64,
    /// Longest usual commit, in ms.
    pub(crate) commit: u64,
    /// Between two faults, in ms.
    pub(crate) fault_every: u64,
    /// How long what goes wrong stays so, in ms.
    pub(crate) fault_length: u64,
    /// What goes wrong here.
    pub(crate) faults: Vec<Fault>,
}

impl Settings {
    pub(crate) fn draw(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let nodes = *[1, 2, 3, 3, 3, 4, 5]
            .choose(&mut random)
            .expect("not empty");
        let documents = random.random_range(1..=4);
        let clients = random.random_range(2..=4);
        let likely = random.random_range(0.3..0.9);
        let mut faults: Vec<Fault> = Fault::ALL
            .into_iter()
            .filter(|fault| random.random_bool(likely) && (1 < nodes || !fault.needs_two_nodes()))
            .collect();
        if faults.is_empty() {
            faults.push(Fault::Kill);
        }
        let per_second = random.random_range(24.0..36.0);
        let writers = (documents * clients) as f64;
        Self {
            seed,
            nodes,
            documents,
            clients,
            readers: random.random_range(0..=2),
            slots: *[4, 16, 16, 32].choose(&mut random).expect("not empty"),
            edit_every: (writers / per_second * 1000.0) as u64,
            deletes: random.random_range(0..40),
            explicit: random.random_range(0..=100),
            client_delay: random.random_range(2..120),
            commit: random.random_range(2..25),
            fault_every: random.random_range(1_500..4_000),
            fault_length: random.random_range(1_000..8_000),
            faults,
        }
    }
}
