// SPDX-License-Identifier: Apache-2.0
//! The `cloister` command; all of it is in the library.

fn main() -> std::process::ExitCode {
    cloister_sandbox_api::cli::main()
}
