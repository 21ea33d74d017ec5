//! Generates the messages and the service of `proto/owner.proto`; needs `protoc`.

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure().compile_protos(&["proto/owner.proto"], &["proto"])
}
