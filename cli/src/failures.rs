//! What the crates' errors mean for a command: which exit code, in their own words.

use stoa_datafusion::EmbeddedError;

use crate::error::{Error, chain};

impl From<stoa_metastore::Error> for Error {
    fn from(error: stoa_metastore::Error) -> Error {
        use stoa_metastore::ErrorKind;
        let text = chain(&error);
        if let stoa_metastore::Error::Busy { .. } | stoa_metastore::Error::OwnerVersion { .. } =
            error
        {
            return Error::Busy(text);
        }
        match error.kind() {
            ErrorKind::Retry => Error::NotReady(text),
            ErrorKind::Refused => Error::Refused(text),
            ErrorKind::Config => Error::Usage(text),
            ErrorKind::Relist | ErrorKind::Lost | ErrorKind::Broken => Error::Failed(text),
        }
    }
}

impl From<stoa_origin::Error> for Error {
    fn from(error: stoa_origin::Error) -> Error {
        origin_error(error.kind(), chain(&error))
    }
}

impl From<stoa_layout::Error> for Error {
    fn from(error: stoa_layout::Error) -> Error {
        let text = chain(&error);
        match &error {
            stoa_layout::Error::Origin(origin) => origin_error(origin.kind(), text),
            // All others say what is wrong with the layout that was asked for.
            _ => Error::Refused(text),
        }
    }
}

impl From<stoa_shm::Error> for Error {
    fn from(error: stoa_shm::Error) -> Error {
        use stoa_shm::ErrorKind;
        let text = chain(&error);
        match error.kind() {
            ErrorKind::Busy => Error::Busy(text),
            ErrorKind::Configuration => Error::Usage(text),
            _ => Error::Failed(text),
        }
    }
}

impl From<stoa_control::Error> for Error {
    fn from(error: stoa_control::Error) -> Error {
        use stoa_control::ErrorKind;
        let text = chain(&error);
        match error.kind() {
            ErrorKind::Config => Error::Usage(text),
            ErrorKind::Retry => Error::NotReady(text),
            _ => Error::Failed(text),
        }
    }
}

impl From<stoa_cache_manager::Error> for Error {
    fn from(error: stoa_cache_manager::Error) -> Error {
        use stoa_cache_manager::Error as Worker;
        let text = chain(&error);
        match error {
            Worker::Setting { .. } | Worker::Refused { .. } => Error::Usage(text),
            Worker::Cache(error) => error.into(),
            Worker::Control(error) => error.into(),
            Worker::Transfer(error) if error.kind() == stoa_transfer::ErrorKind::Setup => {
                Error::Usage(text)
            }
            _ => Error::Failed(text),
        }
    }
}

impl From<stoa_coordinator::Error> for Error {
    fn from(error: stoa_coordinator::Error) -> Error {
        use stoa_coordinator::Error as Coordinator;
        let text = chain(&error);
        match error {
            Coordinator::Settings { .. } => Error::Usage(text),
            Coordinator::Metastore(error) => error.into(),
            Coordinator::Control(error) => error.into(),
            _ => Error::Failed(text),
        }
    }
}

/// What an error of the embedded composition means for a command.
pub(crate) fn embedded_error(error: EmbeddedError) -> Error {
    match error {
        EmbeddedError::NoState | EmbeddedError::OtherCache { .. } => Error::Busy(error.to_string()),
        EmbeddedError::NotReady { .. } => Error::NotReady(error.to_string()),
        EmbeddedError::Metastore(error) => error.into(),
        EmbeddedError::Layout(error) => error.into(),
        EmbeddedError::Worker(error) => error.into(),
        EmbeddedError::Coordinator(error) => error.into(),
        #[allow(unreachable_patterns, reason = "more may come")]
        other => Error::Failed(chain(&other)),
    }
}

fn origin_error(kind: stoa_origin::ErrorKind, text: String) -> Error {
    use stoa_origin::ErrorKind;
    match kind {
        ErrorKind::Retry => Error::NotReady(text),
        ErrorKind::Config => Error::Usage(text),
        ErrorKind::NotFound => Error::Refused(text),
        _ => Error::Failed(text),
    }
}
