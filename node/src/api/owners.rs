//! Questions about a document find its owner: here, or at another node's internal listener.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use collab_core::ids::DocumentId;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use crate::bus::Presence;
use crate::documents::{Answer, AskError, Documents, Question};
use crate::members::Members;
use crate::server::App;
use crate::store::Created;

/// Path of the question on the internal listener.
pub const ASK_PATH: &str = "/peer/v1/ask";
/// How long an owner is looked for.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks.
const RETRY: Duration = Duration::from_millis(100);

/// A question to the owner of a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Create it.
    Create,
    /// Delete it.
    Delete,
    /// The text of a `Y.Text`.
    Text(String),
    /// The whole state.
    State,
    /// Who is there.
    Presence,
}

/// An owner's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It was done.
    Done,
    /// To [`Request::Create`]: there is one already.
    Exists,
    /// To [`Request::Text`], [`Request::State`] and, as JSON, [`Request::Presence`].
    Content(Bytes),
}

impl Reply {
    /// The content, empty if there is none.
    pub fn bytes(self) -> Bytes {
        match self {
            Self::Content(bytes) => bytes,
            Self::Done | Self::Exists => Bytes::new(),
        }
    }

    /// The content as presence.
    pub fn presence(self) -> Vec<Presence> {
        serde_json::from_slice(&self.bytes()).unwrap_or_default()
    }
}

/// Knows how to reach every owner.
pub struct Owners {
    documents: Arc<Documents>,
    members: Arc<Members>,
    client: reqwest::Client,
    token: Option<String>,
}

impl Owners {
    /// Asks with the token that nodes have in common.
    ///
    /// # Errors
    /// When the HTTP client cannot be set up.
    pub fn new(
        documents: Arc<Documents>,
        members: Arc<Members>,
        token: Option<String>,
    ) -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .timeout(PATIENCE)
            .no_proxy()
            // Nodes speak HTTP to each other; reading the roots of the system would take longer than the rest of a start.
            .tls_certs_only([])
            .build()?;
        Ok(Self {
            documents,
            members,
            client,
            token,
        })
    }

    /// Asks the owner, wherever it is, and again while the document moves.
    ///
    /// # Errors
    /// When there is no such document, or no owner answers in time.
    pub async fn ask(&self, document: &DocumentId, request: Request) -> Result<Reply, AskError> {
        let begun = Instant::now();
        loop {
            let answer = self.try_once(document, &request).await;
            match answer {
                Err(AskError::Moved(_)) if begun.elapsed() < PATIENCE => {
                    self.members.look_now();
                    sleep(RETRY).await;
                }
                answer => return answer,
            }
        }
    }

    async fn try_once(&self, document: &DocumentId, request: &Request) -> Result<Reply, AskError> {
        let moved = || AskError::Moved(document.clone());
        let owner = self
            .members
            .map()
            .owner(self.members.slot_of(document))
            .ok_or_else(moved)?;
        if owner.incarnation == self.members.incarnation() {
            return self.ask_here(document, request).await;
        }
        if owner.address.is_empty() {
            return Err(moved());
        }
        let mut call = self
            .client
            .post(format!("http://{}{ASK_PATH}", owner.address))
            .query(&[("document", document.as_str())])
            .json(request);
        if let Some(token) = &self.token {
            call = call.bearer_auth(token);
        }
        // An owner that cannot be reached is being replaced.
        let response = call.send().await.map_err(|_| moved())?;
        let status = response.status();
        let body = response.bytes().await.map_err(|_| moved())?;
        let text = || String::from_utf8_lossy(&body).into_owned();
        match status {
            StatusCode::OK => Ok(Reply::Content(body)),
            StatusCode::NO_CONTENT => Ok(Reply::Done),
            StatusCode::CONFLICT => Ok(Reply::Exists),
            StatusCode::NOT_FOUND => Err(AskError::Absent(document.clone())),
            StatusCode::MISDIRECTED_REQUEST => Err(moved()),
            StatusCode::INSUFFICIENT_STORAGE => Err(AskError::Full(document.clone())),
            _ => Err(AskError::Unavailable {
                document: document.clone(),
                reason: text(),
            }),
        }
    }

    /// Asks this node, which may turn out not to be the owner.
    async fn ask_here(&self, document: &DocumentId, request: &Request) -> Result<Reply, AskError> {
        let question = match request {
            Request::Create => {
                return match self.documents.create(document).await? {
                    Created::Created { .. } => Ok(Reply::Done),
                    Created::Exists => Ok(Reply::Exists),
                    Created::Fenced => Err(AskError::Moved(document.clone())),
                };
            }
            Request::Delete => {
                self.documents.delete(document).await?;
                return Ok(Reply::Done);
            }
            Request::Text(name) => Question::Text(name.clone()),
            Request::State => Question::State,
            Request::Presence => Question::Presence,
        };
        Ok(match self.documents.ask(document, question).await? {
            Answer::Text(text) => Reply::Content(text.into()),
            Answer::State(state) => Reply::Content(state),
            Answer::Presence(presence) => {
                Reply::Content(serde_json::to_vec(&presence).unwrap_or_default().into())
            }
            Answer::Deleted => Reply::Done,
        })
    }
}

/// The document of a question.
#[derive(Debug, Deserialize)]
pub struct AskQuery {
    document: DocumentId,
}

/// Answers another node's question about a document of this one.
pub async fn answer(
    State(app): State<Arc<App>>,
    Query(query): Query<AskQuery>,
    Json(request): Json<Request>,
) -> Response {
    match app.owners.ask_here(&query.document, &request).await {
        Ok(Reply::Done) => StatusCode::NO_CONTENT.into_response(),
        Ok(Reply::Exists) => StatusCode::CONFLICT.into_response(),
        Ok(Reply::Content(bytes)) => bytes.into_response(),
        Err(AskError::Absent(_)) => StatusCode::NOT_FOUND.into_response(),
        Err(AskError::Moved(_)) => StatusCode::MISDIRECTED_REQUEST.into_response(),
        Err(AskError::Full(_)) => StatusCode::INSUFFICIENT_STORAGE.into_response(),
        Err(AskError::Unavailable { reason, .. }) => {
            (StatusCode::SERVICE_UNAVAILABLE, reason).into_response()
        }
    }
}
