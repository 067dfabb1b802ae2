//! Client of the nodes' control API.

use std::time::Duration;

use collab_core::control::{
    ClusterReport, DrainRequest, FenceRequest, NodeLoad, PinRequest, PlacementRequest, TermGranted,
    TermRefused, TermRequest, ZonesRequest,
};
use collab_core::ids::Term;
use reqwest::{Client, Method, Response, StatusCode};
use serde::Serialize;

/// A node that does not answer within this time is passed over.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Why a node did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A newer operator acts. The process must end.
    #[error("term {current} was granted to another operator")]
    TermRefused {
        /// The newest term.
        current: Term,
    },
    /// Ask another node, or later.
    #[error("{node} does not answer: {source}")]
    Unreachable {
        /// `host:port` of the node.
        node: String,
        /// What happened to the call.
        source: reqwest::Error,
    },
    /// Ask another node, or later: this one answers, but has no store or is of another version.
    #[error("{node} answers {status}: {reason}")]
    Refused {
        /// `host:port` of the node.
        node: String,
        /// HTTP status.
        status: StatusCode,
        /// First words of the answer.
        reason: String,
    },
}

/// Speaks to nodes.
#[derive(Clone, Debug)]
pub struct Control {
    http: Client,
}

/// One node and the token it wants.
#[derive(Clone, Copy)]
pub struct Node<'a> {
    /// `host:port` of its internal listener.
    pub address: &'a str,
    /// Bearer token.
    pub token: &'a str,
}

impl Control {
    /// A client. Proxies of the environment are not used: nodes are near.
    ///
    /// # Errors
    /// When the TLS library has no provider.
    pub fn new() -> Result<Self, reqwest::Error> {
        let http = Client::builder().no_proxy().timeout(TIMEOUT).build()?;
        Ok(Self { http })
    }

    /// The cluster as this node sees it.
    ///
    /// # Errors
    /// When the node does not answer, or cannot read its store.
    pub async fn report(&self, node: Node<'_>) -> Result<ClusterReport, ControlError> {
        let answer = self.call(node, Method::GET, "report", None::<&()>).await?;
        read(node, answer).await
    }

    /// How busy the slots of this node are.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn load(&self, node: Node<'_>) -> Result<NodeLoad, ControlError> {
        let answer = self.call(node, Method::GET, "load", None::<&()>).await?;
        read(node, answer).await
    }

    /// A term that nobody else has.
    ///
    /// # Errors
    /// When the node does not answer, or cannot write its store.
    pub async fn take_term(&self, node: Node<'_>, holder: &str) -> Result<Term, ControlError> {
        let request = TermRequest {
            holder: holder.to_owned(),
        };
        let answer = self
            .call(node, Method::POST, "term", Some(&request))
            .await?;
        Ok(read::<TermGranted>(node, answer).await?.term)
    }

    /// Asks for a placement.
    ///
    /// # Errors
    /// As [`Control::drain`].
    pub async fn place(
        &self,
        node: Node<'_>,
        request: &PlacementRequest,
    ) -> Result<(), ControlError> {
        self.call(node, Method::PUT, "placement", Some(request))
            .await?;
        Ok(())
    }

    /// Starts or takes back a drain.
    ///
    /// # Errors
    /// When the node does not answer, or a newer term was granted.
    pub async fn drain(&self, node: Node<'_>, request: &DrainRequest) -> Result<(), ControlError> {
        self.call(node, Method::POST, "drain", Some(request))
            .await?;
        Ok(())
    }

    /// Ends the lease of a node.
    ///
    /// # Errors
    /// As [`Control::drain`].
    pub async fn fence(&self, node: Node<'_>, request: &FenceRequest) -> Result<(), ControlError> {
        self.call(node, Method::POST, "fence", Some(request))
            .await?;
        Ok(())
    }

    /// Says where nodes are.
    ///
    /// # Errors
    /// As [`Control::drain`].
    pub async fn zones(&self, node: Node<'_>, request: &ZonesRequest) -> Result<(), ControlError> {
        self.call(node, Method::PUT, "zones", Some(request)).await?;
        Ok(())
    }

    /// Pins a document or takes a pin back.
    ///
    /// # Errors
    /// As [`Control::drain`].
    pub async fn pin(&self, node: Node<'_>, request: &PinRequest) -> Result<(), ControlError> {
        self.call(node, Method::POST, "pin", Some(request)).await?;
        Ok(())
    }

    async fn call(
        &self,
        node: Node<'_>,
        method: Method,
        what: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Response, ControlError> {
        let url = format!("http://{}/control/v1/{what}", node.address);
        let mut request = self.http.request(method, url).bearer_auth(node.token);
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request
            .send()
            .await
            .map_err(|source| unreachable(node, source))?;
        match answer.status() {
            status if status.is_success() => Ok(answer),
            StatusCode::CONFLICT => {
                let refused: TermRefused = read(node, answer).await?;
                Err(ControlError::TermRefused {
                    current: refused.current,
                })
            }
            status => {
                let reason = answer.text().await.unwrap_or_default();
                Err(ControlError::Refused {
                    node: node.address.to_owned(),
                    status,
                    reason: reason.trim().chars().take(200).collect(),
                })
            }
        }
    }
}

async fn read<T: serde::de::DeserializeOwned>(
    node: Node<'_>,
    answer: Response,
) -> Result<T, ControlError> {
    answer
        .json()
        .await
        .map_err(|source| unreachable(node, source))
}

fn unreachable(node: Node<'_>, source: reqwest::Error) -> ControlError {
    ControlError::Unreachable {
        node: node.address.to_owned(),
        source: source.without_url(),
    }
}
