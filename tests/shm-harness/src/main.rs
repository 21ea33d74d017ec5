//! `shm-harness run --seconds N --seed S [--mutant M]`, and the roles that it starts.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use stoa_tests_shm::{conductor, hold, reader, writer};

const USAGE: &str =
    "usage: shm-harness run [--seconds N] [--seed S] [--mutant in-place-write|publish-before-seal|\
                     reused-segment-name]
       shm-harness writer|reader|hold|hold-forked --dir DIR [--seed S] [--budget BYTES]";

#[derive(Default)]
struct Arguments {
    role: String,
    dir: PathBuf,
    seconds: Option<u64>,
    seed: Option<u64>,
    budget: Option<u64>,
    mutant: Option<String>,
}

fn parse() -> Result<Arguments, String> {
    let mut words = std::env::args().skip(1);
    let mut arguments = Arguments {
        role: words.next().ok_or("a role is missing")?,
        ..Arguments::default()
    };
    while let Some(name) = words.next() {
        let value = words
            .next()
            .ok_or_else(|| format!("{name} needs a value"))?;
        let number = || {
            value
                .parse::<u64>()
                .map_err(|error| format!("{name} {value}: {error}"))
        };
        match name.as_str() {
            "--dir" => arguments.dir = PathBuf::from(value),
            "--seconds" => arguments.seconds = Some(number()?),
            "--seed" => arguments.seed = Some(number()?),
            "--budget" => arguments.budget = Some(number()?),
            "--mutant" => arguments.mutant = Some(value),
            _ => return Err(format!("{name} is unknown")),
        }
    }
    Ok(arguments)
}

fn main() -> ExitCode {
    let arguments = match parse() {
        Ok(arguments) => arguments,
        Err(problem) => {
            eprintln!("{problem}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let seed = arguments.seed.unwrap_or(1);
    let budget = arguments.budget.unwrap_or(conductor::BUDGET_BYTES);
    let done = match arguments.role.as_str() {
        "writer" => match writer::run(&arguments.dir, seed, budget) {
            Ok(()) => true,
            Err(error) => {
                println!("violation {error}");
                false
            }
        },
        "reader" => {
            reader::run(&arguments.dir, seed);
            true
        }
        "hold" => hold::run(&arguments.dir, false),
        "hold-forked" => hold::run(&arguments.dir, true),
        "run" => return run(arguments, seed),
        role => {
            eprintln!("role {role} is unknown\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if done {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn run(arguments: Arguments, seed: u64) -> ExitCode {
    if arguments.mutant.is_some() && !cfg!(feature = "mutants") {
        eprintln!("--mutant needs a harness that was built with --features mutants");
        return ExitCode::from(2);
    }
    let outcome = std::env::current_exe().and_then(|program| {
        conductor::run(conductor::Run {
            program,
            duration: Duration::from_secs(arguments.seconds.unwrap_or(10)),
            seed,
            mutant: arguments.mutant,
        })
    });
    match outcome {
        Ok(outcome) => {
            for violation in &outcome.violations {
                println!("violation: {violation}");
            }
            println!("seed {seed} {}", outcome.summary());
            if outcome.holds() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            eprintln!("the harness failed: {error}");
            ExitCode::from(2)
        }
    }
}
