//! Templates that mean harm: what was found by hand and by `make fuzz`, each under what it was.

use std::time::{Duration, Instant};

use galerne_text::TextError;

use crate::templates::render;

/// Far more than any of them takes, far less than what they meant to take.
const PATIENCE: Duration = Duration::from_secs(20);

/// The template is refused, at load or while it renders, and soon.
fn ends(source: &str) {
    let start = Instant::now();
    let shown = &source[..source.len().min(200)];
    let error = render(source).expect_err(shown);
    assert!(
        matches!(error, TextError::Endless { .. } | TextError::Render { .. } | TextError::Template { .. }),
        "{shown}: {error}"
    );
    assert!(error.to_string().len() < 300, "{shown}: {error}");
    assert!(start.elapsed() < PATIENCE, "{shown}: {:?}", start.elapsed());
}

/// `body` in a loop that goes on for as long as it may, around a namespace with something in it.
fn looped(body: &str) -> String {
    format!("{{% set ns = namespace(x=[1]) %}}{{% for a in range(100000) %}}{body}{{% endfor %}}")
}

#[test]
fn a_hostile_template_ends_soon() {
    let start = Instant::now();
    for source in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for a in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% for a in range(100000) %}{{ 'x' * 1000000 }}{% endfor %}",
        "{% macro m(n) %}{% for a in range(9) %}{{ m(n) }}{% endfor %}{% endmacro %}{{ m(1) }}",
        "{% for a in range(100000) %}{% for b in messages[0].content * 100000 %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for a in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=messages * 90000000) %}{% for a in range(100) %}{% set ns.x = ns.x + messages %}{% endfor %}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for a in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for a in range(100) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{% for a in range(1000000000) %}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ (messages * 90000000) | tojson }}",
        "{{ messages * 90000000 == messages * 90000000 }}",
    ] {
        let error = render(source).expect_err(source);
        assert!(matches!(error, TextError::Endless { .. } | TextError::Render { .. }), "{source}: {error}");
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn a_long_chain_in_an_expression_does_not_take_the_stack_of_the_compiler() {
    for link in ["+1", "~a", "|list", ".b", "[0]", "()", " and a", " is defined", " if a else a"] {
        ends(&format!("{{{{ a{} }}}}", link.repeat(100_000)));
    }
    ends(&format!("{{{{ {}a }}}}", "not ".repeat(100_000)));
    ends(&format!("{{{{ {}1 }}}}", "-".repeat(100_000)));
    ends(&format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000)));
    assert_eq!(render(&format!("{{{{ 1{} }}}}", "+1".repeat(200))).expect("not that long"), "201");
}

#[test]
fn a_long_chain_of_elif_does_not_take_the_stack_of_the_compiler() {
    ends(&format!("{{% if a %}}{}{{% endif %}}", "{% elif b %}".repeat(20_000)));
    let some = format!("{{% if a %}}{}{{% else %}}x{{% endif %}}", "{% elif b %}".repeat(200));
    assert_eq!(render(&some).expect("not that long"), "x");
}

#[test]
fn constants_are_not_compared_item_by_item_without_fuel() {
    ends("{% if [1]*100000000 == [1]*100000000 %}{% endif %}");
    ends("{% if 2 in ([1]*1000)*1000000 %}{% endif %}");
    ends("{{ 10**9 * (1, 2) < 10**9 * (1, 2) }}");
    assert_eq!(render("{{ [1]*3 == [1]*3 }}{{ '='*3 }}").expect("not that long"), "True===");
}

#[test]
fn a_list_within_a_list_again_and_again_does_not_take_the_stack_when_it_is_dropped() {
    for body in [
        "{% set ns.x = [ns.x] %}",
        "{% set ns.x = (ns.x,) %}",
        "{% set ns.x = {'a': ns.x} %}",
        "{% set ns.x = [ns.x]|list %}",
        "{% set ns.x = [ns.x]*1 %}",
        "{% set ns.x = [1, ns.x][1:] %}",
        "{% set ns.x = [] + [ns.x] %}",
        "{% set ns.x = ns.x|batch(1) %}",
        "{% set ns.x = dict(a=ns.x).items() %}",
        "{% set ns.x = [ns] %}",
    ] {
        ends(&looped(body));
    }
    ends(&format!("{{% set x = [1] %}}{}", "{% set x = [x] %}".repeat(60_000)));
    ends("{% macro m(x, n) %}{{ m([x], n) }}{% endmacro %}{{ m([1], 1) }}");
    ends("{% for a in [1] recursive %}{{ loop([[[[a]]]]) }}{% endfor %}");
}

#[test]
fn a_list_that_stands_for_another_again_and_again_does_not_take_the_stack_when_it_is_read() {
    for body in ["{% set ns.x = ns.x*1 %}", "{% set ns.x = ns.x|reverse %}", "{% set ns.x = ns.x[0:] %}"] {
        let source = looped(body).replace("100000", "20000") + "{{ ns.x }}";
        assert_eq!(render(&source).expect(body), "[1]", "{body}");
    }
}

#[test]
fn a_list_of_itself_twice_again_and_again_is_not_compared_printed_or_hashed_to_its_end() {
    let doubled = "{% set x = [1] %}{% set y = [1] %}".to_owned()
        + &"{% set x = [x, x] %}{% set y = [y, y] %}".repeat(40);
    for last in [
        "{{ x == y }}",
        "{{ x < y }}",
        "{{ x in [y] }}",
        "{{ {x: 1} }}",
        "{{ x }}",
        "{{ x | tojson }}",
        "{{ x | tojson(sort_keys=true) }}",
        "{{ [x, y] | unique }}",
        "{{ [x, y] | sort }}",
    ] {
        ends(&format!("{doubled}{last}"));
    }
    ends(&looped("{% set ns.x = {ns.x: ns.x, 'a': ns.x} %}"));
    ends(&looped("{% set ns.x = ns.x | zip(ns.x) %}"));
    ends(&looped("{% set ns.x = {'a': ns, 'b': ns} %}"));
}

#[test]
fn what_was_made_once_is_not_compared_for_ever() {
    let lists = "{% set x = [range(50000)|list] %}{% set y = [range(50000)|list] %}";
    for body in [
        "{{ x == y }}",
        "{{ x in [y] }}",
        "{{ x is eq(y) }}",
        "{{ x is in([y]) }}",
        "{{ {}[x] }}",
        "{{ [x, y]|unique|list|length }}",
        "{{ [x, y]|select('==', x)|list|length }}",
        "{{ [x, y]|max is none }}",
        "{{ 0 < x < y }}",
    ] {
        ends(&format!("{lists}{}", looped(body)));
    }
}

#[test]
fn a_namespace_is_never_within_itself() {
    for value in ["ns", "[ns]", "{'a': ns}", "[{'a': (1, ns)}]", "m", "[m]"] {
        ends(&format!(
            "{{% macro m() %}}{{% endmacro %}}{{% set ns = namespace() %}}{{% set ns.x = {value} %}}"
        ));
    }
    ends("{% set ns = namespace() %}{% for a in [1] %}{% set ns.x = loop %}{% endfor %}");
    ends("{% for a in [1] %}{{ loop.changed(loop) }}{% endfor %}");
    ends("{% for a in [1] %}{{ loop.changed(1, loop) }}{% endfor %}");
    let data = "{% set ns = namespace() %}{% set ns.x = [messages[0], ('a', {'b': none})] %}{{ ns.x[0].role }}{{ ns.x[1] }}";
    assert_eq!(render(data).expect("data"), "user('a', {'b': None})");
}

#[test]
fn no_other_file_is_read() {
    for source in [
        "{% include '/etc/passwd' %}",
        "{% include ['/etc/passwd', 'chat_template'] %}",
        "{% extends '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}{{ x }}",
        "{% from '/etc/passwd' import x %}",
        "{% include 'chat_template' %}",
    ] {
        ends(source);
    }
    assert_eq!(render("{% include '/etc/passwd' ignore missing %}x").expect("nothing is there"), "x");
}
