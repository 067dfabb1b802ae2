//! `collab-node doctor` on both stores: what it finds, what it can make good, and what comes back from files.

use std::process::Stdio;
use std::sync::Arc;

use anyhow::{Result, ensure};
use bytes::Bytes;
use collab_core::ids::{DocumentId, Epoch, NodeId, Seq};
use collab_core::replica::new_doc;
use collab_core::ring::slot_of;
use collab_node::store::postgres::Postgres;
use collab_node::store::sqlite::Sqlite;
use collab_node::store::{
    Append, Claim, Content, Created, Loaded, NewSnapshot, Ownership, Recreate, Registration, Store,
};
use collab_tests::nodes::{Nodes, node_binary};
use collab_tests::postgres::Postgres as Server;
use collab_tests::process::Folder;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, PgPool, SqlitePool};
use tokio::process::Command;
use uuid::Uuid;
use yrs::updates::decoder::Decode;
use yrs::{GetString, Text, Transact, Update};

const SLOTS: u16 = 256;

#[tokio::test(flavor = "multi_thread")]
async fn on_sqlite() -> Result<()> {
    let folder = Folder::new("doctor", "root");
    looks_after_documents(&Place::Folder(folder)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn on_postgres() -> Result<()> {
    let server = Server::shared().await;
    let url = server.database().await;
    looks_after_documents(&Place::Database(url, server)).await
}

#[expect(clippy::too_many_lines, reason = "one life of a store, in order")]
async fn looks_after_documents(place: &Place) -> Result<()> {
    let files = Folder::new("doctor-files", "root");
    let at = |name: &str| files.path().join(name).display().to_string();
    {
        let writer = Writer::new(place).await?;
        for name in ["minutes", "team/2026 ä", "letters", "gone"] {
            writer.write(name, "abcdef").await?;
        }
        let gone = DocumentId::new("gone")?;
        writer
            .store
            .delete(&gone, writer.right(&gone), Seq(6))
            .await?;
    }
    let verified = place.doctor(&["verify"]).await?;
    ensure!(
        verified.ok && verified.has("minutes: sound") && verified.has("gone: deleted"),
        "{verified:?}"
    );

    // Files: all of it out, and into another store.
    ensure!(place.doctor(&["backup", "--to", &at("backup")]).await?.ok);
    ensure!(
        !place.doctor(&["backup", "--to", &at("backup")]).await?.ok,
        "not over another"
    );
    ensure!(
        place
            .doctor(&["export", "team/2026 ä", "--to", &at("files")])
            .await?
            .ok
    );
    let elsewhere = place.another().await;
    drop(Writer::new(&elsewhere).await?);
    ensure!(
        elsewhere
            .doctor(&["restore", "--from", &at("backup")])
            .await?
            .ok
    );
    ensure!(elsewhere.text("minutes").await? == "abcdef");
    let listed = elsewhere.doctor(&["verify"]).await?;
    ensure!(
        listed.ok && listed.has("gone: deleted") && listed.has("team/2026 ä: sound"),
        "{listed:?}"
    );
    let exported = at("files/team%2F2026%20%C3%A4.yjs");
    ensure!(
        elsewhere
            .doctor(&["import", &exported, "--as", "copy"])
            .await?
            .ok
    );
    ensure!(
        elsewhere
            .doctor(&["import", &exported])
            .await?
            .has("team/2026 ä: merged")
    );
    ensure!(
        elsewhere.text("copy").await? == "abcdef"
            && elsewhere.text("team/2026 ä").await? == "abcdef"
    );
    std::fs::write(at("bad.yjs"), [1, 1, 1, 2, 162, 8, 6, 0, 0, 0])?;
    let bad = elsewhere.doctor(&["import", &at("bad.yjs")]).await?;
    ensure!(
        !bad.ok
            && elsewhere
                .doctor(&["verify", "bad"])
                .await?
                .has("no such document"),
        "{bad:?}"
    );

    // Damage: a flipped byte, a lost row, a bad snapshot with the log behind the one before still there.
    place.execute("update update_log set bytes = (select bytes from update_log where document = 'letters' and seq = 1)
        where document = 'minutes' and seq = 3").await?;
    place
        .execute("delete from update_log where document = 'letters' and seq = 4")
        .await?;
    place
        .execute(
            "update snapshot set sha256 = (select bytes from update_log where document = 'letters' and seq = 1)
        where document = 'team/2026 ä'",
        )
        .await?;
    let verified = place.doctor(&["verify"]).await?;
    ensure!(
        !verified.ok
            && verified.has("minutes: damaged at seq 3")
            && verified.has("letters: damaged at seq 4"),
        "{verified:?}"
    );
    let export = place.doctor(&["export", "--to", &at("damaged")]).await?;
    ensure!(!export.ok && export.has("minutes: damaged"), "{export:?}");
    let repaired = place
        .doctor(&["repair", "--all", "--keep", &at("kept")])
        .await?;
    ensure!(
        repaired.ok
            && repaired.has("minutes: repaired")
            && repaired.has("seq 3: its checksum is wrong")
            && repaired.has("letters: repaired")
            && repaired.has("seq 4: there is no such row"),
        "{repaired:?}"
    );
    ensure!(place.doctor(&["verify"]).await?.ok);
    ensure!(place.text("minutes").await? == "ab" && place.text("letters").await? == "abc");
    let kept = std::fs::read_to_string(at("kept/minutes.yjs.rows"))?;
    ensure!(
        kept.lines()
            .filter(|line| line.contains("update_log"))
            .count()
            == 6,
        "{kept}"
    );

    // What is damaged comes back whole from the backup.
    let left = place
        .doctor(&["restore", "minutes", "--from", &at("backup")])
        .await?;
    ensure!(
        left.ok && left.has("left alone") && place.text("minutes").await? == "ab",
        "{left:?}"
    );
    ensure!(
        place
            .doctor(&["restore", "minutes", "--replace", "--from", &at("backup")])
            .await?
            .ok
    );
    ensure!(place.text("minutes").await? == "abcdef");
    std::fs::write(at("backup/letters.yjs"), [0, 0])?;
    let changed = place
        .doctor(&["restore", "letters", "--replace", "--from", &at("backup")])
        .await?;
    ensure!(
        !changed.ok && changed.has("its hash differs"),
        "{changed:?}"
    );
    ensure!(place.text("letters").await? == "abc");
    // And the next node goes on where the doctor stopped.
    Writer::new(place).await?.write("minutes", "g").await?;
    ensure!(place.text("minutes").await? == "abcdefg");
    Ok(())
}

/// While nodes run the doctor takes the slot for a moment, and clients are served again after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_degraded_document_is_repaired_while_nodes_run() -> Result<()> {
    let server = Server::shared().await;
    let url = server.database().await;
    let nodes = Nodes::start(2, &url, "none").await?;
    let client = reqwest::Client::new();
    let [first, _] = [nodes.urls()[0].clone(), nodes.urls()[1].clone()];
    let place = Place::Database(url, server);
    let created = client
        .post(format!("{first}/api/v1/documents"))
        .json(&serde_json::json!({ "id": "minutes" }))
        .send()
        .await?;
    created.error_for_status()?;
    let files = Folder::new("doctor-files", "root");
    let file = files.path().join("minutes.yjs");
    std::fs::write(&file, typed(1, "hello").1)?;
    let imported = place
        .doctor(&["import", &file.display().to_string()])
        .await?;
    ensure!(
        imported.ok && imported.has("minutes: merged"),
        "{imported:?}"
    );
    let read = async || -> Result<(u16, String)> {
        let answer = client
            .get(format!("{first}/api/v1/documents/minutes/text?name=quill"))
            .send()
            .await?;
        Ok((answer.status().as_u16(), answer.text().await?))
    };
    let eventually = async |wanted: &(dyn Fn(&(u16, String)) -> bool + Sync)| -> Result<()> {
        let begun = std::time::Instant::now();
        loop {
            let answer = read().await?;
            if wanted(&answer) {
                return Ok(());
            }
            ensure!(
                begun.elapsed().as_secs() < 15,
                "{answer:?}\n{}",
                nodes.logs()
            );
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    eventually(&|(status, text)| *status == 200 && text.contains("hello")).await?;
    place
        .execute("update update_log set crc32c = 7 where document = 'minutes'")
        .await?;
    // The node opens it again once the slot has moved: by way of an import into another document of the slot, or now.
    let verified = place.doctor(&["verify", "minutes"]).await?;
    ensure!(!verified.ok, "{verified:?}");
    let keep = files.path().display().to_string();
    let repaired = place
        .doctor(&["repair", "minutes", "--keep", &keep])
        .await?;
    ensure!(repaired.ok && repaired.has("repaired"), "{repaired:?}");
    eventually(&|(status, text)| *status == 200 && !text.contains("hello")).await?;
    nodes.balanced(2).await?;
    Ok(())
}

/// Where documents are.
enum Place {
    Folder(Folder),
    Database(String, Arc<Server>),
}

/// What the doctor said.
#[derive(Debug)]
struct Said {
    ok: bool,
    text: String,
}

impl Said {
    fn has(&self, what: &str) -> bool {
        self.text.contains(what)
    }
}

impl Place {
    async fn doctor(&self, arguments: &[&str]) -> Result<Said> {
        let mut command = Command::new(node_binary()?);
        match self {
            Self::Folder(folder) => command.arg("--data").arg(folder.path()),
            Self::Database(url, _) => command.args(["--database-url", url]),
        };
        command
            .arg("doctor")
            .args(arguments)
            .args(["--slots", &SLOTS.to_string()]);
        command.stdin(Stdio::null());
        let output = command.output().await?;
        let text = [output.stdout, output.stderr].concat();
        Ok(Said {
            ok: output.status.success(),
            text: String::from_utf8(text)?,
        })
    }

    async fn another(&self) -> Self {
        match self {
            Self::Folder(_) => Self::Folder(Folder::new("doctor", "root")),
            Self::Database(_, server) => Self::Database(server.database().await, server.clone()),
        }
    }

    async fn store(&self) -> Result<Arc<dyn Store>> {
        Ok(match self {
            Self::Folder(folder) => Arc::new(Sqlite::open(folder.path()).await?),
            Self::Database(url, _) => Arc::new(Postgres::connect(url).await?),
        })
    }

    /// Changes rows as no store would.
    async fn execute(&self, sql: &str) -> Result<()> {
        let sql = AssertSqlSafe(sql.to_owned());
        match self {
            Self::Folder(folder) => {
                let options =
                    SqliteConnectOptions::new().filename(folder.path().join("collab.sqlite"));
                let pool = SqlitePool::connect_with(options).await?;
                sqlx::query(sql).execute(&pool).await?;
                pool.close().await;
            }
            Self::Database(url, _) => {
                let pool = PgPool::connect(url).await?;
                sqlx::query(sql).execute(&pool).await?;
                pool.close().await;
            }
        }
        Ok(())
    }

    /// The text of a document, as a node would read it.
    async fn text(&self, name: &str) -> Result<String> {
        let document = DocumentId::new(name)?;
        let Loaded::Live(Content { snapshot, log, .. }) =
            self.store().await?.load(&document).await?
        else {
            anyhow::bail!("{name} is not there");
        };
        let doc = new_doc();
        let snapshot = snapshot.map(|snapshot| snapshot.bytes);
        for bytes in snapshot
            .into_iter()
            .chain(log.into_iter().map(|(_, bytes)| bytes))
        {
            doc.transact_mut()
                .apply_update(Update::decode_v1(&bytes)?)?;
        }
        let text = doc.get_or_insert_text("quill");
        Ok(text.get_string(&doc.transact()))
    }
}

/// A node that writes behind no client.
struct Writer {
    store: Arc<dyn Store>,
    incarnation: Uuid,
    epochs: std::collections::HashMap<collab_core::ids::Slot, Epoch>,
}

impl Writer {
    async fn new(place: &Place) -> Result<Self> {
        let store = place.store().await?;
        let incarnation = Uuid::new_v4();
        let member = Registration {
            node: NodeId::from("writer"),
            incarnation,
            pod_uid: "pod of writer".to_owned(),
            address: String::new(),
            zone: String::new(),
            weight: 100,
        };
        store
            .register(&member, SLOTS, std::time::Duration::from_mins(1))
            .await?;
        let slots: Vec<_> = (0..SLOTS).map(collab_core::ids::Slot).collect();
        let epochs = store.claim(incarnation, &slots, Claim::Orphaned).await?;
        let epochs = epochs.into_iter().collect();
        Ok(Self {
            store,
            incarnation,
            epochs,
        })
    }

    fn right(&self, document: &DocumentId) -> Ownership {
        let slot = slot_of(document, SLOTS);
        Ownership {
            slot,
            epoch: self.epochs[&slot],
            incarnation: self.incarnation,
        }
    }

    /// Types letters, one update each; a snapshot lies in the middle of the log.
    async fn write(&self, name: &str, letters: &str) -> Result<()> {
        let document = DocumentId::new(name)?;
        let ownership = self.right(&document);
        let created = self
            .store
            .create(&document, ownership, Recreate::Refused)
            .await?;
        let last = match self.store.load(&document).await? {
            Loaded::Live(content) => content.last,
            other => anyhow::bail!("{other:?}"),
        };
        let client = 1 + u64::try_from(last.0)?;
        let (updates, _) = typed(client, letters);
        for (seq, bytes) in (last.0 + 1..).map(Seq).zip(updates) {
            let append = Append {
                document: document.clone(),
                seq,
                ownership,
                bytes,
                author: String::new(),
            };
            let appended = self.store.append(&[append]).await?;
            ensure!(appended.inserted.len() == 1, "{appended:?}");
        }
        if matches!(created, Created::Created { room_epoch } if name.contains('/') && room_epoch.0 == 1)
        {
            let (_, bytes) = typed(client, letters);
            let snapshot = NewSnapshot {
                document: document.clone(),
                ownership,
                room_epoch: collab_core::ids::RoomEpoch(1),
                seq: Seq(i64::try_from(letters.len())?),
                bytes: bytes.into(),
            };
            self.store.snapshot(&snapshot).await?;
        }
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let (store, incarnation) = (self.store.clone(), self.incarnation);
        let left = async move { store.leave(incarnation).await };
        // Its slots are free for whoever comes next.
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(left)).ok();
    }
}

/// The updates of someone who types letters one by one, and all in one.
fn typed(client: u64, letters: &str) -> (Vec<Bytes>, Vec<u8>) {
    use yrs::{ClientID, Doc, OffsetKind, Options, ReadTxn, StateVector};
    let doc = Doc::with_options(Options {
        client_id: ClientID::new(client),
        offset_kind: OffsetKind::Utf16,
        ..Options::default()
    });
    let text = doc.get_or_insert_text("quill");
    let mut updates = Vec::new();
    for letter in letters.chars() {
        let mut txn = doc.transact_mut();
        let end = text.len(&txn);
        text.insert(&mut txn, end, &letter.to_string());
        updates.push(txn.encode_update_v1().into());
    }
    let all = doc
        .transact()
        .encode_state_as_update_v1(&StateVector::default());
    (updates, all)
}
