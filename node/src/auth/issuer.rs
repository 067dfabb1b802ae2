//! Tokens of an identity provider: signed with keys that it publishes (JWK Set, RFC 7517), found as `OpenID` Connect Discovery
//! 1.0 says.
//!
//! The keys are read beside all requests, so that none waits for the provider. A token under a key that is not known is
//! refused, and has the keys read again, but not more often than every [`PAUSE`]: its client comes back. While the
//! provider is away the keys that it had are honoured for [`HONOURED`], and then none.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, KeyAlgorithm};
use jsonwebtoken::{Algorithm, DecodingKey};
use reqwest::redirect::{Action, Attempt, Policy};
use reqwest::{Client, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::{AuthError, Claims, RawClaims, Scope, validation};

/// Between two readings of the keys, so that one that was withdrawn is not accepted for longer.
const READ_EVERY: Duration = Duration::from_mins(5);
/// At least between two readings, whatever tokens come.
const PAUSE: Duration = Duration::from_secs(5);
/// For so long after they were read the keys are good.
const HONOURED: Duration = Duration::from_hours(1);
/// A provider that takes longer does not answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// What it answers is not longer than this.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// It may send its reader on as often.
const REDIRECTS_MAX: usize = 3;
/// Stands before the words of `scope` that are for this service.
const SCOPES: &str = "collab:";

/// Who issues tokens, and for whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuerConfig {
    /// As it stands in `iss`: the address below which its configuration is.
    pub issuer: Url,
    /// As it stands in `aud`.
    pub audience: String,
    /// Where its keys are, if not where its configuration says.
    pub keys: Option<Url>,
}

/// An identity provider.
pub struct Issuer {
    config: IssuerConfig,
    client: Client,
    keys: Mutex<Keys>,
    unknown: Notify,
}

/// The keys that were read last.
#[derive(Default)]
struct Keys {
    by_id: BTreeMap<String, Key>,
    read_at: Option<Instant>,
}

#[derive(Clone)]
struct Key {
    key: DecodingKey,
    /// The only one that it is used with.
    algorithm: Algorithm,
}

/// Why the keys cannot be read.
#[derive(Debug, thiserror::Error)]
enum KeysError {
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    #[error("{0} does not answer within {PATIENCE:?}")]
    Silent(Url),
    #[error("{0} answers more than {ANSWER_BYTES_MAX} bytes")]
    Long(Url),
    #[error("{0} answers something else than was asked for: {1}")]
    Garbage(Url, serde_json::Error),
    #[error("the configuration is that of {0}")]
    OtherIssuer(String),
    #[error("its keys are said to be at {0:?}, which is no address with https")]
    Unsafe(String),
    #[error("there is no key in it that can be used")]
    NoKeys,
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

impl Issuer {
    /// One whose keys are not known before [`Issuer::keep_keys`] has read them.
    ///
    /// # Errors
    /// When the certificates of the system cannot be read.
    pub fn new(config: IssuerConfig) -> Result<Arc<Self>, reqwest::Error> {
        Ok(Arc::new(Self {
            config,
            client: Client::builder()
                .redirect(Policy::custom(redirect))
                .build()?,
            keys: Mutex::default(),
            unknown: Notify::new(),
        }))
    }

    /// Reads the keys again and again.
    pub async fn keep_keys(self: Arc<Self>) {
        loop {
            let next = match self.read_keys().await {
                Ok(by_id) => {
                    let read_at = Some(Instant::now());
                    *self.lock() = Keys { by_id, read_at };
                    READ_EVERY
                }
                Err(error) => {
                    // With its causes: the first says only where.
                    let error = format!("{:#}", anyhow::Error::from(error));
                    tracing::warn!(issuer = %self.config.issuer, error, "the keys of the issuer cannot be read");
                    PAUSE
                }
            };
            sleep(PAUSE).await;
            let _ = timeout(next.saturating_sub(PAUSE), self.unknown.notified()).await;
        }
    }

    async fn read_keys(&self) -> Result<BTreeMap<String, Key>, KeysError> {
        let keys = match &self.config.keys {
            Some(keys) => keys.clone(),
            None => self.discover().await?,
        };
        let set: JwkSet = self.get(keys).await?;
        let by_id: BTreeMap<String, Key> = set.keys.iter().filter_map(key_of).collect();
        if by_id.is_empty() {
            return Err(KeysError::NoKeys);
        }
        Ok(by_id)
    }

    async fn discover(&self) -> Result<Url, KeysError> {
        let mut address = self.config.issuer.clone();
        let path = address.path().trim_end_matches('/');
        address.set_path(&format!("{path}/.well-known/openid-configuration"));
        let found: Discovery = self.get(address).await?;
        if !is_same(&found.issuer, &self.config.issuer) {
            return Err(KeysError::OtherIssuer(found.issuer));
        }
        let keys = Url::parse(&found.jwks_uri).ok().filter(is_safe);
        keys.ok_or(KeysError::Unsafe(found.jwks_uri))
    }

    async fn get<T: DeserializeOwned>(&self, url: Url) -> Result<T, KeysError> {
        let answer = async {
            let mut response = self
                .client
                .get(url.clone())
                .send()
                .await?
                .error_for_status()?;
            let mut bytes = Vec::new();
            while let Some(chunk) = response.chunk().await? {
                if ANSWER_BYTES_MAX < bytes.len() + chunk.len() {
                    return Err(KeysError::Long(url.clone()));
                }
                bytes.extend_from_slice(&chunk);
            }
            Ok(bytes)
        };
        let Ok(bytes) = timeout(PATIENCE, answer).await else {
            return Err(KeysError::Silent(url));
        };
        serde_json::from_slice(&bytes?).map_err(|error| KeysError::Garbage(url, error))
    }

    /// Who a token is for, by the key that it names.
    ///
    /// # Errors
    /// When it is not of this issuer, for another audience, or gives no right to any document.
    pub(super) fn check(&self, token: &str) -> Result<Claims, AuthError> {
        let invalid = |reason: &str| AuthError::Invalid(reason.to_owned());
        let id = jsonwebtoken::decode_header(token)?.kid;
        let id = id.ok_or_else(|| invalid("it does not say which key it is signed with (kid)"))?;
        let Some(Key { key, algorithm }) = self.lock().get(&id, Instant::now()) else {
            self.unknown.notify_one();
            return Err(invalid("the key that it is signed with is not known"));
        };
        let mut validation = validation(algorithm, &["exp", "sub", "aud", "iss"]);
        validation.set_audience(&[&self.config.audience]);
        let Issued { iss, claims } = jsonwebtoken::decode(token, &key, &validation)?.claims;
        if !is_same(&iss, &self.config.issuer) {
            return Err(invalid("it is of another issuer"));
        }
        let scope = claims.scope.as_deref().and_then(scope_of);
        Ok(claims.with(scope.ok_or(AuthError::Forbidden)?))
    }

    fn lock(&self) -> MutexGuard<'_, Keys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an issuer's token says.
#[derive(Deserialize)]
struct Issued {
    iss: String,
    #[serde(flatten)]
    claims: RawClaims,
}

impl Keys {
    fn get(&self, id: &str, now: Instant) -> Option<Key> {
        let is_good = self.read_at? + HONOURED >= now;
        self.by_id.get(id).filter(|_| is_good).cloned()
    }
}

/// A key that signs tokens, with its id.
fn key_of(jwk: &Jwk) -> Option<(String, Key)> {
    let algorithm = match (&jwk.algorithm, jwk.common.key_algorithm) {
        (AlgorithmParameters::RSA(_), None | Some(KeyAlgorithm::RS256)) => Algorithm::RS256,
        (AlgorithmParameters::RSA(_), Some(KeyAlgorithm::RS384)) => Algorithm::RS384,
        (AlgorithmParameters::RSA(_), Some(KeyAlgorithm::RS512)) => Algorithm::RS512,
        (AlgorithmParameters::RSA(_), Some(KeyAlgorithm::PS256)) => Algorithm::PS256,
        (AlgorithmParameters::EllipticCurve(curve), _) => match curve.curve {
            EllipticCurve::P256 => Algorithm::ES256,
            EllipticCurve::P384 => Algorithm::ES384,
            _ => return None,
        },
        (AlgorithmParameters::OctetKeyPair(_), _) => Algorithm::EdDSA,
        // Not a secret above all: it would be one that everybody can read.
        _ => return None,
    };
    let key = DecodingKey::from_jwk(jwk).ok()?;
    Some((jwk.common.key_id.clone()?, Key { key, algorithm }))
}

/// The most that the words of a scope allow here.
fn scope_of(words: &str) -> Option<Scope> {
    let ours = words
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix(SCOPES));
    let scopes = ours.filter_map(|word| match word {
        "read" => Some(Scope::Read),
        "write" => Some(Scope::Write),
        "server" => Some(Scope::Server),
        _ => None,
    });
    scopes.max()
}

/// Whether nobody else can answer at an address: it is that of a server with a certificate, or on this machine.
pub fn is_safe(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    let is_here = host == "localhost" || address.is_ok_and(|address| address.is_loopback());
    url.scheme() == "https" || url.scheme() == "http" && is_here
}

/// A safe address must not lead to another.
fn redirect(attempt: Attempt<'_>) -> Action {
    if REDIRECTS_MAX < attempt.previous().len() {
        attempt.error(format!(
            "it sends its reader on more than {REDIRECTS_MAX} times"
        ))
    } else if is_safe(attempt.url()) {
        attempt.follow()
    } else {
        let to = attempt.url().to_string();
        attempt.error(format!(
            "it sends its reader on to {to}, which is no address with https"
        ))
    }
}

/// Issuers are compared as they are written, but for a slash at the end.
fn is_same(issuer: &str, known: &Url) -> bool {
    issuer.trim_end_matches('/') == known.as_str().trim_end_matches('/')
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_are_good_for_a_while_after_they_were_read() {
        let read_at = Instant::now();
        let key = Key {
            key: DecodingKey::from_secret(b"a key"),
            algorithm: Algorithm::RS256,
        };
        let keys = Keys {
            by_id: BTreeMap::from([("one".to_owned(), key)]),
            read_at: Some(read_at),
        };
        assert!(keys.get("one", read_at + HONOURED).is_some());
        assert!(keys.get("two", read_at).is_none());
        let later = read_at + HONOURED + Duration::from_secs(1);
        assert!(keys.get("one", later).is_none());
    }

    #[test]
    fn a_key_is_for_one_algorithm_and_no_secret_is_taken_from_the_web() {
        let rsa = json!({"kty": "RSA", "kid": "a", "n": "AQAB", "e": "AQAB"});
        let with = |fields: &[(&str, &str)]| {
            let mut jwk = rsa.clone();
            for (name, value) in fields {
                jwk[*name] = json!(value);
            }
            let jwk: Jwk = serde_json::from_value(jwk).unwrap();
            key_of(&jwk).map(|(_, key)| key.algorithm)
        };
        assert_eq!(with(&[]), Some(Algorithm::RS256));
        assert_eq!(with(&[("alg", "RS512")]), Some(Algorithm::RS512));
        assert_eq!(with(&[("alg", "HS256")]), None);
        assert_eq!(with(&[("alg", "RSA-OAEP")]), None);
        let secret = json!({"kty": "oct", "kid": "a", "alg": "HS256", "k": "c2VjcmV0"});
        assert!(key_of(&serde_json::from_value(secret).unwrap()).is_none());
        let nameless = json!({"kty": "RSA", "n": "AQAB", "e": "AQAB"});
        assert!(key_of(&serde_json::from_value(nameless).unwrap()).is_none());
    }

    #[test]
    fn the_most_of_the_scopes_for_this_service_counts() {
        for (words, scope) in [
            ("openid email collab:read", Some(Scope::Read)),
            ("collab:write collab:read", Some(Scope::Write)),
            ("collab:server", Some(Scope::Server)),
            ("write server", None),
            ("collab:admin", None),
            ("", None),
        ] {
            assert_eq!(scope_of(words), scope, "{words}");
        }
    }

    #[tokio::test]
    async fn nobody_is_sent_on_to_where_somebody_else_could_answer() {
        use axum::Router;
        use axum::response::Redirect;
        use axum::routing::get;

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = format!("http://{}", listener.local_addr().unwrap());
        let answers = Router::new()
            .route("/keys", get(async || "[1]"))
            .route("/moved", get(async || Redirect::temporary("/keys")))
            .route("/round", get(async || Redirect::temporary("/round")))
            .route(
                "/away",
                get(async || Redirect::temporary("http://id.invalid/")),
            );
        let serving = tokio::spawn(async { axum::serve(listener, answers).await });
        // The process has chosen one, or another test has.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let issuer = Issuer::new(IssuerConfig {
            issuer: Url::parse(&at).unwrap(),
            audience: String::new(),
            keys: None,
        });
        let issuer = issuer.unwrap();
        let read = async |path: &str| {
            let url = Url::parse(&format!("{at}{path}")).unwrap();
            let answer = issuer.get::<Vec<u8>>(url).await;
            answer.map_err(|error| format!("{:#}", anyhow::Error::from(error)))
        };
        assert_eq!(read("/keys").await, Ok(vec![1]));
        assert_eq!(read("/moved").await, Ok(vec![1]));
        let round = read("/round").await.unwrap_err();
        assert!(round.contains("more than 3 times"), "{round}");
        let away = read("/away").await.unwrap_err();
        assert!(away.contains("http://id.invalid/"), "{away}");
        serving.abort();
    }

    #[test]
    fn an_issuer_is_the_same_with_a_slash_at_its_end() {
        let known = Url::parse("https://id.example.com").unwrap();
        assert!(is_same("https://id.example.com", &known));
        assert!(is_same("https://id.example.com/", &known));
        assert!(!is_same("https://id.example.com.evil", &known));
        assert!(!is_same("http://id.example.com", &known));
    }
}
