//! The fields of a JSON body, taken one by one; what is left over at the end is judged by name.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;

use super::error::ApiError;
use crate::limits::{ECHO_CHARS_MAX, JSON_LEVELS_MAX};

/// Letters by which a name may differ from one that is known and still be meant as that; of a short name fewer.
const TYPOS_MAX: usize = 2;
const TYPOS_OF_SHORT_MAX: usize = 1;
const SHORT_CHARS_MAX: usize = 5;

/// What an API knows beyond the fields that it takes.
pub(super) struct Known {
    /// Fields that say something about the client or its books, and nothing about the answer. Sorted.
    pub(super) harmless: &'static [&'static str],
    /// Fields that would change the answer in a way that is not served, with the values at which they do not. Sorted.
    pub(super) neutral: &'static [(&'static str, &'static [&'static str])],
    /// What to do instead, for some of them.
    pub(super) advice: &'static [(&'static str, &'static str)],
}

/// A body's fields.
pub(super) struct Fields<'a> {
    /// What has not been taken yet.
    left: BTreeMap<String, &'a RawValue>,
    /// The names that were asked for, whether they were there or not.
    asked: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// Reads a body, which must be a JSON object. The values are only looked at when they are taken.
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        let read = serde_json::from_slice(body).map(|left| Self { left, asked: Vec::new() });
        read.map_err(|error| {
            let what = match error.classify() {
                serde_json::error::Category::Data => "the body must be a JSON object".to_owned(),
                _ if deep(body) => too_deep("the body"),
                _ => format!("the body is not valid JSON: {error}"),
            };
            ApiError::invalid(None, what)
        })
    }

    /// Takes a field; `None` if it is absent or null. `expected` completes the sentence "NAME must be …".
    pub(super) fn take<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
        expected: &str,
    ) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.remove(name) else { return Ok(None) };
        serde_json::from_str(raw.get()).map(Some).map_err(|_| match deep(raw.get().as_bytes()) {
            true => ApiError::invalid(Some(name), too_deep(name)),
            false => ApiError::invalid(Some(name), format!("{name} must be {expected}")),
        })
    }

    /// Takes a list of no more than `max`, which are counted before any of them is looked into; absent is empty.
    pub(super) fn take_list<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
        expected: &str,
        max: usize,
    ) -> Result<Vec<T>, ApiError> {
        let wrong = || ApiError::invalid(Some(name), format!("{name} must be {expected}"));
        let Some(raw) = self.remove(name) else { return Ok(Vec::new()) };
        let items: Vec<&RawValue> = serde_json::from_str(raw.get()).map_err(|_| wrong())?;
        if items.len() > max {
            let message = format!("{name} must be at most {max}, not {}", items.len());
            return Err(ApiError::invalid(Some(name), message));
        }
        let read = |item: &RawValue| match serde_json::from_str(item.get()) {
            Err(_) if deep(item.get().as_bytes()) => Err(ApiError::invalid(Some(name), too_deep(name))),
            read => read.map_err(|_| wrong()),
        };
        items.into_iter().map(read).collect()
    }

    fn remove(&mut self, name: &'static str) -> Option<&'a RawValue> {
        self.asked.push(name);
        self.left.remove(name).filter(|raw| raw.get() != "null")
    }

    /// Whether a field that was not taken is a list.
    pub(super) fn is_list(&self, name: &str) -> bool {
        self.left.get(name).is_some_and(|raw| raw.get().starts_with('['))
    }

    /// Whether a field that was not taken is there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.left.get(name).is_some_and(|raw| raw.get() != "null")
    }

    /// Takes an integer that is not negative.
    pub(super) fn take_u32(&mut self, name: &'static str) -> Result<Option<u32>, ApiError> {
        self.take(name, "an integer of at least 0 and below 2^32")
    }

    /// Takes a number; absent is `default`.
    pub(super) fn take_f32(&mut self, name: &'static str, default: f32) -> Result<f32, ApiError> {
        // Read wide: one that is too large for f32 is infinite then, and refused as that.
        Ok(self.take::<f64>(name, "a number")?.map_or(default, |number| number as f32))
    }

    /// Takes a truth value; absent is `default`.
    pub(super) fn take_bool_or(&mut self, name: &'static str, default: bool) -> Result<bool, ApiError> {
        Ok(self.take(name, "true or false")?.unwrap_or(default))
    }

    /// Takes a truth value; absent is false.
    pub(super) fn take_bool(&mut self, name: &'static str) -> Result<bool, ApiError> {
        self.take_bool_or(name, false)
    }

    /// Refuses what is left over, unless it changes nothing: what is known by name at a value that does not matter, and
    /// what nobody here has heard of, if it is not a slip in writing the name of something that would matter.
    pub(super) fn finish(self, known: &Known) -> Result<(), ApiError> {
        for (name, raw) in &self.left {
            if raw.get() == "null" || known.harmless.contains(&name.as_str()) {
                continue;
            }
            let shown: String = name.chars().take(ECHO_CHARS_MAX).collect();
            let Some((_, neutral)) = known.neutral.iter().find(|(known, _)| known == name) else {
                let Some(meant) = self.meant(name, known) else { continue };
                let message = format!("{shown:?} is not a field of this request: {meant} is; leave it out");
                return Err(ApiError::unknown_field(shown, message));
            };
            if neutral.iter().any(|neutral| same(raw.get(), neutral)) {
                continue;
            }
            let message = match known.advice.iter().find(|(of, _)| of == name) {
                Some((_, advice)) => format!("{shown} is not supported: {advice}"),
                None => {
                    let or = neutral.first().map_or(String::new(), |value| format!(" or set it to {value}"));
                    format!("{shown} is not supported with this value: leave it out{or}")
                }
            };
            return Err(ApiError::unsupported(shown, message));
        }
        Ok(())
    }

    /// The field that changes an answer and is written almost like `name`.
    fn meant(&self, name: &str, known: &Known) -> Option<&'static str> {
        let matter = self.asked.iter().copied().chain(known.neutral.iter().map(|(known, _)| *known));
        let letters = |name: &str| -> String {
            let letters = name.chars().filter(|letter| letter.is_alphanumeric());
            letters.take(ECHO_CHARS_MAX).flat_map(char::to_lowercase).collect()
        };
        let name = letters(name);
        let short = name.chars().count() <= SHORT_CHARS_MAX;
        let typos_max = if short { TYPOS_OF_SHORT_MAX } else { TYPOS_MAX };
        matter.into_iter().find(|known| {
            known.len() > TYPOS_MAX && strsim::osa_distance(&name, &letters(known)) <= typos_max
        })
    }
}

fn too_deep(what: &str) -> String {
    format!("{what} must have at most {JSON_LEVELS_MAX} levels of arrays and objects in each other")
}

/// Whether a JSON text has more levels than its parser takes, as far as it goes.
fn deep(text: &[u8]) -> bool {
    let (mut levels, mut quoted, mut escaped) = (0_usize, false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            b'[' | b'{' if !quoted => levels += 1,
            b']' | b'}' if !quoted => levels = levels.saturating_sub(1),
            _ => {}
        }
        if levels > JSON_LEVELS_MAX {
            return true;
        }
    }
    false
}

/// Whether two JSON texts mean the same; numbers by their value, so that 1.0 is 1.
fn same(a: &str, b: &str) -> bool {
    let parse = |text| serde_json::from_str::<Value>(text).ok();
    match (parse(a), parse(b)) {
        (Some(Value::Number(a)), Some(Value::Number(b))) => a.as_f64() == b.as_f64(),
        (a, b) => a.is_some() && a == b,
    }
}
