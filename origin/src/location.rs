//! Where a table lies: a store and a path in it, parsed from what people write.

use object_store::path::Path;
use url::Url;

use crate::error::{Error, Result};
use crate::identity::object_url;

/// A parsed table location: the store's root and a path in it, which is a prefix or one object.
///
/// ```
/// # use stoa_origin::Location;
/// let location = Location::parse("s3://bucket/tpch/lineitem/")?;
/// assert_eq!(location.store, "s3://bucket");
/// assert_eq!(location.path.as_ref(), "tpch/lineitem");
/// assert_eq!(Location::parse("/data/lineitem")?.store, "file://");
/// # Ok::<(), stoa_origin::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    /// Root URL of the store, normalised, without trailing slash.
    pub store: String,
    /// Path inside the store; empty for the whole store.
    pub path: Path,
    /// Whether the location was written as a directory, with a trailing slash; such a location is
    /// never one object.
    pub directory: bool,
}

impl Location {
    /// Parses a URL (`s3://bucket/dir/`, `file:///dir/a.parquet`) or a path, which is made
    /// absolute and becomes `file://`.
    ///
    /// # Errors
    /// [`Error::InvalidPath`] for `..`, NUL and empty path segments, in any spelling;
    /// [`Error::InvalidLocation`] for URLs with credentials, query or fragment, and for what is
    /// no URL. Whether the store is known is for [`Stores`](crate::Stores) to say.
    pub fn parse(text: &str) -> Result<Location> {
        let invalid = |reason: &str| Error::InvalidLocation {
            location: without_userinfo(text),
            reason: reason.into(),
        };
        if text.trim().is_empty() {
            return Err(invalid("it is empty"));
        }
        check_segments(text, &percent_decoded(text))?;
        let is_url =
            text.contains("://") || text.starts_with("file:") || text.starts_with("memory:");
        if is_url {
            Self::parse_url(text, invalid)
        } else {
            Self::parse_file(text, invalid)
        }
    }

    fn parse_file(text: &str, invalid: impl Fn(&str) -> Error) -> Result<Location> {
        let absolute = std::path::absolute(text).map_err(|error| invalid(&error.to_string()))?;
        let path = Path::from_absolute_path(&absolute).map_err(|error| Error::InvalidPath {
            path: text.into(),
            reason: error.to_string(),
        })?;
        Ok(Location {
            store: "file://".into(),
            path,
            directory: text.ends_with('/'),
        })
    }

    fn parse_url(text: &str, invalid: impl Fn(&str) -> Error) -> Result<Location> {
        let url = Url::parse(text).map_err(|error| invalid(&error.to_string()))?;
        if url.password().is_some() {
            return Err(invalid("credentials belong into the store's settings"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(invalid(
                "it has a query or a fragment; write ? as %3F and # as %23 in a path",
            ));
        }
        // Some services name the bucket in the path of an https URL: it belongs to the root.
        let bucket_in_path = match object_store::ObjectStoreScheme::parse(&url) {
            Ok((_, inner)) if url.scheme() == "https" => {
                let whole = path_of(&url, text)?;
                whole.parts_count() - inner.parts_count().min(whole.parts_count())
            }
            _ => 0,
        };
        let path = path_of(&url, text)?;
        let directory = text.ends_with('/') || path.is_root();
        let host = url.host_str().unwrap_or_default();
        let store = match (url.scheme(), host) {
            ("file", "") => "file://".into(),
            ("file", _) => return Err(invalid("a file URL names no host")),
            ("memory", "") => "memory://".into(),
            (_, "") => return Err(invalid("it names no bucket or host")),
            ("s3" | "s3a", bucket) => format!("s3://{bucket}"),
            ("az" | "azure" | "adl" | "abfs" | "abfss", container) if url.username().is_empty() => {
                format!("az://{container}")
            }
            ("abfs" | "abfss", host) => format!("{}://{}@{host}", url.scheme(), url.username()),
            (_, _) if !url.username().is_empty() => {
                return Err(invalid("credentials belong into the store's settings"));
            }
            (scheme, host) => {
                let port = url
                    .port()
                    .map(|port| format!(":{port}"))
                    .unwrap_or_default();
                let mut root = format!("{scheme}://{host}{port}");
                for part in path.parts().take(bucket_in_path) {
                    root.push('/');
                    root.push_str(part.as_ref());
                }
                root
            }
        };
        let path = path.parts().skip(bucket_in_path).collect();
        Ok(Location {
            store,
            path,
            directory,
        })
    }

    /// The location as a URL, for people; ends with a slash if it was written as a directory.
    pub fn url(&self) -> String {
        let url = object_url(&self.store, self.path.as_ref());
        if self.directory && !url.ends_with('/') {
            url + "/"
        } else {
            url
        }
    }

    /// The part of an object's path that comes after this location; `None` if it lies elsewhere.
    /// Empty if the location is the object itself.
    ///
    /// ```
    /// # use stoa_origin::Location;
    /// let location = Location::parse("s3://bucket/table")?;
    /// assert_eq!(location.relative("table/day=1/a.parquet"), Some("day=1/a.parquet"));
    /// assert_eq!(location.relative("tables/a.parquet"), None);
    /// # Ok::<(), stoa_origin::Error>(())
    /// ```
    pub fn relative<'a>(&self, path: &'a str) -> Option<&'a str> {
        let rest = path.strip_prefix(self.path.as_ref())?;
        if self.path.is_root() || rest.is_empty() {
            Some(rest)
        } else {
            rest.strip_prefix('/')
        }
    }
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.url())
    }
}

impl std::str::FromStr for Location {
    type Err = Error;

    fn from_str(text: &str) -> Result<Location> {
        Location::parse(text)
    }
}

/// The path of an object as a document gives it, checked before any store sees it.
///
/// # Errors
/// [`Error::InvalidPath`] for empty and absolute paths, `.` and `..` segments, and NUL.
pub fn object_path(text: &str) -> Result<Path> {
    let invalid = |reason: &str| Error::InvalidPath {
        path: text.into(),
        reason: reason.into(),
    };
    if text.is_empty() {
        return Err(invalid("it is empty"));
    }
    if text.starts_with('/') {
        return Err(invalid("it is absolute"));
    }
    check_segments(text, text)?;
    Path::parse(text).map_err(|error| invalid(&error.to_string()))
}

/// Refuses NUL and `..`: the stores would resolve them, each in its own way, and leave the prefix.
fn check_segments(shown: &str, decoded: &str) -> Result<()> {
    let invalid = |reason: &str| Error::InvalidPath {
        path: shown.into(),
        reason: reason.into(),
    };
    if decoded.contains('\0') {
        return Err(invalid("it contains a NUL character"));
    }
    if decoded.split(['/', '\\']).any(|segment| segment == "..") {
        return Err(invalid("it contains \"..\""));
    }
    Ok(())
}

fn path_of(url: &Url, text: &str) -> Result<Path> {
    Path::from_url_path(url.path()).map_err(|error| Error::InvalidPath {
        path: without_userinfo(text),
        reason: error.to_string(),
    })
}

fn percent_decoded(text: &str) -> String {
    percent_encoding::percent_decode_str(text)
        .decode_utf8_lossy()
        .into_owned()
}

/// The location without `user:password@`, fit for messages and logs.
fn without_userinfo(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else {
        return text.into();
    };
    let end = rest.find('/').unwrap_or(rest.len());
    match rest[..end].rfind('@') {
        Some(at) if rest[..at].contains(':') => format!("{scheme}://…{}", &rest[at..]),
        _ => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn parts(text: &str) -> (String, String, bool) {
        let location = Location::parse(text).unwrap();
        (
            location.store,
            location.path.to_string(),
            location.directory,
        )
    }

    fn expect(text: &str, store: &str, path: &str, directory: bool) {
        assert_eq!(
            parts(text),
            (store.into(), path.into(), directory),
            "{text}"
        );
    }

    #[test]
    fn urls_become_root_and_path() {
        expect("s3://bucket/dir/", "s3://bucket", "dir", true);
        expect(
            "s3a://bucket/dir/a.parquet",
            "s3://bucket",
            "dir/a.parquet",
            false,
        );
        expect("s3://bucket", "s3://bucket", "", true);
        expect("gs://b/x", "gs://b", "x", false);
        expect("az://container/x", "az://container", "x", false);
        expect("azure://container/x", "az://container", "x", false);
        expect(
            "abfss://fs@account.dfs.core.windows.net/x",
            "abfss://fs@account.dfs.core.windows.net",
            "x",
            false,
        );
        expect("http://host:8080/x/", "http://host:8080", "x", true);
        expect("https://host/x%20y", "https://host", "x y", false);
        expect(
            "https://s3.eu-west-1.amazonaws.com/bucket/x/y",
            "https://s3.eu-west-1.amazonaws.com/bucket",
            "x/y",
            false,
        );
        expect("memory:///t/", "memory://", "t", true);
        expect("file:///data/t", "file://", "data/t", false);
        expect("made-up://there/t", "made-up://there", "t", false);
    }

    #[test]
    fn paths_become_file_urls() {
        expect("/data/t/", "file://", "data/t", true);
        expect(
            "/data/50% off #1?.parquet",
            "file://",
            "data/50% off #1?.parquet",
            false,
        );
        let (store, path, _) = parts("here/t");
        assert_eq!(store, "file://");
        assert!(path.ends_with("/here/t"), "{path}");
    }

    #[test]
    fn locations_print_as_they_parse() {
        for text in [
            "s3://bucket/dir/",
            "s3://bucket/a.parquet",
            "file:///data/t",
            "memory:///t/",
        ] {
            assert_eq!(Location::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_path_that_leaves_its_prefix_is_refused_in_every_spelling() {
        for text in [
            "s3://bucket/a/../b",
            "s3://bucket/a/%2e%2E/b",
            "../t",
            "/data/..",
            "memory:///..",
        ] {
            let error = Location::parse(text).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "invalid object path {text:?}: it contains \"..\"; expected a path inside its \
                     store such as dir/file.parquet"
                )
            );
            assert_eq!(error.kind(), ErrorKind::Config);
        }
        let error = Location::parse("s3://bucket/a%00b").unwrap_err();
        assert!(
            error.to_string().contains("it contains a NUL character"),
            "{error}"
        );
    }

    #[test]
    fn credentials_in_a_location_are_refused_and_not_repeated() {
        let error = Location::parse("https://user:planted-secret@host/t").unwrap_err();
        assert_eq!(
            error.to_string(),
            "invalid location \"https://…@host/t\": credentials belong into the store's settings; \
             expected a path or a URL such as s3://bucket/dir/"
        );
    }

    #[test]
    fn what_is_no_location_says_why() {
        let reason = |text: &str| Location::parse(text).unwrap_err().to_string();
        assert!(reason(" ").contains("it is empty"));
        assert!(
            reason("s3:///x").contains("it names no bucket or host"),
            "{}",
            reason("s3:///x")
        );
        assert!(reason("s3://b/x?y").contains("write ? as %3F"));
        assert!(reason("file://host/x").contains("a file URL names no host"));
    }

    #[test]
    fn object_paths_stay_in_their_store() {
        assert_eq!(
            object_path("dir/a.parquet").unwrap().as_ref(),
            "dir/a.parquet"
        );
        for (path, reason) in [
            ("", "it is empty"),
            ("/etc/passwd", "it is absolute"),
            ("a/../b", "it contains \"..\""),
            ("a\0b", "it contains a NUL character"),
        ] {
            assert_eq!(
                object_path(path).unwrap_err().to_string(),
                format!(
                    "invalid object path {path:?}: {reason}; expected a path inside its store \
                     such as dir/file.parquet"
                )
            );
        }
        assert!(object_path("a//b").is_err());
        assert!(object_path("a/./b").is_err());
    }

    #[test]
    fn relative_paths_end_at_segments() {
        let location = Location::parse("s3://b/t/").unwrap();
        assert_eq!(location.relative("t/a"), Some("a"));
        assert_eq!(location.relative("t"), Some(""));
        assert_eq!(location.relative("tt/a"), None);
        assert_eq!(
            Location::parse("s3://b").unwrap().relative("t/a"),
            Some("t/a")
        );
    }
}
