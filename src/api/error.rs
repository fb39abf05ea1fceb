//! What went wrong, as the API says it: a code, a status, a sentence, a remedy.

use super::wire::{ErrorBody, ErrorDetail};
use crate::state::Rejection;
use hyper::StatusCode;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", detail.message)]
pub struct ApiError {
    pub status: StatusCode,
    pub detail: ErrorDetail,
}

impl ApiError {
    pub fn new(status: StatusCode, code: &str, message: impl Into<String>) -> ApiError {
        let detail = ErrorDetail { code: code.into(), message: message.into(), ..ErrorDetail::default() };
        ApiError { status, detail }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> ApiError {
        self.detail.hint = Some(hint.into());
        self
    }

    pub fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid", message)
    }

    pub fn not_found(what: &str, name: &str) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, "not_found", format!("no {what} is called {name}"))
            .hint("tinydc ls and tinydc node ls show what there is")
    }

    pub fn rejected(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::CONFLICT, "rejected", message)
    }

    pub fn unavailable(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_leader", message)
    }

    pub fn internal(error: &dyn std::error::Error) -> ApiError {
        let message = crate::agent::chain(error);
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    pub fn body(&self) -> ErrorBody {
        ErrorBody { error: self.detail.clone() }
    }
}

impl From<Rejection> for ApiError {
    fn from(rejection: Rejection) -> ApiError {
        let status = match rejection.code() {
            "not_found" => StatusCode::NOT_FOUND,
            "invalid" => StatusCode::BAD_REQUEST,
            "stale" => StatusCode::PRECONDITION_FAILED,
            "too_large" => StatusCode::PAYLOAD_TOO_LARGE,
            "unknown_outcome" => StatusCode::GATEWAY_TIMEOUT,
            "token_refused" => StatusCode::FORBIDDEN,
            _ => StatusCode::CONFLICT,
        };
        let error = ApiError::new(status, rejection.code(), rejection.to_string());
        match rejection.hint() {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}
