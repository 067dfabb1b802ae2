//! `/api/v1/documents`: create, list, read, delete.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use collab_core::ids::DocumentId;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::owners::{Reply, Request};
use super::{ApiError, ErrorBody};
use crate::auth::Claims;
use crate::server::App;
use crate::store::DocumentRow;

const LIST_LIMIT_DEFAULT: u32 = 100;
const LIST_LIMIT_MAX: u32 = 1_000;

/// The routes of this resource.
pub fn router() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(read, delete))
        .routes(routes!(text))
        .routes(routes!(update))
        .routes(routes!(presence))
}

/// A document.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DocumentBody {
    /// Its name.
    id: String,
    /// When it was created, in milliseconds since 1970 (UTC).
    created_at: i64,
    /// When it was changed last, in milliseconds since 1970 (UTC).
    updated_at: i64,
    /// Position of its last change in its log.
    seq: i64,
}

impl From<DocumentRow> for DocumentBody {
    fn from(row: DocumentRow) -> Self {
        Self {
            id: row.id.into(),
            created_at: row.created_ms,
            updated_at: row.updated_ms,
            seq: row.seq.0,
        }
    }
}

/// A page of the list of documents.
#[derive(Debug, Serialize, ToSchema)]
pub struct ListBody {
    /// In order of id.
    documents: Vec<DocumentBody>,
    /// Pass it as `after` to get the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// What to list.
#[derive(Debug, Deserialize, IntoParams)]
pub struct ListQuery {
    /// At most so many, 1 to 1000; 100 by default.
    limit: Option<u32>,
    /// Only those after this id.
    after: Option<String>,
    /// Token, for clients that cannot send a header.
    token: Option<String>,
}

/// A document to create.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct CreateBody {
    /// Its name; a random one without it.
    id: Option<String>,
}

/// The client's presence states.
#[derive(Debug, Serialize, ToSchema)]
pub struct PresenceBody {
    /// One per client that is there.
    clients: Vec<ClientBody>,
}

/// The presence of one client.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClientBody {
    /// Its Yjs client id.
    client_id: u64,
    /// What it says of itself.
    state: serde_json::Value,
}

/// Parameters of every request about one document.
#[derive(Debug, Deserialize, IntoParams)]
pub struct OneQuery {
    /// Token, for clients that cannot send a header.
    token: Option<String>,
    /// Name of the `Y.Text`; `quill` by default.
    name: Option<String>,
}

/// Lists documents.
#[utoipa::path(get, path = "/api/v1/documents", params(ListQuery),
    responses((status = 200, body = ListBody), (status = 401, body = ErrorBody)))]
async fn list(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Query(query): Query<ListQuery>,
) -> Result<Json<ListBody>, ApiError> {
    let claims = app.auth.claims(&headers, query.token.as_deref())?;
    let limit = query.limit.unwrap_or(LIST_LIMIT_DEFAULT);
    if !(1..=LIST_LIMIT_MAX).contains(&limit) {
        return Err(ApiError::Bad(format!(
            "limit {limit} is not from 1 to {LIST_LIMIT_MAX}"
        )));
    }
    let after = query.after.as_deref().map(id).transpose()?;
    let rows = app.store.documents(after.as_ref(), limit).await?;
    let full = rows.len() == limit as usize;
    let next = rows
        .last()
        .filter(|_| full)
        .map(|row| row.id.as_str().to_owned());
    let visible = rows.into_iter().filter(|row| claims.covers(&row.id));
    Ok(Json(ListBody {
        documents: visible.map(DocumentBody::from).collect(),
        next,
    }))
}

/// Creates a document. A name that was deleted begins a new, empty life.
#[utoipa::path(post, path = "/api/v1/documents", request_body = CreateBody,
    responses((status = 201, body = DocumentBody), (status = 409, body = ErrorBody)))]
async fn create(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Option<Json<CreateBody>>,
) -> Result<impl IntoResponse, ApiError> {
    let claims = app.auth.claims(&headers, None)?;
    let wanted = body.and_then(|Json(body)| body.id);
    let document = id(&wanted.unwrap_or_else(|| uuid::Uuid::new_v4().to_string()))?;
    claims.to_write(&document)?;
    if app.owners.ask(&document, Request::Create).await? == Reply::Exists {
        Err(ApiError::Conflict(format!(
            "a document named {document} exists; choose another id"
        )))
    } else {
        let row = row(&app, &document).await?;
        Ok((StatusCode::CREATED, Json(DocumentBody::from(row))))
    }
}

/// Tells about a document.
#[utoipa::path(get, path = "/api/v1/documents/{id}", params(("id" = String, Path), OneQuery),
    responses((status = 200, body = DocumentBody), (status = 404, body = ErrorBody)))]
async fn read(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Path(name): Path<String>,
    Query(query): Query<OneQuery>,
) -> Result<Json<DocumentBody>, ApiError> {
    let (document, _) = readable(&app, &headers, &name, &query)?;
    Ok(Json(row(&app, &document).await?.into()))
}

/// Deletes a document. Clients that have it open are told and keep nothing on the server.
#[utoipa::path(delete, path = "/api/v1/documents/{id}", params(("id" = String, Path), OneQuery),
    responses((status = 204), (status = 404, body = ErrorBody)))]
async fn delete(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Path(name): Path<String>,
    Query(query): Query<OneQuery>,
) -> Result<StatusCode, ApiError> {
    let (document, claims) = readable(&app, &headers, &name, &query)?;
    claims.to_write(&document)?;
    app.owners.ask(&document, Request::Delete).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The text of one `Y.Text`, as far as it is saved.
#[utoipa::path(get, path = "/api/v1/documents/{id}/text", params(("id" = String, Path), OneQuery),
    responses((status = 200, body = String, content_type = "text/plain"), (status = 404, body = ErrorBody)))]
async fn text(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Path(name): Path<String>,
    Query(query): Query<OneQuery>,
) -> Result<impl IntoResponse, ApiError> {
    let (document, _) = readable(&app, &headers, &name, &query)?;
    let name = query.name.unwrap_or_else(|| "quill".to_owned());
    let bytes = app
        .owners
        .ask(&document, Request::Text(name))
        .await?
        .bytes();
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], bytes))
}

/// The whole state as a Yjs update (V1), as far as it is saved.
#[utoipa::path(get, path = "/api/v1/documents/{id}/update", params(("id" = String, Path), OneQuery),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), (status = 404, body = ErrorBody)))]
async fn update(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Path(name): Path<String>,
    Query(query): Query<OneQuery>,
) -> Result<impl IntoResponse, ApiError> {
    let (document, _) = readable(&app, &headers, &name, &query)?;
    let bytes = app.owners.ask(&document, Request::State).await?.bytes();
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes))
}

/// Who has the document open, and what they say of themselves.
#[utoipa::path(get, path = "/api/v1/documents/{id}/presence", params(("id" = String, Path), OneQuery),
    responses((status = 200, body = PresenceBody), (status = 404, body = ErrorBody)))]
async fn presence(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Path(name): Path<String>,
    Query(query): Query<OneQuery>,
) -> Result<Json<PresenceBody>, ApiError> {
    let (document, _) = readable(&app, &headers, &name, &query)?;
    let known = match app.bus.presence(&document).await {
        Some(known) => known,
        None => app
            .owners
            .ask(&document, Request::Presence)
            .await?
            .presence(),
    };
    let clients = known.into_iter().map(|(client_id, state)| ClientBody {
        client_id,
        state: serde_json::from_str(&state).unwrap_or_default(),
    });
    Ok(Json(PresenceBody {
        clients: clients.collect(),
    }))
}

fn readable(
    app: &App,
    headers: &HeaderMap,
    name: &str,
    query: &OneQuery,
) -> Result<(DocumentId, Claims), ApiError> {
    let document = id(name)?;
    let claims = app.auth.claims(headers, query.token.as_deref())?;
    claims.to_read(&document)?;
    Ok((document, claims))
}

pub(super) fn id(name: &str) -> Result<DocumentId, ApiError> {
    DocumentId::new(name).map_err(|error| ApiError::Bad(error.to_string()))
}

pub(super) async fn row(app: &App, document: &DocumentId) -> Result<DocumentRow, ApiError> {
    let row = app.store.document(document).await?;
    row.ok_or_else(|| ApiError::Absent(format!("there is no document {document}")))
}
