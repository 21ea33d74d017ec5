//! What a comparison found, and which differences are known and why.

use std::collections::BTreeMap;
use std::path::Path;

/// A statement that was answered otherwise than by stock.
#[derive(Clone, Debug)]
pub struct Finding {
    /// Where it stands: a file's name, and the line for files of statements.
    pub at: String,
    /// How the other session read, see [`Through`](super::cached::Through).
    pub through: String,
    /// The statement.
    pub sql: String,
    /// What differs.
    pub what: String,
}

/// What became of the statements of one file, over all ways to read.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Answered alike, with rows or without.
    pub equal: u64,
    /// Refused by both.
    pub refused_alike: u64,
    /// Plans, which name the scan and are not compared.
    pub plans: u64,
    /// Answered differently.
    pub findings: Vec<Finding>,
    /// What was not cached, and why.
    pub uncached: Vec<String>,
    /// Column chunks that were read from memory.
    pub hits: u64,
    /// Column chunks that were read from files.
    pub misses: u64,
}

impl Tally {
    /// Adds another's.
    pub fn add(&mut self, other: Tally) {
        self.equal += other.equal;
        self.refused_alike += other.refused_alike;
        self.plans += other.plans;
        self.findings.extend(other.findings);
        self.uncached.extend(other.uncached);
        self.hits += other.hits;
        self.misses += other.misses;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} equal, {} refused alike, {} plans, {} different; {} chunks from memory, {} from files",
            self.equal,
            self.refused_alike,
            self.plans,
            self.findings.len(),
            self.hits,
            self.misses
        )
    }
}

/// Differences that are known, each with its reason.
///
/// A line names where (`parquet.slt:319`, or `parquet.slt:*` for a whole file), how it was read (the
/// name of a form, `stoa`, or `*`), and why it is right so. `#` begins a comment.
#[derive(Debug, Default)]
pub struct Allowed {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    at: String,
    through: String,
    reason: String,
    used: u64,
}

impl Allowed {
    /// Reads a list.
    ///
    /// # Errors
    /// If the file cannot be read, or a line has no reason.
    pub fn read(path: &Path) -> Result<Allowed, String> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|error| format!("{}: {error}", path.display()))?;
        Allowed::parse(&text).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn parse(text: &str) -> Result<Allowed, String> {
        let mut entries = vec![];
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut words = line.splitn(3, char::is_whitespace);
            let (Some(at), Some(through), Some(reason)) =
                (words.next(), words.next(), words.next())
            else {
                return Err(format!(
                    "line {}: expected where, how and why, found {line:?}",
                    number + 1
                ));
            };
            entries.push(Entry {
                at: at.to_owned(),
                through: through.to_owned(),
                reason: reason.trim().to_owned(),
                used: 0,
            });
        }
        Ok(Allowed { entries })
    }

    /// Why a finding is right as it is, where that is known.
    pub fn reason(&mut self, finding: &Finding) -> Option<&str> {
        let file = finding.at.split(':').next().unwrap_or_default();
        let entry = self.entries.iter_mut().find(|entry| {
            (entry.at == finding.at || entry.at.strip_suffix(":*") == Some(file))
                && (entry.through == "*" || entry.through == finding.through)
        })?;
        entry.used += 1;
        Some(&entry.reason)
    }

    /// How often each reason held.
    pub fn used(&self) -> BTreeMap<&str, u64> {
        let mut used = BTreeMap::new();
        for entry in self.entries.iter().filter(|entry| entry.used > 0) {
            *used.entry(entry.reason.as_str()).or_default() += entry.used;
        }
        used
    }

    /// Lines for which nothing was found; they hide what may come back.
    pub fn unused(&self) -> impl Iterator<Item = String> + '_ {
        let unused = self.entries.iter().filter(|entry| entry.used == 0);
        unused.map(|entry| format!("{} {} {}", entry.at, entry.through, entry.reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_listed_is_allowed_and_what_is_not_found_is_told() -> Result<(), String> {
        let text = "# known\na.slt:7 stoa is read only\nb.slt:* * made up\nc.slt:1 packed gone\n";
        let mut allowed = Allowed::parse(text)?;
        let finding = |at: &str, through: &str| Finding {
            at: at.to_owned(),
            through: through.to_owned(),
            sql: String::new(),
            what: String::new(),
        };
        assert_eq!(
            allowed.reason(&finding("a.slt:7", "stoa")),
            Some("is read only")
        );
        assert_eq!(allowed.reason(&finding("a.slt:7", "packed")), None);
        assert_eq!(allowed.reason(&finding("a.slt:8", "stoa")), None);
        assert_eq!(
            allowed.reason(&finding("b.slt:99", "arrow")),
            Some("made up")
        );
        assert_eq!(
            allowed.unused().collect::<Vec<_>>(),
            ["c.slt:1 packed gone"]
        );
        assert!(Allowed::parse("a.slt:7 stoa").is_err());
        Ok(())
    }
}
