//! The editor page of a real node in a real browser.
//!
//! Needs `collab-node` built (or named by `COLLAB_NODE_BIN`), Debian's Chromium, Node, and the
//! packages of `tests/clients`. Pictures of what the windows showed go to `target/pictures`.

mod examples;

use anyhow::{Context, Result, anyhow, bail, ensure};
use collab_tests::clients::browser::{Browser, Look, Opening, Place, Theme, Window};
use collab_tests::clients::{Reading, read, reload};
use collab_tests::process::{Folder, command, free_port, spawn};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

#[tokio::test]
async fn two_windows_write_one_document_and_see_each_other() -> Result<()> {
    let node = Node::start().await?;
    let browser = Browser::start().await?;
    let (anna, ben) = (
        node.window(&browser, "Anna", "minutes").await?,
        node.window(&browser, "Ben", "minutes").await?,
    );

    both_write(&anna, &ben, "Anna was here. ", "Ben was here. ").await?;
    both_saved_and_equal(&anna, &ben).await?;

    let at_anna = until(&anna, |look| shows_cursor(look, "Ben")).await?;
    let at_ben = until(&ben, |look| shows_cursor(look, "Anna")).await?;
    for (look, other) in [(&at_anna, "Ben"), (&at_ben, "Anna")] {
        assert_eq!(look.people.len(), 2, "{look:?}");
        assert!(look.people.iter().any(|name| name == other), "{look:?}");
        let [cursor] = look.cursors.as_slice() else {
            panic!("one cursor expected: {look:?}")
        };
        assert!(10.0 < cursor.height, "{cursor:?}");
        // At first unknown, then nothing to save, then each edit: never saved before it was unsaved.
        assert_eq!(look.states[..3], ["saved", "unsaved", "saved"], "{look:?}");
        assert!(look.problems.is_empty(), "{look:?}");
        assert!(
            look.text.contains("Anna was here. ") && look.text.contains("Ben was here. "),
            "{look:?}"
        );
    }
    assert_ne!(
        at_anna.cursors[0].color, at_ben.cursors[0].color,
        "two people have one colour"
    );
    anna.picture(&picture("two-windows.png")?).await?;

    anna.fill("Your name", "Annabel").await?;
    ben.sees("listitem", "Annabel").await?;
    anna.write(Place::End, "Under another name. ").await?;
    both_saved_and_equal(&anna, &ben).await?;
    until(&ben, |look| shows_cursor(look, "Annabel")).await?;

    let (name, text) = anna.download("Download text").await?;
    assert_eq!(
        (name.as_str(), text.trim_end()),
        ("minutes.txt", anna.look().await?.text.trim_end())
    );
    Ok(())
}

#[tokio::test]
async fn what_the_light_called_saved_survives_a_kill() -> Result<()> {
    let mut node = Node::start().await?;
    let browser = Browser::start().await?;
    let (anna, ben) = (
        node.window(&browser, "Anna", "draft").await?,
        node.window(&browser, "Ben", "draft").await?,
    );

    let words = |who: &str| (0..60).map(|n| format!("{who}{n};")).collect::<Vec<_>>();
    let (of_anna, of_ben) = (words("a"), words("b"));
    // A busy machine may save nothing between two keys: some words are saved before the rest is typed without a rest.
    let (first_of_anna, rest_of_anna) = of_anna.split_at(20);
    let (first_of_ben, rest_of_ben) = of_ben.split_at(20);
    both_write(
        &anna,
        &ben,
        &first_of_anna.join(" "),
        &first_of_ben.join(" "),
    )
    .await?;
    both_saved_and_equal(&anna, &ben).await?;
    let (for_anna, for_ben) = (rest_of_anna.join(" "), rest_of_ben.join(" "));
    let (written, killed) = tokio::join!(both_write(&anna, &ben, &for_anna, &for_ben), async {
        anna.contains("a30;").await?;
        node.kill()
    });
    written.and(killed)?;
    for window in [&anna, &ben] {
        let look = window.look().await?;
        assert_eq!(look.light, "offline");
        assert!(0 < look.unsaved, "typing went on after the kill: {look:?}");
        assert!(
            window.asks_before_closing().await?,
            "unsaved edits would be closed silently"
        );
        assert!(
            40 <= look.saved_text.matches(';').count(),
            "what was saved before the kill was not noticed: {look:?}"
        );
    }
    anna.picture(&picture("not-connected.png")?).await?;

    // What is on disk alone, before the windows can bring anything back.
    let (at_anna, at_ben) = (anna.look().await?, ben.look().await?);
    let on_disk = node.text_of_a_copy("draft").await?;
    for (look, words) in [(&at_anna, &of_anna), (&at_ben, &of_ben)] {
        let saved = words.iter().filter(|word| look.saved_text.contains(*word));
        let lost: Vec<_> = saved.filter(|word| !on_disk.contains(*word)).collect();
        assert!(
            lost.is_empty(),
            "saved, and yet not on disk: {lost:?} in {on_disk}"
        );
    }

    node.restart().await?;
    both_saved_and_equal(&anna, &ben).await?;
    let patience = Duration::from_secs(5);
    tokio::time::timeout(patience, anna.sees("listitem", "Ben")).await??;
    tokio::time::timeout(patience, ben.sees("listitem", "Anna")).await??;
    let text = anna.look().await?.text;
    for word in of_anna.iter().chain(&of_ben) {
        assert_eq!(text.matches(word).count(), 1, "{word} in {text}");
    }
    assert!(!anna.asks_before_closing().await?);
    let (nodes, documents) = ([node.url()], ["draft".to_owned()]);
    let reading = Reading {
        nodes: &nodes,
        documents: &documents,
        token: None,
    };
    assert_eq!(
        read(&reading).await?["draft"].text.trim_end(),
        text.trim_end()
    );
    let reloaded = &reload(&reading).await?[0];
    assert_eq!(
        (reloaded.text.trim_end(), reloaded.exported.trim_end()),
        (text.trim_end(), text.trim_end())
    );
    Ok(())
}

#[tokio::test]
async fn documents_are_listed_created_and_deleted() -> Result<()> {
    let node = Node::start().await?;
    let browser = Browser::start().await?;
    let window = browser
        .open(Opening {
            name: "Anna",
            url: &node.url(),
            size: SIZE,
            theme: Theme::Light,
        })
        .await?;
    window.sees("heading", "Write together").await?;
    window.picture(&picture("welcome.png")?).await?;

    // A name that needs escaping wherever it goes: in the address, the socket's and the request's path.
    let name = "Ideen/Größe & 100% 漢字?";
    create(&window, name).await?;
    window.light("saved").await?;
    window.write(Place::End, "first words").await?;
    window.light("saved").await?;
    let look = window.look().await?;
    assert_eq!(look.documents, [name], "{look:?}");
    assert!(look.problems.is_empty(), "{look:?}");

    create(&window, name).await?;
    window.sees("alert", "exists already").await?;
    window.click("button", "Cancel").await?;

    let reader = node.window(&browser, "Ben", "another").await?;
    reader.click("button", "Refresh the list").await?;
    reader.sees("link", name).await?;
    assert_eq!(reader.look().await?.documents.len(), 2);

    window.click("button", "Delete").await?;
    window.sees("dialog", "Delete “Ideen").await?;
    window.press("Tab").await?;
    window.press("Enter").await?;
    window.sees("heading", "Write together").await?;
    window.click("button", "Refresh the list").await?;
    window.sees("link", "another").await?;
    assert_eq!(window.look().await?.documents, ["another"]);
    Ok(())
}

#[tokio::test]
async fn the_page_is_accessible_in_light_dark_and_small() -> Result<()> {
    let node = Node::start().await?;
    let browser = Browser::start().await?;
    let url = node.address_of("looks");
    for (name, size, theme) in [
        ("Light", SIZE, Theme::Light),
        ("Dark", SIZE, Theme::Dark),
        ("Small", (390, 800), Theme::Light),
    ] {
        let window = browser
            .open(Opening {
                name,
                url: &url,
                size,
                theme,
            })
            .await?;
        window.light("saved").await?;
        window.write(Place::End, "Some text. ").await?;
        window.light("saved").await?;
        window
            .picture(&picture(&format!("{}.png", name.to_lowercase()))?)
            .await?;
        assert_eq!(window.audit().await?, Vec::<String>::new(), "{name}");
        // Tab belongs to the text; Escape is the way out.
        window.press("Escape").await?;
        assert_eq!(window.look().await?.focus, "Heading 1");
        if size == SIZE {
            window.click("button", "New document").await?;
            assert_eq!(
                window.audit().await?,
                Vec::<String>::new(),
                "{name}, dialog"
            );
        }
        assert!(window.look().await?.problems.is_empty());
    }
    Ok(())
}

#[test]
fn the_committed_bundle_is_up_to_date() -> Result<()> {
    let web = Path::new(env!("CARGO_MANIFEST_DIR")).join("../node/web");
    ensure!(
        web.join("node_modules").is_dir(),
        "run `npm ci` in {}",
        web.display()
    );
    let check = std::process::Command::new("node")
        .arg("build.js")
        .arg("--check")
        .current_dir(web)
        .output()?;
    ensure!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stderr)
    );
    Ok(())
}

const SIZE: (u32, u32) = (1200, 800);

async fn create(window: &Window, name: &str) -> Result<()> {
    window.click("button", "New document").await?;
    window.fill("Name", name).await?;
    window.click("button", "Create").await
}

/// At once, Anna before a dividing line and Ben after it.
async fn both_write(anna: &Window, ben: &Window, of_anna: &str, of_ben: &str) -> Result<()> {
    anna.write(Place::Start, "\n~~~\n").await?;
    ben.contains("~~~").await?;
    let written = tokio::join!(
        anna.write(Place::Start, of_anna),
        ben.write(Place::End, of_ben)
    );
    written.0.and(written.1)
}

async fn both_saved_and_equal(anna: &Window, ben: &Window) -> Result<()> {
    let agree = async {
        loop {
            let (a, b) = (anna.look().await?, ben.look().await?);
            if a.light == "saved" && b.light == "saved" && a.text == b.text {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    match tokio::time::timeout(Duration::from_secs(20), agree).await {
        Ok(agreed) => agreed,
        Err(_) => bail!(
            "no agreement:\n{:?}\n{:?}",
            anna.look().await?,
            ben.look().await?
        ),
    }
}

async fn until(window: &Window, condition: impl Fn(&Look) -> bool) -> Result<Look> {
    for _ in 0..100 {
        let look = window.look().await?;
        if condition(&look) {
            return Ok(look);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("not seen: {:?}", window.look().await?);
}

fn shows_cursor(look: &Look, name: &str) -> bool {
    look.cursors.iter().any(|cursor| cursor.name == name)
}

fn picture(name: &str) -> Result<PathBuf> {
    // …/target/debug/deps/browser-…
    let target = std::env::current_exe()?
        .ancestors()
        .nth(3)
        .context("the test lies in target")?
        .to_owned();
    Ok(target.join("pictures").join(name))
}

/// A node in embedded mode with a folder of its own.
struct Node {
    port: u16,
    data: Folder,
    child: Child,
}

impl Node {
    async fn start() -> Result<Self> {
        Self::serve(free_port(), Folder::new("browser", "root")).await
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn address_of(&self, document: &str) -> String {
        format!("{}/?document={document}", self.url())
    }

    async fn window(&self, browser: &Browser, name: &str, document: &str) -> Result<Window> {
        let url = self.address_of(document);
        let window = browser
            .open(Opening {
                name,
                url: &url,
                size: SIZE,
                theme: Theme::Light,
            })
            .await?;
        window.light("saved").await?;
        Ok(window)
    }

    /// SIGKILL, in the middle of whatever it does.
    fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// The same folder and the same port again.
    async fn restart(&mut self) -> Result<()> {
        self.child = spawn(serve(self.port, &self.data)?);
        self.ready().await
    }

    /// A document as another node reads it from a copy of the folder.
    async fn text_of_a_copy(&self, document: &str) -> Result<String> {
        let copy = Folder::new("browser-copy", "root");
        for file in std::fs::read_dir(self.data.path())? {
            let file = file?;
            std::fs::copy(file.path(), copy.path().join(file.file_name()))?;
        }
        let other = Self::serve(free_port(), copy).await?;
        let (nodes, documents) = ([other.url()], [document.to_owned()]);
        let reloaded = reload(&Reading {
            nodes: &nodes,
            documents: &documents,
            token: None,
        })
        .await?;
        Ok(reloaded.into_iter().next().context("one document")?.text)
    }

    async fn serve(port: u16, data: Folder) -> Result<Self> {
        let child = spawn(serve(port, &data)?);
        let mut node = Self { port, data, child };
        node.ready().await?;
        Ok(node)
    }

    async fn ready(&mut self) -> Result<()> {
        // The client wants one even for plain HTTP; another test may have been first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let url = format!("{}/readyz", self.url());
        let answers = async {
            while !reqwest::get(&url)
                .await
                .is_ok_and(|answer| answer.status().is_success())
            {
                ensure!(self.child.try_wait()?.is_none(), "the node ended");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        };
        let ready = tokio::time::timeout(Duration::from_secs(20), answers).await;
        let ready = ready.unwrap_or_else(|_| Err(anyhow!("the node did not get ready")));
        ready.with_context(|| {
            std::fs::read_to_string(self.data.path().join("node.log")).unwrap_or_default()
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill().ok();
    }
}

fn serve(port: u16, data: &Folder) -> Result<std::process::Command> {
    let binary = match std::env::var_os("COLLAB_NODE_BIN") {
        Some(path) => PathBuf::from(path),
        // …/target/debug/deps/browser-…
        None => std::env::current_exe()?
            .ancestors()
            .nth(2)
            .context("the test lies in target")?
            .join("collab-node"),
    };
    ensure!(binary.is_file(), "{} is not built", binary.display());
    let log = File::options()
        .create(true)
        .append(true)
        .open(data.path().join("node.log"))?;
    let mut command = command(data, &binary);
    command
        .args(["--listen", &format!("127.0.0.1:{port}"), "--data"])
        .arg(data.path());
    command.stdout(log.try_clone()?).stderr(log);
    Ok(command)
}
