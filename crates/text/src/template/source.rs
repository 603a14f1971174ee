//! What a template may look like before it is compiled.
//!
//! The engine's parser and its compiler call themselves for each level of an expression, and each operator in a chain
//! is a level; and they work out constants, for which no fuel is counted. So what is long is refused first, and then
//! what repeats a list that is a constant.

use minijinja::machinery::ast::{BinOpKind, CallArg, Expr, Stmt};
use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Error, ErrorKind, Value};

/// Operators, dots, brackets and filters between `{{` and `}}`, or `{%` and `%}`. Honest templates have some tens.
const TAG_OPERATORS_MAX: usize = 250;
/// `elif` in one template.
const ELIFS_MAX: usize = 250;
/// Items of a list that a constant expression repeats.
const CONSTANT_ITEMS_MAX: usize = 1_000;

fn refuse(problem: String) -> Error {
    Error::new(ErrorKind::SyntaxError, problem)
}

/// Refuses a source whose expressions or conditions go too deep.
pub(super) fn check_tokens(source: &str, syntax: &SyntaxConfig) -> Result<(), Error> {
    let (mut operators, mut elifs) = (0, 0);
    for token in tokenize(source, false, syntax.clone()) {
        match token?.0 {
            Token::VariableStart | Token::BlockStart => operators = 0,
            Token::Ident("elif") => elifs += 1,
            Token::Ident("and" | "or" | "not" | "is" | "in" | "if" | "else") => operators += 1,
            Token::Ident(_)
            | Token::TemplateData(_)
            | Token::VariableEnd
            | Token::BlockEnd
            | Token::Str(_)
            | Token::String(_)
            | Token::Int(_)
            | Token::Int128(_)
            | Token::Float(_)
            | Token::Comma
            | Token::Colon
            | Token::Assign
            | Token::BracketClose
            | Token::ParenClose
            | Token::BraceClose => {}
            _ => operators += 1,
        }
        if operators > TAG_OPERATORS_MAX {
            return Err(refuse(format!("an expression has more than {TAG_OPERATORS_MAX} operators")));
        }
        if elifs > ELIFS_MAX {
            return Err(refuse(format!("it has more than {ELIFS_MAX} elif")));
        }
    }
    Ok(())
}

/// Refuses a template that repeats constant lists beyond reason: the compiler would compare them item by item.
pub(super) fn check_constants(template: &Stmt<'_>) -> Result<(), Error> {
    statement(template)
}

fn statements(body: &[Stmt<'_>]) -> Result<(), Error> {
    body.iter().try_for_each(statement)
}

fn statement(stmt: &Stmt<'_>) -> Result<(), Error> {
    match stmt {
        Stmt::Template(template) => statements(&template.children),
        Stmt::EmitExpr(emit) => expression(&emit.expr),
        Stmt::ForLoop(each) => {
            expression(&each.iter)?;
            each.filter_expr.iter().try_for_each(expression)?;
            statements(&each.body)?;
            statements(&each.else_body)
        }
        Stmt::IfCond(condition) => {
            expression(&condition.expr)?;
            statements(&condition.true_body)?;
            statements(&condition.false_body)
        }
        Stmt::WithBlock(with) => {
            with.assignments.iter().try_for_each(|(_, value)| expression(value))?;
            statements(&with.body)
        }
        Stmt::Set(set) => expression(&set.expr),
        Stmt::SetBlock(set) => {
            set.filter.iter().try_for_each(expression)?;
            statements(&set.body)
        }
        Stmt::AutoEscape(block) => {
            expression(&block.enabled)?;
            statements(&block.body)
        }
        Stmt::FilterBlock(block) => {
            expression(&block.filter)?;
            statements(&block.body)
        }
        Stmt::Block(block) => statements(&block.body),
        Stmt::Import(import) => expression(&import.expr),
        Stmt::FromImport(import) => expression(&import.expr),
        Stmt::Extends(extends) => expression(&extends.name),
        Stmt::Include(include) => expression(&include.name),
        Stmt::Macro(declared) => {
            declared.defaults.iter().try_for_each(expression)?;
            statements(&declared.body)
        }
        Stmt::CallBlock(block) => {
            expression(&block.call.expr)?;
            arguments(&block.call.args)?;
            statements(&block.macro_decl.body)
        }
        Stmt::Do(done) => {
            expression(&done.call.expr)?;
            arguments(&done.call.args)
        }
        Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => Ok(()),
    }
}

fn arguments(args: &[CallArg<'_>]) -> Result<(), Error> {
    args.iter().try_for_each(|arg| match arg {
        CallArg::Pos(value)
        | CallArg::Kwarg(_, value)
        | CallArg::PosSplat(value)
        | CallArg::KwargSplat(value) => expression(value),
    })
}

fn expression(expr: &Expr<'_>) -> Result<(), Error> {
    match expr {
        Expr::Var(_) | Expr::Const(_) => Ok(()),
        Expr::Slice(slice) => {
            expression(&slice.expr)?;
            [&slice.start, &slice.stop, &slice.step].into_iter().flatten().try_for_each(expression)
        }
        Expr::UnaryOp(operation) => expression(&operation.expr),
        Expr::BinOp(operation) => {
            expression(&operation.left)?;
            expression(&operation.right)?;
            if matches!(operation.op, BinOpKind::Mul) {
                check_repetition(operation.left.as_const(), operation.right.as_const())?;
            }
            Ok(())
        }
        Expr::Compare(comparison) => {
            expression(&comparison.expr)?;
            comparison.ops.iter().try_for_each(|op| expression(&op.expr))
        }
        Expr::IfExpr(choice) => {
            expression(&choice.test_expr)?;
            expression(&choice.true_expr)?;
            choice.false_expr.iter().try_for_each(expression)
        }
        Expr::Filter(filter) => {
            filter.expr.iter().try_for_each(expression)?;
            arguments(&filter.args)
        }
        Expr::Test(test) => {
            expression(&test.expr)?;
            arguments(&test.args)
        }
        Expr::GetAttr(get) => expression(&get.expr),
        Expr::GetItem(get) => {
            expression(&get.expr)?;
            expression(&get.subscript_expr)
        }
        Expr::Call(call) => {
            expression(&call.expr)?;
            arguments(&call.args)
        }
        Expr::List(list) => list.items.iter().try_for_each(expression),
        Expr::Tuple(tuple) => tuple.items.iter().try_for_each(expression),
        Expr::Map(map) => map.keys.iter().chain(&map.values).try_for_each(expression),
    }
}

fn check_repetition(left: Option<Value>, right: Option<Value>) -> Result<(), Error> {
    let (Some(left), Some(right)) = (left, right) else { return Ok(()) };
    for (list, times) in [(&left, &right), (&right, &left)] {
        if list.as_str().is_some() {
            continue;
        }
        let (Some(items), Ok(times)) = (list.len(), i128::try_from(times.clone())) else { continue };
        if i128::try_from(items).unwrap_or(i128::MAX).saturating_mul(times) > CONSTANT_ITEMS_MAX as i128 {
            return Err(refuse(format!("it repeats a list to more than {CONSTANT_ITEMS_MAX} items")));
        }
    }
    Ok(())
}
