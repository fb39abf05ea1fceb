//! Links the binaries at a fixed address; those of boards, which are static, without what nobody reads there. Packs the
//! description of the API before.
//!
//! A position-independent binary of this size carries half a megabyte of relocated pointers, private to each process:
//! more than all else that a container's shim holds (measured: 635 kB against 179 kB per shim).

use std::io::Write;

fn main() {
    println!("cargo::rerun-if-changed=cross/link.rs");
    println!("cargo::rerun-if-changed=cross/unwind.ld");
    pack_api_document();
    let is_gnu = std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "gnu");
    if is_gnu {
        println!("cargo::rustc-link-arg-bins=-no-pie");
    } else {
        let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo names the package's folder");
        println!("cargo::rustc-link-arg-bins={root}/cross/unwind.ld");
        println!("cargo::rustc-link-arg-bins=--strip-all");
        // What the linker put where, for cross/sizes.
        let out = std::env::var("OUT_DIR").expect("cargo names the folder of this build");
        let profile = std::path::Path::new(&out).ancestors().nth(3).expect("cargo's folders are that deep");
        println!("cargo::rustc-link-arg-bins=-Map={}/tinydc.map", profile.display());
    }
}

/// The description of the API goes into the binary compressed: 10 kB instead of 75.
fn pack_api_document() {
    const DOCUMENT: &str = "src/api/openapi.json";
    println!("cargo::rerun-if-changed={DOCUMENT}");
    let text = std::fs::read(DOCUMENT).expect("the description of the API is part of the source");
    let out = std::env::var("OUT_DIR").expect("cargo names the folder of this build");
    let packed =
        std::fs::File::create(format!("{out}/openapi.json.z")).expect("cargo made the folder of this build");
    let mut encoder = flate2::write::ZlibEncoder::new(packed, flate2::Compression::best());
    encoder.write_all(&text).expect("write the packed description");
    encoder.finish().expect("write the packed description");
}
