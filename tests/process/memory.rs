//! A node with less memory than its documents take: who has none open makes room, and nothing is lost.

use std::time::Duration;

use anyhow::{Result, ensure};
use collab_tests::embedded::Embedded;
use collab_tests::nodes::{Launch, Nodes};
use collab_tests::postgres::Postgres;
use reqwest::StatusCode;
use tokio::time::{Instant, sleep};

use crate::peer::Peer;

const BUDGET_MIB: u8 = 8;
/// Length of the text of a document, which takes a little more than twice as much memory.
const TEXT_BYTES: usize = 100 * 1024;
/// Many more than there is memory for.
const DOCUMENTS: u8 = 150;
const SOON: Duration = Duration::from_secs(40);

#[tokio::test(flavor = "multi_thread")]
async fn a_small_budget_serves_many_documents_one_after_the_other() -> Result<()> {
    let node = Embedded::start(&["--memory-budget-mib", &BUDGET_MIB.to_string()]).await?;
    for number in 0..DOCUMENTS {
        writes(&node.url(), &format!("document-{number}"), &text(number)).await?;
    }
    let unloaded = r#"collab_documents_unloaded_total{reason="memory"}"#;
    let memory = node.metric("collab_documents_memory_bytes").await?;
    println!(
        "{DOCUMENTS} documents: {} unloaded, {memory} bytes by the estimate, {} resident",
        node.metric(unloaded).await?,
        node.resident_bytes()?
    );
    // The last one has grown since it was opened.
    let budget = f64::from(u32::from(BUDGET_MIB) << 20);
    ensure!(memory < 1.1 * budget, "{memory} bytes");
    ensure!(
        f64::from(DOCUMENTS) / 2.0 < node.metric(unloaded).await?,
        "too few were unloaded"
    );
    for number in 0..DOCUMENTS {
        let mut reader = Peer::join(&node.url(), &format!("document-{number}")).await?;
        reader.until("a step 2", |reader| reader.synced).await?;
        ensure!(reader.text() == text(number), "document {number} changed");
    }
    ensure!(node.metric("collab_documents_refused_total").await? < 1.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn with_every_document_in_use_the_next_is_told_to_come_back() -> Result<()> {
    let node = Embedded::start(&["--memory-budget-mib", &BUDGET_MIB.to_string()]).await?;
    writes(&node.url(), "another", "kept").await?;
    let mut open = Vec::new();
    let refusal = loop {
        let number = open.len();
        match holds(&node.url(), &format!("held-{number}"), &text(number)).await {
            Ok(peer) => open.push(peer),
            Err(refusal) => break format!("{refusal:#}"),
        }
        ensure!(
            open.len() < usize::from(DOCUMENTS),
            "all are open at once\n{}",
            node.log()
        );
    };
    let fit = (usize::from(BUDGET_MIB) << 20) / TEXT_BYTES;
    println!("{} documents were open when one was refused", open.len());
    ensure!(
        (fit / 4..fit).contains(&open.len()),
        "{} were open",
        open.len()
    );
    ensure!(
        refusal.contains("Again") && refusal.contains("no memory left"),
        "{refusal}"
    );
    let url = format!("{}/api/v1/documents/another/text", node.url());
    let answer = reqwest::get(&url).await?;
    ensure!(answer.status() == StatusCode::SERVICE_UNAVAILABLE);
    ensure!(answer.headers().contains_key("retry-after"));
    ensure!(
        answer.text().await?.contains("no memory left"),
        "why is not said"
    );

    // Those who are in notice nothing.
    for peer in &mut open {
        peer.types("and more").await?;
        peer.until("a receipt", Peer::is_saved).await?;
    }
    open.truncate(1);
    let begun = Instant::now();
    loop {
        let answer = reqwest::get(&url).await?;
        if answer.status().is_success() {
            ensure!(answer.text().await? == "kept");
            break;
        }
        ensure!(begun.elapsed() < SOON, "there is room, and it is refused");
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// An edit that is not durable keeps its document in memory, though nobody has it open and memory is short.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_acknowledged_is_never_unloaded() -> Result<()> {
    let mut postgres = Postgres::start().await;
    let mut nodes = Nodes::new(Launch {
        environment: vec![("COLLAB_MEMORY_BUDGET_MIB".to_owned(), "1".to_owned())],
        ..Launch::local(&postgres.url(), "none")
    });
    nodes.add()?;
    nodes.balanced(1).await?;
    let url = nodes.nodes[0].url();
    let mut other = holds(&url, "other", "open").await?;
    let mut peer = holds(&url, "kept", "saved, ").await?;
    postgres.kill()?;
    peer.types("not acknowledged").await?;
    peer.listen(Duration::from_secs(1)).await?;
    ensure!(!peer.is_saved(), "acknowledged without a database");
    drop(peer);
    // Memory is short from here on, and who waits for some has nobody else unloaded.
    other.types(&"x".repeat(2 << 20)).await?;
    ensure!(holds(&url, "one more", "no").await.is_err());
    postgres.restart().await?;
    // A node that is cut off from everything has closed its sockets meanwhile.
    drop(other);
    let begun = Instant::now();
    loop {
        // Who joins sees what is committed by now.
        let text = read(&url, "kept").await;
        if matches!(&text, Ok(text) if text == "saved, not acknowledged") {
            return Ok(());
        }
        ensure!(begun.elapsed() < SOON, "{text:?}\n{}", nodes.logs());
    }
}

/// Different for each number.
fn text(number: impl std::fmt::Display) -> String {
    let mut text = format!("{number};").repeat(TEXT_BYTES);
    text.truncate(TEXT_BYTES);
    text
}

async fn writes(node: &str, document: &str, text: &str) -> Result<()> {
    holds(node, document, text).await.map(drop)
}

async fn read(node: &str, document: &str) -> Result<String> {
    let mut peer = Peer::join(node, document).await?;
    peer.until("a step 2", |peer| peer.synced).await?;
    Ok(peer.text())
}

/// Writes and stays. The error says how the socket was closed.
async fn holds(node: &str, document: &str, text: &str) -> Result<Peer> {
    let mut peer = Peer::join(node, document).await?;
    peer.until("a step 2", |peer| peer.synced).await?;
    peer.types(text).await?;
    peer.until("a receipt", Peer::is_saved).await?;
    Ok(peer)
}
