//! What can be wrong with a configuration; all of it is reported at once.

use std::fmt;
use std::path::PathBuf;

use super::sources::Source;

/// One thing that is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// A key that nobody knows.
    #[error("unknown key `{key}` ({source_}); the nearest known key is `{nearest}`")]
    UnknownKey {
        /// The key as it was given.
        key: String,
        /// Where it was given.
        source_: Source,
        /// The known key with the most similar name.
        nearest: String,
    },
    /// A value that its key cannot take.
    #[error("`{key}` = `{value}` ({source_}): {reason}")]
    Value {
        /// The key.
        key: String,
        /// The value as it was given; redacted for secrets.
        value: String,
        /// Where it was given.
        source_: Source,
        /// What is wrong with it and what was expected.
        reason: String,
    },
    /// Two values that cannot both hold.
    #[error(transparent)]
    Contradiction(Box<Contradiction>),
    /// A file that is not TOML.
    #[error("{}:{line}: not valid TOML: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What the parser found.
        reason: String,
    },
    /// A file that cannot be read.
    #[error("cannot read the configuration {}: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// A `--set` without an equals sign.
    #[error("`--set {text}` has no `=`; expected --set key=value")]
    NotAnAssignment {
        /// The argument.
        text: String,
    },
}

/// Two values that cannot both hold, in full.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{key}` = `{value}` ({source_}) contradicts `{other}` = `{other_value}` \
     ({other_source}): {reason}"
)]
pub struct Contradiction {
    /// The key to change first.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// Where it was given.
    pub source_: Source,
    /// The other key.
    pub other: &'static str,
    /// The other value.
    pub other_value: String,
    /// Where the other was given.
    pub other_source: Source,
    /// Why they cannot both hold.
    pub reason: &'static str,
}

/// Everything that is wrong with the configuration, never empty.
#[derive(Debug)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
