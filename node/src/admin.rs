//! Health, metrics and the control API, for the cluster and not for clients.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router, middleware};
use collab_core::control::{
    ClusterReport, DrainRequest, FenceRequest, MemberReport, NodeLoad, PinPlacement, PinReport,
    PinRequest, PlacementRequest, TermGranted, TermRefused, TermRequest, ZonesRequest,
};
use collab_core::ids::{NodeId, Slot, Term};
use collab_core::limits::PINS_MAX;
use tokio::time::Instant;

use crate::api::{ApiError, owners};
use crate::auth::bearer;
use crate::documents::Load;
use crate::peers::{self, websocket};
use crate::server::App;

/// `/healthz`, `/readyz` and `/metrics`; they tell nothing about documents and need no token.
pub fn health() -> Router<Arc<App>> {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
}

/// What nodes and the operator ask of each other, behind the control token.
pub fn control(app: &Arc<App>) -> Router<Arc<App>> {
    Router::new()
        .route("/control/v1/report", get(report))
        .route("/control/v1/term", post(term))
        .route("/control/v1/placement", put(placement))
        .route("/control/v1/drain", post(drain))
        .route("/control/v1/load", get(load))
        .route("/control/v1/zones", put(zones))
        .route("/control/v1/pin", post(pin))
        .route("/control/v1/fence", post(fence))
        .route(owners::ASK_PATH, post(owners::answer))
        .route(websocket::STREAM_PATH, get(stream))
        .layer(middleware::from_fn_with_state(app.clone(), authorized))
}

async fn authorized(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    request: Request,
    next: Next,
) -> Response {
    let allowed = match &app.control_token {
        Some(token) => {
            bearer(&headers).is_some_and(|given| same(given.as_bytes(), token.as_bytes()))
        }
        None => true,
    };
    if allowed {
        next.run(request).await
    } else {
        (
            StatusCode::UNAUTHORIZED,
            "the control token is needed: Authorization: Bearer TOKEN\n",
        )
            .into_response()
    }
}

/// Compares in a time that does not tell how much was right.
fn same(given: &[u8], wanted: &[u8]) -> bool {
    given.len() == wanted.len()
        && given
            .iter()
            .zip(wanted)
            .fold(0, |differs, (a, b)| differs | (a ^ b))
            == 0
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    let reason = if app.members.is_draining() {
        "draining"
    } else if !app.members.lease_held() {
        "the lease is not held: the store does not answer"
    } else if app
        .members
        .map()
        .slots()
        .iter()
        .all(|row| row.owner.is_none())
    {
        "no slot has an owner yet"
    } else {
        return "ready\n".into_response();
    };
    (
        StatusCode::SERVICE_UNAVAILABLE,
        format!("not ready: {reason}\n"),
    )
        .into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        app.metrics.render(),
    )
}

async fn report(State(app): State<Arc<App>>) -> Result<Json<ClusterReport>, ApiError> {
    // From the store, not from the map, which may not yet have what the operator asked for a moment ago.
    let (summary, placement) = futures::try_join!(app.store.summary(), app.store.placement())?;
    let map = app.members.map();
    let quarantined = map.quarantined(Instant::now());
    let mut members: Vec<_> = map.members().cloned().collect();
    members.sort_by(|a, b| (&a.node, a.incarnation).cmp(&(&b.node, b.incarnation)));
    let index = |incarnation| {
        let index = members
            .iter()
            .position(|member| Some(member.incarnation) == incarnation);
        index.and_then(|index| u16::try_from(index).ok())
    };
    let owners: Vec<Option<u16>> = map.slots().iter().map(|row| index(row.owner)).collect();
    let by_name = |node: &NodeId| {
        let named = || {
            (0..)
                .zip(&members)
                .filter(|(_, member)| member.node == *node)
        };
        let live = named().find(|(_, member)| !member.lease_left.is_zero());
        live.or_else(|| named().next()).map(|(index, _)| index)
    };
    let planned_at = |slot: Slot| by_name(placement.slots.get(usize::from(slot.0))?);
    let planned = if placement.slots.is_empty() {
        Vec::new()
    } else {
        map.slots().iter().map(|row| planned_at(row.slot)).collect()
    };
    let pins: Vec<PinReport> = map
        .pins()
        .map(|(row, document)| PinReport {
            document: document.clone(),
            slot: row.slot,
            owner: index(row.owner),
            planned: planned_at(row.slot),
        })
        .collect();
    let owned = |index: usize| {
        let of_pins = pins.iter().map(|pin| &pin.owner);
        let owned = owners
            .iter()
            .chain(of_pins)
            .filter(|owner| owner.map(usize::from) == Some(index))
            .count();
        u16::try_from(owned).unwrap_or(u16::MAX)
    };
    let reports = members
        .iter()
        .enumerate()
        .map(|(index, member)| MemberReport {
            node: member.node.clone(),
            incarnation: member.incarnation,
            pod_uid: member.pod_uid.clone(),
            address: member.address.clone(),
            zone: member.zone.clone(),
            state: member.state,
            live: !member.lease_left.is_zero(),
            slots_owned: owned(index),
            load: member.load.clone(),
            load_age_ms: u64::try_from(member.load_age.as_millis()).unwrap_or(u64::MAX),
            quarantine: quarantined.get(&member.node).copied(),
        });
    Ok(Json(ClusterReport {
        reporter: app.members.node().clone(),
        term: summary.term,
        slots: app.members.slots(),
        members: reports.collect(),
        moving: map.misplaced(),
        owners,
        planned,
        pins,
        revision: u64::try_from(summary.revision).unwrap_or_default(),
        store: summary.store,
        redis: app.bus.is_up().await,
        adoptions: summary.adoptions,
    }))
}

async fn term(
    State(app): State<Arc<App>>,
    Json(request): Json<TermRequest>,
) -> Result<Json<TermGranted>, ApiError> {
    let term = app.store.take_term(&request.holder).await?;
    Ok(Json(TermGranted { term }))
}

async fn placement(
    State(app): State<Arc<App>>,
    Json(request): Json<PlacementRequest>,
) -> Result<Response, ApiError> {
    let slots = usize::from(app.members.slots());
    if request.slots.len() != slots {
        let given = request.slots.len();
        return Err(ApiError::Bad(format!(
            "the placement has {given} slots, this cluster has {slots}"
        )));
    }
    let Some(named) = by_slot(&request) else {
        return Err(ApiError::Bad(
            "a slot names a node beyond the end of nodes, or a pin has the number of an ordinary slot".to_owned(),
        ));
    };
    Ok(unless_refused(
        app.store.set_placement(request.term, &named).await?,
    ))
}

/// The node of each slot, virtual slots after the others; those that are not spoken of have an empty name.
fn by_slot(request: &PlacementRequest) -> Option<Vec<NodeId>> {
    let node = |index: u16| request.nodes.get(usize::from(index)).cloned();
    let mut named: Vec<NodeId> = request
        .slots
        .iter()
        .map(|index| node(*index))
        .collect::<Option<_>>()?;
    for PinPlacement { slot, node: index } in &request.pins {
        let number = usize::from(slot.0);
        if number < request.slots.len() {
            return None;
        }
        named.resize(named.len().max(number + 1), NodeId::default());
        named[number] = node(*index)?;
    }
    Some(named)
}

async fn drain(
    State(app): State<Arc<App>>,
    Json(request): Json<DrainRequest>,
) -> Result<Response, ApiError> {
    Ok(unless_refused(
        app.store
            .set_drain(request.term, &request.node, request.drain)
            .await?,
    ))
}

async fn load(State(app): State<Arc<App>>) -> Json<NodeLoad> {
    let Load { slots, documents } = app.documents.load();
    Json(NodeLoad {
        incarnation: app.members.incarnation(),
        slots,
        documents,
    })
}

async fn zones(
    State(app): State<Arc<App>>,
    Json(request): Json<ZonesRequest>,
) -> Result<Response, ApiError> {
    Ok(unless_refused(
        app.store.set_zones(request.term, &request.zones).await?,
    ))
}

async fn fence(
    State(app): State<Arc<App>>,
    Json(request): Json<FenceRequest>,
) -> Result<Response, ApiError> {
    let FenceRequest { term, incarnation } = request;
    Ok(unless_refused(app.store.fence(term, incarnation).await?))
}

async fn pin(
    State(app): State<Arc<App>>,
    Json(request): Json<PinRequest>,
) -> Result<Response, ApiError> {
    let PinRequest {
        term,
        document,
        pin,
    } = request;
    let home = app.members.home_of(&document);
    if !pin {
        return Ok(unless_refused(
            app.store.unpin(term, &document, home).await?,
        ));
    }
    if PINS_MAX <= app.members.map().pins().count() {
        return Err(ApiError::Bad(format!(
            "{PINS_MAX} documents have a slot of their own already; unpin one"
        )));
    }
    Ok(unless_refused(app.store.pin(term, &document, home).await?))
}

fn unless_refused(done: Result<(), Term>) -> Response {
    match done {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(current) => (StatusCode::CONFLICT, Json(TermRefused { current })).into_response(),
    }
}

async fn stream(State(app): State<Arc<App>>, upgrade: axum::extract::WebSocketUpgrade) -> Response {
    let upgrade = upgrade
        .max_message_size(websocket::STREAM_MESSAGE_BYTES_MAX)
        .max_frame_size(websocket::STREAM_MESSAGE_BYTES_MAX);
    let incarnation = app.members.incarnation().to_string();
    let upgraded = upgrade.on_upgrade(move |socket| {
        let link = websocket::accepted(socket);
        peers::serve(link, app.documents.clone(), app.metrics.clone())
    });
    ([(websocket::INCARNATION_HEADER, incarnation)], upgraded).into_response()
}
