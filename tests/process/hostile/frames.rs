//! What comes over a socket: broken frames, bombs, floods, edits of those who may only read.

use collab_core::limits::{FRAME_BYTES_MAX, READER_EDITS_BURST};
use collab_core::wire::awareness;
use futures::future::join_all;
use jsonwebtoken::{EncodingKey, Header, get_current_timestamp};
use serde_json::json;

use super::*;

/// Close codes after which the same client need not come back with the same bytes.
const STOP: [u16; 4] = [1002, 1003, 1007, 1008];
const TOO_LARGE: u16 = 1009;

/// The rules of WebSocket itself (RFC 6455).
#[tokio::test(flavor = "multi_thread")]
async fn who_breaks_the_rules_of_websocket_is_closed_with_the_right_code() -> Result<()> {
    let node = Embedded::start(&[]).await?;
    let unmasked = [0x82, 3, 1, 1, 0];
    let long_control = framed(0x80 | PING, &[0; 126]);
    let reserved = framed(0xC0 | BINARY, &[1, 1, 0]);
    let unknown = framed(0x83, &[1, 1, 0]);
    let alone = framed(0x80, &[1, 1, 0]);
    let text = framed(0x81, b"hello");
    let not_utf8 = framed(0x81, &[0xFF, 0xFE]);
    for (what, bytes, codes) in [
        ("a frame without a mask", &unmasked[..], &[1002][..]),
        ("a control frame of 126 bytes", &long_control, &[1002]),
        ("a reserved bit", &reserved, &[1002]),
        ("an unknown kind of frame", &unknown, &[1002]),
        (
            "the end of a message that has no beginning",
            &alone,
            &[1002],
        ),
        ("text", &text, &[1003]),
        ("text that is none", &not_utf8, &[1003, 1007]),
    ] {
        let mut socket = Raw::open(&node, "rules").await?;
        socket.stream.write_all(bytes).await?;
        let (code, reason) = socket.closed().await?;
        ensure!(
            codes.contains(&code),
            "{what}: closed with {code} {reason:?}"
        );
    }
    // Compression, the way to bombs of a thousand to one, is not there to be had.
    let offer = "sec-websocket-extensions: permessage-deflate\r\n";
    let mut stream = TcpStream::connect(node.address()).await?;
    let host = node.address();
    let request = format!(
        "GET /ws/rules HTTP/1.1\r\nhost: {host}\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n{offer}\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = vec![0; 512];
    let read = stream.read(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer[..read]).to_lowercase();
    ensure!(
        answer.starts_with("http/1.1 101") && !answer.contains("deflate"),
        "{answer}"
    );
    a_user_is_served(&node, "rules").await?;
    Ok(())
}

/// Nothing of it reaches the document or the log, and whatever it declares is not believed.
#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "a line or two for each of them")]
async fn what_is_no_update_closes_its_socket_and_changes_nothing() -> Result<()> {
    let mut node = Embedded::start(&[]).await?;
    a_user_is_served(&node, "bombs").await?;
    let before = node.update("bombs").await?;
    let resident = node.resident_bytes()?;
    let billion = [0xFF, 0xFF, 0xFF, 0xFF, 0x03];
    let nested_any = [
        &[1, 1, 1, 0, 8, 1, 1, b'a', 1][..],
        &[117, 1].repeat(10_000),
        &[126, 0],
    ]
    .concat();
    let mut nested_types = vec![1, 0x90, 0x4E, 1, 0, 7, 1, 1, b'r', 1];
    for clock in 0..9_999_u64 {
        nested_types.extend([0x27, 0, 1]);
        collab_core::wire::varint::write_var_uint(&mut nested_types, clock);
        nested_types.extend([1, b'k', 1]);
    }
    nested_types.push(0);
    let mut bombs: Vec<(&str, Vec<u8>)> = vec![
        ("clients", billion.to_vec()),
        ("structs", [&[1][..], &billion].concat()),
        ("deletes", [&[0][..], &billion].concat()),
        (
            "values",
            [&[1, 1, 1, 0, 8, 1, 1, b'a'][..], &billion].concat(),
        ),
        (
            "an array",
            [&[1, 1, 1, 0, 8, 1, 1, b'a', 1, 117][..], &billion].concat(),
        ),
        (
            "a map",
            [&[1, 1, 1, 0, 8, 1, 1, b'a', 1, 118][..], &billion].concat(),
        ),
        ("values in each other", nested_any),
        ("types in each other", nested_types),
        (
            "V2",
            vec![
                0, 0, 6, 0xFF, 0xFF, 0xFF, 0xFF, 0x0F, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0,
                0, 1, 0,
            ],
        ),
        (
            "a document that cannot be encoded",
            vec![1, 1, 1, 2, 162, 8, 6, 0, 0, 0],
        ),
        (
            "a document that cannot be read",
            vec![1, 1, 1, 0, 2, 1, 0, 0, 0, 0],
        ),
        (
            "a length of 2^32-1",
            vec![1, 1, 1, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0x0F, 0],
        ),
        ("a length of 0", vec![1, 1, 1, 0, 0, 0, 0]),
        (
            "a client of 2^53",
            vec![
                1, 1, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10, 0, 0, 1, 0,
            ],
        ),
        ("nothing", vec![]),
    ];
    // A real update, cut anywhere.
    let whole = before.clone();
    bombs.extend(
        (1..whole.len())
            .step_by(3)
            .map(|end| ("an update that was cut", whole[..end].to_vec())),
    );
    for (what, update) in &bombs {
        for frame in [y_websocket::update(update), y_websocket::sync_step2(update)] {
            let mut socket = Raw::open(&node, "bombs").await?;
            socket.settle().await?;
            socket.send(&frame).await?;
            let (code, reason) = socket.closed().await?;
            ensure!(
                STOP.contains(&code),
                "{what}: closed with {code} {reason:?}"
            );
        }
    }
    let mut vector = Raw::open(&node, "bombs").await?;
    vector.send(&y_websocket::sync_step1(&billion)).await?;
    ensure!(
        STOP.contains(&vector.closed().await?.0),
        "a state vector that declares a billion"
    );
    let mut presence = Raw::open(&node, "bombs").await?;
    presence.send(&y_websocket::awareness(&billion)).await?;
    ensure!(
        presence.closed().await?.0 == TOO_LARGE,
        "presence that declares a billion"
    );
    ensure!(node.is_alive()?, "the node ended\n{}", node.log());
    ensure!(
        node.update("bombs").await? == before,
        "the document changed"
    );
    let grown = node.resident_bytes()?.saturating_sub(resident);
    ensure!(grown < 32 << 20, "{grown} bytes more are resident");
    a_user_is_served(&node, "bombs").await?;
    ensure!(!node.log().contains("panicked"), "{}", node.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_has_a_largest_size_in_however_many_pieces() -> Result<()> {
    let node = Embedded::start(&[]).await?;
    let resident = node.resident_bytes()?;
    // Declared, and never sent.
    let mut socket = Raw::open(&node, "large").await?;
    let mut declared = vec![0x80 | BINARY, 0x80 | 127];
    declared.extend((100_u64 << 20).to_be_bytes());
    declared.extend([0; 4]);
    socket.stream.write_all(&declared).await?;
    let (code, _) = socket.closed().await?;
    ensure!(code == TOO_LARGE, "100 MiB in one frame: {code}");
    // Piece by piece.
    let mut socket = Raw::open(&node, "large").await?;
    let piece = vec![0; 1 << 20];
    socket.send_frame(BINARY, &piece).await?;
    for _ in 0..100 {
        if socket.send_frame(0, &piece).await.is_err() {
            break;
        }
    }
    // It may be closed with all of that still unread: then the code is lost on its way.
    let (code, _) = socket.closed().await.unwrap_or((1006, String::new()));
    ensure!(
        [TOO_LARGE, 1006].contains(&code),
        "100 MiB in pieces: {code}"
    );
    // Bytes one by one are slow and harmless; so are pieces of nothing.
    let mut socket = Raw::open(&node, "large").await?;
    socket.settle().await?;
    let question = y_sweet::saved(b"?");
    socket.send_frame(BINARY, &question[..1]).await?;
    let nothing = framed(0, &[]).repeat(10_000);
    socket.stream.write_all(&nothing).await?;
    for byte in &question[1..question.len() - 1] {
        socket.send_frame(0, &[*byte]).await?;
    }
    socket
        .send_frame(0x80, &question[question.len() - 1..])
        .await?;
    socket
        .until(|message| matches!(message, Message::Saved { payload: b"?" }).then_some(()))
        .await?;
    let grown = node.resident_bytes()?.saturating_sub(resident);
    ensure!(
        grown < 4 * FRAME_BYTES_MAX as u64,
        "{grown} bytes more are resident"
    );
    a_user_is_served(&node, "large").await?;
    Ok(())
}

/// A million deletes take `yrs` a minute; the documents beside it do not notice.
#[tokio::test(flavor = "multi_thread")]
async fn one_heavy_update_holds_up_no_other_document() -> Result<()> {
    const LETTERS: u32 = 200_000;
    let node = Embedded::start(&[]).await?;
    let mut heavy = Raw::open(&node, "heavy").await?;
    heavy.settle().await?;
    let doc = Doc::with_options(yrs::Options {
        client_id: yrs::ClientID::new(77),
        ..yrs::Options::default()
    });
    let text = doc.get_or_insert_text("quill");
    let typed = {
        let mut txn = doc.transact_mut();
        text.insert(&mut txn, 0, &"x".repeat(LETTERS as usize));
        txn.encode_update_v1()
    };
    heavy.send(&y_websocket::update(&typed)).await?;
    heavy.saved().await?;
    // Every other letter.
    let mut deletes = vec![0, 1, 77];
    collab_core::wire::varint::write_var_uint(&mut deletes, u64::from(LETTERS / 2));
    for clock in (0..LETTERS).step_by(2) {
        collab_core::wire::varint::write_var_uint(&mut deletes, clock.into());
        deletes.push(1);
    }
    let begun = Instant::now();
    heavy.send(&y_websocket::update(&deletes)).await?;
    let beside = join_all((0..4).map(|number| {
        let node = &node;
        async move { a_user_is_served(node, &format!("beside-{number}")).await }
    }));
    let mut slowest = Duration::ZERO;
    for took in beside.await {
        slowest = slowest.max(took?);
    }
    heavy.send(&y_sweet::saved(b"!")).await?;
    let saved = timeout(Duration::from_mins(2), async {
        loop {
            let answer = heavy
                .until(|message| matches!(message, Message::Saved { payload: b"!" }).then_some(()))
                .await;
            if answer.is_ok() {
                break;
            }
        }
    });
    saved.await?;
    println!(
        "{} deletes: saved after {:?}, slowest document beside {slowest:?}",
        LETTERS / 2,
        begun.elapsed()
    );
    ensure!(slowest < SOON, "a document beside it waited {slowest:?}");
    Ok(())
}

/// Presence is no way to flood a document: its clients are few, and slow.
#[tokio::test(flavor = "multi_thread")]
async fn presence_is_bounded_and_speaks_for_nobody_else() -> Result<()> {
    let secret = [("COLLAB_AUTH_SECRET", SECRET)];
    let node = Embedded::start_by(&[], &[], &secret).await?;
    let open = async |user: &str| {
        let path = format!(
            "/ws/presence?token={}",
            token(&json!({"sub": user, "exp": in_an_hour()}))
        );
        Raw::open_with(&node, &path, "")
            .await?
            .map_err(|answer| anyhow::anyhow!(answer))
    };
    let state = |client, json: &str| {
        let clock = 1;
        let entry = awareness::Entry {
            client,
            clock,
            json,
        };
        awareness::encode([entry])
    };
    let (mut ada, mut mallory) = (open("ada").await?, open("mallory").await?);
    ada.send(&y_websocket::awareness(&state(1, r#"{"user":"ada"}"#)))
        .await?;
    let seen = |wanted: u64| {
        move |message: &Message<'_>| match message {
            Message::Awareness(entries) => entries
                .clone()
                .find(|entry| entry.client == wanted)
                .map(|entry| entry.json.to_owned()),
            _ => None,
        }
    };
    ensure!(mallory.until(seen(1)).await?.contains("ada"));
    // Another user's id, and more ids than one browser has tabs.
    let mut entries = vec![awareness::Entry {
        client: 1,
        clock: 9,
        json: r#"{"user":"not ada"}"#,
    }];
    entries.extend((100..10_000).map(|client| awareness::Entry {
        client,
        clock: 1,
        json: "{}",
    }));
    mallory
        .send(&y_websocket::awareness(&awareness::encode(entries)))
        .await?;
    ada.until(seen(100)).await?;
    let mut newcomer = open("newcomer").await?;
    let all = newcomer.until(|message| match message {
        Message::Awareness(entries) if entries.clone().count() > 0 => Some(
            entries
                .clone()
                .map(|entry| (entry.client, entry.json.to_owned()))
                .collect::<Vec<_>>(),
        ),
        _ => None,
    });
    let all = all.await?;
    ensure!(all.len() <= 17, "{} clients are there", all.len());
    ensure!(
        all.iter()
            .any(|(client, json)| *client == 1 && json.contains("\"ada\"")),
        "{all:?}"
    );
    // A megabyte of it, and something that is no JSON.
    for (what, json, code) in [
        ("a large state", "x".repeat(1 << 20), TOO_LARGE),
        ("no JSON", "{".to_owned(), 1007),
    ] {
        let mut socket = open("mallory").await?;
        let json = if code == TOO_LARGE {
            format!("\"{json}\"")
        } else {
            json
        };
        socket
            .send(&y_websocket::awareness(&state(5, &json)))
            .await?;
        let closed = socket.closed().await?;
        ensure!(closed.0 == code, "{what}: {closed:?}");
    }
    Ok(())
}

/// Two devices that start from a copy of the same memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_device_with_the_same_client_id_is_told_so() -> Result<()> {
    let node = Embedded::start(&[]).await?;
    let typed = |text: &str| {
        let doc = Doc::with_options(yrs::Options {
            client_id: yrs::ClientID::new(5),
            ..yrs::Options::default()
        });
        let quill = doc.get_or_insert_text("quill");
        let mut txn = doc.transact_mut();
        quill.insert(&mut txn, 0, text);
        txn.encode_update_v1()
    };
    let mut first = Raw::open(&node, "copy").await?;
    first.settle().await?;
    first.send(&y_websocket::update(&typed("hello"))).await?;
    first.saved().await?;
    let before = node.update("copy").await?;
    let mut second = Raw::open(&node, "copy").await?;
    second.settle().await?;
    second.send(&y_websocket::update(&typed("jello"))).await?;
    let (code, reason) = second.closed().await?;
    ensure!(
        code == 1008 && reason.contains("client id 5 is in use by another device"),
        "{code} {reason}"
    );
    ensure!(node.update("copy").await? == before);
    ensure!(
        node.metric("collab_updates_refused_total{reason=\"conflict\"}")
            .await?
            >= 1.0
    );
    // The same bytes again are no conflict, and no second row.
    let mut again = Raw::open(&node, "copy").await?;
    again.settle().await?;
    again.send(&y_websocket::update(&typed("hello"))).await?;
    again.saved().await?;
    ensure!(node.update("copy").await? == before);
    Ok(())
}

/// A reader's edits go nowhere; it is closed only when it will not stop.
#[tokio::test(flavor = "multi_thread")]
async fn who_may_only_read_writes_nothing() -> Result<()> {
    let node = Embedded::start_by(&[], &[], &[("COLLAB_AUTH_SECRET", SECRET)]).await?;
    let path = |claims: &serde_json::Value| format!("/ws/readers?token={}", token(claims));
    let writer = json!({"sub": "ada", "exp": in_an_hour()});
    let reader = json!({"sub": "eve", "exp": in_an_hour(), "scope": "read"});
    let open = async |claims: &serde_json::Value| {
        Raw::open_with(&node, &path(claims), "")
            .await?
            .map_err(|answer| anyhow::anyhow!(answer))
    };
    let mut ada = open(&writer).await?;
    ada.settle().await?;
    let mut eve = open(&reader).await?;
    let typed = [1, 1, 9, 0, 4, 1, 1, b't', 1, b'x', 0];
    eve.send(&y_websocket::sync_step2(&typed)).await?;
    eve.send(&y_websocket::update(&typed)).await?;
    eve.send(&y_websocket::sync_step1(&[0])).await?;
    let known = eve.until(|message| match message {
        Message::SyncStep2 { update } => Some(update.to_vec()),
        _ => None,
    });
    ensure!(
        known.await? == [0, 0],
        "the reader's edit is in the document"
    );
    for _ in 0..2 * READER_EDITS_BURST {
        if eve.send(&y_websocket::update(&typed)).await.is_err() {
            break;
        }
    }
    let (code, _) = eve.closed().await?;
    ensure!([1008, 1006].contains(&code), "closed with {code}");
    ada.send(&y_websocket::sync_step1(&[0])).await?;
    let known = ada.until(|message| match message {
        Message::SyncStep2 { update } => Some(update.to_vec()),
        _ => None,
    });
    ensure!(known.await? == [0, 0]);
    Ok(())
}

/// What opens a socket, and how long it stays open: until its token ends, and for as long as clocks may differ (30 s).
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_lives_as_long_as_its_token() -> Result<()> {
    let node = Embedded::start_by(&[], &[], &[("COLLAB_AUTH_SECRET", SECRET)]).await?;
    let now = get_current_timestamp();
    for (what, claims) in [
        ("an ended one", json!({"sub": "ada", "exp": now - 120})),
        (
            "one for later",
            json!({"sub": "ada", "exp": now + 600, "nbf": now + 300}),
        ),
        ("without an end", json!({"sub": "ada"})),
        ("an end in words", json!({"sub": "ada", "exp": "tomorrow"})),
        ("without a user", json!({"exp": now + 600})),
    ] {
        let path = format!("/ws/tokens?token={}", token(&claims));
        let Err(answer) = Raw::open_with(&node, &path, "").await? else {
            bail!("{what} opened a socket");
        };
        ensure!(answer.starts_with("HTTP/1.1 401"), "{what}: {answer}");
    }
    for path in ["/ws/tokens", "/ws/tokens?token=", "/ws/tokens?token=a.b.c"] {
        let answer = Raw::open_with(&node, path, "").await?;
        ensure!(
            answer.is_err_and(|answer| answer.starts_with("HTTP/1.1 401")),
            "{path}"
        );
    }
    let elsewhere = token(&json!({"sub": "ada", "exp": now + 600, "documents": ["team/*"]}));
    let answer = Raw::open_with(&node, &format!("/ws/tokens?token={elsewhere}"), "").await?;
    ensure!(answer.is_err_and(|answer| answer.starts_with("HTTP/1.1 403")));
    let path = format!(
        "/ws/tokens?token={}",
        token(&json!({"sub": "ada", "exp": now - 26}))
    );
    let begun = Instant::now();
    let socket = Raw::open_with(&node, &path, "")
        .await?
        .map_err(|answer| anyhow::anyhow!(answer))?;
    let (code, reason) = socket.closed().await?;
    ensure!(
        code == 4401 && begun.elapsed() < SOON,
        "{code} {reason} after {:?}",
        begun.elapsed()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_has_a_name_that_is_one() -> Result<()> {
    let node = Embedded::start(&[]).await?;
    for (name, opens) in [
        ("team%2Fnotes".to_owned(), true),
        ("team/notes".to_owned(), true),
        ("%C3%A4%F0%9F%98%80".to_owned(), true),
        ("a".repeat(255), true),
        ("a".repeat(256), false),
        ("a".repeat(10_240), false),
        ("with%00zero".to_owned(), false),
        ("with%0Aline".to_owned(), false),
        ("%FF".to_owned(), false),
    ] {
        let opened = Raw::open_with(&node, &format!("/ws/{name}"), "").await?;
        match opened {
            Ok(_) => ensure!(opens, "{name} opened"),
            Err(answer) => ensure!(
                !opens && answer.starts_with("HTTP/1.1 4"),
                "{name}: {answer}"
            ),
        }
    }
    Ok(())
}

/// A client that is gone without a word gives its place and its presence back.
#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_connection_is_noticed() -> Result<()> {
    let node = Embedded::start(&[]).await?;
    let mut gone = Raw::open(&node, "half").await?;
    let entry = awareness::Entry {
        client: 1,
        clock: 1,
        json: "{}",
    };
    gone.send(&y_websocket::awareness(&awareness::encode([entry])))
        .await?;
    let mut well = Raw::open(&node, "half").await?;
    let begun = Instant::now();
    // One answers pings, the other reads and answers nothing.
    let mut pinged = 0;
    loop {
        let connections = node.metric("collab_connections").await?;
        if connections < 2.0 {
            break;
        }
        ensure!(
            begun.elapsed() < Duration::from_secs(45),
            "it is still there\n{}",
            node.log()
        );
        let read = timeout(
            Duration::from_millis(200),
            well.stream.read_buf(&mut well.buffer),
        )
        .await;
        ensure!(
            !matches!(read, Ok(Ok(0))),
            "the one that answers was closed"
        );
        while let Some((_, frame)) = well.buffered() {
            if frame.opcode == PING {
                pinged += 1;
                well.send_frame(0x80 | PONG, &frame.payload).await?;
            }
        }
        timeout(
            Duration::from_millis(1),
            gone.stream.read_buf(&mut gone.buffer),
        )
        .await
        .ok();
        gone.buffer.clear();
    }
    ensure!(
        begun.elapsed() < Duration::from_secs(41) && pinged >= 1,
        "{:?}, {pinged} pings",
        begun.elapsed()
    );
    ensure!(node.metric("collab_connections").await? >= 1.0);
    Ok(())
}

/// Someone reads nothing while others write: they do not wait, and what is kept for the slow one is bounded.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_holds_nobody_up() -> Result<()> {
    let node = Embedded::start(&[]).await?;
    let mut slow = Raw::open(&node, "slow").await?;
    slow.settle().await?;
    slow.send(&y_websocket::sync_step1(&[0])).await?;
    let mut writer = Raw::open(&node, "slow").await?;
    writer.settle().await?;
    let doc = Doc::new();
    let text = doc.get_or_insert_text("quill");
    let piece = "0123456789abcdef".repeat(1024);
    let resident = node.resident_bytes()?;
    let begun = Instant::now();
    for number in 0..1_000 {
        let typed = {
            let mut txn = doc.transact_mut();
            text.push(&mut txn, &piece);
            txn.encode_update_v1()
        };
        writer.send(&y_websocket::update(&typed)).await?;
        if number % 50 == 49 {
            writer.saved().await?;
        }
    }
    writer.saved().await?;
    let took = begun.elapsed();
    let grown = node.resident_bytes()?.saturating_sub(resident);
    println!(
        "16 MB beside a slow reader: {took:?}, {} MB more resident",
        grown >> 20
    );
    ensure!(took < Duration::from_mins(1), "the writer waited {took:?}");
    drop(slow);
    Ok(())
}

const SECRET: &str = "0123456789abcdef0123456789abcdef";

fn in_an_hour() -> u64 {
    get_current_timestamp() + 3_600
}

fn token(claims: &serde_json::Value) -> String {
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    jsonwebtoken::encode(&Header::default(), claims, &key).unwrap()
}
