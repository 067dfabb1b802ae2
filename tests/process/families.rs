//! The conformance matrix: stock clients of every family on one cluster, in one document at once.
//!
//! A row is something that clients do, a column a family. Each cell is tried with real clients against real
//! nodes and a real Postgres, with authentication on.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use collab_tests::clients::families::{Client, Families, Family, Look, Opening};
use collab_tests::nodes::{Launch, Nodes};
use collab_tests::postgres::Postgres;
use futures::future::join_all;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::json;
use sqlx::{Connection, PgConnection};
use tokio::time::{Instant, sleep};

const SECRET: &str = "the secret of the conformance matrix";
/// Number of the node that is left in the end.
const STAYS: usize = 0;
/// How long a token is taken after its `exp`: clocks may differ by so much.
const LEEWAY: Duration = Duration::from_secs(30);
/// For what takes milliseconds on a machine that has nothing else to do.
const SOON: Duration = Duration::from_secs(20);
/// How long a commit is held up: longer than y-sweet's client bears silence.
const HELD_UP: Duration = Duration::from_secs(4);
/// Stock clients close a socket that is silent for 30 s.
const QUIET: Duration = Duration::from_secs(33);

#[tokio::test(flavor = "multi_thread")]
async fn every_family_does_everything() -> Result<()> {
    let postgres = Postgres::shared().await;
    let database = postgres.database().await;
    let mut nodes = Nodes::new(Launch {
        environment: vec![("COLLAB_AUTH_SECRET".to_owned(), SECRET.to_owned())],
        ..Launch::local(&database, "none")
    });
    for _ in 0..3 {
        nodes.add()?;
    }
    nodes.balanced(3).await?;
    let world = World {
        families: Families::start().await?,
        urls: nodes.urls(),
        database,
    };
    let mut matrix = Matrix::default();

    let quiet = world.opens_quiet_clients().await?;
    let quiet_since = Instant::now();
    for (family, result) in world.all_save().await? {
        matrix.note("saved only after the commit", family, result);
    }
    let cells = join_all(Family::ALL.map(|family| world.cells_of(family))).await;
    for (row, family, result) in cells.into_iter().flatten() {
        matrix.note(row, family, result);
    }
    let sessions = world.holds_a_document_twice().await;
    matrix.note(
        "a document twice on a socket",
        Family::Hocuspocus4,
        sessions,
    );
    let rest = world.speaks_y_sweets_rest().await;
    matrix.note("REST of its SDK", Family::YSweet, rest);
    for (family, result) in world.all_write_together().await? {
        matrix.note("all in one document at once", family, result);
    }
    for (family, result) in world.document_is_deleted().await? {
        matrix.note("told of a deletion, socket kept", family, result);
    }
    for (family, result) in world.owners_change(&mut nodes).await? {
        matrix.note("its owner is stopped, then killed", family, result);
    }
    sleep(QUIET.saturating_sub(quiet_since.elapsed())).await;
    for (family, result) in stayed(quiet).await {
        matrix.note("quiet for half a minute", family, result);
    }

    println!("{matrix}");
    ensure!(
        matrix.failures().is_empty(),
        "{}\n{}",
        matrix.failures(),
        nodes.logs()
    );
    Ok(())
}

struct World {
    families: Families,
    urls: Vec<String>,
    database: String,
}

impl World {
    /// What a client does with one other, or alone.
    async fn cells_of(&self, family: Family) -> Vec<(&'static str, Family, Result<()>)> {
        let mut cells = vec![
            ("sync and presence", family, self.syncs(family).await),
            (
                "saved after it was offline",
                family,
                self.comes_back(family).await,
            ),
            ("read-only", family, self.only_reads(family).await),
            (
                "refused without a token",
                family,
                self.is_refused(family).await,
            ),
        ];
        // y-indexeddb is for Yjs 13.
        if family != Family::YWebsocket4 {
            cells.push((
                "y-indexeddb beside it",
                family,
                self.remembers(family).await,
            ));
        }
        if family.is_hocuspocus() {
            cells.extend([
                (
                    "many documents on a socket",
                    family,
                    self.multiplexes(family).await,
                ),
                (
                    "access ends with its token",
                    family,
                    self.ends_with_its_token(family).await,
                ),
                (
                    "another token on a socket",
                    family,
                    self.renews(family).await,
                ),
                ("stateless messages", family, self.signals(family).await),
            ]);
        }
        cells
    }

    /// Content is there, edits and presence go both ways between it and y-websocket.
    async fn syncs(&self, family: Family) -> Result<()> {
        let document = named(family, "sync");
        let other = self.opens(Family::YWebsocket3, "other", &document).await?;
        other.types("before;").await?;
        until_saved(&other).await?;
        let client = self.opens(family, "client", &document).await?;
        until(&client, "the content is there", |look| {
            look.synced && look.text == "before;"
        })
        .await?;
        // Nothing of its own waits.
        until_saved(&client).await?;
        client.types("after;").await?;
        other.types("both;").await?;
        let complete = |look: &Look| {
            ["before;", "after;", "both;"]
                .iter()
                .all(|part| look.text.contains(part))
        };
        until(&client, "edits come", complete).await?;
        until(&other, "edits go", complete).await?;
        client.deletes(7).await?;
        until(&other, "deletions go", |look| {
            !look.text.contains("before;")
        })
        .await?;
        let both = |look: &Look| look.people.len() == 2;
        until(&client, "it sees the other", both).await?;
        until(&other, "it is seen", both).await?;
        until_saved(&client).await?;
        client.close().await?;
        until(&other, "its presence ends", |look| look.people.len() == 1).await?;
        other.close().await
    }

    /// The sign turns to saved only after the commit, while others see the edit at once.
    async fn all_save(&self) -> Result<Vec<(Family, Result<()>)>> {
        let mut pairs = Vec::new();
        for family in Family::ALL {
            let document = named(family, "save");
            let other = self.opens(Family::YWebsocket3, "other", &document).await?;
            let client = self.opens(family, "client", &document).await?;
            client.types("first;").await?;
            until_saved(&client).await?;
            pairs.push((family, client, other));
        }
        let mut connection = PgConnection::connect(&self.database).await?;
        let mut held = connection.begin().await?;
        sqlx::query("lock table update_log in share row exclusive mode")
            .execute(&mut *held)
            .await?;
        let until = Instant::now() + HELD_UP;
        let waited = pairs
            .iter()
            .map(|(_, client, other)| waits(client, other, until));
        let waited = join_all(waited).await;
        held.rollback().await?;
        let mut results = Vec::new();
        for ((family, client, other), before) in pairs.into_iter().zip(waited) {
            let saved = async {
                let before = before?;
                until_saved(&client).await?;
                for text in ["third;", "fourth;"] {
                    client.types(text).await?;
                }
                let look = until_saved(&client).await?;
                ensure!(
                    look.closes == before.closes,
                    "the socket was closed: {look:?}"
                );
                close_all([client, other]).await
            };
            results.push((family, saved.await));
        }
        Ok(results)
    }

    /// What it wrote without a socket is saved when it has one again, and only then called so.
    async fn comes_back(&self, family: Family) -> Result<()> {
        let document = named(family, "cut");
        let client = self.opens(family, "client", &document).await?;
        client.types("online;").await?;
        let before = until_saved(&client).await?;
        client.is_cut().await?;
        client.types("offline;").await?;
        let look = until_saved(&client).await?;
        ensure!(look.closes.len() > before.closes.len(), "{look:?}");
        let other = self.opens(Family::YWebsocket3, "other", &document).await?;
        until(&other, "all of it is there", |look| {
            look.text == "online;offline;"
        })
        .await?;
        close_all([client, other]).await
    }

    /// A reader sees and is seen; what it writes goes nowhere and is never called saved.
    async fn only_reads(&self, family: Family) -> Result<()> {
        let document = named(family, "read");
        let writer = self.opens(Family::YWebsocket3, "writer", &document).await?;
        until(&writer, "it is in sync", |look| look.synced).await?;
        writer.types("by the writer;").await?;
        writer.deletes(3).await?;
        until_saved(&writer).await?;
        let token = reader_of(family, &document)?;
        let opening = Opening {
            token: Some(&token),
            ..self.opening(family, "reader", &document)
        };
        let reader = self.families.open(&opening).await?;
        let reads = |look: &Look| look.synced && look.text == "the writer;";
        until(&reader, "it reads", reads).await?;
        until(&writer, "it is seen", |look| look.people.len() == 2).await?;
        if family.is_hocuspocus() {
            let look = until(&reader, "nothing of its own waits", |look| look.saved).await?;
            ensure!(look.scopes == ["readonly"], "{look:?}");
        }
        if family == Family::YSweet {
            until(&reader, "nothing of its own waits", |look| look.saved).await?;
        }
        reader.types("by the reader;").await?;
        writer.types(" and more").await?;
        until(&reader, "it goes on reading", |look| {
            look.text.contains(" and more")
        })
        .await?;
        sleep(Duration::from_secs(1)).await;
        let (at_reader, at_writer) = (reader.look().await?, writer.look().await?);
        ensure!(at_writer.text == "the writer; and more", "{at_writer:?}");
        ensure!(!at_reader.saved, "{at_reader:?}");
        ensure!(at_reader.closes.is_empty(), "{at_reader:?}");
        close_all([reader, writer]).await
    }

    /// Without a valid token nothing of the document is told, in the family's own way.
    async fn is_refused(&self, family: Family) -> Result<()> {
        let document = named(family, "refuse");
        let writer = self.opens(Family::YWebsocket3, "writer", &document).await?;
        writer.types("secret").await?;
        until_saved(&writer).await?;
        let foreign = token(&json!({"sub": "eve", "documents": ["another"]}))?;
        let mut refused = Vec::new();
        for (name, token) in [
            ("nobody", None),
            ("forger", Some("x.y.z")),
            ("stranger", Some(foreign.as_str())),
        ] {
            let opening = Opening {
                token,
                ..self.opening(family, name, &document)
            };
            refused.push(self.families.open(&opening).await?);
        }
        for client in &refused {
            match family {
                Family::YWebsocket3 | Family::YWebsocket4 => {
                    until(client, "its socket is refused", |look| {
                        !look.closes.is_empty()
                    })
                    .await?;
                }
                Family::Hocuspocus3 | Family::Hocuspocus4 | Family::YSweet => {
                    until(client, "it hears why", |look| !look.denied.is_empty()).await?;
                }
            }
            let look = client.look().await?;
            ensure!(!look.synced && look.text.is_empty(), "{look:?}");
            if family.is_hocuspocus() {
                ensure!(look.closes.is_empty(), "its socket was closed: {look:?}");
            }
        }
        close_all(refused.into_iter().chain([writer])).await
    }

    /// A client with a store of its own shows what it had before it connects, and brings what it wrote alone.
    async fn remembers(&self, family: Family) -> Result<()> {
        let document = named(family, "store");
        let opening = Opening {
            stored: Some(&document),
            ..self.opening(family, "first visit", &document)
        };
        let token = writer_of(family, &document)?;
        let opening = Opening {
            token: Some(&token),
            ..opening
        };
        let client = self.families.open(&opening).await?;
        client.types("first;").await?;
        until_saved(&client).await?;
        client.close().await?;
        let nowhere = Opening {
            name: format!("offline of {document}"),
            node: "http://127.0.0.1:1",
            ..opening.clone()
        };
        let client = self.families.open(&nowhere).await?;
        let look = client.look().await?;
        ensure!(look.text == "first;" && !look.synced, "{look:?}");
        client.types("alone;").await?;
        client.close().await?;
        let client = self
            .families
            .open(&Opening {
                name: format!("second visit of {document}"),
                ..opening
            })
            .await?;
        ensure!(client.look().await?.text == "first;alone;");
        until(&client, "it is in sync", |look| look.synced).await?;
        until_saved(&client).await?;
        let other = self.opens(Family::YWebsocket3, "other", &document).await?;
        until(&other, "all of it is there", |look| {
            look.text == "first;alone;"
        })
        .await?;
        close_all([client, other]).await
    }

    async fn multiplexes(&self, family: Family) -> Result<()> {
        let names: Vec<_> = (0..20)
            .map(|n| format!("{}/{n}", named(family, "many")))
            .collect();
        let mut clients = Vec::new();
        for (n, document) in names.iter().enumerate() {
            let token = token(&json!({"sub": "ada", "documents": [document]}))?;
            let client = format!("client {n}");
            let opening = Opening {
                socket: Some("shared"),
                token: Some(&token),
                ..self.opening(family, &client, document)
            };
            clients.push(self.families.open(&opening).await?);
        }
        for (client, document) in clients.iter().zip(&names) {
            client.types(document).await?;
        }
        for (client, document) in clients.iter().zip(&names) {
            let look = until_saved(client).await?;
            ensure!(
                look.text == *document && look.scopes == ["read-write"],
                "{look:?}"
            );
        }
        // One of them is denied another document, and one leaves: the rest goes on.
        let elsewhere = named(family, "elsewhere");
        let stranger = Opening {
            socket: Some("shared"),
            token: Some("x.y.z"),
            ..self.opening(family, "stranger", &elsewhere)
        };
        let stranger = self.families.open(&stranger).await?;
        until(&stranger, "it is denied", |look| !look.denied.is_empty()).await?;
        clients.remove(0).close().await?;
        let other = self.opens(Family::YWebsocket3, "other", &names[1]).await?;
        other.types("!").await?;
        let look = until(&clients[0], "edits come", |look| look.text.contains('!')).await?;
        ensure!(look.closes.is_empty(), "{look:?}");
        close_all(clients.into_iter().chain([stranger, other])).await
    }

    /// A token that is refused may be followed by a better one, and a reader may become a writer.
    async fn renews(&self, family: Family) -> Result<()> {
        let document = named(family, "renew");
        let opening = Opening {
            token: Some("x.y.z"),
            ..self.opening(family, "client", &document)
        };
        let client = self.families.open(&opening).await?;
        until(&client, "it is denied", |look| !look.denied.is_empty()).await?;
        client.types("before;").await?;
        let claims = json!({"sub": "ada", "documents": [document], "scope": "read"});
        client.renews(&token(&claims)?).await?;
        until(&client, "it reads", |look| {
            look.scopes == ["readonly"] && look.synced
        })
        .await?;
        client.types("while it reads;").await?;
        let other = self.opens(Family::YWebsocket3, "other", &document).await?;
        until(&other, "it is in sync", |look| look.synced).await?;
        sleep(Duration::from_millis(500)).await;
        ensure!(other.look().await?.text.is_empty(), "a reader wrote");
        ensure!(!client.look().await?.saved);
        client.renews(&writer_of(family, &document)?).await?;
        let all = |look: &Look| look.text == "before;while it reads;";
        until(&other, "what it wrote comes", all).await?;
        let look = until_saved(&client).await?;
        ensure!(
            look.scopes == ["readonly", "read-write"] && look.closes.is_empty(),
            "{look:?}"
        );

        client.forces_sync().await?;
        client.types("forced;").await?;
        until_saved(&client).await?;

        // A token that ends soon: the server asks for another one, and takes access away from who has none.
        let soon = token(&json!({"sub": "ada", "documents": [document], "exp": now() - 25.0}))?;
        client.renews(&soon).await?;
        until(&client, "access ends", |look| look.denied.len() > 1).await?;
        client.types("after the end;").await?;
        client.renews(&writer_of(family, &document)?).await?;
        until(&other, "access is back", |look| {
            look.text.ends_with("after the end;")
        })
        .await?;
        close_all([client, other]).await
    }

    /// Of two documents on a socket one is lost at the moment at which its token ends; the server asked before, and who had
    /// an answer goes on.
    async fn ends_with_its_token(&self, family: Family) -> Result<()> {
        let [ends, renewed] = ["ends", "renewed"].map(|name| named(family, name));
        let ending = |document: &str, left: f64| {
            let exp = now() - LEEWAY.as_secs_f64() + left;
            token(&json!({"sub": "ada", "documents": [document], "exp": exp}))
        };
        let left = Duration::from_secs(4);
        let begun = Instant::now();
        let mut clients = Vec::new();
        let next = writer_of(family, &renewed)?;
        for (document, next_token) in [(&ends, None), (&renewed, Some(next.as_str()))] {
            let token = ending(document, left.as_secs_f64())?;
            let opening = Opening {
                node: &self.urls[STAYS],
                token: Some(&token),
                next_token,
                socket: Some("with tokens that end"),
                ..self.opening(family, "client", document)
            };
            clients.push(self.families.open(&opening).await?);
        }
        let [one, other] = clients.as_slice() else {
            unreachable!()
        };
        for client in [one, other] {
            client.types("before;").await?;
            until_saved(client).await?;
        }
        let look = until(one, "access ends", |look| !look.denied.is_empty()).await?;
        let after = begun.elapsed();
        ensure!(
            look.denied == ["the token has expired"],
            "denied for another reason: {look:?}"
        );
        // The token was made of whole seconds; and some for a machine that is busy, far from the half minute of leeway.
        ensure!(
            left <= after + Duration::from_secs(1) && after <= left + Duration::from_secs(6),
            "access ended after {after:?}, its token after {left:?}"
        );
        // What others write meanwhile it gets with the next token.
        let third = self.opens(family, "third", &ends).await?;
        third.types("meanwhile;").await?;
        until_saved(&third).await?;
        one.types("after the end;").await?;
        other.types("after the end of the other;").await?;
        let look = until_saved(other).await?;
        ensure!(look.denied.is_empty() && look.closes.is_empty(), "{look:?}");
        ensure!(!one.look().await?.saved, "taken without a token");
        one.renews(&writer_of(family, &ends)?).await?;
        until_saved(one).await?;
        until(one, "it has all", |look| {
            look.text.contains("meanwhile;") && look.text.contains("after the end;")
        })
        .await?;
        clients.push(third);
        close_all(clients).await
    }

    async fn signals(&self, family: Family) -> Result<()> {
        let document = named(family, "signal");
        let mut clients = Vec::new();
        for (name, family) in [
            ("sender", family),
            ("three", Family::Hocuspocus3),
            ("four", Family::Hocuspocus4),
        ] {
            clients.push(self.opens(family, name, &document).await?);
        }
        let token = reader_of(family, &document)?;
        let opening = Opening {
            token: Some(&token),
            ..self.opening(family, "reader", &document)
        };
        clients.push(self.families.open(&opening).await?);
        for client in &clients {
            until(client, "it is in sync", |look| look.synced).await?;
        }
        for n in 0..3 {
            clients[0].says(&format!("ring {n}")).await?;
        }
        // Who may only read has nothing to say.
        clients[3].says("me too").await?;
        for client in &clients[1..] {
            until(client, "it hears", |look| {
                look.stateless == ["ring 0", "ring 1", "ring 2"]
            })
            .await?;
        }
        sleep(Duration::from_millis(300)).await;
        ensure!(
            clients[0].look().await?.stateless.is_empty(),
            "it heard itself, or a reader"
        );
        close_all(clients).await
    }

    async fn holds_a_document_twice(&self) -> Result<()> {
        let family = Family::Hocuspocus4;
        let document = named(family, "twice");
        let mut clients = Vec::new();
        for name in ["one", "two"] {
            let token = writer_of(family, &document)?;
            let opening = Opening {
                socket: Some("twice"),
                sessions: true,
                token: Some(&token),
                ..self.opening(family, name, &document)
            };
            clients.push(self.families.open(&opening).await?);
        }
        clients[0].types("one;").await?;
        until(&clients[1], "it comes", |look| look.text == "one;").await?;
        clients[1].types("two;").await?;
        let look = until(&clients[0], "it comes", |look| look.text == "one;two;").await?;
        ensure!(look.people.len() == 2, "{look:?}");
        for client in &clients {
            until_saved(client).await?;
        }
        let two = clients.remove(1);
        clients.remove(0).close().await?;
        until(&two, "only one left", |look| look.people.len() == 1).await?;
        two.types("still here").await?;
        until_saved(&two).await?;
        two.close().await
    }

    async fn speaks_y_sweets_rest(&self) -> Result<()> {
        let server = token(&json!({"sub": "app", "scope": "server"}))?;
        let (node, other_node) = (&self.urls[0], &self.urls[1]);
        let sdk =
            |call: &'static str, details| self.families.sdk(node, Some(&server), call, details);
        ensure!(sdk("checkStore", json!({})).await? == json!({"ok": true}));
        ensure!(sdk("createDoc", json!({"document": "rest"})).await? == json!({"docId": "rest"}));
        // A second time is no error.
        sdk("createDoc", json!({"document": "rest"})).await?;
        sdk(
            "updateDoc",
            json!({"document": "rest", "update": "by REST"}),
        )
        .await?;
        let text = self
            .families
            .sdk(
                other_node,
                Some(&server),
                "getDocAsUpdate",
                json!({"document": "rest"}),
            )
            .await?;
        ensure!(text == json!("by REST"), "{text}");
        let made = sdk("createDocWithContent", json!({"update": "content"})).await?;
        let document = made["docId"].as_str().context("an id")?;
        let client = self.opens(Family::Hocuspocus4, "client", document).await?;
        until(&client, "the content is there", |look| {
            look.text == "content"
        })
        .await?;
        client.close().await?;

        let reader = json!({"document": "rest", "options": {"authorization": "read-only", "userId": "ada", "validForSeconds": 60}});
        let given = sdk("getClientToken", reader).await?;
        ensure!(
            given["authorization"] == "read-only" && given["docId"] == "rest",
            "{given}"
        );
        let host = node.trim_start_matches("http://");
        ensure!(given["url"] == format!("ws://{host}/d/rest/ws"), "{given}");
        ensure!(
            given["baseUrl"] == format!("http://{host}/d/rest"),
            "{given}"
        );
        for (call, details) in [
            ("getClientToken", json!({"document": "unknown"})),
            ("createDoc", json!({"document": "not/allowed"})),
        ] {
            let refused = sdk(call, details).await;
            ensure!(refused.is_err(), "{call}: {refused:?}");
        }
        let writer = token(&json!({"sub": "ada"}))?;
        let refused = self
            .families
            .sdk(
                node,
                Some(&writer),
                "getClientToken",
                json!({"document": "rest"}),
            )
            .await;
        ensure!(
            refused.is_err(),
            "a user's token signs for others: {refused:?}"
        );
        Ok(())
    }

    /// One client of each family at each node, all in one document.
    async fn all_write_together(&self) -> Result<Vec<(Family, Result<()>)>> {
        let clients = self.opens_all("together").await?;
        for (n, (_, client)) in clients.iter().enumerate() {
            for edit in 0..5 {
                client.types(&format!("<{n}.{edit}>")).await?;
            }
        }
        let mut results = Vec::new();
        for (family, client) in &clients {
            results.push((*family, until_complete(client, clients.len(), 5).await));
        }
        let mut texts = Vec::new();
        for (_, client) in &clients {
            texts.push(client.look().await?.text);
        }
        ensure!(
            texts.windows(2).all(|pair| pair[0] == pair[1]),
            "they differ: {texts:?}"
        );
        close_all(clients.into_iter().map(|(_, client)| client)).await?;
        Ok(results)
    }

    async fn document_is_deleted(&self) -> Result<Vec<(Family, Result<()>)>> {
        let clients = self.opens_all("deleted").await?;
        for (_, client) in &clients {
            client.types("gone soon;").await?;
        }
        for (_, client) in &clients {
            until_saved(client).await?;
        }
        let token = token(&json!({"sub": "admin"}))?;
        let url = format!("{}/api/v1/documents/deleted", self.urls[1]);
        let deleted = reqwest::Client::new()
            .delete(url)
            .bearer_auth(&token)
            .send()
            .await?;
        ensure!(deleted.status() == 204, "{deleted:?}");
        let mut results = Vec::new();
        for (family, client) in &clients {
            results.push((*family, self.is_told_of_its_end(*family, client).await));
        }
        // Another life begins empty, whoever still has the old one open.
        let url = format!("{}/api/v1/documents", self.urls[0]);
        let created = reqwest::Client::new()
            .post(url)
            .bearer_auth(&token)
            .json(&json!({"id": "deleted"}))
            .send()
            .await?;
        ensure!(created.status() == 201, "{created:?}");
        let newcomer = self
            .opens(Family::YWebsocket3, "newcomer", "deleted")
            .await?;
        until(&newcomer, "it is in sync", |look| look.synced).await?;
        newcomer.types("new;").await?;
        sleep(Duration::from_secs(3)).await;
        let look = newcomer.look().await?;
        ensure!(look.text == "new;" && look.people.len() == 1, "{look:?}");
        for ((family, client), (_, result)) in clients.iter().zip(&mut results) {
            let look = client.look().await?;
            if result.is_ok() && (look.text.contains("new;") || look.saved) {
                *result = Err(anyhow::anyhow!("{}: it lives on: {look:?}", family.name()));
            }
        }
        newcomer.close().await?;
        close_all(clients.into_iter().map(|(_, client)| client)).await?;
        Ok(results)
    }

    async fn is_told_of_its_end(&self, family: Family, client: &Client) -> Result<()> {
        if family != Family::YSweet {
            until(client, "it is told", |look| !look.denied.is_empty()).await?;
        }
        client.types("too late").await?;
        // Longer than a client that thinks its socket dead would keep it.
        sleep(Duration::from_secs(4)).await;
        let look = client.look().await?;
        ensure!(!look.saved && look.closes.is_empty(), "{look:?}");
        Ok(())
    }

    /// Sockets at a node that stays hear nothing of it; what was written meanwhile is saved, and called so.
    async fn owners_change(&self, nodes: &mut Nodes) -> Result<Vec<(Family, Result<()>)>> {
        let documents: Vec<_> = (0..12).map(|n| format!("moving-{n}")).collect();
        let mut clients = Vec::new();
        for (n, document) in documents.iter().enumerate() {
            for family in [Family::ALL[n % 5], Family::ALL[(n + 1) % 5]] {
                let name = format!("mover {n} {}", family.name());
                let token = writer_of(family, document)?;
                let opening = Opening {
                    node: &self.urls[STAYS],
                    token: Some(&token),
                    ..self.opening(family, &name, document)
                };
                clients.push((family, self.families.open(&opening).await?));
            }
        }
        for (_, client) in &clients {
            client.types("<start>").await?;
            until_saved(client).await?;
        }
        let typing = async {
            for edit in 0..40 {
                for (_, client) in &clients {
                    client.types(&format!("<{edit}>")).await?;
                }
                sleep(Duration::from_millis(100)).await;
            }
            anyhow::Ok(())
        };
        let faults = async {
            sleep(Duration::from_millis(500)).await;
            nodes.stop(1).await?;
            sleep(Duration::from_millis(500)).await;
            nodes.kill(2)
        };
        let (typed, failed) = tokio::join!(typing, faults);
        typed.and(failed)?;
        nodes.balanced(1).await?;
        let mut results: BTreeMap<usize, (Family, Result<()>)> = BTreeMap::new();
        for pair in clients.chunks(2) {
            let agreed = agree(&pair[0].1, &pair[1].1).await;
            for (family, client) in pair {
                let agreed = agreed
                    .as_ref()
                    .copied()
                    .map_err(|error| anyhow::anyhow!("{error:#}"));
                let kept = until_saved(client).await.and_then(|look| {
                    ensure!(look.closes.is_empty(), "its socket was closed: {look:?}");
                    Ok(())
                });
                let column = Family::ALL
                    .iter()
                    .position(|other| other == family)
                    .unwrap_or_default();
                let so_far = results.entry(column).or_insert((*family, Ok(())));
                if so_far.1.is_ok() {
                    so_far.1 = agreed.and(kept);
                }
            }
        }
        Ok(results.into_values().collect())
    }

    /// Clients without presence: nothing of their own keeps their sockets alive.
    async fn opens_quiet_clients(&self) -> Result<Vec<(Family, Client)>> {
        let mut clients = Vec::new();
        for family in Family::ALL {
            let document = named(family, "quiet");
            let name = format!("quiet {}", family.name());
            let token = writer_of(family, &document)?;
            let opening = Opening {
                node: &self.urls[STAYS],
                presence: false,
                token: Some(&token),
                ..self.opening(family, &name, &document)
            };
            clients.push((family, self.families.open(&opening).await?));
        }
        Ok(clients)
    }

    async fn opens_all(&self, document: &str) -> Result<Vec<(Family, Client)>> {
        let mut clients = Vec::new();
        for (n, family) in Family::ALL.into_iter().enumerate() {
            let name = format!("{} in {document}", family.name());
            let token = writer_of(family, document)?;
            let opening = Opening {
                node: &self.urls[n % self.urls.len()],
                token: Some(&token),
                ..self.opening(family, &name, document)
            };
            let client = self.families.open(&opening).await?;
            until(&client, "it is in sync", |look| look.synced).await?;
            clients.push((family, client));
        }
        Ok(clients)
    }

    async fn opens(&self, family: Family, name: &str, document: &str) -> Result<Client> {
        let token = writer_of(family, document)?;
        let opening = Opening {
            token: Some(&token),
            ..self.opening(family, name, document)
        };
        self.families.open(&opening).await
    }

    fn opening<'a>(&'a self, family: Family, name: &'a str, document: &'a str) -> Opening<'a> {
        // Of two clients of a test, usually not at the same node.
        let node = &self.urls[name.len() % self.urls.len()];
        Opening {
            name: format!("{name} of {document}"),
            family,
            node,
            document,
            token: None,
            next_token: None,
            presence: true,
            socket: None,
            sessions: false,
            stored: None,
        }
    }
}

/// Writes while nothing can be committed. Answers what it knew before.
async fn waits(client: &Client, other: &Client, end: Instant) -> Result<Look> {
    let before = client.look().await?;
    client.types("second;").await?;
    until(other, "others see the edit", |look| {
        look.text.contains("second;")
    })
    .await?;
    while Instant::now() < end {
        let look = client.look().await?;
        ensure!(
            !look.saved && look.turns == before.turns,
            "saved before the commit: {look:?}"
        );
        ensure!(
            look.closes == before.closes,
            "the socket was closed: {look:?}"
        );
        sleep(Duration::from_millis(50)).await;
    }
    Ok(before)
}

async fn stayed(clients: Vec<(Family, Client)>) -> Vec<(Family, Result<()>)> {
    let mut results = Vec::new();
    for (family, client) in clients {
        let stayed = async {
            let look = client.look().await?;
            ensure!(look.synced && look.closes.is_empty(), "{look:?}");
            client.close().await
        };
        results.push((family, stayed.await));
    }
    results
}

async fn until(client: &Client, what: &str, wanted: impl Fn(&Look) -> bool) -> Result<Look> {
    client.until(what, SOON, wanted).await
}

async fn until_saved(client: &Client) -> Result<Look> {
    until(client, "all is saved", |look| look.synced && look.saved).await
}

async fn until_complete(client: &Client, writers: usize, edits: usize) -> Result<()> {
    let tokens: Vec<_> = (0..writers)
        .flat_map(|n| (0..edits).map(move |edit| format!("<{n}.{edit}>")))
        .collect();
    let complete = |look: &Look| {
        tokens
            .iter()
            .all(|token| look.text.matches(token.as_str()).count() == 1)
    };
    let look = until(client, "all edits are there", |look| {
        complete(look) && look.saved
    })
    .await?;
    ensure!(look.people.len() == writers, "{look:?}");
    ensure!(look.closes.is_empty(), "{look:?}");
    Ok(())
}

async fn agree(one: &Client, other: &Client) -> Result<()> {
    let begun = Instant::now();
    loop {
        let (a, b) = (one.look().await?, other.look().await?);
        let complete =
            |look: &Look| (0..40).all(|edit| look.text.matches(&format!("<{edit}>")).count() == 2);
        if a.text == b.text && complete(&a) {
            return Ok(());
        }
        ensure!(begun.elapsed() < SOON, "they do not agree: {a:?} {b:?}");
        sleep(Duration::from_millis(50)).await;
    }
}

async fn close_all(clients: impl IntoIterator<Item = Client>) -> Result<()> {
    for client in clients {
        client.close().await?;
    }
    Ok(())
}

/// y-sweet's ids know no slash.
fn named(family: Family, what: &str) -> String {
    format!("{what}-{}", family.name().replace(['/', ' ', '@'], "-"))
}

fn writer_of(family: Family, document: &str) -> Result<String> {
    if family == Family::YSweet {
        return Ok(format!(
            "{}|ada|full",
            token(&json!({"sub": "app", "scope": "server"}))?
        ));
    }
    token(&json!({"sub": "ada", "documents": [document]}))
}

fn reader_of(family: Family, document: &str) -> Result<String> {
    if family == Family::YSweet {
        return Ok(format!(
            "{}|ben|read-only",
            token(&json!({"sub": "app", "scope": "server"}))?
        ));
    }
    token(&json!({"sub": "ben", "documents": [document], "scope": "read"}))
}

fn token(claims: &serde_json::Value) -> Result<String> {
    let mut claims = claims.clone();
    if claims.get("exp").is_none() {
        claims["exp"] = (now() + 3600.0).into();
    }
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    Ok(jsonwebtoken::encode(
        &Header::new(Algorithm::HS256),
        &claims,
        &key,
    )?)
}

fn now() -> f64 {
    (collab_tests::clients::now_ms() / 1000.0).floor()
}

/// What was tried, and how it went.
#[derive(Default)]
struct Matrix {
    rows: Vec<(&'static str, Vec<Cell>)>,
}

/// A family, and what went wrong.
type Cell = (Family, Option<String>);

impl Matrix {
    fn note(&mut self, row: &'static str, family: Family, result: Result<()>) {
        let cell = (family, result.err().map(|error| format!("{error:#}")));
        match self.rows.iter_mut().find(|(name, _)| *name == row) {
            Some((_, cells)) => cells.push(cell),
            None => self.rows.push((row, vec![cell])),
        }
    }

    fn failures(&self) -> String {
        let cells = self
            .rows
            .iter()
            .flat_map(|(row, cells)| cells.iter().map(move |cell| (row, cell)));
        let failed = cells.filter_map(|(row, (family, error))| {
            Some(format!("{}, {row}: {}\n", family.name(), error.as_ref()?))
        });
        failed.collect()
    }
}

impl std::fmt::Display for Matrix {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{:<34}", "")?;
        for family in Family::ALL {
            write!(out, " {:>14}", family.name())?;
        }
        for (row, cells) in &self.rows {
            write!(out, "\n{row:<34}")?;
            for family in Family::ALL {
                let cell = cells.iter().find(|(other, _)| *other == family);
                let word = match cell {
                    Some((_, None)) => "yes",
                    Some((_, Some(_))) => "NO",
                    None => "-",
                };
                write!(out, " {word:>14}")?;
            }
        }
        Ok(())
    }
}
