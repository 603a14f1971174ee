//! Compiles the CUDA kernels, if there is a toolkit.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Ampere, Hopper with its own instructions, Blackwell; and code that drivers compile for what comes after each.
const TARGETS: [&str; 5] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100,code=sm_100",
    "arch=compute_80,code=compute_80",
    "arch=compute_100,code=compute_100",
];

fn main() {
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo names OUT_DIR")).join("kernels.fatbin");
    let Some(home) = env::var_os("CUDA_HOME").filter(|home| !home.is_empty()) else {
        // `--device cuda` then says what this build lacks.
        return std::fs::write(out, []).expect("OUT_DIR can be written");
    };
    let nvcc = Path::new(&home).join("bin/nvcc");
    let mut compile = Command::new(&nvcc);
    // A register that is spilled in a kernel is an error, as every warning is.
    compile.args([
        "-std=c++17",
        "-Werror",
        "all-warnings",
        "-Xptxas",
        "-warn-spills",
        "--compress-mode=size",
        "-t",
        "0",
    ]);
    compile.args(TARGETS.iter().flat_map(|target| ["-gencode", target]));
    compile.args(["-fatbin", "-o"]).arg(out).arg("cuda/kernels.cu");
    match compile.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("nvcc could not compile cuda/kernels.cu ({status})"),
        Err(error) => {
            panic!("{} could not be started: {error}. CUDA_HOME must name a CUDA 13 toolkit", nvcc.display())
        }
    }
}
