//! What goes wrong, to which requests, and how often: rules that are decided without I/O.

use std::sync::Mutex;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ledger::Kind;

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// It is answered later, by so many milliseconds.
    DelayMs(u64),
    /// It is answered with this HTTP error status (500 to 599, or 400, 403, 404, 429).
    Status(u16),
    /// The connection is cut after so many bytes of the body.
    ResetAfter(u64),
    /// The answer is complete HTTP, but its body has at most so many bytes.
    ShortBody(u64),
}

/// Which requests, and how many of them, an effect concerns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultRule {
    /// Only requests of this kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<Kind>,
    /// Only keys (for LIST: prefixes) that contain this text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// So many matching requests pass unharmed first.
    #[serde(default)]
    pub skip: u64,
    /// Only each so-manyth is concerned; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<u64>,
    /// So many are concerned; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<u64>,
    /// What happens to them.
    pub effect: Effect,
}

impl FaultRule {
    /// `effect` on every request.
    pub fn always(effect: Effect) -> FaultRule {
        FaultRule {
            kind: None,
            key: None,
            skip: 0,
            every: None,
            times: None,
            effect,
        }
    }

    /// Narrows it to one kind of request.
    pub fn on(mut self, kind: Kind) -> FaultRule {
        self.kind = Some(kind);
        self
    }

    /// Narrows it to keys that contain `text`.
    pub fn key(mut self, text: &str) -> FaultRule {
        self.key = Some(text.to_owned());
        self
    }

    /// Lets so many matching requests pass first.
    pub fn after(mut self, passed: u64) -> FaultRule {
        self.skip = passed;
        self
    }

    /// Lets all but each `nth` matching request pass.
    pub fn each(mut self, nth: u64) -> FaultRule {
        self.every = Some(nth);
        self.skip = nth.saturating_sub(1);
        self
    }

    /// Ends it after so many requests.
    pub fn times(mut self, times: u64) -> FaultRule {
        self.times = Some(times);
        self
    }

    /// Whether it concerns this request, which is counted against `skip` and `times` if so.
    fn strikes(&mut self, kind: Kind, key: &str) -> bool {
        let matches = self.kind.is_none_or(|only| only == kind)
            && self.key.as_deref().is_none_or(|text| key.contains(text));
        if !matches {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.skip = self.every.map_or(0, |every| every.saturating_sub(1));
        match &mut self.times {
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                true
            }
            None => true,
        }
    }
}

/// What one request has to suffer: all delays that match together, and the first other effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fate {
    pub(crate) delay: Duration,
    pub(crate) effect: Option<Effect>,
}

/// The rules in force.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    rules: Mutex<Vec<FaultRule>>,
}

impl Faults {
    pub(crate) fn set(&self, rules: Vec<FaultRule>) {
        *self.lock() = rules;
    }

    pub(crate) fn rules(&self) -> Vec<FaultRule> {
        self.lock().clone()
    }

    /// What happens to this request.
    pub(crate) fn decide(&self, kind: Kind, key: &str) -> Fate {
        let mut fate = Fate::default();
        for rule in self.lock().iter_mut() {
            let delays = matches!(rule.effect, Effect::DelayMs(_));
            if (!delays && fate.effect.is_some()) || !rule.strikes(kind, key) {
                continue;
            }
            match rule.effect {
                Effect::DelayMs(ms) => fate.delay += Duration::from_millis(ms),
                effect => fate.effect = Some(effect),
            }
        }
        fate
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<FaultRule>> {
        self.rules
            .lock()
            .unwrap_or_else(|broken| broken.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_count_only_what_they_match() {
        let faults = Faults::default();
        faults.set(vec![
            FaultRule::always(Effect::DelayMs(5)),
            FaultRule::always(Effect::DelayMs(2)).on(Kind::Head),
            FaultRule::always(Effect::Status(503))
                .on(Kind::Get)
                .key("part-1")
                .after(1)
                .times(2),
        ]);
        let get = |key| faults.decide(Kind::Get, key).effect;
        assert_eq!(get("t/part-1"), None);
        assert_eq!(get("t/part-2"), None);
        assert_eq!(get("t/part-1"), Some(Effect::Status(503)));
        assert_eq!(get("t/part-1"), Some(Effect::Status(503)));
        assert_eq!(get("t/part-1"), None);
        assert_eq!(
            faults.decide(Kind::Head, "x").delay,
            Duration::from_millis(7)
        );
    }

    #[test]
    fn each_third_request_is_struck() {
        let faults = Faults::default();
        faults.set(vec![FaultRule::always(Effect::Status(503)).each(3)]);
        let struck: Vec<bool> = (0..7)
            .map(|_| faults.decide(Kind::Get, "x").effect.is_some())
            .collect();
        assert_eq!(struck, [false, false, true, false, false, true, false]);
    }

    #[test]
    fn the_admin_endpoint_takes_rules_as_json() {
        let text =
            r#"[{"kind":"get","times":3,"effect":{"reset_after":100}},{"effect":{"delay_ms":20}}]"#;
        let rules: Vec<FaultRule> = serde_json::from_str(text).unwrap();
        assert_eq!(
            rules[0],
            FaultRule::always(Effect::ResetAfter(100))
                .on(Kind::Get)
                .times(3)
        );
        assert_eq!(rules[1].effect, Effect::DelayMs(20));
        assert!(serde_json::from_str::<FaultRule>(r#"{"efect":1}"#).is_err());
    }
}
