use std::sync::Arc;

use galerne_types::Grammar;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::constraint::Constraint;
use crate::error::{GrammarError, sentence};
use crate::gbnf;
use crate::lark;
use crate::limits::Limits;
use crate::schema;

/// Stack of the thread that compiles, in bytes: the depth of its recursion is bounded by [`Limits`], far below.
const COMPILE_STACK_BYTES: usize = 64 << 20;

/// Memory for the rules of a compiled grammar, in bytes for each byte of its text: an estimate, and a high one.
const RULES_BYTES: usize = 64;

/// A model's tokens as the parser sees them. Costs some tens of bytes a token; shared by all requests.
pub struct Vocabulary {
    factory: ParserFactory,
    tokens: Arc<Tokens>,
}

/// What a constraint needs of its vocabulary.
pub(crate) struct Tokens {
    pub(crate) end_tokens: Vec<u32>,
    pub(crate) end_mask: Arc<[u32]>,
}

impl Vocabulary {
    /// The vocabulary of a model with `size` rows in its head, in which `end_tokens` end an answer. `token` gives a
    /// token's bytes in the middle of a text, none for a row without a token, and whether it only marks structure:
    /// such a token belongs to no text, and a Lark grammar may ask for it by its id, as in `<[5]>`.
    ///
    /// # Errors
    /// [`GrammarError::NoEndToken`] if none of `end_tokens` is below `size`.
    pub fn new<'a>(
        size: u32,
        end_tokens: &[u32],
        token: impl Fn(u32) -> (&'a [u8], bool),
    ) -> Result<Self, GrammarError> {
        let end_tokens: Vec<u32> = end_tokens.iter().copied().filter(|&token| token < size).collect();
        let &[first_end, ..] = end_tokens.as_slice() else { return Err(GrammarError::NoEndToken) };
        let word = |id| {
            let (bytes, special) = token(id);
            // No UTF-8 holds 0xFF, and the parser takes a token that begins with it for one that marks structure.
            let textless = bytes.contains(&TokTrie::SPECIAL_TOKEN_MARKER);
            match (special, textless) {
                (true, _) => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
                (false, true) => Vec::new(),
                (false, false) => bytes.to_vec(),
            }
        };
        let words: Vec<Vec<u8>> = (0..size).map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(size, first_end), &words).with_eos_tokens(&end_tokens);
        // Not canonical: the model chooses how to cut a text that is certain, as it does for any other.
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let factory = ParserFactory::new_simple(&env).map_err(|error| syntax(&error))?;
        let mut end_mask = vec![0_u32; size.div_ceil(32) as usize];
        for &token in &end_tokens {
            end_mask[token as usize / 32] |= 1 << (token % 32);
        }
        Ok(Self { factory, tokens: Arc::new(Tokens { end_tokens, end_mask: end_mask.into() }) })
    }

    /// Compiles a grammar; takes milliseconds for most, and at the limits a second or two. Blocks its thread.
    ///
    /// # Errors
    /// A [`GrammarError`] whose sentence is meant for whoever sent the grammar.
    pub fn compile(&self, grammar: &Grammar, limits: &Limits) -> Result<Constraint, GrammarError> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("grammar".into()).stack_size(COMPILE_STACK_BYTES);
            let compiled = thread.spawn_scoped(scope, || self.compile_here(grammar, limits));
            let compiled = compiled.map_err(|error| {
                GrammarError::Failed(format!("no thread can be started to compile it: {error}"))
            })?;
            compiled.join().unwrap_or_else(|_| Err(GrammarError::Syntax(sentence("panic:"))))
        })
    }

    fn compile_here(&self, grammar: &Grammar, limits: &Limits) -> Result<Constraint, GrammarError> {
        check_size(grammar, limits)?;
        let (parsed, schema) = match grammar {
            Grammar::JsonObject => {
                let schema = schema::prepare(json!({"type": "object"}), limits)?;
                (TopLevelGrammar::from_json_schema(schema), None)
            }
            Grammar::JsonSchema(text) => {
                let schema = schema::prepare(schema::parse(text)?, limits)?;
                (TopLevelGrammar::from_json_schema(schema.clone()), Some(schema))
            }
            Grammar::Regex(regex) => (TopLevelGrammar::from_regex(regex), None),
            Grammar::Choice(choices) => (TopLevelGrammar::from_lark(lark::choice(choices)), None),
            Grammar::Lark(rules) if gbnf::is_gbnf(rules) => {
                (TopLevelGrammar::from_lark(gbnf::to_lark(rules, limits)?), None)
            }
            Grammar::Lark(rules) => (TopLevelGrammar::from_lark(lark::prepare(rules, limits)?), None),
        };
        let (logger, capabilities) = (llguidance::Logger::new(0, 0), InferenceCapabilities::default());
        let init = llguidance::api::GrammarInit::Serialized(parsed);
        let parser = self.factory.create_parser_from_init_ext(init, logger, capabilities, limits.of_parser());
        let parser = parser.map_err(|error| match schema {
            Some(schema) => schema::blame(&schema, &error, limits),
            None => syntax(&error),
        })?;
        let lexer = parser.clone(); // shares what the first mask adds to it
        let mut constraint = Constraint::new(Matcher::new(Ok(parser)), Arc::clone(&self.tokens));
        constraint.mask().map_err(|error| match error {
            GrammarError::Failed(says) => GrammarError::Syntax(format!("no answer can meet it: {says}")),
            other => other,
        })?;
        constraint.measured(lexer.parser.lexer_stats().num_bytes + grammar.bytes() * RULES_BYTES);
        Ok(constraint)
    }
}

fn check_size(grammar: &Grammar, limits: &Limits) -> Result<(), GrammarError> {
    let bytes = grammar.bytes();
    if bytes > limits.bytes_max {
        let max = limits.bytes_max;
        return Err(GrammarError::TooLarge(format!("has {bytes} bytes, and at most {max} are taken")));
    }
    if let Grammar::Choice(choices) = grammar {
        let (count, max) = (choices.len(), limits.choices_max);
        if count > max {
            return Err(GrammarError::TooLarge(format!("has {count} choices, and at most {max} are taken")));
        }
        if count == 0 {
            return Err(GrammarError::Syntax(
                "there is nothing to choose from: give at least one text".into(),
            ));
        }
    }
    Ok(())
}

fn syntax(error: &impl std::fmt::Display) -> GrammarError {
    GrammarError::Syntax(sentence(&format!("{error:#}")))
}

/// A schema as its grammar will be compiled, with the choices on white space and escapes that this crate makes.
pub(crate) fn with_options(mut schema: Value) -> Value {
    if let Value::Bool(true) = schema {
        schema = json!({});
    }
    if let Some(keywords) = schema.as_object_mut() {
        let options = json!({
            "whitespace_pattern": r"( |\r?\n[ \t]{0,16})",
            "json_allowed_escapes": "nrbtf\\\"",
        });
        keywords.insert("x-guidance".into(), options);
    }
    schema
}
