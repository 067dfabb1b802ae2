//! Members, slots, the map and the planner's wishes.

use collab_core::limits::{ADOPT_AFTER_STEADY, RENEWAL_GAP_MAX};
use collab_node::store::Judgement;

use super::*;

on_all! {
    an_older_term_changes_nothing
    the_number_of_slots_cannot_change
    a_superseded_process_is_no_member
    the_map_tells_what_changed
    a_zone_that_was_told_stays_with_the_pod
}

mod on_clusters {
    use super::*;

    on_clusters! {
        slots_go_to_an_active_member_and_to_nobody_else
        a_run_of_a_pod_takes_what_the_one_before_left_and_nothing_else
        an_ended_lease_gives_slots_away_until_it_is_renewed
        a_lease_is_ended_early_only_when_it_was_not_renewed_for_a_while
        who_has_no_lease_judges_nobody
        of_two_members_that_judge_each_other_one_stays
        who_takes_back_has_the_newest_epoch
        who_was_cut_off_claims_nothing_at_once
    }
}

async fn an_older_term_changes_nothing(bench: Bench) {
    let node = bench.owner().await;
    let first = bench.store.take_term("first").await.unwrap();
    let second = bench.store.take_term("second").await.unwrap();
    assert_eq!((first, second), (Term(1), Term(2)));
    let plan = vec![NodeId::from("node-0"); usize::from(SLOTS)];
    let before = bench.store.placement().await.unwrap();
    assert_eq!(
        bench.store.set_placement(first, &plan).await.unwrap(),
        Err(second)
    );
    assert_eq!(
        bench
            .store
            .set_drain(first, &node.name, true)
            .await
            .unwrap(),
        Err(second)
    );
    assert_eq!(bench.store.placement().await.unwrap(), before);
    assert!(before.slots.is_empty());

    assert_eq!(
        bench.store.set_placement(second, &plan).await.unwrap(),
        Ok(())
    );
    let after = bench.store.placement().await.unwrap();
    assert_eq!(after.slots, plan);
    assert_ne!(after.version, before.version);
    assert_eq!(
        bench.store.set_placement(second, &plan).await.unwrap(),
        Ok(())
    );
    let renewed = bench.renewed(&node).await;
    assert_eq!(
        renewed.placement_version, after.version,
        "the same placement again is no change"
    );

    for (drain, state) in [(true, MemberState::Draining), (false, MemberState::Active)] {
        assert_eq!(
            bench
                .store
                .set_drain(second, &node.name, drain)
                .await
                .unwrap(),
            Ok(())
        );
        assert_eq!(bench.state(&node).await, state);
    }
    bench
        .store
        .set_state(node.incarnation, MemberState::Drained)
        .await
        .unwrap();
    assert_eq!(
        bench
            .store
            .set_drain(second, &node.name, true)
            .await
            .unwrap(),
        Ok(())
    );
    assert_eq!(bench.state(&node).await, MemberState::Drained);
    assert_eq!(bench.store.summary().await.unwrap().term, second);
}

async fn the_number_of_slots_cannot_change(bench: Bench) {
    bench.owner().await;
    let refused = bench
        .store
        .register(&registration("other"), 512, LEASE)
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, StoreError::Unusable(reason) if reason.contains("256")),
        "{refused}"
    );
    assert_eq!(bench.map(0).await.slots.len(), usize::from(SLOTS));
}

async fn a_superseded_process_is_no_member(bench: Bench) {
    let old = bench.owner().await;
    let load = LoadSample {
        connections: 7,
        documents: 3,
        degraded: 1,
        resident_bytes: 1 << 40,
        silences: vec![Silence {
            node: NodeId::from("node-1"),
            ms: 2_000,
        }],
    };
    let renewed = held(
        bench
            .store
            .renew(old.incarnation, &old.pod_uid, LEASE, load.clone())
            .await
            .unwrap(),
    );
    let [member] = renewed.members.as_slice() else {
        panic!("{renewed:?}")
    };
    assert_eq!(
        (member.incarnation, member.load.clone(), member.state),
        (old.incarnation, Some(load), MemberState::Active)
    );
    assert!(
        member.lease_left > LEASE / 2 && member.lease_left <= LEASE,
        "{:?}",
        member.lease_left
    );

    let new = bench.succeed(&old, &[]).await;
    assert!(matches!(bench.renew(&old).await, Renewal::Superseded));
    let claimed = bench.claim(&old, &[Slot(1)]).await;
    assert!(claimed.is_empty(), "who is no member claims nothing");
    let renewed = bench.renewed(&new).await;
    assert_eq!(
        renewed
            .members
            .iter()
            .map(|member| member.incarnation)
            .collect::<Vec<_>>(),
        [new.incarnation]
    );
    bench.store.leave(new.incarnation).await.unwrap();
    assert!(matches!(bench.renew(&new).await, Renewal::Fenced));
}

async fn the_map_tells_what_changed(bench: Bench) {
    let old = bench.node("node-0").await;
    let all = bench.map(0).await;
    assert_eq!(all.slots.len(), usize::from(SLOTS));
    assert!(
        all.slots
            .iter()
            .all(|row| row.owner.is_none() && row.epoch == Epoch(0))
    );

    let slots = [Slot(5), Slot(3)];
    let taken = bench.claim(&old, &slots).await;
    assert_eq!(taken, [(Slot(3), Epoch(1)), (Slot(5), Epoch(1))]);
    assert!(bench.claim(&old, &slots).await.is_empty());
    let change = bench.map(all.horizon).await;
    assert_eq!(
        news(&all, &change)
            .map(|row| (row.slot, row.owner))
            .collect::<Vec<_>>(),
        [
            (Slot(3), Some(old.incarnation)),
            (Slot(5), Some(old.incarnation))
        ]
    );
    // What is told again is not told for ever.
    let started = Instant::now();
    let mut horizon = change.horizon;
    loop {
        let again = bench.map(horizon).await;
        horizon = again.horizon;
        if again.slots.is_empty() {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(10), "{again:?}");
    }
    assert_eq!(
        bench.store.summary().await.unwrap().adoptions,
        0,
        "they had no owner to lose"
    );
    let new = bench.succeed(&old, &[3]).await;
    let change = bench.map(horizon).await;
    assert_eq!(
        (change.slots[0].slot, change.slots[0].owner),
        (Slot(3), Some(new.incarnation))
    );
    let summary = bench.store.summary().await.unwrap();
    assert_eq!(summary.adoptions, 1);
    assert!(summary.revision > 0 && !summary.store.version.is_empty());
}

async fn a_zone_that_was_told_stays_with_the_pod(bench: Bench) {
    let node = bench.node("node-0").await;
    let zone = async |node: &Node| bench.renewed(node).await.members[0].zone.clone();
    assert_eq!(zone(&node).await, "");
    let term = bench.store.take_term("first").await.unwrap();
    let zones = |zone: &str| {
        [("node-0", zone), ("node-9", "c")]
            .map(|(node, zone)| (NodeId::from(node), zone.to_owned()))
            .into()
    };
    let told = bench.store.set_zones(term, &zones("a")).await;
    assert_eq!(told.unwrap(), Ok(()));
    assert_eq!(zone(&node).await, "a");
    let successor = bench.succeed(&node, &[]).await;
    assert_eq!(
        zone(&successor).await,
        "a",
        "a pod does not change its machine"
    );
    let newer = bench.store.take_term("second").await.unwrap();
    let told = bench.store.set_zones(term, &zones("b")).await;
    assert_eq!(told.unwrap(), Err(newer));
    assert_eq!(zone(&successor).await, "a");
}

#[tokio::test]
async fn three_nodes_start_at_once_on_an_empty_database() {
    let server = Server::shared().await;
    let url = server.database().await;
    let start = |name: &'static str| {
        let url = url.clone();
        tokio::spawn(async move {
            let store = until_answered(|| Postgres::connect(&url)).await;
            let member = registration(name);
            store.register(&member, SLOTS, LEASE).await.unwrap();
            let slots: Vec<_> = (0..SLOTS).map(Slot).collect();
            let taken = store
                .claim(member.incarnation, &slots, Claim::Orphaned)
                .await
                .unwrap();
            (store, member.incarnation, taken)
        })
    };
    let started = [start("node-0"), start("node-1"), start("node-2")];
    let mut owners = HashMap::new();
    let mut stores = Vec::new();
    for started in started {
        let (store, incarnation, taken) = started.await.unwrap();
        for (slot, epoch) in taken {
            assert_eq!(epoch, Epoch(1));
            assert_eq!(
                owners.insert(slot, incarnation),
                None,
                "{slot} was claimed twice"
            );
        }
        stores.push((store, incarnation));
    }
    assert_eq!(owners.len(), usize::from(SLOTS));
    let renewal = stores[0]
        .0
        .renew(stores[0].1, "pod of node-0", LEASE, LoadSample::default());
    let renewed = held(renewal.await.unwrap());
    assert_eq!(
        renewed
            .members
            .iter()
            .map(|member| member.node.0.as_str())
            .collect::<Vec<_>>(),
        ["node-0", "node-1", "node-2"]
    );
    assert_eq!(renewed.timeline, "00000001");
}

async fn slots_go_to_an_active_member_and_to_nobody_else(bench: Bench) {
    let (a, b) = (bench.owner().await, bench.node("node-1").await);
    let rights = [1, 2, 3].map(|slot| a.right(slot));

    bench.set_state(&b, MemberState::Draining).await;
    assert_eq!(
        bench.hand_off(&rights, b.incarnation).await,
        [],
        "it drains"
    );
    bench.set_state(&b, MemberState::Active).await;
    assert_eq!(
        bench.hand_off(&rights, Uuid::new_v4()).await,
        [],
        "it is no member"
    );
    let stale = Ownership {
        epoch: Epoch(0),
        ..a.right(9)
    };
    let moved = bench
        .hand_off(&[rights[2], rights[0], stale], b.incarnation)
        .await;
    assert_eq!(moved, [(Slot(1), Epoch(2)), (Slot(3), Epoch(2))]);

    let right = Ownership {
        epoch: Epoch(2),
        incarnation: b.incarnation,
        ..rights[0]
    };
    assert_eq!(
        bench.create(&document("a"), rights[0]).await,
        Created::Fenced
    );
    assert_eq!(
        bench.create(&document("a"), right).await,
        Created::Created {
            room_epoch: RoomEpoch(1)
        }
    );
}

async fn a_run_of_a_pod_takes_what_the_one_before_left_and_nothing_else(bench: Bench) {
    let (mut old, mut other) = (bench.node("node-0").await, bench.node("node-1").await);
    old.claim(&[1, 2]).await;
    other.claim(&[3]).await;
    let take = async |by: &Node, from: Uuid| {
        let slots = [1, 2, 3].map(Slot);
        let taken = bench.store.claim(by.incarnation, &slots, Claim::Left(from));
        taken.await.unwrap()
    };
    bench.lease_ends(&old).await;
    let taken = take(&other, old.incarnation).await;
    assert_eq!(taken, [], "the one before is still a member");

    let member = Registration {
        incarnation: Uuid::new_v4(),
        ..registration("node-0")
    };
    for before in [Some(old.incarnation), None] {
        let registered = bench.store.register(&member, SLOTS, LEASE).await.unwrap();
        assert_eq!(registered, before);
    }
    // Somebody else was faster with one of them.
    other.claim(&[2]).await;
    bench.lease_ends(&other).await;
    let new = Node {
        incarnation: member.incarnation,
        ..old
    };
    assert_eq!(take(&new, old.incarnation).await, [(Slot(1), Epoch(2))]);
    assert_eq!(take(&new, old.incarnation).await, []);
}

async fn an_ended_lease_gives_slots_away_until_it_is_renewed(bench: Bench) {
    let (a, b) = (bench.owner().await, bench.node("node-1").await);
    let rights = [1, 2, 3].map(|slot| a.right(slot));
    bench.hand_off(&rights[..2], b.incarnation).await;
    assert_eq!(
        bench.claim(&a, &[Slot(1)]).await,
        [],
        "its lease has not ended"
    );

    bench.lease_ends(&b).await;
    assert_eq!(
        bench.hand_off(&rights[2..], b.incarnation).await,
        [],
        "it gets no more"
    );
    assert_eq!(bench.claim(&b, &[Slot(3)]).await, [], "it takes no more");
    assert_eq!(bench.claim(&a, &[Slot(1)]).await, [(Slot(1), Epoch(3))]);
    bench.renewed(&b).await;
    assert_eq!(
        bench.claim(&a, &[Slot(2)]).await,
        [],
        "what nobody took is its own again"
    );
    assert_eq!(bench.store.summary().await.unwrap().adoptions, 1);
}

/// A lease is lost when its run is followed by another without having left, and when others took the slots after its
/// end; each counts once.
#[tokio::test]
async fn lost_leases_are_remembered_once_each() {
    let bench = Bench::postgres().await;
    let (a, b) = (bench.owner().await, bench.node("node-1").await);
    let lost = async |who: &Node| {
        let renewed = bench.renewed(&a).await;
        let mut members = renewed.members.into_iter();
        let member = members.find(|member| member.node == who.name);
        member.map(|member| member.leases_lost_ago.len())
    };
    bench
        .store
        .note_lost_leases(&[b.incarnation])
        .await
        .unwrap();
    assert_eq!(lost(&b).await, Some(0), "its lease goes on");

    bench.lease_ends(&b).await;
    for _ in 0..2 {
        bench
            .store
            .note_lost_leases(&[b.incarnation])
            .await
            .unwrap();
    }
    assert_eq!(lost(&b).await, Some(1));
    let next = bench.succeed(&b, &[]).await;
    assert_eq!(lost(&next).await, Some(1), "that was known");
    let third = bench.succeed(&next, &[]).await;
    assert_eq!(lost(&third).await, Some(2), "it had not left");

    bench.store.leave(third.incarnation).await.unwrap();
    let fourth = bench.node("node-1").await;
    assert_eq!(lost(&fourth).await, Some(2), "it had left");
    bench.set_state(&fourth, MemberState::Drained).await;
    let fifth = bench.succeed(&fourth, &[]).await;
    assert_eq!(lost(&fifth).await, Some(2), "there was nothing to lose");
    assert_eq!(lost(&a).await, Some(0));
}

#[tokio::test]
async fn an_operator_ends_a_lease_under_its_term() {
    let bench = Bench::postgres().await;
    let (a, b) = (bench.owner().await, bench.node("node-1").await);
    bench.hand_off(&[a.right(1)], b.incarnation).await;
    let old = bench.store.take_term("old").await.unwrap();
    let new = bench.store.take_term("new").await.unwrap();
    assert_eq!(
        bench.store.fence(old, b.incarnation).await.unwrap(),
        Err(new)
    );
    assert_eq!(bench.claim(&a, &[Slot(1)]).await, [], "nothing has changed");
    assert_eq!(bench.store.fence(new, b.incarnation).await.unwrap(), Ok(()));
    assert!(matches!(bench.renew(&b).await, Renewal::Fenced));
    assert_eq!(bench.claim(&a, &[Slot(1)]).await, [(Slot(1), Epoch(3))]);
}

const AGE: Duration = Duration::from_millis(150);

async fn a_lease_is_ended_early_only_when_it_was_not_renewed_for_a_while(bench: Bench) {
    let (lost, judge) = (bench.owner().await, bench.node("node-1").await);
    let end = || {
        bench
            .store
            .end_lease(judge.incarnation, lost.incarnation, AGE)
    };
    bench.renewed(&lost).await;
    let Judgement::Fresh(age) = end().await.unwrap() else {
        panic!("it was renewed just now")
    };
    assert!(age < AGE, "{age:?}");
    assert!(bench.claim(&judge, &[Slot(1)]).await.is_empty());

    tokio::time::sleep(AGE).await;
    assert_eq!(end().await.unwrap(), Judgement::Ended);
    assert_eq!(
        end().await.unwrap(),
        Judgement::Void,
        "it has no lease any more"
    );
    assert_eq!(
        bench.claim(&judge, &[Slot(1)]).await,
        [(Slot(1), Epoch(2))],
        "its slots are orphaned at once"
    );
    // It lives after all: it may not go on, and comes back as another incarnation of the same pod.
    assert!(matches!(bench.renew(&lost).await, Renewal::Fenced));
    assert!(bench.claim(&lost, &[Slot(2)]).await.is_empty());
    let again = bench.succeed(&lost, &[2]).await;
    assert_eq!(again.epoch(2), Epoch(2));
    assert_eq!(bench.renewed(&again).await.members.len(), 2);
}

async fn who_has_no_lease_judges_nobody(bench: Bench) {
    let (target, judge) = (bench.node("node-0").await, bench.node("node-1").await);
    tokio::time::sleep(AGE).await;
    let end = async |judge, target| bench.store.end_lease(judge, target, AGE).await.unwrap();
    let (me, stranger) = (judge.incarnation, Uuid::new_v4());
    assert_eq!(end(me, stranger).await, Judgement::Void);
    assert_eq!(end(stranger, me).await, Judgement::Void);
    assert_eq!(end(me, me).await, Judgement::Void);
    let ended = Duration::ZERO;
    let renewal = bench
        .store
        .renew(me, &judge.pod_uid, ended, LoadSample::default());
    held(renewal.await.unwrap());
    tokio::time::sleep(AGE).await;
    assert_eq!(end(me, target.incarnation).await, Judgement::Void);
    bench.renewed(&target).await;
}

async fn of_two_members_that_judge_each_other_one_stays(bench: Bench) {
    for _ in 0..20 {
        let (a, b) = (bench.node("node-0").await, bench.node("node-1").await);
        tokio::time::sleep(AGE).await;
        let end = |judge: &Node, target: &Node| {
            let (judge, target) = (judge.incarnation, target.incarnation);
            let store = bench.store.clone();
            tokio::spawn(async move { store.end_lease(judge, target, AGE).await.unwrap() })
        };
        let (first, second) = (end(&a, &b), end(&b, &a));
        let mut judgements = [first.await.unwrap(), second.await.unwrap()];
        judgements.sort_by_key(|judgement| *judgement != Judgement::Ended);
        assert_eq!(judgements, [Judgement::Ended, Judgement::Void]);
    }
}

/// What is judged is the row as it is when it is locked, not as it was when the statement began.
#[tokio::test]
async fn a_renewal_in_between_saves_the_lease() {
    let bench = Bench::postgres().await;
    let (target, judge) = (bench.node("node-0").await, bench.node("node-1").await);
    let Raw::Postgres(pool) = &bench.raw else {
        unreachable!()
    };
    tokio::time::sleep(AGE).await;
    let mut renewing = pool.begin().await.unwrap();
    sqlx::query(
        "update member set renewed_at = clock_timestamp() + interval '1 s' where incarnation = $1",
    )
    .bind(target.incarnation)
    .execute(&mut *renewing)
    .await
    .unwrap();
    let end = bench
        .store
        .end_lease(judge.incarnation, target.incarnation, AGE);
    let commit = async {
        tokio::time::sleep(AGE).await;
        renewing.commit().await.unwrap();
    };
    let (judgement, ()) = tokio::join!(end, commit);
    assert_eq!(judgement.unwrap(), Judgement::Fresh(Duration::ZERO));
    bench.renewed(&target).await;
}

async fn who_takes_back_has_the_newest_epoch(bench: Bench) {
    let (a, b) = (bench.owner().await, bench.node("node-1").await);
    let reclaim = async |node: &Node, held: &[Ownership]| {
        let reclaimed = bench.store.reclaim(node.incarnation, held).await;
        reclaimed.unwrap()
    };
    // The database forgot that this slot went to b, twice.
    let forgotten = Ownership {
        slot: Slot(1),
        epoch: Epoch(5),
        incarnation: b.incarnation,
    };
    assert_eq!(reclaim(&a, &[a.right(1)]).await, [(Slot(1), Epoch(2))]);
    assert_eq!(reclaim(&b, &[forgotten]).await, [(Slot(1), Epoch(6))]);
    assert_eq!(reclaim(&a, &[a.right(1)]).await, [], "b has it");
    assert_eq!(bench.right_now(1).await.incarnation, b.incarnation);
    bench.store.leave(b.incarnation).await.unwrap();
    assert_eq!(reclaim(&b, &[forgotten]).await, [], "it is no member");
}

/// Such a claim arrives late, just behind a renewal, and finds that others could not renew either.
async fn who_was_cut_off_claims_nothing_at_once(bench: Bench) {
    let (lost, node) = (bench.owner().await, bench.node("node-1").await);
    bench.store.leave(lost.incarnation).await.unwrap();
    let claim = async |slot| {
        let slots = [Slot(slot)];
        let claim = bench
            .store
            .claim(node.incarnation, &slots, Claim::OrphanedBySteady);
        claim.await.unwrap()
    };
    let settle = async || {
        let started = Instant::now();
        while started.elapsed() <= ADOPT_AFTER_STEADY {
            tokio::time::sleep(Duration::from_millis(100)).await;
            bench.renewed(&node).await;
        }
    };
    assert_eq!(claim(1).await, [], "it has just come");
    settle().await;
    assert_eq!(claim(1).await, [(Slot(1), Epoch(2))]);

    tokio::time::sleep(RENEWAL_GAP_MAX + Duration::from_millis(50)).await;
    assert_eq!(claim(2).await, [], "it did not renew");
    bench.renewed(&node).await;
    assert_eq!(claim(2).await, [], "it was cut off a moment ago");
    settle().await;
    assert_eq!(claim(2).await, [(Slot(2), Epoch(2))]);
}

/// The judgement "its owner is lost" must not be made again, wrongly, for the owner that comes while
/// the claim waits for the row.
#[tokio::test]
async fn a_slot_that_was_taken_while_a_claim_waited_stays_taken() {
    let bench = Bench::postgres().await;
    let (lost, first, second) = (
        bench.owner().await,
        bench.node("node-1").await,
        bench.node("node-2").await,
    );
    bench.store.leave(lost.incarnation).await.unwrap();
    let Raw::Postgres(pool) = &bench.raw else {
        unreachable!()
    };
    let mut taking = pool.begin().await.unwrap();
    sqlx::query("update slot set owner = $1, epoch = epoch + 1 where slot = 7")
        .bind(first.incarnation)
        .execute(&mut *taking)
        .await
        .unwrap();
    let slots = [Slot(7)];
    let claim = bench
        .store
        .claim(second.incarnation, &slots, Claim::Orphaned);
    let commit = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        taking.commit().await.unwrap();
    };
    let (taken, ()) = tokio::join!(claim, commit);
    assert_eq!(taken.unwrap(), []);
}

/// Transaction ids do not commit in their order.
#[tokio::test]
async fn the_map_misses_nothing_that_commits_late() {
    let bench = Bench::postgres().await;
    let node = bench.node("node-0").await;
    let Raw::Postgres(pool) = &bench.raw else {
        unreachable!()
    };
    let mut early = pool.begin().await.unwrap();
    sqlx::query(
        "update slot set epoch = 1, revision = pg_current_xact_id()::text::bigint where slot = 1",
    )
    .execute(&mut *early)
    .await
    .unwrap();
    bench.claim(&node, &[Slot(2)]).await;
    let seen = bench.map(1).await;
    assert_eq!(
        seen.slots.iter().map(|row| row.slot).collect::<Vec<_>>(),
        [Slot(2)]
    );
    early.commit().await.unwrap();
    let seen = bench.map(seen.horizon).await;
    assert!(
        seen.slots
            .iter()
            .any(|row| row.slot == Slot(1) && row.epoch == Epoch(1)),
        "{seen:?}"
    );
}

#[tokio::test]
async fn a_change_of_the_map_wakes_the_others_and_nothing_else_does() {
    let bench = Bench::postgres().await;
    let node = bench.owner().await;
    let other = Postgres::connect(&bench.url).await.unwrap();
    let doc = document("a");
    node.create(&doc, 1).await;
    let wait = |time| tokio::time::timeout(time, other.map_changed());
    // Once it listens, a change arrives; what came before it listened is not told.
    let listens = async {
        while wait(Duration::from_millis(50)).await.is_err() {
            let right = bench.right_now(3).await;
            bench.hand_off(&[right], node.incarnation).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), listens)
        .await
        .expect("a handoff is told");
    while wait(Duration::from_millis(200)).await.is_ok() {}
    for seq in 1..=20 {
        bench.append(&[node.update(&doc, 1, seq, "x")]).await;
        bench
            .store
            .renew(
                node.incarnation,
                &node.pod_uid,
                LEASE,
                LoadSample::default(),
            )
            .await
            .unwrap();
    }
    assert!(
        wait(Duration::from_millis(300)).await.is_err(),
        "appends and renewals are not told"
    );

    let members = |time| tokio::time::timeout(time, other.members_changed());
    while members(Duration::from_millis(200)).await.is_ok() {}
    let newcomer = bench.node("node-1").await;
    let soon = Duration::from_secs(5);
    assert!(members(soon).await.is_ok(), "a new member is told");
    let end = bench
        .store
        .end_lease(newcomer.incarnation, node.incarnation, Duration::ZERO);
    assert_eq!(end.await.unwrap(), Judgement::Ended);
    assert!(members(soon).await.is_ok(), "the end of a lease is told");
    bench.store.leave(newcomer.incarnation).await.unwrap();
    assert!(members(soon).await.is_ok(), "a departure is told");
    assert!(wait(Duration::from_millis(300)).await.is_err());
}

#[tokio::test]
async fn sessions_are_called_like_the_process_they_serve() {
    let bench = Bench::postgres().await;
    let Raw::Postgres(pool) = &bench.raw else {
        unreachable!()
    };
    let sessions = async |node: &Node| -> i64 {
        bench.renewed(node).await;
        sqlx::query_scalar("select count(*) from pg_stat_activity where application_name = $1")
            .bind(node.incarnation.to_string())
            .fetch_one(pool)
            .await
            .unwrap()
    };
    let old = bench.owner().await;
    assert_ne!(sessions(&old).await, 0);
    let new = bench.succeed(&old, &[]).await;
    assert_ne!(sessions(&new).await, 0);
}
