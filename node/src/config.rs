//! The one reader of flags and environment.
//!
//! [`Flags`] are what a person writes, [`Config`] is what the rest of the node reads: complete, checked,
//! secrets loaded.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};
use collab_core::ids::NodeId;
use collab_core::limits::{CONNECTIONS_DEFAULT, SLOTS_DEFAULT, SLOTS_MAX, SLOTS_MIN};
use reqwest::Url;
use uuid::Uuid;

use crate::auth::issuer::{IssuerConfig, is_safe};
use crate::doctor::Doctor;
use crate::listener::Places;
use crate::origin::{OriginError, Origins};

/// Hosts collaborative documents for any Yjs editor.
///
/// Without arguments: one embedded node on `SQLite` in the working folder. With a database URL: a node of a cluster.
#[derive(Clone, Debug, Parser)]
#[command(name = "collab-node", version)]
pub struct Flags {
    /// Address for clients: page, WebSocket, REST.
    #[arg(long, env = "COLLAB_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Address for health, metrics, control API and other nodes [cluster: 0.0.0.0:8081; embedded: none].
    #[arg(long, env = "COLLAB_INTERNAL_LISTEN")]
    pub internal_listen: Option<SocketAddr>,
    /// Embedded: folder of collab.sqlite.
    #[arg(long, env = "COLLAB_DATA", default_value = ".", global = true)]
    pub data: PathBuf,
    /// Postgres of the cluster, `postgres://user:password@host/database`.
    #[arg(
        long,
        env = "COLLAB_DATABASE_URL",
        conflicts_with = "database_url_file",
        hide_env_values = true,
        global = true
    )]
    pub database_url: Option<String>,
    /// File that holds the database URL.
    #[arg(long, env = "COLLAB_DATABASE_URL_FILE", global = true)]
    pub database_url_file: Option<PathBuf>,
    /// Redis for presence and cached snapshots, redis://…, or none.
    #[arg(
        long,
        env = "COLLAB_REDIS",
        default_value = "none",
        hide_env_values = true
    )]
    pub redis: String,
    /// File that holds the Redis URL.
    #[arg(long, env = "COLLAB_REDIS_URL_FILE")]
    pub redis_url_file: Option<PathBuf>,
    /// File with the secret of client tokens (JWT, HS256). `COLLAB_AUTH_SECRET` holds the value itself.
    #[arg(long, env = "COLLAB_AUTH_SECRET_FILE")]
    pub auth_secret_file: Option<PathBuf>,
    /// The secret of client tokens, from the environment only.
    #[arg(long, env = "COLLAB_AUTH_SECRET", hide = true, hide_env_values = true)]
    pub auth_secret: Option<String>,
    /// Identity provider whose tokens are accepted, as `iss` has it: <https://id.example.com/realm>. Its keys are found by
    /// `OpenID` Connect Discovery.
    #[arg(long, env = "COLLAB_AUTH_ISSUER")]
    pub auth_issuer: Option<String>,
    /// For whom the identity provider's tokens have to be, as `aud` has it.
    #[arg(long, env = "COLLAB_AUTH_AUDIENCE")]
    pub auth_audience: Option<String>,
    /// Where the identity provider's keys are (a JWK Set), for one without Discovery.
    #[arg(long, env = "COLLAB_AUTH_JWKS_URL")]
    pub auth_jwks_url: Option<String>,
    /// File with the bearer token of the control API and of nodes among themselves.
    #[arg(long, env = "COLLAB_CONTROL_TOKEN_FILE")]
    pub control_token_file: Option<PathBuf>,
    /// The bearer token, from the environment only.
    #[arg(
        long,
        env = "COLLAB_CONTROL_TOKEN",
        hide = true,
        hide_env_values = true
    )]
    pub control_token: Option<String>,
    /// Name of this node, unique in the cluster [default: the host name].
    #[arg(long, env = "COLLAB_NODE_NAME")]
    pub node_name: Option<String>,
    /// What outlives the process: the uid of its pod [default: random].
    #[arg(long, env = "COLLAB_POD_UID")]
    pub pod_uid: Option<String>,
    /// host:port at which other nodes reach the internal listener [default: its address].
    #[arg(long, env = "COLLAB_ADVERTISE")]
    pub advertise: Option<String>,
    /// Zone of this node.
    #[arg(long, env = "COLLAB_ZONE", default_value = "")]
    pub zone: String,
    /// Slots of the cluster: a power of two from 256 to 16384, fixed when the cluster is created.
    #[arg(long, env = "COLLAB_SLOTS", default_value_t = SLOTS_DEFAULT, global = true)]
    pub slots: u16,
    /// Pages that may open sockets, as origins separated by commas [with authentication: all; without: pages of this machine].
    #[arg(long, env = "COLLAB_ORIGINS", value_delimiter = ',')]
    pub origins: Vec<String>,
    /// Connections of clients that this node takes at the same time.
    #[arg(long, env = "COLLAB_CONNECTIONS_MAX", default_value_t = CONNECTIONS_DEFAULT)]
    pub connections_max: usize,
    /// Connections from one address; behind a proxy all have the address of the proxy [default: no limit].
    #[arg(long, env = "COLLAB_CONNECTIONS_PER_ADDRESS_MAX")]
    pub connections_per_address_max: Option<usize>,
    /// Memory for open documents in MiB, as estimated from what is in them; beyond it those that nobody has open are
    /// unloaded, and then no more are opened [default: no limit but that of the container].
    #[arg(long, env = "COLLAB_MEMORY_BUDGET_MIB", value_parser = clap::value_parser!(u32).range(1..))]
    pub memory_budget_mib: Option<u32>,
    /// Serve without authentication beyond loopback: anyone who reaches the address reads and writes every document.
    #[arg(long, env = "COLLAB_INSECURE_NO_AUTH")]
    pub insecure_no_auth: bool,
    /// Form of the log.
    #[arg(long, env = "COLLAB_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Something else than running a node.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What else the program does.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Look after stored documents, as files too: verify, repair, export, import, backup, restore.
    Doctor(Doctor),
}

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// What a node runs with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address for clients.
    pub listen: SocketAddr,
    /// Address for the cluster; `None` serves health and metrics on [`Config::listen`].
    pub internal_listen: Option<SocketAddr>,
    /// Pages that may open sockets.
    pub origins: Origins,
    /// How many connections of clients there may be.
    pub places: Places,
    /// Memory for open documents in bytes, if it is limited.
    pub memory_budget: Option<u64>,
    /// Where documents are stored.
    pub storage: Storage,
    /// URL of Redis, if any.
    pub redis: Option<String>,
    /// Secret of client tokens; without it, and without an issuer, everybody may do everything.
    pub auth_secret: Option<String>,
    /// Identity provider whose tokens are accepted, too.
    pub issuer: Option<IssuerConfig>,
    /// Bearer token of the control API and of nodes among themselves.
    pub control_token: Option<String>,
    /// This node.
    pub node: NodeId,
    /// This run of it.
    pub incarnation: Uuid,
    /// What outlives the process.
    pub pod_uid: String,
    /// `host:port` of the internal listener for other nodes.
    pub advertise: String,
    /// Zone, or empty.
    pub zone: String,
    /// Slots of the cluster.
    pub slots: u16,
}

/// Where documents are stored.
#[derive(Clone, Debug)]
pub enum Storage {
    /// `SQLite` in this folder; this process alone.
    Embedded(PathBuf),
    /// Postgres, shared by the nodes of a cluster.
    Cluster(String),
}

/// A setting that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The address is reachable by others and nothing protects the documents.
    #[error(
        "refusing to listen on {0} without authentication: anyone who reaches it could read and write every document; \
         give --auth-secret-file FILE or --auth-issuer URL, listen on 127.0.0.1, or say --insecure-no-auth"
    )]
    OpenToAll(SocketAddr),
    /// The control API is reachable by others and nothing protects it.
    #[error(
        "refusing to open the control API on {0} without a token; give --control-token-file FILE or listen on 127.0.0.1"
    )]
    ControlOpenToAll(SocketAddr),
    /// A page that may open sockets is not named as browsers name it.
    #[error("--origins: {0}")]
    Origin(#[from] OriginError),
    /// An address of the identity provider cannot be used.
    #[error("{flag} {value:?}: {reason}")]
    Issuer {
        /// The flag that gave it.
        flag: &'static str,
        /// What it gave.
        value: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// The number of slots is none of the allowed ones.
    #[error(
        "--slots {0} is not a power of two from {SLOTS_MIN} to {SLOTS_MAX}; the default is {SLOTS_DEFAULT}"
    )]
    Slots(u16),
    /// A secret's file cannot be read.
    #[error("{flag} {path}: {source}; check the path and its permissions")]
    File {
        /// The flag that names it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A secret is too short to be one.
    #[error(
        "{flag} holds {bytes} bytes; a secret needs at least {SECRET_BYTES_MIN}, for example from `openssl rand -hex 32`"
    )]
    WeakSecret {
        /// The flag that gave it.
        flag: &'static str,
        /// Its length.
        bytes: usize,
    },
}

/// A shorter secret could be guessed.
const SECRET_BYTES_MIN: usize = 16;

impl Flags {
    /// Where documents are stored.
    ///
    /// # Errors
    /// When the file of the database URL cannot be read.
    pub fn storage(&self) -> Result<Storage, ConfigError> {
        let url = match &self.database_url_file {
            Some(path) => Some(read("--database-url-file", path)?),
            None => self.database_url.clone(),
        };
        Ok(url.map_or_else(|| Storage::Embedded(self.data.clone()), Storage::Cluster))
    }

    /// Checks the flags and reads the files that they name.
    ///
    /// # Errors
    /// When a setting is unsafe, out of range or cannot be read; the text says what to do.
    pub fn into_config(self) -> Result<Config, ConfigError> {
        if !self.slots.is_power_of_two() || !(SLOTS_MIN..=SLOTS_MAX).contains(&self.slots) {
            return Err(ConfigError::Slots(self.slots));
        }
        let storage = self.storage()?;
        let auth_secret = secret(
            "--auth-secret-file",
            self.auth_secret_file.as_deref(),
            self.auth_secret,
        )?;
        let issuer = issuer(self.auth_issuer, self.auth_audience, self.auth_jwks_url)?;
        let has_auth = auth_secret.is_some() || issuer.is_some();
        if !has_auth && !self.listen.ip().is_loopback() && !self.insecure_no_auth {
            return Err(ConfigError::OpenToAll(self.listen));
        }
        let origins = if !self.origins.is_empty() {
            Origins::listed(&self.origins)?
        } else if has_auth || self.insecure_no_auth {
            Origins::Any
        } else {
            Origins::Local
        };
        let control_token = secret(
            "--control-token-file",
            self.control_token_file.as_deref(),
            self.control_token,
        )?;
        let redis = match &self.redis_url_file {
            Some(path) => read("--redis-url-file", path)?,
            None => self.redis,
        };
        let internal_listen = match (&storage, self.internal_listen) {
            (Storage::Cluster(_), None) => Some(SocketAddr::from(([0, 0, 0, 0], 8081))),
            (_, given) => given,
        };
        if let Some(address) = internal_listen
            && control_token.is_none()
            && !address.ip().is_loopback()
        {
            return Err(ConfigError::ControlOpenToAll(address));
        }
        let node = self.node_name.unwrap_or_else(host_name);
        Ok(Config {
            listen: self.listen,
            internal_listen,
            origins,
            places: Places {
                max: self.connections_max,
                per_address_max: self.connections_per_address_max,
            },
            memory_budget: self.memory_budget_mib.map(|mib| u64::from(mib) << 20),
            storage,
            redis: (!redis.is_empty() && redis != "none").then_some(redis),
            auth_secret,
            issuer,
            control_token,
            incarnation: Uuid::new_v4(),
            pod_uid: self.pod_uid.unwrap_or_else(|| Uuid::new_v4().to_string()),
            advertise: self.advertise.unwrap_or_else(|| {
                internal_listen.map_or_else(String::new, |address| address.to_string())
            }),
            node: NodeId(node),
            zone: self.zone,
            slots: self.slots,
        })
    }
}

fn issuer(
    issuer: Option<String>,
    audience: Option<String>,
    keys: Option<String>,
) -> Result<Option<IssuerConfig>, ConfigError> {
    match (issuer, audience, keys) {
        (None, None, None) => Ok(None),
        (Some(issuer), Some(audience), keys) => Ok(Some(IssuerConfig {
            issuer: provider_url("--auth-issuer", issuer)?,
            audience,
            keys: keys
                .map(|keys| provider_url("--auth-jwks-url", keys))
                .transpose()?,
        })),
        (Some(value), None, _) => Err(ConfigError::Issuer {
            flag: "--auth-issuer",
            value,
            reason: "give --auth-audience, too: its tokens for other services are not for this one"
                .to_owned(),
        }),
        (None, Some(value), _) => Err(ConfigError::Issuer {
            flag: "--auth-audience",
            value,
            reason: "give --auth-issuer, too".to_owned(),
        }),
        (None, None, Some(value)) => Err(ConfigError::Issuer {
            flag: "--auth-jwks-url",
            value,
            reason: "give --auth-issuer and --auth-audience, too".to_owned(),
        }),
    }
}

/// An address whose answers nobody else can give.
fn provider_url(flag: &'static str, value: String) -> Result<Url, ConfigError> {
    let reason = match Url::parse(&value) {
        Ok(url) if is_safe(&url) => return Ok(url),
        Ok(_) => "whoever is in between could give keys of their own; give an address with https"
            .to_owned(),
        Err(error) => format!("{error}; give an address like https://id.example.com/realm"),
    };
    Err(ConfigError::Issuer {
        flag,
        value,
        reason,
    })
}

fn secret(
    flag: &'static str,
    file: Option<&Path>,
    value: Option<String>,
) -> Result<Option<String>, ConfigError> {
    let secret = match file {
        Some(path) => Some(read(flag, path)?),
        None => value,
    };
    match secret {
        Some(secret) if secret.len() < SECRET_BYTES_MIN => Err(ConfigError::WeakSecret {
            flag,
            bytes: secret.len(),
        }),
        secret => Ok(secret),
    }
}

fn read(flag: &'static str, path: &Path) -> Result<String, ConfigError> {
    let text = fs::read_to_string(path);
    let text = text.map_err(|source| ConfigError::File {
        flag,
        path: path.to_owned(),
        source,
    })?;
    Ok(text.trim().to_owned())
}

fn host_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "node".to_owned(), |name| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(arguments: &[&str]) -> Result<Config, ConfigError> {
        let arguments = std::iter::once(&"collab-node").chain(arguments);
        Flags::try_parse_from(arguments)
            .expect("flags parse")
            .into_config()
    }

    #[test]
    fn without_arguments_it_is_embedded_and_on_loopback() {
        let config = config(&[]).unwrap();
        assert!(config.listen.ip().is_loopback());
        assert!(matches!(config.storage, Storage::Embedded(_)));
        assert_eq!(config.internal_listen, None);
    }

    #[test]
    fn it_refuses_to_listen_beyond_loopback_without_authentication() {
        let refused = config(&["--listen", "0.0.0.0:8080"])
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("0.0.0.0:8080") && refused.contains("--auth-secret-file"),
            "{refused}"
        );
        assert!(config(&["--listen", "0.0.0.0:8080", "--insecure-no-auth"]).is_ok());
        assert!(
            config(&[
                "--listen",
                "0.0.0.0:8080",
                "--auth-secret",
                "0123456789abcdef"
            ])
            .is_ok()
        );
    }

    #[test]
    fn an_identity_provider_is_named_whole_and_nobody_is_in_between() {
        let of = |flags: &[&str]| config(flags).map(|config| config.issuer.is_some());
        let (issuer, audience) = ("--auth-issuer", "--auth-audience");
        let keys = "--auth-jwks-url";
        let id = "https://id.example.com/realm";
        let all = ["--listen", "0.0.0.0:8080", issuer, id, audience, "editor"];
        assert!(of(&all).unwrap());
        assert!(of(&[issuer, "http://127.0.0.1:9", audience, "editor"]).unwrap());
        assert!(!of(&[]).unwrap());
        for (flags, named) in [
            (&[issuer, id][..], audience),
            (&[audience, "editor"], issuer),
            (&[keys, id], issuer),
            (
                &[issuer, "http://id.example.com", audience, "editor"],
                "https",
            ),
            (&[issuer, "id.example.com", audience, "editor"], "https://"),
            (&[issuer, id, audience, "editor", keys, "ftp://id"], keys),
        ] {
            let refused = of(flags).unwrap_err().to_string();
            assert!(refused.contains(named), "{refused}");
        }
    }

    #[test]
    fn it_refuses_an_open_control_api_weak_secrets_and_odd_slots() {
        let cluster = ["--database-url", "postgres://h/d"];
        assert!(matches!(
            config(&cluster),
            Err(ConfigError::ControlOpenToAll(_))
        ));
        assert!(matches!(
            config(&["--auth-secret", "short"]),
            Err(ConfigError::WeakSecret { .. })
        ));
        assert!(matches!(
            config(&["--slots", "1000"]),
            Err(ConfigError::Slots(1000))
        ));
    }
}
