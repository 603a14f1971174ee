//! What this machine can do at most: bytes read from memory, and operations of the instructions that products are made
//! of, with 1 thread and with all; the best of some runs. Speeds of the engine are told as shares of these.
//!
//! ```text
//! cargo run --release -p galerne-model --example bounds -- [--json]
//! ```
//! A multiplication and an addition count as two operations. An instruction that the machine lacks is left out; other
//! machines than x86-64 are told their bandwidth only.

use std::error::Error;
use std::hint::black_box;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

/// Far more than any cache holds; the threads share it.
const BUFFER_BYTES: usize = 1 << 30;
/// How often a peak's chains are gone through: some tens of milliseconds.
const ROUNDS: usize = 10_000_000;
const RUNS: usize = 5;

/// A kind of product at the speed of its instructions alone: all operands stay in registers.
struct Peak {
    /// What kind of product: `f32`, `bf16`, `int8` (bytes by bytes, exact sums) or `int4` (nibbles by bytes).
    kind: &'static str,
    instruction: &'static str,
    operations_per_round: usize,
    run: fn(usize),
}

fn main() -> Result<(), Box<dyn Error>> {
    let json = std::env::args().skip(1).any(|argument| argument == "--json");
    let all = thread::available_parallelism()?.get();
    let buffer: Vec<u64> = (0..BUFFER_BYTES as u64 / 8).collect();
    for threads in if all > 1 { vec![1, all] } else { vec![1] } {
        let share = buffer.len() / threads;
        let seconds = together(threads, |thread| read(&buffer[thread * share..][..share]));
        let gigabytes = (share * threads * 8) as f64 / seconds / 1e9;
        let mut told = serde_json::json!({ "threads": threads, "read_gb": gigabytes });
        let mut line = format!("{threads} threads: reading {gigabytes:.1} GB/s");
        for peak in peaks() {
            let seconds = together(threads, |_| (peak.run)(ROUNDS));
            let giga = (peak.operations_per_round * ROUNDS * threads) as f64 / seconds / 1e9;
            told[peak.kind] = giga.into();
            told[format!("{} by", peak.kind)] = peak.instruction.into();
            line += &format!("; {} {giga:.0} GOP/s ({})", peak.kind, peak.instruction);
        }
        println!("{}", if json { told.to_string() } else { line });
    }
    Ok(())
}

/// Seconds that all threads take together, in the best run: from when all are ready to when the last is done.
fn together(threads: usize, work: impl Fn(usize) + Sync) -> f64 {
    let run = || {
        let ready = Barrier::new(threads);
        thread::scope(|scope| {
            let one = |thread| {
                let (ready, work) = (&ready, &work);
                scope.spawn(move || {
                    ready.wait();
                    let start = Instant::now();
                    work(thread);
                    start.elapsed().as_secs_f64()
                })
            };
            let running: Vec<_> = (0..threads).map(one).collect();
            let took = running.into_iter().map(|thread| thread.join().expect("a thread that does not panic"));
            took.fold(0.0, f64::max)
        })
    };
    (0..RUNS).map(|_| run()).fold(f64::INFINITY, f64::min)
}

/// Reads every byte once, in sequence.
fn read(numbers: &[u64]) {
    let mut sums = [0u64; 32];
    for chunk in numbers.chunks_exact(sums.len()) {
        for (sum, number) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*number);
        }
    }
    black_box(sums);
}

/// The best instruction that this CPU has for each kind of product.
#[cfg(not(target_arch = "x86_64"))]
fn peaks() -> Vec<Peak> {
    Vec::new()
}

/// The best instruction that this CPU has for each kind of product.
#[cfg(target_arch = "x86_64")]
fn peaks() -> Vec<Peak> {
    use x86::{CHAINS, bf16_512, bytes_256, bytes_vnni_256, bytes_vnni_512, f32_256, f32_512, nibbles_256};
    let peak = |kind, instruction, operations, run| Peak {
        kind,
        instruction,
        operations_per_round: CHAINS * operations,
        run,
    };
    let mut found = Vec::new();
    // SAFETY, of every call below: it stands behind the detection of the features that the function is built with.
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: detected.
        found.push(peak("f32", "vfmadd, 512 bits", 32, |rounds| unsafe { f32_512(rounds) }));
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: detected.
        found.push(peak("f32", "vfmadd, 256 bits", 16, |rounds| unsafe { f32_256(rounds) }));
    }
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
        // SAFETY: detected.
        found.push(peak("bf16", "vdpbf16ps, 512 bits", 64, |rounds| unsafe { bf16_512(rounds) }));
    }
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
        let run = |rounds| {
            // SAFETY: detected.
            unsafe { bytes_vnni_512(rounds) }
        };
        found.extend(["int8", "int4"].map(|kind| peak(kind, "vpdpbusd, 512 bits", 128, run)));
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("avxvnni") {
        let run = |rounds| {
            // SAFETY: detected.
            unsafe { bytes_vnni_256(rounds) }
        };
        found.extend(["int8", "int4"].map(|kind| peak(kind, "vpdpbusd, 256 bits", 64, run)));
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: detected.
        found.push(peak("int8", "vpmaddubsw + vpmaddwd + vpaddd", 64, |rounds| unsafe { bytes_256(rounds) }));
        // SAFETY: detected.
        found.push(peak("int4", "vpmaddubsw + vpaddw", 64, |rounds| unsafe { nibbles_256(rounds) }));
    }
    found
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256i, __m512bh, __m512i, _mm256_add_epi16, _mm256_add_epi32, _mm256_dpbusd_avx_epi32,
        _mm256_fmadd_ps, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8, _mm256_set1_epi16,
        _mm256_set1_ps, _mm512_dpbf16_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_set1_epi8,
        _mm512_set1_ps,
    };
    use std::hint::black_box;
    use std::mem::transmute;

    /// Sums that do not wait for one another: more than two instructions a cycle of five cycles each need, and no more
    /// than registers hold.
    pub(super) const CHAINS: usize = 12;

    /// `$step` on every chain, round by round.
    macro_rules! peak {
        ($name:ident, $features:literal, $first:expr, $step:expr) => {
            #[target_feature(enable = $features)]
            pub(super) fn $name(rounds: usize) {
                let mut sums = black_box([$first; CHAINS]);
                let step = $step;
                for _ in 0..rounds {
                    for sum in &mut sums {
                        *sum = step(*sum);
                    }
                }
                black_box(sums);
            }
        };
    }

    peak!(f32_256, "avx2,fma", _mm256_set1_ps(1.0), {
        let (half, one) = black_box((_mm256_set1_ps(0.5), _mm256_set1_ps(1.0)));
        move |sum| _mm256_fmadd_ps(sum, half, one)
    });
    peak!(f32_512, "avx512f", _mm512_set1_ps(1.0), {
        let (half, one) = black_box((_mm512_set1_ps(0.5), _mm512_set1_ps(1.0)));
        move |sum| _mm512_fmadd_ps(sum, half, one)
    });
    peak!(bf16_512, "avx512f,avx512bf16", _mm512_set1_ps(1.0), {
        // SAFETY: both are 64 bytes without a meaning of their own.
        let ones: __m512bh = unsafe { transmute::<__m512i, __m512bh>(black_box(_mm512_set1_epi8(0x3f))) };
        move |sum| _mm512_dpbf16_ps(sum, ones, ones)
    });
    peak!(bytes_vnni_512, "avx512f,avx512vnni", _mm512_set1_epi8(0), {
        let ones = black_box(_mm512_set1_epi8(1));
        move |sum| _mm512_dpbusd_epi32(sum, ones, ones)
    });
    peak!(bytes_vnni_256, "avx2,avxvnni", _mm256_set1_epi8(0), {
        let ones = black_box(_mm256_set1_epi8(1));
        move |sum| _mm256_dpbusd_avx_epi32(sum, ones, ones)
    });
    // The sums are factors as well, else the compiler takes the product out of the loop.
    peak!(bytes_256, "avx2", _mm256_set1_epi8(0), {
        let (bytes, ones) = black_box((_mm256_set1_epi8(1), _mm256_set1_epi16(1)));
        move |sum: __m256i| _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, sum), ones))
    });
    peak!(nibbles_256, "avx2", _mm256_set1_epi8(0), {
        let bytes = black_box(_mm256_set1_epi8(1));
        move |sum: __m256i| _mm256_add_epi16(sum, _mm256_maddubs_epi16(bytes, sum))
    });
}
