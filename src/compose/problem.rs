//! What is wrong with a Compose file, or has no effect here, each with its place.
//!
//! Input: findings in any order. Output: one list without repeats, sorted by line.

use super::tree::Node;
use crate::model::Order;
use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The file can't be deployed.
    Error,
    /// It can be deployed, but perhaps doesn't mean what was meant.
    Warning,
    /// A key without effect in tinydc.
    Ignored,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub severity: Severity,
    pub file: String,
    /// From 1; 0 where no line of the file is meant.
    pub line: usize,
    /// In characters, from 1; 0 where no line of the file is meant.
    pub column: usize,
    /// One sentence: the place inside the file and what is wrong there.
    pub message: String,
    /// What to write instead.
    pub hint: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        let word = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Ignored => "ignored",
        };
        write!(f, ": {word}: {}", self.message)?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

/// A line and a column, both from 1; 0 where no line of the file is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

/// Past this many only errors are kept, past twice as many they are only counted: nobody reads on.
const PROBLEMS_MAX: usize = 200;

/// Collects problems.
#[derive(Debug)]
pub struct Problems {
    file: String,
    found: Vec<Problem>,
    has_errors: bool,
    /// Found after the list was full.
    left_out: usize,
}

impl Problems {
    pub fn new(file: &str) -> Problems {
        Problems { file: file.to_owned(), found: Vec::new(), has_errors: false, left_out: 0 }
    }

    pub fn has_errors(&self) -> bool {
        self.has_errors
    }

    /// Whether what is found now is hardly read: no need to think about hints.
    pub fn is_full(&self) -> bool {
        self.found.len() >= PROBLEMS_MAX
    }

    pub fn add(&mut self, severity: Severity, position: Position, message: String, hint: Option<String>) {
        self.has_errors |= severity == Severity::Error;
        if self.is_full() && (severity != Severity::Error || self.found.len() >= 2 * PROBLEMS_MAX) {
            self.left_out += 1;
            return;
        }
        let Position { line, column } = position;
        self.found.push(Problem { severity, file: self.file.clone(), line, column, message, hint });
    }

    pub fn error(&mut self, spot: &Spot<'_>, message: impl fmt::Display) {
        self.add(Severity::Error, spot.position(), spot.say(message), None);
    }

    pub fn error_with(&mut self, spot: &Spot<'_>, message: impl fmt::Display, hint: impl Into<String>) {
        self.add(Severity::Error, spot.position(), spot.say(message), Some(hint.into()));
    }

    pub fn warning_with(&mut self, spot: &Spot<'_>, message: impl fmt::Display, hint: impl Into<String>) {
        self.add(Severity::Warning, spot.position(), spot.say(message), Some(hint.into()));
    }

    pub fn ignored(&mut self, spot: &Spot<'_>, why: impl fmt::Display) {
        self.add(Severity::Ignored, spot.position(), spot.say(format_args!("has no effect: {why}")), None);
    }

    /// Sorted by line, then severity; what an alias repeated is named once.
    pub fn into_sorted(self) -> Vec<Problem> {
        let mut found = self.found;
        let line_last = found.iter().map(|problem| problem.line).max().unwrap_or(0);
        found.order_by(|a, b| {
            (a.line, a.column, a.severity, &a.message).cmp(&(b.line, b.column, b.severity, &b.message))
        });
        found.dedup();
        if self.left_out > 0 {
            found.push(Problem {
                severity: Severity::Warning,
                file: self.file,
                line: line_last,
                column: 1,
                message: format!("{} more problems are not shown", self.left_out),
                hint: None,
            });
        }
        found
    }
}

/// A node and how one gets there: `services.web.ports[1]`.
#[derive(Clone, Debug)]
pub struct Spot<'n> {
    pub node: &'n Node,
    pub path: String,
    /// Of the key, where there is one: that is where a reader looks.
    key_position: Option<Position>,
}

impl<'n> Spot<'n> {
    pub fn root(node: &'n Node) -> Spot<'n> {
        Spot { node, path: String::new(), key_position: None }
    }

    pub fn position(&self) -> Position {
        self.key_position.unwrap_or(self.node.position)
    }

    fn child(&self, key: &str, node: &'n Node, key_position: Position) -> Spot<'n> {
        let key = shortened(key);
        let path = if self.path.is_empty() { key } else { format!("{}.{key}", self.path) };
        Spot { node, path, key_position: Some(key_position) }
    }

    /// Entries of a mapping with their keys; nothing for other nodes.
    pub fn entries(&self) -> impl Iterator<Item = (&'n str, Spot<'n>)> {
        self.node
            .entries()
            .iter()
            .map(|entry| (entry.key.as_str(), self.child(&entry.key, &entry.value, entry.position)))
    }

    /// Items of a sequence; nothing for other nodes.
    pub fn items(&self) -> impl Iterator<Item = Spot<'n>> {
        self.node.items().iter().enumerate().map(|(index, node)| Spot {
            node,
            path: format!("{}[{index}]", self.path),
            key_position: None,
        })
    }

    pub fn say(&self, message: impl fmt::Display) -> String {
        if self.path.is_empty() { message.to_string() } else { format!("{}: {message}", self.path) }
    }
}

/// At most 80 characters of text that goes into a message.
pub fn shortened(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
