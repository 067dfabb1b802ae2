use collab_core::limits::{LEASE_RENEW_EVERY, SLOTS_MIN};

use super::*;

const ME: Uuid = Uuid::from_u128(1);
const OTHER: Uuid = Uuid::from_u128(2);

#[test]
fn the_candidates_of_a_slot_count_from_the_end_of_the_lease_and_not_from_their_last_look() {
    let ended = Instant::now();
    let gone = || member(OTHER, Duration::ZERO);
    let before = Known::learned(member(OTHER, LEASE), ended - LEASE, None);
    let later = |pause| Known::learned(gone(), ended + pause, Some(&before)).lease_end;
    assert_eq!(later(LEASE_RENEW_EVERY), ended);
    // Fenced while the lease was running: it ended when that was heard.
    let fenced = ended - LEASE / 2;
    assert_eq!(
        Known::learned(gone(), fenced, Some(&before)).lease_end,
        fenced
    );
    assert_eq!(Known::learned(gone(), ended, None).lease_end, ended);
}

#[test]
fn a_peer_tells_of_newer_owners_and_where_they_are_and_of_nothing_older() {
    let now = Instant::now();
    let map = |owner, epoch, members: Vec<Member>| Map {
        slots: 1,
        pins: Pins::default(),
        owners: vec![SlotRow {
            slot: Slot(0),
            owner: Some(owner),
            epoch: Epoch(epoch),
        }],
        members: members
            .into_iter()
            .map(|member| (member.incarnation, Known::learned(member, now, None)))
            .collect(),
        placement: Placement::default(),
    };
    let mut mine = map(ME, 4, vec![member(ME, Duration::ZERO)]);
    let newer = map(OTHER, 5, vec![member(OTHER, LEASE)]).shared();
    assert!(mine.learn_from_peer(&newer, now));
    let owner = mine.owner(Slot(0)).unwrap();
    assert_eq!(
        (owner.incarnation, owner.address.as_str(), owner.epoch),
        (OTHER, "host:1", Epoch(5))
    );
    let older = map(ME, 4, vec![member(ME, LEASE)]).shared();
    assert!(!mine.learn_from_peer(&older, now));
    assert!(!mine.learn_from_peer(&newer, now));
    assert_eq!(mine.owner(Slot(0)).unwrap().incarnation, OTHER);
}

/// As after the claim of every other slot of a node that died.
#[test]
fn a_change_of_as_many_slots_as_there_are_leaves_the_pins_of_others() {
    let (hot, mut map) = with_a_pin();
    let change = MapChange {
        slots: vec![row(0, OTHER, 2), row(1, OTHER, 2)],
        ..MapChange::default()
    };
    assert!(map.take(change, Trust::Newer));
    assert_eq!(map.slot_of(&hot), Slot(2));
    assert_eq!(map.owner(Slot(1)).unwrap().incarnation, OTHER);
}

#[test]
fn a_slot_that_a_failover_of_the_database_took_is_known_by_its_new_row() {
    let (hot, mut map) = with_a_pin();
    let whole = MapChange {
        slots: vec![row(0, ME, 3), row(1, ME, 3)],
        is_whole: true,
        ..MapChange::default()
    };
    assert!(map.take(whole, Trust::AsTheyAre));
    assert_eq!(map.slot_of(&hot), slot_of(&hot, 2));
    assert!(map.owner(Slot(2)).is_none());
    let anew = MapChange {
        slots: vec![row(2, OTHER, 1)],
        pins: vec![(Slot(2), Some(hot.clone()))],
        ..MapChange::default()
    };
    assert!(map.take(anew, Trust::Newer));
    assert_eq!(map.slot_of(&hot), Slot(2));
    assert_eq!(map.owner(Slot(2)).unwrap().incarnation, OTHER);
}

#[test]
fn slots_without_a_living_owner_are_orphans_and_the_dead_are_no_candidates() {
    let now = Instant::now();
    let slot = |number: u16, owner| SlotRow {
        slot: Slot(number),
        owner,
        epoch: Epoch(1),
    };
    let (alive, dead) = (member(ME, LEASE), member(OTHER, Duration::ZERO));
    let map = Map {
        owners: vec![
            slot(0, Some(ME)),
            slot(1, Some(OTHER)),
            slot(2, None),
            slot(3, Some(Uuid::from_u128(3))),
        ],
        members: [alive, dead]
            .map(|member| (member.incarnation, Known::learned(member, now, None)))
            .into(),
        slots: SLOTS_MIN,
        ..Map::default()
    };
    let orphans = [(Slot(1), Some(now)), (Slot(2), None), (Slot(3), None)];
    assert_eq!(map.orphans(now), orphans);
    assert_eq!(map.candidates(now).into_values().collect::<Vec<_>>(), [ME]);
    assert_eq!(map.peers(ME, now).count(), 0);
    assert_eq!(map.peers(OTHER, now).collect::<Vec<_>>(), [(ME, "host:1")]);
}

#[test]
fn a_pinned_document_is_in_its_own_slot_and_its_neighbours_are_not() {
    let mut map = map();
    let [hot, other] = ["hot", "other"].map(|name| DocumentId::new(name).expect("valid"));
    let home = map.slot_of(&hot);
    map.pins.set(OWN, Some(hot.clone()));
    assert_eq!(map.slot_of(&hot), OWN);
    assert_eq!(map.slot_of(&other), slot_of(&other, SLOTS_MIN));
    map.pins.set(OWN, Some(other.clone()));
    assert_eq!((map.slot_of(&hot), map.slot_of(&other)), (home, OWN));
    map.pins.set(OWN, None);
    assert_eq!(map.pins().count(), 0);
}

#[test]
fn the_slot_of_a_pin_stays_with_its_owner_and_leaves_with_it() {
    let mut map = map();
    map.pins
        .set(OWN, Some(DocumentId::new("hot").expect("valid")));
    let now = Instant::now();
    let own_slots = |map: &Map, me| {
        let moves = map.handoffs(me, now).into_iter();
        let pinned = moves.filter(|(ownership, _)| ownership.slot == OWN);
        pinned.map(|(_, target)| target).collect::<Vec<_>>()
    };
    assert!(own_slots(&map, ME).is_empty());
    let number = usize::from(OWN.0);
    map.placement.slots = vec![NodeId::default(); number];
    map.placement.slots.push(NodeId(OTHER.to_string()));
    assert_eq!(own_slots(&map, ME), [OTHER], "as the operator wants it");
    map.placement.slots.clear();
    map.members.get_mut(&ME).expect("registered").member.state = MemberState::Draining;
    assert_eq!(own_slots(&map, ME), [OTHER], "a drain takes it along");
}

#[test]
fn a_node_in_quarantine_gives_its_slots_away_whatever_was_planned() {
    let mut map = map();
    let now = Instant::now();
    map.placement.slots = vec![NodeId(ME.to_string()); usize::from(SLOTS_MIN)];
    assert_eq!(map.handoffs(ME, now), [], "as the operator wants it");
    let flapping = |seconds: u64| {
        [1, 2, 3]
            .map(|ago| Duration::from_secs(seconds + ago))
            .to_vec()
    };
    let lost_ago = |map: &mut Map, me: Uuid, ago| {
        map.members
            .get_mut(&me)
            .expect("registered")
            .member
            .leases_lost_ago = ago;
    };
    lost_ago(&mut map, ME, flapping(0));
    let gone = map.handoffs(ME, now);
    assert_eq!(gone.len(), usize::from(SLOTS_MIN) + 1);
    assert!(gone.iter().all(|(_, target)| *target == OTHER));
    // A quarter of an even share.
    map.placement.slots.clear();
    lost_ago(&mut map, ME, flapping(30));
    let kept = usize::from(SLOTS_MIN) - map.handoffs(ME, now).len();
    assert_eq!(kept, usize::from(SLOTS_MIN).div_ceil(5));
    lost_ago(&mut map, OTHER, flapping(0));
    lost_ago(&mut map, ME, flapping(0));
    assert_eq!(map.quarantined(now).len(), 0, "it is not they");
}

#[test]
fn a_virtual_slot_without_a_document_is_nobodys() {
    let mut map = map();
    let now = Instant::now();
    map.owners[usize::from(OWN.0)].owner = None;
    assert_eq!(map.orphans(now), []);
    assert_eq!(map.slots().len(), usize::from(SLOTS_MIN));
    map.pins
        .set(OWN, Some(DocumentId::new("hot").expect("valid")));
    assert_eq!(map.orphans(now), [(OWN, None)]);
}

/// The first virtual slot.
const OWN: Slot = Slot(SLOTS_MIN);

/// Two live members; everything is with the first.
fn map() -> Map {
    let now = Instant::now();
    Map {
        slots: SLOTS_MIN,
        owners: (0..=SLOTS_MIN)
            .map(|number| SlotRow {
                slot: Slot(number),
                owner: Some(ME),
                epoch: Epoch(1),
            })
            .collect(),
        members: [member(ME, LEASE), member(OTHER, LEASE)]
            .map(|member| (member.incarnation, Known::learned(member, now, None)))
            .into(),
        ..Map::default()
    }
}

/// Two slots of this node, and one of its own for a document.
fn with_a_pin() -> (DocumentId, Map) {
    let hot = DocumentId::new("hot").unwrap();
    let mut map = Map {
        slots: 2,
        ..Map::default()
    };
    let whole = MapChange {
        slots: vec![row(0, ME, 1), row(1, ME, 1), row(2, ME, 2)],
        pins: vec![(Slot(2), Some(hot.clone()))],
        is_whole: true,
        ..MapChange::default()
    };
    assert!(map.take(whole, Trust::Newer));
    assert_eq!(map.slot_of(&hot), Slot(2));
    (hot, map)
}

const fn row(slot: u16, owner: Uuid, epoch: i64) -> SlotRow {
    SlotRow {
        slot: Slot(slot),
        owner: Some(owner),
        epoch: Epoch(epoch),
    }
}

fn member(incarnation: Uuid, lease_left: Duration) -> Member {
    Member {
        node: NodeId(incarnation.to_string()),
        incarnation,
        pod_uid: incarnation.to_string(),
        address: "host:1".to_owned(),
        zone: String::new(),
        weight: 100,
        state: MemberState::Active,
        lease_left,
        load: None,
        load_age: Duration::ZERO,
        leases_lost_ago: Vec::new(),
    }
}
