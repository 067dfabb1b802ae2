//! A TCP proxy that hurts: it delays, stalls, cuts, swallows and slows what passes, in either direction, from one
//! moment to the next and for connections that are open already.

use anyhow::Result;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// What happens to bytes that go one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Treatment {
    /// They pass.
    #[default]
    Pass,
    /// They pass later.
    Delay(Duration),
    /// They wait until something else is to happen to them.
    Stall,
    /// They are taken and never seen again, also after this ends: the connection is spoiled.
    Swallow,
    /// They pass at so many bytes per second.
    Rate(u32),
}

/// How connections are treated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct State {
    /// What goes to the server.
    forth: Treatment,
    /// What comes from the server.
    back: Treatment,
    /// Connections that were open when this was raised are reset.
    resets: u64,
    /// New connections are refused.
    refuse: bool,
    target: Option<SocketAddr>,
}

/// A running proxy; it ends, with its connections, when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    state: Arc<watch::Sender<State>>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free port of `address` and passes everything on to `target`.
    ///
    /// # Errors
    /// When nothing can be bound there.
    pub async fn start(address: IpAddr, target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((address, 0)).await?;
        let address = listener.local_addr()?;
        let state = Arc::new(watch::Sender::new(State {
            target: Some(target),
            ..State::default()
        }));
        let task = tokio::spawn(accept(listener, state.clone()));
        Ok(Self {
            address,
            state,
            task,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on: `forth` happens to what goes to the server, `back` to what comes from it.
    pub fn treat(&self, forth: Treatment, back: Treatment) {
        self.state
            .send_modify(|state| (state.forth, state.back) = (forth, back));
    }

    /// Resets (RST) the connections that are open.
    pub fn reset(&self) {
        self.state.send_modify(|state| state.resets += 1);
    }

    /// Whether new connections are refused, by a reset.
    pub fn refuse(&self, refuse: bool) {
        self.state.send_modify(|state| state.refuse = refuse);
    }

    /// New connections go there; the open ones are reset.
    pub fn retarget(&self, target: SocketAddr) {
        self.state.send_modify(|state| {
            state.target = Some(target);
            state.resets += 1;
        });
    }

    /// Everything passes again.
    pub fn heal(&self) {
        self.treat(Treatment::Pass, Treatment::Pass);
        self.refuse(false);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, state: Arc<watch::Sender<State>>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok((client, _)) = listener.accept().await else {
            continue;
        };
        let watched = state.subscribe();
        connections.spawn(connection(client, watched));
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(mut client: TcpStream, mut state: watch::Receiver<State>) {
    let (target, resets, refuse) = {
        let state = state.borrow_and_update();
        (state.target, state.resets, state.refuse)
    };
    let server = match target {
        Some(target) if !refuse => TcpStream::connect(target).await.ok(),
        _ => None,
    };
    let Some(mut server) = server else {
        reset(client);
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let was_reset = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let forth = pump(from_client, to_server, state.clone(), |state| state.forth);
        let back = pump(from_server, to_client, state.clone(), |state| state.back);
        tokio::select! {
            _ = async { tokio::join!(forth, back) } => false,
            _ = state.wait_for(|state| resets < state.resets) => true,
        }
    };
    if was_reset {
        reset(client);
        reset(server);
    }
}

/// Moves bytes until either end is closed.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut state: watch::Receiver<State>,
    way: fn(&State) -> Treatment,
) {
    let mut buffer = vec![0; 64 * 1024];
    let mut spoiled = false;
    loop {
        let count = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        let mut sent = 0;
        while sent < count {
            let treatment = way(&state.borrow_and_update());
            spoiled |= treatment == Treatment::Swallow;
            if spoiled {
                break;
            }
            let part = match treatment {
                Treatment::Stall => {
                    if state.changed().await.is_err() {
                        return;
                    }
                    continue;
                }
                Treatment::Delay(delay) => {
                    sleep(delay).await;
                    count
                }
                Treatment::Rate(rate) => {
                    sleep(Duration::from_millis(100)).await;
                    count.min(sent + (rate as usize / 10).max(1))
                }
                Treatment::Pass | Treatment::Swallow => count,
            };
            if to.write_all(&buffer[sent..part]).await.is_err() {
                return;
            }
            sent = part;
        }
    }
    if !spoiled {
        let _ = to.shutdown().await;
    }
}

/// Closes a connection so that the other side sees a reset.
fn reset(stream: TcpStream) {
    let _ = stream.set_zero_linger();
    drop(stream);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use tokio::time::{Instant, timeout};

    const SOON: Duration = Duration::from_millis(200);

    #[tokio::test]
    async fn bytes_pass_wait_or_vanish() {
        let (proxy, mut client) = echo().await;
        assert_eq!(say(&mut client, b"one").await.as_deref(), Some(&b"one"[..]));
        proxy.treat(Treatment::Pass, Treatment::Delay(SOON));
        let begun = Instant::now();
        assert!(say(&mut client, b"two").await.is_some() && SOON <= begun.elapsed());
        proxy.treat(Treatment::Stall, Treatment::Pass);
        assert_eq!(say(&mut client, b"three").await, None);
        proxy.heal();
        assert_eq!(hear(&mut client).await.as_deref(), Some(&b"three"[..]));
        proxy.treat(Treatment::Pass, Treatment::Swallow);
        assert_eq!(say(&mut client, b"four").await, None);
        proxy.heal();
        assert_eq!(say(&mut client, b"five").await, None);
    }

    #[tokio::test]
    async fn connections_are_reset_and_refused() {
        let (proxy, mut client) = echo().await;
        say(&mut client, b"one").await;
        proxy.reset();
        let error = client.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        proxy.refuse(true);
        let mut refused = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(refused.read(&mut [0; 8]).await.is_err());
        proxy.heal();
        let mut again = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(say(&mut again, b"two").await.is_some());
    }

    async fn echo() -> (Proxy, TcpStream) {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let server = TcpListener::bind((loopback, 0)).await.unwrap();
        let target = server.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = server.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        let proxy = Proxy::start(loopback, target).await.unwrap();
        let client = TcpStream::connect(proxy.address()).await.unwrap();
        (proxy, client)
    }

    async fn say(client: &mut TcpStream, words: &[u8]) -> Option<Vec<u8>> {
        client.write_all(words).await.unwrap();
        hear(client).await
    }

    async fn hear(client: &mut TcpStream) -> Option<Vec<u8>> {
        let mut buffer = [0; 64];
        let count = timeout(2 * SOON, client.read(&mut buffer))
            .await
            .ok()?
            .ok()?;
        Some(buffer[..count].to_vec())
    }
}
