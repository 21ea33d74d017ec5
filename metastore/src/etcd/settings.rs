//! How to reach etcd: plain data, checked before it is used.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use etcd_client::{Certificate, Identity, TlsOptions};
use serde::Deserialize;

use crate::error::{Error, Result};

/// The deadline of a call unless another is set.
const TIMEOUT_MS_DEFAULT: u64 = 5_000;

/// A text that is never printed.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Hides a text.
    pub fn new(text: impl Into<String>) -> Self {
        Secret(text.into())
    }

    /// The text, to be handed to whom it is meant for.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Secret(text)
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Secret(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(redacted)")
    }
}

/// How to reach an etcd cluster.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EtcdSettings {
    /// `http://host:port`, `https://host:port`, or `host:port` (then TLS if `ca_file` is set).
    pub endpoints: Vec<String>,
    /// The user, if the cluster asks for one.
    pub user: Option<String>,
    /// The user's password.
    pub password: Option<Secret>,
    /// PEM file with the authorities that sign the servers' certificates. Needed for TLS.
    pub ca_file: Option<PathBuf>,
    /// PEM file with our certificate, if the servers ask for one.
    pub cert_file: Option<PathBuf>,
    /// PEM file with its private key.
    pub key_file: Option<PathBuf>,
    /// The name to expect in the servers' certificates, if it is not the endpoint's host.
    pub server_name: Option<String>,
    /// The deadline of every call, in milliseconds.
    pub timeout_ms: u64,
}

impl Default for EtcdSettings {
    fn default() -> Self {
        EtcdSettings {
            endpoints: Vec::new(),
            user: None,
            password: None,
            ca_file: None,
            cert_file: None,
            key_file: None,
            server_name: None,
            timeout_ms: TIMEOUT_MS_DEFAULT,
        }
    }
}

/// Settings that can work, with their files read.
pub(crate) struct Valid {
    pub(crate) endpoints: Vec<String>,
    pub(crate) user: Option<(String, String)>,
    pub(crate) tls: Option<TlsOptions>,
    pub(crate) timeout: Duration,
}

impl EtcdSettings {
    /// Settings for these endpoints, without user or TLS.
    pub fn new<S: Into<String>>(endpoints: impl IntoIterator<Item = S>) -> Self {
        EtcdSettings {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            ..Default::default()
        }
    }

    pub(crate) fn validate(&self) -> Result<Valid> {
        let wrong = |key, reason: String| Error::Settings { key, reason };
        if self.timeout_ms == 0 {
            return Err(wrong(
                "etcd.timeout",
                "is 0, expected at least 1".to_owned(),
            ));
        }
        if self.endpoints.is_empty() {
            return Err(wrong(
                "etcd.hosts",
                "is empty, expected at least one host:port".to_owned(),
            ));
        }
        let wants_tls = self.ca_file.is_some() || self.cert_file.is_some();
        let mut endpoints = Vec::with_capacity(self.endpoints.len());
        for given in &self.endpoints {
            let given = given.trim();
            let (tls, host) = match given.split_once("://") {
                Some(("http", host)) => (false, host),
                Some(("https", host)) => (true, host),
                Some((scheme, _)) => {
                    let reason = format!("`{given}` has scheme {scheme}, expected http or https");
                    return Err(wrong("etcd.hosts", reason));
                }
                None => (wants_tls, given),
            };
            let host = host.trim_end_matches('/');
            let port = host
                .rsplit_once(':')
                .and_then(|(_, port)| port.parse::<u16>().ok());
            if port.is_none() || host.contains(['/', '@', ' ', ',']) {
                let reason = format!("`{given}` is no address, expected host:port");
                return Err(wrong("etcd.hosts", reason));
            }
            if wants_tls && !tls {
                let reason = format!(
                    "`{given}` is plain HTTP, but etcd.tls.ca or etcd.tls.cert asks for TLS; use https://"
                );
                return Err(wrong("etcd.hosts", reason));
            }
            if tls && self.ca_file.is_none() {
                let reason = format!(
                    "is not set, but `{given}` needs it; expected a PEM file with the authority of etcd's certificates"
                );
                return Err(wrong("etcd.tls.ca", reason));
            }
            endpoints.push(format!("{}://{host}", if tls { "https" } else { "http" }));
        }
        let user = match (&self.user, &self.password) {
            (Some(user), Some(password)) => Some((user.clone(), password.expose().to_owned())),
            (None, None) => None,
            (Some(user), None) => {
                let reason = format!("is not set, but etcd.user is {user}");
                return Err(wrong("etcd.password", reason));
            }
            (None, Some(_)) => {
                return Err(wrong(
                    "etcd.user",
                    "is not set, but etcd.password is".to_owned(),
                ));
            }
        };
        Ok(Valid {
            endpoints,
            user,
            tls: self.tls()?,
            timeout: Duration::from_millis(self.timeout_ms),
        })
    }

    fn tls(&self) -> Result<Option<TlsOptions>> {
        let Some(ca_file) = &self.ca_file else {
            return match self.cert_file.is_some() || self.key_file.is_some() {
                true => Err(Error::Settings {
                    key: "etcd.tls.ca",
                    reason: "is not set, but etcd.tls.cert or etcd.tls.key is".to_owned(),
                }),
                false => Ok(None),
            };
        };
        let ca = Certificate::from_pem(read_pem("etcd.tls.ca", ca_file)?);
        let mut tls = TlsOptions::new().ca_certificate(ca);
        match (&self.cert_file, &self.key_file) {
            (Some(cert), Some(key)) => {
                let cert = read_pem("etcd.tls.cert", cert)?;
                let key = read_pem("etcd.tls.key", key)?;
                tls = tls.identity(Identity::from_pem(cert, key));
            }
            (None, None) => {}
            (Some(_), None) => {
                let reason = "is not set, but etcd.tls.cert is".to_owned();
                return Err(Error::Settings {
                    key: "etcd.tls.key",
                    reason,
                });
            }
            (None, Some(_)) => {
                let reason = "is not set, but etcd.tls.key is".to_owned();
                return Err(Error::Settings {
                    key: "etcd.tls.cert",
                    reason,
                });
            }
        }
        if let Some(name) = &self.server_name {
            tls = tls.domain_name(name);
        }
        Ok(Some(tls))
    }
}

fn read_pem(key: &'static str, path: &Path) -> Result<Vec<u8>> {
    let wrong = |reason| Error::Settings { key, reason };
    let bytes =
        std::fs::read(path).map_err(|error| wrong(format!("{}: {error}", path.display())))?;
    if !bytes.windows(11).any(|window| window == b"-----BEGIN ") {
        return Err(wrong(format!("{} is no PEM file", path.display())));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(settings: EtcdSettings) -> String {
        settings
            .validate()
            .err()
            .expect("settings that cannot work")
            .to_string()
    }

    #[test]
    fn addresses_are_completed_or_refused_by_name() {
        let valid = EtcdSettings::new(["a:2379", "http://b:2379/", "[::1]:2379"])
            .validate()
            .unwrap();
        assert_eq!(
            valid.endpoints,
            ["http://a:2379", "http://b:2379", "http://[::1]:2379"]
        );
        assert_eq!(
            refused(EtcdSettings::default()),
            "setting etcd.hosts: is empty, expected at least one host:port"
        );
        assert_eq!(
            refused(EtcdSettings::new(["ftp://a:1"])),
            "setting etcd.hosts: `ftp://a:1` has scheme ftp, expected http or https"
        );
        assert_eq!(
            refused(EtcdSettings::new(["a"])),
            "setting etcd.hosts: `a` is no address, expected host:port"
        );
        assert!(
            refused(EtcdSettings::new(["https://a:1"]))
                .starts_with("setting etcd.tls.ca: is not set")
        );
        assert!(
            refused(EtcdSettings {
                timeout_ms: 0,
                ..EtcdSettings::new(["a:1"])
            })
            .starts_with("setting etcd.timeout: is 0")
        );
    }

    #[test]
    fn half_a_credential_is_refused() {
        let base = || EtcdSettings::new(["a:2379"]);
        assert_eq!(
            refused(EtcdSettings {
                user: Some("root".into()),
                ..base()
            }),
            "setting etcd.password: is not set, but etcd.user is root"
        );
        assert_eq!(
            refused(EtcdSettings {
                password: Some("x".into()),
                ..base()
            }),
            "setting etcd.user: is not set, but etcd.password is"
        );
        let missing = EtcdSettings {
            ca_file: Some("/nowhere/ca.pem".into()),
            ..base()
        };
        assert!(refused(missing).starts_with("setting etcd.tls.ca: /nowhere/ca.pem: "));
        let plain = EtcdSettings {
            ca_file: Some("ca.pem".into()),
            ..EtcdSettings::new(["http://a:1"])
        };
        assert!(refused(plain).contains("is plain HTTP"));
    }

    #[test]
    fn a_password_is_never_printed() {
        let settings = EtcdSettings {
            password: Some("planted-secret".into()),
            ..EtcdSettings::new(["a:1"])
        };
        assert!(!format!("{settings:?}").contains("planted-secret"));
    }
}
