//! What lies under a location, with identities.

use std::time::{Duration, SystemTime};

use futures::{StreamExt, TryStreamExt};
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::path::{DELIMITER, Path};
use object_store::{GetOptions, ObjectMeta, ObjectStore};

use crate::error::{Error, Result};
use crate::identity::{ObjectIdentity, ObjectTag, object_url};
use crate::location::{Location, object_path};
use crate::read::Origin;

/// The most time that a listing of all its pages takes.
const LISTING_TIMEOUT: Duration = Duration::from_secs(600);

/// One object that a listing found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedObject {
    /// Which bytes it is.
    pub identity: ObjectIdentity,
    /// When the store says it was last written.
    pub last_modified: Option<SystemTime>,
}

impl Origin {
    /// The objects under `location`, or the one object that it is, sorted by path.
    ///
    /// Empty objects and hidden ones are left out: those under a path segment after the location
    /// that starts with `.`, or with `_` unless it is a partition (`_day=1`). Objects that a store
    /// lists without etag are asked for by HEAD. Nothing there is an empty list.
    ///
    /// # Errors
    /// [`Error::NoIdentity`] for an object that has neither etag nor version, and what requests
    /// can fail with.
    pub async fn list(&self, location: &Location) -> Result<Vec<ListedObject>> {
        let made = self.stores().made(&location.store)?;
        if !location.directory {
            match self.head_meta(&location.store, &location.path).await {
                Ok(meta) => return Ok(vec![listed(&location.store, meta)?]),
                Err(Error::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let prefix = (!location.path.is_root()).then_some(&location.path);
        let metas = match &made.pages {
            Some(pages) => self.list_pages(&**pages, prefix, location).await?,
            None => {
                self.retried(&location.url(), LISTING_TIMEOUT, || {
                    list_all(&*made.store, prefix, location, self.limits().timeout)
                })
                .await?
            }
        };
        let mut objects: Vec<ListedObject> = futures::stream::iter(
            metas
                .into_iter()
                .filter(|meta| meta.size > 0 && is_visible(location, meta.location.as_ref())),
        )
        .map(|meta| async move {
            let has_tag = meta.e_tag.is_some() || meta.version.is_some();
            let meta = if has_tag {
                meta
            } else {
                self.head_meta(&location.store, &meta.location).await?
            };
            listed(&location.store, meta)
        })
        .buffer_unordered(self.limits().requests_max)
        .try_collect()
        .await?;
        objects.sort_by(|a, b| a.identity.path.cmp(&b.identity.path));
        Ok(objects)
    }

    /// All pages of a listing, each of them a request that is tried as any other: one that fails
    /// costs no page before it.
    async fn list_pages(
        &self,
        pages: &dyn PaginatedListStore,
        prefix: Option<&Path>,
        location: &Location,
    ) -> Result<Vec<ObjectMeta>> {
        let url = location.url();
        let timeout = self.limits().timeout;
        let prefix = prefix.map(|path| format!("{path}{DELIMITER}"));
        let all_pages = async {
            let (mut metas, mut token) = (Vec::new(), None::<String>);
            loop {
                let page = self
                    .retried(&url, timeout, || {
                        self.stores().live_counters().listed();
                        let options = PaginatedListOptions {
                            page_token: token.clone(),
                            ..Default::default()
                        };
                        pages.list_paginated(prefix.as_deref(), options)
                    })
                    .await?;
                metas.extend(page.result.objects);
                match page.page_token {
                    None => return Ok(metas),
                    // Such a listing has no end.
                    next if next == token => {
                        return Err(Error::EndlessListing { url: url.clone() });
                    }
                    next => token = next,
                }
            }
        };
        match tokio::time::timeout(LISTING_TIMEOUT, all_pages).await {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout {
                url: url.clone(),
                timeout_ms: LISTING_TIMEOUT.as_millis() as u64,
                attempts: 1,
            }),
        }
    }

    /// The identity of the object at `path` in `store` now.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::NoIdentity`], and what requests can fail with.
    pub async fn head(&self, store: &str, path: &str) -> Result<ObjectIdentity> {
        let meta = self.head_meta(store, &object_path(path)?).await?;
        Ok(listed(store, meta)?.identity)
    }

    async fn head_meta(&self, store: &str, path: &Path) -> Result<ObjectMeta> {
        let client = self.stores().made(store)?.store;
        let url = object_url(store, path.as_ref());
        let result = self
            .retried(&url, self.limits().timeout, || {
                client.get_opts(path, GetOptions::new().with_head(true))
            })
            .await?;
        Ok(result.meta)
    }
}

/// All pages of a listing, each of which has to come within `timeout`.
async fn list_all(
    store: &dyn ObjectStore,
    prefix: Option<&Path>,
    location: &Location,
    timeout: Duration,
) -> Result<Vec<ObjectMeta>> {
    let mut stream = store.list(prefix);
    let mut metas = Vec::new();
    loop {
        match tokio::time::timeout(timeout, stream.next()).await {
            Ok(Some(Ok(meta))) => metas.push(meta),
            Ok(Some(Err(error))) => return Err(Error::from_store(&location.url(), error)),
            Ok(None) => return Ok(metas),
            Err(_) => {
                return Err(Error::Timeout {
                    url: location.url(),
                    timeout_ms: timeout.as_millis() as u64,
                    attempts: 1,
                });
            }
        }
    }
}

fn listed(store: &str, meta: ObjectMeta) -> Result<ListedObject> {
    let path = meta.location.to_string();
    let tag = match (meta.e_tag, meta.version) {
        (Some(etag), _) => ObjectTag::Etag(etag),
        (None, Some(version)) => ObjectTag::Version(version),
        (None, None) => {
            return Err(Error::NoIdentity {
                url: object_url(store, &path),
            });
        }
    };
    Ok(ListedObject {
        identity: ObjectIdentity {
            store: store.to_owned(),
            path,
            tag,
            size: meta.size,
        },
        last_modified: Some(meta.last_modified.into()),
    })
}

fn is_visible(location: &Location, path: &str) -> bool {
    location.relative(path).is_some_and(|relative| {
        relative.split('/').all(|segment| {
            !(segment.starts_with('.') || segment.starts_with('_') && !segment.contains('='))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_is_what_is_hidden_below_the_location() {
        let location = Location::parse("file:///home/.cache/t/").unwrap();
        let visible = |path: &str| is_visible(&location, path);
        assert!(visible("home/.cache/t/a.parquet"));
        assert!(visible("home/.cache/t/_day=1/a.parquet"));
        assert!(!visible("home/.cache/t/_SUCCESS"));
        assert!(!visible("home/.cache/t/_temporary/0/a.parquet"));
        assert!(!visible("home/.cache/t/.a.parquet.crc"));
        assert!(!visible("home/.cache/other/a.parquet"));
    }
}
