//! On how many workers a chunk should lie.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use serde::de::Unexpected;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// What stands for [`Replicas::All`] in documents and on the command line.
const ALL: &str = "all";

/// On how many workers each chunk of a table should lie: a number, or on all of them. In JSON `2`
/// or `"all"`.
///
/// More than one is for small tables that every node reads: copies are for nearness, not for
/// safety, since a lost chunk can always be read from the origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Replicas {
    /// On so many different workers.
    Count(NonZeroU32),
    /// On every worker, also on those that join later.
    All,
}

impl Replicas {
    /// One copy of everything.
    pub const ONE: Replicas = Replicas::Count(NonZeroU32::MIN);

    /// Whether it is one copy.
    pub fn is_one(&self) -> bool {
        *self == Replicas::ONE
    }
}

impl Default for Replicas {
    fn default() -> Replicas {
        Replicas::ONE
    }
}

impl fmt::Display for Replicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Replicas::Count(count) => count.fmt(f),
            Replicas::All => f.pad(ALL),
        }
    }
}

impl FromStr for Replicas {
    type Err = Error;

    fn from_str(text: &str) -> Result<Replicas> {
        if text == ALL {
            return Ok(Replicas::All);
        }
        let count = text.parse().map_err(|_| Error::InvalidReplicas {
            found: text.to_owned(),
        })?;
        Ok(Replicas::Count(count))
    }
}

impl Serialize for Replicas {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Replicas::Count(count) => count.serialize(serializer),
            Replicas::All => serializer.serialize_str(ALL),
        }
    }
}

impl<'de> Deserialize<'de> for Replicas {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Replicas, D::Error> {
        struct Visitor;

        impl serde::de::Visitor<'_> for Visitor {
            type Value = Replicas;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a number of workers, at least 1, or \"{ALL}\"")
            }

            fn visit_u64<E: serde::de::Error>(self, count: u64) -> Result<Replicas, E> {
                u32::try_from(count)
                    .ok()
                    .and_then(NonZeroU32::new)
                    .map(Replicas::Count)
                    .ok_or_else(|| E::invalid_value(Unexpected::Unsigned(count), &self))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Replicas, E> {
                match text {
                    ALL => Ok(Replicas::All),
                    _ => Err(E::invalid_value(Unexpected::Str(text), &self)),
                }
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_all_read_back() {
        for (text, json) in [("1", "1"), ("3", "3"), ("all", "\"all\"")] {
            let replicas: Replicas = text.parse().unwrap();
            assert_eq!(replicas.to_string(), text);
            assert_eq!(serde_json::to_string(&replicas).unwrap(), json);
            assert_eq!(serde_json::from_str::<Replicas>(json).unwrap(), replicas);
        }
        assert!(Replicas::default().is_one());
    }

    #[test]
    fn none_and_nonsense_are_refused() {
        for text in ["0", "-1", "many", "All", ""] {
            assert_eq!(
                text.parse::<Replicas>().unwrap_err().to_string(),
                format!("invalid number of replicas {text:?}; expected 1, 2, … or all")
            );
        }
        for json in ["0", "-2", "4294967296", "\"two\"", "true"] {
            let error = serde_json::from_str::<Replicas>(json).unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains("a number of workers, at least 1, or \"all\""),
                "{text}"
            );
        }
    }
}
