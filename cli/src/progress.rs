//! Progress bars on stderr, only where somebody sees them.

use std::borrow::Cow;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar on stderr; hidden when stderr is no terminal, so that logs stay clean.
pub fn bar(label: impl Into<Cow<'static, str>>, unit: Unit, length: u64) -> ProgressBar {
    let template = match unit {
        Unit::Rows => "{prefix:24} [{bar:30}] {human_pos}/{human_len} rows {per_sec} {eta} {msg}",
        Unit::Bytes => {
            "{prefix:24} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} {msg}"
        }
        Unit::Items => "{prefix:24} [{bar:30}] {pos}/{len} {elapsed} {msg}",
    };
    let bar = ProgressBar::with_draw_target(Some(length), target());
    // The templates are constants; one that does not parse falls back to the plain bar.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(label);
    bar
}

/// A line that says what is being waited for, with the time it takes.
pub fn spinner(label: impl Into<Cow<'static, str>>) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, target());
    if let Ok(style) = ProgressStyle::with_template("{prefix} {spinner} {elapsed} {msg}") {
        bar.set_style(style);
    }
    bar.set_prefix(label);
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// Says something for people on stderr, with or without a terminal.
pub fn say(quiet: bool, text: impl AsRef<str>) {
    if !quiet {
        eprintln!("{}", text.as_ref());
    }
}

fn target() -> ProgressDrawTarget {
    if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    }
}

/// What a bar counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Rows of a table.
    Rows,
    /// Bytes, in powers of 1024.
    Bytes,
    /// Anything else.
    Items,
}
