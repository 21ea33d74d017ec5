//! Layers of configuration: defaults, file, environment, flags; the later one wins.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{Problem, Problems};
use super::keys::{self, Key, Kind, Standard};
use super::machine::Machine;
use super::value::{self, Secret, Value};

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nobody set it; the text says how the default came about, if it was computed.
    Default(&'static str),
    /// A line of a file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// An environment variable.
    Environment(String),
    /// A flag, such as `--set` or `--etcd`.
    Flag(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default("") => f.write_str("default"),
            Source::Default(how) => write!(f, "default: {how}"),
            Source::File { path, line } => write!(f, "{}:{line}", path.display()),
            Source::Environment(variable) => write!(f, "environment {variable}"),
            Source::Flag(flag) => write!(f, "flag {flag}"),
        }
    }
}

/// What the command line says about the configuration.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// `--config`, which must exist when given.
    pub file: Option<PathBuf>,
    /// `--set key=value`, in order.
    pub set: Vec<String>,
    /// Flags of their own that stand for a key: (flag, key, text).
    pub flags: Vec<(String, &'static str, String)>,
}

/// A text that somebody gave for a key.
#[derive(Clone, Debug)]
struct Given {
    name: String,
    text: String,
    source: Source,
}

/// The effective value of one key.
#[derive(Clone, Debug)]
pub struct Effective {
    /// The value; `None` when the key has no default and nobody set it.
    pub value: Option<Value>,
    /// Where it comes from.
    pub source: Source,
}

/// The effective values of all keys, with where each came from.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// By dotted key, in the order of the table.
    pub values: Vec<(&'static Key, Effective)>,
    /// By store root URL, then option name.
    pub stores: BTreeMap<String, BTreeMap<&'static str, Effective>>,
    /// The file that was read.
    pub file: Option<PathBuf>,
    /// What was accepted with a warning.
    pub warnings: Vec<String>,
}

impl Resolved {
    /// The effective value of a key of the table.
    ///
    /// # Panics
    /// When the table has no such key, which is a bug of the caller.
    pub fn get(&self, name: &str) -> &Effective {
        self.values
            .iter()
            .find(|(key, _)| key.name == name)
            .map(|(_, effective)| effective)
            .unwrap_or_else(|| panic!("no key `{name}` in the table of keys"))
    }
}

/// Layers defaults, file, environment and flags, and checks every value by itself.
pub fn resolve(inputs: &Inputs, machine: &Machine) -> Result<Resolved, Problems> {
    let mut problems = Vec::new();
    let mut given = Vec::new();
    let file = read_file(inputs, machine, &mut given, &mut problems);
    read_environment(machine, &mut given);
    for text in &inputs.set {
        match text.split_once('=') {
            Some((name, value)) => given.push(Given {
                name: name.trim().to_string(),
                text: value.to_string(),
                source: Source::Flag("--set".into()),
            }),
            None => problems.push(Problem::NotAnAssignment { text: text.clone() }),
        }
    }
    for (flag, key, text) in &inputs.flags {
        given.push(Given {
            name: (*key).to_string(),
            text: text.clone(),
            source: Source::Flag(flag.clone()),
        });
    }
    let mut resolved = Resolved {
        values: defaults(machine),
        stores: BTreeMap::new(),
        file,
        warnings: Vec::new(),
    };
    let mut legacy = Vec::new();
    for item in given {
        if let Err(problem) = apply(item, machine, &mut resolved, &mut legacy) {
            problems.push(problem);
        }
    }
    if !legacy.is_empty() {
        resolved.warnings.push(format!(
            "keys without a meaning here: {}",
            legacy.join("; ")
        ));
    }
    if problems.is_empty() {
        Ok(resolved)
    } else {
        Err(Problems(problems))
    }
}

fn defaults(machine: &Machine) -> Vec<(&'static Key, Effective)> {
    keys::KEYS
        .iter()
        .map(|key| {
            let (text, how) = match key.standard {
                Standard::Fixed(text) => (Some(text.to_string()), ""),
                Standard::Computed(how, compute) => (Some(compute(machine)), how),
                Standard::Unset => (None, ""),
            };
            let effective = Effective {
                // A computed default may be left to the typed settings (an empty text).
                value: text
                    .filter(|text| !text.is_empty())
                    .and_then(|text| value::parse(key.kind, &text).ok()),
                source: Source::Default(how),
            };
            (key, effective)
        })
        .collect()
}

fn apply(
    item: Given,
    machine: &Machine,
    resolved: &mut Resolved,
    legacy: &mut Vec<String>,
) -> Result<(), Problem> {
    if let Some((store, option)) = split_store(&item.name) {
        let Some(key) = keys::STORE_OPTIONS.iter().find(|key| key.name == option) else {
            return Err(Problem::UnknownKey {
                nearest: format!("store.\"{store}\".{}", keys::nearest_store_option(&option)),
                key: item.name,
                source_: item.source,
            });
        };
        let effective = check(key, &item, machine)?;
        resolved
            .stores
            .entry(store)
            .or_default()
            .insert(key.name, effective);
        return Ok(());
    }
    let mut name = item.name.as_str();
    if let Some(old) = keys::LEGACY_KEYS.iter().find(|old| old.name == name) {
        legacy.push(format!("{name} ({}): {}", item.source, old.reason));
        match old.renamed_to {
            Some(renamed) => name = renamed,
            None => return Ok(()),
        }
    }
    let Some((key, slot)) = resolved.values.iter_mut().find(|(key, _)| key.name == name) else {
        return Err(Problem::UnknownKey {
            nearest: nearest(&item),
            key: item.name,
            source_: item.source,
        });
    };
    *slot = check(key, &item, machine)?;
    Ok(())
}

/// The nearest key, in the spelling of the place where the unknown one stood.
fn nearest(item: &Given) -> String {
    let nearest = keys::nearest(&item.name);
    match item.source {
        Source::Environment(_) => keys::variable_of(nearest),
        _ => nearest.to_string(),
    }
}

fn check(key: &Key, item: &Given, machine: &Machine) -> Result<Effective, Problem> {
    let value = match key.kind {
        Kind::Secret => secret(&item.text, machine).map(Value::Secret),
        kind => value::parse(kind, &item.text),
    };
    match value {
        Ok(value) => Ok(Effective {
            value: Some(value),
            source: item.source.clone(),
        }),
        Err(reason) => Err(Problem::Value {
            key: item.name.clone(),
            value: match key.kind {
                Kind::Secret => "<redacted>".into(),
                _ => item.text.clone(),
            },
            source_: item.source.clone(),
            reason,
        }),
    }
}

/// Reads `env:NAME`, `file:/path` or the text itself.
fn secret(text: &str, machine: &Machine) -> Result<Secret, String> {
    if let Some(name) = text.strip_prefix("env:") {
        return match machine.environment.get(name) {
            Some(value) => Ok(Secret::new(value.clone())),
            None => Err(format!("the environment variable {name} is not set")),
        };
    }
    if let Some(path) = text.strip_prefix("file:") {
        let unreadable = |error: std::io::Error| format!("cannot read {path}: {error}");
        let mode = std::fs::metadata(path)
            .map_err(unreadable)?
            .permissions()
            .mode();
        if mode & 0o077 != 0 {
            return Err(format!(
                "{path} has mode {:04o}, others may read it; expected 0600 (chmod 600 {path})",
                mode & 0o7777
            ));
        }
        let content = std::fs::read_to_string(path).map_err(unreadable)?;
        return Ok(Secret::new(content.trim_end_matches(['\r', '\n'])));
    }
    match text {
        "" => Err("it must not be empty".into()),
        text => Ok(Secret::new(text)),
    }
}

/// Splits `store."s3://bucket".endpoint`, with or without the quotes, at its last dot.
fn split_store(name: &str) -> Option<(String, String)> {
    let rest = name.strip_prefix("store.")?;
    let (store, option) = rest.rsplit_once('.')?;
    let store = store.trim_matches('"').trim_end_matches('/');
    // `file://` loses its slashes above, and has no options anyway.
    store
        .contains("://")
        .then(|| (store.to_string(), option.to_string()))
}

fn read_file(
    inputs: &Inputs,
    machine: &Machine,
    given: &mut Vec<Given>,
    problems: &mut Vec<Problem>,
) -> Option<PathBuf> {
    let path = match &inputs.file {
        Some(path) => path.clone(),
        None => machine
            .configuration_files()
            .into_iter()
            .find(|path| path.is_file())?,
    };
    match std::fs::read_to_string(&path) {
        Ok(text) => parse_file(&path, &text, given, problems),
        Err(error) => problems.push(Problem::Unreadable {
            path: path.clone(),
            reason: error.to_string(),
        }),
    }
    Some(path)
}

fn parse_file(path: &Path, text: &str, given: &mut Vec<Given>, problems: &mut Vec<Problem>) {
    let line = |offset: usize| {
        let end = offset.min(text.len());
        text.as_bytes()[..end]
            .iter()
            .filter(|b| **b == b'\n')
            .count()
            + 1
    };
    match DeTable::parse(text) {
        Ok(table) => flatten(&mut Vec::new(), table.get_ref(), &mut |names, value, at| {
            let source = Source::File {
                path: path.to_path_buf(),
                line: line(at),
            };
            match value {
                Ok(text) => given.push(Given {
                    name: names.to_string(),
                    text,
                    source,
                }),
                Err(found) => problems.push(Problem::Value {
                    key: names.to_string(),
                    value: found.to_string(),
                    source_: source,
                    reason: "expected a text, a number, true, false or a list of texts".into(),
                }),
            }
        }),
        Err(error) => problems.push(Problem::Syntax {
            path: path.to_path_buf(),
            line: line(error.span().map_or(0, |span| span.start)),
            reason: error.message().to_string(),
        }),
    }
}

/// Takes a leaf of a file: dotted name, text (or the type that has no text), offset.
type Leaf<'a> = dyn FnMut(&str, Result<String, &'static str>, usize) + 'a;

/// Walks a table to its leaves.
fn flatten(prefix: &mut Vec<String>, table: &DeTable<'_>, leaf: &mut Leaf<'_>) {
    for (name, value) in table {
        prefix.push(name.get_ref().to_string());
        match value.get_ref() {
            DeValue::Table(inner) => flatten(prefix, inner, leaf),
            other => leaf(&prefix.join("."), scalar(other), name.span().start),
        }
        prefix.pop();
    }
}

fn scalar(value: &DeValue<'_>) -> Result<String, &'static str> {
    match value {
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Boolean(value) => Ok(value.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Ok(number.as_str().to_string()),
        DeValue::Integer(_) => Err("a number that is not decimal"),
        DeValue::Float(number) => Ok(number.as_str().to_string()),
        DeValue::Array(items) => {
            let texts: Result<Vec<String>, _> =
                items.iter().map(Spanned::get_ref).map(scalar).collect();
            texts.map(|texts| texts.join(","))
        }
        DeValue::Datetime(_) => Err("a date"),
        DeValue::Table(_) => Err("a table"),
    }
}

/// Variables `STOA_A__B`; those without a double underscore (STOA_HOME) are not keys.
fn read_environment(machine: &Machine, given: &mut Vec<Given>) {
    for (variable, text) in &machine.environment {
        let Some(name) = variable.strip_prefix("STOA_") else {
            continue;
        };
        if name.contains("__") {
            given.push(Given {
                name: name.replace("__", ".").to_lowercase(),
                text: text.clone(),
                source: Source::Environment(variable.clone()),
            });
        }
    }
}
