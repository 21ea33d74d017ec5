//! Which bytes: the identity of one immutable content of one object.

use serde::{Deserialize, Serialize};

/// What a store says to tell one content of an object from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectTag {
    /// The entity tag, exactly as the store gave it (with its quotes, if it has any).
    Etag(String),
    /// The version, of stores that keep versions and give no etag.
    Version(String),
}

impl std::fmt::Display for ObjectTag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ObjectTag::Etag(tag) => write!(f, "etag {tag}"),
            ObjectTag::Version(version) => write!(f, "version {version}"),
        }
    }
}

/// Which bytes: one immutable content of one object. Equal identities mean equal bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectIdentity {
    /// Root URL of the store, normalised, without trailing slash: `file://`, `s3://bucket`.
    pub store: String,
    /// Path inside the store, without leading slash.
    pub path: String,
    /// Etag or version of this content.
    pub tag: ObjectTag,
    /// Size in bytes.
    pub size: u64,
}

/// Tags of [`ObjectTag`]'s variants in [`ObjectIdentity::to_key`]; never reused.
const KEY_ETAG: u8 = 1;
const KEY_VERSION: u8 = 2;

impl ObjectIdentity {
    /// Canonical bytes of this identity: different identities have different keys.
    ///
    /// Store, path and tag, each as a little-endian `u32` length and its UTF-8 bytes, the tag
    /// preceded by a byte that says which kind it is; then the size as a little-endian `u64`.
    ///
    /// ```
    /// # use stoa_origin::{ObjectIdentity, ObjectTag};
    /// let identity = ObjectIdentity {
    ///     store: "s3://bucket".into(),
    ///     path: "a.parquet".into(),
    ///     tag: ObjectTag::Etag("\"1\"".into()),
    ///     size: 12,
    /// };
    /// assert_eq!(ObjectIdentity::from_key(&identity.to_key()), Some(identity));
    /// ```
    pub fn to_key(&self) -> Vec<u8> {
        let (kind, tag) = match &self.tag {
            ObjectTag::Etag(tag) => (KEY_ETAG, tag),
            ObjectTag::Version(version) => (KEY_VERSION, version),
        };
        let mut key =
            Vec::with_capacity(3 * 4 + 1 + 8 + self.store.len() + self.path.len() + tag.len());
        push_string(&mut key, &self.store);
        push_string(&mut key, &self.path);
        key.push(kind);
        push_string(&mut key, tag);
        key.extend_from_slice(&self.size.to_le_bytes());
        key
    }

    /// The identity whose key these bytes are, or `None` if they are no key.
    pub fn from_key(key: &[u8]) -> Option<ObjectIdentity> {
        let (store, rest) = take_string(key)?;
        let (path, rest) = take_string(rest)?;
        let (&kind, rest) = rest.split_first()?;
        let (tag, rest) = take_string(rest)?;
        let size = u64::from_le_bytes(rest.try_into().ok()?);
        let tag = match kind {
            KEY_ETAG => ObjectTag::Etag(tag),
            KEY_VERSION => ObjectTag::Version(tag),
            _ => return None,
        };
        Some(ObjectIdentity {
            store,
            path,
            tag,
            size,
        })
    }

    /// Where the object lies, for people: `s3://bucket/dir/file.parquet`.
    pub fn url(&self) -> String {
        object_url(&self.store, &self.path)
    }

    /// Tag and size, for messages about a content that differs.
    pub fn content(&self) -> String {
        format!("{}, {} bytes", self.tag, self.size)
    }
}

impl std::fmt::Display for ObjectIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.url(), self.content())
    }
}

/// The URL of `path` in `store`, for people.
pub(crate) fn object_url(store: &str, path: &str) -> String {
    format!("{store}/{path}")
}

/// The bare opaque part of an etag: without weak prefix and quotes, which not every answer of
/// every store carries alike.
pub(crate) fn bare_etag(tag: &str) -> &str {
    let tag = tag.strip_prefix("W/").unwrap_or(tag);
    tag.strip_prefix('"')
        .and_then(|tag| tag.strip_suffix('"'))
        .unwrap_or(tag)
}

fn push_string(key: &mut Vec<u8>, text: &str) {
    let length = u32::try_from(text.len()).expect("names of objects are shorter than 4 GiB");
    key.extend_from_slice(&length.to_le_bytes());
    key.extend_from_slice(text.as_bytes());
}

fn take_string(bytes: &[u8]) -> Option<(String, &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (text, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    Some((String::from_utf8(text.to_vec()).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn identity() -> impl Strategy<Value = ObjectIdentity> {
        (
            any::<String>(),
            any::<String>(),
            any::<String>(),
            any::<bool>(),
            any::<u64>(),
        )
            .prop_map(|(store, path, tag, version, size)| ObjectIdentity {
                store,
                path,
                tag: if version {
                    ObjectTag::Version(tag)
                } else {
                    ObjectTag::Etag(tag)
                },
                size,
            })
    }

    proptest! {
        #[test]
        fn keys_round_trip_so_they_are_injective(identity in identity()) {
            prop_assert_eq!(ObjectIdentity::from_key(&identity.to_key()), Some(identity));
        }

        #[test]
        fn any_bytes_are_a_key_or_not_but_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Some(identity) = ObjectIdentity::from_key(&bytes) {
                prop_assert_eq!(identity.to_key(), bytes);
            }
        }
    }

    #[test]
    fn fields_cannot_run_into_each_other() {
        let identity = |store: &str, path: &str| ObjectIdentity {
            store: store.into(),
            path: path.into(),
            tag: ObjectTag::Etag("t".into()),
            size: 1,
        };
        assert_ne!(identity("ab", "c").to_key(), identity("a", "bc").to_key());
        let etag = identity("a", "b");
        let version = ObjectIdentity {
            tag: ObjectTag::Version("t".into()),
            ..etag.clone()
        };
        assert_ne!(etag.to_key(), version.to_key());
    }

    #[test]
    fn urls_read_as_people_write_them() {
        let mut identity = ObjectIdentity {
            store: "file://".into(),
            path: "data/a.parquet".into(),
            tag: ObjectTag::Version("7".into()),
            size: 3,
        };
        assert_eq!(identity.url(), "file:///data/a.parquet");
        assert_eq!(
            identity.to_string(),
            "file:///data/a.parquet (version 7, 3 bytes)"
        );
        identity.store = "s3://bucket".into();
        assert_eq!(identity.url(), "s3://bucket/data/a.parquet");
    }

    #[test]
    fn etags_compare_without_their_dress() {
        assert_eq!(bare_etag("\"abc\""), "abc");
        assert_eq!(bare_etag("W/\"abc\""), "abc");
        assert_eq!(bare_etag("abc"), "abc");
        assert_eq!(bare_etag("\""), "\"");
    }
}
