//! What the GPU's memory gives at most, by kernels that only read, or read and write (`cuda/bounds.cu`).

use std::ffi::CStr;
use std::time::Instant;

use galerne_model::gpu::{Address, Buffer, Device, Launch};
use serde_json::json;

use crate::device::Gpus;
use crate::{Outcome, Report};

const THREADS: u32 = 256;
const VECTOR_BYTES: usize = 16;
/// Far more than any cache holds.
const BYTES: usize = 4 << 30;
const EMULATED_BYTES: usize = 1 << 16;
/// Blocks, of which the best number counts: 4 a multiprocessor of 132, and more.
const BLOCKS: [u32; 3] = [528, 1056, 2112];
const RUNS: usize = 5;
/// Launches of a run, so that the host does not show.
const LAUNCHES: u32 = 4;
const CHUNK_BYTES: usize = 64 << 20;

/// As `cuda/bounds.cu` has it.
#[repr(C)]
struct Bound {
    from: Address,
    to: Address,
    count: u64,
    blocks: u32,
}

pub(crate) fn run(gpus: &Gpus, report: &mut Report) -> Outcome<()> {
    let device = gpus.open()?;
    let (bytes, blocks) = if gpus.emulate { (EMULATED_BYTES, &[2][..]) } else { (BYTES, &BLOCKS[..]) };
    let from = Buffer::zeroed(&device, bytes)?;
    let to = Buffer::zeroed(&device, bytes)?;
    let combined = fill(&from)?;
    for (kernel, name, moved) in [(c"read_all", "read", bytes), (c"copy_all", "copy", 2 * bytes)] {
        let mut best = f64::INFINITY;
        for &blocks in blocks {
            for _ in 0..RUNS {
                let start = Instant::now();
                (0..LAUNCHES).try_for_each(|_| launch(&*device, kernel, &from, &to, blocks))?;
                to.download(&mut [0])?;
                best = best.min(start.elapsed().as_secs_f64() / f64::from(LAUNCHES));
            }
        }
        launch(&*device, kernel, &from, &to, blocks[0])?;
        let right = if kernel == c"read_all" {
            let mut seen = vec![0; (blocks[0] * THREADS) as usize * VECTOR_BYTES];
            to.download(&mut seen)?;
            fold(0, &seen) == combined
        } else {
            let (mut source, mut found) = (vec![0; bytes.min(CHUNK_BYTES)], vec![0; bytes.min(CHUNK_BYTES)]);
            from.download(&mut source)?;
            to.download(&mut found)?;
            source == found
        };
        report.tell(&json!({
            "part": "bound", "name": name, "ok": right, "bytes": moved, "seconds": best,
            "bytes_per_s": moved as f64 / best, "device": device.name(),
        }));
    }
    Ok(())
}

fn launch(device: &dyn Device, kernel: &CStr, from: &Buffer, to: &Buffer, blocks: u32) -> Outcome<()> {
    let count = (from.bytes() / VECTOR_BYTES) as u64;
    let arguments = Bound { from: from.address(), to: to.address(), count, blocks };
    // SAFETY: both buffers hold `count` vectors, and one for each thread.
    unsafe { device.launch(&Launch::new(kernel, [blocks, 1, 1], THREADS, 0, &arguments))? };
    Ok(())
}

/// Numbers that repeat nothing, since memory full of zeros may be faster; what they combine to.
fn fill(buffer: &Buffer) -> Outcome<u128> {
    let (mut noise, mut combined) = (1u64, 0);
    let mut chunk = vec![0; buffer.bytes().min(CHUNK_BYTES)];
    for at in (0..buffer.bytes()).step_by(chunk.len()) {
        for word in chunk.as_chunks_mut::<8>().0 {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *word = noise.to_le_bytes();
        }
        buffer.upload(at, &chunk)?;
        combined = fold(combined, &chunk);
    }
    Ok(combined)
}

fn fold(combined: u128, bytes: &[u8]) -> u128 {
    let vectors = bytes.as_chunks::<VECTOR_BYTES>().0.iter();
    vectors.fold(combined, |seen, vector| seen ^ u128::from_le_bytes(*vector))
}
