//! Grammars of answers that are calls, in llguidance's dialect of Lark: rules, JSON schemas behind `%json`, and special
//! tokens by their ids.

use serde_json::{Map, Value, json};

use super::{Mark, Style, ToolFormat};
use crate::error::TextError;

/// Which tool the model must call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolForce<'a> {
    /// At least one, whichever (`tool_choice` required).
    Any,
    /// This one.
    Named(&'a str),
}

impl ToolFormat {
    /// A grammar, in llguidance's dialect of Lark, of the answers that call what `force` says, with arguments that meet
    /// the schema of `tools`; several calls only if `parallel`.
    ///
    /// # Errors
    /// [`TextError::Tools`] if there are no tools, `force` names none of them, or one is not described as it should be.
    pub fn grammar(
        &self,
        tools: &[Value],
        force: ToolForce<'_>,
        parallel: bool,
    ) -> Result<String, TextError> {
        let refuse = |problem: String| Err(TextError::Tools(problem));
        let mut calls = Vec::new();
        let mut definitions = Map::new();
        for tool in tools {
            let function = &tool["function"];
            let Some(name) = function["name"].as_str() else {
                return refuse("each tool must be a function with a name".to_owned());
            };
            if matches!(force, ToolForce::Named(named) if named != name) {
                continue;
            }
            let parameters = match &function["parameters"] {
                Value::Null => json!({"type": "object"}),
                schema @ (Value::Object(_) | Value::Bool(_)) => schema.clone(),
                _ => {
                    return refuse(format!(
                        "the parameters of tool {name:?} must be a JSON schema, an object"
                    ));
                }
            };
            calls.push(self.call_schema(name, &defined(parameters, &mut definitions)));
        }
        if calls.is_empty() {
            return refuse(match force {
                ToolForce::Any => "tool_choice asks for a call, but there are no tools".to_owned(),
                ToolForce::Named(_) => "tool_choice names a function that is none of the tools".to_owned(),
            });
        }
        let call = if calls.len() == 1 { calls.swap_remove(0) } else { json!({"anyOf": calls}) };
        Ok(self.rules(&call, &definitions, parallel))
    }

    fn rules(&self, call: &Value, definitions: &Map<String, Value>, parallel: bool) -> String {
        let open = self.open.rule();
        let schema = |mut schema: Value| {
            if let (Value::Object(schema), false) = (&mut schema, definitions.is_empty()) {
                schema.insert("$defs".to_owned(), Value::Object(definitions.clone()));
            }
            schema
        };
        match (self.style, &self.close) {
            (Style::Mistral, _) => {
                let mut list = json!({"type": "array", "items": call, "minItems": 1});
                if !parallel {
                    list["maxItems"] = json!(1);
                }
                format!("start: {open} \" \"? list\nlist: %json {}\n", schema(list))
            }
            (Style::Hermes, Some(close)) => {
                let more = if parallel { " (\"\\n\"? call)*" } else { "" };
                let close = close.rule();
                let schema = schema(call.clone());
                format!(
                    "start: call{more}\ncall: {open} \"\\n\"? object \"\\n\"? {close}\nobject: %json {schema}\n"
                )
            }
            (Style::Hermes | Style::Llama, _) => {
                let more = if parallel { " (\"; \" object)*" } else { "" };
                format!("start: object{more}\nobject: %json {}\n", schema(call.clone()))
            }
        }
    }

    fn call_schema(&self, name: &str, parameters: &Value) -> Value {
        let arguments = if self.style == Style::Llama { "parameters" } else { "arguments" };
        json!({
            "type": "object",
            "properties": {"name": {"const": name}, arguments: parameters},
            "required": ["name", arguments],
            "additionalProperties": false,
        })
    }
}

impl Mark {
    fn rule(&self) -> String {
        match self.special {
            Some(id) => format!("<[{id}]>"),
            None => Value::from(self.text).to_string(),
        }
    }
}

/// A tool's schema where it stands within a larger one. What it refers to is within itself, so one with references
/// becomes a definition, and they lead there.
fn defined(mut schema: Value, definitions: &mut Map<String, Value>) -> Value {
    let here = format!("#/$defs/tool{}", definitions.len());
    if !lead(&mut schema, &here) {
        return schema;
    }
    definitions.insert(format!("tool{}", definitions.len()), schema);
    json!({"$ref": here})
}

/// Makes every reference within `schema` one to `here`; whether there is any.
fn lead(schema: &mut Value, here: &str) -> bool {
    match schema {
        Value::Object(fields) => {
            let mut any = false;
            for (key, value) in fields {
                match value {
                    Value::String(target) if key == "$ref" && target.starts_with('#') => {
                        target.replace_range(..1, here);
                        any = true;
                    }
                    value => any |= lead(value, here),
                }
            }
            any
        }
        Value::Array(items) => items.iter_mut().fold(false, |any, item| lead(item, here) | any),
        _ => false,
    }
}
