//! Reads the flags, starts the log, runs the node.

use clap::Parser;
use collab_node::config::{Command, Flags, LogFormat};
use collab_node::doctor;
use collab_node::store::postgres::Warnings;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

/// Documents that are opened or changed at the same time with work that takes long; others wait.
const HEAVY_WORK_MAX: usize = 64;

/// What is freed goes back to the system within seconds. The allocator of glibc keeps the memory of ten thousand documents
/// that were open once, for one that is in use lies behind them.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    start_log(flags.log_format);
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("a TLS provider was installed twice"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(HEAVY_WORK_MAX)
        .build()?;
    if let Some(Command::Doctor(task)) = &flags.command {
        return runtime.block_on(doctor::run(task.clone(), &flags.storage()?, flags.slots));
    }
    let config = flags.into_config()?;
    runtime.block_on(collab_node::server::run(config))
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let log = match format {
        LogFormat::Text => log.boxed(),
        LogFormat::Json => log.json().boxed(),
    };
    // Whatever people want to read, the store hears all that servers warn of.
    tracing_subscriber::registry()
        .with(log.with_filter(filter))
        .with(Warnings.with_filter(LevelFilter::WARN))
        .init();
}
