//! The editor page: bundled from `web/src` by `web/build.js`, committed as `web/dist`, embedded here.
//!
//! Its policy allows nothing from elsewhere and nothing inline. Names of assets carry a hash of their
//! bytes, so browsers keep them for good; the page that names them is asked for each time.

use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// `data:` is for the theme's icons and for pictures that others pasted into a document.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
                      base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

#[derive(rust_embed::Embed)]
#[folder = "web/dist"]
struct Dist;

/// Routes of the page: `/` and what it loads from `/assets/`.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/", get(page))
        .route("/assets/{*path}", get(asset))
}

async fn page() -> Response {
    embedded("index.html", "no-cache")
}

async fn asset(Path(path): Path<String>) -> Response {
    embedded(
        &format!("assets/{path}"),
        "public, max-age=31536000, immutable",
    )
}

fn embedded(name: &str, cache: &'static str) -> Response {
    let Some(file) = Dist::get(name) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let headers: [(HeaderName, &str); 6] = [
        (header::CONTENT_TYPE, content_type(name)),
        (header::CACHE_CONTROL, cache),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        // A document's address is nobody else's business.
        (header::REFERRER_POLICY, "no-referrer"),
        (
            HeaderName::from_static("cross-origin-opener-policy"),
            "same-origin",
        ),
    ];
    (headers, file.data).into_response()
}

fn content_type(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "text/plain; charset=utf-8",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use tower::Service;

    #[tokio::test]
    async fn the_page_and_all_that_it_names_are_served() {
        let page = fetch("/").await;
        assert_eq!(page.header("cache-control"), "no-cache");
        assert_eq!(page.header("content-type"), "text/html; charset=utf-8");
        let assets: Vec<&str> = page
            .text
            .split('"')
            .filter(|part| part.starts_with("/assets/"))
            .collect();
        assert!(
            ["main-", ".js", ".css", ".svg"]
                .iter()
                .all(|part| assets.iter().any(|asset| asset.contains(part))),
            "{assets:?}"
        );
        for name in assets {
            let asset = fetch(name).await;
            assert_eq!(asset.status, StatusCode::OK, "{name}");
            assert_eq!(
                asset.header("cache-control"),
                "public, max-age=31536000, immutable"
            );
            assert!(!asset.text.is_empty(), "{name}");
        }
    }

    #[tokio::test]
    async fn nothing_inline_or_from_elsewhere_is_allowed() {
        let page = fetch("/").await;
        let policy = page.header("content-security-policy");
        assert!(policy.starts_with("default-src 'none';"), "{policy}");
        assert!(
            !policy.contains("unsafe") && !policy.contains('*') && !policy.contains("http"),
            "{policy}"
        );
        assert!(
            !page.text.contains("<style")
                && !page.text.contains("style=")
                && !page.text.contains("onclick")
        );
        assert!(!page.text.contains("<script>"));
    }

    #[tokio::test]
    async fn an_unknown_asset_is_not_found() {
        for path in [
            "/assets/nothing.js",
            "/assets/../Cargo.toml",
            "/assets/%2e%2e/%2e%2e/Cargo.toml",
            "/assets/../index.html",
        ] {
            assert_eq!(fetch(path).await.status, StatusCode::NOT_FOUND, "{path}");
        }
    }

    struct Fetched {
        status: StatusCode,
        headers: axum::http::HeaderMap,
        text: String,
    }

    impl Fetched {
        fn header(&self, name: &str) -> &str {
            self.headers[name].to_str().unwrap()
        }
    }

    async fn fetch(path: &str) -> Fetched {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = router::<()>().with_state(()).call(request).await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        let text =
            String::from_utf8_lossy(&to_bytes(response.into_body(), usize::MAX).await.unwrap())
                .into_owned();
        Fetched {
            status,
            headers,
            text,
        }
    }
}
