//! cuBLASLt, which multiplies for `fast`; it is looked for when it is asked for.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::device::{DeviceError, Gemm};

/// Shapes whose best way is remembered.
const SHAPES_MAX: usize = 1024;
/// `CUBLAS_OP_T`: a matrix counts as turned.
const TURNED: u32 = 1;

/// The library, for one device.
pub(super) struct Library {
    handle: sys::cublasLtHandle_t,
    /// What the library thinks best, by rows, tokens, inputs, stride and alignment.
    ways: BTreeMap<[usize; 5], sys::cublasLtMatmulAlgo_t>,
}

// SAFETY: the handle may be used by any thread.
unsafe impl Send for Library {}

impl Library {
    /// Opens it for the calling thread's device.
    ///
    /// # Errors
    /// [`DeviceError::Library`] if it is not there, [`DeviceError::Call`].
    pub(super) fn open() -> Result<Self, DeviceError> {
        // SAFETY: it only tries to open the library.
        if !unsafe { sys::is_culib_present() } {
            let needs = "--fast multiplies with it; it comes with the CUDA toolkit and with the Python package nvidia-cublas: have \
                         LD_LIBRARY_PATH name its folder, or leave --fast out";
            return Err(DeviceError::Library { library: "libcublasLt.so.13", needs });
        }
        let handle = check("cublasLtCreate", result::create_handle())?;
        Ok(Self { handle, ways: BTreeMap::new() })
    }

    /// # Safety
    /// As [`multiply`](super::Device::multiply); the stream is the device's.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub(super) unsafe fn multiply(
        &mut self,
        product: &Gemm,
        stream: sys::cudaStream_t,
    ) -> Result<(), DeviceError> {
        let &Gemm { weights, x, out, rows, tokens, inputs, stride, scratch } = product;
        let how = Described::new(product)?;
        let way = self.way(product, &how)?;
        let (one, zero) = (1.0f32, 0.0f32);
        let (one, zero) = (ptr::from_ref(&one).cast(), ptr::from_ref(&zero).cast());
        let [weights, x] = [weights, x].map(|address| address as *const c_void);
        let (out, scratch) = (out as *mut c_void, (scratch.0 as *mut c_void, scratch.1));
        debug_assert!(inputs <= stride && rows > 0 && tokens > 0);
        // SAFETY: the caller's; the descriptions are of these matrices.
        let multiplied = unsafe {
            let (w, t, o) = (how.weights.0, how.x.0, how.out.0);
            result::matmul(
                self.handle,
                how.product,
                one,
                zero,
                weights,
                w,
                x,
                t,
                out,
                o,
                out,
                o,
                &way,
                scratch.0,
                scratch.1,
                stream,
            )
        };
        check("cublasLtMatmul", multiplied)
    }

    fn way(&mut self, product: &Gemm, how: &Described) -> Result<sys::cublasLtMatmulAlgo_t, DeviceError> {
        let &Gemm { rows, tokens, inputs, stride, scratch, .. } = product;
        let alignment = alignment(product);
        let shape = [rows, tokens, inputs, stride, alignment];
        if let Some(way) = self.ways.get(&shape) {
            return Ok(*way);
        }
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let alignment_bytes = alignment as u32;
        let aligned = ptr::from_ref(&alignment_bytes).cast();
        let preferences = Preferences(check("cublasLtMatmulPreferenceCreate", result::create_matmul_pref())?);
        let set = |attribute, value: *const c_void, bytes| {
            // SAFETY: values of the attributes' types.
            let set = unsafe { result::set_matmul_pref_attribute(preferences.0, attribute, value, bytes) };
            check("cublasLtMatmulPreferenceSetAttribute", set)
        };
        let scratch_bytes = scratch.1 as u64;
        let scratch_bytes = ptr::from_ref(&scratch_bytes).cast();
        set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, scratch_bytes, size_of::<u64>())?;
        for attribute in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            set(attribute, aligned, size_of::<u32>())?;
        }
        // SAFETY: all of them are described.
        let found = unsafe {
            let (w, t, o) = (how.weights.0, how.x.0, how.out.0);
            result::get_matmul_algo_heuristic(self.handle, how.product, w, t, o, o, preferences.0)
        };
        let way = check("cublasLtMatmulAlgoGetHeuristic", found)?.algo;
        if self.ways.len() == SHAPES_MAX {
            self.ways.clear();
        }
        self.ways.insert(shape, way);
        Ok(way)
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: made by `open`. That it cannot be destroyed is no harm to anybody.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// What all addresses of a product are multiples of.
fn alignment(product: &Gemm) -> usize {
    const ENOUGH: u32 = 8; // 256 bytes
    1 << (product.weights | product.x | product.out).trailing_zeros().min(ENOUGH)
}

/// A product in the library's words: matrices stand column by column, so ours are turned.
struct Described {
    product: sys::cublasLtMatmulDesc_t,
    weights: Layout,
    x: Layout,
    out: Layout,
}

impl Described {
    fn new(&Gemm { rows, tokens, inputs, stride, .. }: &Gemm) -> Result<Self, DeviceError> {
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let weights = Layout::new(CUDA_R_16BF, inputs, rows, stride)?;
        let x = Layout::new(CUDA_R_16BF, inputs, tokens, stride)?;
        let out = Layout::new(CUDA_R_32F, rows, tokens, rows)?;
        let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let product = check("cublasLtMatmulDescCreate", result::create_matmul_desc(sums, CUDA_R_32F))?;
        let described = Self { product, weights, x, out };
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        let (value, bytes) = (ptr::from_ref(&TURNED).cast(), size_of_val(&TURNED));
        // SAFETY: a value of the attribute's type.
        let set = unsafe { result::set_matmul_desc_attribute(product, attribute, value, bytes) };
        check("cublasLtMatmulDescSetAttribute", set)?;
        Ok(described)
    }
}

impl Drop for Described {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        let _ = unsafe { result::destroy_matmul_desc(self.product) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(kind: sys::cudaDataType, rows: usize, columns: usize, stride: usize) -> Result<Self, DeviceError> {
        let made = result::create_matrix_layout(kind, rows as u64, columns as u64, stride as i64);
        check("cublasLtMatrixLayoutCreate", made).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Preferences(sys::cublasLtMatmulPreference_t);

impl Drop for Preferences {
    fn drop(&mut self) {
        // SAFETY: made by `way`.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

fn check<T>(call: &'static str, result: Result<T, CublasError>) -> Result<T, DeviceError> {
    result.map_err(|CublasError(status)| DeviceError::Call { call, says: format!("{status:?}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_library_or_a_device_it_is_said_which_is_missing() {
        let found = Library::open().map(|_| ()).map_err(|error| error.to_string());
        // SAFETY: it only tries to open the library.
        if !unsafe { sys::is_culib_present() } {
            let says = found.unwrap_err();
            assert!(says.starts_with("libcublasLt.so.13 was not found: --fast multiplies with it"), "{says}");
            return;
        }
        if let Err(says) = found {
            assert!(says.starts_with("cublasLtCreate failed: CUBLAS_STATUS_NOT_INITIALIZED"), "{says}");
        }
        let product = Gemm {
            weights: 256,
            x: 512,
            out: 1024 + 128,
            rows: 6144,
            tokens: 2048,
            inputs: 4096,
            stride: 4096,
            scratch: (0, 1 << 20),
        };
        assert!(Described::new(&product).is_ok(), "its words do not need a device");
        assert_eq!(alignment(&product), 128);
    }
}
