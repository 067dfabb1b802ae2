use std::time::Duration;

use yrs::{ClientID, Doc, GetString, OffsetKind, Options, Text, Update};

use super::*;
use crate::limits::{
    DOCUMENT_MEMORY_MAX, PAST_BYTES_MIN, TAIL_UPDATES_MAX, UNSAVED_UPDATES_MAX, UPDATE_STRUCTS_MAX,
};
use crate::wire::awareness;
use crate::wire::relay::UpdateKind;

mod resting;

const EDGE: EdgeId = EdgeId(1);
const OTHER_EDGE: EdgeId = EdgeId(2);
const ALICE: Peer = peer(EDGE, 1);
const BOB: Peer = peer(OTHER_EDGE, 1);

#[test]
fn an_update_is_acknowledged_only_once_it_is_durable() {
    let mut document = shared_by_alice_and_bob();
    let typed = Typist::new(1).types("h");
    assert_eq!(
        document.handle(update(ALICE, 2, &typed)),
        [fan_out(ALICE, &typed), append(1, &typed)]
    );
    assert_eq!(document.handle(committed(1)), [receipt(ALICE, 2)]);
}

#[test]
fn a_commit_gives_each_socket_one_receipt_for_all_that_it_made_durable() {
    let mut document = shared_by_alice_and_bob();
    let (mut alice, mut bob) = (Typist::new(1), Typist::new(2));
    document.handle(update(ALICE, 2, &alice.types("h")));
    document.handle(update(BOB, 2, &bob.types("H")));
    document.handle(update(ALICE, 3, &alice.types("i")));
    document.handle(update(ALICE, 4, &alice.types("!")));
    assert_eq!(
        document.handle(committed(3)),
        [receipt(ALICE, 3), receipt(BOB, 2)]
    );
    assert_eq!(document.handle(committed(4)), [receipt(ALICE, 4)]);
}

#[test]
fn a_step_2_waits_for_what_it_contains_and_what_comes_later_does_not_hold_it_up() {
    let mut document = shared_by_alice_and_bob();
    let mut typist = Typist::new(1);
    document.handle(update(ALICE, 2, &typist.types("h")));
    assert_eq!(document.handle(step1(BOB)), []);
    document.handle(update(ALICE, 3, &typist.types("i")));
    let effects = document.handle(committed(1));
    let [
        first,
        Effect::Send {
            to,
            message: ToEdge::Step2 { update, .. },
        },
    ] = effects.as_slice()
    else {
        panic!("a receipt and a step 2, not {effects:?}");
    };
    assert_eq!((first, *to), (&receipt(ALICE, 2), OTHER_EDGE));
    assert_eq!(text_of(&[update]), "h");
}

#[test]
fn an_update_that_adds_nothing_is_not_logged_and_its_receipt_waits_all_the_same() {
    let mut document = shared_by_alice_and_bob();
    let typed = Typist::new(1).types("h");
    document.handle(update(ALICE, 2, &typed));
    // Bob brings back what Alice wrote, before it is durable.
    assert_eq!(document.handle(update(BOB, 2, &typed)), []);
    assert_eq!(
        document.handle(committed(1)),
        [receipt(ALICE, 2), receipt(BOB, 2)]
    );
    assert_eq!(
        document.handle(update(BOB, 3, &typed)),
        [receipt(BOB, 3)],
        "now all of it is durable"
    );
}

#[test]
fn an_update_with_a_hole_before_it_is_neither_logged_nor_acknowledged_until_the_client_fills_it() {
    let mut document = shared_by_alice_and_bob();
    let mut typist = Typist::new(1);
    let lost = typist.types("a");
    let late = typist.types("b");
    let effects = document.handle(update(ALICE, 2, &late));
    assert_eq!(effects[0], Effect::NotAdmitted { reason: "gap" });
    assert!(matches!(
        &effects[1],
        Effect::Send { to: EDGE, message: ToEdge::Step1 { connection, .. } } if *connection == ALICE.connection
    ));
    assert_eq!(
        document.handle(update(ALICE, 3, &typist.types("c"))),
        [Effect::NotAdmitted { reason: "resync" }],
        "the answer will contain it"
    );
    let all = typist.everything();
    assert_eq!(
        document.handle(step2(ALICE, 4, &all)),
        [fan_out(ALICE, &all), append(1, &all)]
    );
    assert_eq!(document.handle(committed(1)), [receipt(ALICE, 4)]);
    assert_eq!(document.text("quill"), "abc");
    drop(lost);
}

#[test]
fn a_client_whose_answer_has_a_hole_is_asked_again_when_the_document_has_grown() {
    let mut document = shared_by_alice_and_bob();
    let mut alice = Typist::new(1);
    let first = alice.types("a");
    let mut bob = Typist::new(2);
    bob.receives(&first);
    let without_first = bob.types("b");
    document.handle(join(BOB, ""));
    assert_eq!(
        document.handle(step2(BOB, 3, &without_first)),
        [Effect::NotAdmitted { reason: "gap" }],
        "not all of it is here"
    );
    let effects = document.handle(update(ALICE, 2, &first));
    assert!(
        effects.iter().any(|effect| matches!(
            effect,
            Effect::Send {
                to: OTHER_EDGE,
                message: ToEdge::Step1 { .. }
            }
        )),
        "{effects:?}"
    );
    document.handle(step2(BOB, 4, &bob.everything()));
    assert_eq!(document.text("quill"), "ab");
}

#[test]
fn what_a_client_waits_for_does_not_hold_up_its_own_edits() {
    let mut document = shared_by_alice_and_bob();
    let mut alice = Typist::new(1);
    let first = alice.types("a");
    let second = alice.types("b");
    // Of Alice's edits only the second came to Bob, who shows neither.
    let mut bob = Typist::new(2);
    let own = bob.types("own");
    bob.receives(&second);
    document.handle(join(BOB, ""));
    let effects = document.handle(step2(BOB, 3, &bob.everything()));
    assert_eq!(effects[0], Effect::NotAdmitted { reason: "gap" });
    assert!(
        matches!(&effects[2], Effect::Append { seq: Seq(1), update, .. } if text_of(&[update]) == "own"),
        "{effects:?}"
    );
    assert_eq!(document.handle(committed(1)), []);
    assert_eq!(document.text("quill"), "own");
    document.handle(update(BOB, 4, &bob.types("ed")));
    assert_eq!(
        document.handle(committed(2)),
        [],
        "a receipt would speak of all that Bob sent"
    );
    // Alice brings what Bob waits for: he is asked again.
    document.handle(update(ALICE, 2, &first));
    document.handle(step2(BOB, 5, &bob.everything()));
    let effects = document.handle(committed(4));
    assert!(effects.contains(&receipt(BOB, 5)), "{effects:?}");
    drop(own);
}

#[test]
fn an_edge_that_comes_from_another_owner_gets_what_it_missed_once_it_is_durable() {
    let mut document = shared_by_alice_and_bob();
    let mut typist = Typist::new(1);
    let known = typist.types("known ");
    document.handle(update(ALICE, 2, &known));
    document.handle(committed(1));
    let since = typist.state_vector();
    document.handle(update(ALICE, 3, &typist.types("missed")));
    let edge = EdgeId(3);
    let attached = document.handle(Input::Attach { edge, since });
    assert_eq!(
        attached.len(),
        1,
        "only that the channel is open: {attached:?}"
    );
    let effects = document.handle(committed(2));
    let Some(Effect::Send {
        to,
        message: ToEdge::CatchUp { update },
    }) = effects.last()
    else {
        panic!("a catch-up, not {effects:?}");
    };
    assert_eq!(*to, edge);
    assert_eq!(text_of(&[&known, update]), "known missed");
}

#[test]
fn a_reader_is_receipted_only_for_what_the_document_has() {
    let mut document = shared_by_alice_and_bob();
    let mut alice = Typist::new(1);
    let mut bob = Typist::new(2);
    let shared = alice.types("shared");
    document.handle(update(ALICE, 2, &shared));
    bob.receives(&shared);
    let compare = |number, update: Bytes| Input::Compare {
        peer: BOB,
        number,
        update,
    };
    assert_eq!(document.handle(compare(2, bob.everything())), []);
    assert_eq!(
        document.handle(committed(1)).last(),
        Some(&receipt(BOB, 2)),
        "what is not durable yet is not receipted"
    );
    // A deletion leaves no trace in the state vector.
    bob.deletes_first();
    assert_eq!(document.handle(compare(3, bob.everything())), []);
    document.handle(update(ALICE, 3, &bob.everything()));
    document.handle(committed(2));
    assert_eq!(
        document.handle(compare(4, bob.everything())),
        [receipt(BOB, 4)]
    );
    bob.types("own");
    assert_eq!(document.handle(compare(5, bob.everything())), []);
    assert_eq!(document.text("quill"), "hared");
    assert_eq!(document.assigned_seq(), Seq(2));
    let effects = document.handle(compare(6, Bytes::from_static(b"text")));
    assert!(matches!(
        effects[..],
        [Effect::Send {
            message: ToEdge::Refused { .. },
            ..
        }]
    ));
}

#[test]
fn a_stateless_message_goes_to_every_edge_and_not_to_its_sender() {
    let mut document = shared_by_alice_and_bob();
    let payload = Bytes::from_static(b"ring");
    let to = |peer: Peer, except| Effect::Send {
        to: peer.edge,
        message: ToEdge::Stateless {
            except,
            payload: payload.clone(),
        },
    };
    let effects = document.handle(Input::Stateless {
        peer: ALICE,
        payload: payload.clone(),
    });
    assert_eq!(effects, [to(ALICE, Some(ALICE.connection)), to(BOB, None)]);
    document.handle(Input::Leave { peer: ALICE });
    let effects = document.handle(Input::Stateless {
        peer: ALICE,
        payload,
    });
    assert_eq!(effects, []);
}

#[test]
fn while_the_store_is_away_a_newcomer_gets_what_is_committed_and_then_the_rest() {
    let mut document = shared_by_alice_and_bob();
    let mut typist = Typist::new(1);
    let old = typist.types("old");
    document.handle(update(ALICE, 2, &old));
    document.handle(committed(1));
    // What is deleted without a commit is still shown.
    let deleted = typist.deletes(0, 2);
    let lost = typist.types(" new");
    document.handle(update(ALICE, 3, &deleted));
    assert_eq!(
        document.handle(update(ALICE, 4, &lost)),
        [fan_out(ALICE, &lost), append(3, &lost)],
        "edits are relayed all the same"
    );
    assert_eq!(document.handle(step1(BOB)), [], "a commit is on its way");
    let shown = |effects: &[Effect]| match effects {
        [
            Effect::Send {
                to: OTHER_EDGE,
                message: ToEdge::CommittedStep2 { update, .. },
            },
        ] => text_of(&[update]),
        other => panic!("a committed step 2, not {other:?}"),
    };
    assert_eq!(shown(&document.handle(Input::StoreAway)), "old");
    assert_eq!(document.handle(Input::StoreAway), [], "once");
    assert_eq!(shown(&document.handle(step1(BOB))), "old", "the next one");
    // A part is committed after all: the next one sees it.
    document.handle(committed(2));
    document.handle(Input::StoreAway);
    assert_eq!(shown(&document.handle(step1(BOB))), "d");
    let effects = document.handle(committed(3));
    let rests: Vec<&Bytes> = effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Send {
                message: ToEdge::Step2 { update, .. },
                ..
            } => Some(update),
            _ => None,
        })
        .collect();
    assert_eq!(rests.len(), 3, "{effects:?}");
    assert_eq!(text_of(&[&old, rests[1]]), "d new");
    assert_eq!(text_of(&[&old, &deleted, rests[2]]), "d new");
    assert!(effects.contains(&receipt(ALICE, 4)));
}

#[test]
fn the_past_is_replayed_from_a_snapshot_too_and_kept_short() {
    let mut typist = Typist::new(1);
    let first = typist.types("a");
    let state = typist.everything();
    let second = typist.types("b");
    let log = [(Seq(2), second)];
    let mut document = Document::open(Epoch(1), Some((Seq(1), &state)), &log, Seq(2)).unwrap();
    document.handle(Input::Attach {
        edge: EDGE,
        since: Bytes::new(),
    });
    document.handle(join(ALICE, ""));
    document.handle(step2(ALICE, 1, &Bytes::from_static(&NO_EDITS)));
    let state = typist.everything();
    let whole = *scan::scan_stored(&state).unwrap().summary();
    document.set_snapshot(Seq(2), state, whole);
    let big = "x".repeat(PAST_BYTES_MIN);
    for seq in 3..=5 {
        document.handle(update(ALICE, 2, &typist.types(&big)));
        document.handle(committed(seq));
    }
    document.handle(update(ALICE, 5, &typist.types("unsaved")));
    document.handle(Input::StoreAway);
    let effects = document.handle(step1(ALICE));
    let shown = told(&effects);
    let shown: Vec<&Bytes> = shown.iter().map(|(_, update)| *update).collect();
    assert_eq!(text_of(&shown), format!("ab{}", big.repeat(3)));
    drop(first);
}

#[test]
fn a_large_document_is_encoded_once_for_all_who_come_and_what_follows_is_sent_as_it_was_logged() {
    let mut document = shared_by_alice_and_bob();
    let mut typist = Typist::new(1);
    let large = typist.types(&"x".repeat(LARGE_STATE_BYTES));
    document.handle(update(ALICE, 2, &large));
    assert_eq!(document.handle(step1(BOB)), [], "it is not committed");
    let effects = document.handle(committed(1));
    let [
        _,
        Effect::Send {
            message: ToEdge::Step2 { update: first, .. },
            ..
        },
    ] = effects.as_slice()
    else {
        panic!("a receipt and a step 2, not {effects:?}");
    };
    let effects = document.handle(step1(BOB));
    let [("step 2", again)] = told(&effects)[..] else {
        panic!("a step 2, not {effects:?}");
    };
    assert_eq!(first.as_ptr(), again.as_ptr(), "the same memory");

    let second = typist.types("second");
    document.handle(update(ALICE, 3, &second));
    let effects = document.handle(step1(BOB));
    assert_eq!(told(&effects), [("part", first)]);
    document.handle(update(ALICE, 4, &typist.types("third")));
    let effects = document.handle(committed(2));
    assert_eq!(told(&effects), [("step 2", &second)]);

    let effects = document.handle(step1(BOB));
    assert_eq!(told(&effects), [("part", first), ("part", &second)]);
    let nothing = Bytes::from_static(&NO_EDITS);
    let effects = document.handle(Input::StoreAway);
    assert_eq!(told(&effects), [("committed step 2", &nothing)]);
    let effects = document.handle(step1(BOB));
    let shown = [
        ("part", first),
        ("part", &second),
        ("committed step 2", &nothing),
    ];
    assert_eq!(told(&effects), shown);
    let effects = document.handle(committed(3));
    assert_eq!(told(&effects).len(), 2, "the rest for both: {effects:?}");
}

#[test]
fn the_snapshots_of_a_large_document_are_further_apart() {
    let due_after = |bytes: usize| {
        let mut typist = Typist::new(1);
        let state = typist.types(&"x".repeat(bytes));
        let snapshot = Some((Seq(1), &state));
        let mut document = Document::open(Epoch(1), snapshot, &[], Seq(1)).unwrap();
        let mut rows = |is_so: fn(&Document) -> bool| {
            let first = (0..5_000).find(|rows| {
                document.committed = Seq(1 + rows);
                is_so(&document)
            });
            first.unwrap()
        };
        let due = rows(Document::snapshot_is_due);
        (due, rows(Document::snapshot_is_overdue))
    };
    assert_eq!(due_after(1), (500, 2_000));
    assert_eq!(due_after(2_000_000), (976, 2_476));
    assert_eq!(due_after(6_000_000), (2_000, 3_500));
}

#[test]
fn a_long_tail_of_a_large_document_is_encoded_with_it() {
    let mut document = shared_by_alice_and_bob();
    let mut typist = Typist::new(1);
    document.handle(update(
        ALICE,
        2,
        &typist.types(&"x".repeat(LARGE_STATE_BYTES)),
    ));
    let mut bob = Typist::new(2);
    bob.receives(&typist.everything());
    document.handle(step1(BOB));
    for number in 0..=TAIL_UPDATES_MAX as u64 {
        document.handle(update(ALICE, 3 + number, &typist.types("y")));
    }
    document.handle(committed(2 + i64::try_from(TAIL_UPDATES_MAX).unwrap()));
    let effects = document.handle(step1(BOB));
    let [("step 2", state)] = told(&effects)[..] else {
        panic!("one step 2, not {effects:?}");
    };
    assert_eq!(text_of(&[state]), document.text("quill"));

    // Who lacks little is sent little, and the deletes.
    document.handle(update(ALICE, 99, &typist.deletes(0, 1)));
    document.handle(committed(3 + i64::try_from(TAIL_UPDATES_MAX).unwrap()));
    let effects = document.handle(Input::Step1 {
        peer: BOB,
        state_vector: bob.state_vector(),
    });
    let parts = told(&effects);
    assert_eq!(parts.len(), 2, "{effects:?}");
    for (_, update) in parts {
        assert!(update.len() < 200);
        bob.receives(update);
    }
    assert_eq!(text_of(&[&bob.everything()]), document.text("quill"));
}

#[test]
fn what_waits_for_its_commit_is_bounded_and_nothing_that_was_not_taken_is_forgotten() {
    let mut document = shared_by_alice_and_bob();
    let mut typist = Typist::new(1);
    let count = |effects: &[Effect], wanted: &ToEdge| {
        let sent = effects
            .iter()
            .filter(|effect| matches!(effect, Effect::Send { message, .. } if message == wanted));
        sent.count()
    };
    let mut pauses = 0;
    for number in 1..=UNSAVED_UPDATES_MAX {
        let effects = document.handle(update(ALICE, number as u64 + 1, &typist.types("x")));
        assert!(matches!(effects[1], Effect::Append { .. }));
        pauses += count(&effects, &ToEdge::Pause);
        assert_eq!(
            pauses,
            if number < UNCOMMITTED_UPDATES_MAX {
                0
            } else {
                2
            }
        );
    }
    let late = typist.types("late");
    let number = UNSAVED_UPDATES_MAX as u64 + 2;
    assert_eq!(
        document.handle(update(ALICE, number, &late)),
        [Effect::NotAdmitted { reason: "unsaved" }]
    );
    let all = i64::try_from(UNSAVED_UPDATES_MAX).unwrap();
    let effects = document.handle(committed(all - 600));
    assert_eq!(count(&effects, &ToEdge::Resume), 0, "not yet");
    let effects = document.handle(committed(all - 500));
    assert_eq!(count(&effects, &ToEdge::Resume), 2);
    assert!(
        matches!(
            effects.last(),
            Some(Effect::Send {
                to: EDGE,
                message: ToEdge::Step1 { .. }
            })
        ),
        "what was not taken is asked for: {effects:?}"
    );
    let effects = document.handle(step2(ALICE, number + 1, &late));
    assert!(matches!(effects[1], Effect::Append { .. }));
}

#[test]
fn a_read_only_document_takes_nothing_and_acknowledges_what_it_has() {
    let mut typist = Typist::new(1);
    let good = typist.types("good");
    let log = [(Seq(1), good.clone())];
    let mut document = Document::open(Epoch(1), None, &log, Seq(1)).unwrap();
    document.set_read_only();
    document.handle(Input::Attach {
        edge: EDGE,
        since: Bytes::new(),
    });
    document.handle(join(ALICE, ""));
    assert_eq!(document.handle(step2(ALICE, 1, &good)), [receipt(ALICE, 1)]);
    for bytes in [typist.types("more"), typist.deletes(0, 2)] {
        assert_eq!(
            document.handle(update(ALICE, 2, &bytes)),
            [Effect::NotAdmitted { reason: "degraded" }]
        );
    }
    assert_eq!(document.text("quill"), "good");
}

#[test]
fn malformed_bytes_close_their_socket_and_change_nothing() {
    let mut document = shared_by_alice_and_bob();
    for bytes in [
        &[1, 1, 1, 2, 162, 8, 6, 0, 0, 0][..],
        &[255, 255, 255, 255, 15],
        b"text",
    ] {
        let effects = document.handle(update(ALICE, 2, &Bytes::copy_from_slice(bytes)));
        assert_eq!(effects[0], Effect::NotAdmitted { reason: "invalid" });
        assert!(matches!(
            &effects[1],
            Effect::Send {
                message: ToEdge::Refused { .. },
                ..
            }
        ));
    }
    assert_eq!(document.assigned_seq(), Seq(0));
    assert_eq!(document.encode_state().as_ref(), NO_EDITS);
}

#[test]
fn what_edits_made_larger_than_one_edit_may_be_is_opened_again() {
    const STEP: u32 = 20_000;
    let mut document = shared_by_alice_and_bob();
    let steps = u32::try_from(UPDATE_STRUCTS_MAX).unwrap() / STEP + 1;
    let mut log = Vec::new();
    for step in 0..steps {
        let typed = typed_backwards(step * STEP..(step + 1) * STEP);
        let effects = document.handle(update(ALICE, u64::from(step) + 2, &typed));
        let Some(Effect::Append { seq, update, .. }) = effects.get(1) else {
            panic!("step {step} is not taken: {effects:?}");
        };
        log.push((*seq, update.clone()));
        document.handle(Input::Committed { seq: *seq });
    }
    let (last, state) = (document.assigned_seq(), document.encode_state());
    let too_many = scan::ScanError::TooMany {
        what: "structs",
        max: UPDATE_STRUCTS_MAX,
    };
    assert_eq!(scan::scan_update(&state).unwrap_err(), too_many);
    for (snapshot, log) in [(Some((last, &state)), &[][..]), (None, &log)] {
        let opened = Document::open(Epoch(2), snapshot, log, last).unwrap();
        assert_eq!(opened.encode_state(), state);
    }
    // Nor does a failover of the database lose it.
    let mut empty = Document::open(Epoch(3), None, &[], Seq(0)).unwrap();
    let effects = empty.handle(Input::Restore { state });
    assert!(matches!(effects[1], Effect::Append { .. }), "{effects:?}");
}

#[test]
fn a_full_document_takes_nothing_but_deletions_and_opens_all_the_same() {
    let mut document = shared_by_alice_and_bob();
    let mut typist = Typist::new(1);
    document.handle(update(ALICE, 2, &typist.types("hello")));
    let whole = Summary {
        structs: DOCUMENT_MEMORY_MAX / STRUCT_BYTES + 1,
        ..Summary::default()
    };
    document.set_snapshot(Seq(1), typist.everything(), whole);
    let effects = document.handle(update(ALICE, 3, &typist.types("!")));
    let [
        Effect::NotAdmitted { reason: "full" },
        Effect::Send {
            message: ToEdge::Refused { reason, .. },
            ..
        },
    ] = effects.as_slice()
    else {
        panic!("a refusal, not {effects:?}");
    };
    assert!(reason.contains("the document is full"), "{reason}");
    let mut other = Typist::new(2);
    other.receives(&document.encode_state());
    let deleted = other.deletes(0, 1);
    let effects = document.handle(update(ALICE, 4, &deleted));
    assert!(matches!(effects[1], Effect::Append { .. }), "{effects:?}");

    // What was only taken for much is counted again before anything is refused.
    let mut document = shared_by_alice_and_bob();
    let mut typist = Typist::new(1);
    for number in 0..DOCUMENT_MEMORY_MAX / (16 << 20) {
        let big = typist.types(&"x".repeat(8 << 20));
        document.handle(update(ALICE, number * 2 + 2, &big));
        let gone = typist.deletes(0, 8 << 20);
        let effects = document.handle(update(ALICE, number * 2 + 3, &gone));
        assert!(matches!(effects[1], Effect::Append { .. }), "{effects:?}");
        let seq = document.assigned_seq();
        document.handle(Input::Committed { seq });
    }
    assert!(document.memory() < DOCUMENT_MEMORY_MAX / 2);
}

/// The second would be told that its edit is saved: the document has that clock.
#[test]
fn of_two_devices_with_one_client_id_the_second_is_refused() {
    let mut document = shared_by_alice_and_bob();
    let first = Typist::new(1).types("hello");
    document.handle(update(ALICE, 2, &first));
    document.handle(committed(1));
    for other in [
        Typist::new(1).types("jello"),
        Typist::new(1).types("hallo and more"),
    ] {
        let effects = document.handle(update(BOB, 2, &other));
        assert_eq!(effects[0], Effect::NotAdmitted { reason: "conflict" });
        assert!(
            matches!(&effects[1..], [Effect::Send { to: OTHER_EDGE, message: ToEdge::Refused { reason, .. } }]
                if reason.contains("in use by another device")),
            "{effects:?}"
        );
    }
    assert_eq!(document.assigned_seq(), Seq(1));
    // Whoever goes on from what is there is welcome.
    document.handle(step2(BOB, 3, &Typist::new(1).types("hello, both")));
    assert_eq!(document.assigned_seq(), Seq(2));
    assert_eq!(document.text("quill"), "hello, both");
}

#[test]
fn updates_that_can_never_be_taken_cost_nothing_that_stays() {
    let mut document = shared_by_alice_and_bob();
    let mut known = Typist::new(1);
    document.handle(update(ALICE, 2, &known.types("known")));
    document.handle(committed(1));
    for client in 0..20_000_u64 {
        // "x" at clock 7 of a client of whom nothing else ever comes
        let mut lone = vec![1, 1];
        crate::wire::varint::write_var_uint(&mut lone, 1_000 + client);
        lone.extend([7, 4, 1, 1, b't', 1, b'x', 0]);
        let effects = document.handle(step2(BOB, 3 + client, &lone.into()));
        assert_eq!(effects[0], Effect::NotAdmitted { reason: "gap" });
    }
    assert_eq!(document.assigned_seq(), Seq(1));
    assert_eq!(document.encode_state(), known.everything());
}

#[test]
fn presence_belongs_to_its_socket_and_ends_with_it_or_when_it_is_not_renewed() {
    let mut document = shared_by_alice_and_bob();
    let at = Duration::from_secs;
    assert_eq!(
        document.handle(presence(ALICE, 7, 1, "{}", at(0))),
        [shown(7, 1, "{}")]
    );
    assert_eq!(
        document.handle(presence(ALICE, 7, 1, "{}", at(1))),
        [],
        "an older or equal clock says nothing new"
    );
    document.handle(join(BOB, "bob"));
    assert_eq!(
        document.handle(presence(BOB, 7, 9, "{}", at(2))),
        [],
        "another user must not speak for it"
    );
    assert_eq!(
        document.handle(presence(ALICE, 7, 2, "{}", at(20))),
        [shown(7, 2, "{}")]
    );
    assert_eq!(document.handle(Input::Expire { now: at(49) }), []);
    assert_eq!(
        document.handle(Input::Expire { now: at(50) }),
        [shown(7, 2, "null")]
    );
    document.handle(presence(BOB, 8, 1, "{}", at(51)));
    assert_eq!(
        document.handle(Input::Detach { edge: OTHER_EDGE }),
        [shown(8, 1, "null")]
    );
}

#[test]
fn a_document_opens_from_snapshot_and_log_and_refuses_a_hole() {
    let mut typist = Typist::new(1);
    let first = typist.types("a");
    let snapshot = typist.everything();
    let second = typist.types("b");
    let third = typist.types("c");
    let log = [(Seq(2), second), (Seq(3), third.clone())];
    let opened = Document::open(Epoch(4), Some((Seq(1), &snapshot)), &log, Seq(3)).unwrap();
    assert_eq!((opened.text("quill").as_str(), opened.tail()), ("abc", 2));
    let holed = Document::open(Epoch(4), None, &[(Seq(1), first), (Seq(2), third)], Seq(2));
    assert!(holed.is_err());
}

#[test]
fn a_document_that_was_opened_ahead_goes_on_with_the_tail() {
    let mut typist = Typist::new(1);
    let rows: Vec<(Seq, Bytes)> = (1..=3).map(|seq| (Seq(seq), typist.types("a"))).collect();
    let mut document = Document::open(Epoch(0), None, &rows[..1], Seq(1)).unwrap();
    document.resume(Epoch(7), &rows[1..]).unwrap();
    assert_eq!(document.text("quill"), "aaa");
    assert_eq!(document.committed_seq(), Seq(3));
    let attached = document.handle(Input::Attach {
        edge: EDGE,
        since: Bytes::new(),
    });
    assert!(matches!(
        &attached[0],
        Effect::Send {
            message: ToEdge::Attached {
                epoch: Epoch(7),
                ..
            },
            ..
        }
    ));
    let mut late = Document::open(Epoch(0), None, &rows[..1], Seq(1)).unwrap();
    assert!(
        late.resume(Epoch(7), &rows[2..]).is_err(),
        "a row is missing"
    );
}

#[test]
fn what_the_store_lost_is_written_again_from_memory() {
    let mut typist = Typist::new(1);
    let rows: Vec<(Seq, Bytes)> = (1..=3).map(|seq| (Seq(seq), typist.types("a"))).collect();
    let memory = Document::open(Epoch(4), None, &rows, Seq(3)).unwrap();
    let state = memory.encode_state();
    let mut stored = Document::open(Epoch(5), None, &rows[..1], Seq(1)).unwrap();
    let effects = stored.handle(Input::Restore {
        state: state.clone(),
    });
    let [
        Effect::FanOut { from: None, .. },
        Effect::Append {
            seq: Seq(2),
            update,
            ..
        },
    ] = effects.as_slice()
    else {
        panic!("one append, not {effects:?}");
    };
    assert_eq!(stored.text("quill"), "aaa");
    assert_eq!(text_of(&[&rows[0].1, update]), "aaa");
    assert_eq!(stored.handle(Input::Restore { state }), []);
}

/// A client's document.
struct Typist(Doc);

impl Typist {
    fn new(client: u64) -> Self {
        let offset_kind = OffsetKind::Utf16;
        let client_id = ClientID::new(client);
        Self(Doc::with_options(Options {
            client_id,
            offset_kind,
            ..Options::default()
        }))
    }

    /// Types at the end and answers the update.
    fn types(&mut self, text: &str) -> Bytes {
        let quill = self.0.get_or_insert_text("quill");
        let mut txn = self.0.transact_mut();
        let end = quill.len(&txn);
        quill.insert(&mut txn, end, text);
        txn.encode_update_v1().into()
    }

    fn has_nothing(&self) -> bool {
        let quill = self.0.get_or_insert_text("quill");
        quill.len(&self.0.transact()) == 0
    }

    fn deletes_first(&mut self) {
        let quill = self.0.get_or_insert_text("quill");
        quill.remove_range(&mut self.0.transact_mut(), 0, 1);
    }

    /// Deletes and answers the update.
    fn deletes(&mut self, index: u32, length: u32) -> Bytes {
        let quill = self.0.get_or_insert_text("quill");
        let mut txn = self.0.transact_mut();
        quill.remove_range(&mut txn, index, length);
        txn.encode_update_v1().into()
    }

    fn receives(&mut self, update: &[u8]) {
        let update = Update::decode_v1(update).unwrap();
        self.0.transact_mut().apply_update(update).unwrap();
    }

    fn everything(&self) -> Bytes {
        self.0
            .transact()
            .encode_state_as_update_v1(&StateVector::default())
            .into()
    }

    fn state_vector(&self) -> Bytes {
        self.0.transact().state_vector().encode_v1().into()
    }
}

/// Clocks of client 1: each "x" stands before the one before it, so that none joins another.
fn typed_backwards(clocks: std::ops::Range<u32>) -> Bytes {
    use crate::wire::varint::write_var_uint;
    let mut update = vec![1];
    write_var_uint(&mut update, u64::from(clocks.end - clocks.start));
    update.push(1);
    write_var_uint(&mut update, clocks.start.into());
    for clock in clocks {
        if let Some(before) = clock.checked_sub(1) {
            update.extend([0x44, 1]);
            write_var_uint(&mut update, before.into());
        } else {
            update.extend([0x04, 1, 1, b't']);
        }
        update.extend([1, b'x']);
    }
    update.push(0);
    update.into()
}

fn text_of(updates: &[&Bytes]) -> String {
    let mut reader = Typist::new(99);
    for update in updates {
        reader.receives(update);
    }
    let quill = reader.0.get_or_insert_text("quill");
    quill.get_string(&reader.0.transact())
}

/// What a newcomer is sent, in order.
fn told(effects: &[Effect]) -> Vec<(&'static str, &Bytes)> {
    let sent = effects.iter().filter_map(|effect| match effect {
        Effect::Send { message, .. } => Some(message),
        _ => None,
    });
    sent.filter_map(|message| match message {
        ToEdge::Part { update, .. } => Some(("part", update)),
        ToEdge::CommittedStep2 { update, .. } => Some(("committed step 2", update)),
        ToEdge::Step2 { update, .. } => Some(("step 2", update)),
        _ => None,
    })
    .collect()
}

/// An empty document with both sockets joined and their first answers received.
fn shared_by_alice_and_bob() -> Document {
    let mut document = Document::open(Epoch(1), None, &[], Seq(0)).unwrap();
    for peer in [ALICE, BOB] {
        document.handle(Input::Attach {
            edge: peer.edge,
            since: Bytes::new(),
        });
        document.handle(join(peer, &format!("{:?}", peer.edge)));
        document.handle(step2(peer, 1, &Bytes::from_static(&NO_EDITS)));
    }
    document
}

const fn peer(edge: EdgeId, connection: u64) -> Peer {
    Peer {
        edge,
        connection: ConnectionId(connection),
    }
}

fn update(peer: Peer, number: u64, update: &Bytes) -> Input {
    Input::Update {
        peer,
        number,
        kind: UpdateKind::Update,
        update: update.clone(),
    }
}

fn step2(peer: Peer, number: u64, update: &Bytes) -> Input {
    Input::Update {
        peer,
        number,
        kind: UpdateKind::Step2,
        update: update.clone(),
    }
}

fn join(peer: Peer, author: &str) -> Input {
    Input::Join {
        peer,
        author: author.to_owned(),
    }
}

fn step1(peer: Peer) -> Input {
    Input::Step1 {
        peer,
        state_vector: Bytes::from_static(&[0]),
    }
}

fn presence(peer: Peer, client: u64, clock: u32, json: &str, now: Duration) -> Input {
    let payload = awareness::encode([awareness::Entry {
        client,
        clock,
        json,
    }]);
    Input::Awareness { peer, payload, now }
}

fn shown(client: u64, clock: u32, json: &str) -> Effect {
    Effect::Presence {
        payload: awareness::encode([awareness::Entry {
            client,
            clock,
            json,
        }]),
    }
}

const fn committed(seq: i64) -> Input {
    Input::Committed { seq: Seq(seq) }
}

fn fan_out(from: Peer, update: &Bytes) -> Effect {
    Effect::FanOut {
        from: Some(from),
        update: update.clone(),
    }
}

fn append(seq: i64, update: &Bytes) -> Effect {
    let author = format!("{EDGE:?}");
    Effect::Append {
        seq: Seq(seq),
        update: update.clone(),
        author,
    }
}

const fn receipt(peer: Peer, upto: u64) -> Effect {
    Effect::Send {
        to: peer.edge,
        message: ToEdge::Receipt {
            connection: peer.connection,
            upto,
        },
    }
}
