//! Session settings under `stoa.`.

use datafusion::common::config::{ConfigExtension, ConfigOptions};
use datafusion::common::extensions_options;

extensions_options! {
    /// What a session does with the cache: `set stoa.enabled = false`.
    pub struct StoaOptions {
        /// Read from the cache. False: tables of Stoa are read from the origin as plain Parquet.
        pub enabled: bool, default = true
        /// Use what is cached of the files that other scans of Parquet read: tables STORED AS
        /// PARQUET and those of other providers.
        pub cache_parquet_scans: bool, default = true
        /// Look at the origin's listing before a scan that the cache does not cover, so that an
        /// overwritten object is read whole as it is now, and never mixed with its cached past.
        pub check_before_miss: bool, default = true
    }
}

impl ConfigExtension for StoaOptions {
    const PREFIX: &'static str = "stoa";
}

impl StoaOptions {
    /// The session's settings; the defaults where the session was not configured for Stoa.
    pub fn of(options: &ConfigOptions) -> Self {
        options
            .extensions
            .get::<Self>()
            .cloned()
            .unwrap_or_default()
    }
}
