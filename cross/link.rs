//! Links the binaries at a fixed address; those of boards, which are static, without what nobody reads there.
//!
//! A position-independent binary of this size carries half a megabyte of relocated pointers, private to each process:
//! more than all else that a container's shim holds (measured: 635 kB against 179 kB per shim).

fn main() {
    println!("cargo::rerun-if-changed=cross/link.rs");
    println!("cargo::rerun-if-changed=cross/unwind.ld");
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
