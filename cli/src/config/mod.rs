//! The configuration: one table of keys, four layers, every effective value with its source.
//!
//! ```
//! use stoa_cli::config::{Config, Inputs, Machine};
//!
//! let inputs = Inputs { set: vec!["cache.size=2GiB".into()], ..Inputs::default() };
//! let config = Config::load(&inputs, &Machine::here()).unwrap();
//! assert_eq!(config.cache.size_bytes, 2 << 30);
//! ```

mod check;
mod error;
mod keys;
mod machine;
mod settings;
mod sources;
mod value;

pub use check::{keys_as_markdown, keys_as_text, report_as_json, report_as_text};
pub use error::{Contradiction, Problem, Problems};
pub use keys::{KEYS, Key, Kind, LEGACY_KEYS, LegacyKey, STORE_OPTIONS, Standard};
pub use machine::{Machine, tmpfs_bytes};
pub use settings::{
    CacheConfig, Config, ControlConfig, CoordinatorConfig, EtcdConfig, EtcdTls, HeartbeatConfig,
    LogConfig, LogFormat, OriginConfig, RemoteConfig, StoreOption, WorkerConfig,
};
pub use sources::{Effective, Inputs, Resolved, Source, resolve};
pub use value::{Secret, Value, format_bytes, parse_bytes};

#[cfg(test)]
mod tests;
