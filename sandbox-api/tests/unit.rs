// SPDX-License-Identifier: Apache-2.0
//! The unit as systemd reads it.

#![allow(clippy::unwrap_used)]

use std::process::Command;

#[test]
fn systemd_finds_nothing_wrong() {
    let dir = std::env::temp_dir().join(format!(
        "cloister-unit-{}",
        cloister_sandbox_api::ids::random_hex(6)
    ));
    std::fs::create_dir(&dir).unwrap();
    let unit = include_str!("../dist/cloisterd.service");
    let start = format!("ExecStart={}\n", env!("CARGO_BIN_EXE_cloisterd"));
    let here = unit.replace("ExecStart=/usr/bin/cloisterd\n", &start);
    assert_ne!(here, unit);
    let path = dir.join("cloisterd.service");
    for (text, is_good) in [
        (here.clone(), true),
        (here.replace("Type=notify", "Typo=notify"), false),
    ] {
        std::fs::write(&path, text).unwrap();
        let output = Command::new("systemd-analyze")
            .args(["verify", "--man=no"])
            .arg(&path)
            .output()
            .unwrap_or_else(|e| panic!("systemd-analyze (package systemd): {e}"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success() && said.is_empty(), is_good, "{said}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
