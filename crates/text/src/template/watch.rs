//! Values that a template makes, kept within bounds.
//!
//! The engine counts the items of what an operation makes, but not what lies within them. A list of itself, twice, and
//! that again some forty times, is forty small steps for the engine and a million million items for whoever compares
//! or prints it; a list within a list, often enough, takes the stack when it is dropped; and a namespace within itself
//! is never dropped at all. So each operation that makes a value of others is followed by a look at all that lies in
//! it, which costs fuel and ends where values nest too deep; what is put into a namespace is data and nothing else.

use indexmap::IndexMap;
use minijinja::machinery::{Instruction, Instructions};
use minijinja::value::{Rest, Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

/// The functions that look, under names that no template can write.
const CHECK: &str = "[]";
const STORE: &str = ".=";

/// Values within values; a body in JSON goes as deep as this.
const DEPTH_MAX: usize = 128;
/// Values that one unit of fuel pays for to look at.
const FUEL_VALUES: u64 = 4;

/// Filters that compare what lies within their arguments, and what stands for them.
const COMPARING: [(&str, &str); 14] = [
    ("dictsort", "|dictsort"),
    ("groupby", "|groupby"),
    ("join", "|join"),
    ("max", "|max"),
    ("min", "|min"),
    ("reject", "|reject"),
    ("rejectattr", "|rejectattr"),
    ("select", "|select"),
    ("selectattr", "|selectattr"),
    ("sort", "|sort"),
    ("string", "|string"),
    ("sum", "|sum"),
    ("unique", "|unique"),
    ("zip", "|zip"),
];

/// Filters and methods that give text, a number or a value that was there before.
const PLAIN: [&str; 30] = [
    "abs",
    "capitalize",
    "count",
    "d",
    "default",
    "endswith",
    "escape",
    "first",
    "float",
    "format",
    "get",
    "indent",
    "int",
    "last",
    "length",
    "lower",
    "lstrip",
    "pprint",
    "replace",
    "round",
    "rstrip",
    "safe",
    "startswith",
    "string",
    "strip",
    "title",
    "tojson",
    "trim",
    "upper",
    "urlencode",
];

pub(super) fn add_functions(environment: &mut Environment<'_>) {
    environment.add_function(CHECK, check);
    environment.add_function(STORE, store);
    for (filter, name) in COMPARING {
        environment.add_function(name, move |state: &mut State, args: Rest<Value>| {
            for value in args.iter() {
                Look::new(state).at(value, DEPTH_MAX)?;
            }
            let made = state.apply_filter(filter, &args)?;
            check(state, made)
        });
    }
}

/// A value that an operation has made, with everything in it looked at. What only stands for other values, such as a
/// list in reverse, becomes a list of its own: how deep such stand within each other could not be seen.
pub(super) fn check(state: &State, value: Value) -> Result<Value, Error> {
    let mut look = Look::new(state);
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable
            if !value.is_tuple() && value.downcast_object_ref::<Vec<Value>>().is_none() =>
        {
            let mut items = Vec::new();
            for item in value.try_iter()? {
                look.at(&item, DEPTH_MAX - 1)?;
                items.push(item);
            }
            Ok(items.into())
        }
        _ => look.at(&value, DEPTH_MAX).map(|()| value),
    }
}

/// A value that a namespace may take: data, and nothing that could hold the namespace itself.
fn store(state: &State, value: Value) -> Result<Value, Error> {
    let mut look = Look::new(state);
    look.only_data = true;
    look.at(&value, DEPTH_MAX).map(|()| value)
}

fn is_data(value: &Value) -> bool {
    value.as_object().is_none_or(|object| {
        object.downcast_ref::<Vec<Value>>().is_some()
            || object.downcast_ref::<Tuple>().is_some()
            || object.downcast_ref::<IndexMap<Value, Value>>().is_some()
    })
}

struct Look<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    values: u64,
    /// Anything else is an error.
    only_data: bool,
}

impl<'a, 'b, 'c> Look<'a, 'b, 'c> {
    fn new(state: &'a State<'b, 'c>) -> Self {
        Self { state, values: 0, only_data: false }
    }

    fn count(&mut self, depth: usize) -> Result<(), Error> {
        if depth == 0 {
            let problem = format!("values nest deeper than {DEPTH_MAX} levels");
            return Err(Error::new(ErrorKind::InvalidOperation, problem));
        }
        self.values += 1;
        if self.values.is_multiple_of(FUEL_VALUES) { self.state.consume_fuel(1) } else { Ok(()) }
    }

    fn at(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if self.only_data && !is_data(value) {
            let problem = "a namespace takes data, and no namespace, loop or macro";
            return Err(Error::new(ErrorKind::InvalidOperation, problem));
        }
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                self.count(depth)?;
                value.try_iter()?.try_for_each(|item| self.at(&item, depth - 1))
            }
            ValueKind::Map => {
                self.count(depth)?;
                pairs(value).try_for_each(|(key, item)| {
                    self.at(&key, depth - 1)?;
                    self.at(&item, depth - 1)
                })
            }
            ValueKind::Invalid => {
                Err(Error::new(ErrorKind::InvalidOperation, "a value cannot be worked out"))
            }
            _ => self.count(depth),
        }
    }
}

fn pairs(map: &Value) -> impl Iterator<Item = (Value, Value)> {
    map.as_object().and_then(|map| map.try_iter_pairs()).into_iter().flatten()
}

/// The instructions with the looks between them.
pub(super) fn watched<'s>(from: &Instructions<'s>) -> Result<Instructions<'s>, Error> {
    let mut to = Instructions::new(from.name(), from.source());
    let mut places = Vec::new();
    for at in 0.. {
        let Some(instruction) = from.get(at) else { break };
        let line = from.get_line(at).and_then(|line| u16::try_from(line).ok()).unwrap_or(1);
        let mut add = |instruction| to.add_with_line(instruction, line);
        let before = before(from, at)?;
        let place = before.map(|name| add(Instruction::CallFunction(name, Some(1))));
        let own = add(replaced(instruction));
        places.push(place.unwrap_or(own));
        if makes(instruction) {
            add(Instruction::CallFunction(CHECK, Some(1)));
        }
    }
    let end = places.last().map_or(0, |_| length(&to));
    for at in 0..length(&to) {
        use Instruction::{BuildMacro, Iterate, Jump, JumpIfFalse, JumpIfFalseOrPop, JumpIfTrueOrPop};
        if let Some(
            Iterate(target)
            | Jump(target)
            | JumpIfFalse(target)
            | JumpIfFalseOrPop(target)
            | JumpIfTrueOrPop(target)
            | BuildMacro(_, target, _),
        ) = to.get_mut(at)
        {
            *target = places.get(*target as usize).copied().unwrap_or(end);
        }
    }
    Ok(to)
}

fn length(instructions: &Instructions<'_>) -> u32 {
    (0..).find(|&at| instructions.get(at).is_none()).unwrap_or(0)
}

/// The look at the top of the stack that comes before an instruction.
fn before<'s>(from: &Instructions<'s>, at: u32) -> Result<Option<&'static str>, Error> {
    use Instruction::{
        CallMethod, CompareAndPreserve, Eq, GetItem, Gt, Gte, In, LoadConst, Lookup, Lt, Lte, Ne, PerformTest,
    };
    let with_constant = || {
        let last = at.checked_sub(1).and_then(|last| from.get(last));
        matches!(last, Some(LoadConst(value)) if !matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable))
    };
    Ok(match from.get(at) {
        Some(Lookup(_)) if is_target(from, at) => Some(STORE),
        Some(Eq | Ne | Lt | Lte | Gt | Gte | In | CompareAndPreserve(_) | GetItem) if !with_constant() => {
            Some(CHECK)
        }
        Some(PerformTest(_, Some(2), _)) if !with_constant() => Some(CHECK),
        Some(CallMethod("changed", Some(2))) => Some(STORE),
        Some(CallMethod("changed", _)) => {
            return Err(Error::new(ErrorKind::SyntaxError, "loop.changed takes one value here"));
        }
        _ => None,
    })
}

/// Whether the variable at `at` is the namespace of an assignment, whose value lies on the stack.
fn is_target(from: &Instructions<'_>, at: u32) -> bool {
    let behind = (at + 1..).find_map(|next| match from.get(next) {
        Some(Instruction::GetAttr(_)) => None,
        other => Some(other),
    });
    matches!(behind.flatten(), Some(Instruction::SetAttr(_)))
}

fn replaced<'s>(instruction: &Instruction<'s>) -> Instruction<'s> {
    if let Instruction::ApplyFilter(filter, args, _) = instruction
        && let Some((_, name)) = COMPARING.iter().find(|(comparing, _)| comparing == filter)
    {
        return Instruction::CallFunction(name, *args);
    }
    instruction.clone()
}

/// Whether an instruction leaves a value on the stack that holds others and is new.
fn makes(instruction: &Instruction<'_>) -> bool {
    use Instruction::{
        ApplyFilter, BuildList, BuildMap, BuildTuple, CallFunction, CallMethod, CallObject, Mul, Slice,
    };
    match instruction {
        BuildList(items) | BuildTuple(items) => *items != Some(0),
        BuildMap(pairs) => *pairs > 0,
        Mul | Slice | CallObject(_) => true,
        ApplyFilter(name, ..) => !PLAIN.contains(name) && !COMPARING.iter().any(|(other, _)| other == name),
        CallMethod(name, _) => !PLAIN.contains(name),
        CallFunction(name, _) => !matches!(*name, "raise_exception" | "strftime_now"),
        _ => false,
    }
}
