//! Which pages may open a socket here.
//!
//! A browser sends cookies and reaches private addresses for any page that asks it to, and does not hold a WebSocket
//! back as it does other requests from foreign pages (OWASP ASVS 5, V4.4.2). But it says truly which page
//! asks: the origin (RFC 6454), scheme, host and port. Who sends none is no browser.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

/// The origins that may open sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origins {
    /// All: there is nothing to gain, as a page needs a token of its own.
    Any,
    /// Pages of this node and of this machine: without authentication the address is the only protection.
    Local,
    /// These, as browsers write them.
    Listed(BTreeSet<String>),
}

/// A text is no origin. Tell whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no origin; write scheme, host and, unless it is the usual one, port, as in https://docs.example.com"
)]
pub struct OriginError(String);

impl Origins {
    /// Reads a list of origins.
    ///
    /// # Errors
    /// When one has a path, or no scheme.
    pub fn listed(texts: &[String]) -> Result<Self, OriginError> {
        let normal = |text: &String| normal(text).ok_or_else(|| OriginError(text.clone()));
        Ok(Self::Listed(
            texts.iter().map(normal).collect::<Result<_, _>>()?,
        ))
    }

    /// Whether a request with these headers may open a socket.
    pub fn allow(&self, headers: &HeaderMap) -> bool {
        let Some(origin) = headers.get(header::ORIGIN) else {
            return true;
        };
        let origin = origin.to_str().ok().and_then(normal);
        match (self, origin) {
            (Self::Any, _) => true,
            (_, None) => false,
            (Self::Listed(listed), Some(origin)) => listed.contains(&origin),
            (Self::Local, Some(origin)) => {
                let authority = origin.split("://").nth(1).unwrap_or_default();
                let host = authority.parse::<Authority>();
                let host = host.as_ref().map_or("", Authority::host);
                let own = headers
                    .get(header::HOST)
                    .and_then(|host| host.to_str().ok());
                // A name that leads here (DNS rebinding) is not this machine, so its own pages must be at
                // an address.
                is_loopback(host) || own.is_some_and(|own| own == authority && is_address(host))
            }
        }
    }
}

/// Middleware: answers 403 to a page that may not open a socket.
pub async fn check(State(origins): State<Arc<Origins>>, request: Request, next: Next) -> Response {
    let upgrades = request.headers().contains_key(header::UPGRADE);
    if upgrades && !origins.allow(request.headers()) {
        let reason = "this page may not connect here; see --origins\n";
        return (StatusCode::FORBIDDEN, reason).into_response();
    }
    next.run(request).await
}

/// As browsers write it: lower case, without the usual port. `None`: it is no origin of a page.
fn normal(text: &str) -> Option<String> {
    let text = text.trim().to_ascii_lowercase();
    let uri: Uri = text.parse().ok()?;
    let (scheme, authority) = (uri.scheme_str()?, uri.authority()?);
    let usual = match scheme {
        "http" => 80,
        "https" => 443,
        _ => return None,
    };
    if uri.path() != "/" || text.ends_with('/') || authority.as_str().contains('@') {
        return None;
    }
    let port = authority.port_u16().filter(|port| *port != usual);
    let port = port.map(|port| format!(":{port}")).unwrap_or_default();
    Some(format!("{scheme}://{}{port}", authority.host()))
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

fn is_address(host: &str) -> bool {
    host.trim_matches(['[', ']'])
        .parse::<std::net::IpAddr>()
        .is_ok()
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn only_the_very_same_scheme_host_and_port_is_listed() {
        let listed = [
            "https://docs.example.com".to_owned(),
            "http://app.test:3000".to_owned(),
        ];
        let origins = Origins::listed(&listed).unwrap();
        for (origin, allowed) in [
            ("https://docs.example.com", true),
            ("https://DOCS.example.com:443", true),
            ("http://app.test:3000", true),
            ("http://docs.example.com", false),
            ("https://docs.example.com:8443", false),
            ("https://docs.example.com.evil.test", false),
            ("https://evil-docs.example.com", false),
            ("https://docs.example.com@evil.test", false),
            ("https://example.com", false),
            ("http://app.test", false),
            ("http://app.test:30000", false),
            ("null", false),
            ("", false),
            ("file://", false),
            ("http://127.0.0.1:8080", false),
        ] {
            assert_eq!(
                origins.allow(&from(origin, "docs.example.com")),
                allowed,
                "{origin:?}"
            );
        }
        assert!(origins.allow(&HeaderMap::new()), "no browser");
    }

    #[test]
    fn without_authentication_pages_of_this_machine_only() {
        for (origin, host, allowed) in [
            ("http://127.0.0.1:8080", "127.0.0.1:8080", true),
            ("http://localhost:5173", "127.0.0.1:8080", true),
            ("http://[::1]:5173", "127.0.0.1:8080", true),
            ("http://192.168.1.5:8080", "192.168.1.5:8080", true),
            ("https://evil.test", "127.0.0.1:8080", false),
            // a name of theirs that leads here
            ("http://evil.test:8080", "evil.test:8080", false),
            ("http://localhost.evil.test", "127.0.0.1:8080", false),
            ("http://127.0.0.1.evil.test", "127.0.0.1:8080", false),
            ("null", "127.0.0.1:8080", false),
        ] {
            assert_eq!(
                Origins::Local.allow(&from(origin, host)),
                allowed,
                "{origin:?} to {host}"
            );
        }
        assert!(Origins::Any.allow(&from("null", "h")));
    }

    #[test]
    fn what_is_no_origin_is_told() {
        for text in [
            "docs.example.com",
            "https://docs.example.com/",
            "https://a/b",
            "*",
            "ws://a",
        ] {
            assert!(Origins::listed(&[text.to_owned()]).is_err(), "{text}");
        }
    }

    fn from(origin: &str, host: &str) -> HeaderMap {
        let value = |text| HeaderValue::from_str(text).unwrap();
        [(header::ORIGIN, value(origin)), (header::HOST, value(host))]
            .into_iter()
            .collect()
    }
}
