//! Waiting for what happens elsewhere, with a deadline and the last thing seen in the error.

use std::time::{Duration, Instant};

use crate::{Error, Result};

/// The pause between two looks.
const PAUSE: Duration = Duration::from_millis(50);

/// Looks until `look` yields `Ok`; its `Err` says what it saw instead.
///
/// # Errors
/// [`Error::Deadline`] with the last thing seen when `limit` passes first.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<T, String>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        match look() {
            Ok(found) => return Ok(found),
            Err(seen) if started.elapsed() >= limit => {
                return Err(Error::Deadline {
                    what: what.to_owned(),
                    waited: started.elapsed(),
                    seen,
                });
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_thing_seen_is_in_the_error() {
        let mut looks = 0;
        let error = until("the moon", Duration::from_millis(120), || {
            looks += 1;
            Err::<(), _>(format!("cloud {looks}"))
        })
        .unwrap_err();
        assert!(looks >= 2);
        let text = error.to_string();
        assert!(text.contains("the moon"), "{text}");
        assert!(text.ends_with(&format!("cloud {looks}")), "{text}");
    }

    #[test]
    fn what_is_there_is_not_waited_for() {
        let found = until("seven", Duration::ZERO, || Ok(7)).unwrap();
        assert_eq!(found, 7);
    }
}
