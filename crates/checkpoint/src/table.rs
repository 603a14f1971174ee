use std::collections::BTreeMap;

use crate::config::Config;
use crate::dtype::Dtype;
use crate::error::CheckpointError;
use crate::layout::{Found, show_shape};
use crate::naming::Naming;
use crate::source::Source;
use crate::weight::Weight;

/// One tensor of the table.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Outputs; 1 for a norm.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// How an element is read: as it is stored, or as what it is quantized to.
    pub dtype: Dtype,
    /// How an element is stored.
    pub stored: Dtype,
    /// Index of its file.
    pub(crate) file: usize,
    /// Of its first byte in that file.
    pub(crate) offset: u64,
}

impl TensorInfo {
    /// Encoded bytes of one whole row, as it is read.
    pub fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.cols)
    }

    /// Encoded bytes of the whole tensor, as it is read.
    pub fn bytes(&self) -> usize {
        self.rows * self.row_bytes()
    }
}

/// Finds every weight of the model among the tensors of its files, in the order of [`Weight::all`], and refuses
/// what is missing, misshapen or left over. No two tensors of `files` have the same name.
pub(crate) fn build(
    config: &Config,
    naming: &Naming,
    sources: &[Source],
    files: Vec<Vec<Found>>,
) -> Result<Vec<TensorInfo>, CheckpointError> {
    let mut by_name = BTreeMap::new();
    for (file, tensors) in files.into_iter().enumerate() {
        for tensor in tensors {
            by_name.insert(tensor.name.clone(), (file, tensor));
        }
    }
    let mut table = Vec::new();
    for weight in Weight::all(config) {
        let name = naming.name(weight);
        let (rows, cols) = weight.shape(config);
        let Some((file, found)) = by_name.remove(&name) else {
            let expected = format!("{weight}, {rows} × {cols}");
            return Err(CheckpointError::tensor(&sources[0].path, &name, expected, "no tensor of this name"));
        };
        check(weight, &found, (rows, cols), &sources[file])?;
        table.push(TensorInfo {
            rows,
            cols,
            dtype: found.dtype,
            stored: found.dtype,
            file,
            offset: found.offset,
        });
    }
    match by_name.iter().find(|(name, _)| !naming.may_be_left_out(name, config)) {
        None => Ok(table),
        Some((name, (file, found))) => Err(CheckpointError::tensor(
            &sources[*file].path,
            name,
            format!("only the weights of {} layers without biases, adapters or experts", config.layers),
            format!(
                "one more, {} of shape {}, that would be left out",
                found.dtype,
                show_shape(&found.shape)
            ),
        )),
    }
}

fn check(
    weight: Weight,
    found: &Found,
    (rows, cols): (usize, usize),
    source: &Source,
) -> Result<(), CheckpointError> {
    let shape: &[usize] = if weight.is_norm() { &[cols] } else { &[rows, cols] };
    let same =
        found.shape.iter().map(|dim| usize::try_from(*dim).ok()).eq(shape.iter().map(|dim| Some(*dim)));
    if !same {
        let found_shape = format!("shape {}", show_shape(&found.shape));
        return Err(CheckpointError::tensor(
            &source.path,
            &found.name,
            format!("shape {shape:?}"),
            found_shape,
        ));
    }
    if weight.is_norm() && found.dtype.is_quantized() {
        let found_dtype = found.dtype.to_string();
        return Err(CheckpointError::tensor(&source.path, &found.name, "F32, F16 or BF16", found_dtype));
    }
    Ok(())
}
