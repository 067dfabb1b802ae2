//! Rows and columns of Postgres as the types of the store.

use std::time::Duration;

use collab_core::control::{LoadSample, MemberState};
use collab_core::ids::{DocumentId, Epoch, NodeId, Seq, Slot, Term};
use sqlx::Row;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use uuid::Uuid;

use crate::store::{DocumentRow, Member, Ownership, StoreError};

pub(super) fn document_row(row: &PgRow) -> Result<DocumentRow, StoreError> {
    Ok(DocumentRow {
        id: document_id(get(row, 0)?)?,
        created_ms: get(row, 1)?,
        updated_ms: get(row, 2)?,
        seq: Seq(get(row, 3)?),
    })
}

pub(super) fn member_row(row: &PgRow) -> Result<Member, StoreError> {
    let state: &str = get(row, 6)?;
    let load: Option<Json<LoadSample>> = get(row, 7)?;
    let millis = |number: i64| {
        Ok(Duration::from_millis(
            u64::try_from(number).map_err(StoreError::unusable)?,
        ))
    };
    let duration = |column| millis(get(row, column)?);
    Ok(Member {
        node: NodeId(get(row, 0)?),
        incarnation: get(row, 1)?,
        pod_uid: get(row, 2)?,
        address: get(row, 3)?,
        zone: get(row, 4)?,
        weight: u32::try_from(get::<i32>(row, 5)?).map_err(StoreError::unusable)?,
        state: MemberState::parse(state)
            .ok_or_else(|| StoreError::unusable(format!("unknown member state {state}")))?,
        lease_left: duration(8)?,
        load: load.map(|Json(load)| load),
        load_age: duration(9)?,
        leases_lost_ago: get::<Vec<i64>>(row, 13)?
            .into_iter()
            .map(|ago| millis(ago.max(0)))
            .collect::<Result<_, _>>()?,
    })
}

/// Slots and their new epochs, in order of slot.
pub(super) fn taken(rows: &[PgRow]) -> Result<Vec<(Slot, Epoch)>, StoreError> {
    let mut taken = rows
        .iter()
        .map(|row| Ok((slot(get(row, 0)?)?, Epoch(get(row, 1)?))))
        .collect::<Result<Vec<_>, StoreError>>()?;
    taken.sort_unstable();
    Ok(taken)
}

pub(super) fn granted(row: &PgRow) -> Result<Result<(), Term>, StoreError> {
    Ok(if get(row, 0)? {
        Ok(())
    } else {
        Err(Term(get(row, 1)?))
    })
}

pub(super) fn columns(owned: &[Ownership]) -> (Vec<i32>, Vec<i64>, Vec<Uuid>) {
    (
        owned
            .iter()
            .map(|ownership| i32::from(ownership.slot.0))
            .collect(),
        owned.iter().map(|ownership| ownership.epoch.0).collect(),
        owned
            .iter()
            .map(|ownership| ownership.incarnation)
            .collect(),
    )
}

pub(super) fn get<'row, T>(row: &'row PgRow, column: usize) -> Result<T, StoreError>
where
    T: sqlx::Decode<'row, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
{
    row.try_get(column).map_err(StoreError::unusable)
}

pub(super) fn slot(number: i32) -> Result<Slot, StoreError> {
    u16::try_from(number)
        .map(Slot)
        .map_err(StoreError::unusable)
}

pub(super) fn document_id(text: String) -> Result<DocumentId, StoreError> {
    DocumentId::try_from(text).map_err(StoreError::unusable)
}
