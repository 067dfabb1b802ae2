//! Every bound and timing of the data plane, with compile-time checks of how they relate.
//!
//! Lengths are bytes unless the name says otherwise.

use std::time::Duration;

use crate::document::STRUCT_BYTES;

/// Longest document id.
pub const DOCUMENT_ID_BYTES_MAX: usize = 255;
/// Slots of a cluster unless it was created with another number.
pub const SLOTS_DEFAULT: u16 = 1024;
/// Fewest slots of a cluster.
pub const SLOTS_MIN: u16 = 256;
/// Most slots of a cluster.
pub const SLOTS_MAX: u16 = 16384;
/// Most documents with a slot of their own.
pub const PINS_MAX: usize = 256;
/// Busy documents that a node tells the operator of.
pub const BUSY_DOCUMENTS_MAX: usize = 16;
/// Points of a node on the ring.
pub const POINTS_PER_NODE: u32 = 256;

/// Connections that a node takes unless it is told another number.
pub const CONNECTIONS_DEFAULT: usize = 20_000;
/// File descriptors that a node keeps for itself: store, other nodes, listeners, files.
pub const OWN_FILES: usize = 128;
/// A request, also the one that becomes a WebSocket, has its headers complete after this time.
pub const HEADERS_WITHIN: Duration = Duration::from_secs(10);
/// Sockets of one document on one node; the next is told to try again.
pub const CONNECTIONS_PER_DOCUMENT_MAX: usize = 10_000;
/// Sockets of one authenticated user in one document on one node; the next is told to try again.
pub const CONNECTIONS_PER_USER_MAX: usize = 100;
/// Messages of one socket per second; who sends more is read more slowly.
pub const MESSAGES_PER_SECOND_MAX: u32 = 2_000;
/// Messages of one socket that may come at once.
pub const MESSAGES_BURST: u32 = 10_000;
/// Bytes of presence of one socket per second: each goes to everybody in the document.
pub const PRESENCE_BYTES_PER_SECOND_MAX: u32 = 64 * 1024;
/// Bytes of presence of one socket that may come at once.
pub const PRESENCE_BYTES_BURST: u32 = 512 * 1024;
/// Edits of a reader per second that are passed over; who sends more is closed.
pub const READER_EDITS_PER_SECOND_MAX: u32 = 20;
/// Edits of a reader that may come at once.
pub const READER_EDITS_BURST: u32 = 400;
/// A client that was silent for this long is sent a ping.
pub const PING_AFTER: Duration = Duration::from_secs(15);
/// A client that was silent for this long is gone.
pub const GONE_AFTER: Duration = Duration::from_secs(32);
/// Between two looks at how long a client has been silent.
pub const PULSE_EVERY: Duration = Duration::from_secs(5);
/// Largest WebSocket message a client may send.
pub const FRAME_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Deepest nesting of values inside one update.
pub const UPDATE_DEPTH_MAX: usize = 64;
/// Deepest nesting of shared types in a document: `yrs` deletes and reads them by recursion.
pub const DOCUMENT_DEPTH_MAX: u16 = 256;
/// Most structs (blocks) in one update.
pub const UPDATE_STRUCTS_MAX: u64 = 1_000_000;
/// Most ranges in the delete set of one update. With a sync step 2 come all of a document's, known or not.
pub const UPDATE_DELETE_RANGES_MAX: u64 = 4_000_000;
/// Most JSON-like values in one update: `yrs` takes up to a hundred bytes for one of two bytes.
pub const UPDATE_VALUES_MAX: u64 = 1_000_000;
/// Most subdocuments in one update; each is a whole `yrs` document.
pub const UPDATE_SUBDOCUMENTS_MAX: u64 = 10_000;
/// Largest client id: 53 bits, the integers that JavaScript has exactly.
pub const CLIENT_ID_MAX: u64 = (1 << 53) - 1;
/// A clock plus a length stays below this.
pub const CLOCK_END_MAX: u64 = 1 << 31;
/// Most clients in a state vector that a peer sends: every client that ever wrote in a document is in it.
pub const STATE_VECTOR_CLIENTS_MAX: u64 = 4_000_000;
/// Memory of a document, as `document/size.rs` estimates it, beyond which nothing more is taken from clients: about two million
/// pieces of content, or 256 MiB encoded. A document is opened however large it is.
pub const DOCUMENT_MEMORY_MAX: u64 = 512 * 1024 * 1024;
/// What only deletes is taken for so much longer.
pub const DOCUMENT_OVERDRAFT: u64 = DOCUMENT_MEMORY_MAX / 4;
/// Largest awareness state (JSON) of one client.
pub const AWARENESS_BYTES_MAX: usize = 64 * 1024;
/// Most entries in one awareness message.
pub const AWARENESS_CLIENTS_MAX: u64 = 10_000;
/// Largest payload of a "saved" message (102); clients put a number in it.
pub const SAVED_BYTES_MAX: usize = 256;
/// Largest token of a client.
pub const TOKEN_BYTES_MAX: usize = 16 * 1024;
/// Largest stateless message: applications send each other signals in it, not content.
pub const STATELESS_BYTES_MAX: usize = 64 * 1024;
/// Most documents that one socket may hold.
pub const DOCUMENTS_PER_SOCKET_MAX: usize = 256;
/// Bytes of messages about documents to which a socket has no access yet; they wait for its token.
pub const PENDING_BYTES_MAX: usize = 1024 * 1024;
/// Most client ids one socket may speak for: the tabs of one browser share theirs.
pub const PRESENCE_PER_CONNECTION_MAX: usize = 16;

/// Most updates in one commit.
pub const BATCH_UPDATES_MAX: usize = 1_000;
/// Most bytes in one commit.
pub const BATCH_BYTES_MAX: usize = 1024 * 1024;
/// Batches that a node may have in flight, never two that share a slot.
pub const BATCHES_IN_FLIGHT_MAX: usize = 2;
/// Updates of one document that may wait for their commit before its sockets are no longer read.
pub const UNCOMMITTED_UPDATES_MAX: usize = 1_000;
/// Bytes of one document that may wait for their commit before its sockets are no longer read.
pub const UNCOMMITTED_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Updates of one document that may wait for their commit before no more are taken. Between the two bounds lies
/// what was on its way when the sockets were no longer read.
pub const UNSAVED_UPDATES_MAX: usize = 8_000;
/// Bytes of one document that may wait for their commit before no more are taken.
pub const UNSAVED_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Bytes of updates that are kept beside a state until a new state takes their place; or twice those of the state.
pub const PAST_BYTES_MIN: usize = 256 * 1024;
/// A document of this size is sent to newcomers as the bytes lie, not as the CRDT encodes it anew for each.
pub const LARGE_STATE_BYTES: usize = 64 * 1024;
/// Updates after an encoded state that a newcomer is sent one by one; with more the state is encoded anew.
pub const TAIL_UPDATES_MAX: usize = 64;
/// Frames that may wait for a socket before it gets the difference instead.
pub const SOCKET_QUEUE_FRAMES_MAX: usize = 8_192;
/// Bytes that may wait for a socket before it gets the difference instead.
pub const SOCKET_QUEUE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Log rows after the newest snapshot that make a new one due.
pub const SNAPSHOT_AFTER_UPDATES: i64 = 500;
/// The same of a document that is so large that its snapshots cost more than its edits.
pub const SNAPSHOT_AFTER_UPDATES_MAX: i64 = 2_000;
/// For as many stored bytes it may be one row more.
pub const SNAPSHOT_BYTES_PER_UPDATE: i64 = 2 * 1024;
/// With as many rows more than make a snapshot due, a document that never rests stops for one commit, so that it can be
/// made.
pub const SNAPSHOT_OVERDUE_UPDATES: i64 = 1_500;
/// Snapshots of a document that are kept.
pub const SNAPSHOTS_KEPT: i64 = 2;

/// How long a member owns its slots after a renewal.
pub const LEASE: Duration = Duration::from_secs(2);
/// Between two renewals.
pub const LEASE_RENEW_EVERY: Duration = Duration::from_millis(500);
/// Without a renewal for this long an owner stops acknowledging.
pub const STOP_OWNING_AFTER: Duration = Duration::from_millis(1_700);
/// A member adopts only after its renewals have succeeded for this long without a gap.
pub const ADOPT_AFTER_STEADY: Duration = Duration::from_millis(2_500);
/// A longer time between two renewals is a gap, by the clock of the store.
pub const RENEWAL_GAP_MAX: Duration = Duration::from_millis(1_250);
/// After a failover of the database nobody adopts for this long: the new primary may not know the leases and owners of
/// the last moments, and every owner takes back what it had.
pub const ADOPT_AFTER_FAILOVER: Duration = Duration::from_secs(3);
/// A node that reaches neither the store nor any peer for this long closes its sockets: others serve its clients better.
pub const ISOLATED_AFTER: Duration = Duration::from_secs(5);
/// Between the candidates of a slot: the first adopts at once, the second this much later.
pub const ADOPTION_STAGGER: Duration = Duration::from_millis(150);
/// A member whose last renewal is older than this may be fenced early, if its process is known to be gone.
pub const EARLY_FENCE_AGE: Duration = Duration::from_millis(600);
/// A store that takes longer to renew a lease is too slow for an early fence, which the own renewal would have to wait for.
pub const EARLY_FENCE_RENEWAL_MAX: Duration = Duration::from_millis(300);
/// Between two early fences by one member: who believes that everybody is gone is probably alone itself.
pub const EARLY_FENCE_EVERY: Duration = Duration::from_secs(10);
/// A member that was not heard for this long is told of with the next renewal: see [`crate::control::Silence`].
pub const SILENT_AFTER: Duration = Duration::from_secs(2);
/// Losing so many leases within [`FLAPPING_WITHIN`] puts a node into quarantine.
pub const FLAPPING_LEASES: u32 = 3;
/// See [`FLAPPING_LEASES`].
pub const FLAPPING_WITHIN: Duration = Duration::from_mins(10);
/// How long a flapping node is given no slots at first; each lost lease more doubles it.
pub const QUARANTINE_MIN: Duration = Duration::from_secs(30);
/// The longest time that a flapping node is given no slots after a lost lease.
pub const QUARANTINE_MAX: Duration = Duration::from_mins(10);
/// Between two steps in which a node gets its share back after a quarantine.
pub const REFILL_STEP: Duration = Duration::from_secs(15);
/// Steps until it has its whole share.
pub const REFILL_STEPS: u32 = 4;
/// Lost leases older than this are forgotten.
pub const LOST_LEASES_KEPT_FOR: Duration = Duration::from_mins(30);
/// Between two looks at the map.
pub const MAP_POLL_EVERY: Duration = Duration::from_millis(250);
/// How long a claim waits for a slot's row before it ends the sessions of the fenced owner.
pub const CLAIM_LOCK_TIMEOUT: Duration = Duration::from_millis(300);
/// How long an append waits for a slot's row before the other slots of its batch go without it.
pub const APPEND_LOCK_TIMEOUT: Duration = Duration::from_secs(1);
/// Slots with open documents that are handed over at the same time: few, because all of them stand still until the last of them is
/// durable and has its new owner.
pub const HANDOFF_CONCURRENCY: usize = 4;
/// A node that gives away very many slots with open documents hands over one part in this many at the same time, so that its
/// drain ends in time.
pub const HANDOFF_ROUNDS: usize = 64;
/// Slots without open documents that are handed over at the same time.
pub const IDLE_HANDOFF_CONCURRENCY: usize = 128;
/// How long an owner waits until the target of a handoff has read its documents; then it goes on without.
pub const PRELOAD_WAIT: Duration = Duration::from_secs(2);
/// A document that cannot settle for this long keeps its slot for another try.
pub const FREEZE_WAIT: Duration = Duration::from_secs(3);
/// How long a document that was read ahead waits for its slot.
pub const PRELOAD_KEPT_FOR: Duration = Duration::from_secs(8);
/// A drained node closes its sockets at this rate per second.
pub const DRAIN_CLOSES_PER_SECOND: u32 = 200;
/// A presence entry that was not renewed for this long is gone.
pub const AWARENESS_EXPIRY: Duration = Duration::from_secs(30);
/// A socket that got no frame for this long is sent an empty awareness message.
pub const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);
/// Memory that is set aside for a document before it is known how large it is.
pub const OPENING_BYTES: u64 = 64 * 1024;
/// How long an opening waits until memory is freed; then it is refused.
pub const MEMORY_WAIT: Duration = Duration::from_secs(2);
/// A document whose content was not needed for this long rests: memory holds its bytes, and what the CRDT makes of them is built
/// again when it is needed.
pub const REST_AFTER: Duration = Duration::from_secs(20);
/// A document of more bytes does not rest: the next edit would wait for it.
pub const RESTING_BYTES_MAX: usize = 32 * 1024;
/// An open document that nobody is attached to is closed after this time.
pub const UNLOAD_AFTER: Duration = Duration::from_secs(30);

// An owner would still acknowledge when others may adopt (the log would refuse it).
const _: () = assert!(STOP_OWNING_AFTER.as_millis() < LEASE.as_millis());
// A single lost renewal must not end a lease.
const _: () = assert!(LEASE_RENEW_EVERY.as_millis() * 3 <= LEASE.as_millis());
// Else a node that was cut off itself would adopt as soon as the store answers again.
const _: () = assert!(LEASE.as_millis() < ADOPT_AFTER_STEADY.as_millis());
// Else the target would forget what it read before a slow handoff is through.
const _: () =
    assert!(PRELOAD_WAIT.as_millis() + FREEZE_WAIT.as_millis() < PRELOAD_KEPT_FOR.as_millis());
// One lost renewal is no gap; and an outage that ends anybody's lease is a gap for everybody.
const _: () = assert!(LEASE_RENEW_EVERY.as_millis() * 2 < RENEWAL_GAP_MAX.as_millis());
const _: () =
    assert!(RENEWAL_GAP_MAX.as_millis() + LEASE_RENEW_EVERY.as_millis() < LEASE.as_millis());
// Else the leases that a failover of the database forgot would look ended.
const _: () = assert!(LEASE.as_millis() + 1_000 <= ADOPT_AFTER_FAILOVER.as_millis());
// By then others have adopted what it owned.
const _: () = assert!(LEASE.as_millis() * 2 < ISOLATED_AFTER.as_millis());
// Else the losses that a quarantine rests on would be forgotten before its end.
const _: () = assert!(
    FLAPPING_WITHIN.as_secs()
        + QUARANTINE_MAX.as_secs()
        + REFILL_STEP.as_secs() * (REFILL_STEPS as u64)
        < LOST_LEASES_KEPT_FOR.as_secs()
);
// A member that lives and reaches the store is never fenced early; and early it must be.
const _: () = assert!(LEASE_RENEW_EVERY.as_millis() < EARLY_FENCE_AGE.as_millis());
const _: () = assert!(EARLY_FENCE_AGE.as_millis() * 2 < LEASE.as_millis());
// Of two faults within one lease at most one is answered by haste.
const _: () = assert!(LEASE.as_millis() < EARLY_FENCE_EVERY.as_millis());
// Sockets are asked to stop before anything is refused.
const _: () = assert!(UNCOMMITTED_UPDATES_MAX < UNSAVED_UPDATES_MAX);
const _: () = assert!(UNCOMMITTED_BYTES_MAX < UNSAVED_BYTES_MAX);
// A batch must not be what pauses its document.
const _: () = assert!(BATCH_UPDATES_MAX <= UNCOMMITTED_UPDATES_MAX);
const _: () = assert!(BATCH_BYTES_MAX < UNCOMMITTED_BYTES_MAX);
// The y-websocket client drops a socket after 30 s of silence.
const _: () = assert!(KEEPALIVE_AFTER.as_secs() * 2 < 30);
// A half-open connection is noticed within 40 s, and a client has time for an answer to more than one ping.
const _: () = assert!(GONE_AFTER.as_secs() + PULSE_EVERY.as_secs() < 40);
const _: () = assert!(PING_AFTER.as_secs() + 3 * PULSE_EVERY.as_secs() <= GONE_AFTER.as_secs());
// Whoever has all of a document may join it: neither what it lacks nor what it has is more than one message may say.
const _: () =
    assert!((DOCUMENT_MEMORY_MAX + DOCUMENT_OVERDRAFT) / STRUCT_BYTES < UPDATE_DELETE_RANGES_MAX);
const _: () =
    assert!((DOCUMENT_MEMORY_MAX + DOCUMENT_OVERDRAFT) / STRUCT_BYTES < STATE_VECTOR_CLIENTS_MAX);
// A single state of presence must pass at once.
const _: () = assert!(AWARENESS_BYTES_MAX < PRESENCE_BYTES_BURST as usize);
const _: () = assert!(SLOTS_MIN.is_power_of_two() && SLOTS_MAX.is_power_of_two());
