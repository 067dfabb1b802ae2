//! The pages of `docs/examples` against a real node: each editor is typed in, and seen in a second window.

use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use collab_tests::clients::pages::{Page, Pages};
use collab_tests::process::{free_port, spawn};

use super::Node;

/// Editors of one `Y.Text`: page, and where to type.
const OF_TEXT: [(&str, &str); 3] = [
    ("quill", ".ql-editor"),
    ("codemirror", ".cm-content"),
    ("monaco", ".monaco-editor .view-lines"),
];

#[tokio::test]
async fn editors_of_three_families_write_one_text() -> Result<()> {
    let world = World::start().await?;
    let mut pages = Vec::new();
    for (name, editor) in OF_TEXT {
        let page = world.open(name, name, "shared").await?;
        page.signs("saved").await?;
        pages.push((name, editor, page));
    }
    for (name, editor, page) in &pages {
        page.types(editor, &format!("by-{name}.")).await?;
        for (_, editor, page) in &pages {
            page.shows(editor, &format!("by-{name}.")).await?;
        }
    }
    for (name, _, page) in &pages {
        page.signs("saved").await?;
        let problems = page.problems().await?;
        ensure!(problems.is_empty(), "{name}: {problems:?}");
    }
    // A window of its own for each, from what the node has.
    for (name, editor, page) in &pages {
        page.reloads().await?;
        for (other, ..) in OF_TEXT {
            page.shows(editor, &format!("by-{other}."))
                .await
                .with_context(|| format!("in {name}"))?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn quill_shows_what_it_has_before_it_is_connected() -> Result<()> {
    let mut world = World::start().await?;
    let page = world.open("quill", "quill", "offline").await?;
    page.signs("saved").await?;
    page.types(".ql-editor", "kept here").await?;
    page.signs("saved").await?;
    world.node.kill()?;
    page.signs("offline").await?;
    page.types(".ql-editor", " and alone").await?;
    page.reloads().await?;
    page.shows(".ql-editor", "kept here and alone").await?;
    world.node.restart().await?;
    page.signs("saved").await?;
    let other = world.open("other", "codemirror", "offline").await?;
    other.shows(".cm-content", "kept here and alone").await
}

#[tokio::test]
async fn tiptap_has_two_documents_on_a_socket() -> Result<()> {
    let world = World::start().await?;
    let one = world.open("one", "tiptap", "report").await?;
    let two = world.open("two", "tiptap", "report").await?;
    for page in [&one, &two] {
        page.signs("saved").await?;
    }
    one.types("[aria-label=Title]", "Minutes").await?;
    one.types(".ProseMirror", "First point").await?;
    one.presses("Enter").await?;
    two.shows("[aria-label=Title]", "Minutes").await?;
    two.shows(".ProseMirror", "First point").await?;
    two.types(".ProseMirror", "second point").await?;
    one.shows(".ProseMirror", "second point").await?;
    ended_well(&[one, two]).await
}

#[tokio::test]
async fn shared_types_need_no_editor() -> Result<()> {
    let world = World::start().await?;
    let one = world.open("one", "types", "tasks").await?;
    let two = world.open("two", "types", "tasks").await?;
    for page in [&one, &two] {
        page.signs("saved").await?;
    }
    one.types("[name=task]", "write it down").await?;
    one.presses("Enter").await?;
    two.shows("#editor ul", "write it down").await?;
    two.shows("#editor pre", "<task>write it down</task>")
        .await?;
    ended_well(&[one, two]).await
}

async fn ended_well(pages: &[Page]) -> Result<()> {
    for page in pages {
        page.signs("saved").await?;
        let problems = page.problems().await?;
        ensure!(problems.is_empty(), "{problems:?}");
    }
    Ok(())
}

/// A node, the examples' own server, and a browser.
struct World {
    node: Node,
    server: Child,
    port: u16,
    pages: Pages,
}

impl World {
    async fn start() -> Result<Self> {
        let node = Node::start().await?;
        let port = free_port();
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/examples");
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig=KILL", "node", "server.mjs"])
            .args(["--node", &node.url(), "--port", &port.to_string()])
            .current_dir(folder);
        let server = spawn(command);
        let world = Self {
            node,
            server,
            port,
            pages: Pages::start().await?,
        };
        let ready = async {
            while reqwest::get(world.url("types", "")).await.is_err() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let ready = tokio::time::timeout(Duration::from_mins(1), ready).await;
        ready.context("the examples' server does not answer; run `npm ci` in docs/examples")?;
        Ok(world)
    }

    async fn open(&self, name: &str, example: &str, document: &str) -> Result<Page> {
        self.pages.open(name, &self.url(example, document)).await
    }

    fn url(&self, example: &str, document: &str) -> String {
        format!(
            "http://127.0.0.1:{}/{example}?document={document}",
            self.port
        )
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.server.kill().ok();
        self.server.wait().ok();
    }
}
