use std::path::Path;

use galerne_checkpoint::{CheckpointError, Dtype, MistralVersion, SentencePieceModel};
use proptest::prelude::*;

use crate::support::{Folder, Model};

/// One field of a protobuf message.
fn field(number: u8, value: Value) -> Vec<u8> {
    match value {
        Value::Number(value) => {
            let mut bytes = vec![number << 3];
            if number >= 16 {
                bytes = vec![number << 3 | 0x80, number >> 4];
            }
            let mut rest = value;
            while rest >= 0x80 {
                bytes.push((rest & 0x7f) as u8 | 0x80);
                rest >>= 7;
            }
            bytes.push(rest as u8);
            bytes
        }
        Value::Score(score) => [vec![number << 3 | 5], score.to_le_bytes().to_vec()].concat(),
        Value::Bytes(bytes) => {
            assert!(bytes.len() < 0x4000, "two bytes hold the length");
            let len = [bytes.len() as u8 | 0x80, (bytes.len() >> 7) as u8];
            [vec![number << 3 | 2], len.to_vec(), bytes].concat()
        }
    }
}

enum Value {
    Number(u64),
    Score(f32),
    Bytes(Vec<u8>),
}
use Value::{Bytes, Number, Score};

fn piece(text: &[u8], score: f32, kind: u64) -> Vec<u8> {
    let fields = [field(1, Bytes(text.to_vec())), field(2, Score(score)), field(3, Number(kind))];
    field(1, Bytes(fields.concat()))
}

/// A model of three pieces; `trainer` and `normalizer` are added to what makes it sound.
fn model(trainer: &[u8], normalizer: &[u8]) -> Vec<u8> {
    let trainer = [field(3, Number(2)), field(35, Number(1)), trainer.to_vec()].concat();
    let normalizer = [field(4, Number(0)), normalizer.to_vec()].concat();
    [
        piece(b"<unk>", 0.0, 2),
        piece(b"<s>", 0.0, 3),
        piece("▁a".as_bytes(), -1.5, 1),
        field(2, Bytes(trainer)),
        field(3, Bytes(normalizer)),
        // A field of a later version.
        field(15, Bytes(vec![1, 2, 3])),
    ]
    .concat()
}

fn parse(bytes: &[u8]) -> Result<SentencePieceModel, CheckpointError> {
    SentencePieceModel::parse(Path::new("tokenizer.model"), bytes)
}

#[test]
fn a_model_is_read() {
    let read = parse(&model(&[], &[])).expect("a sound model");
    assert_eq!(read.tokens, ["<unk>", "<s>", "▁a"]);
    assert_eq!((&read.scores[..], &read.types[..]), (&[0.0, 0.0, -1.5][..], &[2, 3, 1][..]));
    assert_eq!((read.bos, read.eos), (Some(1), Some(2)), "the format's own defaults");
    assert!(read.add_space_prefix);
    let other = [field(41, Number(u64::MAX)), field(42, Number(7))].concat();
    let read = parse(&model(&other, &field(3, Number(0)))).expect("a sound model");
    assert_eq!(
        (read.bos, read.eos, read.add_space_prefix),
        (None, None, false),
        "-1 and beyond the pieces: none"
    );
}

#[test]
fn what_is_not_understood_is_refused() {
    let with_piece = |piece: Vec<u8>| [model(&[], &[]), piece].concat();
    let cases = [
        (model(&field(3, Number(1)), &[]), "its method is number 1"),
        (model(&field(35, Number(0)), &[]), "no byte fallback"),
        (model(&field(24, Number(1)), &[]), "treats spaces unlike"),
        (model(&[], &field(4, Number(1))), "treats spaces unlike"),
        (model(&[], &field(5, Number(0))), "treats spaces unlike"),
        (model(&[], &field(2, Bytes(vec![1]))), "rewrites text"),
        (model(&[], &field(6, Bytes(b"a\tb".to_vec()))), "rewrites text"),
        ([model(&[], &[]), field(5, Bytes(field(2, Bytes(vec![1]))))].concat(), "rewrites text"),
        (with_piece(piece(b"x", 0.0, 5)), "there to be cut again"),
        (with_piece(piece(b"x", 0.0, 9)), "piece 3 has the kind 9"),
        (with_piece(piece(b"x", f32::NAN, 1)), "the score NaN"),
        (with_piece(piece(b"", 0.0, 1)), "piece 3 has 0 bytes"),
        (with_piece(piece(&[b'x'; 2000], 0.0, 1)), "piece 3 has 2000 bytes"),
        (with_piece(piece(b"\xff", 0.0, 1)), "piece 3 is not text"),
        (with_piece(vec![0x0a, 0x7f]), "is damaged"),
        (with_piece(vec![0x0b]), "is damaged"),
        (with_piece([vec![8], vec![0xff; 10]].concat()), "is damaged"),
        (vec![], "no pieces"),
    ];
    for (bytes, words) in cases {
        let error = parse(&bytes).expect_err(words).to_string();
        assert!(error.starts_with("tokenizer.model: ") && error.contains(words), "{words}: {error}");
    }
}

proptest! {
    #[test]
    fn no_bytes_do_harm(cut in any::<prop::sample::Index>(), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8)) {
        let mut bytes = model(&[], &[]);
        for (at, byte) in flips {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.truncate(cut.index(bytes.len() + 1));
        if let Ok(read) = parse(&bytes) {
            prop_assert!(read.scores.len() == read.tokens.len() && read.types.len() == read.tokens.len());
        }
    }
}

#[test]
fn the_best_name_in_a_folder_is_taken() {
    let (config, tensors) = Model::small(Dtype::F32).hugging_face();
    let found = |names: &[&str]| {
        let folder = Folder::hugging_face(&config, &tensors);
        for name in names {
            folder.write(name, "");
        }
        let file = folder.open().expect("a sound folder").text().sentencepiece.clone()?;
        Some((file.path.file_name()?.to_str()?.to_owned(), file.version))
    };
    assert_eq!(found(&["tokenizer.json", "tokenizer.model.bak"]), None);
    assert_eq!(found(&["tokenizer.model"]), Some(("tokenizer.model".into(), None)));
    let v3 = Some(MistralVersion::V3);
    assert_eq!(found(&["tokenizer.model", "tokenizer.model.v3"]), Some(("tokenizer.model.v3".into(), v3)));
    let named = ["mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model.v1"];
    assert_eq!(found(&named), Some((named[0].into(), v3)));
}
