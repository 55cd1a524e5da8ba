// SPDX-License-Identifier: Apache-2.0
//! The `cloister` command.

pub mod args;
pub mod parse;
pub mod table;
