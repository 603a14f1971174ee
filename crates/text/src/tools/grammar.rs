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

/// What an answer is that calls no tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolElse<'a> {
    /// Words, which may also stand before a call.
    Words,
    /// JSON of this schema, and nothing before a call.
    Json(&'a Value),
    /// One of these texts, and nothing before a call.
    OneOf(&'a [String]),
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
        let mut calls = Calls::default();
        for tool in tools {
            let (name, parameters) = described(tool)?;
            if !matches!(force, ToolForce::Named(named) if named != name) {
                calls.add(self, name, parameters);
            }
        }
        let refuse = |problem: &str| Err(TextError::Tools(problem.to_owned()));
        match (calls.any.is_empty(), force) {
            (false, _) => Ok(format!("start: calls\n{}", self.rules(calls, parallel, true))),
            (true, ToolForce::Any) => refuse("tool_choice asks for a call, but there are no tools"),
            (true, ToolForce::Named(_)) => refuse("tool_choice names a function that is none of the tools"),
        }
    }

    /// As [`grammar`](Self::grammar), but of the answers that may call and may not. The arguments of tools that are
    /// not `strict` are any JSON object.
    ///
    /// # Errors
    /// [`TextError::Tools`] if one of the tools is not described as it should be.
    pub fn grammar_or_else(
        &self,
        tools: &[Value],
        otherwise: ToolElse<'_>,
        parallel: bool,
    ) -> Result<String, TextError> {
        let mut calls = Calls::default();
        for tool in tools {
            let (name, parameters) = described(tool)?;
            let strict = tool["function"]["strict"] == true;
            calls.add(self, name, if strict { parameters } else { json!({"type": "object"}) });
        }
        let free = matches!(otherwise, ToolElse::Words);
        let words = match otherwise {
            ToolElse::Words => self.words(),
            ToolElse::Json(schema) => format!("start: words | calls\nwords: %json {schema}\n"),
            ToolElse::OneOf(texts) => {
                let texts: Vec<_> = texts.iter().map(|text| quote(text)).collect();
                format!("start: WORDS | calls\nWORDS: {}\n", texts.join(" | "))
            }
        };
        Ok(words + &self.rules(calls, parallel, !free))
    }

    /// The beginning of rules under which an answer is words, or words and `calls` behind them; `lead` is a mark that
    /// is text, and the words before it.
    fn words(&self) -> String {
        let mark = self.open.regex();
        match (self.style, self.open.special) {
            // No text has it, so it ends the words.
            (Style::Mistral | Style::Hermes, Some(_)) => format!("start: WORDS? calls?\nWORDS: {ALL}\n"),
            (Style::Mistral | Style::Hermes, None) => format!(
                "start: WORDS? | calls\nWORDS: {ALL} & ~/(?s:.*){mark}(?s:.*)/\n\
                 LEAD: /(?s:.*){mark}/ & ~/(?s:.*){mark}(?s:.+)/\n"
            ),
            (Style::Llama, special) => {
                let not_mark =
                    special.map_or_else(|| format!(" & ~/[ \\t\\r\\n]*{mark}(?s:.*)/"), |_| String::new());
                format!("start: WORDS? | calls\nWORDS: {ALL} & ~/[ \\t\\r\\n]*\\{{(?s:.*)/{not_mark}\n")
            }
        }
    }

    /// Rules for `calls`, which begin an answer or follow its words.
    fn rules(&self, calls: Calls, parallel: bool, begin: bool) -> String {
        let Calls { mut any, definitions } = calls;
        let call = if any.len() == 1 { any.swap_remove(0) } else { json!({"anyOf": any}) };
        let schema = |mut schema: Value| {
            if let (Value::Object(schema), false) = (&mut schema, definitions.is_empty()) {
                schema.insert("$defs".to_owned(), Value::Object(definitions.clone()));
            }
            schema
        };
        let lead = if begin || self.open.special.is_some() { self.open.rule() } else { "LEAD".to_owned() };
        match (self.style, &self.close) {
            (Style::Mistral, _) => {
                let mut list = json!({"type": "array", "items": call, "minItems": 1});
                if !parallel {
                    list["maxItems"] = json!(1);
                }
                format!("calls: {lead} \" \"? list\nlist: %json {}\n", schema(list))
            }
            (Style::Hermes, Some(close)) => {
                let (open, close, schema) = (self.open.rule(), close.rule(), schema(call));
                let more = if parallel { format!(" (\"\\n\"? {open} call)*") } else { String::new() };
                format!(
                    "calls: {lead} call{more}\ncall: \"\\n\"? object \"\\n\"? {close}\nobject: %json {schema}\n"
                )
            }
            (Style::Hermes | Style::Llama, _) => {
                let open = if begin { String::new() } else { format!("{}? ", self.open.rule()) };
                let more = if parallel { " (\"; \" object)*" } else { "" };
                format!("calls: {open}object{more}\nobject: %json {}\n", schema(call))
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

/// Any words, at least one character.
const ALL: &str = "/(?s:.+)/";

/// The calls that an answer may have, each as a schema, and what these refer to.
#[derive(Default)]
struct Calls {
    any: Vec<Value>,
    definitions: Map<String, Value>,
}

impl Calls {
    fn add(&mut self, format: &ToolFormat, name: &str, parameters: Value) {
        let parameters = defined(parameters, &mut self.definitions);
        self.any.push(format.call_schema(name, &parameters));
    }
}

/// A tool's name and the schema of its arguments.
fn described(tool: &Value) -> Result<(&str, Value), TextError> {
    let function = &tool["function"];
    let Some(name) = function["name"].as_str() else {
        return Err(TextError::Tools("each tool must be a function with a name".to_owned()));
    };
    match &function["parameters"] {
        Value::Null => Ok((name, json!({"type": "object"}))),
        schema @ (Value::Object(_) | Value::Bool(_)) => Ok((name, schema.clone())),
        _ => {
            let problem = format!("the parameters of tool {name:?} must be a JSON schema, an object");
            Err(TextError::Tools(problem))
        }
    }
}

/// A text as Lark quotes it.
fn quote(text: &str) -> String {
    Value::from(text).to_string()
}

impl Mark {
    /// The mark's text as a regular expression.
    fn regex(&self) -> String {
        self.text.bytes().map(|byte| format!("\\x{{{byte:x}}}")).collect()
    }

    fn rule(&self) -> String {
        match self.special {
            Some(id) => format!("<[{id}]>"),
            None => quote(self.text),
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
