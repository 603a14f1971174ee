//! Compiles the kernels of `crates/model/cuda` for the host.

fn main() {
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rerun-if-changed=../model/cuda");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .cpp_link_stdlib(None)
        .file("cuda/emulator.cpp")
        .include("cuda")
        .include("../model/cuda")
        .opt_level(2)
        .warnings(true)
        .extra_warnings(true)
        .warnings_into_errors(true)
        // No sum may be fused that the source does not fuse, and stacks are left by long jumps.
        .flags([
            "-ffp-contract=off",
            "-fno-exceptions",
            "-fno-rtti",
            "-U_FORTIFY_SOURCE",
            "-Wno-unknown-pragmas",
        ])
        .compile("galerne_emulator");
}
