//! What every [`Metastore`] must do, as tests that any backend or wrapper can run.
//!
//! [`run_all`] panics at the first broken promise, after printing the case's name.

mod records;
mod store;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use tokio::time::timeout;

use crate::store::{Metastore, Op, Txn, TxnOutcome};

/// How long anything that must happen may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the suite needs of a backend beside the trait.
#[async_trait]
pub trait Harness: Send + Sync {
    /// An empty store.
    async fn fresh(&self) -> Arc<dyn Metastore>;
    /// Makes the store given out last forget its history up to now.
    async fn compact(&self);
    /// The shortest lease it can give.
    fn ttl_min(&self) -> Duration;
}

type Case = for<'a> fn(&'a dyn Harness) -> BoxFuture<'a, ()>;

macro_rules! cases {
    ($($module:ident :: $name:ident),* $(,)?) => {
        /// Every case with its name.
        pub const CASES: &[(&str, Case)] = &[
            $((stringify!($name), |harness| Box::pin($module::$name(harness)))),*
        ];
    };
}

cases![
    store::conditions_decide_all_or_nothing,
    store::revisions_count_changes_only,
    store::listings_are_sorted_prefixed_and_whole,
    store::oversized_transactions_are_refused_and_write_nothing,
    store::a_watch_sees_past_and_future_in_order,
    store::a_watch_resumes_without_loss_or_repetition,
    store::compacted_history_is_an_error_not_a_gap,
    store::keys_vanish_when_their_lease_expires,
    store::a_lease_kept_alive_lives,
    store::revoking_removes_keys_at_one_revision,
    store::a_put_without_a_lease_lets_go,
    store::a_lost_lease_is_said,
    store::the_store_knows_itself,
    records::any_characters_are_fine,
    records::versions_only_increase_under_concurrency,
    records::one_content_wins_a_version,
    records::large_documents_read_back,
    records::loads_need_a_newer_published_version,
    records::what_was_refused_may_be_asked_for_again,
    records::a_dropped_table_may_be_made_again,
    records::what_nobody_asks_for_may_be_dropped,
    records::version_1_is_not_version_10,
    records::one_coordinator_at_a_time,
    records::a_stale_coordinator_writes_nothing,
    records::a_dead_coordinator_is_replaced,
    records::plans_only_increase_and_are_checked,
    records::an_interrupted_plan_leaves_no_trace_in_the_next,
    records::old_plans_go_once_all_have_reported,
    records::old_layouts_go_but_not_those_in_use,
    records::two_puts_in_a_row_both_count,
    records::a_compacted_inbox_says_so,
    records::rejections_are_bounded,
    records::a_restarted_worker_takes_its_id_over,
    records::a_worker_that_stops_disappears,
    records::following_converges,
    records::following_survives_compaction,
    records::reset_forgets_plans_and_keeps_layouts,
];

/// Runs every case.
pub async fn run_all(harness: &dyn Harness) {
    for (name, case) in CASES {
        println!("conformance: {name}");
        case(harness).await;
    }
}

async fn commit(store: &Arc<dyn Metastore>, then: Vec<Op>) -> TxnOutcome {
    let outcome = store
        .txn(Txn { when: vec![], then })
        .await
        .expect("unconditional transaction");
    assert!(
        outcome.committed,
        "a transaction without conditions commits"
    );
    outcome
}

async fn put(store: &Arc<dyn Metastore>, key: &str, value: &str) -> i64 {
    commit(store, vec![Op::put(key, value)]).await.revision
}

/// The next item, or a panic if there is none in time.
async fn soon<T>(stream: &mut (impl Stream<Item = T> + Unpin)) -> T {
    timeout(PATIENCE, stream.next())
        .await
        .expect("an item in time")
        .expect("an item, not the end")
}

/// Reads on until an item fits.
async fn until<T>(stream: &mut (impl Stream<Item = T> + Unpin), fits: impl Fn(&T) -> bool) -> T {
    let wait = async {
        loop {
            let item = stream.next().await.expect("an item, not the end");
            if fits(&item) {
                return item;
            }
        }
    };
    timeout(PATIENCE, wait)
        .await
        .expect("a fitting item in time")
}

/// Asks again and again until the answer is yes.
async fn eventually<F: Future<Output = bool>>(what: &str, ask: impl Fn() -> F) {
    let wait = async {
        while !ask().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| panic!("{what}, in time"));
}

/// Without progress notifications, which come when the server likes.
fn events_only(
    stream: crate::store::WatchStream,
) -> BoxStream<'static, crate::error::Result<crate::store::WatchEvent>> {
    stream
        .filter(|event| {
            let progress = matches!(event, Ok(crate::store::WatchEvent::Progress { .. }));
            std::future::ready(!progress)
        })
        .boxed()
}
