//! Why a verb did not do what it was asked, and what the process exits with.
//!
//! An error of the API, of the connection or of the command line → one line, a hint, an exit code (protocol 11):
//! 0 done, 1 refused, 2 usage, 3 unreachable or no leader, 4 unknown outcome; `exec` gives the command's own.
//!
//! Invariant: each code of the API has one exit code (`each_code_has_its_exit`).

use std::fmt;
use std::process::ExitCode;

use crate::api::wire::{ErrorBody, ErrorDetail, ProblemBody};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Refused,
    Usage,
    Unreachable,
    UnknownOutcome,
    /// Of the command that `exec` ran.
    Command(u8),
}

impl Exit {
    pub fn number(self) -> u8 {
        match self {
            Exit::Refused => 1,
            Exit::Usage => 2,
            Exit::Unreachable => 3,
            Exit::UnknownOutcome => 4,
            Exit::Command(code) => code,
        }
    }

    /// The word by which `--json` names it, where the API gave none.
    fn word(self) -> &'static str {
        match self {
            Exit::Refused | Exit::Command(_) => "rejected",
            Exit::Usage => "invalid",
            Exit::Unreachable => "unreachable",
            Exit::UnknownOutcome => "unknown_outcome",
        }
    }

    fn of_code(code: &str) -> Exit {
        match code {
            "no_leader" | "busy" => Exit::Unreachable,
            "unknown_outcome" => Exit::UnknownOutcome,
            _ => Exit::Refused,
        }
    }
}

/// An error with its exit code and its remedy. Anything else that fails counts as refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub exit: Exit,
    pub detail: ErrorDetail,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail.message)
    }
}

impl std::error::Error for Failure {}

impl Failure {
    fn new(exit: Exit, message: impl Into<String>) -> Failure {
        let code = exit.word().into();
        Failure { exit, detail: ErrorDetail { code, message: message.into(), ..ErrorDetail::default() } }
    }

    pub fn refused(message: impl Into<String>) -> Failure {
        Failure::new(Exit::Refused, message)
    }

    pub fn usage(message: impl Into<String>) -> Failure {
        Failure::new(Exit::Usage, message)
    }

    pub fn unreachable(message: impl Into<String>) -> Failure {
        Failure::new(Exit::Unreachable, message)
    }

    pub fn unknown_outcome(message: impl Into<String>) -> Failure {
        Failure::new(Exit::UnknownOutcome, message)
    }

    pub fn command(code: u8) -> Failure {
        Failure::new(Exit::Command(code), "")
    }

    /// An answer above 399. A body that is no `ErrorBody` is shown as it came, cut short.
    pub fn of_answer(status: u16, body: &[u8]) -> Failure {
        match serde_json::from_slice::<ErrorBody>(body) {
            Ok(body) => Failure { exit: Exit::of_code(&body.error.code), detail: body.error },
            Err(_) => {
                let text: String = String::from_utf8_lossy(body).chars().take(200).collect();
                Failure::refused(format!("the daemon answered {status}: {}", text.trim()))
                    .hint("is this tinydc of the same version? see `tinydc version`")
            }
        }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.detail.hint = Some(hint.into());
        self
    }

    pub fn problems(mut self, problems: Vec<ProblemBody>) -> Failure {
        self.detail.problems = problems;
        self
    }

    pub fn is_code(&self, code: &str) -> bool {
        self.detail.code == code
    }
}

/// One line for the whole chain; a source that its parent already quotes is left out.
pub fn chain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text.replace('\n', " ")
}

/// Prints the error once, on standard error, and gives the exit code.
pub fn report(error: &anyhow::Error, is_json: bool, has_colour: bool) -> ExitCode {
    let failure = error.downcast_ref::<Failure>();
    let exit = failure.map_or(Exit::Refused, |failure| failure.exit);
    if let Exit::Command(code) = exit {
        return ExitCode::from(code);
    }
    if is_json {
        let mut detail = failure.map(|failure| failure.detail.clone()).unwrap_or_default();
        if failure.is_none() {
            detail.code = exit.word().into();
        }
        detail.message = chain(error);
        let body = serde_json::to_string(&ErrorBody { error: detail });
        eprintln!("{}", body.unwrap_or_default());
        return ExitCode::from(exit.number());
    }
    let (red, plain) = if has_colour { ("\x1b[31m", "\x1b[0m") } else { ("", "") };
    for problem in failure.iter().flat_map(|failure| &failure.detail.problems) {
        let place = format!("{}:{}:{}", problem.file, problem.line, problem.column);
        eprintln!("{place}: {red}error{plain}: {}", problem.message);
    }
    eprintln!("{red}error{plain}: {}", chain(error));
    if let Some(hint) = failure.and_then(|failure| failure.detail.hint.as_deref()) {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(exit.number())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_has_its_exit() {
        let cases = [
            ("invalid", 1),
            ("unauthorized", 1),
            ("forbidden", 1),
            ("not_found", 1),
            ("rejected", 1),
            ("port_taken", 1),
            ("stale", 1),
            ("too_large", 1),
            ("internal", 1),
            ("busy", 3),
            ("no_leader", 3),
            ("unknown_outcome", 4),
        ];
        for (code, number) in cases {
            let body = format!(r#"{{"error":{{"code":"{code}","message":"m","hint":"h"}}}}"#);
            let failure = Failure::of_answer(409, body.as_bytes());
            assert_eq!(failure.exit.number(), number, "{code}");
            assert_eq!(failure.detail.hint.as_deref(), Some("h"));
        }
        assert_eq!(Failure::usage("").exit.number(), 2);
        assert_eq!(Failure::command(42).exit.number(), 42);
    }

    #[test]
    fn an_answer_that_is_no_error_body_is_shown_short() {
        let failure = Failure::of_answer(502, "x".repeat(1000).as_bytes());
        assert!(failure.to_string().len() < 300 && failure.to_string().contains("502"));
    }

    #[test]
    fn a_chain_is_one_line_and_says_nothing_twice() {
        let source = anyhow::anyhow!("no such\nfile");
        assert_eq!(chain(&source.context("read a")), "read a: no such file");
        assert_eq!(chain(&anyhow::anyhow!("b: c").context("a: b: c")), "a: b: c");
    }
}
