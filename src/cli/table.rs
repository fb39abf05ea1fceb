//! Tables: aligned columns in at most 100 of the terminal's.
//!
//! Rows of text → lines. The widest column is shortened with `…` until a line fits. Columns that are empty in every
//! row are left out. Width counts characters: names here are ASCII, and nobody's terminal is wrong about those.
//!
//! Invariant: no line is wider than the limit (`no_line_is_wider_than_the_limit`).

use super::terminal::{self, Colour};

/// Also on a wider terminal: what is pasted into a chat or a ticket should not wrap.
pub const WIDTH_MAX: usize = 100;
const GAP: usize = 2;
/// A column is not shortened below this.
const COLUMN_WIDTH_MIN: usize = 4;

#[derive(Clone, Debug, Default)]
pub struct Cell {
    pub text: String,
    pub colour: Option<Colour>,
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Cell {
        // A newline or a control character from an image or a peer must not break the table or the terminal.
        let text = text.into().chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
        Cell { text, colour: None }
    }
}

impl Cell {
    pub fn coloured(text: impl Into<String>, colour: Colour) -> Cell {
        Cell { colour: Some(colour), ..Cell::from(text) }
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

pub struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
    wraps_last: bool,
}

impl Table {
    pub fn new(header: &[&'static str]) -> Table {
        Table { header: header.to_vec(), rows: Vec::new(), wraps_last: false }
    }

    /// For sentences: the last column goes on in the next line instead of being cut.
    pub fn wrapping_last(mut self) -> Table {
        self.wraps_last = true;
        self
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        let cells: Vec<Cell> = cells.into_iter().collect();
        assert_eq!(cells.len(), self.header.len(), "a cell for each column");
        self.rows.push(cells);
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub fn print(&self) {
        let has_colour = terminal::has_colour();
        for line in self.lines(WIDTH_MAX, has_colour) {
            terminal::print_line(&line);
        }
    }

    pub fn lines(&self, width_max: usize, has_colour: bool) -> Vec<String> {
        let shown: Vec<usize> = (0..self.header.len())
            .filter(|column| self.rows.iter().any(|row| row[*column].width() > 0))
            .collect();
        let mut widths: Vec<usize> = shown
            .iter()
            .map(|column| {
                let cells = self.rows.iter().map(|row| row[*column].width()).max().unwrap_or(0);
                cells.max(self.header[*column].chars().count())
            })
            .collect();
        shrink(&mut widths, width_max);
        let header: Vec<Cell> = self.header.iter().map(|text| Cell::coloured(*text, Colour::Faint)).collect();
        std::iter::once(&header)
            .chain(&self.rows)
            .flat_map(|row| {
                let cells: Vec<Cell> = shown.iter().map(|column| row[*column].clone()).collect();
                self.wrapped(cells, &widths)
            })
            .map(|cells| line(&cells, &widths, has_colour))
            .collect()
    }

    /// One row as the lines it takes.
    fn wrapped(&self, cells: Vec<Cell>, widths: &[usize]) -> Vec<Vec<Cell>> {
        let (Some(last), Some(width), true) = (cells.last(), widths.last(), self.wraps_last) else {
            return vec![cells];
        };
        let colour = last.colour;
        let mut lines = Vec::new();
        let mut rest = last.text.as_str();
        loop {
            let (head, tail) = split_at_word(rest, *width);
            let mut row = if lines.is_empty() { cells.clone() } else { vec![Cell::default(); cells.len()] };
            if let Some(last) = row.last_mut() {
                *last = Cell { text: head.into(), colour };
            }
            lines.push(row);
            if tail.is_empty() {
                return lines;
            }
            rest = tail;
        }
    }
}

fn shrink(widths: &mut [usize], width_max: usize) {
    let total = |widths: &[usize]| widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1);
    while total(widths) > width_max {
        let Some(widest) = widths.iter_mut().max_by_key(|width| **width) else { return };
        if *widest <= COLUMN_WIDTH_MIN {
            return;
        }
        *widest -= 1;
    }
}

/// The words that fit, and the rest; a word that alone is too long is cut.
fn split_at_word(text: &str, width: usize) -> (&str, &str) {
    let Some((end, _)) = text.char_indices().nth(width) else { return (text, "") };
    let at = match text[end..].starts_with(' ') {
        true => end,
        false => text[..end].rfind(' ').filter(|at| *at > 0).unwrap_or(end),
    };
    (&text[..at], text[at..].trim_start())
}

fn line(cells: &[Cell], widths: &[usize], has_colour: bool) -> String {
    let mut line = String::new();
    // Blanks are written before the next text only, so that no line ends in them.
    let mut blanks = 0;
    for (cell, width) in cells.iter().zip(widths) {
        let text = shortened(&cell.text, *width);
        let length = text.chars().count();
        if length > 0 {
            line.extend(std::iter::repeat_n(' ', blanks));
            blanks = 0;
            match cell.colour.filter(|_| has_colour) {
                Some(colour) => line.push_str(&colour.paint(&text)),
                None => line.push_str(&text),
            }
        }
        blanks += width - length + GAP;
    }
    line
}

/// At most `width` characters; what was cut is shown by `…`.
pub fn shortened(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.into();
    }
    let mut kept: String = text.chars().take(width.saturating_sub(1)).collect();
    kept.push('…');
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: &[[&str; 3]]) -> Table {
        let mut table = Table::new(&["NAME", "STATE", "WHY"]);
        for row in rows {
            table.row(row.map(Cell::from));
        }
        table
    }

    #[test]
    fn columns_are_aligned_and_empty_ones_left_out() {
        let lines = table(&[["web.1", "", "ok"], ["database.1", "", ""]]).lines(100, false);
        assert_eq!(lines, ["NAME        WHY", "web.1       ok", "database.1"]);
    }

    #[test]
    fn no_line_is_wider_than_the_limit() {
        let long = "ü".repeat(150);
        for rows in [[["a", "b", &long[..]], ["c", "d", "e"]], [[&long[..], &long[..], &long[..]]; 2]] {
            for limit in [30, 60, 100] {
                for line in table(&rows).lines(limit, false) {
                    assert!(line.chars().count() <= limit, "{limit}: {line}");
                }
            }
        }
        let lines = table(&[["a", "b", &long[..]]]).lines(40, false);
        assert!(lines[1].ends_with('…') && lines[1].starts_with("a     b"), "{lines:?}");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let lines = table(&[["a\x1b[2Jb", "c\nd", "e"]]).lines(100, false);
        assert!(!lines[1].contains('\x1b') && lines.len() == 2);
    }

    #[test]
    fn a_sentence_goes_on_in_the_next_line() {
        let lines = table(&[["a", "b", "one two three four"]]).wrapping_last().lines(20, false);
        assert_eq!(lines[1..], ["a     b      one two", "             three", "             four"]);
        let lines = table(&[["a", "b", "0123456789"]]).wrapping_last().lines(20, false);
        assert_eq!(lines[1..], ["a     b      0123456", "             789"]);
    }

    #[test]
    fn colour_does_not_count_as_width() {
        let mut table = Table::new(&["A", "B"]);
        table.row([Cell::coloured("x", Colour::Red), Cell::from("y")]);
        assert_eq!(table.lines(100, true)[1], "\x1b[31mx\x1b[0m  y");
    }
}
