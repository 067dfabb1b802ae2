//! Who a client is: tokens (JWT, RFC 7519) signed with a shared secret (HS256), or by an [issuer].

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::HeaderMap;
use collab_core::ids::DocumentId;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};

use crate::edge::{Access, Visitor};

pub mod issuer;

use issuer::Issuer;

/// Clocks of issuer and node may differ by this many seconds.
const LEEWAY_SECONDS: u64 = 30;

/// Checks tokens.
pub struct Auth {
    secret: Option<Secret>,
    issuer: Option<Arc<Issuer>>,
}

struct Secret {
    check: DecodingKey,
    sign: EncodingKey,
    validation: Validation,
}

/// What a token says.
#[derive(Clone, Debug, Serialize)]
pub struct Claims {
    /// The user.
    pub sub: String,
    /// Documents it is for: ids, or prefixes that end in `*`. Without it: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub documents: Option<Vec<String>>,
    /// What it allows.
    pub scope: Scope,
    /// Seconds since 1970 at which it ends; `None` only where no token is needed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exp: Option<f64>,
}

/// The same before its scope is understood.
#[derive(Deserialize)]
struct RawClaims {
    sub: String,
    documents: Option<Vec<String>>,
    scope: Option<String>,
    exp: Option<f64>,
}

impl RawClaims {
    fn with(self, scope: Scope) -> Claims {
        Claims {
            sub: self.sub,
            documents: self.documents,
            scope,
            exp: self.exp,
        }
    }
}

/// What a token allows; each allows what those before it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// See.
    Read,
    /// See and change.
    Write,
    /// See, change, and sign tokens for others: the application's own server.
    Server,
}

/// Why a request is refused. The text tells the client nothing about documents or keys.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// Answer 401.
    #[error("a token is needed: Authorization: Bearer TOKEN, or ?token=TOKEN")]
    Missing,
    /// Answer 401.
    #[error("the token is not valid: {0}")]
    Invalid(String),
    /// Answer 403.
    #[error("the token is not for this document or action")]
    Forbidden,
    /// Answer 403.
    #[error("there is no secret here to sign tokens with: the issuer gives them")]
    NoSecret,
}

impl Auth {
    /// Checks against a secret, and the keys of an issuer; without either everybody may do everything.
    pub fn new(secret: Option<&str>, issuer: Option<Arc<Issuer>>) -> Self {
        let secret = secret.map(Secret::new);
        Self { secret, issuer }
    }

    /// Who makes a request, from its header or its `token` parameter.
    ///
    /// # Errors
    /// When a token is needed and missing or not valid.
    pub fn claims(&self, headers: &HeaderMap, token: Option<&str>) -> Result<Claims, AuthError> {
        self.check(bearer(headers).or(token))
    }

    /// Who a token is for.
    ///
    /// # Errors
    /// When one is needed and missing or not valid.
    pub fn check(&self, token: Option<&str>) -> Result<Claims, AuthError> {
        let token = || token.ok_or(AuthError::Missing);
        match (&self.secret, &self.issuer) {
            (None, None) => Ok(Claims {
                sub: String::new(),
                documents: None,
                scope: Scope::Server,
                exp: None,
            }),
            (Some(secret), None) => secret.check(token()?),
            (None, Some(issuer)) => issuer.check(token()?),
            (Some(secret), Some(issuer)) => {
                let token = token()?;
                // Which of them signed it is told by its algorithm alone: a public key is never taken for a secret.
                if jsonwebtoken::decode_header(token)?.alg == Algorithm::HS256 {
                    secret.check(token)
                } else {
                    issuer.check(token)
                }
            }
        }
    }

    /// Signs a token for one document, valid from now on; `None` where none is needed.
    ///
    /// # Errors
    /// When there is no secret to sign with.
    pub fn sign(
        &self,
        document: &DocumentId,
        user: String,
        scope: Scope,
        valid: Duration,
    ) -> Result<Option<String>, AuthError> {
        let Some(secret) = &self.secret else {
            return match &self.issuer {
                Some(_) => Err(AuthError::NoSecret),
                None => Ok(None),
            };
        };
        let ends = jsonwebtoken::get_current_timestamp() + valid.as_secs();
        // A pattern would be for more than this document; no id that can be named here ends in a star.
        let claims = Claims {
            sub: user,
            documents: Some(vec![document.as_str().to_owned()]),
            scope,
            #[expect(
                clippy::cast_precision_loss,
                reason = "a time of this age of the world"
            )]
            exp: Some(ends as f64),
        };
        let signed = jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &secret.sign);
        Ok(Some(signed?))
    }
}

impl Secret {
    fn new(secret: &str) -> Self {
        let mut validation = validation(Algorithm::HS256, &["exp", "sub"]);
        validation.validate_aud = false;
        Self {
            check: DecodingKey::from_secret(secret.as_bytes()),
            sign: EncodingKey::from_secret(secret.as_bytes()),
            validation,
        }
    }

    fn check(&self, token: &str) -> Result<Claims, AuthError> {
        let data = jsonwebtoken::decode(token, &self.check, &self.validation)?;
        let claims: RawClaims = data.claims;
        let scope = match claims.scope.as_deref() {
            None | Some("write") => Scope::Write,
            Some("read") => Scope::Read,
            Some("server") => Scope::Server,
            Some(other) => {
                let reason = format!("{other:?} is no scope: read, write or server");
                return Err(AuthError::Invalid(reason));
            }
        };
        Ok(claims.with(scope))
    }
}

impl From<jsonwebtoken::errors::Error> for AuthError {
    fn from(error: jsonwebtoken::errors::Error) -> Self {
        Self::Invalid(error.to_string())
    }
}

/// What is asked of every token: one algorithm, these claims, and its time.
fn validation(algorithm: Algorithm, claims: &[&str]) -> Validation {
    let mut validation = Validation::new(algorithm);
    validation.leeway = LEEWAY_SECONDS;
    validation.validate_nbf = true;
    validation.set_required_spec_claims(claims);
    validation
}

impl Claims {
    /// Whether the token is for this document.
    pub fn covers(&self, document: &DocumentId) -> bool {
        let covers = |pattern: &String| match pattern.strip_suffix('*') {
            Some(prefix) => document.as_str().starts_with(prefix),
            None => document.as_str() == pattern,
        };
        self.documents
            .as_ref()
            .is_none_or(|patterns| patterns.iter().any(covers))
    }

    /// Checks that a document may be seen.
    ///
    /// # Errors
    /// When the token is for other documents.
    pub fn to_read(&self, document: &DocumentId) -> Result<(), AuthError> {
        if self.covers(document) {
            Ok(())
        } else {
            Err(AuthError::Forbidden)
        }
    }

    /// Checks that a document may be changed.
    ///
    /// # Errors
    /// When the token is for other documents, or for reading only.
    pub fn to_write(&self, document: &DocumentId) -> Result<(), AuthError> {
        self.to_read(document)?;
        match self.scope {
            Scope::Write | Scope::Server => Ok(()),
            Scope::Read => Err(AuthError::Forbidden),
        }
    }

    /// Checks that tokens for a document may be signed.
    ///
    /// # Errors
    /// When the token is for other documents, or not for signing.
    pub fn to_sign(&self, document: &DocumentId) -> Result<(), AuthError> {
        self.to_read(document)?;
        match self.scope {
            Scope::Server => Ok(()),
            Scope::Read | Scope::Write => Err(AuthError::Forbidden),
        }
    }

    /// How long the token is accepted still; `None`: for ever.
    pub fn time_left(&self) -> Option<Duration> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let leeway = Duration::from_secs(LEEWAY_SECONDS);
        let left = self.exp? + leeway.as_secs_f64() - now.as_secs_f64();
        Some(Duration::try_from_secs_f64(left).unwrap_or_default())
    }

    /// The visitor of a document.
    pub fn visitor(self) -> Visitor {
        let access = match self.scope {
            Scope::Write | Scope::Server => Access::Write,
            Scope::Read => Access::Read,
        };
        Visitor {
            author: self.sub.into(),
            access,
        }
    }
}

/// The token of an `Authorization: Bearer` header.
pub fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers
        .get("authorization")?
        .to_str()
        .ok()?
        .strip_prefix("Bearer ")
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{EncodingKey, Header};
    use serde_json::json;

    use super::*;

    const SECRET: &str = "0123456789abcdef";

    #[test]
    fn a_token_opens_what_it_names_and_nothing_else() {
        let claims =
            checked(&json!({"sub": "ada", "exp": later(), "documents": ["notes", "team/*"]}))
                .unwrap();
        for (document, allowed) in [
            ("notes", true),
            ("team/x", true),
            ("notes2", false),
            ("teams", false),
        ] {
            let document = DocumentId::new(document).unwrap();
            assert_eq!(claims.to_write(&document).is_ok(), allowed, "{document}");
        }
        let reader = checked(&json!({"sub": "ada", "exp": later(), "scope": "read"})).unwrap();
        let document = DocumentId::new("notes").unwrap();
        assert!(reader.to_read(&document).is_ok());
        assert_eq!(reader.to_write(&document), Err(AuthError::Forbidden));
    }

    #[test]
    fn only_a_servers_token_signs_for_others_and_what_it_signs_is_for_one_document() {
        let document = DocumentId::new("notes").unwrap();
        for (scope, signs) in [("read", false), ("write", false), ("server", true)] {
            let claims = checked(&json!({"sub": "app", "exp": later(), "scope": scope})).unwrap();
            assert_eq!(claims.to_sign(&document).is_ok(), signs, "{scope}");
        }
        let auth = Auth::new(Some(SECRET), None);
        let hour = Duration::from_hours(1);
        let token = auth.sign(&document, "ada".to_owned(), Scope::Read, hour);
        let token = token.unwrap();
        let claims = auth.check(token.as_deref()).unwrap();
        assert_eq!(claims.sub, "ada");
        assert_eq!(claims.to_read(&document), Ok(()));
        assert_eq!(claims.to_write(&document), Err(AuthError::Forbidden));
        assert_eq!(
            claims.to_read(&DocumentId::new("notes2").unwrap()),
            Err(AuthError::Forbidden)
        );
        let left = claims.time_left().unwrap();
        assert!(hour <= left && left < 2 * hour, "{left:?}");
        let open = Auth::new(None, None);
        let token = open.sign(&document, String::new(), Scope::Read, hour);
        assert_eq!(token, Ok(None));
        assert_eq!(open.check(None).unwrap().to_sign(&document), Ok(()));
    }

    #[test]
    fn tokens_that_prove_nothing_are_refused() {
        for claims in [
            json!({"sub": "ada"}),
            json!({"exp": later()}),
            json!({"sub": "ada", "exp": 1}),
            json!({"sub": "ada", "exp": later(), "nbf": later()}),
            json!({"sub": "ada", "exp": later(), "scope": "admin"}),
        ] {
            assert!(
                matches!(checked(&claims), Err(AuthError::Invalid(_))),
                "{claims}"
            );
        }
        let auth = Auth::new(Some(SECRET), None);
        assert_eq!(
            auth.claims(&HeaderMap::new(), None).unwrap_err(),
            AuthError::Missing
        );
        let claims = json!({"sub": "ada", "exp": later()});
        let foreign = signed(&claims, "another secret!!", Algorithm::HS256);
        let stronger = signed(&claims, SECRET, Algorithm::HS512);
        let unsigned = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGEiLCJleHAiOjk5OTk5OTk5OTl9.";
        for token in [foreign.as_str(), &stronger, unsigned, "", "x.y.z"] {
            assert!(
                auth.claims(&HeaderMap::new(), Some(token)).is_err(),
                "{token}"
            );
        }
    }

    fn checked(claims: &serde_json::Value) -> Result<Claims, AuthError> {
        let token = signed(claims, SECRET, Algorithm::HS256);
        Auth::new(Some(SECRET), None).claims(&HeaderMap::new(), Some(&token))
    }

    fn signed(claims: &serde_json::Value, secret: &str, algorithm: Algorithm) -> String {
        let key = EncodingKey::from_secret(secret.as_bytes());
        jsonwebtoken::encode(&Header::new(algorithm), claims, &key).unwrap()
    }

    fn later() -> u64 {
        jsonwebtoken::get_current_timestamp() + 600
    }
}
