//! The one reader of flags and environment.

use std::net::SocketAddr;

use clap::{Parser, ValueEnum};
use collab_crds::collabcluster::ImagePullPolicy;

/// The operator of CollabCluster resources.
#[derive(Clone, Debug, Parser)]
#[command(name = "collab-operator", version, about)]
pub struct Config {
    /// Address of health, readiness and metrics.
    #[arg(long, env = "COLLAB_LISTEN", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,

    /// Only look after the clusters of these namespaces (repeat the flag, or separate by commas); all
    /// namespaces when absent.
    #[arg(long, env = "COLLAB_WATCH_NAMESPACE", value_delimiter = ',')]
    pub watch_namespace: Vec<String>,

    /// Image of the nodes, where a cluster does not name one.
    #[arg(long, env = "COLLAB_NODE_IMAGE", default_value = concat!("ghcr.io/collabcluster/collab-node:", env!("CARGO_PKG_VERSION")))]
    pub node_image: String,

    /// Image with Postgres and Patroni, where a cluster does not name one.
    #[arg(long, env = "COLLAB_POSTGRES_IMAGE", default_value = concat!("ghcr.io/collabcluster/collab-postgres:", env!("CARGO_PKG_VERSION")))]
    pub postgres_image: String,

    /// Image with Redis, where a cluster does not name one.
    #[arg(long, env = "COLLAB_REDIS_IMAGE", default_value = concat!("ghcr.io/collabcluster/collab-redis:", env!("CARGO_PKG_VERSION")))]
    pub redis_image: String,

    /// When images are pulled, where a cluster does not say.
    #[arg(long, env = "COLLAB_IMAGE_PULL_POLICY", default_value = "IfNotPresent", value_parser = pull_policy)]
    pub image_pull_policy: ImagePullPolicy,

    /// Namespace of the Lease by which one operator leads; by default that of its own pod.
    #[arg(long, env = "COLLAB_LEASE_NAMESPACE")]
    pub lease_namespace: Option<String>,

    /// Name of that Lease.
    #[arg(long, env = "COLLAB_LEASE_NAME", default_value = "collab-operator")]
    pub lease_name: String,

    /// Name of the operator's pod, for people who read the Lease, Events and terms.
    #[arg(long, env = "COLLAB_POD_NAME", default_value = "collab-operator")]
    pub pod_name: String,

    /// Form of the log lines.
    #[arg(long, env = "COLLAB_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// Form of the log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What the builders take from the configuration where a cluster does not say.
#[derive(Clone, Debug)]
pub struct Images {
    /// Image of the nodes.
    pub node: String,
    /// Image with Postgres and Patroni.
    pub postgres: String,
    /// Image with Redis.
    pub redis: String,
    /// When they are pulled.
    pub pull_policy: ImagePullPolicy,
}

impl Config {
    /// The images of this configuration.
    pub fn images(&self) -> Images {
        Images {
            node: self.node_image.clone(),
            postgres: self.postgres_image.clone(),
            redis: self.redis_image.clone(),
            pull_policy: self.image_pull_policy,
        }
    }
}

fn pull_policy(text: &str) -> Result<ImagePullPolicy, String> {
    match text {
        "Always" => Ok(ImagePullPolicy::Always),
        "IfNotPresent" => Ok(ImagePullPolicy::IfNotPresent),
        "Never" => Ok(ImagePullPolicy::Never),
        _ => Err("must be Always, IfNotPresent or Never".to_owned()),
    }
}
