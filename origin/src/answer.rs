//! What a store's answer means for the next attempt: pure decisions.

use std::error::Error as StdError;
use std::fmt;
use std::time::{Duration, SystemTime};

/// Why an exchange over HTTP brought nothing. The connector puts it into the errors of
/// object_store, which would keep neither the status' meaning nor the wait that a store asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// A status that stands for no content.
    Status {
        /// The status.
        status: u16,
        /// What the body says, shortened: the code and message of an S3 error, else its text.
        text: String,
        /// How long the store asks us to wait.
        retry_after: Option<Duration>,
    },
    /// The whole object, although a range was asked for.
    WholeObject,
    /// Nothing was sent: the address is plain http://, which the store's settings do not allow.
    PlainHttp,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Answer::Status { status, text, .. } if text.is_empty() => {
                write!(f, "the store answered {status}")
            }
            Answer::Status { status, text, .. } => {
                write!(f, "the store answered {status}: {text}")
            }
            Answer::WholeObject => f.write_str("the store answered a range with the whole object"),
            Answer::PlainHttp => f.write_str("plain http:// is not allowed"),
        }
    }
}

impl StdError for Answer {}

impl Answer {
    /// Whether a status is left to object_store, which tells these apart: success, not modified,
    /// unauthorized, forbidden, not found, conflict, precondition failed.
    pub(crate) fn is_passed_on(status: u16) -> bool {
        matches!(status, 200..=299 | 304 | 401 | 403 | 404 | 409 | 412)
    }

    /// An answer with a status, from its body and what its Retry-After says at `now`.
    pub(crate) fn of_status(
        status: u16,
        body: &str,
        retry_after: Option<&str>,
        now: SystemTime,
    ) -> Answer {
        Answer::Status {
            status,
            text: summary(body),
            retry_after: retry_after.and_then(|text| wait_asked_for(text, now)),
        }
    }

    /// The answer at the root of an error, if the connector put one there.
    pub(crate) fn within<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Answer> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(answer) = error.downcast_ref() {
                return Some(answer);
            }
            cause = error.source();
        }
        None
    }

    /// Whether the same request may succeed later.
    ///
    /// Of the refusals only those pass that are about time: too many requests (429), a request
    /// that came too slowly (408, and S3's 400 RequestTimeout), too early (425). Of the failures
    /// all pass but those that say the store cannot do it at all (501, 505).
    pub(crate) fn passes(&self) -> bool {
        match self {
            Answer::Status { status, text, .. } => match status {
                408 | 425 | 429 => true,
                400 => text.starts_with("RequestTimeout"),
                501 | 505 => false,
                500..=599 => true,
                _ => false,
            },
            Answer::WholeObject | Answer::PlainHttp => false,
        }
    }

    /// Whether it may be the condition that is refused rather than the request: stores that know
    /// no If-Match answer with one of these.
    pub(crate) fn may_mean_the_condition(&self) -> bool {
        matches!(self, Answer::Status { status: 400 | 405 | 501, .. } if !self.passes())
    }

    /// How long the store asks us to wait.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Answer::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// The most characters of a body that go into a message.
const TEXT_CHARS_MAX: usize = 200;

/// The code and message of an S3 error, else the text itself, on one line and shortened.
fn summary(body: &str) -> String {
    let element = |name: &str| {
        let (_, rest) = body.split_once(&format!("<{name}>"))?;
        Some(rest.split_once(&format!("</{name}>"))?.0.trim())
    };
    let text = match (element("Code"), element("Message")) {
        (Some(code), Some(message)) if message != code => format!("{code}: {message}"),
        (Some(code), _) => code.to_owned(),
        (None, _) => body.split_whitespace().collect::<Vec<_>>().join(" "),
    };
    match text.char_indices().nth(TEXT_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// What a Retry-After says: seconds, or a date, which is a wait from `now`. A date in the past is
/// no wait; what is neither says nothing.
fn wait_asked_for(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = http_date(text)?;
    Some(until.duration_since(now).unwrap_or_default())
}

/// A date as HTTP writes it today: `Wed, 21 Oct 2015 07:28:00 GMT`.
fn http_date(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let (_, date) = text.split_once(", ")?;
    let mut parts = date.strip_suffix(" GMT")?.split(' ');
    let (day, month, year, time) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let month = MONTHS.iter().position(|name| *name == month)? + 1;
    humantime::parse_rfc3339(&format!("{year}-{month:02}-{day}T{time}Z")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(status: u16, body: &str) -> Answer {
        Answer::of_status(status, body, None, SystemTime::UNIX_EPOCH)
    }

    #[test]
    fn what_passes_is_asked_again_and_what_stays_is_not() {
        for passing in [408, 425, 429, 500, 502, 503, 504, 507, 520, 599] {
            assert!(status(passing, "").passes(), "{passing}");
        }
        for staying in [
            301, 302, 307, 400, 402, 405, 406, 410, 411, 413, 414, 416, 451, 501, 505,
        ] {
            assert!(!status(staying, "").passes(), "{staying}");
        }
        let slow = "<Error><Code>RequestTimeout</Code><Message>too slow</Message></Error>";
        assert!(status(400, slow).passes());
        assert!(!status(400, "<Error><Code>InvalidRequest</Code></Error>").passes());
        assert!(!Answer::WholeObject.passes() && !Answer::PlainHttp.passes());
    }

    #[test]
    fn a_condition_may_be_what_is_refused() {
        for refusal in [400, 405, 501] {
            assert!(status(refusal, "").may_mean_the_condition(), "{refusal}");
        }
        for other in [416, 429, 500, 503] {
            assert!(!status(other, "").may_mean_the_condition(), "{other}");
        }
        let slow = "<Error><Code>RequestTimeout</Code></Error>";
        assert!(!status(400, slow).may_mean_the_condition());
    }

    #[test]
    fn an_answer_reads_as_one_line() {
        let xml = "<?xml version=\"1.0\"?>\n<Error><Code>SlowDown</Code>\n\
                   <Message>Please reduce your request rate.</Message></Error>";
        assert_eq!(
            status(503, xml).to_string(),
            "the store answered 503: SlowDown: Please reduce your request rate."
        );
        let twice = "<Error><Code>NotImplemented</Code><Message>NotImplemented</Message></Error>";
        assert_eq!(
            status(501, twice).to_string(),
            "the store answered 501: NotImplemented"
        );
        assert_eq!(status(502, "").to_string(), "the store answered 502");
        assert_eq!(
            status(500, "<h1>Oh\n no</h1>").to_string(),
            "the store answered 500: <h1>Oh no</h1>"
        );
        let long = status(500, &"ü".repeat(1000)).to_string();
        assert_eq!(long.chars().filter(|c| *c == 'ü').count(), TEXT_CHARS_MAX);
    }

    #[test]
    fn a_wait_is_asked_for_in_seconds_or_until_a_date() {
        // 2015-10-21T07:28:00Z
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_445_412_480);
        let asked = |text| Answer::of_status(503, "", Some(text), now).retry_after();
        assert_eq!(asked("7"), Some(Duration::from_secs(7)));
        assert_eq!(asked(" 0 "), Some(Duration::ZERO));
        let date = "Wed, 21 Oct 2015 07:28:30 GMT";
        assert_eq!(asked(date), Some(Duration::from_secs(30)));
        let past = "Wed, 21 Oct 2015 07:27:00 GMT";
        assert_eq!(asked(past), Some(Duration::ZERO));
        for nonsense in [
            "",
            "-3",
            "soon",
            "Wed, 21 Foo 2015 07:28:30 GMT",
            "1.5",
            ", GMT",
        ] {
            assert_eq!(asked(nonsense), None, "{nonsense}");
        }
    }
}
