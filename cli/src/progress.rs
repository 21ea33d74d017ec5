//! Progress bars on stderr, only where somebody sees them.

use std::borrow::Cow;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

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

/// How long something has to be waited for before that is said: most waits are over by then.
const SAID_AFTER: Duration = Duration::from_secs(1);
/// The shortest time between two lines.
const SAID_EVERY: Duration = Duration::from_secs(10);

/// Says what is waited for where nobody sees a bar: in logs of cron, CI and services. One line when
/// the waiting begins, and one whenever the reason changes.
#[derive(Debug, Default)]
pub struct Waiting {
    reason: Option<(String, Instant)>,
    said: Option<(String, Instant)>,
}

impl Waiting {
    /// What is to be said at `now` of waiting for `reason`; `None` waits for nothing in particular.
    pub fn line(&mut self, reason: Option<&str>, now: Instant) -> Option<String> {
        let Some(reason) = reason else {
            self.reason = None;
            return None;
        };
        let since = match &self.reason {
            Some((known, since)) if known == reason => *since,
            _ => {
                self.reason = Some((reason.to_owned(), now));
                now
            }
        };
        if now.duration_since(since) < SAID_AFTER {
            return None;
        }
        if let Some((said, at)) = &self.said
            && (said == reason || now.duration_since(*at) < SAID_EVERY)
        {
            return None;
        }
        self.said = Some((reason.to_owned(), now));
        Some(format!("waiting: {reason}"))
    }

    /// Says it on stderr, unless that is a terminal, where a bar says it.
    pub fn say(&mut self, reason: Option<&str>) {
        if std::io::stderr().is_terminal() {
            return;
        }
        if let Some(line) = self.line(reason, Instant::now()) {
            eprintln!("{line}");
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_is_said_once_it_has_stood_and_not_too_often() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut waiting = Waiting::default();
        assert_eq!(waiting.line(Some("no worker"), at(0)), None);
        let said = waiting.line(Some("no worker"), at(1));
        assert_eq!(said.as_deref(), Some("waiting: no worker"));
        assert_eq!(waiting.line(Some("no worker"), at(3600)), None);
        // What passes at once is not worth a line.
        assert_eq!(waiting.line(Some("a plan"), at(3601)), None);
        assert_eq!(waiting.line(None, at(3602)), None);
        // Another reason is, but not one after the other all the time.
        assert_eq!(waiting.line(Some("503"), at(3603)), None);
        assert!(waiting.line(Some("503"), at(3604)).is_some());
        assert_eq!(waiting.line(Some("504"), at(3605)), None);
        assert_eq!(waiting.line(Some("504"), at(3606)), None);
        assert!(waiting.line(Some("504"), at(3614)).is_some());
    }
}
