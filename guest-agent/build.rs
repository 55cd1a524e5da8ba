// SPDX-License-Identifier: Apache-2.0
//! Makes the static agent smaller: it lives in the RAM of every pod.
//!
//! Unwind tables go, which a program whose panics abort never reads; identical functions become one; relocations are
//! packed. Only for static builds with optimisation: the others are for tests, where backtraces are of use.
use std::env;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=agent.ld");
    let is =
        |name: &str, wanted: &str| env::var(name).is_ok_and(|value| value.split(',').any(|v| v == wanted));
    if is("CARGO_CFG_TARGET_FEATURE", "crt-static") && is("PROFILE", "release") {
        let dir = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        for argument in [
            &format!("-Wl,-T,{dir}/agent.ld"),
            "-Wl,--no-eh-frame-hdr",
            "-Wl,--icf=all",
            "-Wl,-O2",
            "-Wl,-z,pack-relative-relocs",
            "-Wl,-z,noseparate-code",
            "-Wl,--build-id=none",
        ] {
            println!("cargo:rustc-link-arg-bins={argument}");
        }
    }
}
