//! The write rule raced against claims and pins on real Postgres, and shown to be needed: the same statement
//! without its lock, or with a weaker one, loses updates in the same race; so does a pin that leaves the epoch
//! of the slot as it is that it takes a document from.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use collab_core::ids::{DocumentId, Epoch, Seq, Slot, Term};
use collab_node::log::{Log, LogEvent};
use collab_node::members::Members;
use collab_node::metrics::Metrics;
use collab_node::queue;
use collab_node::store::postgres::{
    APPEND, APPEND_ONE, LOCK_SLOTS, MOVE_DOCUMENT, Postgres, append_one_statement, append_statement,
};
use collab_node::store::{Append, Claim, Content, Loaded, Ownership, Registration, Store};
use collab_node::tasks::Tasks;
use collab_tests::postgres::Postgres as Server;
use sqlx::{AssertSqlSafe, PgPool, Row};
use tokio::sync::Barrier;
use uuid::Uuid;

/// Takeovers per statement; each has its own slot.
const RACES: u16 = 150;
/// Sessions of the old owner that append to the slot all the time. One, as a node never has two
/// statements for one slot in flight: two that overlap can keep a claim waiting for as long as they like.
const APPENDERS: usize = 1;
/// Rows in each append of a batch.
const ROWS: usize = 20;

#[tokio::test(flavor = "multi_thread")]
async fn no_update_appears_behind_the_back_of_a_new_owner() {
    nothing_slips_through(&Taking::Claim).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_race_catches_a_statement_that_looks_without_a_lock() {
    each_lets_some_through([
        Rule::Batch(mutant(APPEND, "for share of s", "")),
        Rule::One(mutant(APPEND_ONE, "for share of s skip locked", "")),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_race_catches_a_lock_that_a_claim_does_not_wait_for() {
    each_lets_some_through([
        Rule::Batch(mutant(APPEND, "for share of s", "for key share of s")),
        Rule::One(mutant(APPEND_ONE, "for share of s", "for key share of s")),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_update_appears_in_a_document_that_was_pinned_or_unpinned() {
    for taking in [Taking::Pin(None), Taking::Unpin(None)] {
        nothing_slips_through(&taking).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_race_catches_a_pin_that_does_not_raise_the_epoch() {
    let raises = |which| {
        let raised = format!("s.epoch + (s.slot = {which})::int");
        mutant(MOVE_DOCUMENT, "s.epoch + 1", &raised)
    };
    // Without an owner the slot of an unpinned document fences, too.
    let owner = "owner = case when s.slot = $1 then s.owner when $3 is not null then (select owner from slot where slot = $1) end";
    let keeps_owner = |statement: String| mutant(&statement, owner, "owner = s.owner");
    for taking in [
        Taking::Pin(Some(raises("$2"))),
        Taking::Unpin(Some(keeps_owner(raises("$1")))),
    ] {
        let outcome = race(&Rule::Batch(APPEND.to_owned()), &taking).await;
        println!("{taking:?}: {outcome:?}");
        assert!(outcome.violations > 0, "{outcome:?}");
    }
}

/// An owner that meets other bytes at its position has a wrong document in memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_position_that_holds_other_bytes_is_no_success() {
    collab_tests::mutants::choose();
    let server = Server::shared().await;
    let url = server.database().await;
    let store: Arc<dyn Store> = Arc::new(Postgres::connect(&url).await.unwrap());
    let (metrics, tasks) = (Metrics::new(), Tasks::default());
    let registration = registration();
    let incarnation = registration.incarnation;
    let members = Members::new(store.clone(), metrics.clone(), registration, 256, true);
    tasks.spawn(members.clone().keep_lease());
    while !members.lease_held() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let pool = PgPool::connect(&url).await.unwrap();
    let (slot, document) = (Slot(1), DocumentId::new("doc").unwrap());
    sqlx::query("update slot set owner = $1, epoch = 1")
        .bind(incarnation)
        .execute(&pool)
        .await
        .unwrap();
    sqlx::query("insert into document (id, slot) values ('doc', 1)")
        .execute(&pool)
        .await
        .unwrap();
    let append = |bytes: &'static [u8]| Append {
        document: document.clone(),
        seq: Seq(1),
        ownership: Ownership {
            slot,
            epoch: Epoch(1),
            incarnation,
        },
        bytes: Bytes::from_static(bytes),
        author: String::new(),
    };
    let (log, task) = Log::new(store.clone(), members, metrics, tasks.clone());
    tasks.spawn(task);
    for (bytes, event) in [
        (b"first", LogEvent::Committed(Seq(1))),
        (b"other", LogEvent::Conflict),
        (b"first", LogEvent::Committed(Seq(1))),
    ] {
        let (reply, mut events) = queue::unbounded();
        log.append(append(bytes), store.failovers().seen, reply);
        assert_eq!(events.recv().await, Some(event));
    }
}

/// How a document is taken from the owner that is busy with it. The pins are those of the store, or with another
/// statement in place of [`MOVE_DOCUMENT`].
#[derive(Debug)]
enum Taking {
    /// Its slot is claimed.
    Claim,
    /// It gets a slot of its own.
    Pin(Option<String>),
    /// It had one.
    Unpin(Option<String>),
}

/// What a run of [`RACES`] takeovers came to.
#[derive(Debug, Default)]
struct Outcome {
    /// Takeovers after which a row of the old owner appeared that the new owner had not loaded.
    violations: usize,
    /// Rows that the old owners appended.
    appended: usize,
    /// The longest time a takeover took.
    slowest_claim: Duration,
}

/// A node that begins.
fn registration() -> Registration {
    Registration {
        node: "new".into(),
        incarnation: Uuid::new_v4(),
        pod_uid: "new".to_owned(),
        address: String::new(),
        zone: String::new(),
        weight: 100,
    }
}

/// The statement of the write rule, or one that is not as good.
#[derive(Clone, Debug)]
enum Rule {
    /// Takes [`ROWS`] rows.
    Batch(String),
    /// Takes one.
    One(String),
}

impl Rule {
    /// Rows that a busy owner has appended by the time that the document is taken, at least.
    const fn busy(&self) -> usize {
        match self {
            Self::Batch(_) => ROWS / 2,
            Self::One(_) => 2,
        }
    }
}

/// The write rule as a node sends it.
fn write_rules() -> [Rule; 2] {
    collab_tests::mutants::choose();
    [
        Rule::Batch(append_statement().into_owned()),
        Rule::One(append_one_statement().into_owned()),
    ]
}

/// Whoever takes a document from a busy owner that keeps the write rule sees all that is in it.
async fn nothing_slips_through(taking: &Taking) {
    for rule in write_rules() {
        let outcome = race(&rule, taking).await;
        println!("{taking:?}, {rule:?}: {outcome:?}");
        assert_eq!(outcome.violations, 0, "{outcome:?}");
        assert!(
            outcome.appended > usize::from(RACES) * rule.busy(),
            "the owner was not busy: {outcome:?}"
        );
    }
}

async fn each_lets_some_through(rules: [Rule; 2]) {
    for rule in rules {
        let outcome = race(&rule, &Taking::Claim).await;
        println!("{rule:?}: {outcome:?}");
        assert!(outcome.violations > 0, "{outcome:?}");
    }
}

fn mutant(statement: &str, from: &str, to: &str) -> String {
    let mutant = statement.replace(from, to);
    assert_ne!(mutant, statement, "the statement no longer says {from}");
    mutant
}

/// Has document after document taken from a busy old owner, and loaded as the load rule says.
async fn race(rule: &Rule, taking: &Taking) -> Outcome {
    let server = Server::shared().await;
    let url = server.database().await;
    let store = Postgres::connect(&url).await.unwrap();
    let new = registration();
    store
        .register(&new, 256, Duration::from_mins(10))
        .await
        .unwrap();
    // The old owner is no member any more, but its process does not know.
    let pool = PgPool::connect(&url).await.unwrap();
    let old = Uuid::new_v4();
    sqlx::query("update slot set owner = $1, epoch = 1")
        .bind(old)
        .execute(&pool)
        .await
        .unwrap();

    let mut outcome = Outcome::default();
    let rule = Arc::new(rule.clone());
    for slot in 0..RACES {
        let over = Arc::new(AtomicBool::new(false));
        let started = Arc::new(Barrier::new(APPENDERS + 1));
        let mut appenders = Vec::new();
        let pinned = DocumentId::new(&format!("doc-{slot}-0")).unwrap();
        let (busy, epoch) = prepare(&store, &pool, taking, slot, &pinned).await;
        for number in 0..APPENDERS {
            let document = format!("doc-{slot}-{number}");
            sqlx::query("insert into document (id, slot) values ($1, $2)")
                .bind(&document)
                .bind(i32::from(slot))
                .execute(&pool)
                .await
                .unwrap();
            let (pool, rule, over, started) =
                (pool.clone(), rule.clone(), over.clone(), started.clone());
            appenders.push(tokio::spawn(async move {
                let right = (busy, epoch, old);
                append_until_fenced(&pool, &rule, right, &document, &over, &started).await;
            }));
        }
        started.wait().await;
        tokio::time::sleep(Duration::from_millis(u64::from(slot % 7))).await;

        let began = Instant::now();
        take(&store, &pool, taking, &new, (slot, busy), &pinned).await;
        outcome.slowest_claim = outcome.slowest_claim.max(began.elapsed());
        let mut loaded = Vec::new();
        for number in 0..APPENDERS {
            let document = DocumentId::new(&format!("doc-{slot}-{number}")).unwrap();
            let Loaded::Live(Content { last, .. }) = store.load(&document).await.unwrap() else {
                panic!("not live")
            };
            loaded.push((document, last));
        }
        over.store(true, Ordering::Relaxed);
        for appender in appenders {
            appender.await.unwrap();
        }
        let mut violated = false;
        for (document, last) in loaded {
            let rows: i64 =
                sqlx::query_scalar("select count(*) from update_log where document = $1")
                    .bind(document.as_str())
                    .fetch_one(&pool)
                    .await
                    .unwrap();
            outcome.appended += usize::try_from(rows).unwrap();
            violated |= Seq(rows) != last;
        }
        outcome.violations += usize::from(violated);
    }
    outcome
}

/// The slot in which the document is when the race begins, and its epoch.
async fn prepare(
    store: &Postgres,
    pool: &PgPool,
    taking: &Taking,
    home: u16,
    document: &DocumentId,
) -> (u16, i64) {
    if !matches!(taking, Taking::Unpin(_)) {
        return (home, 1);
    }
    let pinned = store.pin(Term(1), document, Slot(home)).await.unwrap();
    pinned.unwrap();
    let own = store.pinned(document).await.unwrap().unwrap();
    let epoch = sqlx::query_scalar("select epoch from slot where slot = $1")
        .bind(i32::from(own.0))
        .fetch_one(pool)
        .await
        .unwrap();
    (own.0, epoch)
}

/// Takes the document away; `busy` is the slot it is in, `home` the one it hashes to.
async fn take(
    store: &Postgres,
    pool: &PgPool,
    taking: &Taking,
    new: &Registration,
    (home, busy): (u16, u16),
    document: &DocumentId,
) {
    let slot = Slot(home);
    match taking {
        Taking::Claim => {
            let slots = [slot];
            let claim = store.claim(new.incarnation, &slots, Claim::Orphaned);
            assert_eq!(claim.await.unwrap().len(), 1);
        }
        Taking::Pin(None) => store.pin(Term(1), document, slot).await.unwrap().unwrap(),
        Taking::Unpin(None) => store.unpin(Term(1), document, slot).await.unwrap().unwrap(),
        Taking::Pin(Some(statement)) => {
            let own = 256 + home;
            sqlx::query("insert into slot (slot) values ($1)")
                .bind(i32::from(own))
                .execute(pool)
                .await
                .unwrap();
            move_document(pool, statement, home, own, Some(document)).await;
        }
        Taking::Unpin(Some(statement)) => move_document(pool, statement, home, busy, None).await,
    }
}

/// As a pin of the store, but with this statement.
async fn move_document(
    pool: &PgPool,
    statement: &str,
    home: u16,
    own: u16,
    document: Option<&DocumentId>,
) {
    let (home, own) = (i32::from(home), i32::from(own));
    let mut change = pool.begin().await.unwrap();
    sqlx::query(LOCK_SLOTS)
        .bind([home, own])
        .execute(&mut *change)
        .await
        .unwrap();
    sqlx::query(AssertSqlSafe(statement))
        .bind(home)
        .bind(own)
        .bind(document.map(DocumentId::as_str))
        .execute(&mut *change)
        .await
        .unwrap();
    change.commit().await.unwrap();
}

/// Appends to one document under the old epoch, time after time, until the answer is "not held".
async fn append_until_fenced(
    pool: &PgPool,
    rule: &Rule,
    (slot, epoch, owner): (u16, i64, Uuid),
    document: &str,
    over: &AtomicBool,
    started: &Barrier,
) {
    let mut session = pool.acquire().await.unwrap();
    let slot = i32::from(slot);
    let bytes = [7_u8; 60];
    let checksum = i64::from(crc32c::crc32c(&bytes));
    let mut next = 1_i64;
    loop {
        let seqs: Vec<i64> = match rule {
            Rule::Batch(_) => (next..).take(ROWS).collect(),
            Rule::One(_) => vec![next],
        };
        let query = match rule {
            Rule::Batch(statement) => sqlx::query(AssertSqlSafe(statement.as_str()))
                .bind(vec![slot])
                .bind(vec![epoch])
                .bind(vec![owner])
                .bind(vec![1_i64; ROWS])
                .bind(vec![document; ROWS])
                .bind(&seqs)
                .bind(vec![checksum; ROWS])
                .bind(vec![bytes.as_slice(); ROWS])
                .bind(vec![""; ROWS])
                .bind("10s"),
            Rule::One(statement) => sqlx::query(AssertSqlSafe(statement.as_str()))
                .bind(slot)
                .bind(epoch)
                .bind(owner)
                .bind(document)
                .bind(next)
                .bind(checksum)
                .bind(bytes.as_slice())
                .bind(""),
        };
        let row = query.fetch_optional(&mut *session).await.unwrap();
        let is_held = match (rule, row) {
            (Rule::Batch(_), Some(row)) => row.get::<Option<Vec<i32>>, _>(0).is_some(),
            (_, row) => row.is_some(),
        };
        if next == 1 {
            assert!(is_held, "the race began too late");
            started.wait().await;
        }
        // The last one after the takeover is the one that may have slipped through.
        if !is_held || over.load(Ordering::Relaxed) {
            return;
        }
        next += i64::try_from(seqs.len()).unwrap();
    }
}
