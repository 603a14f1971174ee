use galerne_checkpoint::{Dtype, TextAssets, TokenizerAsset};
use serde_json::{Value, json};

use crate::support::gguf::Meta;
use crate::support::{Folder, Model, assert_holds, assert_refused};

/// Names and contents; a JSON string stands for the text itself.
type Files<'a> = &'a [(&'a str, Value)];

fn with_files(files: Files) -> Result<TextAssets, String> {
    let (config, tensors) = Model::small(Dtype::F32).hugging_face();
    let folder = Folder::hugging_face(&config, &tensors);
    for (name, content) in files {
        let content = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
        folder.write(name, content);
    }
    folder.open().map(|checkpoint| checkpoint.text().clone())
}

#[test]
fn templates_of_a_folder() {
    let named = json!({"chat_template": [
        {"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]});
    let cases: &[(Files, Option<&str>)] = &[
        (&[], None),
        (&[("tokenizer_config.json", json!({}))], None),
        (&[("tokenizer_config.json", json!({"chat_template": "C"}))], Some("C")),
        (&[("tokenizer_config.json", json!({"chat_template": null}))], None),
        (&[("tokenizer_config.json", named.clone())], Some("D")),
        (&[("tokenizer_config.json", json!({"chat_template": []}))], None),
        (
            &[
                ("tokenizer_config.json", named.clone()),
                ("chat_template.json", json!({"chat_template": "F"})),
            ],
            Some("F"),
        ),
        (&[("tokenizer_config.json", named), ("chat_template.jinja", json!("J"))], Some("J")),
    ];
    for (files, expected) in cases {
        let text = with_files(files).expect("a sound folder");
        assert_eq!(text.chat_template.as_deref(), *expected, "{files:?}");
    }
}

#[test]
fn tokens_of_a_folder() {
    let added =
        json!({"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "add_bos_token": true});
    let text = with_files(&[("tokenizer_config.json", added), ("tokenizer.json", json!({}))])
        .expect("a sound folder");
    assert_eq!((text.bos_token.as_deref(), text.eos_token.as_deref()), (Some("<s>"), Some("</s>")));
    assert!(text.add_bos);
    assert!(matches!(text.tokenizer, TokenizerAsset::Json(path) if path.ends_with("tokenizer.json")));
}

#[test]
fn further_end_tokens_of_a_folder() {
    let (mut config, tensors) = Model::small(Dtype::F32).hugging_face();
    config["eos_token_id"] = json!([9, 2]);
    let folder = Folder::hugging_face(&config, &tensors);
    folder.write("generation_config.json", json!({"eos_token_id": [7, 2]}).to_string());
    assert_eq!(folder.open().expect("a sound folder").config().eos, [2, 7, 9]);
}

#[test]
fn broken_text_files_are_refused() {
    let cases: &[(&str, Value, &str)] = &[
        ("tokenizer_config.json", json!("{"), "its JSON is not as expected"),
        ("tokenizer_config.json", json!({"chat_template": 7}), "expected a chat template"),
        ("tokenizer_config.json", json!({"bos_token": 7}), "expected a token's text"),
        ("chat_template.json", json!({}), "missing field `chat_template`"),
        ("chat_template.jinja", json!("x".repeat(2 << 20)), "it is longer than 1048576 bytes"),
        ("generation_config.json", json!([]), "its JSON is not as expected"),
    ];
    for (name, content, words) in cases {
        let (config, tensors) = Model::small(Dtype::F32).hugging_face();
        let folder = Folder::hugging_face(&config, &tensors);
        folder.write(name, content.as_str().map_or_else(|| content.to_string(), str::to_owned));
        assert_refused(name, folder.open(), &[name, words]);
    }
}

#[test]
fn defaults_of_the_reference_where_a_configuration_is_silent() {
    let silent = |model_type: &str, absent: &[&str]| {
        let (mut config, tensors) = Model::small(Dtype::F32).hugging_face();
        config["model_type"] = json!(model_type);
        for key in absent {
            config.as_object_mut().expect("an object").remove(*key);
        }
        Folder::hugging_face(&config, &tensors).open().map(|checkpoint| checkpoint.config().clone())
    };
    let mistral = silent("mistral", &["sliding_window", "rope_theta", "head_dim"]).expect("a sound folder");
    assert_eq!((mistral.window, mistral.rope_theta, mistral.head_dim), (Some(4096), 10_000.0, 16));
    let llama = silent("llama", &["sliding_window", "bos_token_id", "eos_token_id"]).expect("a sound folder");
    assert_eq!((llama.window, llama.bos, llama.eos), (None, None, vec![]));
    let no_size = silent("mistral", &["hidden_size"]).expect_err("nothing to assume");
    assert!(no_size.contains("missing field `hidden_size`"), "{no_size}");
}

#[test]
fn theta_of_a_native_checkpoint() {
    for (window, theta) in [(json!(16), 1e4), (json!(null), 1e6)] {
        let (mut params, tensors) = Model::small(Dtype::F32).native();
        params["sliding_window"] = window;
        let checkpoint = Folder::native(&params, &tensors).open().expect("a sound folder");
        assert_eq!(checkpoint.config().rope_theta, theta);
    }
}

#[test]
fn both_forms_in_a_folder_read_as_hugging_face() {
    let model = Model::small(Dtype::F32);
    let (config, tensors) = model.hugging_face();
    let folder = Folder::hugging_face(&config, &tensors);
    folder.write("params.json", "{}");
    folder.write("consolidated.safetensors", "not read");
    assert_holds(&folder.open().expect("a sound folder"), &model);
}

#[test]
fn vocabulary_of_a_gguf() {
    let mut file = Model::small(Dtype::F32).gguf();
    file.set("tokenizer.ggml.model", Meta::Text("llama".into()));
    file.set("tokenizer.ggml.tokens", Meta::Texts((0..40).map(|id| format!("▁{id}")).collect()));
    file.set("tokenizer.ggml.scores", Meta::F32s(vec![-0.5; 40]));
    file.set("tokenizer.ggml.token_type", Meta::I32s(vec![1; 40]));
    file.set("tokenizer.ggml.eot_token_id", Meta::U32(5));
    file.set("tokenizer.ggml.add_space_prefix", Meta::Bool(false));
    file.set("tokenizer.chat_template", Meta::Text("{{ messages }}".into()));
    let folder = Folder::new();
    let checkpoint = folder.open_gguf(file.encode()).expect("a sound file");
    assert_eq!(checkpoint.config().eos, [2, 5]);
    let text = checkpoint.text();
    assert_eq!((text.bos_token.as_deref(), text.eos_token.as_deref()), (Some("▁1"), Some("▁2")));
    assert_eq!(text.chat_template.as_deref(), Some("{{ messages }}"));
    assert!(text.add_bos, "SentencePiece models begin with it unless they say otherwise");
    let TokenizerAsset::Gguf(vocab) = &text.tokenizer else { panic!("no vocabulary") };
    assert_eq!((vocab.tokens[39].as_str(), vocab.scores[39], vocab.types[39]), ("▁39", -0.5, 1));
    assert!(!vocab.add_space_prefix && vocab.merges.is_empty());
}
