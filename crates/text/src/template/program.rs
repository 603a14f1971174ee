//! A compiled template, in which two of the engine's operators are our own.
//!
//! The engine counts the work of a template, but not what `list + list` makes: a list that is doubled again and again
//! would fill the memory within one step. And it lacks Python's `%` on a string. Each operator is an instruction, and
//! is replaced by the call of a function under the operator's name, which no template can write.

use std::collections::BTreeMap;

use minijinja::machinery::{CodeGenerator, Instruction, Instructions, eval, make_string_output, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use self_cell::self_cell;

use super::{source, watch};

const NAME: &str = "chat_template";
const ADD: &str = "+";
const REM: &str = "%";

/// Items of a list that `+` may make, as many as the engine allows in a range.
const LIST_ITEMS_MAX: usize = 100_000;
/// Text that one unit of fuel pays for.
const FUEL_BYTES: u64 = 64;

struct Code<'s> {
    instructions: Instructions<'s>,
    blocks: BTreeMap<&'s str, Instructions<'s>>,
}

self_cell!(
    pub(super) struct Program {
        owner: String,
        #[covariant]
        dependent: Code,
    }
);

impl Program {
    pub(super) fn compile(source: String, syntax: &SyntaxConfig) -> Result<Self, Error> {
        source::check_tokens(&source, syntax)?;
        Self::try_new(source, |source| {
            let template = parse(source, NAME, syntax.clone())?;
            source::check_constants(&template)?;
            let mut generator = CodeGenerator::new(NAME, source);
            generator.compile_stmt(&template);
            let (mut instructions, mut blocks) = generator.finish();
            for code in blocks.values_mut().chain([&mut instructions]) {
                *code = watch::watched(code)?;
                replace_operators(code);
            }
            Ok(Code { instructions, blocks })
        })
    }

    /// `environment` has the functions of [`add_operators`] and of [`watch`].
    pub(super) fn render(&self, environment: &Environment<'_>, variables: Value) -> Result<String, Error> {
        let Code { instructions, blocks } = self.borrow_dependent();
        let mut text = String::new();
        let mut out = make_string_output(&mut text);
        eval(environment, instructions, variables, blocks, &mut out, AutoEscape::None)?;
        drop(out);
        Ok(text)
    }
}

fn replace_operators(instructions: &mut Instructions<'_>) {
    let mut at = 0;
    while let Some(instruction) = instructions.get_mut(at) {
        match instruction {
            Instruction::Add => *instruction = Instruction::CallFunction(ADD, Some(2)),
            Instruction::Rem => *instruction = Instruction::CallFunction(REM, Some(2)),
            _ => {}
        }
        at += 1;
    }
}

pub(super) fn add_operators(environment: &mut Environment<'_>) {
    environment.add_function(ADD, |state: &State, a: Value, b: Value| add(state, &a, &b));
    environment.add_function(REM, |state: &mut State, a: Value, b: Value| rem(state, a, b));
}

fn impossible(operator: &str, a: &Value, b: &Value) -> Error {
    let problem =
        format!("tried to use {operator} operator on unsupported types {} and {}", a.kind(), b.kind());
    Error::new(ErrorKind::InvalidOperation, problem)
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

/// Both as whole numbers; truth counts as 0 and 1.
fn whole(a: &Value, b: &Value) -> Option<(i128, i128)> {
    let whole = |value: &Value| {
        if value.kind() == ValueKind::Bool {
            return Some(value.is_true().into());
        }
        i128::try_from(value.clone()).ok().filter(|_| value.is_integer())
    };
    Some((whole(a)?, whole(b)?))
}

fn real(a: &Value, b: &Value) -> Option<(f64, f64)> {
    let real =
        |value: &Value| f64::try_from(value.clone()).ok().filter(|_| value.kind() == ValueKind::Number);
    Some((real(a)?, real(b)?))
}

fn number(whole: i128) -> Value {
    i64::try_from(whole).map_or_else(|_| whole.into(), Value::from)
}

fn add(state: &State, a: &Value, b: &Value) -> Result<Value, Error> {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        let fuel = (a.len() + b.len()) as u64 / FUEL_BYTES;
        if state.fuel_levels().is_some_and(|(_, left)| left <= fuel) {
            state.consume_fuel(fuel)?; // fails before the memory is taken; what is made is counted by the engine
        }
        return Ok([a, b].concat().into());
    }
    if is_list(a) && is_list(b) {
        let items = a.try_iter()?.chain(b.try_iter()?).take(LIST_ITEMS_MAX + 1).collect::<Vec<_>>();
        if items.len() > LIST_ITEMS_MAX {
            let problem = format!("a list would have more than {LIST_ITEMS_MAX} items");
            return Err(Error::new(ErrorKind::InvalidOperation, problem));
        }
        return watch::check(state, items.into());
    }
    let sum = whole(a, b).and_then(|(a, b)| Some(number(a.checked_add(b)?)));
    sum.or_else(|| real(a, b).map(|(a, b)| (a + b).into())).ok_or_else(|| impossible(ADD, a, b))
}

/// Python's remainder, which has the sign of the divisor; on a string, `printf`'s formatting.
fn rem(state: &mut State, a: Value, b: Value) -> Result<Value, Error> {
    if a.as_str().is_some() {
        let mut values = vec![a];
        if b.is_tuple() {
            values.extend(b.try_iter()?);
        } else {
            values.push(b);
        }
        return state.apply_filter("format", &values);
    }
    let by_whole = whole(&a, &b).and_then(|(a, b)| Some(number((a.checked_rem(b)? + b).checked_rem(b)?)));
    let by_real = || real(&a, &b).filter(|(_, b)| *b != 0.0).map(|(a, b)| (a - b * (a / b).floor()).into());
    by_whole.or_else(by_real).ok_or_else(|| impossible(REM, &a, &b))
}
