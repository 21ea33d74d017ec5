//! Statements and tables that are made up, see `stoa_tests::compare::fuzz`. The program
//! `stoa-compare fuzz` asks more of them, or one again.

use std::time::Duration;

use stoa_tests::compare::fuzz::{Floats, FuzzOptions, run};

#[tokio::test(flavor = "multi_thread")]
async fn made_up_statements_are_answered_as_over_values_in_memory() {
    ask(14, 1_800, Floats::Plain).await;
}

/// NaN lies outside of all bounds, and zeros of both signs are one and are two.
#[tokio::test(flavor = "multi_thread")]
async fn statements_over_zeros_and_nan_are_answered_as_over_values_in_memory() {
    ask(15, 200, Floats::All).await;
}

async fn ask(seed: u64, statements: u64, floats: Floats) {
    let options = FuzzOptions {
        seed,
        statements,
        floats,
        only: None,
        keep: None,
        patience: Duration::from_secs(60),
        at_a_time: std::thread::available_parallelism().map_or(1, usize::from),
    };
    let outcome = run(&options, |_, _| ()).await.unwrap();
    for finding in &outcome.findings {
        println!(
            "{} ({})\n  {}\n  {}\n  again: stoa-compare fuzz --seed {seed} --only {}",
            finding.at, finding.through, finding.sql, finding.what, finding.at
        );
    }
    assert!(outcome.findings.is_empty(), "{outcome:?}");
    assert_eq!(outcome.statements, statements);
    // Otherwise little was tried.
    assert!(outcome.hits > outcome.statements, "{outcome:?}");
    assert!(
        outcome.refused_alike < outcome.statements / 5,
        "{outcome:?}"
    );
}
