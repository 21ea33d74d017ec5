//! Stores by root URL: registered, or made on first use.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::list::PaginatedListStore;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::{ClientConfigKey, ObjectStore, ObjectStoreScheme, RetryConfig};
use url::Url;

use crate::connector::NoRedirectConnector;
use crate::counted::{CountedStore, Counters, OriginCounters};
use crate::dialect::Dialect;
use crate::error::{Error, Result};
use crate::read::OriginLimits;

/// Schemes that need no registration, as they appear in messages.
const SCHEMES: [&str; 7] = ["file:", "memory:", "s3:", "gs:", "az:", "http:", "https:"];

/// Prefixes of the environment variables that configure stores.
const ENVIRONMENT: [&str; 3] = ["AWS_", "GOOGLE_", "AZURE_"];

/// How to reach stores, from local configuration: a layout only names them.
///
/// Values may be secrets, so `Debug` shows the keys alone.
#[derive(Clone, Default)]
pub struct StoreSettings {
    /// Options by store root URL (`s3://bucket`), with the keys of object_store's builders
    /// (`endpoint`, `region`, `allow_http`, `access_key_id`, …). They win over the environment.
    pub stores: BTreeMap<String, BTreeMap<String, String>>,
    /// Environment variables to use instead of the process's own.
    pub environment: Option<Vec<(String, String)>>,
}

impl StoreSettings {
    /// These settings with one more option for the store at `root`.
    pub fn with_option(mut self, root: &str, key: &str, value: impl Into<String>) -> Self {
        self.stores
            .entry(root.trim_end_matches('/').to_owned())
            .or_default()
            .insert(key.to_owned(), value.into());
        self
    }

    /// What the environment says about stores, keys in lower case as the builders know them.
    fn environment(&self) -> Vec<(String, String)> {
        let variables: Vec<(String, String)> = match &self.environment {
            Some(variables) => variables.clone(),
            None => std::env::vars_os()
                .filter_map(|(key, value)| {
                    Some((key.into_string().ok()?, value.into_string().ok()?))
                })
                .collect(),
        };
        variables
            .into_iter()
            .filter(|(key, _)| ENVIRONMENT.iter().any(|prefix| key.starts_with(prefix)))
            .map(|(key, value)| (key.to_ascii_lowercase(), value))
            .collect()
    }

    /// What the configuration says about the store at `root`.
    fn options(&self, root: &str) -> Vec<(String, String)> {
        self.stores
            .iter()
            .filter(|(store, _)| same_root(store, root))
            .flat_map(|(_, options)| options)
            .map(|(key, value)| (key.to_ascii_lowercase(), value.clone()))
            .collect()
    }
}

impl fmt::Debug for StoreSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys: BTreeMap<&String, Vec<&String>> = self
            .stores
            .iter()
            .map(|(store, options)| (store, options.keys().collect()))
            .collect();
        f.debug_struct("StoreSettings")
            .field("stores", &keys)
            .field("own_environment", &self.environment.is_none())
            .finish()
    }
}

/// The stores of a process by root URL. Cheap to clone, shared.
///
/// Every store it hands out is wrapped so that its requests are counted.
#[derive(Clone)]
pub struct Stores {
    inner: Arc<Inner>,
}

struct Inner {
    settings: StoreSettings,
    made: Mutex<BTreeMap<String, Made>>,
    /// Clients of those among them that are reached over a network, with retries of their own.
    patient: Mutex<BTreeMap<String, Arc<dyn ObjectStore>>>,
    counters: Arc<Counters>,
}

/// A store, and what reads need beside it.
#[derive(Clone)]
pub(crate) struct Made {
    /// Its requests are counted. It tries each of them once: whoever reads tries again.
    pub(crate) store: Arc<dyn ObjectStore>,
    /// Its listings by the page, where it has pages; to be counted by the caller.
    pub(crate) pages: Option<Arc<dyn PaginatedListStore>>,
    /// How it takes conditions.
    pub(crate) dialect: Arc<Dialect>,
    /// Whether it was made here, to be reached over a network.
    is_ours: bool,
}

/// A client as it was made.
struct Client {
    store: Arc<dyn ObjectStore>,
    pages: Option<Arc<dyn PaginatedListStore>>,
    is_http: bool,
}

impl Client {
    fn local(store: impl ObjectStore) -> Client {
        Client {
            store: Arc::new(store),
            pages: None,
            is_http: false,
        }
    }

    fn with_pages<S: ObjectStore + PaginatedListStore>(store: Arc<S>) -> Client {
        Client {
            store: store.clone(),
            pages: Some(store),
            is_http: true,
        }
    }
}

impl Stores {
    /// Stores to be made from `settings` on first use.
    pub fn new(settings: StoreSettings) -> Stores {
        Stores {
            inner: Arc::new(Inner {
                settings,
                made: Mutex::default(),
                patient: Mutex::default(),
                counters: Arc::default(),
            }),
        }
    }

    /// Uses `store` for the root URL `root` (`s3://bucket`) from now on.
    pub fn register(&self, root: &str, store: Arc<dyn ObjectStore>) {
        let made = self.counted(Client {
            store,
            pages: None,
            is_http: false,
        });
        self.made_stores().insert(normalised(root), made);
    }

    /// The store with the root URL `root`, for readers other than [`Origin`](crate::Origin): over
    /// a network it tries each request again by itself, which counts as one.
    ///
    /// # Errors
    /// [`Error::UnknownStore`] for a root that is not registered and has no known scheme,
    /// [`Error::StoreSettings`] and [`Error::UnknownSetting`] for settings that make no client.
    pub fn get(&self, root: &str) -> Result<Arc<dyn ObjectStore>> {
        let made = self.made(root)?;
        if !made.is_ours {
            return Ok(made.store);
        }
        let root = normalised(root);
        let mut patient = self
            .inner
            .patient
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = patient.get(&root) {
            return Ok(store.clone());
        }
        let client = self.make(&root, Vec::new, Retries::OfTheClient)?;
        let store = self.counted(client).store;
        patient.insert(root, store.clone());
        Ok(store)
    }

    /// The store that [`Origin`](crate::Origin) asks, with what reads need beside it.
    ///
    /// # Errors
    /// As [`Stores::get`].
    pub(crate) fn made(&self, root: &str) -> Result<Made> {
        let root = normalised(root);
        let mut made = self.made_stores();
        if let Some(store) = made.get(&root) {
            return Ok(store.clone());
        }
        let known = || {
            let registered = made.keys().cloned();
            let configured = self.inner.settings.stores.keys().cloned();
            let mut known: Vec<String> = registered.chain(configured).collect();
            known.sort();
            known.dedup();
            known.extend(SCHEMES.map(|scheme| format!("{scheme}//…")));
            known
        };
        let counted = self.counted(self.make(&root, known, Retries::None)?);
        made.insert(root, counted.clone());
        Ok(counted)
    }

    /// What was asked of all stores of this set so far.
    pub fn counters(&self) -> OriginCounters {
        self.inner.counters.snapshot()
    }

    pub(crate) fn live_counters(&self) -> &Counters {
        &self.inner.counters
    }

    fn made_stores(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Made>> {
        self.inner
            .made
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn counted(&self, client: Client) -> Made {
        let counters = self.inner.counters.clone();
        Made {
            store: Arc::new(CountedStore::new(client.store, counters)),
            pages: client.pages,
            dialect: Arc::new(Dialect::new(client.is_http)),
            is_ours: client.is_http,
        }
    }

    fn make(
        &self,
        root: &str,
        known: impl Fn() -> Vec<String>,
        retries: Retries,
    ) -> Result<Client> {
        let unknown = || Error::UnknownStore {
            store: root.to_owned(),
            known: known(),
        };
        let url = Url::parse(&with_path(root)).map_err(|_| unknown())?;
        let (scheme, _) = ObjectStoreScheme::parse(&url).map_err(|_| unknown())?;
        let environment = self.inner.settings.environment();
        let options = self.inner.settings.options(root);

        // The environment holds variables for other programs too, so what it says is taken where
        // it is understood; a configured key that is not understood is a mistake to report.
        macro_rules! configured {
            ($builder:expr, $key:ty) => {{
                let mut builder = $builder
                    .with_url(url.to_string())
                    .with_retry(retries.config())
                    .with_http_connector(NoRedirectConnector {
                        tells_answers: retries == Retries::None,
                    });
                for (key, value) in &environment {
                    if let Ok(key) = key.parse::<$key>() {
                        builder = builder.with_config(key, value);
                    }
                }
                for (key, value) in &options {
                    let key = key.parse::<$key>().map_err(|_| Error::UnknownSetting {
                        store: root.to_owned(),
                        key: key.clone(),
                    })?;
                    builder = builder.with_config(key, value);
                }
                Arc::new(builder.build().map_err(|source| Error::StoreSettings {
                    store: root.to_owned(),
                    source: Arc::new(source),
                })?)
            }};
        }
        Ok(match scheme {
            ObjectStoreScheme::Local => Client::local(LocalFileSystem::new()),
            ObjectStoreScheme::Memory => Client::local(InMemory::new()),
            ObjectStoreScheme::AmazonS3 => {
                Client::with_pages(configured!(AmazonS3Builder::new(), AmazonS3ConfigKey))
            }
            ObjectStoreScheme::GoogleCloudStorage => Client::with_pages(configured!(
                GoogleCloudStorageBuilder::new(),
                GoogleConfigKey
            )),
            ObjectStoreScheme::MicrosoftAzure => {
                Client::with_pages(configured!(MicrosoftAzureBuilder::new(), AzureConfigKey))
            }
            ObjectStoreScheme::Http => {
                // Who writes http:// means it; nothing secret is sent there unless configured.
                let plain = url.scheme() == "http";
                let builder =
                    HttpBuilder::new().with_config(ClientConfigKey::AllowHttp, plain.to_string());
                Client {
                    store: configured!(builder, ClientConfigKey),
                    pages: None,
                    is_http: true,
                }
            }
            _ => return Err(unknown()),
        })
    }
}

impl fmt::Debug for Stores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stores")
            .field("settings", &self.inner.settings)
            .field("made", &self.made_stores().keys().collect::<Vec<_>>())
            .finish()
    }
}

/// Who tries a request again: there is one layer of retries, a second one would multiply it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Retries {
    /// [`Origin`](crate::Origin) does, with one bound for all stores.
    None,
    /// The client does, for readers that do not.
    OfTheClient,
}

impl Retries {
    fn config(self) -> RetryConfig {
        let limits = OriginLimits::default();
        match self {
            Retries::None => RetryConfig {
                max_retries: 0,
                ..RetryConfig::default()
            },
            Retries::OfTheClient => RetryConfig {
                max_retries: limits.attempts as usize - 1,
                retry_timeout: limits.retry_time,
                ..RetryConfig::default()
            },
        }
    }
}

/// A root URL in the one spelling that the map knows: `file://`, `s3://bucket`.
fn normalised(root: &str) -> String {
    match root.split_once("://") {
        Some((scheme, rest)) => {
            let scheme = if scheme == "s3a" { "s3" } else { scheme };
            format!("{scheme}://{}", rest.trim_end_matches('/'))
        }
        None => root.to_owned(),
    }
}

fn same_root(a: &str, b: &str) -> bool {
    normalised(a) == normalised(b)
}

/// A root URL that `Url` takes: `file://` alone has no path.
fn with_path(root: &str) -> String {
    if root.ends_with("://") {
        format!("{root}/")
    } else {
        root.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty_environment() -> StoreSettings {
        StoreSettings {
            environment: Some(Vec::new()),
            ..StoreSettings::default()
        }
    }

    #[test]
    fn an_unknown_store_is_named_with_those_known() {
        let stores = Stores::new(empty_environment());
        stores.register("s3://mine/", Arc::new(InMemory::new()));
        let error = stores.get("ftp://there").unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown store \"ftp://there\"; known are s3://mine, file://…, memory://…, s3://…, \
             gs://…, az://…, http://…, https://…; configure the store or correct the location"
        );
    }

    #[test]
    fn stores_are_made_once() {
        let stores = Stores::new(empty_environment());
        let first = stores.get("memory://").unwrap();
        assert!(Arc::ptr_eq(&first, &stores.get("memory:///").unwrap()));
        assert!(stores.get("file://").is_ok());
    }

    #[test]
    fn every_cloud_store_can_be_made_from_settings() {
        let settings = empty_environment()
            .with_option("s3://b", "endpoint", "http://127.0.0.1:1")
            .with_option("s3://b", "allow_http", "true")
            .with_option("s3://b", "access_key_id", "a")
            .with_option("s3://b", "secret_access_key", "planted-secret")
            .with_option("az://c", "azure_storage_account_name", "account")
            .with_option("az://c", "skip_signature", "true")
            .with_option("gs://b", "google_skip_signature", "true");
        assert!(!format!("{settings:?}").contains("planted-secret"));
        let stores = Stores::new(settings);
        for root in ["s3://b", "az://c", "gs://b", "http://127.0.0.1:1"] {
            stores.get(root).unwrap();
        }
        assert!(!format!("{stores:?}").contains("planted-secret"));
    }

    #[test]
    fn a_setting_nobody_knows_is_an_error_and_a_variable_is_not() {
        let mut settings = empty_environment();
        settings.environment = Some(vec![
            ("AWS_PAGER".into(), "less".into()),
            ("AWS_REGION".into(), "eu-west-1".into()),
            ("HOME".into(), "/".into()),
        ]);
        assert_eq!(settings.environment().len(), 2);
        let stores = Stores::new(settings.clone());
        stores.get("s3://b").unwrap();
        let stores = Stores::new(settings.with_option("s3://b", "endpont", "x"));
        assert_eq!(
            stores.get("s3://b").unwrap_err().to_string(),
            "store s3://b has no setting \"endpont\"; correct the key in the store's settings"
        );
    }

    #[test]
    fn roots_have_one_spelling() {
        assert_eq!(normalised("s3a://b/"), "s3://b");
        assert_eq!(normalised("file:///"), "file://");
        assert_eq!(normalised("memory://"), "memory://");
    }
}
