//! Parses the configuration, starts log, health and lease, and runs the controller while it leads.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

use collab_operator::admin::{self, Metrics, Vitals};
use collab_operator::config::{Config, LogFormat};
use collab_operator::controller;
use collab_operator::lease::Elector;

/// Passes under way get this long to end after a signal.
const STOP_WITHIN: Duration = Duration::from_secs(20);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider is installed"))?;
    let config = Config::parse();
    start_log(config.log_format);

    let kubernetes = kube::Config::infer()
        .await
        .context("no way to a Kubernetes cluster is configured")?;
    let lease_namespace = config
        .lease_namespace
        .clone()
        .unwrap_or_else(|| kubernetes.default_namespace.clone());
    let client = kube::Client::try_from(kubernetes)?;
    let metrics = Metrics::new()?;
    let vitals = Vitals::default();
    let elector = Elector::new(
        client.clone(),
        &lease_namespace,
        &config.lease_name,
        &config.pod_name,
        vitals.clone(),
    );
    let holder = elector.identity().to_owned();
    let ctx = Arc::new(controller::Context::new(
        client,
        &config,
        &holder,
        metrics.clone(),
    )?);

    let stop = CancellationToken::new();
    stop_on_signal(stop.clone())?;
    let end = CancellationToken::new();
    let mut admin = tokio::spawn(admin::serve(
        config.listen,
        vitals.clone(),
        metrics.clone(),
        end.clone(),
    ));
    let (leads, mut leading) = watch::channel(false);
    let mut lease = tokio::spawn(elector.run(leads, end.clone()));
    let work = async {
        tokio::select! {
            waited = leading.wait_for(|leading| *leading) => { waited.context("the lease task ended")?; }
            () = stop.cancelled() => return Ok(()),
        }
        metrics.leader.set(1);
        vitals.controller.beat();
        controller::run(
            ctx,
            &config.watch_namespace,
            vitals.controller.clone(),
            stop.clone(),
        )
        .await
    };
    let overdue = async {
        stop.cancelled().await;
        tokio::time::sleep(STOP_WITHIN).await;
    };
    tokio::select! {
        ended = work => ended?,
        ended = &mut lease => {
            // Nothing may be written any more, not even by a pass under way.
            error!(result = ?ended, "the lease is lost; ends at once");
            std::process::exit(1);
        }
        ended = &mut admin => ended?.context("cannot serve health and metrics")?,
        () = overdue => info!("passes under way did not end in time"),
    }
    end.cancel();
    lease.await??;
    info!("ended");
    Ok(())
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}

fn stop_on_signal(stop: CancellationToken) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("told to stop");
        stop.cancel();
    });
    Ok(())
}
