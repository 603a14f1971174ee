use std::path::{Path, PathBuf};

use galerne_checkpoint::{Checkpoint, Config, Dtype, TokenizerAsset, Weight, dequantize};
use galerne_types::Quantize;

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

#[test]
fn tiny_mistral() {
    let checkpoint = Checkpoint::open(&repository("tests/golden/tiny-mistral")).expect("a golden checkpoint");
    let expected = Config {
        layers: 4,
        hidden: 64,
        heads: 8,
        kv_heads: 4,
        head_dim: 8,
        intermediate: 176,
        vocab: 512,
        rope_theta: 10_000.0,
        norm_eps: 1e-5,
        window: Some(16),
        context_tokens_max: 512,
        tied: false,
        bos: Some(1),
        eos: vec![2],
    };
    assert_eq!(checkpoint.config(), &expected);
    assert_eq!(checkpoint.name(), "tiny-mistral");
    assert!(matches!(checkpoint.text().tokenizer, TokenizerAsset::None));
    assert!(Weight::all(&expected).all(|weight| checkpoint.tensor(weight).dtype == Dtype::F32));
}

#[test]
fn bard() {
    let checkpoint = Checkpoint::open(&repository("tests/golden/bard-1m")).expect("a golden checkpoint");
    assert_eq!((checkpoint.config().vocab, checkpoint.config().window), (1024, Some(64)));
    assert_eq!(checkpoint.tensor(Weight::Down(3)).dtype, Dtype::Bf16);
    let text = checkpoint.text();
    let TokenizerAsset::Json(tokenizer) = &text.tokenizer else { panic!("{:?}", text.tokenizer) };
    assert!(tokenizer.ends_with("bard-1m/tokenizer.json"));
    assert_eq!((text.bos_token.as_deref(), text.eos_token.as_deref()), (Some("<s>"), Some("</s>")));
    assert_eq!(text.chat_template, None);
}

/// Held against values that an independent reader of the same file gave.
#[test]
fn smollm2() {
    let path = repository(".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let checkpoint = Checkpoint::open(&path).expect("the demo model, which `make test` fetches");
    let config = checkpoint.config();
    assert_eq!((config.layers, config.heads, config.kv_heads, config.head_dim), (30, 9, 3, 64));
    assert_eq!((config.rope_theta, config.norm_eps, config.window), (100_000.0, 1e-5, None));
    assert_eq!((config.bos, config.eos.as_slice(), config.tied), (Some(1), &[2][..], true));
    assert_eq!(checkpoint.tensor(Weight::Head).dtype, Dtype::Q8_0);
    assert_eq!(checkpoint.tensor(Weight::Q(0)).dtype, Dtype::Q4_1);
    let first = |weight, row: usize| {
        let (mut bytes, mut row_values) = (Vec::new(), [0.0; 32]);
        checkpoint.read_rows(weight, row..row + 1, 0..32, &mut bytes).expect("a block");
        dequantize(checkpoint.tensor(weight).dtype, &bytes, &mut row_values);
        [row_values[0], row_values[1], row_values[16], row_values[31]]
    };
    assert_eq!(first(Weight::Embedding, 1000), [-0.11193848, -0.07395935, -0.081954956, 0.21188354]);
    assert_eq!(first(Weight::Q(0), 65), [-0.08554077, -0.20996094, 0.4121399, 0.12182617]);
    assert_eq!(first(Weight::K(29), 190), [-0.113220215, -0.113220215, 0.12771606, -0.06503296]);
    assert_eq!(first(Weight::Down(3), 575), [0.010620117, 0.0769043, 0.0769043, 0.14318848]);
    let text = checkpoint.text();
    let TokenizerAsset::Gguf(vocab) = &text.tokenizer else { panic!("no vocabulary") };
    assert_eq!((vocab.model.as_str(), vocab.pre.as_deref()), ("gpt2", Some("smollm")));
    assert_eq!((vocab.tokens.len(), vocab.types.len(), vocab.merges.len()), (49152, 49152, 48900));
    assert_eq!((vocab.bos, vocab.eos, vocab.unk), (Some(1), Some(2), Some(0)));
    assert_eq!(text.bos_token.as_deref(), Some("<|im_start|>"));
    assert!(text.chat_template.as_deref().is_some_and(|template| template.contains("SmolLM")));
    assert!(!text.add_bos);
}

/// Half a step of the format, what f16 makes of its scale, and in Q4_0 a whole step where a value has the other sign than
/// the largest.
#[test]
fn what_is_quantized_at_load_is_off_by_a_step_at_most() {
    let path = repository("tests/golden/bard-1m");
    let open = || Checkpoint::open(&path).expect("a golden checkpoint");
    for (quantize, steps) in [(Quantize::Q8_0, 0.5 / 127.0), (Quantize::Q4_0, 1.0 / 8.0)] {
        let (stored, quantized) = (open(), open().quantized(quantize));
        let values = |checkpoint: &Checkpoint, weight: Weight| {
            let info = checkpoint.tensor(weight);
            let (mut bytes, mut values) = (Vec::new(), vec![0.0; info.rows * info.cols]);
            checkpoint.read_rows(weight, 0..info.rows, 0..info.cols, &mut bytes).expect("a whole tensor");
            dequantize(info.dtype, &bytes, &mut values);
            values
        };
        for weight in Weight::all(stored.config()) {
            let (expected, found) = (values(&stored, weight), values(&quantized, weight));
            for (expected, found) in expected.chunks(32).zip(found.chunks(32)) {
                let most = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
                let error = expected.iter().zip(found).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max);
                assert!(
                    error <= most * (steps + 0.0005) + 4e-6,
                    "{weight} as {quantize}: off by {error} of {most}"
                );
                assert!(!weight.is_norm() || error == 0.0, "{weight}");
            }
        }
    }
}
