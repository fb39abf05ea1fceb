//! What became of the start: each phase with its time, each problem with its remedy; as text, for a screen and by HTTP.
//!
//! Input: outcomes and problems. Output: the report in `/run`, and on port 7480 while something is wrong and after a
//! phase that failed: a board without a screen can be asked by any browser. A healthy board listens there to nobody.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

pub const FILE: &str = "/run/tinydc-boot/report";
pub const PORT: u16 = 7480;
/// A browser asks within this, or is answered without having asked.
const QUESTION_LIMIT: Duration = Duration::from_millis(200);
const PROBLEMS_MAX: usize = 40;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub name: &'static str,
    /// Since the kernel's start.
    pub began_ms: u64,
    pub took_ms: u64,
    pub result: Result<String, String>,
}

impl Outcome {
    pub fn line(&self) -> String {
        let at = format!("[{:>4}.{:03}]", self.began_ms / 1000, self.began_ms % 1000);
        let (mark, text) = match &self.result {
            Ok(text) => ("ok    ", text),
            Err(text) => ("FAILED", text),
        };
        format!("{at} {mark} {:<9} {text} ({} ms)", self.name, self.took_ms)
    }
}

#[derive(Default)]
pub struct Report {
    outcomes: Vec<Outcome>,
    problems: Vec<String>,
    /// Name, addresses, state of the daemon: told anew at each change.
    standing: Vec<String>,
    listener: Option<TcpListener>,
}

impl Report {
    pub fn add_outcome(&mut self, outcome: Outcome) {
        self.outcomes.push(outcome);
        self.write();
    }

    pub fn has_failure(&self) -> bool {
        self.outcomes.iter().any(|outcome| outcome.result.is_err())
    }

    /// What a phase lacked is there now.
    pub fn forget_problem(&mut self, phase: &str) {
        let is_of_phase = |problem: &String| problem.split(':').next() == Some(phase);
        self.problems.retain(|problem| !is_of_phase(problem));
        self.write();
    }

    /// The same problem is told once; the oldest give way.
    pub fn add_problem(&mut self, problem: &str) {
        if self.problems.iter().any(|known| known == problem) {
            return;
        }
        if self.problems.len() >= PROBLEMS_MAX {
            self.problems.remove(0);
        }
        self.problems.push(problem.into());
        self.write();
    }

    pub fn set_standing(&mut self, standing: Vec<String>) {
        if self.standing != standing {
            self.standing = standing;
            self.write();
        }
    }

    pub fn text(&self) -> String {
        let mut text = String::new();
        for line in &self.standing {
            text += &format!("{line}\n");
        }
        for problem in &self.problems {
            text += &format!("problem: {problem}\n");
        }
        for outcome in &self.outcomes {
            text += &format!("{}\n", outcome.line());
        }
        text
    }

    fn write(&self) {
        // The screen shows the file; without it the console has all the same been told.
        let _ = fs::write(FILE, self.text());
    }

    /// Answers on the network while `is_wanted`.
    pub fn listen(&mut self, is_wanted: bool) {
        if !is_wanted {
            self.listener = None;
        } else if self.listener.is_none() {
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).ok();
            self.listener = listener.filter(|listener| listener.set_nonblocking(true).is_ok());
        }
    }

    pub fn waits_on(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(AsFd::as_fd)
    }

    /// Answers one who asks; every question gets the same answer.
    pub fn answer(&self) {
        let Some(Ok((mut stream, _))) = self.listener.as_ref().map(TcpListener::accept) else { return };
        let limited = stream.set_nonblocking(false).is_ok()
            && stream.set_read_timeout(Some(QUESTION_LIMIT)).is_ok()
            && stream.set_write_timeout(Some(QUESTION_LIMIT)).is_ok();
        if limited {
            let _ = stream.read(&mut [0; 1024]);
            let body = self.text();
            let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n";
            // Whoever has gone misses it.
            let _ = write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_is_told_with_its_time_and_its_reason() {
        let outcome = Outcome {
            name: "data",
            began_ms: 2_345,
            took_ms: 120,
            result: Err("no partition is labelled tinydc".into()),
        };
        assert_eq!(outcome.line(), "[   2.345] FAILED data      no partition is labelled tinydc (120 ms)");
    }

    #[test]
    fn problems_are_told_once_and_bounded() {
        let mut report = Report::default();
        for number in 0..100 {
            report.add_problem(&format!("problem {number}"));
            report.add_problem("the same");
        }
        let text = report.text();
        assert_eq!(text.matches("problem: ").count(), PROBLEMS_MAX);
        assert!(text.contains("problem 99"));
    }
}
