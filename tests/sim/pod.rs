//! Pods: what runs the processes of nodes, lets them stand still and kills them.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use collab_node::bus::memory::NoBus;
use collab_node::memory::Memory;
use collab_node::metrics::Metrics;
use collab_node::node::{Node, Surroundings};
use collab_node::peers;
use collab_node::peers::link::{Dial, Frame, Link, LinkError};
use collab_node::store::Registration;
use collab_node::tasks::{Gate, Tasks};
use futures::{SinkExt, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::PollSender;
use uuid::Uuid;

use crate::network::{Connection, Host};
use crate::world::World;

/// One run of a node.
pub(crate) struct Process {
    pub(crate) node: Node,
    pub(crate) metrics: Metrics,
    pub(crate) tasks: Tasks,
    pub(crate) breath: Arc<Breath>,
}

/// Whether the tasks of a process get turns.
#[derive(Default)]
pub(crate) struct Breath {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    life: Life,
    /// When it began, or went on.
    since: Option<Instant>,
    /// Tasks that had something to do while it stood still.
    parked: Vec<Waker>,
    tasks: Vec<AbortHandle>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Life {
    #[default]
    Runs,
    StandsStill,
    Ended,
}

impl Gate for Breath {
    fn admits(&self, waker: &Waker) -> bool {
        let mut state = self.state();
        match state.life {
            Life::Runs => true,
            Life::StandsStill => {
                state.parked.push(waker.clone());
                false
            }
            Life::Ended => false,
        }
    }

    fn spawned(&self, task: AbortHandle) {
        let mut state = self.state();
        if state.life == Life::Ended {
            task.abort();
            return;
        }
        if state.tasks.len() == state.tasks.capacity() {
            state.tasks.retain(|task| !task.is_finished());
        }
        state.tasks.push(task);
    }
}

impl Breath {
    pub(crate) fn hold(&self) {
        let mut state = self.state();
        if state.life == Life::Runs {
            state.life = Life::StandsStill;
        }
    }

    pub(crate) fn go_on(&self) {
        let parked = {
            let mut state = self.state();
            if state.life != Life::StandsStill {
                return;
            }
            state.life = Life::Runs;
            state.since = Some(Instant::now());
            std::mem::take(&mut state.parked)
        };
        parked.into_iter().for_each(Waker::wake);
    }

    /// No task gets another turn; all of them are dropped.
    pub(crate) fn end(&self) {
        let tasks = {
            let mut state = self.state();
            state.life = Life::Ended;
            state.parked.clear();
            std::mem::take(&mut state.tasks)
        };
        for task in tasks {
            task.abort();
        }
    }

    pub(crate) fn runs(&self) -> bool {
        self.state().life == Life::Runs
    }

    /// It has had its turns for at least this long.
    pub(crate) fn runs_since(&self, length: Duration) -> bool {
        let state = self.state();
        let long = state.since.is_none_or(|since| length <= since.elapsed());
        state.life == Life::Runs && long
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.state().life == Life::Ended
    }

    /// Tasks that have not ended.
    pub(crate) fn tasks(&self) -> usize {
        let mut state = self.state();
        state.tasks.retain(|task| !task.is_finished());
        state.tasks.len()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }
}

impl Process {
    /// Starts a process in a pod.
    pub(crate) fn start(
        world: &Arc<World>,
        pod: usize,
        pod_uid: String,
    ) -> (Arc<Self>, collab_node::node::Running) {
        let breath = Arc::new(Breath::default());
        let tasks = Tasks::behind(breath.clone());
        let incarnation = Uuid::from_u128(u128::from(world.roll_u64()) << 64 | 1);
        let metrics = Metrics::new();
        let registration = Registration {
            node: format!("node-{pod}").as_str().into(),
            incarnation,
            pod_uid,
            address: format!("node-{pod}:8081"),
            zone: String::new(),
            weight: 100,
        };
        let (node, running) = Node::start(Surroundings {
            store: Arc::new(world.server.sessions(Host::Pod(pod))),
            bus: Arc::new(NoBus),
            dial: Arc::new(Dialler {
                world: world.clone(),
                pod,
            }),
            registration,
            slots: world.settings.slots,
            alone: false,
            memory: Memory::unlimited(),
            metrics: metrics.clone(),
            tasks: tasks.clone(),
            seed: world.roll_u64(),
        });
        let process = Self {
            node,
            metrics,
            tasks,
            breath,
        };
        let process = Arc::new(process);
        world.server.introduce(&process, Host::Pod(pod));
        (process, running)
    }
}

/// Opens links from one pod to the others.
struct Dialler {
    world: Arc<World>,
    pod: usize,
}

/// What passes between two nodes.
enum Wire {
    Data(Bytes),
    Ping,
    Pong,
}

#[async_trait]
impl Dial for Dialler {
    async fn dial(&self, address: &str) -> Result<Link, LinkError> {
        let target = address
            .strip_prefix("node-")
            .and_then(|rest| rest.strip_suffix(":8081"))
            .and_then(|number| number.parse().ok())
            .ok_or_else(|| LinkError::Broken(format!("there is no {address}")))?;
        let (from, to) = (Host::Pod(self.pod), Host::Pod(target));
        let network = &self.world.network;
        sleep(network.delay(from, to)).await;
        network.uncut(from, to).await;
        let process = match self.world.listener(target) {
            Listener::Process(process) => process,
            Listener::Nobody => {
                sleep(network.delay(to, from)).await;
                network.uncut(to, from).await;
                return Err(LinkError::Refused);
            }
            Listener::NoHost => std::future::pending().await,
        };
        let connection = network.connection(from, to);
        let there = network.pipe::<Wire>(&connection, (from, to), 1_024);
        let back = network.pipe::<Wire>(&connection, (to, from), 1_024);
        let answers = process.node.members.incarnation();
        let near = link(&connection, Some(answers), there.0, back.1);
        let far = link(&connection, None, back.0, there.1);
        let (accepted, accepts) = oneshot::channel();
        let (documents, metrics) = (process.node.documents.clone(), process.metrics.clone());
        // A process that stands still does not answer the handshake.
        process.tasks.spawn(async move {
            let _ = accepted.send(());
            peers::serve(far, documents, metrics).await;
        });
        let refused = accepts.await.is_err();
        sleep(network.delay(to, from)).await;
        network.uncut(to, from).await;
        if refused || connection.is_broken() {
            return Err(LinkError::Broken("the connection was reset".to_owned()));
        }
        Ok(near)
    }
}

/// One end of a connection between nodes.
fn link(
    connection: &Arc<Connection>,
    answers: Option<Uuid>,
    to: mpsc::Sender<(Instant, Wire)>,
    from: mpsc::Receiver<Wire>,
) -> Link {
    let pong = to.clone();
    let frames = |frame| {
        let wire = match frame {
            Frame::Data(data) => Wire::Data(data),
            Frame::Alive => Wire::Ping,
        };
        std::future::ready(Ok((Instant::now(), wire)))
    };
    let outgoing = PollSender::new(to)
        .sink_map_err(|_| LinkError::Broken("the connection was reset".to_owned()))
        .with(frames);
    let connection = connection.clone();
    let incoming = futures::stream::unfold(from, |mut from| async move {
        from.recv().await.map(|wire| (wire, from))
    })
    .map(move |wire| {
        if connection.is_broken() {
            return Err(LinkError::Broken("the connection was reset".to_owned()));
        }
        Ok(match wire {
            Wire::Data(data) => Frame::Data(data),
            Wire::Ping => {
                let _ = pong.try_send((Instant::now(), Wire::Pong));
                Frame::Alive
            }
            Wire::Pong => Frame::Alive,
        })
    });
    Link {
        answers,
        outgoing: Box::pin(outgoing),
        incoming: Box::pin(incoming) as Pin<Box<_>>,
    }
}

/// Who takes connections at a pod.
pub(crate) enum Listener {
    /// A process, alive or standing still.
    Process(Arc<Process>),
    /// The host is there, nobody listens.
    Nobody,
    /// The host is not there.
    NoHost,
}
