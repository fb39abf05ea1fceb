//! A command line to words, as a shell splits it; nothing is expanded.
//!
//! Input: text. Output: words. Quotes and backslashes mean what they mean in a POSIX shell, operators nothing.

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WordsError {
    #[error("a quote {0} is not closed")]
    NotClosed(char),
    #[error("nothing follows the last backslash")]
    LoneBackslash,
}

/// The words of `text`.
pub fn split_words(text: &str) -> Result<Vec<String>, WordsError> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match letter {
            ' ' | '\t' | '\n' | '\r' => words.extend(word.take()),
            '\\' => match letters.next() {
                None => return Err(WordsError::LoneBackslash),
                // A line that goes on.
                Some('\n') => {}
                Some(next) => word.get_or_insert_default().push(next),
            },
            '\'' | '"' => read_quoted(letter, &mut letters, word.get_or_insert_default())?,
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    Ok(words)
}

fn read_quoted(quote: char, letters: &mut std::str::Chars<'_>, word: &mut String) -> Result<(), WordsError> {
    while let Some(letter) = letters.next() {
        if letter == quote {
            return Ok(());
        }
        if quote == '"' && letter == '\\' {
            match letters.next() {
                None => break,
                Some('\n') => {}
                Some(next @ ('"' | '\\' | '$' | '`')) => word.push(next),
                Some(next) => word.extend(['\\', next]),
            }
        } else {
            word.push(letter);
        }
    }
    Err(WordsError::NotClosed(quote))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_a_shell_does() {
        let cases: [(&str, &[&str]); 8] = [
            ("a  b\tc", &["a", "b", "c"]),
            ("sh -c 'echo \"hi\" && true'", &["sh", "-c", "echo \"hi\" && true"]),
            ("a\"b c\"d", &["ab cd"]),
            ("''", &[""]),
            ("a\\ b", &["a b"]),
            ("\"a\\\"b\\n\"", &["a\"b\\n"]),
            ("one \\\n two", &["one", "two"]),
            ("   ", &[]),
        ];
        for (text, expected) in cases {
            assert_eq!(
                split_words(text),
                Ok(expected.iter().map(|word| (*word).to_owned()).collect()),
                "{text}"
            );
        }
        assert_eq!(split_words("a 'b"), Err(WordsError::NotClosed('\'')));
        assert_eq!(split_words("a \\"), Err(WordsError::LoneBackslash));
    }
}
