//! Tokens of an identity provider, which is one here: what it publishes, and what becomes of it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header, get_current_timestamp};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tokio::time::sleep;

use super::*;

/// Beside the provider, as every node in Kubernetes has it.
const SECRET: &str = "0123456789abcdef0123456789abcdef";
/// A node reads the keys at most once in this time.
const PAUSE: Duration = Duration::from_secs(5);

struct Provider {
    url: String,
    published: Arc<Published>,
    server: AbortHandle,
}

#[derive(Default)]
struct Published {
    url: String,
    keys: Mutex<String>,
    reads: AtomicUsize,
}

impl Provider {
    async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}/realm", listener.local_addr()?);
        let published = Arc::new(Published {
            url: url.clone(),
            ..Published::default()
        });
        let configuration = async |State(published): State<Arc<Published>>| {
            let url = &published.url;
            json!({"issuer": url, "jwks_uri": format!("{url}/keys")}).to_string()
        };
        let keys = async |State(published): State<Arc<Published>>| {
            published.reads.fetch_add(1, Ordering::Relaxed);
            published.keys.lock().unwrap().clone()
        };
        let router = Router::new()
            .route(
                "/realm/.well-known/openid-configuration",
                get(configuration),
            )
            .route("/realm/keys", get(keys))
            .with_state(published.clone());
        let server = axum::serve(listener, router).into_future();
        let server = tokio::spawn(async move { server.await.unwrap() }).abort_handle();
        Ok(Self {
            url,
            published,
            server,
        })
    }

    fn publish(&self, signers: &[&Signer]) {
        let keys: Vec<&Jwk> = signers.iter().map(|signer| &signer.public).collect();
        self.answer(json!({ "keys": keys }).to_string());
    }

    fn answer(&self, keys: impl Into<String>) {
        *self.published.keys.lock().unwrap() = keys.into();
    }

    fn reads(&self) -> usize {
        self.published.reads.load(Ordering::Relaxed)
    }
}

/// A key of the provider.
struct Signer {
    id: &'static str,
    key: EncodingKey,
    public: Jwk,
    public_bytes: Vec<u8>,
}

impl Signer {
    fn new(id: &'static str) -> Result<Self> {
        let pair = rcgen::KeyPair::generate()?;
        let key = EncodingKey::from_ec_pem(pair.serialize_pem().as_bytes())?;
        let mut public = Jwk::from_encoding_key(&key, Algorithm::ES256)?;
        public.common.key_id = Some(id.to_owned());
        Ok(Self {
            id,
            key,
            public,
            public_bytes: pair.public_key_raw().to_vec(),
        })
    }

    fn signs(&self, claims: &Value) -> String {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.id.to_owned());
        jsonwebtoken::encode(&header, claims, &self.key).unwrap()
    }
}

/// What a node answers to who wants to open a socket with a token.
async fn answer(node: &Embedded, token: &str) -> Result<String> {
    let opened = Raw::open_with(node, &format!("/ws/realm?token={token}"), "").await?;
    Ok(opened.map_or_else(|answer| answer, |_| "opened".to_owned()))
}

async fn until_opened(node: &Embedded, token: &str) -> Result<()> {
    let begun = Instant::now();
    loop {
        let answer = answer(node, token).await?;
        if answer == "opened" {
            return Ok(());
        }
        ensure!(answer.contains(" 401 "), "{answer}");
        ensure!(begun.elapsed() < PAUSE + SOON, "{answer}\n{}", node.log());
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_an_identity_provider_are_as_good_as_its_keys() -> Result<()> {
    let provider = Provider::start().await?;
    let (first, second) = (Signer::new("first")?, Signer::new("second")?);
    provider.publish(&[&first]);
    let flags = ["--auth-issuer", &provider.url, "--auth-audience", "editor"];
    let node = Embedded::start_by(&[], &flags, &[("COLLAB_AUTH_SECRET", SECRET)]).await?;
    let now = get_current_timestamp();
    let good = json!({
        "iss": provider.url, "aud": "editor", "sub": "ada", "exp": now + 600, "scope": "openid collab:write",
    });
    let with = |name: &str, value: Value| {
        let mut claims = good.clone();
        claims[name] = value;
        claims
    };
    until_opened(&node, &first.signs(&good)).await?;
    let both = with("aud", json!(["other", "editor"]));
    ensure!(answer(&node, &first.signs(&both)).await? == "opened");

    let own = json!({"sub": "app", "exp": now + 600});
    let secret = EncodingKey::from_secret(SECRET.as_bytes());
    let own = jsonwebtoken::encode(&Header::default(), &own, &secret)?;
    ensure!(answer(&node, &own).await? == "opened");

    let public = EncodingKey::from_secret(&first.public_bytes);
    let mut confused = Header::new(Algorithm::HS256);
    confused.kid = Some("first".to_owned());
    let nameless = Header::new(Algorithm::ES256);
    for (what, token) in [
        (
            "another audience",
            first.signs(&with("aud", json!("other"))),
        ),
        ("no audience", first.signs(&with("aud", Value::Null))),
        (
            "another issuer",
            first.signs(&with("iss", json!("http://127.0.0.1/realm"))),
        ),
        ("an ended one", first.signs(&with("exp", json!(now - 120)))),
        (
            "an end in words",
            first.signs(&with("exp", json!("tomorrow"))),
        ),
        ("one for later", first.signs(&with("nbf", json!(now + 300)))),
        ("nobody's", first.signs(&with("sub", Value::Null))),
        (
            "a key without name",
            jsonwebtoken::encode(&nameless, &good, &first.key)?,
        ),
        (
            "a public key as secret",
            jsonwebtoken::encode(&confused, &good, &public)?,
        ),
        ("a key under another's name", {
            let mut header = Header::new(Algorithm::ES256);
            header.kid = Some("first".to_owned());
            jsonwebtoken::encode(&header, &good, &second.key)?
        }),
        (
            "no signature",
            "eyJhbGciOiJub25lIiwia2lkIjoiZmlyc3QifQ.eyJzdWIiOiJhZGEifQ.".to_owned(),
        ),
    ] {
        let answer = answer(&node, &token).await?;
        ensure!(answer.contains(" 401 "), "{what}: {answer}");
    }
    let powerless = answer(&node, &first.signs(&with("scope", json!("openid")))).await?;
    ensure!(powerless.contains(" 403 "), "{powerless}");
    let delete = async |scope: &str| -> Result<u16> {
        let token = first.signs(&with("scope", json!(scope)));
        let request = reqwest::Client::new().delete(node.url() + "/api/v1/documents/never-made");
        Ok(request.bearer_auth(token).send().await?.status().as_u16())
    };
    ensure!((delete("collab:read").await?, delete("collab:write").await?) == (403, 404));

    // However many tokens come under keys that nobody knows, the provider is asked seldom.
    let reads = provider.reads();
    for _ in 0..50 {
        let answer = answer(&node, &second.signs(&good)).await?;
        ensure!(answer.contains(" 401 "), "{answer}");
    }
    sleep(Duration::from_millis(200)).await;
    ensure!(
        provider.reads() <= reads + 2,
        "read {} times",
        provider.reads() - reads
    );

    provider.publish(&[&second]);
    until_opened(&node, &second.signs(&good)).await?;
    let withdrawn = answer(&node, &first.signs(&good)).await?;
    ensure!(withdrawn.contains(" 401 "), "{withdrawn}");

    // What is not a set of keys takes none away; nor does silence.
    provider.answer("<html>");
    let reads = provider.reads();
    let begun = Instant::now();
    while provider.reads() == reads {
        ensure!(begun.elapsed() < PAUSE + SOON, "not read again");
        answer(&node, &first.signs(&good)).await?;
        sleep(Duration::from_millis(100)).await;
    }
    ensure!(answer(&node, &second.signs(&good)).await? == "opened");
    provider.server.abort();
    sleep(PAUSE).await;
    ensure!(answer(&node, &first.signs(&good)).await?.contains(" 401 "));
    ensure!(answer(&node, &second.signs(&good)).await? == "opened");
    Ok(())
}
