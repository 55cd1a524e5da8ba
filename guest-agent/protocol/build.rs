// SPDX-License-Identifier: Apache-2.0
//! Generates the Pod service from `proto/pod.proto` with ttrpc's compiler, which parses protobuf itself: no protoc.
#![allow(clippy::expect_used)]
use std::path::PathBuf;
use std::{env, fs};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    println!("cargo:rerun-if-changed=proto/pod.proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    Codegen::new()
        .out_dir(&out)
        .input("proto/pod.proto")
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()
        .expect("proto/pod.proto compiles");
    // include! takes no inner attributes or inner docs: cut them off.
    for name in ["pod.rs", "pod_ttrpc.rs"] {
        let path = out.join(name);
        let text = fs::read_to_string(&path).expect("the compiler wrote its output");
        let kept: Vec<&str> = text
            .lines()
            .filter(|l| !l.starts_with("#!") && !l.starts_with("//!"))
            .collect();
        fs::write(&path, kept.join("\n")).expect("OUT_DIR is writable");
    }
}
