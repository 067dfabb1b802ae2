//! Clients that do what no client should, and what the others notice of it: nothing.

use anyhow::{Context as _, Result};
use collab_tests::clients::Script;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::stores::resident;
use crate::world::World;
use crate::{millis, seconds};

const VICTIM: usize = 0;

/// Lets a client of `tests/clients/hostile.mjs` have its way with a document at a node; answers what it says at its end.
pub(crate) async fn script(
    world: &World,
    mode: &str,
    node: &str,
    document: &str,
) -> Result<String> {
    #[derive(Serialize)]
    struct Options<'a> {
        mode: &'a str,
        node: &'a str,
        document: &'a str,
    }
    #[derive(Deserialize)]
    struct Said {
        said: Value,
    }
    let options = Options {
        mode,
        node,
        document,
    };
    let said = Script::start_on(&world.clients, "hostile", &options)?;
    let last = said.all::<Said>().await?.pop().context("it said nothing")?;
    Ok(last.said.to_string())
}

/// Rows in the log of a document that no typist writes.
async fn rows_of(world: &World, document: &str) -> Result<i64> {
    let query = format!("select count(*) from witness.append where document = '{document}'");
    world.count(&query, 0, seconds(1)).await
}

/// What cannot be applied is neither logged nor acknowledged; the client is asked, fills the gap, and is.
pub(crate) async fn gap(world: &mut World) -> Result<()> {
    world.expect.silence = Some(seconds(3));
    world.fault(None).await?;
    let url = world.nodes.nodes[VICTIM].url();
    let said = script(world, "gap", &url, "gap").await?;
    world.over();
    let rows = rows_of(world, "gap").await?;
    world.expect(said.contains(r#""saved":true"#), || {
        format!("never saved: {said}")
    });
    world.expect(rows == 1, || {
        format!("{rows} rows for a gap and its filling")
    });
    world.note(format!("{said}, {rows} row"));
    Ok(())
}

pub(crate) async fn flood(world: &mut World) -> Result<()> {
    world.expect.silence = Some(seconds(5));
    world.fault(VICTIM).await?;
    let before = resident(world, VICTIM);
    let url = world.nodes.nodes[VICTIM].url();
    let said = script(world, "flood", &url, "flood").await?;
    tokio::time::sleep(millis(500)).await;
    world.over();
    let rows = rows_of(world, "flood").await?;
    let grown = resident(world, VICTIM).saturating_sub(before) >> 20;
    world.expect(rows == 0, || format!("{rows} of them were logged"));
    world.expect(grown < 200, || format!("the node grew by {grown} MiB"));
    let runs = world.nodes.runs(VICTIM);
    world.expect(runs, || "the node ended".to_owned());
    world.note(format!("{said}; the node grew by {grown} MiB"));
    Ok(())
}

pub(crate) async fn replay(world: &mut World) -> Result<()> {
    world.expect.silence = Some(seconds(3));
    world.fault(None).await?;
    let url = world.nodes.nodes[VICTIM].url();
    let said = script(world, "replay", &url, "replay").await?;
    world.over();
    let rows = rows_of(world, "replay").await?;
    world.expect(said.contains(r#""text":"once;""#), || {
        format!("the text is {said}")
    });
    world.expect(rows == 1, || {
        format!("{rows} rows for one update that came a hundred times")
    });
    world.note(format!("{said}, {rows} row"));
    Ok(())
}
