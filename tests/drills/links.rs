//! Networks, clocks and machines that do not do what they should.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use collab_core::control::{FenceRequest, PlacementRequest};
use collab_core::ids::Term;
use collab_crds::collabcluster::PlacementSpec;
use collab_operator::control::{Control, Node as OperatorsNode};
use collab_operator::plan::grey::{Grey, grey};
use collab_operator::plan::handoff;
use collab_tests::clients::{Reading, idle, now_ms};
use collab_tests::network::Host;
use collab_tests::nodes::CONTROL_TOKEN;
use collab_tests::proxy::Treatment;
use collab_tests::sandbox::{self, Limits};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;
use tokio::time::sleep;

use crate::hostile;
use crate::stores::resident;
use crate::world::{World, since};
use crate::{millis, seconds};

const VICTIM: usize = 0;

fn host_of(world: &World, number: usize) -> Host {
    world.nodes.nodes[number].launch.host.clone()
}

/// It acknowledges nothing more, others take its slots, and its own sockets stay and are served by relaying.
pub(crate) async fn node_from_store(world: &mut World) -> Result<()> {
    world.expect.others = Some(seconds(4));
    world.expect.own = Some(seconds(6));
    world.expect.no_closes = true;
    world.fault(VICTIM).await?;
    world.network.cut(&host_of(world, VICTIM), &world.store)?;
    world.re_owned().await?;
    sleep(seconds(10)).await;
    world.over();
    Ok(())
}

/// Nobody tells it who owns what: its clients are better off elsewhere, and it lets them go.
pub(crate) async fn node_from_everybody(world: &mut World) -> Result<()> {
    world.expect.others = Some(seconds(4));
    world.expect.no_closes_elsewhere = true;
    world.fault(VICTIM).await?;
    let victim = host_of(world, VICTIM);
    world.network.cut(&victim, &world.store)?;
    for other in [1, 2] {
        world.network.cut(&victim, &host_of(world, other))?;
    }
    world.re_owned().await?;
    let (begun, url) = (world.fault_ms(), world.nodes.nodes[VICTIM].url());
    // Its first second without a lease, five alone, and a second to close them all.
    sleep(seconds(10).saturating_sub(since(begun))).await;
    let (let_go, all) = world.ledger(|ledger| {
        let there = ledger.writers.values().filter(|writer| writer.node == url);
        let firsts = there.map(|writer| writer.closes.iter().find(|(at, _)| begun < *at).copied());
        let firsts: Vec<_> = firsts.collect();
        let after: Vec<f64> = firsts.iter().flatten().map(|(at, _)| at - begun).collect();
        (after, firsts.len())
    });
    world.over();
    world.expect(let_go.len() == all, || {
        format!("only {} of its {all} sockets were closed", let_go.len())
    });
    let last = let_go.into_iter().fold(0.0, f64::max);
    world.note(format!("its {all} sockets were closed within {last:.0} ms"));
    Ok(())
}

/// Commits happen, and their node does not hear of them.
pub(crate) async fn replies_of_the_store(world: &mut World) -> Result<()> {
    world.expect.others = Some(seconds(4));
    world.expect.no_closes_elsewhere = true;
    world.fault(VICTIM).await?;
    world
        .network
        .cut_one_way(&world.store, &host_of(world, VICTIM))?;
    sleep(seconds(10)).await;
    Ok(())
}

/// Whoever is at the owner of a document feels nothing.
pub(crate) async fn node_from_node(world: &mut World) -> Result<()> {
    world.expect.silence_at_owners = Some(seconds(3));
    world.expect.owners_stay = true;
    world.expect.no_closes = true;
    world.fault(None).await?;
    for (one, other) in [(0, 1), (1, 2), (0, 2)] {
        world
            .network
            .cut(&host_of(world, one), &host_of(world, other))?;
    }
    world.cache_proxy.treat(Treatment::Stall, Treatment::Stall);
    sleep(seconds(8)).await;
    world.over();
    Ok(())
}

/// The others do not hear a node that keeps its lease. What the operator makes of that is done here once a second.
pub(crate) async fn node_from_other_nodes(world: &mut World) -> Result<()> {
    world.expect.others = Some(seconds(6));
    world.expect.no_closes_elsewhere = true;
    let operator = Operator::start(&world.nodes.nodes[1]).await?;
    operator.look().await?;
    world.nodes.balanced(3).await?;
    world.fault(VICTIM).await?;
    for other in [1, 2] {
        let other = host_of(world, other);
        world.network.cut(&host_of(world, VICTIM), &other)?;
    }
    let (mut fenced, mut left) = (0, None);
    for second in 0..12 {
        let grey = operator.look().await?;
        if !grey.fence.is_empty() {
            fenced += grey.fence.len();
            left.get_or_insert(since(world.fault_ms()));
        }
        let owns = slots_of_victim(world).await?;
        world.expect(second < 8 || owns == 0, || {
            format!("it owns {owns} slots {second} s after it was cut off")
        });
        sleep(seconds(1)).await;
    }
    world.expect(fenced == 1, || format!("it was fenced {fenced} times"));
    world.network.heal_all()?;
    let healed = Instant::now();
    while slots_of_victim(world).await? < 300 && healed.elapsed() < seconds(30) {
        operator.look().await?;
        sleep(seconds(1)).await;
    }
    let back = healed.elapsed();
    world.over();
    world.expect(back < seconds(30), || {
        "it got no slots back after it was heard again".to_owned()
    });
    world.note(format!(
        "fenced after {left:?}; its share was back {} ms after the cut was healed",
        back.as_millis()
    ));
    Ok(())
}

async fn slots_of_victim(world: &World) -> Result<u16> {
    let report = world.nodes.report().await?;
    let name = world.nodes.nodes[VICTIM].name();
    let owns = report.members.iter().filter(|member| member.node.0 == name);
    Ok(owns.map(|member| member.slots_owned).sum())
}

/// The part of the operator that needs no Kubernetes: what it reads of the nodes, decides by its own plan, and asks of them.
struct Operator {
    control: Control,
    address: String,
    term: Term,
}

impl Operator {
    async fn start(node: &collab_tests::nodes::Node) -> Result<Self> {
        let address = node.internal_url().trim_start_matches("http://").to_owned();
        let control = Control::new()?;
        let asked = OperatorsNode {
            address: &address,
            token: CONTROL_TOKEN,
        };
        let term = control.take_term(asked, "drill").await?;
        Ok(Self {
            control,
            address,
            term,
        })
    }

    async fn look(&self) -> Result<Grey> {
        let node = OperatorsNode {
            address: &self.address,
            token: CONTROL_TOKEN,
        };
        let report = self.control.report(node).await?;
        let grey = grey(&report);
        let absent = grey.nodes.keys().cloned().collect();
        let placement = handoff::placement(&report, &absent, &PlacementSpec::default());
        let placement = placement.context("nobody is left")?;
        let request = PlacementRequest {
            term: self.term,
            nodes: placement.nodes,
            slots: placement.slots,
            pins: placement.pins,
        };
        self.control.place(node, &request).await?;
        for (_, incarnation) in &grey.fence {
            let request = FenceRequest {
                term: self.term,
                incarnation: *incarnation,
            };
            self.control.fence(node, &request).await?;
        }
        Ok(grey)
    }
}

pub(crate) async fn clients_cut_off(world: &mut World) -> Result<()> {
    world.fault(VICTIM).await?;
    world.network.cut(&world.clients, &host_of(world, VICTIM))?;
    sleep(seconds(60)).await;
    Ok(())
}

pub(crate) async fn bad_links(world: &mut World) -> Result<()> {
    world.fault(None).await?;
    let slow = Treatment::Delay(millis(100));
    for proxy in world.edge_proxies.iter().chain(&world.store_proxies) {
        proxy.treat(slow, slow);
    }
    sleep(seconds(4)).await;
    for proxy in &world.edge_proxies {
        proxy.treat(Treatment::Stall, Treatment::Pass);
        sleep(seconds(1)).await;
        proxy.treat(Treatment::Pass, Treatment::Stall);
        sleep(seconds(1)).await;
        proxy.reset();
        proxy.heal();
    }
    for proxy in &world.store_proxies {
        proxy.reset();
        proxy.heal();
        sleep(millis(500)).await;
    }
    // Loss: links that are cut for moments too short for anything but a retransmission.
    for round in 0..12 {
        let (one, other) = (host_of(world, round % 3), host_of(world, (round + 1) % 3));
        world.network.cut(&one, &other)?;
        sleep(millis(100)).await;
        world.network.heal(&one, &other)?;
        sleep(millis(200)).await;
    }
    Ok(())
}

/// Sockets of clients that are gone without a FIN are closed, and nobody sees their users any more, within 40 s.
pub(crate) async fn half_open(world: &mut World) -> Result<()> {
    const COUNT: usize = 12;
    let ghosts = world.network.host("ghosts")?;
    let nodes = world.nodes.urls();
    let documents = world.documents.clone();
    let reading = Reading {
        nodes: &nodes,
        documents: &documents,
        token: None,
    };
    let before = connections(world).await?;
    let crowd = collab_tests::clients::idle_on(&ghosts, &reading, COUNT)?;
    crowd
        .until(seconds(20), |connected| *connected == COUNT)
        .await?;
    world.expect.silence = Some(seconds(4));
    world.fault(None).await?;
    for number in 0..3 {
        world.network.cut(&ghosts, &host_of(world, number))?;
    }
    let begun = Instant::now();
    while before + 1.0 < connections(world).await? && begun.elapsed() < seconds(60) {
        sleep(millis(200)).await;
    }
    let took = begun.elapsed();
    world.over();
    world.expect(took < seconds(40), || {
        format!("their sockets were still open after {took:?}")
    });
    world.note(format!(
        "{COUNT} half-open sockets closed after {} ms",
        took.as_millis()
    ));
    Ok(())
}

/// Open client sockets of all nodes.
async fn connections(world: &World) -> Result<f64> {
    let mut sum = 0.0;
    for number in 0..world.nodes.nodes.len() {
        sum += world.nodes.metric(number, "collab_connections").await?;
    }
    Ok(sum)
}

/// A client that asks for a document with megabytes of edits and reads a byte per second is closed; memory stays bounded.
pub(crate) async fn slow_reader(world: &mut World) -> Result<()> {
    let node = &world.nodes.nodes[VICTIM];
    let (url, address) = (node.url(), node.address());
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4096)?;
    let mut stream = socket.connect(address).await?;
    let request = format!(
        "GET /ws/bulk HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    // An empty sync step 1 in a masked frame.
    stream
        .write_all(&[0x82, 0x84, 0, 0, 0, 0, 0, 0, 1, 0])
        .await?;
    world.expect.silence = Some(seconds(4));
    world.fault(None).await?;
    sleep(seconds(2)).await;
    let open = connections(world).await?;
    let before = resident(world, VICTIM);
    let writing = hostile::script(world, "bulk", &url, "bulk");
    let reading = async {
        let begun = Instant::now();
        let mut byte = [0];
        while begun.elapsed() < seconds(90) {
            let _ = tokio::time::timeout(millis(500), stream.read(&mut byte)).await;
            // The socket of `bulk` comes on top while it writes.
            if connections(world).await.is_ok_and(|now| now < open) {
                return Some(begun.elapsed());
            }
            sleep(millis(500)).await;
        }
        None
    };
    let (wrote, closed) = tokio::join!(writing, reading);
    let grown = resident(world, VICTIM).saturating_sub(before) >> 20;
    world.over();
    world.expect(closed.is_some(), || {
        "the slow reader was never closed".to_owned()
    });
    world.expect(grown < 300, || format!("the node grew by {grown} MiB"));
    world.note(format!(
        "closed after {closed:?}, {}; the node grew by {grown} MiB",
        wrote?
    ));
    Ok(())
}

pub(crate) async fn reconnect_storm(world: &mut World) -> Result<()> {
    const COUNT: usize = 5_000;
    let nodes = world.nodes.urls();
    // Ten to a document: in one document everybody would be told of everybody.
    let documents: Vec<String> = (0..COUNT / 10)
        .map(|number| format!("storm/{number}"))
        .collect();
    let reading = Reading {
        nodes: &nodes,
        documents: &documents,
        token: None,
    };
    let crowd = idle(&reading, COUNT)?;
    crowd
        .until(seconds(120), |connected| *connected == COUNT)
        .await?;
    world.expect.others = Some(seconds(5));
    world.expect.no_closes_elsewhere = true;
    world.fault(VICTIM).await?;
    world.nodes.kill(VICTIM)?;
    sleep(seconds(3)).await;
    world.nodes.run(VICTIM)?;
    let started = now_ms();
    crowd
        .until(seconds(60), |connected| *connected == COUNT)
        .await?;
    world.note(format!(
        "{COUNT} sockets back {} ms after the restart",
        since(started).as_millis()
    ));
    crowd.stop().await?;
    Ok(())
}

pub(crate) async fn wall_clock(world: &mut World) -> Result<()> {
    world.expect.silence = Some(seconds(3));
    world.expect.owners_stay = true;
    world.expect.no_closes = true;
    world.fault(VICTIM).await?;
    for hours in [1, -1] {
        world.clock.shift_clock(hours * 3600)?;
        sleep(seconds(4)).await;
    }
    world.clock.shift_clock(0)?;
    sleep(seconds(1)).await;
    world.over();
    Ok(())
}

pub(crate) async fn clock_steps_while_frozen(world: &mut World) -> Result<()> {
    world.expect.others = Some(seconds(4));
    world.expect.no_closes_elsewhere = true;
    world.fault(VICTIM).await?;
    world.nodes.signal(VICTIM, "STOP")?;
    while since(world.fault_ms()) < seconds(4) {
        world.clock.shift_clock(rand::random_range(-3600..3600))?;
        sleep(millis(200)).await;
    }
    world.nodes.signal(VICTIM, "CONT")?;
    sleep(seconds(2)).await;
    Ok(())
}

/// Memory that is nearly used up: documents are closed or refused before the kernel ends the node.
pub(crate) async fn out_of_memory(world: &mut World) -> Result<()> {
    world.fault(VICTIM).await?;
    let node = &world.nodes.nodes[VICTIM];
    let (url, pid) = (node.url(), node.pid().unwrap_or(0));
    let limits = Limits {
        memory_bytes: Some(48 << 20),
        cpu_percent: None,
    };
    sandbox::confine(pid, "tight", limits)?;
    let before = resident(world, VICTIM);
    let said = hostile::script(world, "many", &url, "many").await?;
    let runs = world.nodes.runs(VICTIM);
    world.expect(runs, || "the kernel ended the node".to_owned());
    let after = resident(world, VICTIM);
    world.note(format!(
        "{said}; resident {} to {} MiB of {} more",
        before >> 20,
        after >> 20,
        48
    ));
    Ok(())
}

/// Five per cent of a processor: the node may lose its slots, safely.
pub(crate) async fn starved(world: &mut World) -> Result<()> {
    let pid = world.nodes.nodes[VICTIM].pid().unwrap_or(0);
    let share = |cpu_percent| Limits {
        memory_bytes: None,
        cpu_percent: Some(cpu_percent),
    };
    world.fault(VICTIM).await?;
    sandbox::confine(pid, "slow", share(5))?;
    sleep(seconds(10)).await;
    sandbox::confine(pid, "slow", share(400))?;
    sleep(Duration::from_secs(2)).await;
    Ok(())
}
