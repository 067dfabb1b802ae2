//! A client that speaks the protocol itself, for what stock clients cannot be asked: to be slow, to say what they were
//! sent, and to know which state came as a step 2.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use collab_core::replica::new_doc;
use collab_core::wire::y_sweet;
use collab_core::wire::y_websocket::{self, Message};
use futures::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message as WsMessage;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};
use yrs::updates::decoder::Decode;
use yrs::updates::encoder::Encode;
use yrs::{Doc, GetString, ReadTxn, StateVector, Text, Transact, Update};

/// How long something is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// One client at one document.
pub(crate) struct Peer {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    doc: Doc,
    /// It got a step 2.
    pub(crate) synced: bool,
    /// Edits that were made, and those that are acknowledged.
    pub(crate) edits: u8,
    pub(crate) saved: u8,
    /// What the server refused with.
    pub(crate) denied: Vec<String>,
    /// Bytes of all frames that came.
    pub(crate) received_bytes: usize,
}

impl Peer {
    /// Connects and says what it has: nothing.
    pub(crate) async fn join(node: &str, document: &str) -> Result<Self> {
        let url = format!("{}/ws/{document}", node.replacen("http", "ws", 1));
        let (socket, _) = connect_async(url).await?;
        let mut peer = Self {
            socket,
            doc: new_doc(),
            synced: false,
            edits: 0,
            saved: 0,
            denied: Vec::new(),
            received_bytes: 0,
        };
        let nothing = StateVector::default().encode_v1();
        peer.send(y_websocket::sync_step1(&nothing)).await?;
        Ok(peer)
    }

    /// Types at the end and asks for a receipt.
    pub(crate) async fn types(&mut self, text: &str) -> Result<()> {
        let update = {
            let quill = self.doc.get_or_insert_text("quill");
            let mut txn = self.doc.transact_mut();
            let end = quill.len(&txn);
            quill.insert(&mut txn, end, text);
            txn.encode_update_v1()
        };
        self.edited(&update).await
    }

    /// Deletes everything and asks for a receipt.
    pub(crate) async fn clears(&mut self) -> Result<()> {
        let update = {
            let quill = self.doc.get_or_insert_text("quill");
            let mut txn = self.doc.transact_mut();
            let end = quill.len(&txn);
            quill.remove_range(&mut txn, 0, end);
            txn.encode_update_v1()
        };
        self.edited(&update).await
    }

    /// Whether all edits are acknowledged.
    pub(crate) fn is_saved(&self) -> bool {
        self.saved == self.edits
    }

    /// What its user sees.
    pub(crate) fn text(&self) -> String {
        let quill = self.doc.get_or_insert_text("quill");
        quill.get_string(&self.doc.transact())
    }

    /// Takes what the server sends until `condition` holds.
    pub(crate) async fn until(
        &mut self,
        what: &str,
        condition: impl Fn(&Self) -> bool,
    ) -> Result<()> {
        let waited = timeout(PATIENCE, async {
            while !condition(self) {
                self.receive().await?;
            }
            Ok(())
        });
        waited.await.with_context(|| format!("{what}: not seen"))?
    }

    /// Takes what the server sends for a while.
    pub(crate) async fn listen(&mut self, time: Duration) -> Result<()> {
        let listened = timeout(time, async {
            loop {
                self.receive().await?;
            }
        });
        listened.await.unwrap_or(Ok(()))
    }

    async fn edited(&mut self, update: &[u8]) -> Result<()> {
        self.edits += 1;
        self.send(y_websocket::update(update)).await?;
        self.send(y_sweet::saved(&[self.edits])).await
    }

    async fn receive(&mut self) -> Result<()> {
        let frame = match self.socket.next().await.context("the socket ended")?? {
            WsMessage::Binary(frame) => frame,
            WsMessage::Close(reason) => bail!("closed: {reason:?}"),
            _ => return Ok(()),
        };
        self.received_bytes += frame.len();
        for message in y_websocket::parse(&frame) {
            match message? {
                Message::SyncStep1 { state_vector } => {
                    let wanted = StateVector::decode_v1(state_vector)?;
                    let update = self.doc.transact().encode_state_as_update_v1(&wanted);
                    self.send(y_websocket::sync_step2(&update)).await?;
                }
                Message::SyncStep2 { update } => {
                    self.apply(update)?;
                    self.synced = true;
                }
                Message::Update { update } => self.apply(update)?,
                Message::Saved { payload } => self.saved = *payload.first().context("a number")?,
                Message::PermissionDenied { reason } => self.denied.push(reason.to_owned()),
                Message::Awareness(_) | Message::QueryAwareness => {}
            }
        }
        Ok(())
    }

    fn apply(&self, update: &[u8]) -> Result<()> {
        let update = Update::decode_v1(update)?;
        Ok(self.doc.transact_mut().apply_update(update)?)
    }

    async fn send(&mut self, frame: Bytes) -> Result<()> {
        Ok(self.socket.send(WsMessage::Binary(frame)).await?)
    }
}
