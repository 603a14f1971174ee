use galerne_checkpoint::{Config, Dtype};

/// A GGUF file in parts that tests can bend.
#[derive(Clone)]
pub(crate) struct Gguf {
    pub(crate) version: u32,
    pub(crate) alignment: usize,
    pub(crate) metadata: Vec<(String, Meta)>,
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) data: Vec<u8>,
}

#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    /// Innermost first.
    pub(crate) dims: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) offset: u64,
}

#[derive(Clone)]
pub(crate) enum Meta {
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// Any type with any bytes.
    Raw(u32, Vec<u8>),
}

impl Gguf {
    pub(crate) fn of(config: &Config) -> Self {
        let size = |size: usize| Meta::U32(size as u32);
        let metadata = [
            ("general.architecture", Meta::Text("llama".into())),
            ("llama.block_count", size(config.layers)),
            ("llama.embedding_length", size(config.hidden)),
            ("llama.feed_forward_length", size(config.intermediate)),
            ("llama.attention.head_count", size(config.heads)),
            ("llama.attention.head_count_kv", size(config.kv_heads)),
            ("llama.attention.key_length", size(config.head_dim)),
            ("llama.attention.layer_norm_rms_epsilon", Meta::F32(config.norm_eps)),
            ("llama.attention.sliding_window", size(config.window.unwrap_or(0))),
            ("llama.rope.freq_base", Meta::F32(config.rope_theta as f32)),
            ("llama.context_length", size(config.context_tokens_max)),
            ("tokenizer.ggml.bos_token_id", Meta::U32(1)),
            ("tokenizer.ggml.eos_token_id", Meta::I32(2)),
        ];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value)).to_vec();
        Self { version: 3, alignment: 32, metadata, tensors: Vec::new(), data: Vec::new() }
    }

    pub(crate) fn push(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) {
        let kind = match dtype {
            Dtype::F32 => 0,
            Dtype::F16 => 1,
            Dtype::Q4_0 => 2,
            Dtype::Q4_1 => 3,
            Dtype::Q8_0 => 8,
            Dtype::Q4K => 12,
            Dtype::Q6K => 14,
            Dtype::Bf16 => 30,
        };
        let dims = shape.iter().rev().map(|dim| *dim as u64).collect();
        self.tensors.push(Tensor { name: name.to_owned(), dims, kind, offset: self.data.len() as u64 });
        self.data.extend_from_slice(bytes);
        self.data.resize(self.data.len().next_multiple_of(self.alignment), 0);
    }

    /// Sets or replaces a metadata entry.
    pub(crate) fn set(&mut self, key: &str, value: Meta) {
        self.metadata.retain(|(other, _)| other != key);
        self.metadata.push((key.to_owned(), value));
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.metadata.retain(|(other, _)| other != key);
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).expect("a tensor of this name")
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut file, key);
            value.encode(&mut file);
        }
        for tensor in &self.tensors {
            text(&mut file, &tensor.name);
            file.extend((tensor.dims.len() as u32).to_le_bytes());
            file.extend(tensor.dims.iter().flat_map(|dim| dim.to_le_bytes()));
            file.extend(tensor.kind.to_le_bytes());
            file.extend(tensor.offset.to_le_bytes());
        }
        file.resize(file.len().next_multiple_of(self.alignment), 0);
        file.extend(&self.data);
        file
    }
}

impl Meta {
    fn encode(&self, file: &mut Vec<u8>) {
        let array = |file: &mut Vec<u8>, kind: u32, len: usize| {
            file.extend([9, kind].iter().flat_map(|number| number.to_le_bytes()));
            file.extend((len as u64).to_le_bytes());
        };
        match self {
            Self::U32(number) => file.extend([4, *number].iter().flat_map(|number| number.to_le_bytes())),
            Self::I32(number) => file.extend([5, *number].iter().flat_map(|number| number.to_le_bytes())),
            Self::F32(number) => {
                file.extend(6u32.to_le_bytes());
                file.extend(number.to_le_bytes());
            }
            Self::Bool(flag) => {
                file.extend(7u32.to_le_bytes());
                file.push(u8::from(*flag));
            }
            Self::Text(content) => {
                file.extend(8u32.to_le_bytes());
                text(file, content);
            }
            Self::Texts(texts) => {
                array(file, 8, texts.len());
                texts.iter().for_each(|content| text(file, content));
            }
            Self::I32s(numbers) => {
                array(file, 5, numbers.len());
                file.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            }
            Self::F32s(numbers) => {
                array(file, 6, numbers.len());
                file.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            }
            Self::Raw(kind, bytes) => {
                file.extend(kind.to_le_bytes());
                file.extend(bytes);
            }
        }
    }
}

fn text(file: &mut Vec<u8>, content: &str) {
    file.extend((content.len() as u64).to_le_bytes());
    file.extend(content.as_bytes());
}
