//! The physical limit: a WebSocket server without CRDT, one thread, one write per socket and turn. What a client sends goes to
//! everybody in the same document, itself too; a step 1 is answered with one shared state.
//!
//! It has no storage either, unless it is given a file or a database: then every message is committed to it before its sender gets
//! it back, which is the least that a server must do whose receipts can be trusted.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};

use anyhow::{Context, Result};
use collab_core::wire::varint::write_var_uint;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};

use crate::commit::Log;

const LISTENER: Token = Token(usize::MAX);
const COMMITTED: Token = Token(usize::MAX - 1);

/// Whose message it is, and its frame.
type Receipt = (usize, Vec<u8>);

struct Peer {
    stream: TcpStream,
    input: Vec<u8>,
    output: Vec<u8>,
    document: Option<usize>,
}

/// All that the server knows.
struct Server {
    /// What answers a step 1, framed.
    step2: Vec<u8>,
    peers: Vec<Option<Peer>>,
    documents: BTreeMap<Vec<u8>, usize>,
    members: Vec<Vec<usize>>,
    /// Who has something to be written.
    dirty: Vec<usize>,
    scratch: Vec<u8>,
    storage: Option<Storage>,
}

/// A thread that commits what was sent, all that waits at once.
struct Storage {
    rows: mpsc::Sender<Receipt>,
    committed: Arc<Mutex<Vec<Receipt>>>,
}

/// Serves for ever.
pub(crate) fn serve(port: u16, state: &Path, log: Option<&str>) -> Result<()> {
    let state = if state.as_os_str().is_empty() {
        vec![0, 0]
    } else {
        std::fs::read(state).context("the state")?
    };
    let mut step2 = vec![0, 1];
    write_var_uint(&mut step2, state.len() as u64);
    step2.extend_from_slice(&state);
    let mut poll = Poll::new()?;
    let storage = log.map(|log| Storage::open(log, Waker::new(poll.registry(), COMMITTED)?));
    let mut server = Server {
        step2: frame(&step2),
        peers: Vec::new(),
        documents: BTreeMap::new(),
        members: Vec::new(),
        dirty: Vec::new(),
        scratch: vec![0; 256 * 1024],
        storage: storage.transpose()?,
    };
    let mut listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
    let registry = poll.registry();
    registry.register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut events = Events::with_capacity(4_096);
    loop {
        poll.poll(&mut events, None)?;
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((mut stream, _)) = listener.accept() {
                    stream.set_nodelay(true)?;
                    let token = Token(server.peers.len());
                    let interest = Interest::READABLE | Interest::WRITABLE;
                    poll.registry().register(&mut stream, token, interest)?;
                    server.peers.push(Some(Peer::new(stream)));
                }
            } else if event.token() == COMMITTED {
                server.give_receipts();
            } else {
                server.turn(event.token().0);
            }
        }
        for index in std::mem::take(&mut server.dirty) {
            if let Some(peer) = &mut server.peers[index] {
                flush(peer);
            }
        }
    }
}

impl Peer {
    const fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            document: None,
        }
    }

    /// Adds what is to be written. Answers whether it is the first.
    fn queue(&mut self, framed: &[u8]) -> bool {
        let first = self.output.is_empty();
        self.output.extend_from_slice(framed);
        first
    }
}

impl Server {
    fn turn(&mut self, index: usize) {
        self.dirty.push(index);
        let Some(peer) = self.peers[index].as_mut() else {
            return;
        };
        if !read(peer, &mut self.scratch) {
            if let Some(document) = peer.document {
                self.members[document].retain(|member| *member != index);
            }
            self.peers[index] = None;
            return;
        }
        let Some(document) = peer.document.or_else(|| self.upgrade(index)) else {
            return;
        };
        let Some(peer) = self.peers[index].as_mut() else {
            return;
        };
        let input = std::mem::take(&mut peer.input);
        let mut rest = input.as_slice();
        while let Some((payload, after)) = take_frame(rest) {
            rest = after;
            if let [0, 0, ..] = payload {
                if let Some(peer) = &mut self.peers[index] {
                    peer.output.extend_from_slice(&self.step2);
                }
            } else if !payload.starts_with(&[0, 1]) {
                self.broadcast(document, index, &frame(payload));
            }
        }
        if let Some(peer) = &mut self.peers[index] {
            peer.input = rest.to_vec();
        }
    }

    /// Answers the handshake once it is whole; the path is the document.
    fn upgrade(&mut self, index: usize) -> Option<usize> {
        let peer = self.peers[index].as_mut()?;
        let mut windows = peer.input.windows(4);
        let end = windows.position(|window| window == b"\r\n\r\n")?;
        let mut words = peer.input.split(|byte| *byte == b' ');
        let path = words.nth(1).unwrap_or_default().to_vec();
        peer.input.drain(..end + 4);
        // The accept of the key that every client of the generator sends (RFC 6455 section 1.3).
        peer.output.extend_from_slice(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
              Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
        );
        let next = self.documents.len();
        let document = *self.documents.entry(path).or_insert(next);
        peer.document = Some(document);
        if self.members.len() == document {
            self.members.push(Vec::new());
        }
        self.members[document].push(index);
        Some(document)
    }

    fn broadcast(&mut self, document: usize, sender: usize, framed: &[u8]) {
        for member in &self.members[document] {
            let waits = self.storage.is_some() && *member == sender;
            if let Some(peer) = &mut self.peers[*member]
                && !waits
                && peer.queue(framed)
            {
                self.dirty.push(*member);
            }
        }
        if let Some(storage) = &self.storage {
            let row = (sender, framed.to_vec());
            storage.rows.send(row).expect("the storage answers");
        }
    }

    fn give_receipts(&mut self) {
        let Some(storage) = &self.storage else { return };
        let committed = std::mem::take(&mut *storage.committed.lock().expect("no panic holds it"));
        for (sender, framed) in committed {
            if let Some(peer) = &mut self.peers[sender]
                && peer.queue(&framed)
            {
                self.dirty.push(sender);
            }
        }
    }
}

impl Storage {
    fn open(log: &str, waker: Waker) -> Result<Self> {
        let (rows, waiting) = mpsc::channel::<Receipt>();
        let committed = Arc::<Mutex<Vec<Receipt>>>::default();
        let storage = Self {
            rows,
            committed: Arc::clone(&committed),
        };
        let mut log = Log::open(log)?;
        std::thread::spawn(move || -> Result<()> {
            while let Ok(first) = waiting.recv() {
                let batch: Vec<Receipt> =
                    std::iter::once(first).chain(waiting.try_iter()).collect();
                let rows: Vec<&[u8]> = batch.iter().map(|(_, framed)| framed.as_slice()).collect();
                log.append(&rows)?;
                committed.lock().expect("no panic holds it").extend(batch);
                waker.wake()?;
            }
            Ok(())
        });
        Ok(storage)
    }
}

fn read(peer: &mut Peer, scratch: &mut [u8]) -> bool {
    loop {
        match peer.stream.read(scratch) {
            Ok(0) => return false,
            Ok(count) => peer.input.extend_from_slice(&scratch[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
            Err(_) => return false,
        }
    }
}

fn flush(peer: &mut Peer) {
    let mut written = 0;
    while written < peer.output.len() {
        match peer.stream.write(&peer.output[written..]) {
            Ok(more) if 0 < more => written += more,
            _ => break,
        }
    }
    peer.output.drain(..written);
}

/// A client's frame, masked with zeros.
fn take_frame(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let (header, len) = match input.get(1)? & 0x7f {
        126 => (
            8,
            usize::from(u16::from_be_bytes(*input.get(2..)?.first_chunk()?)),
        ),
        127 => (
            14,
            usize::try_from(u64::from_be_bytes(*input.get(2..)?.first_chunk()?)).ok()?,
        ),
        len => (6, usize::from(len)),
    };
    let payload = input.get(header..header + len)?;
    Some((payload, &input[header + len..]))
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x82];
    if payload.len() < 126 {
        frame.push(u8::try_from(payload.len()).unwrap_or_default());
    } else if let Ok(len) = u16::try_from(payload.len()) {
        frame.push(126);
        frame.extend_from_slice(&len.to_be_bytes());
    } else {
        frame.push(127);
        frame.extend_from_slice(&(payload.len() as u64).to_be_bytes());
    }
    frame.extend_from_slice(payload);
    frame
}
