//! What a node does with clients that mean harm, or are broken: one embedded node, raw sockets.
//!
//! Each test also looks whether the node still serves those who mean well.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use collab_core::wire::y_sweet;
use collab_core::wire::y_websocket::{self, Message};
use collab_tests::embedded::Embedded;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use yrs::updates::decoder::Decode;
use yrs::{Doc, GetString, ReadTxn, StateVector, Text, Transact, Update};

mod connections;
mod frames;
mod issuer;

/// How long anything may take that a node does at once, on a busy machine.
const SOON: Duration = Duration::from_secs(10);

/// A WebSocket of which every byte is ours.
struct Raw {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// A frame as it came.
#[derive(Debug, PartialEq, Eq)]
struct Frame {
    opcode: u8,
    payload: Vec<u8>,
}

const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

impl Raw {
    /// Opens `/ws/{document}`, which must work.
    async fn open(node: &Embedded, document: &str) -> Result<Self> {
        Self::open_with(node, &format!("/ws/{document}"), "")
            .await?
            .map_err(|answer| anyhow::anyhow!(answer))
    }

    /// Asks for a WebSocket with more headers; inside is the answer if it is no.
    async fn open_with(node: &Embedded, path: &str, headers: &str) -> Result<Result<Self, String>> {
        let mut stream = TcpStream::connect(node.address()).await?;
        let host = node.address();
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: {host}\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut buffer = Vec::new();
        let end = loop {
            if let Some(end) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                break end;
            }
            let read = timeout(SOON, stream.read_buf(&mut buffer))
                .await
                .context("no answer")??;
            if read == 0 {
                bail!("closed before an answer");
            }
        };
        let answer = String::from_utf8_lossy(&buffer[..end]).into_owned();
        buffer.drain(..end + 4);
        if answer.starts_with("HTTP/1.1 101") {
            Ok(Ok(Self { stream, buffer }))
        } else {
            Ok(Err(answer))
        }
    }

    async fn send(&mut self, payload: &[u8]) -> Result<()> {
        self.send_frame(0x80 | BINARY, payload).await
    }

    /// One frame, masked with zeros, its first byte as given.
    async fn send_frame(&mut self, first: u8, payload: &[u8]) -> Result<()> {
        self.stream.write_all(&framed(first, payload)).await?;
        Ok(())
    }

    /// The next message that is no ping, or the close; `None` when the node has closed without a word.
    async fn frame(&mut self) -> Result<Option<Frame>> {
        let mut begun: Option<Frame> = None;
        timeout(SOON, async {
            loop {
                let Some((is_last, frame)) = self.buffered() else {
                    match self.stream.read_buf(&mut self.buffer).await {
                        Ok(0) | Err(_) => return Ok(None),
                        Ok(_) => continue,
                    }
                };
                match (&mut begun, frame.opcode) {
                    (_, PING) => {}
                    (_, CLOSE) => return Ok(Some(frame)),
                    // Large messages come in pieces.
                    (Some(message), _) => message.payload.extend(frame.payload),
                    (None, _) => begun = Some(frame),
                }
                if is_last && begun.is_some() {
                    return Ok(begun.take());
                }
            }
        })
        .await
        .context("no frame came")?
    }

    /// A frame that is there, and whether its message ends with it.
    fn buffered(&mut self) -> Option<(bool, Frame)> {
        let [first, short, rest @ ..] = self.buffer.as_slice() else {
            return None;
        };
        let is_last = first & 0x80 != 0;
        let (len, at) = match *short {
            126 => (usize::from(u16::from_be_bytes(*rest.first_chunk()?)), 4),
            127 => {
                let len = u64::from_be_bytes(*rest.first_chunk()?);
                (usize::try_from(len).ok()?, 10)
            }
            short => (usize::from(short), 2),
        };
        let payload = self.buffer.get(at..at + len)?.to_vec();
        let opcode = first & 0x0F;
        self.buffer.drain(..at + len);
        Some((is_last, Frame { opcode, payload }))
    }

    /// Why the node closes: code and reason. 1006 is "without a word", as browsers have it.
    async fn closed(mut self) -> Result<(u16, String)> {
        loop {
            match self.frame().await? {
                None => return Ok((1006, String::new())),
                Some(Frame {
                    opcode: CLOSE,
                    payload,
                }) => {
                    let (code, reason) = payload.split_first_chunk().context("a code")?;
                    return Ok((
                        u16::from_be_bytes(*code),
                        String::from_utf8(reason.to_vec())?,
                    ));
                }
                Some(_) => {}
            }
        }
    }

    /// Waits for a message of the node.
    async fn until<T>(&mut self, mut wanted: impl FnMut(&Message<'_>) -> Option<T>) -> Result<T> {
        loop {
            let frame = self.frame().await?.context("the node closed")?;
            ensure!(
                frame.opcode != CLOSE,
                "closed: {:?}",
                String::from_utf8_lossy(&frame.payload)
            );
            for message in y_websocket::parse(&frame.payload) {
                if let Some(found) = wanted(&message?) {
                    return Ok(found);
                }
            }
        }
    }

    /// Answers the node's first question, as every client does: with nothing.
    async fn settle(&mut self) -> Result<()> {
        self.until(|message| matches!(message, Message::SyncStep1 { .. }).then_some(()))
            .await?;
        self.send(&y_websocket::sync_step2(&[0, 0])).await
    }

    /// Everything sent before is durable once this returns.
    async fn saved(&mut self) -> Result<()> {
        self.send(&y_sweet::saved(b"?")).await?;
        self.until(|message| matches!(message, Message::Saved { payload: b"?" }).then_some(()))
            .await
    }
}

/// A frame of a client, its first byte as given.
fn framed(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match payload.len() {
        len @ 0..=125 => frame.push(0x80 | u8::try_from(len).unwrap()),
        len @ 126..=0xFFFF => {
            frame.push(0x80 | 0x7e);
            frame.extend(u16::try_from(len).unwrap().to_be_bytes());
        }
        len => {
            frame.push(0x80 | 0x7f);
            frame.extend((len as u64).to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend_from_slice(payload);
    frame
}

/// Someone who means well: types into a document, has it saved, and is done within `SOON`.
async fn a_user_is_served(node: &Embedded, document: &str) -> Result<Duration> {
    let begun = Instant::now();
    let mut user = Raw::open(node, document).await?;
    user.settle().await?;
    let doc = Doc::new();
    user.send(&y_websocket::sync_step1(&[0])).await?;
    let known = user.until(|message| match message {
        Message::SyncStep2 { update } => Some(update.to_vec()),
        _ => None,
    });
    let known = Update::decode_v1(&known.await?)?;
    doc.transact_mut().apply_update(known)?;
    let text = doc.get_or_insert_text("quill");
    let typed = {
        let mut txn = doc.transact_mut();
        text.push(&mut txn, "well meant ");
        txn.encode_update_v1()
    };
    user.send(&y_websocket::update(&typed)).await?;
    user.saved().await?;
    let took = begun.elapsed();
    let stored = node.update(document).await?;
    let read = Doc::new();
    read.transact_mut()
        .apply_update(Update::decode_v1(&stored)?)?;
    let text = read
        .get_or_insert_text("quill")
        .get_string(&read.transact());
    ensure!(text.ends_with("well meant "), "{text:?} is stored");
    ensure!(
        read.transact().state_vector() == doc.transact().state_vector(),
        "{document} holds something else too: {:?}",
        read.transact()
            .encode_state_as_update_v1(&StateVector::default())
    );
    Ok(took)
}
