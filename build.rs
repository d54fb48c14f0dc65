//! Compiles `proto/` with a pure-Rust compiler: nothing to install.

use std::path::{Path, PathBuf};

/// The services on the Workload API's socket.
const SERVED: &[&str] = &[
    "spiffe/workload.proto",
    "envoy/service/secret/v3/sds.proto",
    "tbot/inspect/v1/inspect.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new("proto");
    println!("cargo:rerun-if-changed=proto");
    let mut files = Vec::new();
    collect(root, &mut files)?;
    files.sort();
    let descriptors = protox::compile(&files, [root])?;
    let mut served = protox::Compiler::new([root])?;
    served.include_imports(true).open_files(SERVED)?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);
    std::fs::write(out.join("served.bin"), served.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        // Messages of the Workload API are encoded once and shared by many streams.
        .bytes(".X509SVIDResponse")
        .bytes(".X509SVID")
        .bytes(".X509BundlesResponse")
        // What SSH carries is handed on as it came.
        .bytes(".teleport.transport.v1.Frame")
        .compile_fds(descriptors)?;
    Ok(())
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "proto") {
            files.push(path);
        }
    }
    Ok(())
}
