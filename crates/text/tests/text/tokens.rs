use std::sync::LazyLock;

use galerne_checkpoint::{GgufVocab, TokenizerAsset};
use galerne_text::{TextError, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::models::{assets, bard, bard_path, demo, golden, ids, mistral, mistral_vocab, shared_golden};

/// Everything that Hugging Face's tokenizer says about a list of texts.
fn agrees_with_hugging_face(tokenizer: &Tokenizer, cases: &Value) {
    for case in cases.as_array().expect("cases") {
        let text = case["text"].as_str().expect("text");
        let expected = ids(&case["ids"]);
        assert_eq!(tokenizer.encode(text, false).expect(text), expected, "{text:?}");
        assert_eq!(
            tokenizer.encode(text, true).expect(text),
            ids(&case["with_special"]),
            "{text:?} with BOS"
        );
        assert_eq!(tokenizer.encode_plain(text).expect(text), ids(&case["plain"]), "{text:?} as plain text");
        assert_eq!(tokenizer.decode(&expected, false), case["decoded"], "{text:?}");
        assert_eq!(tokenizer.decode(&expected, true), case["skipped"], "{text:?} without special tokens");
        let bytes = expected.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect::<Vec<_>>();
        assert_eq!(String::from_utf8_lossy(&bytes), tokenizer.decode(&expected, false), "{text:?}");
    }
}

#[test]
fn a_tokenizer_json_reads_as_in_hugging_face() {
    agrees_with_hugging_face(&bard(), &golden("bard_tokens.json"));
    assert_eq!(bard().vocab_size(), 1024);
}

#[test]
fn byte_level_bpe_from_gguf_reads_as_in_hugging_face() {
    let tokenizer = Tokenizer::load(&demo()).expect("SmolLM2's tokenizer");
    agrees_with_hugging_face(&tokenizer, &golden("smollm2_tokens.json"));
    for case in shared_golden("smollm2-135m.json")["cases"].as_array().expect("cases") {
        let prompt = case["prompt"].as_str().expect("prompt");
        assert_eq!(tokenizer.encode(prompt, true).expect(prompt), ids(&case["prompt_ids"]), "{prompt:?}");
        assert_eq!(tokenizer.decode(&ids(&case["greedy_ids"]), false), case["greedy_text"]);
    }
    assert_eq!(tokenizer.vocab_size(), 49152);
    assert!(tokenizer.is_special(1) && !tokenizer.is_special(28));
}

#[test]
fn sentencepiece_bpe_reads_as_in_mistral_common() {
    let cases = golden("mistral_tokens.json");
    for version in ["v1", "v2", "v3"] {
        let gguf = Tokenizer::load(&assets(TokenizerAsset::Gguf(mistral_vocab(version)))).expect(version);
        for tokenizer in [mistral(version), gguf] {
            for case in cases.as_array().expect("cases") {
                let text = case["text"].as_str().expect("text");
                let expected = ids(&case[version]);
                assert_eq!(tokenizer.encode_plain(text).expect(text), expected, "{version} {text:?}");
                assert_eq!(tokenizer.decode(&expected, true), case["decoded"], "{version} {text:?}");
            }
        }
    }
}

#[test]
fn sentencepiece_reads_special_tokens_only_where_it_may() {
    let tokenizer = mistral("v3");
    let encode = |text| tokenizer.encode(text, false).expect(text);
    let (hi, spaced) = (encode("hi"), encode(" hi "));
    // Each stretch of text between two special tokens starts with its own silent space.
    assert_eq!(encode("[INST] hi [/INST]"), [vec![3], spaced, vec![4]].concat());
    assert_eq!(encode("<s>hi</s>"), [vec![1], hi.clone(), vec![2]].concat());
    assert_eq!(tokenizer.encode("hi", true).expect("hi"), [vec![1], hi].concat());
    assert_eq!(tokenizer.encode("", true).expect("nothing"), [1]);
    assert!(
        !tokenizer.encode_plain("<s>[INST]</s>").expect("text").iter().any(|&id| tokenizer.is_special(id))
    );
    assert_eq!(tokenizer.decode(&encode("<s>hi</s>"), true), "hi");
}

#[test]
fn an_id_without_a_token_is_nothing() {
    let tokenizer = bard();
    assert_eq!(tokenizer.decode(&[u32::MAX, 1024], false), "");
    assert!(tokenizer.token_bytes(1024).is_empty() && !tokenizer.is_special(1024));
}

/// A byte-level GGUF vocabulary of the 256 bytes and the words given, each with the merge that makes it.
fn byte_level(pre: Option<&str>, merges: &[&str]) -> Result<Tokenizer, TextError> {
    let alphabet = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff).chain(0x100..=0x143);
    let mut tokens =
        alphabet.map(|c| char::from_u32(c).expect("a character").to_string()).collect::<Vec<_>>();
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    Tokenizer::load(&assets(TokenizerAsset::Gguf(GgufVocab {
        model: "gpt2".into(),
        pre: pre.map(Into::into),
        types: vec![1; tokens.len()],
        tokens,
        merges: merges.iter().map(|&merge| merge.into()).collect(),
        scores: Vec::new(),
        bos: None,
        eos: None,
        unk: None,
        add_space_prefix: false,
    })))
}

#[test]
fn a_gguf_names_how_text_is_cut_into_words() {
    let merges = ["1 2", "3 4", "12 34", "' S", "! Ċ"];
    let words = |pre: &str, text: &str| {
        let tokenizer = byte_level(Some(pre), &merges).expect(pre);
        let ids = tokenizer.encode(text, false).expect(text);
        ids.iter()
            .map(|&id| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(words("gpt-2", "1234"), ["1234"]);
    assert_eq!(words("smollm", "1234"), ["1", "2", "3", "4"]);
    assert_eq!(words("llama-bpe", "1234"), ["12", "3", "4"], "digits by three");
    assert_eq!(words("llama-bpe", "X'S!\n"), ["X", "'S", "!\n"]);
    assert_eq!(words("gpt-2", "X'S!\n"), ["X", "'", "S", "!", "\n"]);
}

#[test]
fn what_is_not_understood_is_refused_with_a_sentence() {
    let refusal = |change: fn(&mut GgufVocab)| {
        let mut vocab = mistral_vocab("v1");
        change(&mut vocab);
        let tokenizer = Tokenizer::load(&assets(TokenizerAsset::Gguf(vocab)));
        tokenizer.err().expect("a refusal").to_string()
    };
    assert!(refusal(|v| v.model = "bert".into()).contains("its kind is `bert`"));
    assert!(refusal(|v| v.scores.clear()).contains("one score for each token"));
    assert!(refusal(|v| v.scores[9] = f32::NAN).contains("one score for each token"));
    assert!(refusal(|v| v.types[3] = 1).contains("no token for the byte 0x00"));
    assert!(refusal(|v| v.tokens[3] = "x".into()).contains("token 3 has the type of a byte"));
    assert!(byte_level(Some("qwen2"), &[]).err().expect("a refusal").to_string().contains("`qwen2`"));
    assert!(byte_level(None, &["ab"]).err().expect("a refusal").to_string().contains("two tokens"));
    assert!(matches!(Tokenizer::load(&assets(TokenizerAsset::None)), Err(TextError::NoTokenizer)));

    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.json");
    let load =
        || Tokenizer::load(&assets(TokenizerAsset::Json(path.clone()))).err().expect("a refusal").to_string();
    assert!(load().contains("cannot read"));
    std::fs::write(&path, "{\"version\":").expect("written");
    assert!(load().contains("not a usable tokenizer.json"));
    let mut json: Value = serde_json::from_slice(&std::fs::read(bard_path()).expect("read")).expect("JSON");
    json["decoder"] = serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    std::fs::write(&path, json.to_string()).expect("written");
    assert!(load().contains("`WordPiece`"));
}

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// bard-1m's tokenizer with other ways to cut text into words and other added tokens, ours and the reference.
static VARIANTS: LazyLock<Vec<(Tokenizer, tokenizers::Tokenizer)>> = LazyLock::new(|| {
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let words =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let digits = json!({"type": "Digits", "individual_digits": true});
    let split =
        json!({"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": false});
    let sequence = |stages: &[&Value]| json!({"type": "Sequence", "pretokenizers": stages});
    let odd = json!({"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Removed", "invert": false});
    let cuts = [
        words.clone(),
        bytes.clone(),
        sequence(&[&digits, &words]),
        sequence(&[&split, &bytes]),
        sequence(&[&odd, &bytes]),
    ];
    let folder = tempfile::tempdir().expect("a folder");
    let variants =
        cuts.into_iter().flat_map(|cut| [false, true].map(|ignore_merges| (cut.clone(), ignore_merges)));
    let variants = variants.enumerate().map(|(place, (cut, ignore_merges))| {
        let mut json: Value = serde_json::from_slice(&std::fs::read(bard_path()).expect("read")).expect("JSON");
        json["pre_tokenizer"] = cut;
        json["model"]["ignore_merges"] = ignore_merges.into();
        if place % 3 > 0 {
            // The token of a byte that it never saw.
            json["model"]["vocab"].as_object_mut().expect("a vocabulary").remove("Ā").expect("a token");
        }
        if place % 3 > 1 {
            json["model"]["unk_token"] = "!".into();
        }
        let added = json["added_tokens"].as_array_mut().expect("added tokens");
        for (content, special, normalized) in [("<x>", true, false), ("<x", false, true), ("ab", false, false)] {
            let id = 1100 + added.len();
            added.push(json!({"id": id, "content": content, "special": special, "normalized": normalized, "single_word": false, "lstrip": false, "rstrip": false}));
        }
        let path = folder.path().join(format!("{place}.json"));
        std::fs::write(&path, json.to_string()).expect("written");
        let ours = Tokenizer::load(&assets(TokenizerAsset::Json(path.clone()))).expect("ours");
        (ours, tokenizers::Tokenizer::from_file(path).expect("the reference"))
    });
    variants.collect()
});

proptest! {
    #[test]
    fn byte_level_bpe_is_hugging_faces(words in prop::collection::vec(prop::sample::select(vec![
        " ", "  ", "\n", "\r\n", "\t", "\u{a0}", "\u{2028}", "a", "b", "the", " the", "The", "'s", "'LL", "'ve", "1", "٣", "½", "12", "é", "e\u{301}", "你好", "😀",
        "<x>", "<x", ">", "<|endoftext|>", "<s>", "</s>", "=-", "!", "ROMEO:", "\u{0}", "ǅ",
    ]), 0..24), free in "\\PC{0,12}") {
        let text = words.concat() + &free;
        for (ours, reference) in VARIANTS.iter() {
            for special in [false, true] {
                let expected = reference.encode_fast(text.as_str(), special).expect("ids").get_ids().to_vec();
                prop_assert_eq!(ours.encode(&text, special).expect("ids"), expected, "{:?}", &text);
            }
        }
    }

    /// Long words are merged by other means than short ones; a border that nothing crosses must not change anything.
    #[test]
    fn long_words_are_merged_as_short_ones(word in "[aeht]{1,4}", times in 300usize..700) {
        let text = word.repeat(times);
        for (ours, reference) in VARIANTS.iter().take(2) {
            let expected = reference.encode_fast(text.as_str(), false).expect("ids").get_ids().to_vec();
            prop_assert_eq!(ours.encode(&text, false).expect("ids"), expected, "{:?}", &word);
        }
    }
}

/// Texts that make careless tokenizers quadratic.
fn worst_cases(bytes: usize) -> [(&'static str, String); 7] {
    let fill = |pattern: &str| {
        pattern.chars().cycle().take(bytes / pattern.len() * pattern.chars().count()).collect()
    };
    [
        ("one letter", fill("a")),
        ("spaces, then a letter", fill(" ") + "a"),
        ("digits", fill("0123456789")),
        ("punctuation", fill("=-=!")),
        ("emoji", fill("😀")),
        ("half special tokens", fill("<|im_start")),
        ("special tokens", fill("</s><|im_end|>")),
    ]
}

/// Quadratic time on a MiB would be minutes; `examples/tokenize.rs` measures.
#[test]
fn long_texts_of_anything_come_back() {
    let byte_level = Tokenizer::load(&demo()).expect("SmolLM2's tokenizer");
    for (name, tokenizer) in [("byte level", byte_level), ("SentencePiece", mistral("v3"))] {
        for (case, text) in worst_cases(1 << 20) {
            let ids = tokenizer.encode_plain(&text).expect(case);
            assert!(tokenizer.decode(&ids, false) == text, "{name}, {case}");
        }
    }
}
