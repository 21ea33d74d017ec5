//! Values: from the text that file, environment or flag gave to a checked, typed value.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::keys::Kind;

/// A text that must not be printed or logged.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps `text` from being printed.
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// The text itself, for the one place that sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<redacted>")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<redacted>")
    }
}

/// A checked value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Of [`Kind::Bool`].
    Bool(bool),
    /// Of [`Kind::Bytes`].
    Bytes(u64),
    /// Of [`Kind::Integer`].
    Integer(u64),
    /// Of the kinds of spans; `None` is `snapshot`.
    Span(Option<Duration>),
    /// `off`, of [`Kind::SpanOrOff`].
    Off,
    /// Of [`Kind::Text`], [`Kind::Address`] and [`Kind::Choice`].
    Text(String),
    /// Of [`Kind::Path`].
    Path(PathBuf),
    /// Of [`Kind::Hosts`] and [`Kind::Addresses`].
    Hosts(Vec<String>),
    /// Of [`Kind::Secret`].
    Secret(Secret),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Bool(value) => write!(f, "{value}"),
            Value::Bytes(value) => write!(f, "{}", format_bytes(*value)),
            Value::Integer(value) => write!(f, "{value}"),
            Value::Span(Some(value)) => write!(f, "{}", humantime::format_duration(*value)),
            Value::Span(None) => f.write_str("snapshot"),
            Value::Off => f.write_str("off"),
            Value::Text(value) => f.write_str(value),
            Value::Path(value) => write!(f, "{}", value.display()),
            Value::Hosts(value) => f.write_str(&value.join(",")),
            Value::Secret(value) => write!(f, "{value}"),
        }
    }
}

/// Bytes for people: `1.5 GiB`, exact where it is a whole number of a unit.
pub fn format_bytes(bytes: u64) -> String {
    for (unit, factor) in [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)] {
        if bytes >= factor && bytes.is_multiple_of(factor) {
            return format!("{} {unit}", bytes / factor);
        }
    }
    bytesize::ByteSize::b(bytes).display().iec().to_string()
}

/// Checks `text` against `kind`; the error is the reason, to be put after key and value.
pub(super) fn parse(kind: Kind, text: &str) -> Result<Value, String> {
    let text = text.trim();
    match kind {
        Kind::Bool => match text {
            "true" => Ok(Value::Bool(true)),
            "false" => Ok(Value::Bool(false)),
            _ => Err("expected true or false".into()),
        },
        Kind::Bytes { min } => {
            let bytes = parse_bytes(text)?;
            if bytes < min {
                return Err(match bytes {
                    0 => "it must be greater than zero".to_string(),
                    _ => format!("it must be at least {}", format_bytes(min)),
                });
            }
            Ok(Value::Bytes(bytes))
        }
        Kind::Integer { min, max } => {
            let number = parse_integer(text)?;
            if number < min && number == 0 {
                return Err("it must be greater than zero".into());
            }
            if !(min..=max).contains(&number) {
                return Err(format!("it must be between {min} and {max}"));
            }
            Ok(Value::Integer(number))
        }
        Kind::Span => match parse_span(text)? {
            Duration::ZERO => Err("it must be greater than zero".into()),
            span => Ok(Value::Span(Some(span))),
        },
        Kind::SpanOrOff if text == "off" => Ok(Value::Off),
        Kind::SpanOrOff => match parse_span(text) {
            Ok(span) if span.is_zero() => {
                Err("it must be greater than zero; `off` never does it".into())
            }
            Ok(span) => Ok(Value::Span(Some(span))),
            Err(reason) => Err(format!("{reason}, or `off`")),
        },
        Kind::SpanOrSnapshot if text == "snapshot" => Ok(Value::Span(None)),
        Kind::SpanOrSnapshot => match parse_span(text) {
            Ok(Duration::ZERO) => {
                Err("it must be greater than zero; `snapshot` never looks".into())
            }
            Ok(span) => Ok(Value::Span(Some(span))),
            Err(reason) => Err(format!("{reason}, or `snapshot`")),
        },
        Kind::SpanOrZero => Ok(Value::Span(Some(parse_span(text)?))),
        Kind::Text => match text {
            "" => Err("it must not be empty".into()),
            text if text.contains('\0') => Err("it must not contain NUL".into()),
            text => Ok(Value::Text(text.into())),
        },
        Kind::Path => match text {
            text if text.contains('\0') => Err("it must not contain NUL".into()),
            text if text.starts_with('/') => Ok(Value::Path(PathBuf::from(text))),
            _ => Err("expected an absolute path".into()),
        },
        Kind::Address => parse_address(text).map(Value::Text),
        Kind::Addresses => {
            let all: Result<Vec<String>, String> = text
                .split(',')
                .map(|one| parse_address(one.trim()))
                .collect();
            all.map(Value::Hosts)
        }
        Kind::Hosts => parse_hosts(text).map(Value::Hosts),
        Kind::Choice(words) if words.contains(&text) => Ok(Value::Text(text.into())),
        Kind::Choice(words) => Err(format!("expected one of {}", words.join(", "))),
        Kind::Secret => Ok(Value::Secret(Secret::new(text))),
    }
}

/// Parses `64GiB`, `1.5 GB`, `4096`, `512M`; single letters count in powers of 1024.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    const EXPECTED: &str = "expected a size such as 64GiB, 500MB or a number of bytes";
    if text.starts_with('-') {
        return Err("it must be greater than zero".into());
    }
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_')
        .unwrap_or(text.len());
    let number = text[..split].replace('_', "");
    let factor: u64 = match text[split..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(EXPECTED.into()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole
            .checked_mul(factor)
            .ok_or_else(|| "it is too large".to_string());
    }
    let fraction: f64 = number.parse().map_err(|_| EXPECTED.to_string())?;
    let bytes = fraction * factor as f64;
    if bytes >= u64::MAX as f64 {
        return Err("it is too large".into());
    }
    Ok(bytes as u64)
}

fn parse_integer(text: &str) -> Result<u64, String> {
    if text.starts_with('-') && text[1..].parse::<u64>().is_ok() {
        return Err("it must be greater than zero".into());
    }
    text.replace('_', "")
        .parse()
        .map_err(|_| "expected a whole number".to_string())
}

fn parse_span(text: &str) -> Result<Duration, String> {
    if text.starts_with('-') {
        return Err("it must not be negative".into());
    }
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    humantime::parse_duration(text)
        .map_err(|_| "expected a number of seconds or a time such as 90s, 2m, 1h".to_string())
}

fn parse_address(text: &str) -> Result<String, String> {
    const EXPECTED: &str = "expected host:port, such as 127.0.0.1:7510 or [::1]:7510";
    let (host, port) = text.rsplit_once(':').ok_or(EXPECTED)?;
    let bare_v6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
    if host.is_empty() || bare_v6 || host.contains(|c: char| c.is_whitespace() || c == '/') {
        return Err(EXPECTED.into());
    }
    port.parse::<u16>().map_err(|_| EXPECTED.to_string())?;
    Ok(text.to_string())
}

fn parse_hosts(text: &str) -> Result<Vec<String>, String> {
    let hosts: Vec<String> = text
        .split(',')
        .map(|host| host.trim().to_string())
        .collect();
    for host in &hosts {
        if host.is_empty() {
            return Err("it names an empty host; expected `host,host:port,…`".into());
        }
        let bare = host
            .strip_prefix("http://")
            .or_else(|| host.strip_prefix("https://"))
            .unwrap_or(host);
        if bare.is_empty() || bare.contains(|c: char| c.is_whitespace() || c == '/') {
            return Err(format!(
                "`{host}` is not a host; expected `host,host:port,…`"
            ));
        }
        if let Some((_, port)) = split_port(bare)
            && port.parse::<u16>().is_err()
        {
            return Err(format!("`{port}` is not a port (1 to 65535)"));
        }
    }
    Ok(hosts)
}

/// Splits `host:port`, with `[v6]:port`; `None` when there is no port.
pub(super) fn split_port(host: &str) -> Option<(&str, &str)> {
    if let Some(end) = host.rfind(']') {
        return host[end + 1..]
            .strip_prefix(':')
            .map(|port| (&host[..=end], port));
    }
    match host.matches(':').count() {
        1 => host.split_once(':'),
        // Several colons without brackets are an IPv6 address without a port.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [
            ("64GiB", 64u64 << 30),
            ("64 GiB", 64 << 30),
            ("64g", 64 << 30),
            ("1.5GiB", 3 << 29),
            ("1GB", 1_000_000_000),
            ("4096", 4096),
            ("34_359_738_368", 32 << 30),
            ("0", 0),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "GiB", "12 parsecs", "1.2.3MiB", "0x10"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
        assert_eq!(parse_bytes("99999999TiB"), Err("it is too large".into()));
        assert_eq!(
            parse_bytes("18446744073709551616"),
            Err("it is too large".into())
        );
    }

    #[test]
    fn sizes_read_back_as_they_are_shown() {
        for bytes in [1u64 << 20, 3 << 29, 64 << 30, 5 << 40] {
            assert_eq!(parse_bytes(&format_bytes(bytes)), Ok(bytes));
        }
    }

    #[test]
    fn addresses_and_hosts() {
        assert!(parse_address("127.0.0.1:0").is_ok());
        assert!(parse_address("[::1]:7510").is_ok());
        assert!(parse_address("node-1:7510").is_ok());
        for bad in ["127.0.0.1", ":80", "::1:80", "a:b", "http://a:1"] {
            assert!(parse_address(bad).is_err(), "{bad}");
        }
        assert_eq!(
            parse_hosts("a, b:1,[::1]:2").unwrap(),
            ["a", "b:1", "[::1]:2"]
        );
        assert!(parse_hosts("a,,b").is_err());
        assert!(parse_hosts("a:99999").is_err());
        assert_eq!(split_port("fe80::1"), None);
        assert_eq!(split_port("[fe80::1]:9"), Some(("[fe80::1]", "9")));
    }

    #[test]
    fn a_secret_is_never_shown() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret} {secret:?}"), "<redacted> <redacted>");
        assert_eq!(secret.reveal(), "hunter2");
    }
}
