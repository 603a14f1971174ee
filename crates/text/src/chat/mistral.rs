//! Mistral's own chat formats on SentencePiece vocabularies, as mistral-common 1.13 writes them. What users, tools and
//! the assistant say is encoded as text, never read for control tokens.

use galerne_checkpoint::MistralVersion;
use serde_json::{Value, json};

use super::Chat;
use super::turns::{Call, Turn, Turns, function_name_rule, is_function_name};
use crate::error::TextError;
use crate::python_json::dumps;
use crate::tokenizer::Tokenizer;

/// One of the formats, with the tokens of one vocabulary.
pub(super) struct Mistral {
    pub(super) version: MistralVersion,
    bos: u32,
    eos: u32,
    /// Absent from v1, which writes `[INST]` as text and has no tools.
    control: Option<Control>,
}

struct Control {
    inst: [u32; 2],
    available_tools: [u32; 2],
    tool_results: [u32; 2],
    tool_calls: u32,
}

impl Mistral {
    pub(super) fn new(version: MistralVersion, tokenizer: &Tokenizer) -> Result<Self, TextError> {
        let token = |text: &str| {
            tokenizer.special_token(text).ok_or_else(|| {
                let problem =
                    format!("Mistral's need the control token {text}, which the model's vocabulary has not");
                TextError::ChatFormat(problem)
            })
        };
        let control = if version == MistralVersion::V1 {
            None
        } else {
            Some(Control {
                inst: [token("[INST]")?, token("[/INST]")?],
                available_tools: [token("[AVAILABLE_TOOLS]")?, token("[/AVAILABLE_TOOLS]")?],
                tool_results: [token("[TOOL_RESULTS]")?, token("[/TOOL_RESULTS]")?],
                tool_calls: token("[TOOL_CALLS]")?,
            })
        };
        Ok(Self { version, bos: token("<s>")?, eos: token("</s>")?, control })
    }

    /// The token before calls of tools, where the format has them.
    pub(super) fn tool_calls(&self) -> Option<u32> {
        self.control.as_ref().map(|control| control.tool_calls)
    }

    pub(super) fn encode(&self, tokenizer: &Tokenizer, chat: &Chat) -> Result<Vec<u32>, TextError> {
        let with_ids = self.version == MistralVersion::V3;
        let turns = Turns::of(chat, with_ids)?;
        let tools = chat.tools.iter().map(described).collect::<Result<Vec<_>, _>>()?;
        let mut prompt = Prompt { tokenizer, ids: vec![self.bos] };
        match &self.control {
            None => self.write_v1(&turns, &mut prompt)?,
            Some(control) => self.write(control, &turns, &Value::Array(tools), &mut prompt)?,
        }
        Ok(prompt.ids)
    }

    /// The system prompt stands in the first user turn.
    fn write_v1(&self, turns: &Turns, prompt: &mut Prompt<'_>) -> Result<(), TextError> {
        for (place, turn) in turns.turns.iter().enumerate() {
            match turn {
                Turn::User(content) => {
                    let content = if place == 0 { behind(&turns.system, content) } else { content.clone() };
                    prompt.text(&format!("[INST] {content} [/INST]"))?;
                }
                Turn::Assistant { content, calls, prefix } if calls.is_empty() => {
                    prompt.text(content)?;
                    prompt.ids.extend((!prefix).then_some(self.eos));
                }
                Turn::Assistant { .. } | Turn::Tool { .. } => {
                    return Err(TextError::Conversation("this model's format, v1, has no tools".to_owned()));
                }
            }
        }
        Ok(())
    }

    /// System prompt and tools stand in and before the last user turn. v2 forgets calls and results before it.
    fn write(
        &self,
        control: &Control,
        turns: &Turns,
        tools: &Value,
        prompt: &mut Prompt<'_>,
    ) -> Result<(), TextError> {
        let forgetful = self.version == MistralVersion::V2;
        let last_user = turns.turns.iter().rposition(|turn| matches!(turn, Turn::User(_))).unwrap_or(0);
        if forgetful {
            check_single_results(&turns.turns[last_user..])?;
        }
        for (place, turn) in turns.turns.iter().enumerate() {
            match turn {
                Turn::User(content) if place == last_user => {
                    if tools.as_array().is_some_and(|tools| !tools.is_empty()) {
                        prompt.between(control.available_tools, &dumps(tools))?;
                    }
                    prompt.between(control.inst, &behind(&turns.system, content))?;
                }
                Turn::User(content) => prompt.between(control.inst, content)?,
                Turn::Assistant { calls, .. } if forgetful && place < last_user && !calls.is_empty() => {}
                Turn::Assistant { content, calls, prefix } => {
                    if calls.is_empty() {
                        prompt.text(content.trim_end_matches(' '))?;
                    } else {
                        prompt.ids.push(control.tool_calls);
                        let calls = calls.iter().map(|call| self.call(call)).collect::<Vec<_>>();
                        prompt.text(&format!("[{}]", calls.join(", ")))?;
                    }
                    prompt.ids.extend((!prefix).then_some(self.eos));
                }
                Turn::Tool { .. } if forgetful && place < last_user => {}
                Turn::Tool { name, call_id, content } => {
                    let result = if forgetful {
                        let name = dumps(&name.as_deref().map_or(Value::Null, Value::from));
                        format!("[{{\"name\": {name}, \"content\": {content}}}]")
                    } else {
                        let id = dumps(&Value::from(call_id.as_deref().unwrap_or_default()));
                        format!("{{\"content\": {content}, \"call_id\": {id}}}")
                    };
                    prompt.between(control.tool_results, &result)?;
                }
            }
        }
        Ok(())
    }

    fn call(&self, call: &Call) -> String {
        let Call { id, name, arguments } = call;
        let id = if self.version == MistralVersion::V3 {
            format!(", \"id\": {}", dumps(&Value::from(id.as_str())))
        } else {
            String::new()
        };
        format!("{{\"name\": {}, \"arguments\": {arguments}{id}}}", dumps(&Value::from(name.as_str())))
    }
}

struct Prompt<'t> {
    tokenizer: &'t Tokenizer,
    ids: Vec<u32>,
}

impl Prompt<'_> {
    fn text(&mut self, text: &str) -> Result<(), TextError> {
        self.ids.extend(self.tokenizer.encode_reference(text)?);
        Ok(())
    }

    fn between(&mut self, [begin, end]: [u32; 2], text: &str) -> Result<(), TextError> {
        self.ids.push(begin);
        self.text(text)?;
        self.ids.push(end);
        Ok(())
    }
}

fn behind(system: &str, content: &str) -> String {
    if system.is_empty() { content.to_owned() } else { format!("{system}\n\n{content}") }
}

/// v2 has room for one result of the turn's calls.
fn check_single_results(turns: &[Turn]) -> Result<(), TextError> {
    let (mut called, mut results) = (false, 0);
    for turn in turns {
        match turn {
            Turn::User(_) => (called, results) = (false, 0),
            Turn::Assistant { calls, .. } => (called, results) = (!calls.is_empty(), 0),
            Turn::Tool { .. } => results += usize::from(called),
        }
        if results > 1 {
            let problem =
                "this model's format, v2, has one tool result for each assistant turn: call tools one by one";
            return Err(TextError::Conversation(problem.to_owned()));
        }
    }
    Ok(())
}

/// A tool's description in the shape that models were trained on.
fn described(tool: &Value) -> Result<Value, TextError> {
    let refuse = |problem: String| TextError::Tools(problem);
    if tool["type"].as_str().unwrap_or("function") != "function" {
        return Err(refuse("a tool's type must be function".to_owned()));
    }
    let function = &tool["function"];
    let name = function["name"].as_str().filter(|name| is_function_name(name));
    let name = name.ok_or_else(|| refuse(function_name_rule("a tool's function name")))?;
    let description = match &function["description"] {
        Value::Null => "",
        Value::String(text) => text,
        _ => return Err(refuse("a tool's description must be text".to_owned())),
    };
    let parameters = match &function["parameters"] {
        Value::Null => json!({}),
        object @ Value::Object(_) => object.clone(),
        _ => return Err(refuse("a tool's parameters must be a JSON schema, an object".to_owned())),
    };
    let function = json!({"name": name, "description": description, "parameters": parameters});
    Ok(json!({"type": "function", "function": function}))
}
