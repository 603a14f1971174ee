//! Tools that a model may call, and whether it must.

use galerne_text::{Chat, ToolElse, ToolForce, ToolFormat};
use galerne_types::Grammar;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::ask::Options;
use crate::http::error::ApiError;
use crate::http::fields::Fields;
use crate::http::shape::Calls;
use crate::limits::RequestLimits;
use crate::model::Model;

/// Characters of a tool's name.
const TOOL_NAME_CHARS_MAX: usize = 128;

/// The tools of a request.
#[derive(Debug)]
pub(in crate::http) struct Tools {
    /// Checked, as OpenAI describes them.
    pub(in crate::http) list: Vec<Value>,
    pub(in crate::http) choice: ToolChoice,
    /// Several calls in one answer are welcome.
    pub(in crate::http) parallel: bool,
}

/// Whether a tool is called.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::http) enum ToolChoice {
    /// None is.
    Never,
    /// As the model likes.
    Auto,
    /// At least one is.
    Required,
    /// This one is.
    Named(String),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum WireChoice {
    Word(String),
    Named { function: Named },
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

/// A tool as a client describes it.
#[derive(Deserialize)]
pub(in crate::http) struct Tool {
    pub(in crate::http) r#type: String,
    pub(in crate::http) function: Option<Function>,
}

/// A function that a model may call.
#[derive(Deserialize)]
pub(in crate::http) struct Function {
    name: String,
    description: Option<String>,
    parameters: Option<Value>,
    strict: Option<bool>,
}

impl Tools {
    /// Takes tools, the choice among them and whether several may be called; `None` without tools.
    pub(in crate::http) fn take(
        fields: &mut Fields<'_>,
        limits: &RequestLimits,
    ) -> Result<Option<Self>, ApiError> {
        let expected =
            "a list of objects, each with the type \"function\" and a function with a name and parameters";
        let given: Vec<Tool> = fields.take_list("tools", expected, limits.tools_max)?;
        let parallel = fields.take_bool_or("parallel_tool_calls", true)?;
        let expected = "none, auto, required, or {\"type\": \"function\", \"function\": {\"name\": …}}";
        let wire = fields.take("tool_choice", expected)?;
        let choice = ToolChoice::of(wire, !given.is_empty()).ok_or_else(|| {
            ApiError::invalid(Some("tool_choice"), format!("tool_choice must be {expected}"))
        })?;
        Self::among(given, choice, parallel)
    }

    /// Checks tools and the choice among them; `None` without tools.
    pub(in crate::http) fn among(
        given: Vec<Tool>,
        choice: ToolChoice,
        parallel: bool,
    ) -> Result<Option<Self>, ApiError> {
        let list: Vec<_> =
            given.into_iter().enumerate().map(|(at, tool)| tool.check(at)).collect::<Result<_, _>>()?;
        match &choice {
            ToolChoice::Required if list.is_empty() => {
                Err(ApiError::invalid(Some("tool_choice"), "tool_choice is required, but there are no tools"))
            }
            ToolChoice::Named(name) if !list.iter().any(|tool| tool["function"]["name"] == **name) => {
                Err(ApiError::invalid(
                    Some("tool_choice"),
                    "tool_choice names a function that is not among tools",
                ))
            }
            _ if list.is_empty() => Ok(None),
            _ => Ok(Some(Self { list, choice, parallel })),
        }
    }

    /// Puts the tools into a conversation and its options, and tells how calls will stand in the answer.
    pub(in crate::http) fn apply(
        self,
        model: &Model,
        chat: &mut Chat,
        options: &mut Options,
    ) -> Result<Calls, ApiError> {
        let Self { list, choice, parallel } = self;
        if choice == ToolChoice::Never {
            return Ok(Calls::Never); // a model that does not hear of them calls none
        }
        let format = model.chat.as_ref().and_then(galerne_text::ChatFormat::tool_format);
        let force = match &choice {
            ToolChoice::Required => Some(ToolForce::Any),
            ToolChoice::Named(name) => Some(ToolForce::Named(name)),
            ToolChoice::Never | ToolChoice::Auto => None,
        };
        let (calls, grammar) = match (format, force) {
            (Some(format), None) => {
                let rules = or_else(&format, &list, options, parallel)?;
                (Calls::Taught { format, parallel }, rules.map(Grammar::Lark))
            }
            (Some(format), Some(force)) => {
                let parallel = parallel && force == ToolForce::Any; // a function that is named is called once
                let rules = format.grammar(&list, force, parallel);
                let rules = rules.map_err(|error| ApiError::invalid(Some("tools"), error.to_string()))?;
                (Calls::Taught { format, parallel }, Some(Grammar::Lark(rules)))
            }
            (None, Some(force)) => untaught(&list, force, parallel),
            (None, None) => {
                let message = "this model was not taught to call tools: leave tools out, or set tool_choice to none, \
                               to required or to a function, which is then called whatever the model knows of it";
                return Err(ApiError::unsupported("tools".to_owned(), message.to_owned()));
            }
        };
        if let Calls::Taught { format, .. } = &calls {
            options.spelled_out = format.markers().to_vec();
        }
        if grammar.is_some() {
            // What the answer was to be else is a part of it, unless a call is forced: then there is nothing else.
            let shaped = choice == ToolChoice::Auto && options.grammar.is_some();
            options.grammar_field = if shaped { options.grammar_field } else { "tools" };
            options.grammar = grammar;
        }
        chat.tools = list;
        Ok(calls)
    }
}

impl ToolChoice {
    fn of(wire: Option<WireChoice>, tools: bool) -> Option<Self> {
        match wire {
            None if tools => Some(Self::Auto),
            None => Some(Self::Never),
            Some(WireChoice::Named { function }) => Some(Self::Named(function.name)),
            Some(WireChoice::Word(word)) => Self::of_word(&word),
        }
    }

    /// What a word says of all tools.
    pub(in crate::http) fn of_word(word: &str) -> Option<Self> {
        match word {
            "none" => Some(Self::Never),
            "auto" => Some(Self::Auto),
            "required" | "any" => Some(Self::Required), // the latter is Mistral's word
            _ => None,
        }
    }
}

impl Tool {
    fn check(self, at: usize) -> Result<Value, ApiError> {
        let invalid = |what: &str| ApiError::invalid(Some("tools"), format!("tools[{at}]{what}"));
        let Function { name, description, parameters, strict } = match self.function {
            Some(function) if self.r#type == "function" => function,
            _ => {
                return Err(invalid(
                    " must have the type \"function\" and a function: others are not supported",
                ));
            }
        };
        let letters = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || name.len() > TOOL_NAME_CHARS_MAX || !name.chars().all(letters) {
            let what =
                format!(".function.name must have 1 to {TOOL_NAME_CHARS_MAX} letters, digits, _, - and .");
            return Err(invalid(&what));
        }
        let parameters = parameters.unwrap_or_else(|| json!({ "type": "object", "properties": {} }));
        if !parameters.is_object() {
            return Err(invalid(".function.parameters must be a JSON schema, which is an object"));
        }
        let mut function = json!({ "name": name });
        if let Some(description) = description {
            function["description"] = description.into();
        }
        function["parameters"] = parameters;
        if let Some(strict) = strict {
            function["strict"] = strict.into();
        }
        Ok(json!({ "type": "function", "function": function }))
    }
}

/// The rules of an answer that may call, if there are any: an answer that does not call is what the request says that
/// it must be, and calls of strict tools have arguments that meet their schemas.
fn or_else(
    format: &ToolFormat,
    tools: &[Value],
    options: &Options,
    parallel: bool,
) -> Result<Option<String>, ApiError> {
    let schema;
    let otherwise = match &options.grammar {
        None if tools.iter().any(|tool| tool["function"]["strict"] == true) => ToolElse::Words,
        None => return Ok(None),
        Some(Grammar::JsonObject) => {
            schema = json!({ "type": "object" });
            ToolElse::Json(&schema)
        }
        Some(Grammar::JsonSchema(text)) => {
            schema = serde_json::from_str(text)
                .map_err(|error| ApiError::invalid(Some(options.grammar_field), error.to_string()))?;
            ToolElse::Json(&schema)
        }
        Some(Grammar::Choice(texts)) => ToolElse::OneOf(texts),
        Some(Grammar::Regex(_) | Grammar::Lark(_)) => {
            let message = format!(
                "tools and a regular expression or a grammar in {} cannot both shape an answer: leave one out, say \
                 with a schema or a choice what the answer must be, or set tool_choice to none",
                options.grammar_field
            );
            return Err(ApiError::invalid(Some("tools"), message));
        }
    };
    let rules = format.grammar_or_else(tools, otherwise, parallel);
    rules.map(Some).map_err(|error| ApiError::invalid(Some("tools"), error.to_string()))
}

/// How a model that knows no tools is made to call one: its answer is the arguments, or a list of calls.
fn untaught(tools: &[Value], force: ToolForce<'_>, parallel: bool) -> (Calls, Option<Grammar>) {
    let named = match force {
        ToolForce::Named(name) => tools.iter().find(|tool| tool["function"]["name"] == *name),
        ToolForce::Any => None,
    };
    let only = match tools {
        [tool] if !parallel => Some(tool),
        _ => named,
    };
    if let Some(tool) = only {
        let function = &tool["function"];
        let schema = Grammar::JsonSchema(function["parameters"].to_string());
        return (Calls::Arguments(function["name"].as_str().unwrap_or_default().to_owned()), Some(schema));
    }
    let mut rules = if parallel {
        format!("start: \"[\" call (\", \" call){{0,{}}} \"]\"\n", CALLS_MAX - 1)
    } else {
        "start: \"[\" call \"]\"\n".to_owned()
    };
    let names: Vec<_> = (0..tools.len()).map(|at| format!("call_{at}")).collect();
    rules.push_str(&format!("call: {}\n", names.join(" | ")));
    for (name, tool) in names.iter().zip(tools) {
        let function = &tool["function"];
        // A name has nothing that a string would have to escape.
        let begin = format!(
            "{{\\\"name\\\": \\\"{}\\\", \\\"arguments\\\": ",
            function["name"].as_str().unwrap_or_default()
        );
        rules.push_str(&format!("{name}: \"{begin}\" {name}_arguments \"}}\"\n"));
        rules.push_str(&format!("{name}_arguments: %json {}\n", function["parameters"]));
    }
    (Calls::List, Some(Grammar::Lark(rules)))
}

/// Calls in one answer of a model that was not taught when to end.
const CALLS_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn take(body: &Value) -> Result<Option<Tools>, ApiError> {
        let body = body.to_string();
        Tools::take(&mut Fields::parse(body.as_bytes()).unwrap(), &RequestLimits::DEFAULT)
    }

    fn tool(name: &str) -> Value {
        json!({ "type": "function", "function": { "name": name, "parameters": { "type": "object" } } })
    }

    #[test]
    fn choices_are_read() {
        let tools = json!([tool("a"), tool("b")]);
        for (choice, expected) in [
            (Value::Null, ToolChoice::Auto),
            (json!("none"), ToolChoice::Never),
            (json!("required"), ToolChoice::Required),
            (json!({ "type": "function", "function": { "name": "b" } }), ToolChoice::Named("b".to_owned())),
        ] {
            let taken = take(&json!({ "tools": tools, "tool_choice": choice })).unwrap().unwrap();
            assert_eq!((taken.choice, taken.list.len(), taken.parallel), (expected, 2, true));
        }
        assert!(take(&json!({ "tool_choice": "auto" })).unwrap().is_none());
        for (body, field) in [
            (json!({ "tool_choice": "required" }), "tool_choice"),
            (json!({ "tools": tools, "tool_choice": "perhaps" }), "tool_choice"),
            (json!({ "tools": tools, "tool_choice": { "function": { "name": "c" } } }), "tool_choice"),
            (json!({ "tools": [{ "type": "web_search" }] }), "tools"),
            (json!({ "tools": [tool("no spaces")] }), "tools"),
            (json!({ "tools": vec![tool("a"); 129] }), "tools"),
        ] {
            assert_eq!(take(&body).unwrap_err().param.as_deref(), Some(field), "{body}");
        }
    }

    /// How calls stand in the answers of Mistral's v3 models.
    fn mistral() -> ToolFormat {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../text/tests/golden/v3.model");
        let version = Some(galerne_checkpoint::MistralVersion::V3);
        let assets = galerne_checkpoint::TextAssets {
            tokenizer: galerne_checkpoint::TokenizerAsset::None,
            sentencepiece: Some(galerne_checkpoint::SentencePieceFile { path, version, mistral: true }),
            chat_template: None,
            bos_token: None,
            eos_token: None,
            add_bos: false,
        };
        let tokenizer = galerne_text::Tokenizer::load(&assets).unwrap();
        galerne_text::ChatFormat::load(&assets, &tokenizer, None).unwrap().unwrap().tool_format().unwrap()
    }

    #[test]
    fn an_answer_calls_or_is_what_the_request_says() {
        let format = mistral();
        let mut options = Options::new(galerne_types::Sampling::greedy(), crate::ask::MaxTokens::UpTo(9));
        let mut strict = tool("a");
        strict["function"]["strict"] = true.into();
        assert_eq!(or_else(&format, &[tool("a")], &options, true).unwrap(), None, "nothing is to be held");
        let rules = or_else(&format, &[tool("b"), strict.clone()], &options, true).unwrap().unwrap();
        assert!(rules.starts_with("start: WORDS? calls?\n"), "{rules}");
        for (grammar, begin) in [
            (Grammar::JsonObject, "start: words | calls\nwords: %json {\"type\":\"object\"}\n"),
            (
                Grammar::JsonSchema("{\"enum\":[1]}".to_owned()),
                "start: words | calls\nwords: %json {\"enum\":[1]}\n",
            ),
            (Grammar::Choice(vec!["x".to_owned()]), "start: WORDS | calls\nWORDS: \"x\"\n"),
        ] {
            options.grammar = Some(grammar);
            let rules = or_else(&format, &[tool("b")], &options, false).unwrap().unwrap();
            assert!(rules.starts_with(begin), "{rules}");
        }
        (options.grammar, options.grammar_field) = (Some(Grammar::Regex("a".to_owned())), "guided_regex");
        let error = or_else(&format, &[strict], &options, true).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tools"));
        assert!(error.message().contains("guided_regex"), "{}", error.message());
    }

    #[test]
    fn a_model_without_a_format_is_forced() {
        let tools = [tool("a"), tool("b")];
        let (calls, grammar) = untaught(&tools, ToolForce::Named("b"), true);
        assert!(matches!(calls, Calls::Arguments(name) if name == "b"));
        assert_eq!(grammar, Some(Grammar::JsonSchema("{\"type\":\"object\"}".to_owned())));
        let (calls, grammar) = untaught(&tools, ToolForce::Any, false);
        let Some(Grammar::Lark(rules)) = grammar else { panic!("rules") };
        assert!(matches!(calls, Calls::List));
        assert!(
            rules.contains(r#"call_1: "{\"name\": \"b\", \"arguments\": " call_1_arguments "}""#),
            "{rules}"
        );
    }
}
