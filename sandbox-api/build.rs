// SPDX-License-Identifier: Apache-2.0
//! Generates the server side of containerd's sandbox Controller service for tonic. The messages are those of the crate
//! `containerd-client`, which has only the client side.

use tonic_build::manual::{Builder, Method, Service};

/// Service methods as (Rust name, name on the wire); the messages are `Controller<Name>Request` and `...Response`.
const METHODS: [(&str, &str); 9] = [
    ("create", "Create"),
    ("start", "Start"),
    ("platform", "Platform"),
    ("stop", "Stop"),
    ("wait", "Wait"),
    ("status", "Status"),
    ("shutdown", "Shutdown"),
    ("metrics", "Metrics"),
    ("update", "Update"),
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let messages = "containerd_client::services::v1::sandbox::Controller";
    let mut service = Service::builder()
        .name("Controller")
        .package("containerd.services.sandbox.v1");
    for (name, route) in METHODS {
        service = service.method(
            Method::builder()
                .name(name)
                .route_name(route)
                .input_type(format!("{messages}{route}Request"))
                .output_type(format!("{messages}{route}Response"))
                .codec_path("tonic_prost::ProstCodec")
                .build(),
        );
    }
    Builder::new().build_client(false).compile(&[service.build()]);
}
