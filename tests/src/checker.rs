//! The verdict over a run: what was acknowledged is there exactly once, wherever one looks.

use anyhow::{Result, ensure};

use crate::clients::typist::Ledger;
use crate::clients::{Reading, read, reload};

/// Compares four witnesses of each document: its writers' own replicas, a fresh client, what REST exports as text, and what
/// Yjs makes of the state that REST exports. They must be equal, and hold every acknowledged edit exactly once.
///
/// # Errors
/// With the first difference.
pub async fn everything_acknowledged_is_there(
    reading: &Reading<'_>,
    ledger: &Ledger,
) -> Result<()> {
    let fresh = read(reading).await?;
    let texts = ledger.texts()?;
    for reloaded in reload(reading).await? {
        let document = reloaded.document.as_str();
        let text = texts[document];
        ledger.judge(document, text).clean()?;
        ensure!(
            fresh[document] == text,
            "a fresh client differs in {document}"
        );
        ensure!(
            reloaded.text == text,
            "the stored state differs in {document}"
        );
        ensure!(
            reloaded.exported == text,
            "the exported text differs in {document}"
        );
    }
    Ok(())
}
