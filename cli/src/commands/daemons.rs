//! `stoa worker` and `stoa coordinator`: run until told to stop, and leave the cache behind.

use std::time::Duration;

use stoa_cache_manager::{Worker, WorkerSettings};
use stoa_control::Listen;
use stoa_coordinator::{Coordinator, CoordinatorListeners, CoordinatorSettings};
use stoa_datafusion::{Embedded, EmbeddedSettings};
use stoa_metastore::Records;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::failures::embedded_error;

/// The first and the longest wait before an etcd that does not answer is asked again.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// Runs a worker; without etcd the coordinator too, in the same process.
pub async fn worker(context: &Context) -> Result<()> {
    let mut stop = Stop::new()?;
    if context.is_embedded() {
        return embedded_worker(context, &mut stop).await;
    }
    let Some(records) = connect(context, &mut stop).await? else {
        return Ok(());
    };
    let settings = worker_settings(context)?;
    let id = settings.id.clone();
    let worker = Worker::start(settings, records, context.origin()).await?;
    tracing::info!(
        worker = id,
        location = %context.config.cache.location.display(),
        capacity_bytes = context.config.cache.size_bytes,
        metastore = context.metastore_name(),
        "worker runs"
    );
    let signal = stop.wait().await;
    tracing::info!(signal, "worker stops; its cache stays for the next start");
    worker.shutdown().await;
    Ok(())
}

/// Worker and coordinator in one process, over a state that other processes share. Where one of
/// these runs the cache already, this one waits for its end.
async fn embedded_worker(context: &Context, stop: &mut Stop) -> Result<()> {
    let control = listen("control.address", &context.config.control.address, context)?;
    let http = listen(
        "http.address",
        &context.config.control.http_address,
        context,
    )?;
    let settings = EmbeddedSettings {
        control: Some(control),
        http: Some(http),
        ..context.embedded_settings()
    };
    let mut embedded = Embedded::start(settings).await.map_err(embedded_error)?;
    if let Err(error) = embedded.wait_for_worker().await {
        embedded.shutdown().await;
        return Err(embedded_error(error));
    }
    tracing::info!(
        location = %context.config.cache.location.display(),
        capacity_bytes = context.config.cache.size_bytes,
        metastore = context.metastore_name(),
        "{}",
        match embedded.is_owner() {
            true => "worker runs",
            false => "another process runs the cache; this one goes on when that ends",
        }
    );
    let signal = stop.wait().await;
    tracing::info!(signal, "worker stops; its cache stays for the next start");
    embedded.shutdown().await;
    Ok(())
}

/// Runs a candidate for coordinator.
pub async fn coordinator(context: &Context) -> Result<()> {
    if context.is_embedded() {
        return Err(Error::Usage(
            "a coordinator of its own needs etcd: give --etcd, or run `stoa worker`, which is \
             both in one process"
                .into(),
        ));
    }
    let mut stop = Stop::new()?;
    let Some(records) = connect(context, &mut stop).await? else {
        return Ok(());
    };
    let settings = coordinator_settings(context);
    let listeners = CoordinatorListeners {
        control: Some(listen(
            "control.address",
            &context.config.control.address,
            context,
        )?),
        http: Some(listen(
            "http.address",
            &context.config.control.http_address,
            context,
        )?),
    };
    let coordinator = Coordinator::start(settings, listeners, records, context.origin()).await?;
    tracing::info!(metastore = context.metastore_name(), "coordinator runs");
    let signal = stop.wait().await;
    tracing::info!(signal, "coordinator stops");
    coordinator.shutdown().await?;
    Ok(())
}

/// The records; a daemon waits for an etcd that is not up yet. `None` when told to stop meanwhile.
async fn connect(context: &Context, stop: &mut Stop) -> Result<Option<Records>> {
    let mut wait = RETRY.0;
    loop {
        let reached = async {
            let records = context.records().await?;
            records.identity().await?;
            Ok::<_, Error>(records)
        };
        let error = match reached.await {
            Ok(records) => return Ok(Some(records)),
            Err(Error::NotReady(reason)) => reason,
            Err(error) => return Err(error),
        };
        tracing::warn!(reason = error, "waiting for the metastore");
        tokio::select! {
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(RETRY.1),
            _ = stop.wait() => return Ok(None),
        }
    }
}

fn worker_settings(context: &Context) -> Result<WorkerSettings> {
    let config = &context.config;
    let settings = WorkerSettings {
        host: config.worker.host.clone(),
        group_access: config.cache.group_access,
        lease_ttl: config.heartbeat.lease_ttl,
        heartbeat: config.heartbeat.period,
        freshness: config.cache.freshness,
        scrub_interval: config.cache.scrub_interval,
        fill_concurrency: config.worker.fill_concurrency,
        fill_memory_bytes: config.worker.fill_memory_bytes,
        control: Some(listen("control.address", &config.control.address, context)?),
        http: Some(listen(
            "http.address",
            &config.control.http_address,
            context,
        )?),
        pin: config.cache.pin,
        transfer: Some(context.transfer()),
        ..WorkerSettings::new(
            &config.worker.id,
            config.cache.location.clone(),
            config.cache.size_bytes,
        )
    };
    settings.validate()?;
    Ok(settings)
}

fn coordinator_settings(context: &Context) -> CoordinatorSettings {
    let config = &context.config;
    CoordinatorSettings {
        candidate: format!("{}:{}", config.worker.host, std::process::id()),
        election_ttl_ms: config.heartbeat.lease_ttl.as_millis() as u64,
        grace_ms: config.coordinator.grace.as_millis() as u64,
        absolute_balancer: config.cache.absolute_balancer,
        ..CoordinatorSettings::default()
    }
}

/// An address to serve on; host names are looked up here, so that `worker.host` works too.
fn listen(key: &str, text: &str, context: &Context) -> Result<Listen> {
    use std::net::ToSocketAddrs;
    let insecure = context.config.control.insecure;
    if let Ok(listen) = Listen::parse(text, insecure) {
        return Ok(listen);
    }
    let wrong = |reason: String| Error::Usage(format!("`{key}` = `{text}`: {reason}"));
    let address = text
        .to_socket_addrs()
        .map_err(|error| wrong(error.to_string()))?
        .next()
        .ok_or_else(|| wrong("the name has no address".into()))?;
    let listen = Listen { address, insecure };
    listen.check()?;
    Ok(listen)
}

/// SIGTERM and SIGINT, caught from the start so that none is missed while starting.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> Result<Stop> {
        let listen = |kind| {
            signal(kind).map_err(|error| Error::while_doing("cannot listen for signals", error))
        };
        Ok(Stop {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    /// Waits for one of them; which it was.
    async fn wait(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
