use std::fmt;
use std::str::FromStr;

#[cfg(target_arch = "aarch64")]
use super::neon;
use super::{DotKernel, Kernel, PairKernel, portable};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// The instruction set that kernels run on. Holding one is the proof that this CPU has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "aarch64")]
    NeonDot,
}

impl Isa {
    /// What every CPU has.
    pub(crate) const fn portable() -> Self {
        Self(Level::Portable)
    }

    /// All that this CPU has, best last.
    pub fn available() -> Vec<Self> {
        let mut found = vec![Self::portable()];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 {
                found.push(Self(Level::Avx2));
            }
            if avx2 && is_x86_feature_detected!("avx512f") {
                found.push(Self(Level::Avx512));
                if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni") {
                    found.push(Self(Level::Avx512Vnni));
                    if is_x86_feature_detected!("avx512bf16") {
                        found.push(Self(Level::Avx512Bf16));
                    }
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            found.push(Self(Level::Neon));
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                found.push(Self(Level::NeonDot));
            }
        }
        found
    }

    /// The fastest that this CPU has.
    pub fn best() -> Self {
        Self::available().pop().unwrap_or(Self::portable())
    }

    /// As people write it.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "aarch64")]
            Level::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Level::NeonDot => "neon-dot",
        }
    }

    /// Whether it has an instruction for [`Pairs`](super::Pairs); others come to the same bits, slowly.
    pub(crate) fn multiplies_pairs(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => true,
            _ => false,
        }
    }

    /// Most tokens whose sums fit the registers beside one pair of weight vectors.
    pub(crate) fn tokens_in_registers_max(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Vnni | Level::Avx512Bf16 => 12,
            _ => 6, // of 16 registers, or of 32 of half the size
        }
    }

    /// Whether products of bytes take weights apart first, so that it pays to do so once for many tokens.
    pub(crate) fn lays_out(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni | Level::Avx512Bf16 => false,
            #[cfg(target_arch = "aarch64")]
            Level::NeonDot => false,
            _ => true,
        }
    }

    /// Runs a kernel in code compiled for this instruction set.
    ///
    /// # Safety
    /// What the kernel asks for.
    pub(crate) unsafe fn run<K: Kernel>(self, kernel: K) {
        // SAFETY: an `Isa` is made by `available` alone, which has asked the CPU; the rest is the caller's.
        unsafe {
            match self.0 {
                Level::Portable => kernel.run::<portable::F32x8>(),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => avx2::run(kernel),
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 | Level::Avx512Vnni | Level::Avx512Bf16 => avx512::run(kernel),
                #[cfg(target_arch = "aarch64")]
                Level::Neon | Level::NeonDot => kernel.run::<neon::F32x8>(),
            }
        }
    }

    /// As [`run`](Isa::run). AVX-512 F alone has no products of bytes, so that AVX2 serves; NEON alone leaves them to the
    /// compiler.
    ///
    /// # Safety
    /// What the kernel asks for.
    pub(crate) unsafe fn run_dots<K: DotKernel>(self, kernel: K) {
        // SAFETY: as in `run`; whoever has AVX-512 has AVX2.
        unsafe {
            match self.0 {
                Level::Portable => kernel.run::<portable::F32x8>(),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 | Level::Avx512 => avx2::run_dots(kernel),
                #[cfg(target_arch = "x86_64")]
                Level::Avx512Vnni | Level::Avx512Bf16 => avx512::run_dots(kernel),
                #[cfg(target_arch = "aarch64")]
                Level::Neon => kernel.run::<portable::F32x8>(),
                #[cfg(target_arch = "aarch64")]
                Level::NeonDot => neon::run_dots(kernel),
            }
        }
    }

    /// As [`run`](Isa::run). Without an instruction for pairs they are emulated, eight lanes at a time.
    ///
    /// # Safety
    /// What the kernel asks for.
    pub(crate) unsafe fn run_pairs<K: PairKernel>(self, kernel: K) {
        // SAFETY: as in `run_dots`.
        unsafe {
            match self.0 {
                Level::Portable => kernel.run::<portable::F32x8>(),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 | Level::Avx512 | Level::Avx512Vnni => avx2::run_pairs(kernel),
                #[cfg(target_arch = "x86_64")]
                Level::Avx512Bf16 => avx512::run_pairs(kernel),
                #[cfg(target_arch = "aarch64")]
                Level::Neon | Level::NeonDot => kernel.run::<neon::F32x8>(),
            }
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = String;

    /// One of those that this CPU has.
    fn from_str(text: &str) -> Result<Self, String> {
        let available = Self::available();
        available.iter().copied().find(|isa| isa.name() == text).ok_or_else(|| {
            let names: Vec<&str> = available.iter().map(|isa| isa.name()).collect();
            format!("this CPU does not have {text:?}; it has {}", names.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_cpu_has_can_be_named_and_nothing_else() {
        for isa in Isa::available() {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
        let error = "sse9".parse::<Isa>().unwrap_err();
        assert!(error.starts_with("this CPU does not have \"sse9\"; it has portable"), "{error}");
    }
}
