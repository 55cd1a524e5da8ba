// SPDX-License-Identifier: Apache-2.0
//! Errors as clients see them: a ttrpc status with a code containerd acts on.

use std::fmt::Display;

use cloister_protocol::ttrpc;
use ttrpc::{Code, Error, get_status};

/// Result of a request.
pub type Result<T> = ttrpc::Result<T>;

fn status(code: Code, text: impl Display) -> Error {
    Error::RpcStatus(get_status(code, text.to_string()))
}

/// The thing named does not exist (any more).
pub fn not_found(text: impl Display) -> Error {
    status(Code::NOT_FOUND, format!("{text}: not found"))
}

/// The name is taken.
pub fn already_exists(text: impl Display) -> Error {
    status(Code::ALREADY_EXISTS, format!("{text}: already exists"))
}

/// The thing exists but is in the wrong state.
pub fn failed_precondition(text: impl Display) -> Error {
    status(Code::FAILED_PRECONDITION, text)
}

/// The request makes no sense.
pub fn invalid_argument(text: impl Display) -> Error {
    status(Code::INVALID_ARGUMENT, text)
}

/// The agent does not do that.
pub fn unimplemented(text: impl Display) -> Error {
    status(Code::UNIMPLEMENTED, text)
}

/// The attempt failed.
pub fn unknown(text: impl Display) -> Error {
    status(Code::UNKNOWN, text)
}

/// An error with all its causes, each said once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
