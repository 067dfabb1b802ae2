//! Who gets in: places, deadlines, pages.

use super::*;

/// Sockets that begin a request and never end it hold nobody up, and are closed at their deadline.
#[tokio::test(flavor = "multi_thread")]
async fn slow_handshakes_hold_nobody_up() -> Result<()> {
    const SLOW: usize = 500;
    let node = Embedded::start(&[]).await?;
    let begun = Instant::now();
    let mut slow = Vec::new();
    for number in 0..SLOW {
        // One after the other: more at once than the system queues would not reach the node at all.
        let mut stream = TcpStream::connect(node.address()).await?;
        slow.push(tokio::spawn(async move {
            for byte in b"GET /ws/slow HTTP/1.1" {
                // Every tenth says nothing at all.
                if !number.is_multiple_of(10) {
                    stream.write_all(&[*byte]).await?;
                }
                let mut answer = [0; 64];
                if let Ok(read) = timeout(Duration::from_secs(5), stream.read(&mut answer)).await {
                    return read.map(|_| begun.elapsed());
                }
            }
            Ok(Duration::MAX)
        }));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    for number in 0..5 {
        let took = a_user_is_served(&node, &format!("user-{number}")).await?;
        ensure!(took < SOON, "a user waited {took:?} beside slow sockets");
    }
    for socket in slow {
        // A reset is a close too.
        let closed = socket.await?.unwrap_or_else(|_| begun.elapsed());
        ensure!(
            closed < Duration::from_secs(20),
            "a slow socket was kept {closed:?}"
        );
    }
    Ok(())
}

/// With no file descriptors left for more clients the node turns them away, and takes the next when there is room.
#[tokio::test(flavor = "multi_thread")]
async fn the_limit_of_open_files_turns_clients_away_and_ends_nothing() -> Result<()> {
    let mut node = Embedded::start_by(&["prlimit", "--nofile=300"], &[], &[]).await?;
    let mut sockets = Vec::new();
    let mut refused = 0;
    for number in 0..400 {
        match Raw::open_with(&node, &format!("/ws/full-{}", number % 7), "").await {
            Ok(Ok(socket)) => sockets.push(socket),
            Ok(Err(answer)) => {
                ensure!(
                    answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after"),
                    "{answer}"
                );
                refused += 1;
            }
            // Without a word: turned away while it was still speaking.
            Err(_) => refused += 1,
        }
    }
    ensure!(node.is_alive()?, "the node ended\n{}", node.log());
    ensure!(
        sockets.len() >= 100 && refused >= 100,
        "{} open, {refused} refused",
        sockets.len()
    );
    // Those who are in are served.
    let socket = sockets.first_mut().context("one is open")?;
    socket.settle().await?;
    drop(sockets);
    let begun = Instant::now();
    loop {
        match a_user_is_served(&node, "after").await {
            Ok(_) => break,
            Err(error) => ensure!(begun.elapsed() < SOON, "{error:#}\n{}", node.log()),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let log = node.log();
    ensure!(!log.contains("panicked"), "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_finds_no_place_is_told_to_come_back() -> Result<()> {
    let node = Embedded::start(&[
        "--connections-max",
        "20",
        "--connections-per-address-max",
        "3",
    ])
    .await?;
    let mut sockets = Vec::new();
    let answer = loop {
        match Raw::open_with(&node, "/ws/places", "").await? {
            Ok(socket) => sockets.push(socket),
            Err(answer) => break answer,
        }
        ensure!(sockets.len() <= 3, "more places than there may be");
    };
    ensure!(
        answer.starts_with("HTTP/1.1 429") && answer.contains("retry-after: 5"),
        "{answer}"
    );
    sockets.pop();
    let begun = Instant::now();
    while Raw::open_with(&node, "/ws/places", "")
        .await
        .is_ok_and(|opened| opened.is_err())
    {
        ensure!(begun.elapsed() < SOON, "the place stays taken");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_page_opens_no_socket() -> Result<()> {
    let node =
        Embedded::start(&["--origins", "https://docs.example.com,http://app.test:3000"]).await?;
    for (origin, allowed) in [
        ("https://docs.example.com", true),
        ("http://app.test:3000", true),
        ("http://docs.example.com", false),
        ("https://docs.example.com:444", false),
        ("https://docs.example.com.evil.test", false),
        ("null", false),
        ("http://127.0.0.1:8080", false),
    ] {
        let opened = Raw::open_with(&node, "/ws/pages", &format!("origin: {origin}\r\n")).await?;
        match opened {
            Ok(_) => ensure!(allowed, "{origin} got in"),
            Err(answer) => ensure!(
                !allowed && answer.starts_with("HTTP/1.1 403"),
                "{origin}: {answer}"
            ),
        }
    }
    ensure!(
        Raw::open_with(&node, "/ws/pages", "").await?.is_ok(),
        "no browser, no origin"
    );
    // Without a list and without authentication: pages of this machine.
    let node = Embedded::start(&[]).await?;
    let from = |origin: String| format!("origin: {origin}\r\n");
    ensure!(
        Raw::open_with(&node, "/ws/pages", &from(node.url()))
            .await?
            .is_ok()
    );
    ensure!(
        Raw::open_with(&node, "/ws/pages", &from("https://evil.test".to_owned()))
            .await?
            .is_err()
    );
    Ok(())
}
