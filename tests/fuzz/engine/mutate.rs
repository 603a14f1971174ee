//! New inputs out of old ones.

use serde_json::Value;

use super::seed::Seed;

/// Longest input that a change may make.
pub(crate) const INPUT_BYTES_MAX: usize = 192 << 10;

/// Values at which lengths and offsets go wrong.
const NUMBERS: [u64; 14] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
];

/// The same, written out.
const WRITTEN: [&str; 16] = [
    "0",
    "-1",
    "1",
    "2",
    "255",
    "65536",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e400",
    "-0.0",
    "0.1",
    "1e-7",
];

/// Changes `input` in one to eight places, not knowing what it is; `words` are worth writing, `other` worth copying from.
pub(crate) fn bytes(seed: &mut Seed, input: &[u8], other: &[u8], words: &[&str]) -> Vec<u8> {
    let mut out = input.to_vec();
    for _ in 0..1 + seed.skewed(8) {
        change(seed, &mut out, other, words);
    }
    out.truncate(INPUT_BYTES_MAX);
    out
}

fn change(seed: &mut Seed, out: &mut Vec<u8>, other: &[u8], words: &[&str]) {
    let at = seed.below(out.len() + 1);
    match seed.below(12) {
        0 | 1 => flip(seed, out),
        2 | 3 => overwrite_number(seed, out),
        4 => {
            let end = (at + 1 + seed.skewed(64)).min(out.len());
            drop(out.drain(at.min(end)..end));
        }
        5 => out.truncate(at),
        6 => {
            let chunk = piece(seed, out, 64);
            splice(out, at, &chunk);
        }
        7 => repeat(seed, out, at),
        8 => {
            let chunk = piece(seed, other, 256);
            splice(out, at, &chunk);
        }
        9 => rewrite_number(seed, out),
        _ if words.is_empty() => flip(seed, out),
        _ => splice(out, at, seed.of_list(words).as_bytes()),
    }
}

fn flip(seed: &mut Seed, out: &mut [u8]) {
    let at = seed.below(out.len());
    if let Some(byte) = out.get_mut(at) {
        *byte = if seed.one_in(2) { *byte ^ (1 << seed.below(8)) } else { seed.next() as u8 };
    }
}

/// Writes a number over one, two, four or eight bytes.
fn overwrite_number(seed: &mut Seed, out: &mut [u8]) {
    let width = 1 << seed.below(4);
    let at = seed.below(out.len());
    let number = seed.of_list(&NUMBERS).wrapping_add(if seed.one_in(3) { seed.below(9) as u64 } else { 0 });
    let bytes = number.to_le_bytes();
    out.iter_mut().skip(at).zip(&bytes[..width]).for_each(|(byte, new)| *byte = *new);
}

/// Writes another number in the place of some digits.
fn rewrite_number(seed: &mut Seed, out: &mut Vec<u8>) {
    let from = seed.below(out.len());
    let Some(start) = out.iter().skip(from).position(u8::is_ascii_digit).map(|at| at + from) else { return };
    let end = out[start..].iter().position(|byte| !byte.is_ascii_digit()).map_or(out.len(), |at| at + start);
    drop(out.splice(start..end, seed.of_list(&WRITTEN).bytes()));
}

/// Writes a piece of it many times: nesting, and whatever takes quadratic time.
fn repeat(seed: &mut Seed, out: &mut Vec<u8>, at: usize) {
    let chunk = piece(seed, out, 24);
    let times = if seed.one_in(8) { INPUT_BYTES_MAX / chunk.len().max(1) } else { 2 + seed.skewed(400) };
    let room = INPUT_BYTES_MAX.saturating_sub(out.len());
    let times = times.min(room / chunk.len().max(1));
    splice(out, at, &chunk.repeat(times));
}

fn piece(seed: &mut Seed, from: &[u8], bytes_max: usize) -> Vec<u8> {
    let start = seed.below(from.len());
    let end = (start + 1 + seed.skewed(bytes_max)).min(from.len());
    from[start.min(end)..end].to_vec()
}

fn splice(out: &mut Vec<u8>, at: usize, chunk: &[u8]) {
    drop(out.splice(at..at, chunk.iter().copied()));
}

/// Changes a JSON text in its parts, so that it mostly stays JSON; what is none, or one time in eight, in its bytes.
pub(crate) fn json(seed: &mut Seed, input: &[u8], other: &[u8], words: &[&str]) -> Vec<u8> {
    let parsed = serde_json::from_slice::<Value>(input).ok().filter(|_| !seed.one_in(8));
    let Some(mut value) = parsed else { return bytes(seed, input, other, words) };
    let other = serde_json::from_slice::<Value>(other).unwrap_or(Value::Null);
    for _ in 0..1 + seed.skewed(6) {
        let (from, count) = (nth(&other, &mut seed.below(nodes(&other))).clone(), nodes(&value));
        let place = nth_mut(&mut value, &mut seed.below(count));
        change_node(seed, place, from, words);
    }
    let mut text = value.to_string().into_bytes();
    text.truncate(INPUT_BYTES_MAX);
    text
}

fn change_node(seed: &mut Seed, place: &mut Value, from: Value, words: &[&str]) {
    let word = if words.is_empty() { "" } else { seed.of_list(words) };
    match (seed.below(10), &mut *place) {
        (0, Value::Object(map)) if !map.is_empty() => {
            let key = map.keys().nth(seed.below(map.len())).cloned().unwrap_or_default();
            map.remove(&key);
        }
        (1 | 2, Value::Object(map)) => drop(map.insert(word.to_owned(), from)),
        (0, Value::Array(items)) if !items.is_empty() => drop(items.remove(seed.below(items.len()))),
        (1, Value::Array(items)) => items.insert(seed.below(items.len() + 1), from),
        (2, Value::Array(items)) if !items.is_empty() => {
            let item = items[seed.below(items.len())].clone();
            let times = 1 + seed.skewed(200);
            items.extend(std::iter::repeat_n(item, times));
        }
        (3, Value::String(text)) => text.push_str(word),
        (4, Value::String(text)) => *text = text.repeat(1 + seed.skewed(300)),
        (5, node) => *node = wrapped(seed, node.take(), word),
        (6, node) => *node = from,
        (7, node) => *node = word.into(),
        (8, node) => {
            let number = seed.of_list(&WRITTEN);
            *node = number.parse::<serde_json::Number>().map_or_else(|_| (*number).into(), Value::Number);
        }
        (_, node) => {
            let empty = [Value::Null, true.into(), Value::Array(vec![]), "".into()];
            *node = seed.of_list(&empty).clone();
        }
    }
}

/// A value inside of others, as deep as the parser of JSON goes.
fn wrapped(seed: &mut Seed, mut value: Value, word: &str) -> Value {
    for _ in 0..1 + seed.skewed(120) {
        value = if seed.one_in(2) { Value::Array(vec![value]) } else { serde_json::json!({ word: value }) };
    }
    value
}

fn nodes(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(nodes).sum::<usize>(),
        Value::Object(map) => map.values().map(nodes).sum(),
        _ => 0,
    }
}

/// Node `number` in the order of writing; `number` counts down.
fn nth<'a>(value: &'a Value, number: &mut usize) -> &'a Value {
    fn find<'a>(value: &'a Value, number: &mut usize) -> Option<&'a Value> {
        if *number == 0 {
            return Some(value);
        }
        *number -= 1;
        match value {
            Value::Array(items) => items.iter().find_map(|item| find(item, number)),
            Value::Object(map) => map.values().find_map(|item| find(item, number)),
            _ => None,
        }
    }
    find(value, number).unwrap_or(value)
}

/// As [`nth`], to be changed; `number` must be below [`nodes`].
fn nth_mut<'a>(value: &'a mut Value, number: &mut usize) -> &'a mut Value {
    if *number == 0 {
        return value;
    }
    *number -= 1;
    let children: Vec<&mut Value> = match value {
        Value::Array(items) => items.iter_mut().collect(),
        Value::Object(map) => map.values_mut().collect(),
        _ => unreachable!("a number below the count of nodes"),
    };
    for child in children {
        let count = nodes(child);
        if *number < count {
            return nth_mut(child, number);
        }
        *number -= count;
    }
    unreachable!("a number below the count of nodes")
}
