// SPDX-License-Identifier: Apache-2.0
//! Generates the server side of containerd's sandbox Controller service for tonic. The messages are those of the crate
//! `containerd-client`, which has only the client side; iSulad's are our own (`daemon::isulad`).

use tonic_build::manual::{Builder, Method, Service};

const MESSAGES: &str = "containerd_client::services::v1::sandbox::Controller";
const DIALECT: &str = "crate::daemon::isulad::dialect::";

/// Methods that iSulad's draft has with other fields: Rust name, name on the wire, answer.
const IN_BOTH: [(&str, &str, Option<&str>); 7] = [
    ("create", "Create", None),
    ("start", "Start", None),
    ("platform", "Platform", None),
    ("stop", "Stop", None),
    ("wait", "Wait", None),
    ("status", "Status", Some("StatusAnswer")),
    ("shutdown", "Shutdown", None),
];
/// Methods of containerd's alone.
const CURRENT: [(&str, &str); 2] = [("metrics", "Metrics"), ("update", "Update")];
/// Methods of the draft alone.
const DRAFT: [(&str, &str); 3] = [
    ("prepare", "Prepare"),
    ("purge", "Purge"),
    ("update_resources", "UpdateResources"),
];

fn method(name: &str, route: &str, request: &str, answer: &str, codec: &str) -> Method {
    Method::builder()
        .name(name)
        .route_name(route)
        .input_type(request)
        .output_type(answer)
        .codec_path(codec)
        .build()
}

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let mut service = Service::builder()
        .name("Controller")
        .package("containerd.services.sandbox.v1");
    for (name, route, answer) in IN_BOTH {
        let request = format!("{DIALECT}Told<{MESSAGES}{route}Request>");
        let answer = match answer {
            Some(answer) => format!("{DIALECT}{answer}"),
            None => format!("{MESSAGES}{route}Response"),
        };
        let codec = format!("{DIALECT}DialectCodec");
        service = service.method(method(name, route, &request, &answer, &codec));
    }
    let current = CURRENT.map(|(name, route)| (name, route, MESSAGES));
    for (name, route, messages) in current
        .into_iter()
        .chain(DRAFT.map(|(name, route)| (name, route, DIALECT)))
    {
        let request = format!("{messages}{route}Request");
        let answer = format!("{messages}{route}Response");
        service = service.method(method(name, route, &request, &answer, "tonic_prost::ProstCodec"));
    }
    Builder::new().build_client(false).compile(&[service.build()]);
}
