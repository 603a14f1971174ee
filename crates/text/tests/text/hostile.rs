//! Templates and tokenizers that mean harm: what was found by hand and by `make fuzz`, each under what it was.

use std::time::{Duration, Instant};

use galerne_checkpoint::{GgufVocab, TokenizerAsset};
use galerne_text::{TextError, Tokenizer};
use serde_json::{Value, json};

use crate::models::{assets, bard_path};
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

/// A `tokenizer.json` of byte-level BPE with something changed in it.
fn changed(change: impl FnOnce(&mut Value)) -> Result<Tokenizer, TextError> {
    let mut file = serde_json::from_slice(&std::fs::read(bard_path()).expect("bard-1m's")).expect("JSON");
    change(&mut file);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, file.to_string()).expect("a file");
    Tokenizer::load(&assets(TokenizerAsset::Json(path)))
}

fn refusal(change: impl FnOnce(&mut Value)) -> String {
    changed(change).err().expect("a refusal").to_string()
}

#[test]
fn parts_that_double_a_text_each_do_not_fill_the_memory() {
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let twice = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaaaaaaa"});
    let list = |part: &Value, times| json!(vec![part.clone(); times]);
    let grows = "more than 512 times as long";
    assert!(refusal(|file| file["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": list(&bytes, 10)})).contains(grows));
    assert!(
        refusal(|file| file["normalizer"] = json!({"type": "Sequence", "normalizers": list(&twice, 3)}))
            .contains(grows)
    );
    let nfc = list(&json!({"type": "NFC"}), 40);
    assert!(
        refusal(|file| file["normalizer"] = json!({"type": "Sequence", "normalizers": nfc}))
            .contains("at most 32")
    );
    let before = json!({"type": "Prepend", "prepend": "x".repeat(100)});
    assert!(refusal(|file| file["normalizer"] = before).contains("100 bytes before a text"));
}

#[test]
fn a_number_beyond_a_double_in_a_decoder_is_refused_and_no_panic() {
    let text = std::fs::read_to_string(bard_path()).expect("bard-1m's");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, text.replace("\"decoder\":", "\"decoder\":1e400,\"was\":")).expect("a file");
    let error = Tokenizer::load(&assets(TokenizerAsset::Json(path))).err().expect("a refusal").to_string();
    assert!(error.contains("number out of range"), "{error}");
}

#[test]
fn a_post_processor_that_wants_a_second_text_is_refused_and_no_panic() {
    let pair = json!({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}], "pair": [],
        "special_tokens": {}});
    let tokenizer = changed(|file| file["post_processor"] = pair);
    let outcome = tokenizer.and_then(|tokenizer| tokenizer.encode("a", true));
    outcome.expect_err("there is no second text");
}

fn vocabulary(tokens: &[&str], merges: &[&str]) -> Result<Tokenizer, TextError> {
    let owned = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
    Tokenizer::load(&assets(TokenizerAsset::Gguf(GgufVocab {
        model: "gpt2".to_owned(),
        pre: None,
        tokens: owned(tokens),
        types: Vec::new(),
        merges: owned(merges),
        scores: Vec::new(),
        bos: None,
        eos: None,
        unk: None,
        add_space_prefix: false,
    })))
}

#[test]
fn a_vocabulary_without_letters_is_no_panic() {
    for tokens in [&[][..], &["b"], &["\u{120}"]] {
        let tokenizer = vocabulary(tokens, &[]).expect("a vocabulary");
        assert_eq!(tokenizer.encode("a", true).ok().unwrap_or_default(), Vec::<u32>::new());
    }
}

#[test]
fn a_merge_longer_than_every_token_is_refused_and_no_panic() {
    let error = vocabulary(&["a", "\u{120}"], &["\u{120} a"]).err().expect("a refusal").to_string();
    assert!(error.contains("the model's vocabulary cannot be used"), "{error}");
}

#[test]
fn a_margin_as_wide_as_the_memory_is_refused_and_no_panic() {
    for indent in ["65536", "99999999", "9223372036854775807"] {
        ends(&format!(
            "{{{{ messages | tojson(indent={indent}) }}}}{{% for a in range(100000) %}}{{% for b in range(100000) %}}{{% endfor %}}{{% endfor %}}"
        ));
    }
    let wide = render("{{ [1] | tojson(indent=70000) }}").expect("within the limits");
    assert_eq!(wide, format!("[\n{}1\n]", " ".repeat(70_000)));
}
