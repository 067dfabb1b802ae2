//! `collab-node doctor`: looks after stored documents, and takes them out and in as files.
//!
//! It works on the same store as the nodes, a folder with SQLite or a Postgres, and needs no node. *Reading*
//! (verify, export, backup) is safe at any time: each document is read in one consistent view. *Writing* (repair,
//! import, restore) follows the rule that nodes follow: the doctor becomes the owner of the document's slot,
//! writes under its epoch, and gives the slot back. While nodes run, the documents of that slot pause for about a second;
//! clients keep their sockets, and what was acknowledged before is what the doctor reads. A folder with SQLite
//! belongs to one process: its node has to be stopped.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use clap::{Args, Subcommand};
use collab_core::document::Document;
use collab_core::ids::{DocumentId, Epoch, NodeId, Seq};
use collab_core::ring::slot_of;
use collab_core::scan::scan_stored;
use uuid::Uuid;

use crate::config::Storage;
use crate::store::postgres::Postgres;
use crate::store::rows::{Rows, StoredRows};
use crate::store::sqlite::Sqlite;
use crate::store::{
    Append, Claim, Content, Created, Fence, LoadError, Loaded, NewSnapshot, Ownership, Recreate,
    Registration, Renewal, StoreError,
};

mod files;
mod salvage;

use files::Listed;

/// How long the doctor owns slots without a sign of life, if it dies. Renewed before each document.
const LEASE: Duration = Duration::from_secs(15);
/// Who wrote what the doctor puts into a log.
const AUTHOR: &str = "collab-node doctor";

/// Look after stored documents: verify, repair, export, import, backup, restore.
#[derive(Clone, Debug, Args)]
pub struct Doctor {
    /// What to do.
    #[command(subcommand)]
    pub task: Task,
}

/// What the doctor can do.
#[derive(Clone, Debug, Subcommand)]
pub enum Task {
    /// Read documents as a node would, and say which are damaged, where. Safe while nodes run.
    Verify {
        /// Which; all without any.
        documents: Vec<String>,
    },
    /// Make damaged documents open again, from all rows that are good. Keeps their old rows in a file and says what is lost.
    Repair {
        /// Which; all damaged ones with --all.
        #[arg(required_unless_present = "all")]
        documents: Vec<String>,
        /// Every damaged document.
        #[arg(long, conflicts_with = "documents")]
        all: bool,
        /// Folder for the rows that are replaced.
        #[arg(long, default_value = ".")]
        keep: PathBuf,
    },
    /// Write documents to files, one Yjs update (V1) each. Safe while nodes run.
    Export {
        /// Which; all without any.
        documents: Vec<String>,
        /// Folder for the files.
        #[arg(long, default_value = ".")]
        to: PathBuf,
    },
    /// Merge files of Yjs updates (V1) into documents of their names; makes those that do not exist.
    Import {
        /// Files as `export` writes them.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// The document, if the one file is not named for it.
        #[arg(long = "as")]
        named: Option<String>,
    },
    /// Write every document, and which were deleted, to a folder. Safe while nodes run.
    Backup {
        /// A folder that is empty or does not exist.
        #[arg(long)]
        to: PathBuf,
    },
    /// Bring documents back from a backup: those that do not exist, the others with --replace.
    Restore {
        /// Which; all without any.
        documents: Vec<String>,
        /// The folder of the backup.
        #[arg(long)]
        from: PathBuf,
        /// Also documents that exist or were deleted: what they hold now is deleted, and clients that still have it
        /// open have to open them anew.
        #[arg(long)]
        replace: bool,
    },
}

/// Does a task and says on standard output, a line per document, what was found or done.
///
/// # Errors
/// When something could not be done, or a document is damaged: after all others were served.
pub async fn run(doctor: Doctor, storage: &Storage, slots: u16) -> anyhow::Result<()> {
    let store: Arc<dyn Rows> = match storage {
        Storage::Embedded(folder) => {
            let file = folder.join("collab.sqlite");
            ensure!(
                file.is_file(),
                "there is no {}; name the folder with --data",
                file.display()
            );
            Arc::new(Sqlite::open(folder).await?)
        }
        Storage::Cluster(url) => Arc::new(Postgres::connect(url).await?),
    };
    let mut round = Round {
        store,
        slots,
        me: None,
        complaints: 0,
    };
    let done = round.perform(doctor.task).await;
    round.leave().await;
    done?;
    match round.complaints {
        0 => Ok(()),
        1 => bail!("one document needs attention"),
        more => bail!("{more} documents need attention"),
    }
}

struct Round {
    store: Arc<dyn Rows>,
    slots: u16,
    /// The doctor as a member, once it writes.
    me: Option<Uuid>,
    complaints: usize,
}

/// A slot that the doctor owns for a moment, and whose it was.
struct Held {
    ownership: Ownership,
    before: Option<Uuid>,
}

impl Round {
    async fn perform(&mut self, task: Task) -> anyhow::Result<()> {
        match task {
            Task::Verify { documents } => self.verify(&documents).await,
            Task::Repair {
                documents,
                all: _,
                keep,
            } => self.repair(&documents, &keep).await,
            Task::Export { documents, to } => self.export(&documents, &to).await,
            Task::Import { files, named } => self.import(&files, named.as_deref()).await,
            Task::Backup { to } => self.backup(&to).await,
            Task::Restore {
                documents,
                from,
                replace,
            } => self.restore(&documents, &from, replace).await,
        }
    }

    async fn verify(&mut self, documents: &[String]) -> anyhow::Result<()> {
        for id in self.named(documents).await? {
            match self.read(&id).await? {
                Found::Absent => self.complain(&id, "there is no such document")?,
                Found::Deleted => say(&id, "deleted")?,
                Found::Damaged(why) => self.complain(&id, &why)?,
                Found::Live { state, last, .. } => {
                    say(&id, &format!("sound, {} bytes, seq {last}", state.len()))?;
                }
            }
        }
        Ok(())
    }

    async fn repair(&mut self, documents: &[String], keep: &std::path::Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(keep).with_context(|| keep.display().to_string())?;
        let all = documents.is_empty();
        for id in self.named(documents).await? {
            let damaged = match self.read(&id).await? {
                Found::Damaged(_) => true,
                // A snapshot that was passed over costs nothing now, and everything after the next fault.
                Found::Live { .. } => self.rows(&id).await?.is_some_and(|rows| has_damaged(&rows)),
                Found::Absent | Found::Deleted => false,
            };
            if !damaged {
                if !all {
                    say(&id, "nothing to repair")?;
                }
                continue;
            }
            let held = self.hold(&id).await?;
            let repaired = self.repair_held(&id, &held, keep).await;
            self.give_back(held).await;
            repaired?;
        }
        Ok(())
    }

    async fn repair_held(
        &mut self,
        id: &DocumentId,
        held: &Held,
        keep: &std::path::Path,
    ) -> anyhow::Result<()> {
        let rows = self.rows(id).await?.context("it was there")?;
        let salvaged = quietly(|| salvage::salvage(&rows));
        let kept = files::keep_rows(keep, id, &lines_of(&rows))?;
        let snapshot = NewSnapshot {
            document: id.clone(),
            ownership: held.ownership,
            room_epoch: rows.room_epoch,
            seq: rows.last().next(),
            bytes: salvaged.state,
        };
        fenced(self.store.replace(&snapshot).await?)?;
        match self.read(id).await? {
            Found::Live { .. } => {}
            _ => bail!(
                "{id} does not open after its repair; its rows are in {}",
                kept.display()
            ),
        }
        let lost = salvaged
            .lost
            .iter()
            .map(|(seq, why)| format!("\n  seq {seq}: {why}"));
        let lost: String = lost.collect();
        say(
            id,
            &format!("repaired; its old rows are in {}{lost}", kept.display()),
        )
    }

    async fn export(&mut self, documents: &[String], to: &std::path::Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(to).with_context(|| to.display().to_string())?;
        let all = documents.is_empty();
        for id in self.named(documents).await? {
            match self.read(&id).await? {
                Found::Live { state, .. } => {
                    let listed = files::write(to, &id, &state)?;
                    say(
                        &id,
                        &format!(
                            "{} bytes in {}",
                            state.len(),
                            listed.file.unwrap_or_default()
                        ),
                    )?;
                }
                Found::Deleted if all => {}
                Found::Deleted | Found::Absent => {
                    self.complain(&id, "there is no such document")?;
                }
                Found::Damaged(why) => self.complain(&id, &why)?,
            }
        }
        Ok(())
    }

    async fn import(&mut self, files: &[PathBuf], named: Option<&str>) -> anyhow::Result<()> {
        ensure!(
            named.is_none() || files.len() == 1,
            "--as names the document of one file"
        );
        for file in files {
            let id = match named {
                Some(named) => DocumentId::new(named)?,
                None => files::document_of(file).with_context(|| {
                    format!(
                        "{} is not named for a document; say --as DOCUMENT",
                        file.display()
                    )
                })?,
            };
            let update = std::fs::read(file).with_context(|| file.display().to_string())?;
            match self.add(&id, &update.into()).await {
                Ok(done) => say(&id, done)?,
                Err(error) => self.complain(&id, &format!("{}: {error:#}", file.display()))?,
            }
        }
        Ok(())
    }

    async fn backup(&mut self, to: &std::path::Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(to).with_context(|| to.display().to_string())?;
        ensure!(
            std::fs::read_dir(to)?.next().is_none(),
            "{} is not empty",
            to.display()
        );
        let mut list = Vec::new();
        for id in self.named(&[]).await? {
            match self.read(&id).await? {
                Found::Live { state, .. } => list.push(files::write(to, &id, &state)?),
                Found::Deleted => list.push(Listed::tombstone(&id)),
                Found::Absent => {}
                Found::Damaged(why) => self.complain(&id, &format!("not in the backup: {why}"))?,
            }
        }
        files::write_list(to, &list)?;
        let live = list.iter().filter(|listed| listed.file.is_some()).count();
        print(&format!("{live} documents in {}", to.display()))
    }

    async fn restore(
        &mut self,
        documents: &[String],
        from: &std::path::Path,
        replace: bool,
    ) -> anyhow::Result<()> {
        let list = files::read_list(from)
            .with_context(|| format!("{} is no backup: {}", from.display(), files::LIST))?;
        let wanted: Vec<DocumentId> = documents
            .iter()
            .map(|id| DocumentId::new(id))
            .collect::<Result<_, _>>()?;
        for id in &wanted {
            if !list.iter().any(|listed| listed.id == *id) {
                self.complain(id, "it is not in the backup")?;
            }
        }
        let chosen = |listed: &&Listed| wanted.is_empty() || wanted.contains(&listed.id);
        for listed in list.iter().filter(chosen) {
            let restored = match files::read(from, listed) {
                Ok(state) => self.restore_one(&listed.id, state.as_ref(), replace).await,
                Err(error) => Err(error.into()),
            };
            match restored {
                Ok(done) => say(&listed.id, done)?,
                Err(error) => self.complain(&listed.id, &format!("{error:#}"))?,
            }
        }
        Ok(())
    }

    async fn restore_one(
        &mut self,
        id: &DocumentId,
        state: Option<&Bytes>,
        replace: bool,
    ) -> anyhow::Result<&'static str> {
        if let Some(state) = state {
            check(state)?;
        }
        let rows = self.rows(id).await?;
        match (&rows, state) {
            (Some(rows), None) if rows.deleted => return Ok("deleted, as in the backup"),
            (Some(_), _) if !replace => {
                return Ok("left alone: it exists, or was deleted; --replace brings it back");
            }
            _ => {}
        }
        let held = self.hold(id).await?;
        let done = self.replace_held(id, state, &held).await;
        self.give_back(held).await;
        done
    }

    async fn replace_held(
        &self,
        id: &DocumentId,
        state: Option<&Bytes>,
        held: &Held,
    ) -> anyhow::Result<&'static str> {
        // Read again: it is this one's only now.
        match self.rows(id).await? {
            Some(rows) if !rows.deleted => {
                fenced(self.store.delete(id, held.ownership, rows.last()).await?)?;
            }
            None if state.is_none() => {
                self.create(id, held).await?;
                fenced(self.store.delete(id, held.ownership, Seq(0)).await?)?;
            }
            _ => {}
        }
        let Some(state) = state else {
            return Ok("deleted, as in the backup");
        };
        self.create(id, held).await?;
        let base = self.rows(id).await?.context("it was made")?.last();
        self.append(id, held, base.next(), state).await?;
        Ok("restored")
    }

    /// Merges an update into a document.
    async fn add(&mut self, id: &DocumentId, update: &Bytes) -> anyhow::Result<&'static str> {
        scan_stored(update)?;
        let held = self.hold(id).await?;
        let added = self.add_held(id, update, &held).await;
        self.give_back(held).await;
        added
    }

    async fn add_held(
        &self,
        id: &DocumentId,
        update: &Bytes,
        held: &Held,
    ) -> anyhow::Result<&'static str> {
        let (log, last, done) = match self.read(id).await? {
            Found::Damaged(why) => bail!("{why}; repair it first"),
            Found::Live { state, last, .. } => (vec![(last, state)], last, "merged"),
            Found::Absent | Found::Deleted => {
                self.create(id, held).await?;
                let base = self.rows(id).await?.context("it was made")?.last();
                (Vec::new(), base, "imported")
            }
        };
        // What a node could not open must not get into the log.
        let log: Vec<_> = log
            .into_iter()
            .chain([(last.next(), update.clone())])
            .collect();
        opened(|| Document::open(Epoch(0), None, &log, last.next())).map_err(anyhow::Error::msg)?;
        self.append(id, held, last.next(), update).await?;
        Ok(done)
    }

    async fn create(&self, id: &DocumentId, held: &Held) -> anyhow::Result<()> {
        match self
            .store
            .create(id, held.ownership, Recreate::Allowed)
            .await?
        {
            Created::Created { .. } | Created::Exists => Ok(()),
            Created::Fenced => fenced(Fence::Fenced),
        }
    }

    async fn append(
        &self,
        id: &DocumentId,
        held: &Held,
        seq: Seq,
        update: &Bytes,
    ) -> anyhow::Result<()> {
        let append = Append {
            document: id.clone(),
            seq,
            ownership: held.ownership,
            bytes: update.clone(),
            author: AUTHOR.to_owned(),
        };
        let appended = self.store.append(&[append]).await?;
        ensure!(
            !appended.inserted.is_empty(),
            "the slot has another owner now; try again"
        );
        Ok(())
    }

    /// Becomes the owner of a document's slot.
    async fn hold(&mut self, id: &DocumentId) -> anyhow::Result<Held> {
        let slots = match self.store.map(0).await?.slots.len() {
            0 => self.slots,
            known => u16::try_from(known)?,
        };
        let me = match self.me {
            Some(me) => me,
            None => self.register(slots).await?,
        };
        let load = collab_core::control::LoadSample::default();
        let renewed = self.store.renew(me, &me.to_string(), LEASE, load).await?;
        ensure!(
            matches!(renewed, Renewal::Renewed(_)),
            "the doctor is no member any more; try again"
        );
        let slot = slot_of(id, slots);
        let row = self
            .store
            .map(0)
            .await?
            .slots
            .into_iter()
            .find(|row| row.slot == slot);
        let row = row.context("the slot is in the map")?;
        let held = |(slot, epoch)| Held {
            ownership: Ownership {
                slot,
                epoch,
                incarnation: me,
            },
            before: row.owner,
        };
        // Left by a node that is gone, or never owned.
        if let Some(claimed) = self.store.claim(me, &[slot], Claim::Orphaned).await?.pop() {
            return Ok(Held {
                before: None,
                ..held(claimed)
            });
        }
        let owner = row
            .owner
            .context("a slot that cannot be claimed has an owner")?;
        let from = Ownership {
            slot,
            epoch: row.epoch,
            incarnation: owner,
        };
        let moved = self.store.hand_off(&[from], me).await?.pop();
        moved
            .map(held)
            .context("the slot moved just now; try again")
    }

    /// Gives a slot back to the node that had it, or to whoever takes it.
    async fn give_back(&self, held: Held) {
        if let Some(before) = held.before {
            // A node that is leaving does not get it: others adopt it once the doctor has left.
            if let Err(error) = self.store.hand_off(&[held.ownership], before).await {
                tracing::warn!(%error, "the slot was not given back; a node adopts it");
            }
        }
    }

    async fn register(&mut self, slots: u16) -> Result<Uuid, StoreError> {
        let incarnation = Uuid::new_v4();
        let member = Registration {
            node: NodeId(format!("doctor-{}", incarnation.simple())),
            incarnation,
            pod_uid: incarnation.to_string(),
            address: String::new(),
            zone: String::new(),
            // Nobody places anything here.
            weight: 0,
        };
        self.store.register(&member, slots, LEASE).await?;
        self.me = Some(incarnation);
        Ok(incarnation)
    }

    async fn leave(&self) {
        if let Some(me) = self.me
            && let Err(error) = self.store.leave(me).await
        {
            tracing::warn!(%error, "the doctor stays a member until its lease ends");
        }
    }

    /// Reads a document as a node does.
    async fn read(&self, id: &DocumentId) -> anyhow::Result<Found> {
        let Content {
            snapshot,
            log,
            last,
            ..
        } = match self.store.load(id).await {
            Ok(Loaded::Absent) => return Ok(Found::Absent),
            Ok(Loaded::Deleted) => return Ok(Found::Deleted),
            Ok(Loaded::Live(content)) => content,
            Err(LoadError::Damaged { seq, reason, .. }) => {
                return Ok(Found::Damaged(format!("damaged at seq {seq}: {reason}")));
            }
            Err(LoadError::Store(error)) => return Err(error.into()),
        };
        let snapshot = snapshot.as_ref().map(|stored| (stored.seq, &stored.bytes));
        Ok(
            match opened(|| Document::open(Epoch(0), snapshot, &log, last)) {
                Ok(state) => Found::Live { state, last },
                Err(why) => Found::Damaged(format!("damaged: {why}")),
            },
        )
    }

    async fn rows(&self, id: &DocumentId) -> Result<Option<StoredRows>, StoreError> {
        self.store.rows(id).await
    }

    async fn named(&self, documents: &[String]) -> anyhow::Result<Vec<DocumentId>> {
        if documents.is_empty() {
            return Ok(self.store.ids().await?);
        }
        let ids = documents.iter().map(|id| DocumentId::new(id));
        Ok(ids.collect::<Result<_, _>>()?)
    }

    fn complain(&mut self, id: &DocumentId, what: &str) -> anyhow::Result<()> {
        self.complaints += 1;
        say(id, what)
    }
}

/// A document as a node would find it.
enum Found {
    Absent,
    Deleted,
    Damaged(String),
    Live { state: Bytes, last: Seq },
}

/// Opens a document and encodes it: what fails in either, or panics, is damage.
fn opened<E: std::fmt::Display>(
    open: impl FnOnce() -> Result<Document, E>,
) -> Result<Bytes, String> {
    let opened = quietly(|| {
        catch_unwind(AssertUnwindSafe(|| {
            open()
                .map(|document| document.encode_state())
                .map_err(|error| error.to_string())
        }))
    });
    opened.unwrap_or_else(|_| Err("its rows make the CRDT library panic".to_owned()))
}

/// Panics inside are expected, and told in other words.
fn quietly<T>(act: impl FnOnce() -> T) -> T {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let done = act();
    std::panic::set_hook(hook);
    done
}

/// Whether an update can stand alone as a document.
fn check(state: &Bytes) -> anyhow::Result<()> {
    let log = [(Seq(1), state.clone())];
    opened(|| Document::open(Epoch(0), None, &log, Seq(1))).map_err(anyhow::Error::msg)?;
    Ok(())
}

fn has_damaged(rows: &StoredRows) -> bool {
    rows.snapshots
        .iter()
        .chain(&rows.log)
        .any(|row| !row.intact)
}

fn fenced(fence: Fence) -> anyhow::Result<()> {
    match fence {
        Fence::Held => Ok(()),
        Fence::Fenced => bail!("the slot has another owner now; try again"),
    }
}

/// The rows for a person to look at, one in JSON per line.
fn lines_of(rows: &StoredRows) -> Vec<String> {
    let line = |table: &str, row: &crate::store::rows::StoredRow| {
        serde_json::json!({
            "table": table,
            "seq": row.seq,
            "intact": row.intact,
            "bytes": files::hex(&row.bytes),
        })
        .to_string()
    };
    let snapshots = rows.snapshots.iter().map(|row| line("snapshot", row));
    snapshots
        .chain(rows.log.iter().map(|row| line("update_log", row)))
        .collect()
}

fn say(id: &DocumentId, what: &str) -> anyhow::Result<()> {
    print(&format!("{id}: {what}"))
}

fn print(line: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}
