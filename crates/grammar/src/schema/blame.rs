use llguidance::{GrammarBuilder, JsonCompileOptions};
use serde_json::Value;

use super::{DEFINITIONS, children, reference};
use crate::error::{GrammarError, sentence};
use crate::limits::Limits;
use crate::pointer::resolve;
use crate::vocabulary::with_options;

/// Parts of a schema that are compiled alone to find the one to blame.
const TRIALS_MAX: usize = 500;

/// The parser's `error` with the smallest part of the schema that gives it by itself.
pub(crate) fn blame(
    root: &Value,
    error: &(impl AsRef<dyn std::error::Error + 'static> + std::fmt::Display),
    limits: &Limits,
) -> GrammarError {
    let cause = cause(error.as_ref());
    let (mut path, mut schema) = (String::from("$"), root);
    let mut trials = 0;
    loop {
        let mut inner = children(&path, schema);
        inner.extend(reference(schema).and_then(|reference| resolve(root, reference)));
        inner.retain(|(inner, schema)| schema.is_object() && *inner != path);
        let guilty = inner.into_iter().find(|(_, schema)| {
            trials += 1;
            trials <= TRIALS_MAX && alone(root, schema, limits).as_deref() == Some(cause.as_str())
        });
        match guilty {
            Some(found) => (path, schema) = found,
            None => break,
        }
    }
    let says = sentence(&cause);
    let says = match says.strip_prefix("Unsatisfiable schema: ") {
        Some(why) => format!("no value can meet it: {why}"),
        None => says,
    };
    GrammarError::Schema { path, says }
}

/// What is wrong with a part of a schema when nothing stands around it.
fn alone(root: &Value, schema: &Value, limits: &Limits) -> Option<String> {
    let mut alone = schema.clone();
    for keyword in DEFINITIONS {
        if let (Some(definitions), Some(keywords)) = (root.get(keyword), alone.as_object_mut()) {
            keywords.entry(keyword).or_insert_with(|| definitions.clone());
        }
    }
    let compiled = llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let builder = GrammarBuilder::new(None, limits.of_parser());
        JsonCompileOptions::default().json_to_llg_with_overrides(builder, with_options(alone)).map(|_| ())
    }));
    compiled.err().map(|error| cause(error.as_ref()))
}

fn cause(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .last()
        .map_or_else(String::new, ToString::to_string)
}
