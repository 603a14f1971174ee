//! Chat templates, rendered as Hugging Face's `apply_chat_template` does.

mod conversation;
mod program;
mod python;
mod source;
mod watch;

use std::borrow::Cow;
use std::fmt;
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use galerne_checkpoint::TextAssets;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use regex::Regex;
use serde_json::Map;

use crate::chat::Chat;
use crate::error::TextError;
use program::{Program, add_operators};

/// Work that a template may do on one conversation, in the template engine's units: an instruction costs one,
/// 64 bytes of text one. Bounds time to a fraction of a second and text to 64 MB; an honest template spends some tens
/// of units and its text on a message.
const FUEL_MAX: u64 = 1_000_000;

/// The Jinja template that turns a conversation into the prompt that the model was trained on.
///
/// A template comes with the model, so it is trusted as little as the model's file: it reaches no file and no
/// variable but those given to it, and its work is limited.
pub struct ChatTemplate {
    environment: Environment<'static>,
    program: Program,
    bos_token: Option<String>,
    eos_token: Option<String>,
    /// It tells a developer's messages from the system's.
    knows_developer: bool,
    /// It looks at the parts of a message one by one.
    takes_parts: bool,
}

/// The message of a template's `raise_exception`, carried through the engine as an error's source.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

impl ChatTemplate {
    /// Compiles the checkpoint's template; `None` if it has none.
    ///
    /// # Errors
    /// [`TextError::Template`] if it is not valid Jinja.
    pub fn load(assets: &TextAssets) -> Result<Option<Self>, TextError> {
        let Some(source) = &assets.chat_template else { return Ok(None) };
        let environment = environment();
        let syntax = syntax().map_err(|e| invalid(&e))?;
        let source = without_training_marks(source);
        let knows_developer = source.contains(conversation::DEVELOPER);
        let takes_parts = conversation::takes_parts(&source);
        let program = Program::compile(source.into_owned(), &syntax).map_err(|e| invalid(&e))?;
        let (bos_token, eos_token) = (assets.bos_token.clone(), assets.eos_token.clone());
        Ok(Some(Self { environment, program, bos_token, eos_token, knows_developer, takes_parts }))
    }

    /// The prompt of a whole conversation.
    ///
    /// A developer's messages are the system's for a template that never speaks of a developer, a message in parts is
    /// one text for a template that never looks at parts, and the arguments of calls are objects for all of them.
    ///
    /// # Errors
    /// As [`render`](Self::render); [`TextError::Conversation`] for a variable that is not the client's to set, for
    /// arguments that are no object, and for a final message that cannot be continued.
    pub(crate) fn render_chat(&self, chat: &Chat) -> Result<String, TextError> {
        let tools = (!chat.tools.is_empty()).then_some(chat.tools.as_slice());
        conversation::check_variables(&chat.extra)?;
        let mut messages = Cow::Borrowed(chat.messages.as_slice());
        if !self.knows_developer {
            conversation::name_developers_system(&mut messages);
        }
        if !self.takes_parts {
            conversation::join_parts(&mut messages);
        }
        conversation::read_arguments(&mut messages)?;
        if !chat.continue_final {
            return self.render_with(&messages, tools, chat.add_generation_prompt, &chat.extra);
        }
        conversation::mark_end(messages.to_mut())?;
        conversation::cut_at_mark(self.render_with(&messages, tools, false, &chat.extra)?)
    }

    /// Renders `messages`, objects as in OpenAI's API, with `role` and `content`. `tools` are function
    /// descriptions as there. `add_generation_prompt` ends the prompt where the assistant's answer begins.
    ///
    /// Encode the result with `add_special = false`: what a sequence begins with stands in the template.
    ///
    /// # Errors
    /// [`TextError::Refused`] if the template itself refuses the conversation, [`TextError::Render`] if it
    /// fails on it, [`TextError::Endless`] if it does not come to an end.
    pub fn render(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&[serde_json::Value]>,
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        self.render_with(messages, tools, add_generation_prompt, &Map::new())
    }

    fn render_with(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&[serde_json::Value]>,
        add_generation_prompt: bool,
        extra: &Map<String, serde_json::Value>,
    ) -> Result<String, TextError> {
        let token = |token: &Option<String>| token.clone().map_or(Value::UNDEFINED, Value::from);
        let variables = context! {
            messages => Value::from(Serde(messages)),
            tools => Value::from(Serde(tools)),
            documents => (),
            add_generation_prompt,
            bos_token => token(&self.bos_token),
            eos_token => token(&self.eos_token),
            ..Value::from(Serde(extra))
        };
        self.program.render(&self.environment, variables).map_err(|e| failed(&e))
    }
}

/// Transformers marks the assistant's part for training with a tag of its own, `{% generation %}`; here it is a comment,
/// which treats the space around it alike.
fn without_training_marks(source: &str) -> Cow<'_, str> {
    static MARKS: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}").ok());
    MARKS.as_ref().map_or(Cow::Borrowed(source), |marks| marks.replace_all(source, "{#$1 $2#}"))
}

/// Jinja as transformers sets it up: see `_compile_jinja_template` in its `chat_template_utils.py`.
fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    add_operators(&mut environment);
    watch::add_functions(&mut environment);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.set_fuel(Some(FUEL_MAX));
    // Debug information would carry the conversation into error texts.
    environment.set_debug(false);
    environment.add_filter("tojson", |state: &State, value: &Value, options: Kwargs| {
        python::to_json(state, value, &options)
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
    });
    environment.add_function("strftime_now", |format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        python::strftime(&format, now)
    });
    environment
}

fn reason(error: &Error) -> String {
    error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()))
}

fn invalid(error: &Error) -> TextError {
    TextError::Template { line: error.line().unwrap_or(1), reason: reason(error) }
}

fn failed(error: &Error) -> TextError {
    if error.kind() == ErrorKind::OutOfFuel {
        return TextError::Endless { fuel: FUEL_MAX };
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return TextError::Refused(message.clone());
        }
        cause = error.source();
    }
    TextError::Render { line: error.line().unwrap_or(1), reason: reason(error) }
}
