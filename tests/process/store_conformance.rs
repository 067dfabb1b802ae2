//! What the stores promise, asked of all: real Postgres, SQLite, and the one in memory that the simulation plays with.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use collab_core::control::{LoadSample, MemberState, Silence};
use collab_core::ids::{DocumentId, Epoch, NodeId, RoomEpoch, Seq, Slot, Term};
use collab_node::store::memory::{Database, Harm};
use collab_node::store::postgres::Postgres;
use collab_node::store::sqlite::Sqlite;
use collab_node::store::{
    Append, Appended, Claim, Content as StoredContent, Created, Fence, LoadError, Loaded,
    MapChange, NewSnapshot, Ownership, Recreate, Registration, Renewal, Renewed, SlotRow, Store,
    StoreError, WrittenRow,
};
use collab_tests::postgres::Postgres as Server;
use collab_tests::process::Folder;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, PgPool, SqlitePool};
use uuid::Uuid;

/// Makes one test of each function per store.
macro_rules! on_all {
    ($($test:ident)*) => {
        on_clusters! { $($test)* }
        mod on_sqlite {
            $(#[tokio::test] async fn $test() { super::$test(super::Bench::sqlite().await).await; })*
        }
    };
}

/// Makes one test of each function per store that several nodes may share.
macro_rules! on_clusters {
    ($($test:ident)*) => {
        mod on_postgres {
            $(#[tokio::test] async fn $test() { super::$test(super::Bench::postgres().await).await; })*
        }
        mod in_memory {
            $(#[tokio::test] async fn $test() { super::$test(super::Bench::memory()).await; })*
        }
    };
}

mod damage;
mod documents;
mod members;
mod outages;
mod pins;

const SLOTS: u16 = 256;
const LEASE: Duration = Duration::from_mins(1);
const ALL_ROWS_LOST: Harm = Harm::RowsLost(Seq(1)..=Seq(i64::MAX));

/// A store under test, and a way to its rows behind its back.
struct Bench {
    store: Arc<dyn Store>,
    raw: Raw,
    /// Of Postgres.
    url: String,
    _server: Option<Arc<Server>>,
    _folder: Option<Folder>,
}

enum Raw {
    Postgres(PgPool),
    Sqlite(SqlitePool),
    Memory(Database),
}

/// A registered process and the slots it claimed.
struct Node {
    store: Arc<dyn Store>,
    name: NodeId,
    incarnation: Uuid,
    pod_uid: String,
    epochs: HashMap<Slot, Epoch>,
}

/// A live document as loaded.
#[derive(Debug, PartialEq, Eq)]
struct Content {
    snapshot: Option<String>,
    log: Vec<String>,
    last: Seq,
}

impl Bench {
    async fn postgres() -> Self {
        let server = Server::shared().await;
        let url = server.database().await;
        Self {
            _server: Some(server),
            ..Self::postgres_at(url).await
        }
    }

    async fn postgres_at(url: String) -> Self {
        collab_tests::mutants::choose();
        let store = Arc::new(until_answered(|| Postgres::connect(&url)).await);
        let raw = Raw::Postgres(PgPool::connect_lazy(&url).unwrap());
        Self {
            store,
            raw,
            url,
            _server: None,
            _folder: None,
        }
    }

    fn memory() -> Self {
        let database = Database::default();
        Self {
            store: Arc::new(database.sessions()),
            raw: Raw::Memory(database),
            url: String::new(),
            _server: None,
            _folder: None,
        }
    }

    async fn sqlite() -> Self {
        let folder = Folder::new("sqlite", "root");
        let bench = Self::sqlite_in(folder.path()).await;
        Self {
            _folder: Some(folder),
            ..bench
        }
    }

    async fn sqlite_in(folder: &Path) -> Self {
        // A child that another test is just making holds the lock of a folder until it runs its program.
        let started = Instant::now();
        let store = loop {
            match Sqlite::open(folder).await {
                Ok(store) => break Arc::new(store),
                Err(error) => assert!(started.elapsed() < Duration::from_secs(5), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let options = SqliteConnectOptions::new().filename(folder.join("collab.sqlite"));
        let raw = Raw::Sqlite(SqlitePool::connect_lazy_with(options));
        Self {
            store,
            raw,
            url: String::new(),
            _server: None,
            _folder: None,
        }
    }

    async fn execute(&self, sql: &str) {
        let sql = AssertSqlSafe(sql.to_owned());
        match &self.raw {
            Raw::Postgres(pool) => drop(sqlx::query(sql).execute(pool).await.unwrap()),
            Raw::Sqlite(pool) => drop(sqlx::query(sql).execute(pool).await.unwrap()),
            Raw::Memory(_) => panic!("it speaks no SQL"),
        }
    }

    /// Changes rows as no store would.
    async fn harm(&self, document: &DocumentId, harm: Harm) {
        if let Raw::Memory(database) = &self.raw {
            return database.harm(document, harm);
        }
        let name = document.as_str();
        match harm {
            Harm::RowsLost(seqs) => {
                let (first, last) = seqs.into_inner();
                self.execute(&format!(
                    "delete from update_log where document = '{name}' and seq between {first} and {last}"
                ))
                .await;
            }
            Harm::RowChanged(seq, bytes) => {
                let bytes = self.blob(&bytes);
                self.execute(&format!(
                    "update update_log set bytes = {bytes} where document = '{name}' and seq = {seq}"
                ))
                .await;
            }
            Harm::SnapshotChanged(seq, bytes) => {
                let bytes = self.blob(&bytes);
                self.execute(&format!(
                    "update snapshot set bytes = {bytes} where document = '{name}' and seq = {seq}"
                ))
                .await;
            }
            Harm::HashesLost => {
                let hash = self.blob(b"0");
                self.execute(&format!(
                    "update snapshot set sha256 = {hash} where document = '{name}'"
                ))
                .await;
            }
            Harm::SnapshotsSwapped(other) => {
                for (from, to) in [(name, "x"), (other.as_str(), name), ("x", other.as_str())] {
                    self.execute(&format!(
                        "update snapshot set document = '{to}' where document = '{from}'"
                    ))
                    .await;
                }
            }
        }
    }

    /// A literal of bytes.
    fn blob(&self, bytes: &[u8]) -> String {
        let hex = bytes
            .iter()
            .fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
        match &self.raw {
            Raw::Postgres(_) => format!("'\\x{hex}'::bytea"),
            Raw::Sqlite(_) | Raw::Memory(_) => format!("x'{hex}'"),
        }
    }

    /// A member without slots.
    async fn node(&self, name: &str) -> Node {
        let member = registration(name);
        self.store.register(&member, SLOTS, LEASE).await.unwrap();
        Node {
            store: self.store.clone(),
            name: member.node,
            incarnation: member.incarnation,
            pod_uid: member.pod_uid,
            epochs: HashMap::new(),
        }
    }

    /// A member with every slot.
    async fn owner(&self) -> Node {
        let mut node = self.node("node-0").await;
        node.claim(&(0..SLOTS).collect::<Vec<_>>()).await;
        assert_eq!(node.epochs.len(), usize::from(SLOTS));
        node
    }

    /// The next process of a node, which takes `slots`.
    async fn succeed(&self, old: &Node, slots: &[u16]) -> Node {
        let mut node = self.node(&old.name.0).await;
        node.claim(slots).await;
        assert_eq!(node.epochs.len(), slots.len());
        node
    }

    async fn content(&self, document: &DocumentId) -> Content {
        match self.store.load(document).await.unwrap() {
            Loaded::Live(StoredContent {
                snapshot,
                log,
                last,
                ..
            }) => {
                assert!(log.windows(2).all(|pair| pair[0].0.next() == pair[1].0));
                let log = log.iter().map(|(_, bytes)| text(bytes)).collect();
                Content {
                    snapshot: snapshot.map(|snapshot| text(&snapshot.bytes)),
                    log,
                    last,
                }
            }
            other => panic!("{document} is not live: {other:?}"),
        }
    }

    /// Where a document is damaged. All before that must be given.
    async fn damage(&self, document: &DocumentId) -> Seq {
        match self.store.load(document).await {
            Err(LoadError::Damaged {
                document: named,
                seq,
                good,
                ..
            }) if named == *document => {
                assert_eq!(good.last.next(), seq);
                seq
            }
            other => panic!("{document} is not damaged: {other:?}"),
        }
    }

    /// The rows after `after`, if they join it.
    async fn tail(&self, document: &DocumentId, life: i64, after: i64) -> Option<Vec<String>> {
        let tail = self.store.tail(document, RoomEpoch(life), Seq(after)).await;
        let rows = tail.unwrap()?;
        assert!(rows.first().is_none_or(|(seq, _)| *seq == Seq(after + 1)));
        Some(rows.iter().map(|(_, bytes)| text(bytes)).collect())
    }

    async fn create(&self, document: &DocumentId, right: Ownership) -> Created {
        self.store
            .create(document, right, Recreate::Allowed)
            .await
            .unwrap()
    }

    async fn set_state(&self, node: &Node, state: MemberState) {
        self.store.set_state(node.incarnation, state).await.unwrap();
    }

    async fn append(&self, batch: &[Append]) -> Appended {
        self.store.append(batch).await.unwrap()
    }

    async fn written(&self, keys: &[(DocumentId, Seq)]) -> Vec<WrittenRow> {
        self.store.written(keys).await.unwrap()
    }

    async fn snapshot(
        &self,
        document: &DocumentId,
        right: Ownership,
        room_epoch: i64,
        seq: i64,
        text: &str,
    ) -> Fence {
        let snapshot = NewSnapshot {
            document: document.clone(),
            ownership: right,
            room_epoch: RoomEpoch(room_epoch),
            seq: Seq(seq),
            bytes: Bytes::copy_from_slice(text.as_bytes()),
        };
        self.store.snapshot(&snapshot).await.unwrap()
    }

    async fn compact(&self, document: &DocumentId, right: Ownership) -> Fence {
        self.store.compact(document, right).await.unwrap()
    }

    async fn delete(&self, document: &DocumentId, right: Ownership, last: Seq) -> Fence {
        self.store.delete(document, right, last).await.unwrap()
    }

    async fn claim(&self, node: &Node, slots: &[Slot]) -> Vec<(Slot, Epoch)> {
        self.store
            .claim(node.incarnation, slots, Claim::Orphaned)
            .await
            .unwrap()
    }

    async fn hand_off(&self, from: &[Ownership], to: Uuid) -> Vec<(Slot, Epoch)> {
        self.store.hand_off(from, to).await.unwrap()
    }

    async fn renewed(&self, node: &Node) -> Renewed {
        held(self.renew(node).await)
    }

    /// Renews the lease of a member once more, for a moment, and lets it end.
    async fn lease_ends(&self, node: &Node) {
        let short = Duration::from_millis(50);
        self.store
            .renew(
                node.incarnation,
                &node.pod_uid,
                short,
                LoadSample::default(),
            )
            .await
            .unwrap();
        tokio::time::sleep(short + Duration::from_millis(10)).await;
    }

    async fn renew(&self, node: &Node) -> Renewal {
        node.store
            .renew(
                node.incarnation,
                &node.pod_uid,
                LEASE,
                LoadSample::default(),
            )
            .await
            .unwrap()
    }

    async fn map(&self, horizon: i64) -> MapChange {
        self.store.map(horizon).await.unwrap()
    }

    async fn state(&self, node: &Node) -> MemberState {
        let renewed = self.renewed(node).await;
        renewed
            .members
            .iter()
            .find(|member| member.incarnation == node.incarnation)
            .unwrap()
            .state
    }

    /// The right to a slot as it is now.
    async fn right_now(&self, slot: u16) -> Ownership {
        let map = self.store.map(0).await.unwrap();
        let row = map.slots[usize::from(slot)];
        Ownership {
            slot: row.slot,
            epoch: row.epoch,
            incarnation: row.owner.unwrap(),
        }
    }
}

impl Node {
    async fn claim(&mut self, slots: &[u16]) {
        let slots: Vec<_> = slots.iter().copied().map(Slot).collect();
        self.epochs.extend(
            self.store
                .claim(self.incarnation, &slots, Claim::Orphaned)
                .await
                .unwrap(),
        );
    }

    fn epoch(&self, slot: u16) -> Epoch {
        self.epochs[&Slot(slot)]
    }

    fn right(&self, slot: u16) -> Ownership {
        Ownership {
            slot: Slot(slot),
            epoch: self.epoch(slot),
            incarnation: self.incarnation,
        }
    }

    fn update(&self, document: &DocumentId, slot: u16, seq: i64, text: &str) -> Append {
        Append {
            document: document.clone(),
            seq: Seq(seq),
            ownership: self.right(slot),
            bytes: Bytes::copy_from_slice(text.as_bytes()),
            author: "ada".to_owned(),
        }
    }

    async fn create(&self, document: &DocumentId, slot: u16) -> Created {
        self.store
            .create(document, self.right(slot), Recreate::Allowed)
            .await
            .unwrap()
    }

    /// Appends updates whose text is their seq.
    async fn append(&self, document: &DocumentId, slot: u16, seqs: RangeInclusive<i64>) {
        let batch: Vec<_> = seqs
            .map(|seq| self.update(document, slot, seq, &seq.to_string()))
            .collect();
        assert_eq!(
            self.store.append(&batch).await.unwrap().inserted.len(),
            batch.len()
        );
    }

    /// Creates a document and appends to it.
    async fn write(&self, document: &DocumentId, slot: u16, seqs: RangeInclusive<i64>) {
        assert!(matches!(
            self.create(document, slot).await,
            Created::Created { .. }
        ));
        self.append(document, slot, seqs).await;
    }
}

/// The answer to a renewal that succeeded.
fn held(renewal: Renewal) -> Renewed {
    match renewal {
        Renewal::Renewed(renewed) => renewed,
        lost => panic!("the lease is lost: {lost:?}"),
    }
}

/// Asks again while there is an outage.
async fn until_answered<T, F: Future<Output = Result<T, StoreError>>>(
    mut call: impl FnMut() -> F,
) -> T {
    let started = Instant::now();
    loop {
        match call().await {
            Ok(answer) => return answer,
            Err(error) => assert!(started.elapsed() < Duration::from_secs(20), "{error}"),
        }
    }
}

/// What `change` tells that `seen` did not. A change may be told again while any transaction is open that is older than
/// it, one of another test in the same database server, too.
fn news<'a>(seen: &'a MapChange, change: &'a MapChange) -> impl Iterator<Item = &'a SlotRow> {
    change.slots.iter().filter(|row| !seen.slots.contains(row))
}

fn content(snapshot: Option<&str>, log: &[&str], last: i64) -> Content {
    Content {
        snapshot: snapshot.map(str::to_owned),
        log: log.iter().copied().map(str::to_owned).collect(),
        last: Seq(last),
    }
}

fn document(name: &str) -> DocumentId {
    DocumentId::new(name).unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A new process of the pod that is called like its node.
fn registration(node: &str) -> Registration {
    Registration {
        node: NodeId::from(node),
        incarnation: Uuid::new_v4(),
        pod_uid: format!("pod of {node}"),
        address: "127.0.0.1:8081".to_owned(),
        zone: String::new(),
        weight: 100,
    }
}
