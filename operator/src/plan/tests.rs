//! Each test is a script: what is seen, and the plan as text. Most compare only what is done about
//! nodes; `the_first_plan` shows a whole one.

use std::collections::BTreeMap;

use collab_core::control::{
    Activity, ClusterReport, DocumentLoad, LoadSample, MemberReport, MemberState, NodeLoad,
    PinReport, Silence, SlotLoad, StoreReport,
};
use collab_core::ids::{DocumentId, NodeId, Slot, Term};
use collab_core::quarantine::Quarantine;
use collab_crds::CollabCluster;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::plan;
use crate::build::tests::{cluster, credentials, images};
use crate::model::{Action, Memory, Observed, Plan, PodMonitorView, PodView, SetView};

#[test]
fn the_first_plan() {
    let nothing = Observed {
        credentials: credentials(false),
        postgres_is_bare: true,
        pod_monitor: PodMonitorView::Absent,
        ..Observed::default()
    };
    insta::assert_snapshot!(look(&dev(3), &nothing, &mut Memory::default()));
}

#[test]
fn nodes_that_have_joined_are_given_slots() {
    let mut world = World::of(&["Active", "Active", "Active"]);
    world.owners = Owners::Nobody;
    insta::assert_snapshot!(nodes_only(&look(
        &dev(3),
        &world.observed(),
        &mut Memory::default()
    )));
}

#[test]
fn a_settled_cluster_is_left_alone() {
    let mut memory = Memory::default();
    let world = World::of(&["Active", "Active", "Active"]);
    look(&dev(3), &world.observed(), &mut memory);
    assert_eq!(
        nodes_only(&look(&dev(3), &world.observed(), &mut memory)),
        "want 3 nodes\n"
    );
}

#[test]
fn a_placement_that_is_not_reached_is_asked_for_again() {
    let mut memory = Memory::default();
    let mut world = World::of(&["Active", "Active"]);
    world.owners = Owners::Nobody;
    let asked = [0, 10, 29, 31].map(|seconds| {
        let plan = plan_at(&dev(2), &world.observed(), &mut memory, seconds);
        plan.to_string().contains("\nplace ")
    });
    assert_eq!(asked, [true, false, false, true]);
}

#[test]
fn a_drained_predecessor_does_not_speak_for_its_pod() {
    let mut observed = World::of(&["Active", "Drained"]).observed();
    observed.pods[1].uid = "successor".to_owned();
    let text = nodes_only(&look(&dev(2), &observed, &mut Memory::default()));
    assert!(!text.contains("drain"), "{text}");
}

#[test]
fn a_suspended_cluster_is_not_touched() {
    let world = World::of(&["Active", "Draining", "Lost"]);
    let suspended = cluster("{profile: Dev, suspended: true, nodes: {replicas: 1}}");
    let plan = look(&suspended, &world.observed(), &mut Memory::default());
    assert!(plan.actions.is_empty());
}

#[test]
fn scale_in_drains_waits_and_only_then_removes() {
    let mut memory = Memory::default();
    let mut world = World::of(&["Active", "Active", "Active"]);
    let mut told = String::new();
    for state in ["Active", "Draining", "Drained"] {
        world.nodes[2] = state;
        note(
            &mut told,
            &format!("demo-node-2 is {state}"),
            &nodes_only(&look(&dev(2), &world.observed(), &mut memory)),
        );
    }
    let smaller = World::of(&["Active", "Active"]);
    note(
        &mut told,
        "demo-node-2 is gone",
        &nodes_only(&look(&dev(2), &smaller.observed(), &mut memory)),
    );
    insta::assert_snapshot!(told);
}

#[test]
fn two_nodes_too_many_leave_one_after_the_other() {
    let world = World::of(&["Active", "Active", "Active"]);
    let text = nodes_only(&look(&dev(1), &world.observed(), &mut Memory::default()));
    assert!(
        text.contains("drain demo-node-2\n") && !text.contains("demo-node-1\n"),
        "{text}"
    );
}

#[test]
fn a_lost_node_is_removed_only_when_its_slots_are_adopted() {
    let mut world = World::of(&["Active", "Active", "Lost"]);
    world.owners = Owners::AllThree;
    let text = nodes_only(&look(&dev(2), &world.observed(), &mut Memory::default()));
    assert!(
        text.contains("wait for others to adopt the 85 slots of demo-node-2"),
        "{text}"
    );
    assert_eq!(
        replicas(&look(&dev(2), &world.observed(), &mut Memory::default())),
        3
    );
    world.owners = Owners::TheLive;
    assert_eq!(
        replicas(&look(&dev(2), &world.observed(), &mut Memory::default())),
        2
    );
}

#[test]
fn a_flapping_node_is_given_nothing_and_then_its_share_little_by_little() {
    let mut memory = Memory::default();
    let mut world = World::reached(&["Active", "Active", "Active"]);
    let mut told = String::new();
    look(&dev(3), &world.observed(), &mut memory);
    for share in [Some(0), Some(25), Some(50), Some(75), Some(100), None] {
        world.quarantined = share.map(|share| (1, share)).into_iter().collect();
        let plan = look(&dev(3), &world.observed(), &mut memory);
        world.accept(&plan);
        world.arrive();
        let what = share.map_or_else(
            || "demo-node-1 is as good as any".to_owned(),
            |share| format!("demo-node-1 is given {share} %"),
        );
        note(&mut told, &what, &nodes_only(&plan));
    }
    insta::assert_snapshot!(told);
}

#[test]
fn a_node_that_the_others_do_not_hear_is_fenced_and_given_nothing_until_they_do() {
    let mut memory = Memory::default();
    let mut world = World::reached(&["Active", "Active", "Active"]);
    let mut told = String::new();
    look(&dev(3), &world.observed(), &mut memory);
    for (what, unheard) in [
        ("nobody hears demo-node-1", Some(1)),
        ("its slots were adopted", Some(1)),
        ("it is heard again", None),
    ] {
        world.unheard = unheard;
        let plan = look(&dev(3), &world.observed(), &mut memory);
        world.accept(&plan);
        world.arrive();
        note(&mut told, what, &nodes_only(&plan));
    }
    insta::assert_snapshot!(told);
}

#[test]
fn nothing_is_removed_while_no_node_reports() {
    let mut world = World::of(&["Active", "Active", "Active"]);
    world.silent = true;
    let plan = look(&dev(2), &world.observed(), &mut Memory::default());
    assert_eq!(replicas(&plan), 3);
    assert!(
        plan.waits[0].starts_with("for a node that answers"),
        "{plan}"
    );
}

#[test]
fn scale_out_takes_a_drain_back_first() {
    let world = World::of(&["Active", "Active", "Draining"]);
    insta::assert_snapshot!(nodes_only(&look(
        &dev(4),
        &world.observed(),
        &mut Memory::default()
    )));
}

#[test]
fn to_no_node_at_all_everything_goes_at_once() {
    let world = World::of(&["Active", "Active"]);
    assert_eq!(
        replicas(&look(&dev(0), &world.observed(), &mut Memory::default())),
        0
    );
}

#[test]
fn a_rollout_replaces_one_drained_pod_at_a_time() {
    let mut memory = Memory::default();
    let mut world = World::of(&["Active", "Active", "Active"]);
    world.newest = "new";
    let mut told = String::new();
    for state in ["Active", "Draining", "Drained", "Ending", "Starting"] {
        world.nodes[2] = state;
        note(
            &mut told,
            &format!("demo-node-2 is {state}"),
            &nodes_only(&look(&dev(3), &world.observed(), &mut memory)),
        );
    }
    world.nodes[2] = "Active";
    world.updated = vec![2];
    note(
        &mut told,
        "demo-node-2 is new",
        &nodes_only(&look(&dev(3), &world.observed(), &mut memory)),
    );
    insta::assert_snapshot!(told);
}

#[test]
fn a_broken_pod_of_an_old_template_is_replaced_at_once() {
    let mut world = World::of(&["Active", "Active", "Broken"]);
    world.newest = "new";
    let text = nodes_only(&look(&dev(3), &world.observed(), &mut Memory::default()));
    assert!(text.contains("delete Pod demo-node-2\n"), "{text}");
}

#[test]
fn the_only_node_is_replaced_without_a_drain() {
    let mut world = World::of(&["Active"]);
    world.newest = "new";
    let text = nodes_only(&look(&dev(1), &world.observed(), &mut Memory::default()));
    assert!(text.contains("delete Pod demo-node-0\n"), "{text}");
}

#[test]
fn a_pod_on_a_silent_machine_is_forgotten_after_a_minute() {
    for (silent_for, forgotten) in [(59, false), (61, true)] {
        let mut observed = World::of(&["Active", "Active", "Lost"]).observed();
        observed.pods[2].lost_since = Some(now() - SignedDuration::from_secs(silent_for));
        let text = nodes_only(&look(&dev(3), &observed, &mut Memory::default()));
        assert_eq!(
            text.contains("delete Pod demo-node-2 without waiting\n"),
            forgotten,
            "{text}"
        );
    }
}

#[test]
fn a_loss_is_told_and_holds_scale_in_back() {
    let scaled = cluster(
        "{profile: Dev, placement: {slots: 256}, autoscaling: {enabled: true, minNodes: 1, targetConnectionsPerNode: 100, scaleDownWindowSeconds: 0, cooldownAfterFailoverSeconds: 60}}",
    );
    let mut memory = Memory {
        desired: Some(3),
        ..Memory::default()
    };
    let mut world = World::of(&["Active", "Active", "Active"]);
    world.connections = 300;
    look(&scaled, &world.observed(), &mut memory);
    world.nodes[2] = "Lost";
    world.adoptions = 85;
    let lost = nodes_only(&look(&scaled, &world.observed(), &mut memory));
    world.nodes[2] = "Active";
    world.connections = 10;
    let back = nodes_only(&look(&scaled, &world.observed(), &mut memory));
    let later = nodes_only(&plan_at(&scaled, &world.observed(), &mut memory, 120));
    insta::assert_snapshot!(format!(
        "-- lost\n{lost}-- back\n{back}-- two minutes later\n{later}"
    ));
}

#[test]
fn connections_add_a_node_and_take_it_back() {
    let scaled = cluster(
        "{profile: Dev, placement: {slots: 256}, autoscaling: {enabled: true, targetConnectionsPerNode: 80, scaleDownWindowSeconds: 30}}",
    );
    let mut memory = Memory {
        desired: Some(2),
        ..Memory::default()
    };
    let mut world = World::of(&["Active", "Active"]);
    world.connections = 200;
    let out = plan_at(&scaled, &world.observed(), &mut memory, 0);
    assert_eq!((out.scaling.desired, replicas(&out)), (3, 3));
    let mut world = World::of(&["Active", "Active", "Active"]);
    let soon = plan_at(&scaled, &world.observed(), &mut memory, 20);
    assert_eq!((soon.scaling.desired, replicas(&soon)), (3, 3));
    let later = plan_at(&scaled, &world.observed(), &mut memory, 40);
    assert_eq!((later.scaling.desired, replicas(&later)), (2, 3));
    world.nodes[2] = "Drained";
    assert_eq!(
        replicas(&plan_at(&scaled, &world.observed(), &mut memory, 50)),
        2
    );
}

#[test]
fn an_operator_that_just_started_goes_on_from_the_status() {
    let mut scaled = cluster(
        "{profile: Dev, placement: {slots: 256}, autoscaling: {enabled: true, targetConnectionsPerNode: 100}}",
    );
    scaled.status = serde_yaml::from_str("{observedGeneration: 1, nodes: {desired: 5}}").unwrap();
    let world = World::of(&["Active"; 5]);
    let plan = look(&scaled, &world.observed(), &mut Memory::default());
    assert_eq!((plan.scaling.desired, replicas(&plan)), (5, 5));
}

#[test]
fn slots_move_by_load_some_at_a_time_and_rest_after() {
    let cluster = balanced("rebalance: {maxConcurrentMoves: 2}");
    let (mut world, mut memory) = (
        World::reached(&["Active", "Active", "Active"]),
        Memory::default(),
    );
    // Every slot of the first node has 3 points, and one of them 60.
    world.slot_loads = (0..85).map(|number| (3 * number, 3)).collect();
    world.slot_loads.push((255, 60));
    let mut told = String::new();
    for (seconds, arrive) in [
        (0, true),
        (2, false),
        (4, true),
        (6, true),
        (31, true),
        (62, true),
    ] {
        let plan = plan_at(&cluster, &world.observed(), &mut memory, seconds);
        note(&mut told, &format!("after {seconds} s"), &nodes_only(&plan));
        world.accept(&plan);
        if arrive {
            world.arrive();
        }
    }
    insta::assert_snapshot!(told);
}

#[test]
fn a_person_is_told_what_would_be_moved() {
    let cluster = balanced("rebalance: {mode: Manual}");
    let mut world = World::reached(&["Active", "Active", "Active"]);
    world.slot_loads = vec![(0, 300), (3, 120), (6, 40), (1, 10)];
    insta::assert_snapshot!(nodes_only(&look(
        &cluster,
        &world.observed(),
        &mut Memory::default()
    )));
}

#[test]
fn nothing_moves_by_load_while_nodes_come_and_go_or_one_is_silent() {
    let cluster = balanced("slots: 256");
    let mut world = World::reached(&["Active", "Active", "Active"]);
    world.slot_loads = vec![(0, 300), (3, 120), (6, 40), (1, 10)];
    let moves = |world: &World| {
        look(&cluster, &world.observed(), &mut Memory::default())
            .moves
            .len()
    };
    assert_ne!(moves(&world), 0);
    world.newest = "new";
    assert_eq!(moves(&world), 0, "a rollout");
    world.newest = "old";
    world.tell_loads = 2;
    let plan = look(&cluster, &world.observed(), &mut Memory::default());
    assert!(plan.moves.is_empty());
    assert_eq!(
        plan.waits,
        ["for the load of demo-node-2, before slots are moved by it"]
    );
}

#[test]
fn a_node_that_joins_a_balanced_cluster_gets_its_share_and_the_balance_stays() {
    let mut world = World::reached(&["Active", "Active"]);
    // The load has taken ten slots from the first node.
    for slot in 0..10 {
        world.planned[2 * slot] = Some(1);
    }
    world.owners = Owners::Given(world.planned.clone());
    let plan = look(
        &balanced("slots: 256"),
        &world.observed(),
        &mut Memory::default(),
    );
    let place = "\nplace 256 slots, 0 to move: demo-node-0 118 demo-node-1 138\n";
    assert!(plan.to_string().contains(place), "{plan}");
    world.nodes.push("Active");
    let text = nodes_only(&look(&dev(3), &world.observed(), &mut Memory::default()));
    assert!(
        text.contains(
            "place 256 slots, 85 to move: demo-node-0 86 demo-node-1 85 demo-node-2 85\n"
        ),
        "{text}"
    );
}

#[test]
fn a_hot_document_is_pinned_its_neighbours_leave_and_it_cools() {
    let cluster = balanced("hotDocuments: {pinned: [minutes, '']}");
    let (mut world, mut memory) = (World::reached(&["Active", "Active"]), Memory::default());
    world.slot_loads = (0..256).map(|slot| (slot, 1)).collect();
    world.slot_loads[0].1 = 150;
    world.documents = vec![("hot", 149), ("warm", 90)];
    let mut told = String::new();
    let mut see = |world: &mut World, when: &str, seconds: i64| {
        let plan = plan_at(&cluster, &world.observed(), &mut memory, seconds);
        note(&mut told, when, &nodes_only(&plan));
        world.accept(&plan);
        world.arrive();
    };
    see(&mut world, "it is hot", 0);
    world.slot_loads[0].1 = 1;
    world.slot_loads.push((257, 149));
    see(&mut world, "it is pinned", 31);
    // Not as hot as what pins, but not cold.
    let last = world.slot_loads.len() - 1;
    world.documents.clear();
    world.slot_loads[last].1 = 60;
    see(&mut world, "it is warm", 62);
    world.slot_loads[last].1 = 10;
    see(&mut world, "it is cold", 93);
    see(&mut world, "it is cold for half an hour", 62 + 30 * 60);
    insta::assert_snapshot!(told);
}

#[test]
fn pins_stay_where_they_are_through_an_operator_that_starts_and_a_load_that_is_not_told() {
    let mut world = World::reached(&["Active", "Active"]);
    world.pins = vec![("hot", 0)];
    let cluster = balanced("slots: 256");
    let mut memory = Memory::default();
    let plan = look(&cluster, &world.observed(), &mut memory);
    assert!(!plan.to_string().contains("unpin"), "{plan}");
    world.tell_loads = 1;
    let plan = plan_at(&cluster, &world.observed(), &mut memory, 3 * 3600);
    assert!(!plan.to_string().contains("unpin"), "{plan}");
    let manual = balanced("hotDocuments: {mode: Manual}");
    let plan = look(&manual, &world.observed(), &mut Memory::default());
    assert!(plan.to_string().contains("\nunpin hot\n"), "{plan}");
}

#[test]
fn the_slot_of_a_pin_leaves_with_a_drain() {
    let mut world = World::reached(&["Active", "Active", "Active"]);
    world.pins = vec![("hot", 2)];
    let text = nodes_only(&look(&dev(2), &world.observed(), &mut Memory::default()));
    let place = text
        .lines()
        .find(|line| line.starts_with("place "))
        .unwrap();
    assert!(place.contains("256 slots, 86 to move"), "{text}");
    assert!(
        place.contains(", 256 of a pin demo-node-") && !place.ends_with('2'),
        "{text}"
    );
}

#[test]
fn the_ring_alone_decides_where_the_spec_says_so() {
    let cluster = balanced("policy: Ring");
    let mut world = World::reached(&["Active", "Active", "Active"]);
    world.slot_loads = vec![(0, 300), (3, 120), (6, 40), (1, 10)];
    let plan = look(&cluster, &world.observed(), &mut Memory::default());
    assert!(plan.moves.is_empty() && plan.balance.is_none());
    insta::assert_snapshot!(nodes_only(&plan));
}

#[test]
fn zones_are_told_once() {
    let mut observed = World::of(&["Active", "Active", "Starting"]).observed();
    for (pod, zone) in observed.pods.iter_mut().zip(["a", "b", "c"]) {
        pod.zone = Some(zone.to_owned());
    }
    let told = |observed: &Observed| {
        let plan = look(&dev(3), observed, &mut Memory::default());
        let lines = plan
            .actions
            .iter()
            .filter(|action| matches!(action, Action::TellZones(_)));
        lines.map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(told(&observed), ["tell zones: demo-node-0 a demo-node-1 b"]);
    let report = observed.report.as_mut().unwrap();
    for (member, zone) in report.members.iter_mut().zip(["a", "b"]) {
        member.zone = zone.to_owned();
    }
    assert!(told(&observed).is_empty());
}

proptest::proptest! {
    /// Whatever state nodes are in and whatever is wanted: no slot is lost with a pod.
    #[test]
    fn no_pod_that_holds_slots_is_removed(
        states in proptest::collection::vec(0_usize..5, 1..6),
        wanted in 1_i32..6,
        all_hold in proptest::bool::ANY,
        outdated in proptest::bool::ANY,
    ) {
        let names = ["Active", "Draining", "Drained", "Lost", "Starting"];
        let mut world = World::of(&states.iter().map(|state| names[*state]).collect::<Vec<_>>());
        world.owners = if all_hold { Owners::AllThree } else { Owners::TheLive };
        world.newest = if outdated { "new" } else { "old" };
        let observed = world.observed();
        let plan = look(&dev(wanted), &observed, &mut Memory::default());
        let kept = replicas(&plan);
        let others_serve = |pod: &PodView| observed.members().iter().any(|member| {
            member.live && member.state == MemberState::Active && member.node.0 != pod.name
        });
        for pod in &observed.pods {
            let held: u16 = observed.members().iter().filter(|member| member.node.0 == pod.name).map(|member| member.slots_owned).sum();
            let removed = kept <= pod.ordinal || plan.to_string().contains(&format!("delete Pod {}\n", pod.name));
            proptest::prop_assert!(!removed || held == 0 || !others_serve(pod), "{plan}");
        }
    }
}

fn now() -> Timestamp {
    Timestamp::from_second(1_700_000_000).unwrap()
}

fn dev(replicas: i32) -> CollabCluster {
    cluster(&format!(
        "{{profile: Dev, placement: {{slots: 256}}, nodes: {{replicas: {replicas}}}}}"
    ))
}

/// As many nodes as there are, with this in `spec.placement`.
fn balanced(placement: &str) -> CollabCluster {
    let mut cluster = cluster(&format!(
        "{{profile: Dev, placement: {{{placement}}}, nodes: {{replicas: 3}}}}"
    ));
    cluster.spec.placement.slots = 256;
    cluster
}

fn look(cluster: &CollabCluster, observed: &Observed, memory: &mut Memory) -> Plan {
    plan_at(cluster, observed, memory, 0)
}

/// Plans, and remembers what the store would have granted and accepted.
fn plan_at(
    cluster: &CollabCluster,
    observed: &Observed,
    memory: &mut Memory,
    seconds: i64,
) -> Plan {
    let plan = plan(
        cluster,
        observed,
        memory,
        &images(),
        now() + SignedDuration::from_secs(seconds),
    );
    *memory = plan.memory.clone();
    memory.term = observed.report.as_ref().map(|_| Term(1));
    if let Some(placement) = &plan.placement
        && plan.to_string().contains(
            "
place ",
        )
    {
        let at = now() + SignedDuration::from_secs(seconds);
        memory.placed = Some((placement.hash.clone(), at));
    }
    plan
}

/// Adds a step of a script to what was told.
fn note(told: &mut String, when: &str, plan: &str) {
    told.push_str("-- ");
    told.push_str(when);
    told.push('\n');
    told.push_str(plan);
}

/// The lines about nodes; what is built for the cluster has tests of its own.
fn nodes_only(plan: &Plan) -> String {
    let unchanged = format!("apply StatefulSet demo-node of {}", plan.scaling.desired);
    let text = plan.to_string();
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("apply ") || line.contains("StatefulSet demo-node "))
        .filter(|line| *line != unchanged)
        .chain([""])
        .collect();
    lines.join("\n")
}

fn replicas(plan: &Plan) -> i32 {
    plan.to_string()
        .lines()
        .find_map(|line| line.strip_prefix("apply StatefulSet demo-node of "))
        .unwrap()
        .parse()
        .unwrap()
}

enum Owners {
    Nobody,
    /// Slots are with live members that own.
    TheLive,
    /// Slots are with all members, dead ones too.
    AllThree,
    /// Slots are with these.
    Given(Vec<Option<u16>>),
}

/// Nodes by ordinal, each in a state: those of members, and Lost, Broken (never registered, does not
/// start), Ending (told to end, member drained), Starting.
struct World {
    nodes: Vec<&'static str>,
    owners: Owners,
    newest: &'static str,
    updated: Vec<usize>,
    connections: u32,
    adoptions: u64,
    silent: bool,
    /// The placement in force.
    planned: Vec<Option<u16>>,
    /// Documents with a slot of their own, and its owner.
    pins: Vec<(&'static str, u16)>,
    /// Points of slots.
    slot_loads: Vec<(u16, u32)>,
    /// Points of documents.
    documents: Vec<(&'static str, u32)>,
    /// So many nodes tell their load.
    tell_loads: usize,
    /// Nodes in quarantine, with the share that they are given, in percent.
    quarantined: BTreeMap<usize, u32>,
    /// The node that no other one hears.
    unheard: Option<usize>,
}

impl World {
    fn of(nodes: &[&'static str]) -> Self {
        Self {
            nodes: nodes.to_vec(),
            owners: Owners::TheLive,
            newest: "old",
            updated: Vec::new(),
            connections: 0,
            adoptions: 0,
            silent: false,
            planned: Vec::new(),
            pins: Vec::new(),
            slot_loads: Vec::new(),
            documents: Vec::new(),
            tell_loads: nodes.len(),
            quarantined: BTreeMap::new(),
            unheard: None,
        }
    }

    /// Every slot is where the placement in force wants it.
    fn reached(nodes: &[&'static str]) -> Self {
        let count = u16::try_from(nodes.len()).unwrap();
        let planned: Vec<_> = (0..256).map(|slot| Some(slot % count)).collect();
        Self {
            owners: Owners::Given(planned.clone()),
            planned,
            ..Self::of(nodes)
        }
    }

    /// The nodes have done what the store accepted.
    fn arrive(&mut self) {
        if !self.planned.is_empty() {
            self.owners = Owners::Given(self.planned.clone());
        }
    }

    /// The store has accepted a plan.
    fn accept(&mut self, plan: &Plan) {
        for action in &plan.actions {
            match action {
                Action::Place(placement) => {
                    let named = |index: u16| {
                        let name = &placement.nodes[usize::from(index)].0;
                        name.rsplit('-').next().unwrap().parse::<u16>().unwrap()
                    };
                    self.planned = placement
                        .slots
                        .iter()
                        .map(|index| Some(named(*index)))
                        .collect();
                    for (pin, place) in self.pins.iter_mut().zip(&placement.pins) {
                        pin.1 = named(place.node);
                    }
                }
                Action::Pin {
                    document,
                    pin: true,
                } => {
                    let known = ["hot", "minutes", "warm"];
                    let document = known.into_iter().find(|known| *known == document.as_str());
                    self.pins.push((document.unwrap(), 0));
                    self.pins
                        .sort_by_key(|(document, _)| *document != "minutes");
                }
                Action::Pin { document, .. } => {
                    self.pins.retain(|(pinned, _)| *pinned != document.as_str());
                }
                _ => {}
            }
        }
    }

    /// Every node tells what the owners of slots have to do; all documents are told by the first.
    fn loads(&self, report: &ClusterReport) -> Vec<NodeLoad> {
        let activity = |points| Activity {
            connections: points,
            ..Activity::default()
        };
        let load = |index: u16, member: &MemberReport| {
            let owns = |slot: &u16| {
                let pinned = || report.pins.iter().find(|pin| pin.slot.0 == *slot)?.owner;
                report
                    .owners
                    .get(usize::from(*slot))
                    .copied()
                    .unwrap_or_else(pinned)
                    == Some(index)
            };
            let slots = self.slot_loads.iter().filter(|(slot, _)| owns(slot));
            let documents = self.documents.iter().filter(|_| index == 0);
            NodeLoad {
                incarnation: member.incarnation,
                slots: slots
                    .map(|(slot, points)| SlotLoad {
                        slot: Slot(*slot),
                        documents: 1,
                        activity: activity(*points),
                    })
                    .collect(),
                documents: documents
                    .map(|(document, points)| DocumentLoad {
                        document: DocumentId::new(document).unwrap(),
                        activity: activity(*points),
                    })
                    .collect(),
            }
        };
        let members = (0..).zip(&report.members).take(self.tell_loads);
        members.map(|(index, member)| load(index, member)).collect()
    }

    fn observed(&self) -> Observed {
        let serving = self
            .nodes
            .iter()
            .filter(|state| **state == "Active")
            .count();
        Observed {
            node_set: Some(SetView {
                replicas: i32::try_from(self.nodes.len()).unwrap(),
                ready: i32::try_from(serving).unwrap(),
                updated: 0,
                revision: Some(self.newest.to_owned()),
            }),
            postgres_set: Some(SetView::default()),
            redis_set: Some(SetView::default()),
            pods: (0..self.nodes.len())
                .map(|ordinal| self.pod(ordinal))
                .collect(),
            credentials: credentials(true),
            loads: self.loads(&self.report()),
            report: (!self.silent).then(|| self.report()),
            ..Observed::default()
        }
    }

    fn pod(&self, ordinal: usize) -> PodView {
        let state = self.nodes[ordinal];
        PodView {
            name: format!("demo-node-{ordinal}"),
            ordinal: i32::try_from(ordinal).unwrap(),
            uid: format!("uid-{ordinal}"),
            ip: Some(format!("10.0.0.{ordinal}")),
            ready: state == "Active",
            revision: if self.updated.contains(&ordinal) || state == "Starting" {
                self.newest
            } else {
                "old"
            }
            .to_owned(),
            ends_at: (state == "Ending").then(now),
            zone: None,
            lost_since: None,
            trouble: (state == "Broken").then(|| "ImagePullBackOff".to_owned()),
        }
    }

    fn report(&self) -> ClusterReport {
        let mut members: Vec<MemberReport> = self
            .nodes
            .iter()
            .enumerate()
            .filter(|(_, state)| !["Broken", "Starting"].contains(state))
            .map(|(ordinal, state)| MemberReport {
                node: NodeId(format!("demo-node-{ordinal}")),
                incarnation: uuid::Uuid::from_u128(u128::try_from(ordinal).unwrap()),
                pod_uid: format!("uid-{ordinal}"),
                address: String::new(),
                zone: String::new(),
                state: match *state {
                    "Draining" => MemberState::Draining,
                    "Drained" | "Ending" => MemberState::Drained,
                    _ => MemberState::Active,
                },
                live: *state != "Lost",
                slots_owned: 0,
                load: Some(LoadSample {
                    connections: if ordinal == 0 { self.connections } else { 0 },
                    silences: self
                        .unheard
                        .filter(|unheard| *unheard != ordinal)
                        .map(|unheard| Silence {
                            node: NodeId(format!("demo-node-{unheard}")),
                            ms: 3_100,
                        })
                        .into_iter()
                        .collect(),
                    ..LoadSample::default()
                }),
                load_age_ms: 300,
                quarantine: self
                    .quarantined
                    .get(&ordinal)
                    .map(|share_percent| Quarantine {
                        leases_lost: 3,
                        share_percent: *share_percent,
                        next_step_ms: 1_000,
                    }),
            })
            .collect();
        let may_own: Vec<u16> = (0..)
            .zip(&members)
            .filter(|(_, member)| match self.owners {
                Owners::Nobody | Owners::Given(_) => false,
                Owners::TheLive => member.live && member.state != MemberState::Drained,
                Owners::AllThree => true,
            })
            .map(|(index, _)| index)
            .collect();
        let owners: Vec<Option<u16>> = match &self.owners {
            Owners::Given(owners) => owners.clone(),
            _ => (0..256)
                .map(|slot| may_own.get(slot % may_own.len().max(1)).copied())
                .collect(),
        };
        let pins = (256..)
            .zip(&self.pins)
            .map(|(slot, (document, owner))| PinReport {
                document: DocumentId::new(document).unwrap(),
                slot: Slot(slot),
                owner: Some(*owner),
                planned: Some(*owner),
            });
        let pins: Vec<_> = pins.collect();
        for owner in owners
            .iter()
            .chain(pins.iter().map(|pin| &pin.owner))
            .flatten()
        {
            members[usize::from(*owner)].slots_owned += 1;
        }
        ClusterReport {
            slots: 256,
            members,
            owners,
            pins,
            planned: self.planned.clone(),
            adoptions: self.adoptions,
            store: StoreReport {
                version: "15.18".to_owned(),
                ..StoreReport::default()
            },
            ..ClusterReport::default()
        }
    }
}
