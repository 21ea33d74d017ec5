//! That others know of the worker: its registration under a lease, and its state.

use std::sync::Arc;
use std::time::Duration;

use stoa_metastore::{Error, Records, Registration, WorkerRecord, WorkerState};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::shared::{Shared, jitter};

/// The shortest time between two publications of the state.
const STATE_INTERVAL: Duration = Duration::from_millis(500);
/// The first wait after the metastore failed.
const BACK_OFF_MIN: Duration = Duration::from_millis(200);
/// How long the farewell may take.
const FAREWELL: Duration = Duration::from_secs(2);
/// The name of its problem.
const PROBLEM: &str = "registration";

/// Registers, renews and publishes the state until `stop`, and registers again whenever the
/// registration was lost. The cache is not touched by any of it.
pub(crate) async fn run(
    shared: Arc<Shared>,
    records: Records,
    mut record: WorkerRecord,
    mut stop: watch::Receiver<bool>,
) {
    let mut registered: Option<Registration> = None;
    tokio::select! {
        _ = stop.wait_for(|stop| *stop) => {}
        () = keep_registered(&shared, &records, &mut record, &mut registered) => {}
    }
    if let Some(registration) = registered
        && timeout(FAREWELL, records.deregister_worker(registration))
            .await
            .is_err()
    {
        tracing::debug!("the metastore did not take the farewell; the lease will run out");
    }
}

async fn keep_registered(
    shared: &Shared,
    records: &Records,
    record: &mut WorkerRecord,
    registered: &mut Option<Registration>,
) {
    let settings = &shared.settings;
    let mut back_off = BACK_OFF_MIN;
    let mut directory = shared.cache_incarnation.subscribe();
    loop {
        let incarnation = *directory.borrow_and_update();
        // Empty where others cannot read it.
        if !record.cache_incarnation.is_empty() {
            record.cache_incarnation = format!("{incarnation:016x}");
        }
        // Before the registration, so that no change after it is missed.
        let changes = records.store().changes();
        match records.register_worker(record, settings.lease_ttl).await {
            Ok(registration) => {
                tracing::info!(worker = record.id, "registered");
                shared.problem(PROBLEM, None);
                back_off = BACK_OFF_MIN;
                *registered = Some(registration.clone());
                let lost = tokio::select! {
                    lost = hold(shared, records, &registration, changes) => lost,
                    // Under the name of the new one others would look for the old one's segments.
                    Ok(()) = directory.changed() => {
                        tracing::info!(worker = record.id, "registering the new cache directory");
                        continue;
                    }
                };
                match records.store().changes() {
                    // Processes come and go: one that kept the metastore has ended.
                    Some(_) => tracing::info!(worker = record.id, %lost, "registering again"),
                    None => tracing::warn!(worker = record.id, %lost, "registering again"),
                }
                *registered = None;
            }
            Err(error) => {
                let text = format!("worker {} cannot register: {error}", record.id);
                shared.problem(PROBLEM, Some(text));
            }
        }
        sleep(back_off.mul_f64(0.75 + 0.5 * jitter())).await;
        back_off = (back_off * 2).min(settings.heartbeat);
    }
}

/// Renews and publishes until the registration is lost; returns why.
async fn hold(
    shared: &Shared,
    records: &Records,
    registration: &Registration,
    mut changes: Option<watch::Receiver<u64>>,
) -> Error {
    let heartbeat = shared.settings.heartbeat;
    let mut state = shared.state.subscribe();
    let mut published: Option<WorkerState> = None;
    let mut next_renewal = Instant::now() + heartbeat;
    let mut next_publication = Instant::now();
    loop {
        let due = published.as_ref() != Some(&*state.borrow_and_update());
        tokio::select! {
            () = tokio::time::sleep_until(next_renewal) => {
                match timeout(heartbeat, records.renew(registration)).await {
                    Ok(Ok(())) => {
                        shared.problem(PROBLEM, None);
                        next_renewal = Instant::now() + heartbeat;
                    }
                    Ok(Err(error @ Error::LeaseLost { .. })) => return error,
                    // The lease may still be good: ask again, sooner.
                    Ok(Err(error)) => {
                        let text = format!("the registration cannot be renewed: {error}");
                        shared.problem(PROBLEM, Some(text));
                        next_renewal = Instant::now() + heartbeat / 4;
                    }
                    Err(_) => next_renewal = Instant::now() + heartbeat / 4,
                }
            }
            () = tokio::time::sleep_until(next_publication), if due => {
                let current = state.borrow_and_update().clone();
                next_publication = Instant::now() + STATE_INTERVAL;
                match timeout(heartbeat, records.publish_state(registration, &current)).await {
                    Ok(Ok(())) => published = Some(current),
                    Ok(Err(error @ Error::LeaseLost { .. })) => return error,
                    Ok(Err(error)) => {
                        tracing::debug!(%error, "the state cannot be published");
                        next_publication = Instant::now() + heartbeat / 4;
                    }
                    Err(_) => next_publication = Instant::now() + heartbeat / 4,
                }
            }
            // Not at the next renewal: nobody plans for a worker that is not registered.
            () = store_changed(&mut changes) => {
                return Error::LeaseLost { lease: registration.lease };
            }
            changed = state.changed() => {
                if changed.is_err() {
                    // The worker is gone: nothing changes any more, but the lease is held until
                    // somebody stops this.
                    std::future::pending::<()>().await;
                }
            }
        }
    }
}

/// Waits until another process keeps the metastore; for ever where that does not happen.
async fn store_changed(changes: &mut Option<watch::Receiver<u64>>) {
    if let Some(changes) = changes
        && changes.changed().await.is_ok()
    {
        return;
    }
    // Never; or the handle is gone, and with it who waits.
    std::future::pending().await
}
