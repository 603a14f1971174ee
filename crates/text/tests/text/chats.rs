use galerne_checkpoint::{SentencePieceFile, TextAssets, TokenizerAsset};
use galerne_text::{Chat, ChatFormat, ChatFormatKind, TextError, Tokenizer};
use serde_json::{Value, json};

use crate::models::{
    assets, bard_path, demo, golden, ids, mistral, mistral_assets, mistral_vocab, model_path,
};

fn chat(request: &Value) -> Chat {
    let list = |field: &str| request[field].as_array().cloned().unwrap_or_default();
    Chat {
        messages: list("messages"),
        tools: list("tools"),
        continue_final: request["continue_final_message"] == true,
        add_generation_prompt: true,
        ..Chat::default()
    }
}

fn load(assets: &TextAssets) -> (Tokenizer, ChatFormat) {
    let tokenizer = Tokenizer::load(assets).expect("a tokenizer");
    let format = ChatFormat::load(assets, &tokenizer, None).expect("no error").expect("a format");
    (tokenizer, format)
}

#[test]
fn chats_are_encoded_as_in_mistral_common() {
    for version in ["v1", "v2", "v3"] {
        let (tokenizer, format) = load(&mistral_assets(version));
        assert_eq!(format.kind().to_string(), format!("mistral-{version}"));
        for name in ["mistral_chats.json", "mistral_chats_random.json"] {
            for case in golden(name).as_array().expect("cases") {
                let encoded = format.encode(&tokenizer, &chat(&case["request"]));
                let case_name = format!("{version} {}", case["case"]);
                match &case[version] {
                    Value::Null => {
                        let error = encoded.expect_err(&case_name);
                        let expected = matches!(error, TextError::Conversation(_) | TextError::Tools(_));
                        assert!(expected, "{case_name}: {error}");
                    }
                    expected => assert_eq!(encoded.expect(&case_name), ids(expected), "{case_name}"),
                }
            }
        }
    }
}

#[test]
fn the_files_tell_the_format() {
    let kind = |change: &dyn Fn(&mut TextAssets)| {
        let mut assets = mistral_assets("v2");
        change(&mut assets);
        let tokenizer = Tokenizer::load(&assets).expect("a tokenizer");
        let format = ChatFormat::load(&assets, &tokenizer, None).expect("no error");
        format.map(|format| format.kind().to_string())
    };
    let named = |assets: &mut TextAssets, version, mistral| {
        let path = model_path(version);
        assets.sentencepiece = Some(SentencePieceFile { path, version: None, mistral });
    };
    let template = |text: &str| Some(format!("{{{{ bos_token }}}}{text}"));
    assert_eq!(kind(&|_| {}).as_deref(), Some("mistral-v2"), "the name says so");
    assert_eq!(
        kind(&|a| named(a, "v2", false)).as_deref(),
        Some("mistral-v3"),
        "Mistral 7B v0.3's tokenizer.model"
    );
    assert_eq!(kind(&|a| named(a, "v1", true)).as_deref(), Some("mistral-v1"));
    assert_eq!(kind(&|a| named(a, "v1", false)), None, "anybody's SentencePiece model");
    assert_eq!(kind(&|a| a.chat_template = template("[INST]")).as_deref(), Some("mistral-v2"));
    assert_eq!(
        kind(&|a| a.chat_template = template("<|im_start|>")).as_deref(),
        Some("jinja"),
        "a derived model"
    );
    let llama_2 = |a: &mut TextAssets| {
        named(a, "v1", true);
        a.chat_template = template("[INST] <<SYS>>");
    };
    assert_eq!(kind(&llama_2).as_deref(), Some("jinja"));
    let gguf = |version| move |a: &mut TextAssets| *a = assets(TokenizerAsset::Gguf(mistral_vocab(version)));
    assert_eq!(kind(&gguf("v3")).as_deref(), Some("mistral-v3"));
    assert_eq!(kind(&gguf("v1")), None);
    assert_eq!(kind(&|a| *a = demo()).as_deref(), Some("jinja"));
}

#[test]
fn a_format_can_be_forced_where_the_vocabulary_has_its_tokens() {
    let force = |assets: &TextAssets, kind: &str| {
        let tokenizer = Tokenizer::load(assets).expect("a tokenizer");
        let format = ChatFormat::load(assets, &tokenizer, Some(kind.parse().expect("a kind")));
        format.map(|format| format.expect("what was forced").kind().to_string())
    };
    let v3 = mistral_assets("v3");
    for kind in ["mistral-v1", "mistral-v2", "mistral-v3"] {
        assert_eq!(force(&v3, kind).expect(kind), kind);
    }
    assert_eq!(force(&demo(), "jinja").expect("it has a template"), "jinja");
    let refusal = |assets: &TextAssets, kind| force(assets, kind).expect_err(kind).to_string();
    assert!(refusal(&v3, "jinja").contains("needs a chat template"));
    assert!(refusal(&mistral_assets("v1"), "mistral-v3").contains("[INST]"));
    assert!(
        "mistral".parse::<ChatFormatKind>().expect_err("no such kind").to_string().contains("mistral-v3")
    );
}

#[test]
fn a_tokenizer_json_of_another_vocabulary_is_not_mistrals() {
    let mut assets = mistral_assets("v3");
    assets.tokenizer = TokenizerAsset::Json(bard_path());
    let tokenizer = Tokenizer::load(&assets).expect("bard-1m's tokenizer");
    assert_eq!(tokenizer.vocab_size(), 1024);
    assert!(ChatFormat::load(&assets, &tokenizer, None).expect("no error").is_none());
}

#[test]
fn a_gap_is_filled_as_in_mistral_common() {
    let v3 = mistral("v3");
    // encode_fim of mistral-common's v3 tokenizer.
    for (prompt, suffix, expected) in [
        ("def f(", "return x", &[1, 13, 1575, 2086, 11, 1569, 1053, 29500][..]),
        ("def f(", "", &[1, 13, 11, 1569, 1053, 29500]),
        ("", "", &[1, 13, 11]),
        ("a ", " b", &[1, 13, 1055, 11, 1032, 29473]),
        ("x", "☺", &[1, 13, 31369, 11, 2086]),
        ("x", "\u{fe0f} y", &[1, 13, 29864, 1105, 11, 2086]),
        ("x", "\n", &[1, 13, 781, 11, 2086]),
    ] {
        assert_eq!(v3.encode_fim(prompt, suffix).expect(prompt), expected, "{prompt:?} … {suffix:?}");
    }
    let written = v3.encode_fim("[INST]", "[SUFFIX]").expect("text");
    assert_eq!(written.iter().filter(|&&id| v3.is_special(id)).count(), 3, "a user writes no control token");
    for version in ["v1", "v2"] {
        assert!(matches!(mistral(version).encode_fim("a", "b"), Err(TextError::NoFim)), "{version}");
    }
}

#[test]
fn what_cannot_be_encoded_is_refused_with_a_sentence() {
    let (tokenizer, format) = load(&mistral_assets("v3"));
    let refusal = |messages: Value| {
        let error = format.encode(&tokenizer, &chat(&json!({"messages": messages}))).expect_err("a refusal");
        error.to_string()
    };
    let (user, answer) =
        (json!({"role": "user", "content": "secret"}), json!({"role": "assistant", "content": "ok"}));
    let call = json!({"role": "assistant", "tool_calls": [{"id": "call_1", "function": {"name": "f", "arguments": "{}"}}]});
    assert!(refusal(json!([])).contains("at least one message"));
    assert!(refusal(json!([user, answer])).contains("the last message must be"));
    assert!(
        refusal(json!([user, {"role": "tool", "tool_call_id": "abcdefghi", "content": "1"}]))
            .contains("the role tool cannot follow user")
    );
    assert!(refusal(json!([user, call])).contains("message 1: a tool call's id must be 9 characters"));
    assert!(refusal(json!([{"role": "robot", "content": ""}])).contains("message 0: its role must be"));
    let image = json!([{"type": "image_url", "image_url": {"url": "secret"}}]);
    let error = refusal(json!([{"role": "user", "content": image}]));
    assert!(error.contains("text parts") && !error.contains("secret"), "{error}");
}
