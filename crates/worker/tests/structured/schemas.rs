use serde_json::{Map, Value, json};

/// How deep a random schema nests.
const DEPTH_MAX: u32 = 3;

struct Random(u64);

impl Random {
    /// A number below `end` (SplitMix64).
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    fn one_of<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize].clone()
    }
}

/// A schema that a short text can meet, the same for the same seed.
pub(crate) fn random(seed: u64) -> Value {
    let mut random = Random(seed);
    let mut schema = match seed % 4 {
        3 => value(&mut random, DEPTH_MAX),
        _ => object(&mut random, DEPTH_MAX),
    };
    let tree = json!({
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 4}, "child": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}},
        "required": ["name"],
        "additionalProperties": false,
    });
    schema["$defs"] = json!({"tree": tree, "word": {"type": "string", "pattern": "^[A-Za-z]{1,8}$"}});
    schema
}

fn value(random: &mut Random, depth: u32) -> Value {
    match random.below(if depth == 0 { 12 } else { 17 }) {
        0 => json!({"type": "boolean"}),
        1 => json!({"type": ["null", "boolean"]}),
        2 => {
            let least = random.below(2000) as i64 - 1000;
            json!({"type": "integer", "minimum": least, "maximum": least + random.below(1000) as i64})
        }
        3 => json!({"type": "number", "exclusiveMinimum": 0, "maximum": random.one_of(&[1, 10, 250])}),
        4 => {
            json!({"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": random.one_of(&[2, 3, 5, 7])})
        }
        5 => json!({"type": "string", "minLength": random.below(3), "maxLength": 3 + random.below(12)}),
        6 => json!({"enum": ["red", "green", "the \"blue\" one", 7, null, [1, 2], {"é": true}]}),
        7 => json!({"const": random.one_of(&[json!("yes\nno"), json!(-3), json!({"a": [{}]})])}),
        8 => {
            json!({"type": "string", "pattern": random.one_of(&["^[a-c]{2,5}$", "^(ab|cd)+e?$", "^\\d{3}-[xyz]$"]), "maxLength": 12})
        }
        9 => {
            json!({"type": "string", "format": random.one_of(&["date", "uuid", "ipv4", "time", "date-time"])})
        }
        10 => json!({"$ref": "#/$defs/word"}),
        11 => json!({"$ref": "#/$defs/tree"}),
        12 => {
            let least = random.below(3);
            json!({"type": "array", "items": value(random, depth - 1), "minItems": least, "maxItems": least + random.below(3)})
        }
        13 => {
            json!({"type": "array", "prefixItems": [value(random, depth - 1), value(random, 0)], "items": false, "minItems": 1})
        }
        14 => json!({"anyOf": [value(random, depth - 1), value(random, depth - 1)]}),
        _ => object(random, depth),
    }
}

fn object(random: &mut Random, depth: u32) -> Value {
    let names = ["name", "age", "first name", "é", "quote\"d", "list", "x", "y2"];
    let (mut properties, mut required) = (Map::new(), Vec::new());
    for _ in 0..1 + random.below(4) {
        let name = random.one_of(&names);
        properties.insert(name.to_owned(), value(random, depth - 1));
        if random.below(3) > 0 && !required.contains(&name) {
            required.push(name);
        }
    }
    let mut schema = json!({"type": "object", "properties": properties, "required": required});
    match random.below(10) {
        0 => schema["additionalProperties"] = json!({"type": "boolean"}),
        _ => schema["additionalProperties"] = json!(false),
    }
    schema
}
