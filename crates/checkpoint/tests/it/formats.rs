use std::ops::Range;

use galerne_checkpoint::{Checkpoint, CheckpointError, Dtype, Weight};
use galerne_types::Quantize;
use serde_json::Value;

use crate::support::gguf::{Gguf, Meta};
use crate::support::safetensors::Safetensors;
use crate::support::{Folder, Model, assert_holds};

const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];
const QUANTIZED: [Dtype; 3] = [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1];

#[test]
fn all_forms_of_one_model_read_alike() {
    for dtype in FLOATS {
        let model = Model::small(dtype);
        let (config, tensors) = model.hugging_face();
        let single = Folder::hugging_face(&config, &tensors).open_held();
        let indexed = indexed(&model).open_held();
        let (params, tensors) = model.native();
        let native = Folder::native(&params, &tensors).open_held();
        let gguf = Folder::new();
        let gguf = (gguf.open_gguf(model.gguf().encode()).expect("a sound file"), gguf);
        for (checkpoint, _folder) in [single, indexed, native, gguf] {
            assert_eq!(checkpoint.config(), &model.config);
            assert_holds(&checkpoint, &model);
        }
    }
}

#[test]
fn quantized_gguf_reads_whole_blocks() {
    for dtype in QUANTIZED {
        let model = Model::small(dtype);
        let folder = Folder::new();
        let checkpoint = folder.open_gguf(model.gguf().encode()).expect("a sound file");
        assert_holds(&checkpoint, &model);
        for weight in [Weight::Q(1), Weight::Down(0)] {
            assert_slice(&checkpoint, &model, weight, &model.bytes(weight), 5..20, 32..64);
            let cut = checkpoint.read_rows(weight, 0..1, 16..64, &mut Vec::new());
            assert!(matches!(cut, Err(CheckpointError::Range { block: 32, .. })), "{cut:?}");
        }
    }
}

#[test]
fn floats_read_as_blocks_of_32_if_they_are_to_be_quantized() {
    for dtype in FLOATS {
        let model = Model::small(dtype);
        let (config, tensors) = model.hugging_face();
        let (checkpoint, _folder) = Folder::hugging_face(&config, &tensors).open_held();
        let folder = Folder::new();
        let paired = folder.open_gguf(model.gguf().encode()).expect("a sound file");
        assert!(!checkpoint.quantizes());
        let (checkpoint, paired) = (checkpoint.quantized(Quantize::Q4_0), paired.quantized(Quantize::Q4_0));
        assert!(checkpoint.quantizes());
        for weight in Weight::all(&model.config) {
            let info = checkpoint.tensor(weight);
            let expected = match weight {
                Weight::Embedding | Weight::Head => Dtype::Q8_0,
                norm if norm.is_norm() => model.dtype(norm),
                _ => Dtype::Q4_0,
            };
            assert_eq!((info.dtype, info.stored), (expected, model.dtype(weight)), "{weight}");
            let read = |checkpoint: &Checkpoint, rows: Range<usize>, cols: Range<usize>| {
                let mut read = vec![0xEE; 3];
                checkpoint.read_rows(weight, rows, cols, &mut read).expect("a part of a tensor");
                read
            };
            let whole = read(&checkpoint, 0..info.rows, 0..info.cols);
            assert_eq!(whole.len(), info.bytes(), "{weight}");
            assert!(read(&paired, 0..info.rows, 0..info.cols) == whole, "{weight}");
            let (row_bytes, block_bytes) = (info.row_bytes(), info.dtype.row_bytes(32));
            for row in 0..info.rows {
                let part = read(&paired, row..row + 1, 32..64);
                assert_eq!(
                    part,
                    whole[row * row_bytes + block_bytes..][..block_bytes],
                    "{weight}, row {row}"
                );
            }
        }
    }
}

#[test]
fn what_is_quantized_or_no_whole_blocks_stays_as_it_is() {
    let model = Model::small(Dtype::Q4_1);
    let folder = Folder::new();
    let checkpoint = folder.open_gguf(model.gguf().encode()).expect("a sound file");
    let checkpoint = checkpoint.quantized(Quantize::Q8_0);
    assert!(!checkpoint.quantizes());
    assert_holds(&checkpoint, &model);
    let mut ragged = Model::small(Dtype::Bf16);
    ragged.config.intermediate = 90;
    let (config, tensors) = ragged.hugging_face();
    let (checkpoint, _folder) = Folder::hugging_face(&config, &tensors).open_held();
    let checkpoint = checkpoint.quantized(Quantize::Q8_0);
    let dtypes = [Weight::Down(0), Weight::Up(0)].map(|weight| checkpoint.tensor(weight).dtype);
    assert_eq!(dtypes, [Dtype::Bf16, Dtype::Q8_0]);
}

#[test]
fn gguf_of_version_2_and_of_another_alignment() {
    let model = Model::small(Dtype::F16);
    let folder = Folder::new();
    let mut old = model.gguf();
    old.version = 2;
    assert_holds(&folder.open_gguf(old.encode()).expect("a sound file"), &model);
    let mut tight = Gguf { alignment: 8, ..model.gguf() };
    tight.set("general.alignment", Meta::U32(8));
    assert_holds(&folder.open_gguf(tight.encode()).expect("a sound file"), &model);
}

/// The rows of one head are `0 8 1 9 …` where the file pairs neighbours, so a reader that mistakes the order would
/// return other rows; every other weight would not show it.
#[test]
fn a_wrong_pairing_shows() {
    let model = Model::small(Dtype::F32);
    let half = model.config.head_dim / 2;
    for weight in Weight::all(&model.config) {
        let (paired, whole) = (model.paired_bytes(weight), model.bytes(weight));
        let rotated = matches!(weight, Weight::Q(_) | Weight::K(_));
        assert_eq!(paired != whole, rotated, "{weight}");
        if rotated {
            let row_bytes = 4 * model.config.hidden;
            let row = |bytes: &[u8], row: usize| bytes[row * row_bytes..][..row_bytes].to_vec();
            assert_eq!(row(&paired, 1), row(&whole, half), "{weight}");
            assert_eq!(row(&paired, 2), row(&whole, 1), "{weight}");
        }
    }
    // Rows in Hugging Face's order under llama.cpp's names: accepted, but not the same model.
    let mut unpaired = model.gguf();
    let whole: Vec<u8> = Weight::all(&model.config).flat_map(|weight| model.bytes(weight)).collect();
    assert_eq!(whole.len(), unpaired.data.len(), "tensors of this model need no padding");
    unpaired.data = whole;
    let folder = Folder::new();
    let checkpoint = folder.open_gguf(unpaired.encode()).expect("a sound file");
    let mut read = Vec::new();
    for weight in [Weight::Q(0), Weight::K(1), Weight::V(1)] {
        let info = checkpoint.tensor(weight);
        checkpoint.read_rows(weight, 0..info.rows, 0..info.cols, &mut read).expect("a whole tensor");
        assert_eq!(read == model.bytes(weight), weight == Weight::V(1), "{weight}");
    }
}

/// Rows of 16 KiB, more than one batch of them: gathered through the scratch, or one by one where the gap is wide.
#[test]
fn slices_of_a_wide_model() {
    let mut model = Model::small(Dtype::F32);
    model.config.layers = 1;
    model.config.hidden = 4096;
    model.config.heads = 42;
    model.config.kv_heads = 2;
    model.config.head_dim = 8;
    model.config.vocab = 320;
    model.config.tied = true;
    let (params, tensors) = model.native();
    let (checkpoint, _folder) = Folder::native(&params, &tensors).open_held();
    for weight in
        [Weight::Q(0), Weight::K(0), Weight::V(0), Weight::Embedding, Weight::O(0), Weight::AttnNorm(0)]
    {
        let (rows, cols) = weight.shape(&model.config);
        let whole = model.bytes(weight);
        for rows in [0..rows, 0..1, rows / 2..rows, 3.min(rows - 1)..(rows - 1).max(1), rows..rows] {
            for cols in [0..cols, 0..cols / 8, cols / 2..cols - 1, cols - 1..cols, 7..7] {
                assert_slice(&checkpoint, &model, weight, &whole, rows.clone(), cols);
            }
        }
    }
    let mut head = Vec::new();
    checkpoint.read_rows(Weight::Head, 0..2, 0..4096, &mut head).expect("rows of the tied head");
    assert_eq!(head, model.bytes(Weight::Embedding)[..head.len()]);
}

/// Rotary tables follow from the configuration; a tied head repeats the embedding.
#[test]
fn what_follows_from_the_rest_is_left_out() {
    let mut model = Model::small(Dtype::Bf16);
    model.config.tied = true;
    let (config, mut tensors) = model.hugging_face();
    tensors.push("model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::F32, &[8], &[0; 32]);
    tensors.push("lm_head.weight", Dtype::Bf16, &[40, 64], &[0; 40 * 64 * 2]);
    assert_holds(&Folder::hugging_face(&config, &tensors).open_held().0, &model);
    let (params, mut tensors) = model.native();
    tensors.push("rope.freqs", Dtype::F32, &[8], &[0; 32]);
    assert_holds(&Folder::native(&params, &tensors).open_held().0, &model);
    let folder = Folder::new();
    let checkpoint = folder.open_gguf(model.gguf().encode()).expect("a sound file");
    assert!(checkpoint.config().tied, "a GGUF file without a head");
    assert_holds(&checkpoint, &model);
}

#[test]
fn rows_and_columns_beyond_a_tensor_are_refused() {
    let model = Model::small(Dtype::Bf16);
    let (config, tensors) = model.hugging_face();
    let (checkpoint, _folder) = Folder::hugging_face(&config, &tensors).open_held();
    let backwards = Range { start: 3, end: 2 };
    for (rows, cols) in
        [(0..41, 0..64), (0..1, 0..65), (backwards.clone(), 0..64), (0..1, backwards), (0..usize::MAX, 0..1)]
    {
        let refused = checkpoint.read_rows(Weight::Embedding, rows, cols, &mut Vec::new());
        let sentence = refused.expect_err("beyond the tensor").to_string();
        assert!(sentence.contains("the embedding: it has 40 rows and 64 columns"), "{sentence}");
    }
}

#[test]
fn a_file_that_shrinks_after_it_was_opened_is_an_error() {
    let model = Model::small(Dtype::F32);
    let (config, tensors) = model.hugging_face();
    let (checkpoint, folder) = Folder::hugging_face(&config, &tensors).open_held();
    folder.write("model.safetensors", b"short");
    let error =
        checkpoint.read_rows(Weight::Down(1), 0..1, 0..96, &mut Vec::new()).expect_err("nothing there");
    assert!(error.to_string().contains("model.safetensors: cannot read it"), "{error}");
}

#[test]
fn the_digest_tells_models_apart_and_nothing_else() {
    let model = Model::small(Dtype::F32);
    let (config, tensors) = model.hugging_face();
    let digest = |config: &Value, tensors: &Safetensors| {
        Folder::hugging_face(config, tensors).open_held().0.digest().to_owned()
    };
    let same = digest(&config, &tensors);
    assert_eq!(same, digest(&config, &tensors));
    assert_eq!(same.len(), 64);
    let mut other_config = config.clone();
    other_config["rope_theta"] = 20_000.into();
    assert_ne!(same, digest(&other_config, &tensors));
    let mut fine_tuned = tensors;
    fine_tuned.data.iter_mut().for_each(|byte| *byte ^= 1);
    assert_ne!(same, digest(&config, &fine_tuned));
}

#[test]
fn names_come_from_the_path() {
    let model = Model::small(Dtype::F32);
    let folder = Folder::new();
    let gguf = folder.open_gguf(model.gguf().encode()).expect("a sound file");
    assert_eq!(gguf.name(), "small");
    let (config, tensors) = model.hugging_face();
    let folder = Folder::hugging_face(&config, &tensors);
    let roundabout = folder.path().join("..").join(folder.path().file_name().expect("a name"));
    let checkpoint = Checkpoint::open(&roundabout).expect("a sound folder");
    assert_eq!(checkpoint.name(), folder.path().file_name().and_then(|name| name.to_str()).expect("a name"));
    assert_eq!(checkpoint.path(), roundabout);
}

fn indexed(model: &Model) -> Folder {
    let (config, tensors) = model.hugging_face();
    let (index, files) = tensors.split(7);
    let folder = Folder::new();
    folder.write("config.json", config.to_string());
    folder.write("model.safetensors.index.json", index.to_string());
    for (name, file) in files {
        folder.write(&name, file.encode());
    }
    folder
}

fn assert_slice(
    checkpoint: &Checkpoint,
    model: &Model,
    weight: Weight,
    whole: &[u8],
    rows: Range<usize>,
    cols: Range<usize>,
) {
    let dtype = model.dtype(weight);
    let row_bytes = dtype.row_bytes(weight.shape(&model.config).1);
    let within = dtype.row_bytes(cols.start)..dtype.row_bytes(cols.end);
    let row = |row: usize| &whole[row * row_bytes..][within.clone()];
    let expected: Vec<u8> = rows.clone().flat_map(row).copied().collect();
    let mut read = vec![0xEE; 3];
    checkpoint.read_rows(weight, rows.clone(), cols.clone(), &mut read).expect("a part of a tensor");
    assert!(read == expected, "{weight}, rows {rows:?}, columns {cols:?}");
}

impl Folder {
    /// Opens a sound checkpoint, and keeps its folder.
    fn open_held(self) -> (Checkpoint, Self) {
        (self.open().expect("a sound folder"), self)
    }
}
