use galerne_checkpoint::Dtype;

use crate::support::gguf::{Gguf, Meta, Tensor};
use crate::support::{Folder, Model, assert_refused};

type Bend<'a> = &'a dyn Fn(&mut Gguf);
type Case<'a> = (&'a str, Bend<'a>, &'a [&'a str]);

const Q: &str = "blk.0.attn_q.weight";
const NORM: &str = "blk.1.attn_norm.weight";

fn refuse(dtype: Dtype, cases: &[Case]) {
    let folder = Folder::new();
    for (case, bend, words) in cases {
        let mut file = Model::small(dtype).gguf();
        bend(&mut file);
        assert_refused(case, folder.open_gguf(file.encode()), &[&["small.gguf: "], *words].concat());
    }
}

#[test]
fn inconsistent_tensors() {
    let cases: &[Case] = &[
        ("missing", &|f| f.tensors.retain(|tensor| tensor.name != NORM), &["bytes that belong to nothing"]),
        (
            "renamed",
            &|f| f.tensor(Q).name = "blk.2.attn_q.weight".into(),
            &[Q, "expected the query projection of layer 0"],
        ),
        ("twice", &|f| f.tensor(NORM).name = Q.into(), &[Q, "expected one of this name, found two"]),
        (
            "a bias",
            &|f| f.push("blk.0.attn_q.bias", Dtype::F32, &[64], &[0; 256]),
            &["attn_q.bias", "without biases"],
        ),
        (
            "stretched RoPE",
            &|f| f.push("rope_freqs.weight", Dtype::F32, &[8], &[0; 32]),
            &["rope_freqs.weight", "would be left out"],
        ),
        (
            "transposed",
            &|f| f.tensor("blk.0.ffn_up.weight").dims.reverse(),
            &["ffn_up", "expected shape [96, 64], found shape [64, 96]"],
        ),
        ("F64", &|f| f.tensor(NORM).kind = 28, &[NORM, "a dtype among", "`type 28`"]),
        ("Q5_K", &|f| f.tensor(Q).kind = 13, &[Q, "a dtype among", "`Q5_K`"]),
        ("half a super-block", &|f| f.tensor(Q).kind = 14, &[Q, "in whole blocks", "Q6_K [64, 64]"]),
        (
            "a quantized norm",
            &|f| quantize_norm(f),
            &["output_norm.weight", "expected F32, F16 or BF16, found Q8_0"],
        ),
        ("another width", &|f| f.tensor(Q).kind = 1, &["bytes that belong to nothing"]),
        ("no dimensions", &|f| f.tensor(Q).dims.clear(), &[Q, "1 to 4 dimensions"]),
        ("five dimensions", &|f| f.tensor(Q).dims = vec![1; 5], &[Q, "1 to 4 dimensions, found 5"]),
        ("zero", &|f| f.tensor(Q).dims = vec![0, 0], &["that belong to nothing"]),
        ("an overflowing shape", &|f| f.tensor(Q).dims = vec![u64::MAX; 4], &[Q, "a shape that fits"]),
        ("an overflowing size", &|f| f.tensor(Q).dims = vec![u64::MAX / 4, 2], &[Q, "a shape that fits"]),
        ("offset past the end", &|f| f.tensor(Q).offset = 1 << 40, &[Q, "cut short"]),
        ("offset overflow", &|f| f.tensor(Q).offset = u64::MAX - 31, &[Q, "a multiple of 32"]),
        ("offset off its alignment", &|f| f.tensor(Q).offset += 4, &[Q, "a multiple of 32"]),
        ("overlapping offsets", &|f| f.tensor(Q).offset = 32, &["overlap"]),
        ("cut short", &|f| f.data.truncate(f.data.len() - 1), &["output.weight", "cut short"]),
        ("oversized", &|f| f.data.extend([0; 32]), &["the last of its 21 tensors ends at", "oversized"]),
    ];
    refuse(Dtype::F32, cases);
    refuse(Dtype::Q4_1, &[("a cut block", &|f| f.tensor(Q).dims = vec![48, 64], &[Q, "in whole blocks"])]);
}

#[test]
fn metadata() {
    let text = |text: &str| Meta::Text(text.into());
    let array = |kind: u32, len: u64| Meta::Raw(9, [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat());
    let cases: &[(&str, Meta, &str)] = &[
        ("general.architecture", text("qwen2"), "`qwen2`"),
        ("llama.block_count", Meta::U32(u32::MAX), "the number of layers is 4294967295"),
        ("llama.block_count", text("2"), "`2` under `llama.block_count`; expected a whole number"),
        ("llama.block_count", Meta::I32(-2), "-2 under `llama.block_count`"),
        ("llama.attention.head_count", Meta::I32s(vec![4, 4]), "an array of type 5"),
        ("llama.attention.head_count", Meta::U32(0), "attention heads is 0"),
        ("llama.attention.head_count_kv", Meta::U32(0), "key/value heads is 0"),
        ("llama.rope.dimension_count", Meta::U32(8), "rope.dimension_count is 8"),
        ("llama.attention.value_length", Meta::U32(8), "value_length is 8"),
        ("llama.rope.freq_base", Meta::F32(f32::NAN), "theta is NaN"),
        ("llama.rope.freq_base", Meta::U32(10_000), "expected a number with a fraction"),
        ("llama.attention.layer_norm_rms_epsilon", Meta::F32(f32::INFINITY), "epsilon is inf"),
        ("llama.rope.scaling.type", text("yarn"), "RoPE is scaled (`yarn`)"),
        ("llama.rope.scaling.factor", Meta::F32(4.0), "RoPE is scaled"),
        ("llama.expert_count", Meta::U32(8), "8 experts"),
        ("split.count", Meta::U32(3), "one of 3 parts"),
        ("llama.vocab_size", Meta::U32(41), "expected shape [41, 64], found shape [40, 64]"),
        ("tokenizer.ggml.eos_token_id", Meta::U32(40), "the special token 40"),
        ("general.alignment", Meta::U32(0), "alignment is 0"),
        ("general.alignment", Meta::U32(48), "alignment is 48"),
        ("general.alignment", Meta::U32(1 << 31), "alignment is 2147483648"),
        ("unknown type", Meta::Raw(13, vec![]), "unknown type 13"),
        ("flag of 2", Meta::Raw(7, vec![2]), "a flag of value 2"),
        ("nested arrays", array(9, 1), "an array of arrays"),
        ("long array", array(12, u64::MAX), "header would end at byte 18446744073709551615"),
        ("long array of texts", array(8, u64::MAX), "header would end at byte"),
        ("long text", Meta::Raw(8, (1u64 << 60).to_le_bytes().to_vec()), "header would end at byte"),
        ("no UTF-8", Meta::Raw(8, vec![1, 0, 0, 0, 0, 0, 0, 0, 0xFF]), "is not UTF-8"),
    ];
    for (key, value, words) in cases {
        refuse(Dtype::F32, &[(key, &|f| f.set(key, value.clone()), &[words])]);
    }
    for key in ["general.architecture", "llama.block_count", "llama.context_length"] {
        refuse(Dtype::F32, &[(key, &|f| f.remove(key), &["its metadata lacks", key])]);
    }
    let headless = |f: &mut Gguf| {
        f.remove("llama.attention.key_length");
        f.set("llama.attention.head_count", Meta::U32(0));
    };
    let twice = |f: &mut Gguf| f.metadata.push(("llama.block_count".into(), Meta::U32(2)));
    let cases: &[Case] = &[
        ("no heads", &headless, &["0 heads do not divide 64"]),
        ("a key twice", &twice, &["`llama.block_count` twice"]),
    ];
    refuse(Dtype::F32, cases);
}

#[test]
fn vocabulary() {
    let tokens = |len: usize| Meta::Texts((0..len).map(|id| format!("t{id}")).collect());
    let with = |f: &mut Gguf, key: &str, value: Meta| {
        f.set("tokenizer.ggml.model", Meta::Text("llama".into()));
        f.set("tokenizer.ggml.tokens", tokens(40));
        f.set(&format!("tokenizer.ggml.{key}"), value);
    };
    let not_utf8 = [&8u32.to_le_bytes()[..], &1u64.to_le_bytes(), &1u64.to_le_bytes(), b"\xFF"].concat();
    let cases: &[Case] = &[
        ("fewer tokens", &|f| with(f, "tokens", tokens(39)), &["39 tokens, its model 40"]),
        ("numbers for tokens", &|f| with(f, "tokens", Meta::I32s(vec![0; 40])), &["an array of texts"]),
        (
            "tokens that are no text",
            &|f| with(f, "tokens", Meta::Raw(9, not_utf8.clone())),
            &["element 0 of `tokenizer.ggml.tokens` is not UTF-8"],
        ),
        ("fewer scores", &|f| with(f, "scores", Meta::F32s(vec![0.0; 3])), &["scores has 3 entries"]),
        ("more types", &|f| with(f, "token_type", Meta::I32s(vec![1; 41])), &["token_type has 41 entries"]),
        ("unknown beyond", &|f| with(f, "unknown_token_id", Meta::U32(40)), &["beyond the 40 it has"]),
    ];
    refuse(Dtype::F32, cases);
}

#[test]
fn broken_headers() {
    let sound = Model::small(Dtype::F32).gguf().encode();
    let patched = |at: usize, bytes: &[u8]| {
        let mut file = sound.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("empty", Vec::new(), "does not begin with `GGUF`"),
        ("three bytes", b"GGU".to_vec(), "does not begin with `GGUF`"),
        ("another file", b"PK\x03\x04 and so on".to_vec(), "does not begin with `GGUF`"),
        ("only the magic", b"GGUF".to_vec(), "header would end at byte 8, but the file has 4"),
        ("version 1", patched(4, &1u32.to_le_bytes()), "GGUF version 1; expected 2 or 3"),
        ("big-endian", patched(4, &3u32.to_be_bytes()), "(big-endian)"),
        ("many tensors", patched(8, &u64::MAX.to_le_bytes()), "it claims 18446744073709551615 tensors"),
        ("a tensor more", patched(8, &22u64.to_le_bytes()), "small.gguf: "),
        ("a tensor less", patched(8, &20u64.to_le_bytes()), "small.gguf: "),
        ("many entries", patched(16, &u64::MAX.to_le_bytes()), "18446744073709551615 metadata entries"),
        ("an entry less", patched(16, &12u64.to_le_bytes()), "small.gguf: "),
        ("a long key", patched(24, &u64::MAX.to_le_bytes()), "header would end at byte 18446744073709551615"),
    ];
    let folder = Folder::new();
    for (case, content, words) in cases {
        assert_refused(case, folder.open_gguf(content), &[words]);
    }
    for len in (0..2000).step_by(13) {
        assert_refused("cut within the header", folder.open_gguf(&sound[..len]), &["small.gguf: "]);
    }
}

/// Tiles the file as before: 64 F32 become 64 · 32 / 34 … which no whole blocks do, so its bytes are replaced.
fn quantize_norm(file: &mut Gguf) {
    let norm = file.tensor("output_norm.weight").clone();
    file.tensors.retain(|tensor| tensor.name != norm.name);
    let (at, old, new) = (norm.offset as usize, 64 * 4, 96);
    file.data.splice(at..at + old, vec![0; new]);
    for tensor in &mut file.tensors {
        if tensor.offset > norm.offset {
            tensor.offset -= (old - new) as u64;
        }
    }
    file.tensors.push(Tensor { kind: 8, ..norm });
}
