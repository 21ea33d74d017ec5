//! Statements in files: run as datafusion-cli runs them, one after the other whatever fails, but a
//! script that failed is told from one that did not.

use std::fs::File;
use std::io::{BufRead, BufReader};

use datafusion_cli::cli_context::CliSessionContext;
use datafusion_cli::exec::exec_from_commands;
use datafusion_cli::print_options::PrintOptions;

use crate::error::{Error, Result};

/// Runs the statements of these files. What fails is said on stderr, and the next one is run.
///
/// # Errors
/// [`Error::Failed`] with how many failed; a file that cannot be read ends it at once.
pub(super) async fn run_files(
    session: &dyn CliSessionContext,
    files: &[String],
    print: &PrintOptions,
) -> Result<()> {
    let (mut run, mut failed) = (0u64, 0u64);
    for path in files {
        let unreadable = |error| Error::while_doing(format!("cannot read {path}"), error);
        let mut lines = BufReader::new(File::open(path).map_err(unreadable)?).lines();
        loop {
            let statement = next_statement(&mut lines).map_err(unreadable)?;
            let Some(statement) = statement else { break };
            run += 1;
            if let Err(error) = exec_from_commands(session, vec![statement], print).await {
                failed += 1;
                eprintln!("{error}");
            }
        }
    }
    match failed {
        0 => Ok(()),
        _ => Err(Error::Failed(format!(
            "{failed} of {run} statements failed"
        ))),
    }
}

/// The lines up to the next one that ends in a semicolon, or to the end; lines that begin as
/// comments, or name an interpreter, are none of a statement.
fn next_statement(
    lines: &mut impl Iterator<Item = std::io::Result<String>>,
) -> std::io::Result<Option<String>> {
    let mut statement = String::new();
    for line in lines {
        let line = line?;
        if line.starts_with("#!") || line.starts_with("--") {
            continue;
        }
        let line = line.trim_end();
        statement.push_str(line);
        if line.ends_with(';') {
            return Ok(Some(statement));
        }
        statement.push('\n');
    }
    let rest = statement.contains(|character: char| !character.is_whitespace());
    Ok(rest.then_some(statement))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_end_with_their_line() {
        let text =
            "#!/usr/bin/stoa\n-- first;\nselect 1;  \nselect\n  2\n;\n\nselect 3 -- last\n\n";
        let mut lines = text.as_bytes().lines();
        let mut found = Vec::new();
        while let Some(statement) = next_statement(&mut lines).unwrap() {
            found.push(statement);
        }
        assert_eq!(
            found,
            ["select 1;", "select\n  2\n;", "\nselect 3 -- last\n\n"]
        );
        let mut broken = [&b"select 1"[..], b"\n\xff\n"].concat();
        broken.push(b';');
        assert!(
            next_statement(&mut broken.lines()).is_err(),
            "not skipped in silence"
        );
    }
}
