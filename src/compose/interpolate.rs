//! `$NAME` and `${NAME…}` in values, as Compose replaces them.
//!
//! Input: a tree and variables. Output: the tree with every value replaced; keys stay as they are.
//! A variable that is not set is empty and named; `$$` is a dollar sign.

use super::problem::{Problems, Spot, shortened};
use super::tree::{Entry, Node, Value};
use crate::model::Gather;
use std::collections::{BTreeMap, BTreeSet};

/// Defaults inside defaults; deeper is a mistake or an attack.
const NESTED_MAX: usize = 16;
/// What one value may become.
const VALUE_BYTES_MAX: usize = 256 << 10;
/// What all values together may become.
const REPLACED_BYTES_MAX: usize = 4 << 20;
/// The file is 0, `services` 1, a service 2: so deep stand the `x-*` keys of Compose.
const EXTENSION_DEPTH_MAX: usize = 2;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InterpolateError {
    #[error("after `$` comes neither a name nor `{{NAME}}` in `{0}`")]
    NoName(String),
    #[error("`${{` is not closed in `{0}`")]
    NotClosed(String),
    #[error("`{0}` can't stand behind the name in `${{…}}`: only `:-` `-` `:?` `?` `:+` `+`")]
    UnknownOperator(String),
    #[error("{0} is required{1}")]
    Required(String, String),
    #[error("variables are nested more than {NESTED_MAX} deep")]
    TooDeep,
    #[error("with its variables the value has more than {VALUE_BYTES_MAX} bytes")]
    TooLong,
}

impl InterpolateError {
    fn hint(&self) -> Option<&'static str> {
        match self {
            InterpolateError::NoName(_) => Some("write `$$` for a dollar sign"),
            InterpolateError::NotClosed(_) => Some("add `}`"),
            InterpolateError::Required(..) => Some("set it in the environment or in `.env`"),
            _ => None,
        }
    }
}

/// Replaces the variables of all values below `root`, except of `x-*` keys that nothing reads.
pub fn interpolate_tree(root: &Node, variables: &BTreeMap<String, String>, problems: &mut Problems) -> Node {
    let mut replacer = Replacer { variables, problems, bytes_left: REPLACED_BYTES_MAX };
    replacer.node(&Spot::root(root), 0)
}

struct Replacer<'v, 'p> {
    variables: &'v BTreeMap<String, String>,
    problems: &'p mut Problems,
    bytes_left: usize,
}

impl Replacer<'_, '_> {
    fn node(&mut self, spot: &Spot<'_>, depth: usize) -> Node {
        let value = match &spot.node.value {
            Value::Null => Value::Null,
            Value::Scalar(text) if !text.contains('$') => Value::Scalar(text.clone()),
            Value::Scalar(text) => Value::Scalar(self.text(spot, text)),
            Value::Sequence(_) => {
                Value::Sequence(spot.items().map(|item| self.node(&item, depth + 1)).collect())
            }
            Value::Mapping(entries) => {
                let replaced = entries.iter().zip(spot.entries()).map(|(entry, (key, inner))| {
                    // Deeper, in `environment` or `labels`, such a key is a key like any other.
                    let is_extension = depth <= EXTENSION_DEPTH_MAX && key.starts_with("x-");
                    let is_read = !is_extension || key == "x-tinydc";
                    let value = if is_read { self.node(&inner, depth + 1) } else { entry.value.clone() };
                    Entry { key: entry.key.clone(), position: entry.position, value }
                });
                Value::Mapping(replaced.collect())
            }
        };
        Node { position: spot.node.position, value }
    }

    fn text(&mut self, spot: &Spot<'_>, text: &str) -> String {
        if self.bytes_left == 0 {
            return text.to_owned();
        }
        match interpolate(text, self.variables) {
            Ok(Interpolated { text, unset }) => {
                for name in unset {
                    let hint = format!("set it, or write `${{{name}:-}}` if that is meant");
                    let message = format_args!("{name} is not set: an empty text stands in its place");
                    self.problems.warning_with(spot, message, hint);
                }
                self.bytes_left = self.bytes_left.saturating_sub(text.len());
                if self.bytes_left == 0 {
                    let message =
                        format_args!("with its variables the file has more than {REPLACED_BYTES_MAX} bytes");
                    self.problems.error(spot, message);
                }
                text
            }
            Err(error) => {
                match error.hint() {
                    Some(hint) => self.problems.error_with(spot, error, hint),
                    None => self.problems.error(spot, error),
                }
                text.to_owned()
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub struct Interpolated {
    pub text: String,
    /// Variables without value and without default.
    pub unset: BTreeSet<String>,
}

/// `text` with its variables replaced.
pub fn interpolate(
    text: &str,
    variables: &BTreeMap<String, String>,
) -> Result<Interpolated, InterpolateError> {
    let mut reader = Reader { rest: text, whole: text, variables, unset: Vec::new() };
    let text = reader.read(0, false)?;
    Ok(Interpolated { text, unset: reader.unset.into_iter().gather() })
}

struct Reader<'t> {
    rest: &'t str,
    whole: &'t str,
    variables: &'t BTreeMap<String, String>,
    unset: Vec<String>,
}

impl Reader<'_> {
    /// Up to the end, or inside `${…}` up to the brace that closes it.
    fn read(&mut self, depth: usize, is_inside: bool) -> Result<String, InterpolateError> {
        if depth > NESTED_MAX {
            return Err(InterpolateError::TooDeep);
        }
        let mut output = String::new();
        loop {
            let stop = self.rest.find(|letter| letter == '$' || (is_inside && letter == '}'));
            let Some(stop) = stop else {
                if is_inside {
                    return Err(InterpolateError::NotClosed(shortened(self.whole)));
                }
                output.push_str(self.rest);
                self.rest = "";
                return Ok(output);
            };
            output.push_str(&self.rest[..stop]);
            self.rest = &self.rest[stop..];
            if self.rest.starts_with('}') {
                self.rest = &self.rest[1..];
                return Ok(output);
            }
            self.rest = &self.rest[1..];
            let value = self.read_variable(depth)?;
            output.push_str(&value);
            if output.len() > VALUE_BYTES_MAX {
                return Err(InterpolateError::TooLong);
            }
        }
    }

    /// What stands behind a `$`.
    fn read_variable(&mut self, depth: usize) -> Result<String, InterpolateError> {
        if let Some(rest) = self.rest.strip_prefix('$') {
            self.rest = rest;
            return Ok("$".to_owned());
        }
        if let Some(rest) = self.rest.strip_prefix('{') {
            self.rest = rest;
            return self.read_braced(depth);
        }
        let name = self.read_name()?;
        Ok(self.value_or_empty(&name))
    }

    fn read_braced(&mut self, depth: usize) -> Result<String, InterpolateError> {
        let name = self.read_name()?;
        let value = self.variables.get(&name).cloned();
        let is_colon = self.rest.starts_with(':');
        let operator = self.rest[usize::from(is_colon)..].chars().next();
        if self.rest.starts_with('}') {
            self.rest = &self.rest[1..];
            return Ok(self.value_or_empty(&name));
        }
        let Some(operator) = operator else {
            return Err(InterpolateError::NotClosed(shortened(self.whole)));
        };
        if !matches!(operator, '-' | '?' | '+') {
            let text = self.rest.chars().take(1 + usize::from(is_colon)).collect();
            return Err(InterpolateError::UnknownOperator(text));
        }
        self.rest = &self.rest[1 + usize::from(is_colon)..];
        // What is not used may name variables that are not set.
        let unset_before = self.unset.len();
        let operand = self.read(depth + 1, true)?;
        let usable = value.filter(|value| !is_colon || !value.is_empty());
        let is_operand_used = (operator == '+') == usable.is_some();
        if !is_operand_used {
            self.unset.truncate(unset_before);
        }
        match (operator, usable) {
            ('-', None) => Ok(operand),
            ('-', Some(value)) => Ok(value),
            ('+', Some(_)) => Ok(operand),
            ('+', None) => Ok(String::new()),
            (_, Some(value)) => Ok(value),
            (_, None) => {
                let reason = if operand.is_empty() { operand } else { format!(": {}", shortened(&operand)) };
                Err(InterpolateError::Required(name, reason))
            }
        }
    }

    fn read_name(&mut self) -> Result<String, InterpolateError> {
        let is_inner = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        let end = self.rest.find(|letter| !is_inner(letter)).unwrap_or(self.rest.len());
        let name = &self.rest[..end];
        if name.is_empty() || name.starts_with(|letter: char| letter.is_ascii_digit()) {
            return Err(InterpolateError::NoName(shortened(self.whole)));
        }
        self.rest = &self.rest[end..];
        Ok(name.to_owned())
    }

    fn value_or_empty(&mut self, name: &str) -> String {
        match self.variables.get(name) {
            Some(value) => value.clone(),
            None => {
                self.unset.push(name.to_owned());
                String::new()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<String, InterpolateError> {
        let variables = [("A", "one"), ("EMPTY", "")].map(|(name, value)| (name.into(), value.into()));
        interpolate(text, &BTreeMap::from(variables)).map(|done| done.text)
    }

    #[test]
    fn variables_are_replaced_as_compose_does() {
        let cases = [
            ("$A-$A", "one-one"),
            ("${A}b", "oneb"),
            ("$$A", "$A"),
            ("$NONE.", "."),
            ("${NONE-d}${NONE:-d}", "dd"),
            ("${EMPTY-d}.${EMPTY:-d}", ".d"),
            ("${A:+r}${A+r}${NONE+r}${EMPTY:+r}${EMPTY+r}", "rrr"),
            ("${NONE:-${ALSO:-$A}}", "one"),
            ("${A:?needed}", "one"),
            ("${NONE:-}", ""),
            ("${NONE:-a:b-c}", "a:b-c"),
        ];
        for (text, expected) in cases {
            assert_eq!(check(text), Ok(expected.to_owned()), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_variable_is_refused() {
        assert!(matches!(check("a $ b"), Err(InterpolateError::NoName(_))));
        assert!(matches!(check("$1"), Err(InterpolateError::NoName(_))));
        assert!(matches!(check("${A"), Err(InterpolateError::NotClosed(_))));
        assert!(matches!(check("${A:-x"), Err(InterpolateError::NotClosed(_))));
        assert!(matches!(check("${A:=x}"), Err(InterpolateError::UnknownOperator(_))));
        assert!(matches!(check(&"${N:-".repeat(40)), Err(InterpolateError::TooDeep)));
        let required = check("${NONE:?set me}").unwrap_err();
        assert_eq!(required.to_string(), "NONE is required: set me");
    }

    #[test]
    fn an_unused_default_needs_no_value() {
        let variables = BTreeMap::from([("A".to_owned(), "one".to_owned())]);
        let done = interpolate("${A:-$NONE} $MISSING", &variables).unwrap();
        assert_eq!(done.unset, BTreeSet::from(["MISSING".to_owned()]));
    }
}
