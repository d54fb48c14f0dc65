//! Compiles `proto/` with a pure-Rust compiler: nothing to install.

use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new("proto");
    println!("cargo:rerun-if-changed=proto");
    let mut files = Vec::new();
    collect(root, &mut files)?;
    files.sort();
    let descriptors = protox::compile(&files, [root])?;
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
