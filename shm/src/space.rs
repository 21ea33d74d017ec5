//! How much memory a cache directory may still take: what its tmpfs and the control groups of this
//! process leave.

use std::path::Path;

use nix::sys::statfs::statfs;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The tightest limit on the memory of a cache directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// What the limit allows in total, in bytes; `u64::MAX` if nothing limits it.
    pub total_bytes: u64,
    /// What is left of it, in bytes.
    pub available_bytes: u64,
    /// Which limit it is, for messages.
    pub limit: String,
}

impl Space {
    pub(crate) fn of(path: &Path, in_memory: bool) -> Result<Space> {
        let found = statfs(path).map_err(|error| Error::io("inspect", path, error))?;
        let block_bytes = u64::try_from(found.block_size()).unwrap_or(0);
        // A tmpfs with size=0 has no limit and says that it has no blocks.
        let file_system = if found.blocks() == 0 {
            Space {
                total_bytes: u64::MAX,
                available_bytes: u64::MAX,
                limit: "no limit".to_string(),
            }
        } else {
            Space {
                total_bytes: found.blocks().saturating_mul(block_bytes),
                available_bytes: found.blocks_available().saturating_mul(block_bytes),
                limit: format!(
                    "the file system's size of {} bytes",
                    found.blocks().saturating_mul(block_bytes)
                ),
            }
        };
        // Files on a disk are not charged to a memory limit for good.
        let group = in_memory
            .then(|| control_group(&|path| std::fs::read_to_string(path).ok()))
            .flatten();
        Ok(match group {
            Some(group) if group.available_bytes < file_system.available_bytes => group,
            _ => file_system,
        })
    }
}

/// The tightest memory limit among the control groups of this process, if any limits it.
///
/// `read` returns a file's text. Memory of files on disk is not counted as used, because the kernel
/// gives it back on demand; shared memory is.
fn control_group(read: &dyn Fn(&str) -> Option<String>) -> Option<Space> {
    let groups = read("/proc/self/cgroup")?;
    let mut tightest: Option<Space> = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let (root, limit_file, usage_file, prefix) = if controllers.is_empty() {
            ("/sys/fs/cgroup", "memory.max", "memory.current", "")
        } else if controllers
            .split(',')
            .any(|controller| controller == "memory")
        {
            (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_",
            )
        } else {
            continue;
        };
        // The limit of every ancestor counts. In a container the path may not exist below its own
        // root; its limit is then at the root.
        let mut group = path.trim_end_matches('/');
        loop {
            let number = |file: &str| {
                read(&format!("{root}{group}/{file}"))?
                    .trim()
                    .parse::<u64>()
                    .ok()
            };
            if let (Some(total_bytes), Some(usage)) = (number(limit_file), number(usage_file)) {
                let stat = read(&format!("{root}{group}/memory.stat")).unwrap_or_default();
                let stat_value = |name: &str| -> u64 {
                    stat.lines()
                        .find_map(|line| {
                            line.strip_prefix(prefix)?
                                .strip_prefix(name)?
                                .strip_prefix(' ')?
                                .parse()
                                .ok()
                        })
                        .unwrap_or(0)
                };
                let used =
                    usage.saturating_sub(stat_value("inactive_file") + stat_value("active_file"));
                let available_bytes = total_bytes.saturating_sub(used);
                if tightest
                    .as_ref()
                    .is_none_or(|known| available_bytes < known.available_bytes)
                {
                    tightest = Some(Space {
                        total_bytes,
                        available_bytes,
                        limit: format!(
                            "the memory limit of {total_bytes} bytes of control group {group}/"
                        ),
                    });
                }
            }
            match group.rfind('/') {
                Some(end) => group = &group[..end],
                None => break,
            }
        }
    }
    tightest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_ancestor_limits() {
        let files = |path: &str| -> Option<String> {
            let text = match path {
                "/proc/self/cgroup" => "0::/a/b\n",
                "/sys/fs/cgroup/a/b/memory.max" => "max\n",
                "/sys/fs/cgroup/a/b/memory.current" => "5\n",
                "/sys/fs/cgroup/a/memory.max" => "1000\n",
                "/sys/fs/cgroup/a/memory.current" => "700\n",
                "/sys/fs/cgroup/a/memory.stat" => {
                    "anon 1\ninactive_file 150\nactive_file 50\nshmem 300\n"
                }
                _ => return None,
            };
            Some(text.to_string())
        };
        let found = control_group(&files).unwrap();
        assert_eq!((found.total_bytes, found.available_bytes), (1000, 500));
        assert_eq!(
            found.limit,
            "the memory limit of 1000 bytes of control group /a/"
        );
    }

    #[test]
    fn the_older_hierarchy_is_read_too() {
        let files = |path: &str| -> Option<String> {
            let text = match path {
                "/proc/self/cgroup" => "3:cpu:/x\n2:memory:/docker/1\n0::/\n",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes" => "4096\n",
                "/sys/fs/cgroup/memory/memory.usage_in_bytes" => "4000\n",
                "/sys/fs/cgroup/memory/memory.stat" => {
                    "inactive_file 9\ntotal_inactive_file 1000\n"
                }
                _ => return None,
            };
            Some(text.to_string())
        };
        assert_eq!(control_group(&files).unwrap().available_bytes, 1096);
    }

    #[test]
    fn without_a_limit_the_file_system_counts() {
        assert_eq!(control_group(&|_| None), None);
        assert_eq!(
            control_group(&|path| (path == "/proc/self/cgroup").then(|| "0::/\n".to_string())),
            None
        );
        let space = Space::of(Path::new("/dev/shm"), true).unwrap();
        assert!(space.available_bytes <= space.total_bytes && !space.limit.is_empty());
    }
}
