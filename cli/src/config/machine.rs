//! What the defaults depend on: the user, the host, its memory. Read once, passed as a value.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The facts about user and host that computed defaults use.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The effective user id.
    pub uid: u32,
    /// The host's name.
    pub hostname: String,
    /// The processors this process may use.
    pub processors: u64,
    /// The memory in bytes, of the host or of the control group when that is less.
    pub memory_bytes: u64,
    /// The size of /dev/shm in bytes; 0 when unknown.
    pub shm_bytes: u64,
    /// The environment.
    pub environment: BTreeMap<String, String>,
    /// The current directory.
    pub directory: PathBuf,
}

impl Machine {
    /// The machine this process runs on.
    pub fn here() -> Machine {
        Machine {
            uid: nix::unistd::Uid::effective().as_raw(),
            hostname: hostname(),
            processors: std::thread::available_parallelism().map_or(1, |n| n.get() as u64),
            memory_bytes: memory_bytes(),
            shm_bytes: tmpfs_bytes(Path::new("/dev/shm")).unwrap_or(0),
            environment: std::env::vars_os()
                .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
                .collect(),
            directory: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
        }
    }

    /// The standard cache directory.
    pub fn cache_location(&self) -> String {
        format!("/dev/shm/stoa-{}", self.uid)
    }

    /// The standard cache size in bytes: half of the smaller of tmpfs and memory.
    ///
    /// Half, because queries need memory too and tmpfs is itself capped at half by most systems.
    pub fn cache_size(&self) -> u64 {
        let limit = match self.shm_bytes {
            0 => self.memory_bytes,
            shm => shm.min(self.memory_bytes),
        };
        (limit / 2).max(1 << 20)
    }

    /// The standard directory of the embedded metastore.
    pub fn state_location(&self) -> String {
        self.xdg("XDG_STATE_HOME", ".local/state")
    }

    /// The standard directory for generated data.
    pub fn data_location(&self) -> String {
        self.xdg("XDG_DATA_HOME", ".local/share")
    }

    /// The configuration files looked for without `--config`, the first that exists wins.
    pub fn configuration_files(&self) -> Vec<PathBuf> {
        vec![
            self.directory.join("stoa.toml"),
            PathBuf::from(self.xdg("XDG_CONFIG_HOME", ".config")).join("stoa.toml"),
            PathBuf::from("/etc/stoa/stoa.toml"),
        ]
    }

    /// `$VARIABLE/stoa`, else `~/fallback/stoa`, else a directory of the user's below /var/tmp.
    fn xdg(&self, variable: &str, fallback: &str) -> String {
        let base = match self.environment.get(variable) {
            // The specification wants relative ones ignored.
            Some(set) if set.starts_with('/') => set.clone(),
            _ => match self.environment.get("HOME") {
                Some(home) if home.starts_with('/') => format!("{home}/{fallback}"),
                _ => format!("/var/tmp/stoa-{}", self.uid),
            },
        };
        format!("{}/stoa", base.trim_end_matches('/'))
    }
}

fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .map(|name| name.trim().to_string())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".to_string())
}

fn memory_bytes() -> u64 {
    let total = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| parse_meminfo_total(&text))
        .unwrap_or(1 << 30);
    // Version 2 of control groups, then version 1; "max" does not parse and means no limit.
    let group = [
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ]
    .iter()
    .filter_map(|path| {
        std::fs::read_to_string(path)
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    })
    .min();
    group.map_or(total, |limit| limit.min(total))
}

fn parse_meminfo_total(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    kib.checked_mul(1024)
}

/// The size in bytes of the file system that holds `path` (or its nearest existing parent).
pub fn tmpfs_bytes(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|ancestor| ancestor.exists())?;
    let stat = nix::sys::statvfs::statvfs(existing).ok()?;
    #[allow(
        clippy::unnecessary_cast,
        reason = "the fields' widths differ by architecture"
    )]
    (stat.blocks() as u64).checked_mul(stat.fragment_size() as u64)
}

#[cfg(test)]
pub(crate) fn example() -> Machine {
    Machine {
        uid: 1000,
        hostname: "node1".into(),
        processors: 8,
        memory_bytes: 32 << 30,
        shm_bytes: 16 << 30,
        environment: BTreeMap::from([("HOME".to_string(), "/home/ada".to_string())]),
        directory: PathBuf::from("/srv/work"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_follow_the_machine() {
        let machine = example();
        assert_eq!(machine.cache_location(), "/dev/shm/stoa-1000");
        assert_eq!(machine.cache_size(), 8 << 30);
        assert_eq!(machine.state_location(), "/home/ada/.local/state/stoa");
        let tiny = Machine {
            shm_bytes: 64 << 20,
            ..example()
        };
        assert_eq!(tiny.cache_size(), 32 << 20);
    }

    #[test]
    fn a_relative_xdg_directory_is_ignored_and_no_home_is_survived() {
        let mut machine = example();
        machine
            .environment
            .insert("XDG_STATE_HOME".into(), "relative".into());
        assert_eq!(machine.state_location(), "/home/ada/.local/state/stoa");
        machine
            .environment
            .insert("XDG_STATE_HOME".into(), "/state/".into());
        assert_eq!(machine.state_location(), "/state/stoa");
        machine.environment.clear();
        assert_eq!(machine.state_location(), "/var/tmp/stoa-1000/stoa");
    }

    #[test]
    fn meminfo_is_read_in_bytes() {
        assert_eq!(
            parse_meminfo_total("MemTotal:       24 kB\nMemFree: 1 kB\n"),
            Some(24 * 1024)
        );
        assert_eq!(parse_meminfo_total("nothing"), None);
    }
}
