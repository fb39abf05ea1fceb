//! `.env` files and those of `env_file:`, as Compose reads them.
//!
//! Input: text and the variables known so far. Output: names with values; a name without `=` has none.
//! Values without quotes and in double quotes are interpolated, those in single quotes are not.

use super::interpolate::{InterpolateError, interpolate};
use super::problem::shortened;
use super::tree::FILE_BYTES_MAX;
use std::collections::BTreeMap;

/// Enough for a certificate; each line is searched again with the next.
const QUOTED_LINES_MAX: usize = 500;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DotenvError {
    #[error("line {line}: {text:?} is not NAME=VALUE")]
    NotAPair { line: usize, text: String },
    #[error("line {line}: a quote {quote} is not closed")]
    NotClosed { line: usize, quote: char },
    #[error("line {line}")]
    Value {
        line: usize,
        #[source]
        source: InterpolateError,
    },
    #[error("the file, or what it becomes with its variables, has more than {FILE_BYTES_MAX} bytes")]
    TooLong,
}

/// Names and values of an environment file, in which later lines may use earlier ones.
pub fn parse_dotenv(
    text: &str,
    known: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, Option<String>>, DotenvError> {
    if text.len() > FILE_BYTES_MAX {
        return Err(DotenvError::TooLong);
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut variables = known.clone();
    let mut found = BTreeMap::new();
    let mut bytes = 0;
    let mut lines = text.lines().enumerate();
    while let Some((index, content)) = lines.next() {
        let line = index + 1;
        let trimmed = content.trim();
        if trimmed.is_empty() || trimmed.starts_with('#') {
            continue;
        }
        let trimmed = trimmed.strip_prefix("export ").unwrap_or(trimmed).trim_start();
        let (name, value) = match trimmed.split_once('=') {
            Some((name, value)) => (name.trim_end(), Some(value.trim_start())),
            None => (trimmed, None),
        };
        if name.is_empty() || name.contains(|letter: char| letter.is_whitespace() || "'\"$".contains(letter))
        {
            return Err(DotenvError::NotAPair { line, text: shortened(trimmed) });
        }
        let value = match value {
            None => None,
            Some(value) => Some(read_value(value, line, &mut lines, &variables)?),
        };
        if let Some(value) = &value {
            bytes += value.len();
            if bytes > FILE_BYTES_MAX {
                return Err(DotenvError::TooLong);
            }
            // The surroundings' own value wins wherever both are known.
            variables.entry(name.to_owned()).or_insert_with(|| value.clone());
        }
        found.insert(name.to_owned(), value);
    }
    Ok(found)
}

fn read_value<'t>(
    value: &str,
    line: usize,
    lines: &mut impl Iterator<Item = (usize, &'t str)>,
    variables: &BTreeMap<String, String>,
) -> Result<String, DotenvError> {
    let replaced = |text: &str| match interpolate(text, variables) {
        Ok(done) => Ok(done.text),
        Err(source) => Err(DotenvError::Value { line, source }),
    };
    match value.chars().next() {
        Some(quote @ ('\'' | '"')) => {
            // A quoted value may go on over lines.
            let mut body = value[1..].to_owned();
            for _ in 0..QUOTED_LINES_MAX {
                if let Some(end) = closing(&body, quote) {
                    let inner = &body[..end];
                    return if quote == '"' { replaced(&unescaped(inner)) } else { Ok(inner.to_owned()) };
                }
                let Some((_, next)) = lines.next() else {
                    return Err(DotenvError::NotClosed { line, quote });
                };
                body.push('\n');
                body.push_str(next);
            }
            Err(DotenvError::NotClosed { line, quote })
        }
        _ => {
            let end = value.find(" #").or_else(|| value.find("\t#")).unwrap_or(value.len());
            let plain = if value.starts_with('#') { "" } else { value[..end].trim_end() };
            replaced(plain)
        }
    }
}

/// Where the quote closes; in double quotes a backslash shields the next letter.
fn closing(body: &str, quote: char) -> Option<usize> {
    let mut is_shielded = false;
    for (index, letter) in body.char_indices() {
        match letter {
            _ if is_shielded => is_shielded = false,
            '\\' if quote == '"' => is_shielded = true,
            _ if letter == quote => return Some(index),
            _ => {}
        }
    }
    None
}

fn unescaped(text: &str) -> String {
    let mut output = String::with_capacity(text.len());
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        if letter != '\\' {
            output.push(letter);
            continue;
        }
        match letters.next() {
            Some('n') => output.push('\n'),
            Some('r') => output.push('\r'),
            Some('t') => output.push('\t'),
            // What interpolation would read as a variable.
            Some('$') => output.push_str("$$"),
            Some(other @ ('"' | '\\')) => output.push(other),
            Some(other) => output.extend(['\\', other]),
            None => output.push('\\'),
        }
    }
    output
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_compose_does() {
        let text =
            "# note\n\nexport A=1\nB = two words # why\nC='$A'\nD=\"x\\n$A\"\nE=\nF\nG=a#b\nH=\"one\ntwo\"\n";
        let found = parse_dotenv(text, &BTreeMap::new()).unwrap();
        let expected = [
            ("A", Some("1")),
            ("B", Some("two words")),
            ("C", Some("$A")),
            ("D", Some("x\n1")),
            ("E", Some("")),
            ("F", None),
            ("G", Some("a#b")),
            ("H", Some("one\ntwo")),
        ];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.map(str::to_owned)));
        assert_eq!(found, BTreeMap::from(expected));
    }

    #[test]
    fn a_line_that_is_no_pair_is_named() {
        let check = |text: &str| parse_dotenv(text, &BTreeMap::new()).unwrap_err().to_string();
        assert_eq!(check("A=1\nwhat is this\n"), "line 2: \"what is this\" is not NAME=VALUE");
        assert_eq!(check("A='1\n"), "line 1: a quote ' is not closed");
        assert_eq!(check("A=${B\n"), "line 1");
    }
}
