//! Generates the gRPC code from `proto/`; needs `protoc` (`make setup` brings it).

fn main() -> std::io::Result<()> {
    let root = std::path::Path::new("../../proto");
    let files = [
        "galerne/v1/galerne",
        "galerne/v1/engine",
        "galerne/v1/rank",
        "galerne/v1/sampling",
        "vllm/inference",
        "vllm/control",
        "vllm/grpc/engine/vllm_engine",
    ]
    .map(|name| root.join(format!("{name}.proto")));
    println!("cargo:rerun-if-changed=../../proto");
    let descriptor = std::path::PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    tonic_prost_build::configure()
        .codec_path("crate::codec::WholeCodec")
        .file_descriptor_set_path(descriptor.join("galerne.bin"))
        .compile_protos(&files, &[root.to_path_buf()])
}
