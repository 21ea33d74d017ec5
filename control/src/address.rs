//! The rule for addresses: loopback, unless somebody said that the network is trusted.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Where to serve. Plain data: check it with [`Listen::check`], which serving does first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listen {
    /// Address and port; port 0 lets the system choose.
    pub address: SocketAddr,
    /// Whether an address other than loopback may be served in plain text.
    #[serde(default)]
    pub insecure: bool,
}

impl Listen {
    /// Loopback with this port; 0 lets the system choose.
    pub fn loopback(port: u16) -> Listen {
        Listen {
            address: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port),
            insecure: false,
        }
    }

    /// Reads `address:port`, where `localhost` stands for 127.0.0.1, and checks it.
    pub fn parse(text: &str, insecure: bool) -> Result<Listen> {
        let invalid = || Error::InvalidAddress {
            found: text.to_owned(),
        };
        let address = match text.strip_prefix("localhost:") {
            Some(port) => SocketAddr::new(
                IpAddr::V4(Ipv4Addr::LOCALHOST),
                port.parse().map_err(|_| invalid())?,
            ),
            None => text.parse().map_err(|_| invalid())?,
        };
        let listen = Listen { address, insecure };
        listen.check()?;
        Ok(listen)
    }

    /// [`Error::InsecureAddress`] if others could reach this address and `insecure` is not set.
    pub fn check(&self) -> Result<()> {
        if self.insecure || is_loopback(self.address.ip()) {
            return Ok(());
        }
        Err(Error::InsecureAddress {
            address: self.address.to_string(),
        })
    }
}

fn is_loopback(ip: IpAddr) -> bool {
    // `::ffff:127.0.0.1` is loopback in other dress.
    ip.to_canonical().is_loopback()
}

/// Checks an address to talk to, `host:port`, by the same rule, and gives its URL. A name other
/// than `localhost` counts as remote: what it resolves to can change.
pub(crate) fn check_peer(text: &str, insecure: bool) -> Result<String> {
    let invalid = || Error::InvalidAddress {
        found: text.to_owned(),
    };
    let address = text.strip_prefix("http://").unwrap_or(text);
    let (host, port) = address.rsplit_once(':').ok_or_else(invalid)?;
    let port: u16 = port.parse().map_err(|_| invalid())?;
    let bare = host
        .strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .unwrap_or(host);
    let plain = !bare.is_empty()
        && bare
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._:%".contains(&b));
    // A colon without brackets would be read as the start of the port.
    if !plain || port == 0 || (bare.contains(':') && bare == host) {
        return Err(invalid());
    }
    let local = bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(is_loopback);
    if !local && !insecure {
        return Err(Error::InsecureAddress {
            address: address.to_owned(),
        });
    }
    Ok(format!("http://{host}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_served_and_everything_else_needs_consent() {
        for text in [
            "127.0.0.1:0",
            "localhost:18888",
            "[::1]:80",
            "127.8.9.1:1",
            "[::ffff:127.0.0.1]:1",
        ] {
            Listen::parse(text, false).unwrap();
        }
        for text in ["0.0.0.0:18888", "[::]:1", "10.0.0.1:2", "192.0.2.7:3"] {
            let error = Listen::parse(text, false).unwrap_err();
            assert!(
                matches!(error, Error::InsecureAddress { .. }),
                "{text}: {error}"
            );
            Listen::parse(text, true).unwrap();
        }
    }

    #[test]
    fn an_insecure_address_says_what_to_do() {
        assert_eq!(
            Listen::parse("0.0.0.0:18888", false)
                .unwrap_err()
                .to_string(),
            "insecure address 0.0.0.0:18888: control is not encrypted yet, so only loopback \
             addresses are used; take 127.0.0.1, or set `insecure = true` if the network is trusted"
        );
        assert_eq!(
            Listen::parse("here", true).unwrap_err().to_string(),
            "invalid address `here`: expected host:port, such as 127.0.0.1:18888"
        );
    }

    #[test]
    fn peers_follow_the_same_rule() {
        assert_eq!(
            check_peer("127.0.0.1:1", false).unwrap(),
            "http://127.0.0.1:1"
        );
        assert_eq!(
            check_peer("http://localhost:1", false).unwrap(),
            "http://localhost:1"
        );
        assert_eq!(check_peer("[::1]:1", false).unwrap(), "http://[::1]:1");
        assert!(matches!(
            check_peer("node-1:1", false),
            Err(Error::InsecureAddress { .. })
        ));
        assert!(matches!(
            check_peer("127.0.0.1.evil.example:1", false),
            Err(Error::InsecureAddress { .. })
        ));
        assert_eq!(check_peer("node-1:1", true).unwrap(), "http://node-1:1");
        for text in [
            "",
            ":1",
            "a",
            "a:",
            "a:0",
            "a:99999",
            "::1:1",
            "a/b:1",
            "user@a:1",
            "a b:1",
            "127.0.0.1:1/x",
        ] {
            assert!(
                matches!(check_peer(text, true), Err(Error::InvalidAddress { .. })),
                "{text}"
            );
        }
    }
}
