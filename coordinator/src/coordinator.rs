//! The shell: campaigns, holds office term by term, and tells how it is.

use std::sync::Arc;
use std::time::Duration;

use stoa_control::{CoordinatorService, CoordinatorStatus, ServiceError};
use stoa_metastore::{ErrorKind, Leadership, Records};
use stoa_origin::Origin;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::settings::{Clock, CoordinatorSettings};
use crate::term::{End, Term};

/// The pause before campaigning again after a term that ended badly.
const BACK_OFF: Duration = Duration::from_millis(500);

/// What every term of office shares.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) records: Records,
    pub(crate) origin: Origin,
    pub(crate) settings: CoordinatorSettings,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) status: watch::Sender<CoordinatorStatus>,
}

/// A candidate for coordinator: campaigns, and while elected turns layouts into plans.
///
/// Cheap to clone. Everything that it writes is fenced by its election, so a coordinator that was
/// paused and wakes up after somebody else was elected writes nothing.
#[derive(Clone, Debug)]
pub struct Coordinator {
    shared: Arc<Shared>,
}

impl Coordinator {
    /// A candidate that does nothing until [`Coordinator::run`].
    pub fn new(
        records: Records,
        origin: Origin,
        settings: CoordinatorSettings,
        clock: Arc<dyn Clock>,
    ) -> Coordinator {
        let status = CoordinatorStatus {
            candidate: settings.candidate.clone(),
            ..Default::default()
        };
        let status = watch::Sender::new(status);
        Coordinator {
            shared: Arc::new(Shared {
                records,
                origin,
                settings,
                clock,
                status,
            }),
        }
    }

    /// What it knows, as it changes.
    pub fn status(&self) -> watch::Receiver<CoordinatorStatus> {
        self.shared.status.subscribe()
    }

    /// Its control service.
    pub fn service(&self) -> Arc<dyn CoordinatorService> {
        Arc::new(self.clone())
    }

    /// Campaigns and coordinates until `shutdown` completes; then gives the office back.
    ///
    /// Outages of metastore and origin are waited out. Fails on settings that cannot work, and
    /// when the metastore refuses access.
    pub async fn run(&self, shutdown: impl Future<Output = ()>) -> Result<()> {
        let shared = &self.shared;
        shared.settings.check()?;
        tokio::pin!(shutdown);
        loop {
            let campaign = shared
                .records
                .campaign(&shared.settings.candidate, shared.settings.election_ttl());
            let leadership = tokio::select! {
                biased;
                () = &mut shutdown => return Ok(()),
                elected = campaign => match elected {
                    Ok(leadership) => leadership,
                    Err(error) if error.kind() == ErrorKind::Config => return Err(error.into()),
                    Err(error) => {
                        tracing::warn!(%error, "campaign failed");
                        tokio::time::sleep(BACK_OFF).await;
                        continue;
                    }
                },
            };
            tracing::info!(candidate = leadership.candidate(), "elected coordinator");
            let end = tokio::select! {
                biased;
                () = &mut shutdown => None,
                end = serve(shared, &leadership) => Some(end),
            };
            shared.status.send_modify(|status| {
                status.leading = false;
                status.leader.clear();
            });
            // Whether or not it arrives: the lease runs out by itself.
            if let Err(error) = leadership.resign().await {
                tracing::debug!(%error, "the office could not be given back");
            }
            match end {
                None => return Ok(()),
                Some(Ok(End::Lost)) => {
                    tracing::warn!("not coordinator any more; campaigning again")
                }
                Some(Err(Error::Metastore(error))) if error.kind() == ErrorKind::Config => {
                    return Err(error.into());
                }
                Some(Err(error)) => {
                    tracing::warn!(%error, "term of office ended; campaigning again")
                }
            }
            tokio::select! {
                biased;
                () = &mut shutdown => return Ok(()),
                () = tokio::time::sleep(BACK_OFF) => {}
            }
        }
    }
}

async fn serve(shared: &Shared, leadership: &Leadership) -> Result<End> {
    Term::begin(shared, leadership).await?.run().await
}

#[stoa_control::async_trait]
impl CoordinatorService for Coordinator {
    async fn status(&self) -> Result<CoordinatorStatus, ServiceError> {
        let mut status = self.shared.status.borrow().clone();
        if !status.leading {
            // Somebody else knows more; say who.
            let leader = self.shared.records.coordinator().await;
            status.leader = leader.ok().flatten().unwrap_or_default();
        }
        Ok(status)
    }
}
