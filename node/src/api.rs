//! REST for documents; one file per resource. `OpenAPI` is derived from the code.

use std::sync::Arc;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde::Serialize;
use utoipa::{OpenApi, ToSchema};
use utoipa_axum::router::OpenApiRouter;

use crate::auth::AuthError;
use crate::documents::AskError;
use crate::edge::ApplyError;
use crate::server::App;
use crate::store::StoreError;

pub mod documents;
pub mod owners;
pub mod y_sweet;

#[derive(OpenApi)]
#[openapi(info(
    title = "collab-node",
    description = "Documents of a collaboration cluster."
))]
struct Description;

/// Routes under `/api`, and their description at `/api/openapi.json`.
pub fn router() -> Router<Arc<App>> {
    let (router, description) = described().split_for_parts();
    let description = Arc::new(description);
    router.route(
        "/api/openapi.json",
        axum::routing::get(move || {
            let description = description.clone();
            async move { Json(description.as_ref().clone()) }
        }),
    )
}

fn described() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(Description::openapi())
        .merge(documents::router())
        .merge(y_sweet::router())
}

/// When there may be room again.
const RETRY_AFTER_SECONDS: &str = "5";

/// Every failure of the API as clients see it.
#[derive(Debug)]
pub enum ApiError {
    /// 400: the request makes no sense.
    Bad(String),
    /// 401 or 403.
    Auth(AuthError),
    /// 404.
    Absent(String),
    /// 409: the document is in another state than the request needs.
    Conflict(String),
    /// 503: try again.
    Unavailable(String),
    /// 503 with `Retry-After`: there is no room now.
    Full(String),
}

/// The body of an error.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong and what to do.
    pub error: String,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, error) = match self {
            Self::Bad(error) => (StatusCode::BAD_REQUEST, error),
            Self::Auth(error @ (AuthError::Forbidden | AuthError::NoSecret)) => {
                (StatusCode::FORBIDDEN, error.to_string())
            }
            Self::Auth(error) => (StatusCode::UNAUTHORIZED, error.to_string()),
            Self::Absent(error) => (StatusCode::NOT_FOUND, error),
            Self::Conflict(error) => (StatusCode::CONFLICT, error),
            Self::Unavailable(error) => (StatusCode::SERVICE_UNAVAILABLE, error),
            Self::Full(error) => {
                let after = [(header::RETRY_AFTER, RETRY_AFTER_SECONDS)];
                let status = StatusCode::SERVICE_UNAVAILABLE;
                return (status, after, Json(ErrorBody { error })).into_response();
            }
        };
        (status, Json(ErrorBody { error })).into_response()
    }
}

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> Self {
        Self::Auth(error)
    }
}

impl From<ApplyError> for ApiError {
    fn from(error: ApplyError) -> Self {
        match error {
            ApplyError::Invalid(reason) => Self::Bad(reason),
            ApplyError::Gap { .. } => Self::Conflict(error.to_string()),
            ApplyError::Denied(reason) => Self::Unavailable(reason),
            ApplyError::Full(reason) => Self::Full(reason),
            ApplyError::Unknown => Self::Unavailable(error.to_string()),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        Self::Unavailable(format!("{error}; try again"))
    }
}

impl From<AskError> for ApiError {
    fn from(error: AskError) -> Self {
        match &error {
            AskError::Absent(_) => Self::Absent(error.to_string()),
            AskError::Full(_) => Self::Full(error.to_string()),
            AskError::Moved(_) | AskError::Unavailable { .. } => {
                Self::Unavailable(error.to_string())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_description_is_that_of_the_code() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
        let mut description = described()
            .into_openapi()
            .to_pretty_json()
            .expect("it serializes");
        description.push('\n');
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(path, &description).expect("openapi.json is written");
        }
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert_eq!(
            committed, description,
            "run `UPDATE=1 cargo test -p collab-node api` and commit openapi.json"
        );
    }
}
