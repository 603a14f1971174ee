use galerne_types::limits::GRAMMAR_BYTES_MAX;
use llguidance::api::ParserLimits;

/// What a grammar may cost. Beyond it is an error, at compile time or, for the limits of a step, of one answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the grammar as sent, all choices together.
    pub bytes_max: usize,
    /// Texts to choose from.
    pub choices_max: usize,
    /// Nesting of a schema, and of brackets in rules.
    pub depth_max: usize,
    /// Nesting of a schema with every reference followed where it stands.
    pub reference_depth_max: usize,
    /// Properties of one object.
    pub properties_max: usize,
    /// Regular expressions of one schema.
    pub patterns_max: usize,
    /// Parts of a schema when its alternatives are multiplied out.
    pub schema_parts_max: u64,
    /// Times that something in a GBNF grammar is repeated.
    pub repetitions_max: u32,
    /// Characters and classes of characters in a GBNF grammar whose rules come back to themselves.
    pub gbnf_characters_max: usize,
    /// Symbols in the rules of the compiled grammar.
    pub symbols_max: usize,
    /// Parts of regular expressions built at compile time; about 50,000 take a millisecond.
    pub lexer_parts_max: u64,
    /// States of the lexer that one answer may visit; about 2 KB each.
    pub lexer_states_max: usize,
    /// Work of the lexer for one mask; about 14,000 take a millisecond.
    pub step_lexer_parts_max: u64,
    /// Items of the parser for one mask; about 20,000 take a millisecond.
    pub step_items_max: usize,
    /// Items of the parser for one byte: how ambiguous a grammar may be.
    pub row_items_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes_max: GRAMMAR_BYTES_MAX,
            choices_max: 4096,
            depth_max: 64,
            reference_depth_max: 256,
            properties_max: 1024,
            patterns_max: 256,
            schema_parts_max: 500_000,
            repetitions_max: 2_000,
            gbnf_characters_max: 4_096,
            symbols_max: 200_000,
            lexer_parts_max: 1_000_000,
            lexer_states_max: 50_000,
            step_lexer_parts_max: 200_000,
            step_items_max: 50_000,
            row_items_max: 2_000,
        }
    }
}

impl Limits {
    pub(crate) fn of_parser(&self) -> ParserLimits {
        ParserLimits {
            max_items_in_row: self.row_items_max,
            initial_lexer_fuel: self.lexer_parts_max,
            step_lexer_fuel: self.step_lexer_parts_max,
            step_max_items: self.step_items_max,
            max_lexer_states: self.lexer_states_max,
            max_grammar_size: self.symbols_max,
            precompute_large_lexemes: true,
            verbose_errors: false,
        }
    }
}
