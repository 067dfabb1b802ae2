//! A document that rests, against one that never does.

use proptest::prelude::*;

use super::*;
use crate::limits::{REST_AFTER, RESTING_BYTES_MAX};

#[derive(Clone, Copy, Debug)]
enum Step {
    Types(usize),
    Deletes(usize),
    /// Sends all it has.
    Syncs(usize),
    Asks(usize),
    Commit,
    /// Nothing for a while.
    Quiet,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..2_usize).prop_map(Step::Types),
        2 => (0..2_usize).prop_map(Step::Deletes),
        1 => (0..2_usize).prop_map(Step::Syncs),
        2 => (0..2_usize).prop_map(Step::Asks),
        3 => Just(Step::Commit),
        3 => Just(Step::Quiet),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn nobody_can_tell_that_a_document_rested(steps in steps()) {
        let (mut awake, mut resting) = (shared_by_alice_and_bob(), shared_by_alice_and_bob());
        let mut typists = [Typist::new(1), Typist::new(2)];
        let peers = [ALICE, BOB];
        let mut now = Duration::ZERO;
        for (number, step) in (2..).zip(steps) {
            let input = match step {
                Step::Types(who) => update(peers[who], number, &typists[who].types("word ")),
                Step::Deletes(who) if typists[who].has_nothing() => continue,
                Step::Deletes(who) => update(peers[who], number, &typists[who].deletes(0, 1)),
                Step::Syncs(who) => step2(peers[who], number, &typists[who].everything()),
                Step::Asks(who) => Input::Step1 {
                    peer: peers[who],
                    state_vector: typists[who].state_vector(),
                },
                Step::Commit => committed(awake.assigned_seq().0),
                Step::Quiet => {
                    rests(&mut resting, &mut now);
                    prop_assert_eq!(resting.is_at_rest(), resting.is_settled());
                    continue;
                }
            };
            let effects = awake.handle(input.clone());
            prop_assert_eq!(&resting.handle(input), &effects);
            for effect in effects {
                match effect {
                    Effect::FanOut { from, update } => {
                        let reader = usize::from(from == Some(ALICE));
                        typists[reader].receives(&update);
                    }
                    Effect::Send { to, message: ToEdge::Step2 { update, .. } } => {
                        typists[usize::from(to == OTHER_EDGE)].receives(&update);
                    }
                    _ => {}
                }
            }
        }
        prop_assert_eq!(resting.encode_state(), awake.encode_state());
        prop_assert_eq!(resting.text("quill"), awake.text("quill"));
    }
}

#[test]
fn a_document_rests_only_when_it_is_small_and_durable_and_nobody_has_needed_it_for_a_while() {
    let mut document = shared_by_alice_and_bob();
    let mut now = Duration::ZERO;
    let mut typist = Typist::new(1);
    document.handle(update(ALICE, 2, &typist.types("short")));
    rests(&mut document, &mut now);
    assert!(!document.is_at_rest(), "an edit is not durable");
    document.handle(committed(1));
    document.handle(Input::Expire { now });
    assert!(document.is_at_rest());
    let memory = document.memory();
    document.text("quill");
    assert_eq!(document.memory(), memory, "it may be built at any moment");
    assert!(!document.is_at_rest(), "its text was asked for");

    document.handle(update(ALICE, 3, &typist.types("long ")));
    document.handle(committed(2));
    document.handle(Input::Expire { now });
    assert!(!document.is_at_rest(), "it has just changed");
    rests(&mut document, &mut now);
    assert!(document.is_at_rest());

    let large = typist.types(&"x".repeat(RESTING_BYTES_MAX));
    document.handle(update(ALICE, 4, &large));
    document.handle(committed(3));
    rests(&mut document, &mut now);
    assert!(!document.is_at_rest(), "it is large");
}

fn rests(document: &mut Document, now: &mut Duration) {
    for _ in 0..2 {
        *now += REST_AFTER;
        document.handle(Input::Expire { now: *now });
    }
}
