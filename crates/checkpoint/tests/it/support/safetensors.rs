use galerne_checkpoint::Dtype;
use serde_json::{Map, Value, json};

/// A safetensors file in parts that tests can bend.
#[derive(Clone, Default)]
pub(crate) struct Safetensors {
    pub(crate) header: Map<String, Value>,
    pub(crate) data: Vec<u8>,
}

impl Safetensors {
    pub(crate) fn push(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) {
        let offsets = [self.data.len(), self.data.len() + bytes.len()];
        let entry = json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": offsets});
        self.header.insert(name.to_owned(), entry);
        self.data.extend_from_slice(bytes);
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        self.encode_with(&Value::from(self.header.clone()).to_string())
    }

    /// With another header than its own.
    pub(crate) fn encode_with(&self, header: &str) -> Vec<u8> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.extend_from_slice(&self.data);
        file
    }

    /// Cut in two behind some tensors, with the index that tells which tensor is where.
    pub(crate) fn split(&self, tensors: usize) -> (Value, [(String, Safetensors); 2]) {
        let name = |part: usize| format!("model-{part:05}-of-00002.safetensors");
        let mut files = [(name(1), Self::default()), (name(2), Self::default())];
        let mut map = Map::new();
        for (at, (tensor, entry)) in self.header.iter().enumerate() {
            let (file, part) = &mut files[usize::from(at >= tensors)];
            let [start, end] = [0, 1].map(|i| entry["data_offsets"][i].as_u64().expect("an offset") as usize);
            let mut moved = entry.clone();
            moved["data_offsets"] = json!([part.data.len(), part.data.len() + end - start]);
            part.header.insert(tensor.clone(), moved);
            part.data.extend_from_slice(&self.data[start..end]);
            map.insert(tensor.clone(), json!(file));
        }
        (json!({"metadata": {"total_size": self.data.len()}, "weight_map": map}), files)
    }
}
