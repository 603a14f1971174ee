use galerne_checkpoint::{Checkpoint, Dtype, Weight};
use proptest::prelude::*;

use crate::support::{Folder, Model};

/// What a disk, a network or somebody malicious does to a file.
#[derive(Clone, Debug)]
enum Damage {
    Flip { at: prop::sample::Index, bit: u8 },
    Overwrite { at: prop::sample::Index, bytes: Vec<u8> },
    Cut { at: prop::sample::Index },
    Insert { at: prop::sample::Index, bytes: Vec<u8> },
}

impl Damage {
    /// `header` is how far the interesting part of the file reaches.
    fn apply(&self, file: &mut Vec<u8>, header: usize) {
        let place = |at: &prop::sample::Index| at.index(header.min(file.len()).max(1));
        match self {
            Self::Flip { at, bit } => {
                if let Some(byte) = {
                    let at = place(at);
                    file.get_mut(at)
                } {
                    *byte ^= 1 << bit;
                }
            }
            Self::Overwrite { at, bytes } => {
                let at = place(at);
                file.iter_mut().skip(at).zip(bytes).for_each(|(byte, new)| *byte = *new);
            }
            Self::Cut { at } => file.truncate(at.index(file.len() + 1)),
            Self::Insert { at, bytes } => {
                let at = place(at).min(file.len());
                drop(file.splice(at..at, bytes.iter().copied()));
            }
        }
    }
}

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    let at = any::<prop::sample::Index>;
    let hostile =
        prop_oneof![Just(vec![0xFF; 8]), Just(vec![0; 8]), prop::collection::vec(any::<u8>(), 1..16)];
    let one = prop_oneof![
        4 => (at(), 0..8u8).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        3 => (at(), hostile.clone()).prop_map(|(at, bytes)| Damage::Overwrite { at, bytes }),
        1 => at().prop_map(|at| Damage::Cut { at }),
        1 => (at(), hostile).prop_map(|(at, bytes)| Damage::Insert { at, bytes }),
    ];
    prop::collection::vec(one, 1..4)
}

/// Whatever still opens must be readable to its last byte: its size was checked.
fn read_all(opened: Result<Checkpoint, String>) -> Result<(), TestCaseError> {
    let Ok(checkpoint) = opened else { return Ok(()) };
    let mut out = Vec::new();
    for weight in Weight::all(checkpoint.config()) {
        let info = checkpoint.tensor(weight);
        let read = checkpoint.read_rows(weight, 0..info.rows, 0..info.cols, &mut out);
        prop_assert!(read.is_ok(), "{read:?}");
        prop_assert_eq!(out.len(), info.bytes());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn damaged_gguf_never_panics(damage in damage()) {
        let mut file = Model::small(Dtype::Q8_0).gguf().encode();
        let folder = Folder::new();
        damage.iter().for_each(|damage| damage.apply(&mut file, 2400));
        read_all(folder.open_gguf(&file))?;
    }

    #[test]
    fn damaged_safetensors_never_panic(damage in damage()) {
        let (config, tensors) = Model::small(Dtype::Bf16).hugging_face();
        let folder = Folder::hugging_face(&config, &tensors);
        let mut file = tensors.encode();
        damage.iter().for_each(|damage| damage.apply(&mut file, 2800));
        folder.write("model.safetensors", &file);
        read_all(folder.open())?;
    }

    #[test]
    fn damaged_configurations_never_panic(damage in damage()) {
        let (params, tensors) = Model::small(Dtype::F16).native();
        let folder = Folder::native(&params, &tensors);
        let mut file = params.to_string().into_bytes();
        damage.iter().for_each(|damage| damage.apply(&mut file, usize::MAX));
        folder.write("params.json", &file);
        read_all(folder.open())?;
    }
}
