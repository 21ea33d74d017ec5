//! What can go wrong while coordinating, and whether it passes by itself.

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a plan could not be made or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The metastore failed or refused.
    #[error(transparent)]
    Metastore(#[from] stoa_metastore::Error),
    /// The layout, or the table it names, cannot be planned.
    #[error("layout {table_version} cannot be loaded: {source}")]
    Layout {
        /// Table and version.
        table_version: String,
        /// What is wrong with it.
        source: Box<stoa_layout::Error>,
    },
    /// A document that is not the one its key names.
    #[error("layout {table_version} holds the document of {found}; publish it again")]
    OtherLayout {
        /// Table and version of the key.
        table_version: String,
        /// What the document says it is.
        found: String,
    },
    /// The layout wants nothing.
    #[error("layout {table_version} wants no chunk: {reason}")]
    NothingWanted {
        /// Table and version.
        table_version: String,
        /// Why, as far as it is known.
        reason: String,
    },
    /// The catalog's loading died; a mistake of ours.
    #[error("loading {table_version} died: {reason}; report this")]
    Died {
        /// Table and version.
        table_version: String,
        /// The panic.
        reason: String,
    },
    /// An address cannot be served.
    #[error(transparent)]
    Control(#[from] stoa_control::Error),
    /// A setting cannot work.
    #[error("setting {key} = {value}: {reason}")]
    Settings {
        /// The configuration key.
        key: &'static str,
        /// What was found.
        value: String,
        /// What was expected.
        reason: &'static str,
    },
}

impl Error {
    /// Whether the same attempt may succeed later without anybody doing anything.
    pub fn is_passing(&self) -> bool {
        match self {
            // Only what is wrong with this very request stays wrong.
            Error::Metastore(error) => {
                use stoa_metastore::Error as Store;
                !matches!(
                    error,
                    Store::UnknownLayout { .. }
                        | Store::InvalidTableVersion { .. }
                        | Store::StaleVersion { .. }
                        | Store::TooLarge { .. }
                        | Store::Corrupt { .. }
                )
            }
            Error::Layout { source, .. } => match source.as_ref() {
                stoa_layout::Error::Origin(error) => {
                    use stoa_origin::ErrorKind::{Changed, Retry};
                    matches!(error.kind(), Retry | Changed)
                }
                stoa_layout::Error::Restless { .. } => true,
                _ => false,
            },
            _ => false,
        }
    }
}
