use collab_core::document::NO_EDITS;
use collab_core::limits::SOCKET_QUEUE_BYTES_MAX;
use collab_core::wire::hocuspocus::Status;
use collab_core::wire::{hocuspocus, y_sweet, y_websocket};
use futures::FutureExt;
use tokio::sync::Semaphore;
use yrs::{Doc, ReadTxn, Text, Transact, TransactionMut, diff_updates_v1};

use super::*;
use crate::edge::outbox::{Outbox, Taken, Taker};

#[test]
fn an_answer_to_an_owner_that_is_gone_is_not_taken_for_one_to_the_present_owner() {
    let (mut socket, _queue) = socket(Family::YWebsocket, Access::Write);
    let answer = Bytes::from_static(&[1, 1, 1, 0, 0]);
    socket.asked = 1;
    // The owner goes before the answer is here, and the next one asks too.
    socket.asked_before += std::mem::take(&mut socket.asked);
    socket.asked += 1;
    assert_eq!(socket.take_update(UpdateKind::Step2, &answer, true), None);
    assert_eq!(
        socket.take_update(UpdateKind::Step2, &answer, true),
        Some(2)
    );
    assert_eq!((socket.asked, socket.asked_before), (0, 0));
}

#[test]
fn a_socket_gets_what_it_is_owed_once_and_in_order() {
    let (mut socket, queue) = socket(Family::YWebsocket, Access::Write);
    for byte in 1..=3 {
        socket.take_update(UpdateKind::Update, &update(byte), true);
    }
    socket.ask_receipt(Bytes::from_static(b"\x01\x03"));
    let sent = || std::iter::from_fn(|| queue.try_take()).collect::<Vec<_>>();
    socket.receipted(2, &seconds());
    assert_eq!(
        sent(),
        [
            y_websocket::update(&update(1)),
            y_websocket::update(&update(2))
        ]
    );
    socket.receipted(2, &seconds());
    assert!(sent().is_empty());
    socket.receipted(3, &seconds());
    assert_eq!(
        sent(),
        [y_websocket::update(&update(3)), y_sweet::saved(b"\x01\x03")]
    );
}

/// Another tab of the same browser has the edit, too, and its answer was faster.
#[test]
fn the_same_bytes_of_another_client_do_not_pass_for_a_receipt() {
    let (mut socket, queue) = socket(Family::YWebsocket, Access::Write);
    for byte in 1..=2 {
        let told = Told::Update(&update(byte));
        socket.hold(socket.family.frame(told).expect("it is told of edits"));
    }
    socket.take_update(UpdateKind::Update, &update(1), true);
    let others = Edit::new(Some(ConnectionId(8)), update(1));
    assert!(!socket.wants(&others), "from now on they are kept from it");
    let state = Bytes::from_static(b"state");
    socket.sync(&state, Sync::Whole, &mut Recent::default());
    let sent = || std::iter::from_fn(|| queue.try_take()).collect::<Vec<_>>();
    assert_eq!(
        sent(),
        [
            y_websocket::sync_step2(&state),
            y_websocket::update(&update(2))
        ]
    );
    socket.receipted(1, &seconds());
    assert_eq!(sent(), [y_websocket::update(&update(1))]);
}

#[test]
fn a_socket_wants_neither_its_own_edit_nor_the_same_bytes_of_another_before_its_receipt() {
    let (mut socket, _queue) = socket(Family::YWebsocket, Access::Write);
    let edit = |except, byte| Edit::new(except, update(byte));
    assert!(!socket.wants(&edit(Some(CONNECTION), 1)));
    assert!(socket.wants(&edit(Some(ConnectionId(8)), 1)));
    for byte in 1..=3 {
        socket.take_update(UpdateKind::Update, &update(byte), true);
    }
    assert!(!socket.wants(&edit(Some(ConnectionId(8)), 1)));
    assert!(!socket.wants(&edit(None, 3)));
    assert!(socket.wants(&edit(None, 4)));
    socket.receipted(2, &seconds());
    assert!(socket.wants(&edit(None, 2)) && !socket.wants(&edit(None, 3)));
    socket.receipted(3, &seconds());
    assert!(socket.wants(&edit(None, 3)));
}

/// What it sent on an earlier connection may come in after it has begun anew, and was seen to when a frozen node went on:
/// the edits were passed on, and never committed.
#[test]
fn what_a_client_had_when_it_began_does_not_come_back_before_it_is_durable() {
    let doc = Doc::with_client_id(1);
    let text = doc.get_or_insert_text("quill");
    let typed = transact(&doc, |change| text.insert(change, 0, "typed"));
    let replaced = transact(&doc, |change| {
        text.remove_range(change, 0, 2);
        text.push(change, "over");
    });
    let began = doc.transact().state_vector();
    let later = transact(&doc, |change| text.push(change, "later"));

    let (mut socket, _queue) = socket(Family::YWebsocket, Access::Write);
    socket.feed = Feed::Early;
    socket.begin(began.encode_v1().into(), 1);
    let frame = |socket: &Socket, update: &Bytes| {
        let mut edit = Edit::new(Some(ConnectionId(8)), update.clone());
        socket.frame_of(&mut edit)
    };
    assert_eq!(frame(&socket, &typed), None);
    let deletes = diff_updates_v1(&replaced, &began.encode_v1()).expect("it is an update");
    assert_ne!(deletes, replaced, "the client would know it again");
    assert_eq!(
        frame(&socket, &replaced),
        Some(y_websocket::update(&deletes)),
        "another client may have deleted that"
    );
    assert_eq!(frame(&socket, &later), Some(y_websocket::update(&later)));
    socket.receipted(1, &seconds());
    assert_eq!(frame(&socket, &typed), Some(y_websocket::update(&typed)));
}

#[test]
fn a_socket_that_has_not_begun_to_sync_keeps_no_edits() {
    let (mut socket, queue) = socket(Family::YWebsocket, Access::Write);
    socket.feed = Feed::Early;
    socket.hold(Bytes::from_static(b"in its step 2"));
    socket.begin(Bytes::from_static(&NO_CLOCKS), 1);
    socket.hold(Bytes::from_static(b"later"));
    let state = Bytes::from_static(b"state");
    socket.sync(&state, Sync::Whole, &mut Recent::default());
    let sent: Vec<Bytes> = std::iter::from_fn(|| queue.try_take()).collect();
    let step2 = y_websocket::sync_step2(&state);
    assert_eq!(sent, [step2, Bytes::from_static(b"later")]);
}

#[test]
fn a_deletion_in_an_answer_is_receipted_as_any_edit() {
    let (mut socket, queue) = socket(Family::YWebsocket, Access::Write);
    let deletes = Bytes::from_static(&[0, 1, 1, 1, 0, 1]);
    socket.take_update(UpdateKind::Step2, &deletes, true);
    socket.take_update(UpdateKind::Step2, &Bytes::from_static(&NO_EDITS), true);
    socket.receipted(2, &seconds());
    assert_eq!(queue.try_take(), Some(y_websocket::update(&deletes)));
    assert!(queue.try_take().is_none());
}

#[test]
fn a_client_that_counts_gets_one_status_for_its_handshake_and_one_for_each_change() {
    let (mut socket, queue) = hocuspocus(Access::Write);
    let sent = || std::iter::from_fn(|| queue.try_take()).collect::<Vec<_>>();
    let saved = hocuspocus::sync_status("notes", Status::Saved);
    socket.begin(Bytes::from_static(&[0]), 1);
    socket.receipted(0, &seconds());
    assert!(sent().is_empty(), "what it has is not here yet");
    socket.take_update(UpdateKind::Step2, &update(1), true);
    socket.take_update(UpdateKind::Update, &update(2), true);
    socket.receipted(1, &seconds());
    assert_eq!(sent(), vec![saved.clone()], "its handshake");
    // Another owner asks what it has; that is no change of the client.
    socket.take_update(UpdateKind::Step2, &update(3), true);
    socket.receipted(3, &seconds());
    assert_eq!(sent(), vec![saved.clone()], "its change");

    // It begins anew, and forgets what it has counted.
    socket.take_update(UpdateKind::Update, &update(4), true);
    socket.begin(Bytes::from_static(&[0]), 1);
    socket.receipted(4, &seconds());
    assert_eq!(sent(), vec![saved.clone()], "its handshake only");
    socket.begin(Bytes::from_static(&[0]), 1);
    assert_eq!(sent(), [saved], "all that it has sent is durable");
}

#[test]
fn changes_before_access_was_granted_are_counted_too() {
    let (mut socket, queue) = hocuspocus(Access::Write);
    socket.begin(Bytes::from_static(&[0]), 3);
    socket.take_update(UpdateKind::Step2, &update(1), true);
    socket.receipted(1, &seconds());
    assert_eq!(std::iter::from_fn(|| queue.try_take()).count(), 3);
}

#[test]
fn a_readers_change_is_never_receipted_before_it_may_write() {
    let (mut socket, queue) = hocuspocus(Access::Read);
    let sent = || std::iter::from_fn(|| queue.try_take()).collect::<Vec<_>>();
    let (saved, refused) = (
        hocuspocus::sync_status("notes", Status::Saved),
        hocuspocus::sync_status("notes", Status::Refused),
    );
    socket.begin(Bytes::from_static(&[0]), 1);
    assert_eq!(
        socket.take_update(UpdateKind::Step2, &Bytes::from_static(&NO_EDITS), true),
        Some(1)
    );
    socket.receipted(1, &seconds());
    assert_eq!(sent(), vec![saved.clone()]);
    socket.refuse_update();
    assert_eq!(sent(), [refused]);
    socket.admit(Visitor {
        author: Box::default(),
        access: Access::Write,
    });
    assert!(sent().is_empty());
    // The owner asks, and this time the answer counts.
    assert_eq!(
        socket.take_update(UpdateKind::Step2, &update(1), true),
        Some(3)
    );
    socket.receipted(3, &seconds());
    assert_eq!(sent(), [saved]);
}

#[test]
fn a_client_that_closes_silent_sockets_hears_something_while_its_receipt_waits() {
    let (mut socket, queue) = socket(Family::YSweet, Access::Write);
    socket.take_update(UpdateKind::Step2, &update(1), true);
    socket.ask_receipt(Bytes::from_static(&[0]));
    assert_eq!(
        queue.try_take(),
        Some(Bytes::from_static(y_websocket::KEEPALIVE))
    );
    socket.receipted(1, &seconds());
    assert_eq!(queue.try_take(), Some(y_sweet::saved(&[0])));
    assert!(queue.try_take().is_none(), "it takes no echo");
}

#[test]
fn a_room_that_ends_without_a_word_closes_its_sockets() {
    let (socket, queue) = socket(Family::YWebsocket, Access::Write);
    drop(socket);
    let taken = queue.take(&mut Vec::new()).now_or_never();
    let Some(Taken::End(connection, close)) = taken else {
        panic!("an end, not {taken:?}");
    };
    assert_eq!((connection, close.code), (CONNECTION, CLOSE_TRY_AGAIN));
}

#[test]
fn a_socket_that_cannot_follow_is_sent_one_difference_when_it_has_caught_up() {
    let (mut socket, queue) = socket(Family::YWebsocket, Access::Write);
    let (room, mut told) = queue::unbounded();
    socket.feed = Feed::Live;
    let delivered = StateVector::from_iter([(ClientID::new(1), 7)]);
    while !socket.line.out.is_full() {
        socket.put(Bytes::from_static(&[0; 4096]));
    }
    socket.fall_behind(&delivered, &room.downgrade());
    assert_eq!(socket.step1, Some(delivered.encode_v1().into()));
    let mut frames = Vec::new();
    queue.take(&mut frames).now_or_never();
    let bytes = |frames: &[Bytes]| frames.iter().map(Bytes::len).sum();
    let (most, last) = frames.split_at(frames.len() - 1);
    queue.sent(most.len(), bytes(most), &mut Vec::new());
    assert!(told.try_recv().is_err());
    queue.sent(1, bytes(last), &mut Vec::new());
    assert!(matches!(told.try_recv(), Ok(FromSocket::Drained { .. })));
    assert!(!socket.line.out.is_full());
    // The room asks for it from there on, and edits wait until it is here.
    socket.feed = Feed::Held;
    socket.hold(Bytes::from_static(b"edit"));
    socket.sync(
        &Bytes::from_static(b"difference"),
        Sync::Whole,
        &mut Recent::default(),
    );
    let sent: Vec<Bytes> = std::iter::from_fn(|| queue.try_take()).collect();
    let difference = y_websocket::sync_step2(b"difference");
    assert_eq!(sent, [difference, Bytes::from_static(b"edit")]);
    assert!(socket.feed == Feed::Live && socket.step1.is_none());
}

#[test]
fn a_step_2_that_more_edits_followed_than_are_kept_is_asked_for_again() {
    let (mut socket, _queue) = socket(Family::YWebsocket, Access::Write);
    socket.step1 = Some(Bytes::from_static(&[0]));
    socket.hold(Bytes::from(vec![0; SOCKET_QUEUE_BYTES_MAX + 1]));
    assert!(socket.held.is_empty());
    socket.sync(
        &Bytes::from_static(b"old"),
        Sync::Whole,
        &mut Recent::default(),
    );
    assert!(socket.feed == Feed::Held && socket.step1.is_some());
    socket.sync(
        &Bytes::from_static(b"new"),
        Sync::Whole,
        &mut Recent::default(),
    );
    assert!(socket.feed == Feed::Live && socket.step1.is_none());
}

#[test]
fn a_paused_socket_is_read_once_more_and_then_when_the_pause_is_over() {
    let (mut socket, _queue) = socket(Family::YWebsocket, Access::Write);
    let all = socket.line.credit.available_permits();
    socket.pause(true);
    assert_eq!(
        socket.line.credit.available_permits(),
        1,
        "or nobody could join"
    );
    let take = |socket: &mut Socket| {
        socket.line.credit.try_acquire().unwrap().forget();
        socket.take_update(UpdateKind::Update, &update(1), true);
    };
    take(&mut socket);
    assert_eq!(socket.line.credit.available_permits(), 0);
    socket.pause(false);
    assert_eq!(socket.line.credit.available_permits(), all - 1);
    take(&mut socket);
    socket.pause(true);
    assert_eq!(socket.line.credit.available_permits(), 0);
    socket.receipted(2, &seconds());
    assert_eq!(socket.line.credit.available_permits(), 1);
    socket.pause(false);
    assert_eq!(socket.line.credit.available_permits(), all);
}

#[test]
fn an_edit_of_a_damaged_document_is_in_no_receipt_before_the_repair() {
    let (mut socket, queue) = socket(Family::YSweet, Access::Write);
    (socket.sent, socket.durable) = (1, 1);
    socket.tell_read_only(Some("damaged"));
    assert_eq!(
        queue.try_take(),
        Some(y_websocket::permission_denied("damaged"))
    );
    socket.refuse_update();
    socket.ask_receipt(Bytes::from_static(b"\x02"));
    socket.receipted(1, &seconds());
    let alive = Bytes::from_static(y_websocket::KEEPALIVE);
    assert_eq!(queue.try_take(), Some(alive));
    assert!(queue.try_take().is_none());
    socket.tell_read_only(None);
    socket.take_update(UpdateKind::Step2, &update(1), true);
    socket.receipted(3, &seconds());
    assert_eq!(queue.try_take(), Some(y_sweet::saved(b"\x02")));
}

const CONNECTION: ConnectionId = ConnectionId(7);

fn hocuspocus(access: Access) -> (Socket, Taker) {
    let address = "notes".into();
    socket(Family::Hocuspocus { address }, access)
}

fn socket(family: Family, access: Access) -> (Socket, Taker) {
    let (out, queue) = Outbox::new(None);
    let visitor = Visitor {
        author: Box::default(),
        access,
    };
    let line = Line {
        out,
        credit: Arc::new(Semaphore::new(8)),
    };
    let mut socket = Socket::new(CONNECTION, visitor, family, line, Arc::default());
    socket.feed = Feed::Held;
    (socket, queue)
}

fn transact(doc: &Doc, act: impl FnOnce(&mut TransactionMut<'_>)) -> Bytes {
    let mut change = doc.transact_mut();
    act(&mut change);
    change.encode_update_v1().into()
}

fn update(byte: u8) -> Bytes {
    Bytes::copy_from_slice(&[1, byte])
}

fn seconds() -> prometheus::Histogram {
    prometheus::Histogram::with_opts(prometheus::HistogramOpts::new("s", "s")).unwrap()
}
