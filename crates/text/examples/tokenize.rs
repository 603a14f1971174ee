//! Milliseconds of a processor to tokenize texts that make careless tokenizers slow: `tokenize MODEL…`, each a checkpoint's folder or
//! GGUF file or a SentencePiece model. One thread; the best of five runs.

use std::path::Path;
use std::time::Duration;

use galerne_checkpoint::{Checkpoint, MistralVersion, SentencePieceFile, TextAssets, TokenizerAsset};
use galerne_text::Tokenizer;

const RUNS: usize = 5;

fn main() {
    for path in std::env::args().skip(1) {
        let tokenizer = Tokenizer::load(&assets(Path::new(&path))).expect("a tokenizer");
        println!("{path}: ms for 1 MiB, for 4 MiB");
        for (name, text) in texts(4 << 20) {
            let quarter = text.floor_char_boundary(1 << 20);
            let (one, four) = (time(&tokenizer, &text[..quarter]), time(&tokenizer, &text));
            println!("{name:24} {:8.1} {:8.1}", 1e3 * one.as_secs_f64(), 1e3 * four.as_secs_f64());
        }
    }
}

fn assets(path: &Path) -> TextAssets {
    if path.extension().is_some_and(|extension| extension == "model") {
        let file = SentencePieceFile { path: path.into(), version: Some(MistralVersion::V3), mistral: true };
        return TextAssets {
            tokenizer: TokenizerAsset::None,
            sentencepiece: Some(file),
            chat_template: None,
            bos_token: None,
            eos_token: None,
            add_bos: true,
        };
    }
    Checkpoint::open(path).expect("a checkpoint").text().clone()
}

fn time(tokenizer: &Tokenizer, text: &str) -> Duration {
    let run = |_| {
        let start = on_cpu();
        let tokens = tokenizer.encode(text, true).expect("tokens").len();
        assert!(tokens > 0);
        on_cpu() - start
    };
    (0..RUNS).map(run).min().unwrap_or_default()
}

/// Time that this thread has had a processor (Linux): a busy machine does not change it much.
fn on_cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux's scheduler statistics");
    let nanoseconds = stat.split(' ').next().and_then(|first| first.parse().ok());
    Duration::from_nanos(nanoseconds.expect("a number"))
}

fn texts(bytes: usize) -> Vec<(&'static str, String)> {
    let fill = |pattern: &str| {
        pattern.chars().cycle().take(bytes / pattern.len() * pattern.chars().count()).collect()
    };
    let mut state = 1u64;
    let mut random = |from: u32, count: u32| {
        let mut text = String::with_capacity(bytes + 4);
        while text.len() < bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text.extend(char::from_u32(from + (state >> 33) as u32 % count));
        }
        text
    };
    vec![
        ("one letter", fill("a")),
        ("random letters", random(0x61, 26)),
        ("random ASCII", random(0x20, 95)),
        ("random CJK", random(0x4e00, 20_000)),
        ("random common CJK", random(0x4e00, 300)),
        ("random emoji", random(0x1f300, 700)),
        ("one emoji", fill("😀")),
        ("spaces", fill(" ")),
        ("spaces, then a letter", fill(" ") + "a"),
        ("tabs and line ends", fill("\t\n\r\n ")),
        ("digits", fill("0123456789")),
        ("punctuation", fill("=-=!")),
        ("words", fill("The quick brown fox jumps over the lazy dog, and doesn't stop.\n")),
        ("mixed", fill("aa  😀é你好\n\n<|im_start|>xX01==  \u{300}ß ")),
        ("half special tokens", fill("<|im_start")),
        ("special tokens", fill("</s><|im_end|>")),
    ]
}
