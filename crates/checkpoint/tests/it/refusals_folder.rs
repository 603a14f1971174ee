use galerne_checkpoint::{Checkpoint, Dtype};
use serde_json::{Value, json};

use crate::support::safetensors::Safetensors;
use crate::support::{Folder, Model, assert_refused};

/// What happens to a sound file, and words of the sentence that refuses it.
type Case<'a> = (&'a str, &'a dyn Fn(&mut Safetensors), &'a [&'a str]);

const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const NORM: &str = "model.layers.1.input_layernorm.weight";

fn refuse(cases: &[Case]) {
    for (case, bend, words) in cases {
        let (config, mut tensors) = Model::small(Dtype::F32).hugging_face();
        bend(&mut tensors);
        assert_refused(case, Folder::hugging_face(&config, &tensors).open(), words);
    }
}

#[test]
fn inconsistent_tensors() {
    let cases: &[Case] = &[
        ("missing", &|f| drop(f.header.remove(NORM)), &["model.safetensors", "that belong to nothing"]),
        (
            "missing with its bytes",
            &|f| {
                f.header.remove("lm_head.weight");
                f.data.truncate(f.data.len() - 40 * 64 * 4);
            },
            &["tensor `lm_head.weight`", "expected the head, 40 × 64", "no tensor of this name"],
        ),
        (
            "renamed",
            &|f| rename(f, Q, "model.layers.2.self_attn.q_proj.weight"),
            &[Q, "expected the query projection"],
        ),
        (
            "a bias",
            &|f| f.push("model.layers.0.self_attn.q_proj.bias", Dtype::F32, &[64], &[0; 256]),
            &["q_proj.bias", "without biases"],
        ),
        (
            "a layer more",
            &|f| f.push("model.layers.2.x", Dtype::F32, &[1], &[0; 4]),
            &["layers.2.x", "only the weights of 2 layers"],
        ),
        (
            "transposed",
            &|f| f.header["model.layers.0.mlp.up_proj.weight"]["shape"] = json!([64, 96]),
            &["up_proj", "expected shape [96, 64], found shape [64, 96]"],
        ),
        (
            "a norm as matrix",
            &|f| f.header[NORM]["shape"] = json!([1, 64]),
            &[NORM, "expected shape [64], found shape [1, 64]"],
        ),
        ("fewer dimensions", &|f| f.header[Q]["shape"] = json!([4096]), &[Q, "[64, 64]", "[4096]"]),
    ];
    refuse(cases);
}

#[test]
fn entries_that_are_no_tensors() {
    let cases: &[Case] = &[
        ("I64", &|f| f.header[NORM]["dtype"] = json!("I64"), &[NORM, "a dtype among", "`I64`"]),
        ("F8", &|f| f.header[Q]["dtype"] = json!("F8_E4M3"), &[Q, "`F8_E4M3`"]),
        (
            "another width",
            &|f| f.header[Q]["dtype"] = json!("BF16"),
            &[Q, "expected 8192 bytes for BF16", "data_offsets"],
        ),
        (
            "a dtype that is a number",
            &|f| f.header[Q]["dtype"] = json!(7),
            &[Q, "dtype, shape and data_offsets"],
        ),
        (
            "no shape",
            &|f| drop(f.header[Q].as_object_mut().expect("an object").remove("shape")),
            &[Q, "missing field `shape`"],
        ),
        ("a negative shape", &|f| f.header[Q]["shape"] = json!([-64, -64]), &[Q, "invalid value"]),
        ("a fractional shape", &|f| f.header[Q]["shape"] = json!([64.0, 64]), &[Q, "floating point"]),
        (
            "an overflowing shape",
            &|f| f.header[Q]["shape"] = json!([u64::MAX, u64::MAX]),
            &[Q, "a shape that fits"],
        ),
        ("an overflowing size", &|f| f.header[Q]["shape"] = json!([u64::MAX / 2]), &[Q, "a shape that fits"]),
        (
            "a million dimensions",
            &|f| f.header[Q]["shape"] = json!(vec![1; 1_000_000]),
            &[Q, "and more dimensions"],
        ),
        ("nested shapes", &|f| f.header[Q]["shape"] = json!([[64, 64]]), &[Q, "invalid type"]),
        ("a tensor that is none", &|f| f.header[Q] = json!({}), &[Q, "missing field"]),
    ];
    refuse(cases);
}

#[test]
fn offsets_that_do_not_tile_the_file() {
    let offsets = |name: &'static str, start: u64, end: u64| {
        move |file: &mut Safetensors| file.header[name]["data_offsets"] = json!([start, end])
    };
    let cases: &[Case] = &[
        ("offsets backwards", &offsets(Q, 16384, 0), &[Q, "data_offsets 16384 to 0"]),
        ("overlapping offsets", &offsets(Q, 0, 16384), &["overlap"]),
        ("offsets past the end", &offsets(Q, 1 << 40, (1 << 40) + 16384), &[Q, "a file of", "cut short"]),
        ("overflowing offsets", &offsets(Q, u64::MAX - 16384, u64::MAX), &[Q, "cut short"]),
        ("cut short", &|f| f.data.truncate(f.data.len() - 1), &["lm_head.weight", "cut short"]),
        ("oversized", &|f| f.data.push(0), &["the last of its 21 tensors ends at", "oversized"]),
    ];
    refuse(cases);
}

#[test]
fn broken_headers() {
    let (config, tensors) = Model::small(Dtype::F32).hugging_face();
    let sound = tensors.encode();
    let header = Value::from(tensors.header.clone()).to_string();
    let twice = header.replacen('{', &format!("{{\"{NORM}\":{},", tensors.header[NORM]), 1);
    let many = format!("{{{}\"x\":0}}", (0..70_000).map(|id| format!("\"{id}\":0,")).collect::<String>());
    let with_length = |length: u64| [&length.to_le_bytes(), &sound[8..]].concat();
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("empty", Vec::new(), "its header would end at byte 8, but the file has 0"),
        ("seven bytes", vec![0; 7], "but the file has 7"),
        ("no header", vec![0; 8], "its JSON is not as expected"),
        ("a longer header than file", with_length(1 << 40), "its header would end at byte"),
        ("the longest header", with_length(u64::MAX), "its header would end at byte 18446744073709551615"),
        ("a shorter header", with_length(100), "its JSON is not as expected"),
        ("no JSON", tensors.encode_with("pickle"), "its JSON is not as expected"),
        ("a list", tensors.encode_with("[]"), "expected an object"),
        ("deep nesting", tensors.encode_with(&"[".repeat(100_000)), "its JSON is not as expected"),
        ("deep objects", tensors.encode_with(&"{\"a\":".repeat(100_000)), "its JSON is not as expected"),
        ("no UTF-8", [&7u64.to_le_bytes()[..], b"{\"\xFF\":1}"].concat(), "its JSON is not as expected"),
        ("NaN", tensors.encode_with("{\"a\": NaN}"), "its JSON is not as expected"),
        ("a tensor twice", tensors.encode_with(&twice), "is listed twice"),
        ("many entries", tensors.encode_with(&many), "more than 65536 entries"),
        ("a flood", tensors.encode_with(&json!({"x".repeat(1 << 20): 1}).to_string()), "…"),
    ];
    for (case, content, words) in cases {
        let folder = Folder::hugging_face(&config, &tensors);
        folder.write("model.safetensors", content);
        assert_refused(case, folder.open(), &["model.safetensors", words]);
    }
}

#[test]
fn a_header_longer_than_any() {
    let (config, tensors) = Model::small(Dtype::F32).hugging_face();
    let folder = Folder::hugging_face(&config, &tensors);
    let sparse = std::fs::File::create(folder.path().join("model.safetensors")).expect("a file");
    sparse.set_len(1 << 40).expect("a sparse file");
    std::os::unix::fs::FileExt::write_all_at(&sparse, &(1u64 << 39).to_le_bytes(), 0).expect("a length");
    assert_refused("sparse", folder.open(), &["expected at most 16777216"]);
}

#[test]
fn configurations() {
    let deep = (0..200).fold(json!(1), |inner, _| json!([inner]));
    let cases: &[(&str, Value, &str)] = &[
        ("num_attention_heads", json!(0), "the number of attention heads is 0"),
        ("num_key_value_heads", json!(0), "the number of key/value heads is 0"),
        ("num_key_value_heads", json!(3), "4 attention heads do not divide among 3"),
        ("num_hidden_layers", json!(3), "layers.2.input_layernorm"),
        ("num_hidden_layers", json!(1), "only the weights of 1 layers"),
        ("num_hidden_layers", json!(u64::MAX), "the number of layers is 18446744073709551615"),
        ("num_hidden_layers", json!(-1), "its JSON is not as expected"),
        ("hidden_size", json!(1e300), "its JSON is not as expected"),
        ("hidden_size", json!(u64::MAX), "the hidden size is"),
        ("head_dim", json!(15), "the head dimension is 15; RoPE needs an even one"),
        ("head_dim", json!(32), "expected shape [128, 64], found shape [64, 64]"),
        ("vocab_size", json!(41), "expected shape [41, 64], found shape [40, 64]"),
        ("max_position_embeddings", json!(0), "the context length is 0"),
        ("rope_theta", json!(0.0), "RoPE's theta is 0"),
        ("rope_theta", json!("NaN"), "its JSON is not as expected"),
        ("rms_norm_eps", json!(-1e-5), "the norms' epsilon"),
        ("rms_norm_eps", json!(1e300), "the norms' epsilon"),
        ("sliding_window", json!(0), "the sliding window is 0"),
        ("sliding_window", json!([1]), "its JSON is not as expected"),
        ("bos_token_id", json!(40), "the special token 40 lies beyond the vocabulary of 40"),
        ("eos_token_id", json!([2, 99]), "the special token 99"),
        ("eos_token_id", json!("</s>"), "expected a token id or a list of token ids"),
        ("model_type", json!("mixtral"), "its model_type is `mixtral`"),
        ("model_type", deep, "its JSON is not as expected"),
        ("hidden_act", json!("gelu"), "its hidden_act is `gelu`"),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0}), "its RoPE is scaled (`linear`)"),
        ("rope_scaling", json!({"rope_type": "llama3", "type": "default"}), "its RoPE is scaled (`llama3`)"),
        ("rope_parameters", json!({"rope_type": "yarn", "rope_theta": 1e4}), "its RoPE is scaled (`yarn`)"),
        ("partial_rotary_factor", json!(0.5), "its partial_rotary_factor is not 1"),
        ("attention_bias", json!(true), "it sets `attention_bias`"),
        ("mlp_bias", json!(true), "it sets `mlp_bias`"),
        ("quantization_config", json!({"quant_method": "fp8"}), "it sets `quantization_config`"),
        ("num_local_experts", json!(8), "it sets `num_local_experts`"),
        ("layer_types", json!(["full_attention", "sliding_attention"]), "mix windows"),
    ];
    for (key, value, words) in cases {
        let (mut config, tensors) = Model::small(Dtype::F32).hugging_face();
        config[key] = value.clone();
        assert_refused(key, Folder::hugging_face(&config, &tensors).open(), &[words]);
    }
    let (mut config, tensors) = Model::small(Dtype::F32).hugging_face();
    config["hidden_act"] = json!("x".repeat(2 << 20));
    assert_refused(
        "a long file",
        Folder::hugging_face(&config, &tensors).open(),
        &["it is longer than 1048576 bytes"],
    );
}

#[test]
fn native_parameters() {
    let cases: &[(&str, Value, &str)] = &[
        ("moe", json!({"num_experts": 8}), "it sets `moe`"),
        ("use_biases", json!(true), "it sets `use_biases`"),
        ("vision_encoder", json!({}), "it sets `vision_encoder`"),
        ("model_type", json!("mamba"), "its model_type is `mamba`"),
        ("sliding_window", json!([4096, 1]), "its JSON is not as expected"),
        ("vocab_size", json!(-1), "its JSON is not as expected"),
        ("n_heads", json!(0), "the number of attention heads is 0"),
        ("dim", json!(128), "expected shape [40, 128], found shape [40, 64]"),
    ];
    for (key, value, words) in cases {
        let (mut params, tensors) = Model::small(Dtype::F32).native();
        params[key] = value.clone();
        assert_refused(key, Folder::native(&params, &tensors).open(), &[words]);
    }
}

#[test]
fn wrong_indices() {
    let model = Model::small(Dtype::F32);
    let (config, tensors) = model.hugging_face();
    let (_, [(first, _), (second, _)]) = tensors.split(7);
    type BendIndex<'a> = &'a dyn Fn(&mut Value, &mut Safetensors);
    let cases: &[(&str, BendIndex, &[&str])] = &[
        (
            "elsewhere",
            &|i, _| i["weight_map"][NORM] = json!(first),
            &[second.as_str(), NORM, "expected it in `model-00001"],
        ),
        (
            "a file that is not there",
            &|i, _| i["weight_map"][NORM] = json!("gone.safetensors"),
            &["gone.safetensors", "cannot find it"],
        ),
        (
            "outside",
            &|i, _| i["weight_map"][NORM] = json!("../x.safetensors"),
            &["index.json", "`../x.safetensors`", "beside it"],
        ),
        ("absolute", &|i, _| i["weight_map"][NORM] = json!("/etc/x.safetensors"), &["beside it"]),
        (
            "another file",
            &|i, _| i["weight_map"][NORM] = json!("config.json"),
            &["`config.json`", "beside it"],
        ),
        ("a NUL", &|i, _| i["weight_map"][NORM] = json!("x\0.safetensors"), &["beside it"]),
        ("not a map", &|i, _| i["weight_map"] = json!([NORM]), &["index.json", "expected an object"]),
        ("empty", &|i, _| i["weight_map"] = json!({}), &["it names 0 files"]),
        (
            "unlisted",
            &|i, _| drop(i["weight_map"].as_object_mut().expect("a map").remove(NORM)),
            &[NORM, "a tensor that the index lists"],
        ),
        (
            "listed only",
            &|i, _| i["weight_map"]["x"] = json!(first),
            &[first.as_str(), "tensor `x`", "no such tensor"],
        ),
        (
            "in both files",
            &|_, second| second.push("model.embed_tokens.weight", Dtype::F32, &[1], &[0; 4]),
            &["model.embed_tokens.weight", "expected it in `model-00001"],
        ),
    ];
    for (case, bend, words) in cases {
        let folder = Folder::new();
        let (mut index, mut files) = tensors.split(7);
        bend(&mut index, &mut files[1].1);
        folder.write("config.json", config.to_string());
        folder.write("model.safetensors.index.json", index.to_string());
        files.iter().for_each(|(name, file)| drop(folder.write(name, file.encode())));
        assert_refused(case, folder.open(), words);
    }
}

#[test]
fn folders_without_a_model() {
    let model = Model::small(Dtype::F32);
    let folder = Folder::new();
    assert_refused(
        "empty",
        folder.open(),
        &["no model in this folder", "config.json with model.safetensors"],
    );
    let (_, tensors) = model.hugging_face();
    folder.write("model.safetensors", tensors.encode());
    assert_refused("no config", folder.open(), &["config.json: missing"]);
    let folder = Folder::new();
    folder.write("consolidated.safetensors", model.native().1.encode());
    assert_refused("no params", folder.open(), &["params.json: missing"]);
    let folder = Folder::new();
    std::fs::create_dir(folder.path().join("model.safetensors")).expect("a folder");
    folder.write("config.json", model.hugging_face().0.to_string());
    assert_refused("a folder for a file", folder.open(), &["it is not a regular file"]);
    let nowhere = Checkpoint::open(&folder.path().join("nowhere")).map_err(|error| error.to_string());
    assert_refused("nowhere", nowhere, &["nowhere: cannot find it"]);
    let device = Checkpoint::open("/dev/zero".as_ref()).map_err(|error| error.to_string());
    assert_refused("a device", device, &["/dev/zero: it is not a regular file"]);
}

fn rename(file: &mut Safetensors, from: &str, to: &str) {
    let entry = file.header.remove(from).expect("a tensor of this name");
    file.header.insert(to.to_owned(), entry);
}
