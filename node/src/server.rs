//! Router, listeners, graceful stop.

use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::ListenerExt;
use collab_core::control::LoadSample;
use collab_core::ids::DocumentId;
use futures::StreamExt;
use serde::Deserialize;
use tokio::net::{TcpListener, TcpSocket};
use tokio::time::{Instant, sleep};
use tower::ServiceExt;
use tower_http::set_header::SetResponseHeaderLayer;

use crate::admin;
use crate::api::owners::Owners;
use crate::api::{self, ApiError};
use crate::auth::issuer::Issuer;
use crate::auth::{Auth, bearer};
use crate::bus::Bus;
use crate::bus::memory::NoBus;
use crate::bus::redis::RedisBus;
use crate::config::{Config, Storage};
use crate::documents::Documents;
use crate::edge::{Admitted, Edge, Family, Gate};
use crate::listener;
use crate::members::Members;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::node::{Node, Surroundings};
use crate::origin::{self, Origins};
use crate::page;
use crate::peers::websocket::WebSocketDial;
use crate::store::postgres::Postgres;
use crate::store::sqlite::Sqlite;
use crate::store::{Registration, Store, StoreError};
use crate::tasks::Tasks;
use crate::websocket::Upgrade;

/// Between two tries to reach a database that does not answer yet.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// Connections that may wait to be accepted; the system may allow fewer. After a failover thousands come at once, and who
/// finds no room tries again a second later at the earliest.
const BACKLOG: u32 = 4096;
/// Between two samples of the load.
const LOAD_EVERY: Duration = Duration::from_millis(500);

/// What every request may need.
pub struct App {
    /// Checks client tokens.
    pub auth: Auth,
    /// Token of the control API; without it the API is on loopback only.
    pub control_token: Option<String>,
    /// Durable storage.
    pub store: Arc<dyn Store>,
    /// Forgetful storage.
    pub bus: Arc<dyn Bus>,
    /// This node among the others.
    pub members: Arc<Members>,
    /// The documents owned and open here.
    pub documents: Arc<Documents>,
    /// Finds the owner of any document.
    pub owners: Owners,
    /// The sockets of clients.
    pub edge: Arc<Edge>,
    /// What is counted.
    pub metrics: Metrics,
}

/// Runs a node until it is told to stop (SIGTERM, SIGINT) or cannot go on.
///
/// # Errors
/// When it cannot start, or a task that must not end has ended.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let metrics = Metrics::new();
    let listener = bind(config.listen)?;
    let internal = match config.internal_listen {
        Some(address) => Some(bind(address)?),
        None => None,
    };
    // A node that waits for its database is alive, though not ready.
    let late = Late::default();
    let internal = internal.map(|internal| tokio::spawn(serve(internal, late.router())));
    let store = open_store(&config).await?;
    let bus: Arc<dyn Bus> = match &config.redis {
        Some(url) => Arc::new(RedisBus::new(url, metrics.clone()).context("the URL of Redis")?),
        None => Arc::new(NoBus),
    };
    let registration = Registration {
        node: config.node.clone(),
        incarnation: config.incarnation,
        pod_uid: config.pod_uid.clone(),
        address: config.advertise.clone(),
        zone: config.zone.clone(),
        weight: 100,
    };
    let (node, mut running) = Node::start(Surroundings {
        store: store.clone(),
        bus: bus.clone(),
        dial: Arc::new(WebSocketDial {
            token: config.control_token.clone(),
        }),
        registration,
        slots: config.slots,
        alone: matches!(config.storage, Storage::Embedded(_)),
        memory: Memory::of_this_process(config.memory_budget),
        metrics: metrics.clone(),
        tasks: Tasks::default(),
        seed: rand::random(),
    });
    let owners = Owners::new(
        node.documents.clone(),
        node.members.clone(),
        config.control_token.clone(),
    )?;
    let issuer = config.issuer.clone().map(Issuer::new).transpose();
    let issuer = issuer.context("the certificates of this system")?;
    if let Some(issuer) = issuer.clone() {
        running.push(tokio::spawn(async move {
            issuer.keep_keys().await;
            Ok(())
        }));
    }
    let app = Arc::new(App {
        auth: Auth::new(config.auth_secret.as_deref(), issuer),
        control_token: config.control_token.clone(),
        store,
        bus,
        members: node.members,
        documents: node.documents,
        owners,
        edge: node.edge,
        metrics,
    });

    let with_health = config.internal_listen.is_none();
    late.set(
        admin::health()
            .merge(admin::control(&app))
            .with_state(app.clone()),
    );
    running.extend(internal);
    running.push(tokio::spawn(sample_load(app.clone())));
    let router = public(&app, with_health, config.origins.clone());
    let places = config.places.within_open_files();
    running.push(tokio::spawn(async move {
        listener::serve(listener, router, places, app.metrics.clone()).await;
        Ok(())
    }));
    say_hello(&config);
    let stop = tokio::select! {
        ended = running.next() => match ended {
            Some(Ok(Err(error))) => Err(error),
            Some(Err(error)) => Err(error.into()),
            Some(Ok(Ok(()))) | None => Err(anyhow::anyhow!("a task ended unasked")),
        },
        () = told_to_stop() => Ok(()),
    };
    if stop.is_ok() {
        tracing::info!("stopping: handing over what is owned");
        node.handoff.leave().await;
    }
    stop
}

async fn open_store(config: &Config) -> anyhow::Result<Arc<dyn Store>> {
    Ok(match &config.storage {
        Storage::Embedded(folder) => Arc::new(Sqlite::open(folder).await?),
        Storage::Cluster(url) => loop {
            match Postgres::connect_as(url, config.incarnation).await {
                Ok(store) => break Arc::new(store),
                Err(StoreError::Unavailable(error)) => {
                    tracing::warn!(%error, "the database does not answer yet; trying again");
                    sleep(STORE_RETRY).await;
                }
                Err(error) => return Err(error.into()),
            }
        },
    })
}

/// What clients reach.
fn public(app: &Arc<App>, with_health: bool, origins: Origins) -> Router {
    let router = Router::new()
        .route("/ws/{*document}", get(y_websocket))
        .route("/hocuspocus", get(hocuspocus))
        .route("/d/{document}/ws/{again}", get(y_sweet))
        .merge(page::router())
        .fallback_service(api_when_asked(app.clone()));
    let router = if with_health {
        router.merge(admin::health())
    } else {
        router
    };
    let nosniff = SetResponseHeaderLayer::if_not_present(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    let same_page = middleware::from_fn_with_state(Arc::new(origins), origin::check);
    router
        .layer(same_page)
        .layer(nosniff)
        .with_state(app.clone())
}

/// The API, made for the first who asks: with its description that takes a tenth of what a node needs to start, and
/// after a crash sockets wait for it.
fn api_when_asked(app: Arc<App>) -> Router {
    let api = Arc::new(LazyLock::new(move || api::router().with_state(app)));
    Router::new().fallback(move |request: Request| {
        let router = Router::clone(&api);
        router.oneshot(request)
    })
}

#[derive(Debug, Deserialize)]
struct SocketQuery {
    token: Option<String>,
}

async fn y_websocket(
    State(app): State<Arc<App>>,
    Path(document): Path<String>,
    Query(query): Query<SocketQuery>,
    headers: HeaderMap,
    upgrade: Upgrade,
) -> Response {
    let serve = one_document(&app, &document, &query, &headers);
    serve.map_or_else(IntoResponse::into_response, |(document, admitted)| {
        let edge = app.edge.clone();
        upgrade.on_upgrade(move |socket, direct| {
            edge.serve(socket, Some(direct), document, admitted, Family::YWebsocket)
        })
    })
}

/// y-sweet's client puts the id behind an address that has it already.
async fn y_sweet(
    State(app): State<Arc<App>>,
    Path((document, again)): Path<(String, String)>,
    Query(query): Query<SocketQuery>,
    headers: HeaderMap,
    upgrade: Upgrade,
) -> Response {
    let serve = if document == again {
        one_document(&app, &document, &query, &headers)
    } else {
        let error = format!("the address is for {document} and for {again}");
        Err(ApiError::Bad(error))
    };
    serve.map_or_else(IntoResponse::into_response, |(document, admitted)| {
        let edge = app.edge.clone();
        upgrade.on_upgrade(move |socket, direct| {
            edge.serve(socket, Some(direct), document, admitted, Family::YSweet)
        })
    })
}

fn one_document(
    app: &App,
    document: &str,
    query: &SocketQuery,
    headers: &HeaderMap,
) -> Result<(DocumentId, Admitted), ApiError> {
    let document = DocumentId::new(document).map_err(|error| ApiError::Bad(error.to_string()))?;
    let claims = app.auth.claims(headers, query.token.as_deref())?;
    claims.to_read(&document)?;
    let until = claims.time_left().map(|left| Instant::now() + left);
    let visitor = claims.visitor();
    Ok((document, Admitted { visitor, until }))
}

/// Hocuspocus' provider brings its tokens inside the socket; one in the request stands in for those it leaves empty.
async fn hocuspocus(
    State(app): State<Arc<App>>,
    Query(query): Query<SocketQuery>,
    headers: HeaderMap,
    upgrade: Upgrade,
) -> Response {
    let edge = app.edge.clone();
    let fallback = bearer(&headers).map(str::to_owned).or(query.token);
    let gate: Gate = Arc::new(move |document, token| {
        let token = Some(token).filter(|token| !token.is_empty());
        let claims = app.auth.check(token.or(fallback.as_deref()));
        let admitted = claims.and_then(|claims| {
            claims.to_read(document)?;
            let until = claims.time_left().map(|left| Instant::now() + left);
            let visitor = claims.visitor();
            Ok(Admitted { visitor, until })
        });
        admitted.map_err(|error| error.to_string())
    });
    upgrade.on_upgrade(move |socket, direct| edge.serve_hocuspocus(socket, Some(direct), gate))
}

/// Routes that come once there is something behind them; until then only "alive" is answered.
#[derive(Clone, Default)]
struct Late(Arc<OnceLock<Router>>);

impl Late {
    fn set(&self, router: Router) {
        let _ = self.0.set(router);
    }

    fn router(&self) -> Router {
        let late = self.clone();
        Router::new().fallback(move |request: Request| async move {
            match late.0.get() {
                Some(router) => router.clone().oneshot(request).await.into_response(),
                None if request.uri().path() == "/healthz" => "ok\n".into_response(),
                None => {
                    let reason = "not ready: the database does not answer yet\n";
                    (StatusCode::SERVICE_UNAVAILABLE, reason).into_response()
                }
            }
        })
    }
}

fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listen = || {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        // A node that is started again need not wait until the system has forgotten the connections of the one before.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listen().with_context(|| {
        format!("cannot listen on {address}; choose another address with --listen")
    })
}

async fn serve(listener: TcpListener, router: Router) -> anyhow::Result<()> {
    let listener = listener.tap_io(|stream| {
        // Small frames must not wait for the acknowledgement of earlier ones.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "no TCP_NODELAY");
        }
    });
    Ok(axum::serve(listener, router).await?)
}

async fn sample_load(app: Arc<App>) -> anyhow::Result<()> {
    loop {
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        app.members.set_load(LoadSample {
            connections: count(app.edge.connections()),
            documents: count(app.documents.count()),
            degraded: count(app.documents.degraded()),
            resident_bytes: resident_bytes(),
            silences: Vec::new(), // of which the members tell
        });
        sleep(LOAD_EVERY).await;
    }
}

/// Resident memory of this process; 0 where the system does not tell.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}

fn say_hello(config: &Config) {
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        node = %config.node,
        "listening on http://{}", config.listen
    );
    if config.auth_secret.is_none() && config.issuer.is_none() {
        tracing::warn!(
            "authentication is off: whoever reaches {} reads and writes every document",
            config.listen
        );
    }
}

async fn told_to_stop() {
    let terminated = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            Err(error) => {
                tracing::error!(%error, "SIGTERM cannot be caught");
                std::future::pending::<()>().await;
            }
        }
    };
    let interrupted = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = terminated => {}
        () = interrupted => {}
    }
}
