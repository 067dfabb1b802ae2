//! What the store tells the [`checker`](crate::checker): every claim and append as triggers of the test write it down in the
//! same transaction, the log and snapshots that are left, and what yrs and Yjs make of them without any node.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use bytes::Bytes;
use collab_core::replica::new_doc;
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};
use yrs::types::ToJson as _;
use yrs::updates::decoder::Decode as _;
use yrs::{GetString as _, ReadTxn as _, Transact as _, Update};

use crate::checker::{Claim, Content, Log, Replica, Row, tokens_of};
use crate::clients::Script;

const TRIGGERS: &str = "
create schema witness;
create table witness.claim (n bigserial, slot int, owner uuid, epoch bigint, at timestamptz default clock_timestamp());
create table witness.append (n bigserial, document text, seq bigint, slot int, epoch bigint, crc32c bigint, bytes bytea, at timestamptz);
create function witness.claimed() returns trigger language plpgsql security definer as $$
begin
  insert into witness.claim (slot, owner, epoch)
    select now.slot, now.owner, now.epoch from changed now join former was using (slot) where now.epoch <> was.epoch;
  return null;
end $$;
create function witness.appended() returns trigger language plpgsql security definer as $$
begin
  insert into witness.append (document, seq, slot, epoch, crc32c, bytes, at)
    select document, seq, slot, epoch, crc32c, bytes, at from fresh;
  return null;
end $$;
create trigger claimed after update on slot referencing old table as former new table as changed
  for each statement execute function witness.claimed();
create trigger appended after insert on update_log referencing new table as fresh
  for each statement execute function witness.appended();
-- Now that nobody can change an owner unseen.
insert into witness.claim (slot, owner, epoch) select slot, owner, epoch from slot";

/// Has the database write down every claim and append from now on. `session` is the superuser's.
///
/// # Errors
/// When the nodes have not made their tables yet, or this was done before.
pub async fn install(session: &mut PgConnection) -> Result<()> {
    sqlx::raw_sql(TRIGGERS).execute(session).await?;
    Ok(())
}

/// Reads what was written down, and what is left in the log.
///
/// # Errors
/// When the database does not answer.
pub async fn log(session: &mut PgConnection) -> Result<Log> {
    let claims = sqlx::query(
        "select slot, owner::text, epoch, extract(epoch from at)::float8 * 1000 from witness.claim order by n",
    );
    let claims = claims.fetch_all(&mut *session).await?;
    let rows = |table: &str| {
        format!(
            "select document, seq, slot, epoch, extract(epoch from at)::float8 * 1000, crc32c, bytes
             from {table} order by document, seq"
        )
    };
    let all = sqlx::AssertSqlSafe(rows("witness.append"));
    let appended = sqlx::query(all).fetch_all(&mut *session).await?;
    let left = sqlx::AssertSqlSafe(rows("update_log"));
    let left = sqlx::query(left).fetch_all(&mut *session).await?;
    let snapshots = sqlx::query("select document, min(seq) from snapshot group by document");
    let snapshots = snapshots.fetch_all(&mut *session).await?;
    Ok(Log {
        claims: claims.iter().map(claim).collect::<Result<_>>()?,
        appended: appended.iter().map(row).collect::<Result<_>>()?,
        appended_before_failover: Vec::new(),
        rows: left.iter().map(row).collect::<Result<_>>()?,
        snapshots: snapshots
            .iter()
            .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
            .collect::<Result<_>>()?,
    })
}

fn claim(row: &PgRow) -> Result<Claim> {
    Ok(Claim {
        slot: u16::try_from(row.try_get::<i32, _>(0)?)?,
        owner: row.try_get::<Option<String>, _>(1)?.unwrap_or_default(),
        epoch: row.try_get(2)?,
        at_ms: row.try_get(3)?,
    })
}

fn row(row: &PgRow) -> Result<Row> {
    Ok(Row {
        document: row.try_get(0)?,
        seq: row.try_get(1)?,
        slot: u16::try_from(row.try_get::<i32, _>(2)?)?,
        epoch: row.try_get(3)?,
        at_ms: row.try_get(4)?,
        crc32c: u32::try_from(row.try_get::<i64, _>(5)?)?,
        tokens: tokens_of(row.try_get(6)?),
    })
}

/// A document as it is stored: its newest snapshot, if any, and the updates after it, in order.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Its name.
    pub document: String,
    /// V1 updates.
    pub updates: Vec<Bytes>,
}

/// Reads documents from the tables.
///
/// # Errors
/// When the database does not answer.
pub async fn stored(session: &mut PgConnection, documents: &[String]) -> Result<Vec<Stored>> {
    let mut stored = Vec::new();
    for document in documents {
        let rows = sqlx::query_scalar::<_, Vec<u8>>(
            "with newest as (select seq, bytes from snapshot where document = $1 order by seq desc limit 1)
             select bytes from (
               select seq, bytes from newest
               union all
               select seq, bytes from update_log where document = $1 and coalesce((select seq from newest), 0) < seq
             ) as all_of_it order by seq",
        );
        let rows = rows.bind(document).fetch_all(&mut *session).await?;
        stored.push(Stored {
            document: document.clone(),
            updates: rows.into_iter().map(Bytes::from).collect(),
        });
    }
    Ok(stored)
}

/// What yrs makes of a stored document.
///
/// # Errors
/// When an update cannot be read.
pub fn in_yrs(stored: &Stored) -> Result<Replica> {
    let doc = new_doc();
    for update in &stored.updates {
        doc.transact_mut()
            .apply_update(Update::decode_v1(update)?)
            .with_context(|| stored.document.clone())?;
    }
    let (text, map, array) = (
        doc.get_or_insert_text("quill"),
        doc.get_or_insert_map("map"),
        doc.get_or_insert_array("array"),
    );
    let txn = doc.transact();
    let snapshot = txn.snapshot();
    let deletes = snapshot.delete_set.iter().flat_map(|(client, ranges)| {
        let ranges: Vec<_> = ranges.iter().collect();
        let client = client.get();
        ranges.into_iter().map(move |range| {
            let (start, end) = (u64::from(range.start), u64::from(range.end));
            (client, start, end - start)
        })
    });
    let clocks = snapshot.state_map.iter();
    Ok(Replica {
        witness: "a cold load by yrs".to_owned(),
        document: stored.document.clone(),
        deletes: deletes.collect(),
        state_vector: clocks
            .map(|(client, clock)| (client.get(), u64::from(*clock)))
            .collect(),
        content: Content {
            text: text.get_string(&txn),
            map: in_json(&map.to_json(&txn))?,
            array: in_json(&array.to_json(&txn))?,
        },
    })
}

fn in_json<T: serde::de::DeserializeOwned>(any: &yrs::Any) -> Result<T> {
    Ok(serde_json::from_value(serde_json::to_value(any)?)?)
}

/// What Yjs makes of stored documents; `folder` takes a file with them.
///
/// # Errors
/// When Yjs cannot read one.
pub async fn in_yjs(stored: &[Stored], folder: &Path) -> Result<Vec<Replica>> {
    #[derive(Serialize)]
    struct Options<'a> {
        path: &'a Path,
    }
    #[derive(Deserialize)]
    struct Held {
        document: String,
        replica: Replica,
    }
    let documents: BTreeMap<&str, Vec<&[u8]>> = stored
        .iter()
        .map(|stored| {
            let updates = stored.updates.iter().map(AsRef::as_ref);
            (stored.document.as_str(), updates.collect())
        })
        .collect();
    let path = folder.join("stored.json");
    std::fs::write(&path, serde_json::to_vec(&documents)?)?;
    let held = Script::start("stored", &Options { path: &path })?.all::<Held>();
    let replicas = held.await?.into_iter().map(|held| Replica {
        witness: "a cold load by Yjs".to_owned(),
        document: held.document,
        ..held.replica
    });
    Ok(replicas.collect())
}
