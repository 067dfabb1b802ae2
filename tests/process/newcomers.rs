//! Who comes to a large document.

use anyhow::Result;
use collab_tests::embedded::Embedded;
use collab_tests::process::Folder;

use crate::peer::Peer;

/// All of it is there with the step 2, although the document was not built then, and edits go on from there.
#[tokio::test]
async fn a_large_document_that_nobody_had_open_is_shown_as_it_is_stored() -> Result<()> {
    let data = Folder::new("newcomers", "root");
    let folder = data.path().display().to_string();
    let arguments = ["--data", folder.as_str()];
    let node = Embedded::start(&arguments).await?;
    let mut author = Peer::join(&node.url(), "book").await?;
    author.until("an empty book", |peer| peer.synced).await?;
    for chapter in 0..40 {
        let words = "word ".repeat(2_000);
        author.types(&format!("chapter {chapter}: {words}")).await?;
    }
    author.until("every chapter saved", Peer::is_saved).await?;
    let book = author.text();
    drop(node);

    let node = Embedded::start(&arguments).await?;
    let mut readers = Vec::new();
    for _ in 0..3 {
        readers.push(Peer::join(&node.url(), "book").await?);
    }
    for reader in &mut readers {
        reader.until("the book", |peer| peer.synced).await?;
        assert_eq!(reader.text(), book);
        assert!(reader.received_bytes < book.len() + book.len() / 10, "once");
    }
    readers[0].types("the end").await?;
    readers[0].until("the end saved", Peer::is_saved).await?;
    for reader in &mut readers[1..] {
        let has_end = |peer: &Peer| peer.text().ends_with("the end");
        reader.until("the end", has_end).await?;
    }
    // It is open now: one encoding, and what followed.
    let mut late = Peer::join(&node.url(), "book").await?;
    late.until("the book", |peer| peer.synced).await?;
    assert_eq!(late.text(), book + "the end");
    Ok(())
}
