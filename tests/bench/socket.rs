//! A WebSocket client that costs next to nothing: it never blocks, masks with zeros (RFC 6455 section 5.3 leaves the key
//! to the client) and keeps only the beginning of what is large.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;

use anyhow::{Result, bail};
use mio::net::TcpStream;

/// A message longer than this is counted, not kept.
const KEPT_BYTES_MAX: usize = 256 * 1024;
/// What is kept of it.
const HEAD_BYTES: usize = 32;

/// One connection.
pub(crate) struct Socket {
    pub(crate) stream: TcpStream,
    input: Vec<u8>,
    /// How much of `input` was taken.
    taken: usize,
    output: Vec<u8>,
    state: State,
    /// The message that is coming in pieces.
    partial: Option<Partial>,
}

enum State {
    /// The upgrade was asked for.
    Opening,
    Open,
}

struct Partial {
    head: Vec<u8>,
    len: usize,
    /// Bytes of the present frame that are still to come.
    missing: usize,
    last: bool,
}

/// What arrived.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// The socket is open.
    Open,
    /// A whole message lies in the input.
    Message(std::ops::Range<usize>),
    /// A large message is complete: its beginning and its length.
    Large(Vec<u8>, usize),
    /// The server closed.
    Closed(u16),
}

impl Socket {
    pub(crate) fn connect(address: SocketAddr, path: &str) -> Result<Self> {
        let stream = TcpStream::connect(address)?;
        let output = format!(
            "GET {path} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        );
        Ok(Self {
            stream,
            input: Vec::new(),
            taken: 0,
            output: output.into_bytes(),
            state: State::Opening,
            partial: None,
        })
    }

    /// Queues a binary message that `write` writes.
    pub(crate) fn send(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        // Room for the longest header; it is moved up to the payload afterwards.
        let start = self.output.len();
        self.output.extend_from_slice(&[0; 14]);
        write(&mut self.output);
        let len = self.output.len() - start - 14;
        let mut header = [0_u8; 14];
        header[0] = 0x82;
        let used = if len < 126 {
            header[1] = 0x80 | u8::try_from(len).expect("less than 126");
            2
        } else if let Ok(len) = u16::try_from(len) {
            header[1] = 0x80 | 0x7e;
            header[2..4].copy_from_slice(&len.to_be_bytes());
            4
        } else {
            header[1] = 0x80 | 0x7f;
            header[2..10].copy_from_slice(&(len as u64).to_be_bytes());
            10
        };
        let used = used + 4;
        self.output.copy_within(start + 14.., start + used);
        self.output[start..start + used].copy_from_slice(&header[..used]);
        self.output.truncate(start + used + len);
    }

    /// Writes what is queued, as far as the system takes it.
    pub(crate) fn flush(&mut self) -> Result<()> {
        let mut written = 0;
        while written < self.output.len() {
            match self.stream.write(&self.output[written..]) {
                Ok(0) => bail!("the server took nothing"),
                Ok(more) => written += more,
                Err(error)
                    if error.kind() == ErrorKind::WouldBlock
                        || error.kind() == ErrorKind::NotConnected =>
                {
                    break;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.output.drain(..written);
        Ok(())
    }

    /// Reads all there is. `false`: the server has closed.
    pub(crate) fn fill(&mut self, scratch: &mut [u8]) -> bool {
        if self.taken == self.input.len() {
            self.input.clear();
        } else if 0 < self.taken {
            self.input.drain(..self.taken);
        }
        self.taken = 0;
        loop {
            match self.stream.read(scratch) {
                Ok(0) => return false,
                Ok(count) => {
                    let rest = self.skip(&scratch[..count]);
                    self.input.extend_from_slice(&scratch[count - rest..count]);
                    // What is there is handled before more is read: else the last socket waits for the first.
                    if count < scratch.len() {
                        return true;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }

    /// Counts bytes of a large message without keeping them; answers how many are left.
    fn skip(&mut self, bytes: &[u8]) -> usize {
        match &mut self.partial {
            Some(partial) if self.input.is_empty() && 0 < partial.missing => {
                let skipped = partial.missing.min(bytes.len());
                partial.missing -= skipped;
                bytes.len() - skipped
            }
            _ => bytes.len(),
        }
    }

    pub(crate) fn payload(&self, range: std::ops::Range<usize>) -> &[u8] {
        &self.input[range]
    }

    /// The next thing that has arrived.
    pub(crate) fn next(&mut self) -> Option<Arrival> {
        if let State::Opening = self.state {
            let end = self.input[self.taken..]
                .windows(4)
                .position(|window| window == b"\r\n\r\n")?;
            let accepted = self.input[self.taken..].starts_with(b"HTTP/1.1 101");
            self.taken += end + 4;
            self.state = State::Open;
            return Some(if accepted {
                Arrival::Open
            } else {
                Arrival::Closed(0)
            });
        }
        loop {
            if let Some(partial) = &mut self.partial {
                let here = partial.missing.min(self.input.len() - self.taken);
                partial.missing -= here;
                self.taken += here;
                if 0 < partial.missing {
                    return None;
                }
                if partial.last {
                    let Partial { head, len, .. } = self.partial.take()?;
                    return Some(Arrival::Large(head, len));
                }
            }
            let input = &self.input[self.taken..];
            let (&first, &second) = (input.first()?, input.get(1)?);
            let (header, len) = match second & 0x7f {
                126 => (
                    4,
                    usize::from(u16::from_be_bytes([*input.get(2)?, *input.get(3)?])),
                ),
                127 => {
                    let len = input.get(2..10)?;
                    (
                        10,
                        usize::try_from(u64::from_be_bytes(len.try_into().ok()?)).ok()?,
                    )
                }
                len => (2, usize::from(len)),
            };
            let last = first & 0x80 != 0;
            match first & 0x0f {
                0 | 2 if last && self.partial.is_none() && len <= KEPT_BYTES_MAX => {
                    if input.len() < header + len {
                        return None;
                    }
                    let start = self.taken + header;
                    self.taken = start + len;
                    return Some(Arrival::Message(start..start + len));
                }
                0 | 2 => {
                    if input.len() < header + len.min(HEAD_BYTES) {
                        return None;
                    }
                    let head = input[header..header + len.min(HEAD_BYTES)].to_vec();
                    self.taken += header;
                    let partial = self.partial.get_or_insert(Partial {
                        head,
                        len: 0,
                        missing: 0,
                        last,
                    });
                    partial.len += len;
                    partial.missing = len;
                    partial.last = last;
                }
                opcode => {
                    if input.len() < header + len {
                        return None;
                    }
                    let payload = input[header..header + len].to_vec();
                    self.taken += header + len;
                    match opcode {
                        8 => {
                            let code = payload
                                .first_chunk()
                                .map_or(1005, |code| u16::from_be_bytes(*code));
                            return Some(Arrival::Closed(code));
                        }
                        9 => {
                            let start = self.output.len();
                            self.send(|out| out.extend_from_slice(&payload));
                            self.output[start] = 0x8a;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
}
