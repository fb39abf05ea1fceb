//! README's first cluster of three boards, word for word: what a person writes on cards, types at prompts and runs on the
//! laptop.

use anyhow::{Context, Result, bail, ensure};
use std::fs;

const README: &str = "README.md";
const TITLE: &str = "### A first cluster of three boards";

#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// `tinydc.toml` of the next card.
    Card(String),
    /// `compose.yaml` on the laptop.
    Compose(String),
    Typed {
        board: String,
        line: String,
    },
    OnLaptop(String),
}

pub fn steps() -> Result<Vec<Step>> {
    let text = fs::read_to_string(README).context("read README.md")?;
    let section = text.split_once(TITLE).with_context(|| format!("README.md has no {TITLE:?}"))?.1;
    let section = section.split("\n## ").next().unwrap_or_default();
    let section = section.split("\n### ").next().unwrap_or_default();
    let mut steps = Vec::new();
    // Every second part stands between fences.
    for block in section.split("```").skip(1).step_by(2) {
        let (kind, body) = block.split_once('\n').context("a block of README")?;
        match kind {
            "toml" => steps.push(Step::Card(body.into())),
            "yaml" => steps.push(Step::Compose(body.into())),
            "" => {
                for line in body.lines() {
                    steps.extend(of_line(line)?);
                }
            }
            other => bail!("{TITLE}: a block of {other:?}"),
        }
    }
    ensure!(!steps.is_empty(), "{TITLE} has no steps");
    Ok(steps)
}

/// `pi1> WORDS` is typed, `laptop$ tinydc WORDS` is run; other lines are what is answered.
fn of_line(line: &str) -> Result<Option<Step>> {
    if let Some(words) = line.strip_prefix("laptop$ ") {
        let words = words.strip_prefix("tinydc ").with_context(|| format!("{line:?} runs something else"))?;
        return Ok(Some(Step::OnLaptop(words.into())));
    }
    let is_command = line.starts_with("$ ") || line.starts_with("# ") || line.starts_with("tinydc ");
    ensure!(!is_command, "{TITLE}: {line:?} doesn't say where");
    let typed = line.split_once("> ").filter(|(board, _)| board.starts_with("pi"));
    Ok(typed.map(|(board, line)| Step::Typed { board: board.into(), line: line.into() }))
}
