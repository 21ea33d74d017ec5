//! Generates the gRPC messages and services from `proto/control.proto`; needs `protoc`.

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure()
        // Status is printed as JSON by the command line; fields that an older peer lacks default.
        .message_attribute(".", "#[derive(serde::Serialize, serde::Deserialize)]")
        .message_attribute(".", "#[serde(default)]")
        .btree_map(".")
        .compile_protos(&["proto/control.proto"], &["proto"])
}
