//! The requests of y-sweet's SDK: an application's server creates documents and signs tokens for its users.
//!
//! The paths stand where y-sweet has them, not under `/api`. What the SDK gets to open a document with is
//! opaque to it: an address of this cluster and a token like any other.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use bytes::Bytes;
use collab_core::ids::DocumentId;
use collab_core::limits::FRAME_BYTES_MAX;
use collab_core::wire::y_sweet::is_id;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::documents::{id, row};
use super::owners::Request;
use super::{ApiError, ErrorBody};
use crate::auth::Scope;
use crate::server::App;

/// How long a token is valid when nobody asks for another time.
const VALID_SECONDS_DEFAULT: u64 = 3_600;
/// The longest that may be asked for: a token cannot be called back.
const VALID_SECONDS_MAX: u64 = 30 * 24 * 3_600;

/// The routes of the SDK.
pub fn router() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(ready))
        .routes(routes!(check_store))
        .routes(routes!(create))
        .routes(routes!(sign))
        .routes(routes!(as_update))
        .routes(routes!(update))
        .layer(DefaultBodyLimit::max(FRAME_BYTES_MAX))
}

/// All is well.
#[derive(Debug, Serialize, ToSchema)]
pub struct OkBody {
    ok: bool,
}

/// A document to create.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct NewBody {
    /// Letters, digits, `-` and `_`; a random one without it.
    doc_id: Option<String>,
}

/// A document that is there.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CreatedBody {
    doc_id: String,
}

/// Whom a token is for.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SignBody {
    /// What it allows; everything without it.
    authorization: Option<Authorization>,
    /// The user, as the owner of edits and presence.
    user_id: Option<String>,
    /// For how long, up to 30 days; an hour without it.
    valid_for_seconds: Option<u64>,
}

/// What a token allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Authorization {
    /// See and change.
    #[default]
    Full,
    /// See.
    ReadOnly,
}

/// What a client opens a document with.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClientTokenBody {
    /// Where its socket goes, less the id.
    url: String,
    /// Where its requests go.
    base_url: String,
    doc_id: String,
    /// Absent where no token is needed.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
    authorization: Authorization,
}

/// Whether this node serves.
#[utoipa::path(get, path = "/ready", responses((status = 200, body = OkBody), (status = 503, body = ErrorBody)))]
async fn ready(State(app): State<Arc<App>>) -> Result<Json<OkBody>, ApiError> {
    if app.members.lease_held() && !app.members.is_draining() {
        Ok(Json(OkBody { ok: true }))
    } else {
        Err(ApiError::Unavailable("not ready; try again".to_owned()))
    }
}

/// Whether the store answers.
#[utoipa::path(post, path = "/check_store", responses((status = 200, body = OkBody), (status = 401, body = ErrorBody)))]
async fn check_store(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
) -> Result<Json<OkBody>, ApiError> {
    app.auth.claims(&headers, None)?;
    let ok = app.store.documents(None, 1).await.is_ok();
    Ok(Json(OkBody { ok }))
}

/// Creates a document, unless it is there.
#[utoipa::path(post, path = "/doc/new", operation_id = "y_sweet_create", request_body = NewBody,
    responses((status = 200, body = CreatedBody), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody)))]
async fn create(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Option<Json<NewBody>>,
) -> Result<Json<CreatedBody>, ApiError> {
    let claims = app.auth.claims(&headers, None)?;
    let wanted = body.and_then(|Json(body)| body.doc_id);
    let doc_id = wanted.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let document = plain_id(&doc_id)?;
    claims.to_write(&document)?;
    app.owners.ask(&document, Request::Create).await?;
    Ok(Json(CreatedBody { doc_id }))
}

/// Signs a token with which a client opens a document. Takes a token whose scope is `server`.
#[utoipa::path(post, path = "/doc/{id}/auth", operation_id = "y_sweet_sign", params(("id" = String, Path)), request_body = SignBody,
    responses((status = 200, body = ClientTokenBody), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
async fn sign(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Path(name): Path<String>,
    body: Option<Json<SignBody>>,
) -> Result<Json<ClientTokenBody>, ApiError> {
    let document = plain_id(&name)?;
    let claims = app.auth.claims(&headers, None)?;
    claims.to_sign(&document)?;
    row(&app, &document).await?;
    let Json(body) = body.unwrap_or_default();
    let authorization = body.authorization.unwrap_or_default();
    let scope = match authorization {
        Authorization::Full => Scope::Write,
        Authorization::ReadOnly => Scope::Read,
    };
    let seconds = body.valid_for_seconds.unwrap_or(VALID_SECONDS_DEFAULT);
    if VALID_SECONDS_MAX < seconds {
        return Err(ApiError::Bad(format!(
            "validForSeconds {seconds} is more than {VALID_SECONDS_MAX}"
        )));
    }
    let valid = Duration::from_secs(seconds);
    let user = body.user_id.unwrap_or_default();
    let place = Place::of(&headers)?;
    Ok(Json(ClientTokenBody {
        url: format!("{}/d/{name}/ws", place.for_sockets()),
        base_url: format!("{}/d/{name}", place.for_requests()),
        token: app.auth.sign(&document, user, scope, valid)?,
        doc_id: name,
        authorization,
    }))
}

/// The whole state as a Yjs update (V1), as far as it is saved.
#[utoipa::path(get, path = "/d/{id}/as-update", operation_id = "y_sweet_as_update", params(("id" = String, Path)),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), (status = 404, body = ErrorBody)))]
async fn as_update(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Path(name): Path<String>,
) -> Result<impl IntoResponse, ApiError> {
    let document = plain_id(&name)?;
    app.auth.claims(&headers, None)?.to_read(&document)?;
    let bytes = app.owners.ask(&document, Request::State).await?.bytes();
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes))
}

/// Adds a Yjs update (V1) to a document, and answers once it is saved.
#[utoipa::path(post, path = "/d/{id}/update", operation_id = "y_sweet_update", params(("id" = String, Path)),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn update(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    let document = plain_id(&name)?;
    let claims = app.auth.claims(&headers, None)?;
    claims.to_write(&document)?;
    row(&app, &document).await?;
    app.edge.apply(&document, claims.visitor(), body).await?;
    Ok(StatusCode::OK)
}

/// The address under which the asking server knows this cluster.
struct Place<'a> {
    host: &'a str,
    is_secure: bool,
}

impl<'a> Place<'a> {
    fn of(headers: &'a HeaderMap) -> Result<Self, ApiError> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let host = text("x-forwarded-host").or_else(|| text("host"));
        Ok(Self {
            host: host.ok_or_else(|| ApiError::Bad("the request names no host".to_owned()))?,
            is_secure: text("x-forwarded-proto") == Some("https"),
        })
    }

    fn for_requests(&self) -> String {
        let scheme = if self.is_secure { "https" } else { "http" };
        format!("{scheme}://{}", self.host)
    }

    fn for_sockets(&self) -> String {
        let scheme = if self.is_secure { "wss" } else { "ws" };
        format!("{scheme}://{}", self.host)
    }
}

fn plain_id(name: &str) -> Result<DocumentId, ApiError> {
    if !is_id(name) {
        let error = format!("{name:?} is no id here: use letters, digits, - and _");
        return Err(ApiError::Bad(error));
    }
    id(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_sent_to_where_the_request_came() {
        let mut headers = HeaderMap::new();
        assert!(Place::of(&headers).is_err());
        headers.insert("host", "127.0.0.1:8080".parse().unwrap());
        assert_eq!(
            Place::of(&headers).unwrap().for_sockets(),
            "ws://127.0.0.1:8080"
        );
        // Behind a proxy that ends TLS.
        headers.insert("x-forwarded-proto", "https".parse().unwrap());
        headers.insert("x-forwarded-host", "docs.example.com".parse().unwrap());
        let place = Place::of(&headers).unwrap();
        assert_eq!(place.for_sockets(), "wss://docs.example.com");
        assert_eq!(place.for_requests(), "https://docs.example.com");
    }
}
