//! Rows of the store that are damaged, poisonous or old. Documents are planted row by row, as nodes would have written them,
//! and opened for the first time after the damage.

use anyhow::{Context as _, Result};
use collab_core::ids::DocumentId;
use collab_core::replica::new_doc;
use collab_core::ring::slot_of;
use sqlx::PgConnection;
use tokio::time::sleep;
use yrs::{ReadTxn as _, StateVector, Text as _, Transact as _};

use crate::world::World;
use crate::{millis, seconds};

/// Updates of a planted document.
const UPDATES: usize = 25;
/// Positions of its snapshots; the log is cut up to the older one.
const SNAPSHOTS: [usize; 2] = [10, 20];

/// A planted document, and the text it has to have.
struct Planted {
    name: String,
    text: String,
}

/// Whether a document is to be cut behind snapshots, or is all log.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Snapshots,
    Log,
}

async fn plant(session: &mut PgConnection, name: &str, shape: Shape) -> Result<Planted> {
    let doc = new_doc();
    let text = doc.get_or_insert_text("quill");
    let mut written = String::new();
    let (mut updates, mut states) = (Vec::new(), Vec::new());
    for number in 0..UPDATES {
        let word = format!("{name}-{number};");
        let length = text.len(&doc.transact());
        let mut txn = doc.transact_mut();
        text.insert(&mut txn, length, &word);
        updates.push(txn.encode_update_v1());
        drop(txn);
        states.push(
            doc.transact()
                .encode_state_as_update_v1(&StateVector::default()),
        );
        written.push_str(&word);
    }
    plant_rows(
        session,
        name,
        &updates,
        if shape == Shape::Log { 0 } else { SNAPSHOTS[0] },
    )
    .await?;
    if shape == Shape::Snapshots {
        for seq in SNAPSHOTS {
            plant_snapshot(session, name, seq, &states[seq - 1]).await?;
        }
    }
    Ok(Planted {
        name: name.to_owned(),
        text: written,
    })
}

/// Inserts a document with the updates after the first `cut`.
async fn plant_rows(
    session: &mut PgConnection,
    name: &str,
    updates: &[Vec<u8>],
    cut: usize,
) -> Result<()> {
    let slots: i32 = sqlx::query_scalar("select slots from control")
        .fetch_one(&mut *session)
        .await?;
    let slot = slot_of(&DocumentId::new(name)?, u16::try_from(slots)?);
    sqlx::query("insert into document (id, slot) values ($1, $2)")
        .bind(name)
        .bind(i32::from(slot.0))
        .execute(&mut *session)
        .await?;
    for (index, update) in updates.iter().enumerate().skip(cut) {
        sqlx::query(
            "insert into update_log (document, seq, slot, epoch, crc32c, bytes, author) values ($1, $2, $3, (select epoch from slot where slot = $3), $4, $5, '')",
        )
        .bind(name)
        .bind(i64::try_from(index + 1)?)
        .bind(i32::from(slot.0))
        .bind(i64::from(crc32c::crc32c(update)))
        .bind(update)
        .execute(&mut *session)
        .await?;
    }
    Ok(())
}

async fn plant_snapshot(
    session: &mut PgConnection,
    name: &str,
    seq: usize,
    state: &[u8],
) -> Result<()> {
    sqlx::query(
        "insert into snapshot (document, seq, room_epoch, slot, epoch, sha256, library, bytes)
         select id, $2, room_epoch, slot, 1,
           sha256(convert_to(id, 'UTF8') || '\\x00' || int8send(room_epoch) || int8send($2) || $3), 'planted', $3
         from document where id = $1",
    )
    .bind(name)
    .bind(i64::try_from(seq)?)
    .bind(state)
    .execute(&mut *session)
    .await?;
    Ok(())
}

async fn damage(session: &mut PgConnection, statement: &str) -> Result<()> {
    let done = sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
        .execute(session)
        .await?;
    anyhow::ensure!(0 < done.rows_affected(), "nothing was damaged: {statement}");
    Ok(())
}

/// Text of a document as a node answers it, or the status of its refusal.
async fn text_at(world: &World, name: &str) -> Result<Result<String, u16>> {
    let url = format!("{}/api/v1/documents/{name}/text", world.nodes.urls()[0]);
    for _ in 0..100 {
        let answer = reqwest::get(&url).await?;
        let status = answer.status().as_u16();
        // It has just moved.
        if status == 409 || status == 429 {
            sleep(millis(100)).await;
            continue;
        }
        return Ok(if status == 200 {
            Ok(answer.text().await?)
        } else {
            Err(status)
        });
    }
    anyhow::bail!("{name} is never served")
}

/// Expects the whole text of a document, or, when `refused` is allowed, that it is refused: never a part.
async fn expect_whole(world: &mut World, planted: &Planted, refused: bool) -> Result<bool> {
    let answer = text_at(world, &planted.name).await?;
    let whole = answer.as_ref().is_ok_and(|text| *text == planted.text);
    world.expect(whole || (refused && answer.is_err()), || {
        format!("{} is answered with {answer:?}", planted.name)
    });
    Ok(whole)
}

async fn degraded(world: &World) -> Result<f64> {
    let mut sum = 0.0;
    for number in 0..world.nodes.nodes.len() {
        sum += world
            .nodes
            .metric(number, "collab_documents_degraded")
            .await?;
    }
    Ok(sum)
}

/// The one before and the log do.
pub(crate) async fn damaged_snapshots(world: &mut World) -> Result<()> {
    world.expect.silence = Some(seconds(3));
    let mut session = world.postgres.session().await?;
    let mut planted = Vec::new();
    for name in ["flipped", "cut", "swapped-a", "swapped-b"] {
        planted.push(plant(&mut session, name, Shape::Snapshots).await?);
    }
    world.fault(None).await?;
    for statement in [
        "update snapshot set bytes = set_byte(bytes, 9, get_byte(bytes, 9) # 1) where document = 'flipped' and seq = 20",
        "update snapshot set bytes = substr(bytes, 1, 20) where document = 'cut' and seq = 20",
        "update snapshot s set bytes = o.bytes, sha256 = o.sha256 from snapshot o
         where s.document like 'swapped-%' and o.document like 'swapped-%' and s.document <> o.document and s.seq = 20 and o.seq = 20",
    ] {
        damage(&mut session, statement).await?;
    }
    for planted in &planted {
        expect_whole(world, planted, false).await?;
    }
    world.over();
    world.note(format!(
        "{} documents loaded from the snapshot before",
        planted.len()
    ));
    Ok(())
}

/// A row that is missing, cut, changed or out of order is found; the document is not served as if nothing were.
pub(crate) async fn damaged_rows(world: &mut World) -> Result<()> {
    world.expect.silence = Some(seconds(3));
    let mut session = world.postgres.session().await?;
    let mut planted = Vec::new();
    for name in [
        "row-cut",
        "row-missing",
        "row-flipped",
        "row-reordered",
        "row-doubled",
        "row-last",
    ] {
        planted.push(plant(&mut session, name, Shape::Log).await?);
    }
    world.fault(None).await?;
    for statement in [
        "update update_log set bytes = substr(bytes, 1, 5) where document = 'row-cut' and seq = 7",
        "delete from update_log where document = 'row-missing' and seq = 7",
        "update update_log set bytes = set_byte(bytes, 4, get_byte(bytes, 4) # 1) where document = 'row-flipped' and seq = 7",
        "update update_log u set bytes = o.bytes, crc32c = o.crc32c from update_log o
         where u.document = 'row-reordered' and o.document = 'row-reordered' and u.seq in (7, 8) and o.seq = 15 - u.seq",
        "update update_log set seq = -seq where document = 'row-doubled' and 7 < seq",
        "update update_log set seq = 1 - seq where document = 'row-doubled' and seq < 0",
        "insert into update_log select document, 8, slot, epoch, crc32c, bytes, author, at from update_log
         where document = 'row-doubled' and seq = 7",
        "update update_log set bytes = o.bytes from update_log o where update_log.document = 'row-last' and update_log.seq = 25
           and o.document = 'row-last' and o.seq = 24",
    ] {
        damage(&mut session, statement).await?;
    }
    let mut whole = 0;
    for planted in &planted {
        // The same update twice does no harm.
        let harmless = planted.name == "row-doubled";
        whole += usize::from(expect_whole(world, planted, !harmless).await?);
    }
    let degraded = degraded(world).await?;
    world.over();
    world.expect(degraded >= 5.0, || {
        format!("{degraded} documents are said to be degraded")
    });
    world.note(format!("{degraded} documents degraded, {whole} whole"));
    Ok(())
}

/// Only its own document suffers, also after a restart.
pub(crate) async fn poison(world: &mut World) -> Result<()> {
    let mut session = world.postgres.session().await?;
    // Smallest known to make an encode panic, to be undecodable as own state, to have a hole.
    let poisons: [&[u8]; 3] = [
        &[1, 1, 1, 2, 162, 8, 6, 0, 0, 0],
        &[1, 1, 1, 2, 2, 1, 0, 0, 0, 0],
        &[1, 1, 2, 5, 132, 1, 4, 1, 120, 0],
    ];
    let healthy = plant(&mut session, "healthy", Shape::Log).await?;
    for (number, poison) in poisons.iter().enumerate() {
        plant_rows(
            &mut session,
            &format!("poison-{number}"),
            &[poison.to_vec()],
            0,
        )
        .await?;
    }
    world.fault(0).await?;
    for round in 0..2 {
        for number in 0..poisons.len() {
            let answer = text_at(world, &format!("poison-{number}")).await?;
            world.expect(answer.is_err(), || {
                format!("poison-{number} is answered with {answer:?}")
            });
        }
        expect_whole(world, &healthy, false).await?;
        for number in 0..3 {
            let runs = world.nodes.runs(number);
            world.expect(runs, || format!("n{number} ended"));
        }
        let degraded = degraded(world).await?;
        world.note(format!("round {round}: {degraded} documents degraded"));
        if round == 0 {
            for number in 0..3 {
                world.nodes.kill(number)?;
                world.nodes.run(number)?;
            }
            world.nodes.balanced(3).await?;
        }
    }
    world.over();
    Ok(())
}

/// Snapshots as Yjs and yrs of other versions encoded them load, and hold what they held.
pub(crate) async fn old_snapshots(world: &mut World) -> Result<()> {
    world.expect.silence = Some(seconds(3));
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/old-snapshots");
    let mut session = world.postgres.session().await?;
    world.fault(None).await?;
    let mut loaded = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_none_or(|ending| ending != "yjs") {
            continue;
        }
        let stem = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let text = std::fs::read_to_string(path.with_extension("txt"))?;
        let name = format!("old-{stem}");
        plant_rows(&mut session, &name, &[], 0).await?;
        plant_snapshot(&mut session, &name, 1, &std::fs::read(&path)?).await?;
        let planted = Planted { name, text };
        expect_whole(world, &planted, false).await?;
        loaded.push(stem);
    }
    world.over();
    world.expect(loaded.len() >= 3, || format!("only {loaded:?}"));
    world.note(format!("loaded: {}", loaded.join(", ")));
    Ok(())
}
