// SPDX-License-Identifier: Apache-2.0
//! The daemon; see the library.

fn main() -> std::process::ExitCode {
    cloister_sandbox_api::daemon::main()
}
