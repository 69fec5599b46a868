//! Makes Rust of the gRPC definitions; no `protoc` needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/snapshots.proto", "proto/images.proto", "proto/content.proto", "proto/cri.proto"];
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().build_transport(false).include_file("api.rs").compile_fds(descriptors)?;
    Ok(())
}
