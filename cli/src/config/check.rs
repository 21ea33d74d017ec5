//! What `stoa config check` and `stoa config keys` print.

use std::fmt::Write;

use serde_json::{Value as Json, json};

use super::keys::{KEYS, Key, Kind, LEGACY_KEYS, STORE_OPTIONS, Standard};
use super::sources::{Effective, Resolved, Source};
use super::value::Value;

/// The effective configuration as a table: key, value, where it came from.
pub fn report_as_text(resolved: &Resolved) -> String {
    let mut rows: Vec<(String, String, String)> = Vec::new();
    for (key, effective) in &resolved.values {
        rows.push((
            key.name.to_string(),
            shown(effective),
            effective.source.to_string(),
        ));
    }
    for (store, options) in &resolved.stores {
        for (option, effective) in options {
            rows.push((
                format!("store.\"{store}\".{option}"),
                shown(effective),
                effective.source.to_string(),
            ));
        }
    }
    let width = |pick: fn(&(String, String, String)) -> usize| rows.iter().map(pick).max();
    let key_width = width(|row| row.0.chars().count()).unwrap_or(0);
    let value_width = width(|row| row.1.chars().count()).unwrap_or(0).min(48);
    let mut text = match &resolved.file {
        Some(file) => format!("# read from {}\n", file.display()),
        None => "# no stoa.toml found; defaults, environment and flags only\n".to_string(),
    };
    for (key, value, source) in rows {
        let _ = writeln!(text, "{key:key_width$}  {value:value_width$}  # {source}");
    }
    text
}

/// The effective configuration as JSON: `{file, values: {key: {value, source}}, warnings}`.
pub fn report_as_json(resolved: &Resolved) -> Json {
    let mut values = serde_json::Map::new();
    for (key, effective) in &resolved.values {
        values.insert(key.name.to_string(), entry(effective));
    }
    for (store, options) in &resolved.stores {
        for (option, effective) in options {
            values.insert(format!("store.\"{store}\".{option}"), entry(effective));
        }
    }
    json!({
        "file": resolved.file.as_ref().map(|file| file.display().to_string()),
        "values": values,
        "warnings": resolved.warnings,
    })
}

fn shown(effective: &Effective) -> String {
    match &effective.value {
        Some(value) => value.to_string(),
        None => "-".to_string(),
    }
}

fn entry(effective: &Effective) -> Json {
    let value = match &effective.value {
        None => Json::Null,
        Some(Value::Bool(value)) => json!(value),
        Some(Value::Bytes(value)) => json!(value),
        Some(Value::Integer(value)) => json!(value),
        Some(Value::Span(Some(span))) => json!(span.as_secs_f64()),
        Some(Value::Hosts(hosts)) => json!(hosts),
        Some(other) => json!(other.to_string()),
    };
    let source = match &effective.source {
        Source::Default(_) => json!({"from": "default"}),
        Source::File { path, line } => {
            json!({"from": "file", "path": path.display().to_string(), "line": line})
        }
        Source::Environment(variable) => json!({"from": "environment", "variable": variable}),
        Source::Flag(flag) => json!({"from": "flag", "flag": flag}),
    };
    json!({"value": value, "source": source})
}

fn expected(kind: Kind) -> String {
    match kind {
        Kind::Bool => "true or false".into(),
        Kind::Bytes { .. } => "size".into(),
        Kind::Integer { min, max } => format!("{min} to {max}"),
        Kind::Span => "time".into(),
        Kind::SpanOrSnapshot => "time or `snapshot`".into(),
        Kind::SpanOrOff => "time or `off`".into(),
        Kind::SpanOrZero => "time, may be 0".into(),
        Kind::Text => "text".into(),
        Kind::Path => "absolute path".into(),
        Kind::Address => "host:port".into(),
        Kind::Addresses => "host:port,…".into(),
        Kind::Hosts => "host[:port],…".into(),
        Kind::Choice(words) => words.join(", "),
        Kind::Secret => "secret".into(),
    }
}

fn standard(key: &Key) -> &'static str {
    match key.standard {
        Standard::Fixed(text) => text,
        Standard::Computed(how, _) => how,
        Standard::Unset => "unset",
    }
}

/// The table of keys for a terminal.
pub fn keys_as_text() -> String {
    let mut text = String::new();
    for key in KEYS {
        let _ = writeln!(text, "{}\n    {}", key.name, key.help);
        let _ = writeln!(
            text,
            "    {}; default: {}; {}",
            expected(key.kind),
            standard(key),
            key.variable()
        );
    }
    for key in STORE_OPTIONS {
        let _ = writeln!(text, "store.\"<root URL>\".{}\n    {}", key.name, key.help);
    }
    text
}

/// The table of keys as the text of docs/configuration.md.
pub fn keys_as_markdown() -> String {
    let mut text = String::from(
        "# Configuration\n\n\
         Made by `stoa config keys --markdown`; a test keeps it equal to the program.\n\n\
         Values come from, the later one winning: the defaults, `stoa.toml` (`--config`, else\n\
         `./stoa.toml`, `$XDG_CONFIG_HOME/stoa/stoa.toml`, `/etc/stoa/stoa.toml`), environment\n\
         variables, flags (`--set key=value`, `--etcd`, `--log-level`, `--log-format`). `stoa config\n\
         check` prints the effective values with where each came from.\n\n\
         Sizes are bytes, also as `64GiB` or `500MB`. Times are seconds, also as `90s`, `2m`, `1h`.\n\
         A secret is `env:NAME`, `file:/path` (mode 0600) or the text itself; it is never printed.\n\n\
         | key | value | default | environment | meaning |\n|---|---|---|---|---|\n",
    );
    for key in KEYS {
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | `{}` | {} |",
            key.name,
            expected(key.kind),
            standard(key).replace('<', "&lt;"),
            key.variable(),
            key.help
        );
    }
    text.push_str(
        "\n## Stores\n\n\
         Under `[store.\"s3://bucket\"]`, by the root URL of the store. Credentials not given here\n\
         come from each cloud's standard chain (`AWS_*`, `GOOGLE_*`, `AZURE_*`, instance roles).\n\n\
         | option | value | meaning |\n|---|---|---|\n",
    );
    for key in STORE_OPTIONS {
        let _ = writeln!(
            text,
            "| `{}` | {} | {} |",
            key.name,
            expected(key.kind),
            key.help
        );
    }
    text.push_str(
        "\n## Accepted from Pixels\n\nThese keys are accepted with one warning.\n\n\
         | key | what becomes of it |\n|---|---|\n",
    );
    for key in LEGACY_KEYS {
        let _ = writeln!(text, "| `{}` | {} |", key.name, key.reason);
    }
    text
}
