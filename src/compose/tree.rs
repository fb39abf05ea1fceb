//! YAML text to a tree in which every node knows its line and column.
//!
//! Input: text. Output: one tree with aliases and merge keys resolved, or the places where it is not YAML.
//! Bounds on size, depth and nodes hold before anything is copied, so that no file of 1 MiB costs more than a few
//! dozen MiB (`an_alias_bomb_is_refused`).

use super::problem::{Position, Problems, Severity, shortened};
use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Span, StrInput, Tag};
use std::collections::BTreeMap;

/// A Compose file.
pub const FILE_BYTES_MAX: usize = 1 << 20;
const DEPTH_MAX: usize = 64;
/// After aliases are resolved.
const NODES_MAX: usize = 100_000;
const TEXT_BYTES_MAX: usize = 4 << 20;
/// Keys of one mapping: each is compared with those before it.
const KEYS_MAX: usize = 5_000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub position: Position,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Null,
    /// Also numbers and booleans: what they are is decided by the key that reads them.
    Scalar(String),
    Sequence(Vec<Node>),
    Mapping(Vec<Entry>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub position: Position,
    pub value: Node,
}

impl Node {
    pub fn is_null(&self) -> bool {
        self.value == Value::Null
    }

    pub fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Mapping(entries) => entries,
            _ => &[],
        }
    }

    pub fn items(&self) -> &[Node] {
        match &self.value {
            Value::Sequence(items) => items,
            _ => &[],
        }
    }

    pub fn scalar(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar(text) => Some(text),
            _ => None,
        }
    }

    pub fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries().iter().find(|entry| entry.key == key)
    }

    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self.value {
            Value::Null => "nothing",
            Value::Scalar(_) => "a single value",
            Value::Sequence(_) => "a list",
            Value::Mapping(_) => "a mapping",
        }
    }

    fn cost(&self) -> Cost {
        let mut cost = Cost { nodes: 1, bytes: 0, depth: 1 };
        let inner = match &self.value {
            Value::Null => return cost,
            Value::Scalar(text) => {
                cost.bytes = text.len();
                return cost;
            }
            Value::Sequence(items) => items.iter().map(Node::cost).collect::<Vec<_>>(),
            Value::Mapping(entries) => {
                cost.bytes = entries.iter().map(|entry| entry.key.len()).sum();
                entries.iter().map(|entry| entry.value.cost()).collect()
            }
        };
        for part in inner {
            cost.nodes += part.nodes;
            cost.bytes += part.bytes;
            cost.depth = cost.depth.max(part.depth + 1);
        }
        cost
    }
}

#[derive(Clone, Copy)]
struct Cost {
    nodes: usize,
    bytes: usize,
    depth: usize,
}

/// Ends the reading: the problem has been named.
struct Stop;

/// The tree of the only document in `text`; `None` if it can't be read, and the problems say why.
pub fn read_tree(text: &str, problems: &mut Problems) -> Option<Node> {
    let start = Position { line: 1, column: 1 };
    if text.len() > FILE_BYTES_MAX {
        let message = format!("the file has {} bytes, at most {FILE_BYTES_MAX} are read", text.len());
        problems.add(Severity::Error, start, message, None);
        return None;
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut builder =
        Builder { problems, text, anchors: BTreeMap::new(), open: Vec::new(), nodes: 0, bytes: 0 };
    let root = builder.read().ok()?;
    if root.is_none() {
        let hint = "a Compose file begins with `services:`";
        problems.add(Severity::Error, start, "the file is empty".into(), Some(hint.into()));
    }
    root
}

/// A collection that is being read.
struct Open {
    anchor: usize,
    position: Position,
    collection: Collection,
}

enum Collection {
    Sequence(Vec<Node>),
    Mapping { entries: Vec<Entry>, merges: Vec<Node>, merge_line: usize, key: Option<Key> },
}

struct Key {
    text: String,
    position: Position,
    /// `<<` without quotes.
    is_merge: bool,
}

struct Builder<'t, 'p> {
    problems: &'p mut Problems,
    text: &'t str,
    /// Complete anchored nodes: one that is still open can't be an alias of itself.
    anchors: BTreeMap<usize, Node>,
    open: Vec<Open>,
    nodes: usize,
    bytes: usize,
}

impl<'t> Builder<'t, '_> {
    fn read(&mut self) -> Result<Option<Node>, Stop> {
        let mut parser = Parser::new(StrInput::new(self.text));
        let mut root = None;
        let mut documents = 0;
        while let Some(event) = parser.next_event() {
            let (event, span) = event.map_err(|error| self.not_yaml(&error))?;
            let position = position_of(span);
            let complete = match event {
                Event::DocumentStart(_) => {
                    documents += 1;
                    if documents > 1 {
                        let hint = "keep one, deploy the others from files of their own";
                        return Err(self.stop_with(position, "a second YAML document begins here", hint));
                    }
                    None
                }
                Event::Scalar(text, style, anchor, tag) => {
                    Some(self.scalar(position, &text, style, anchor, tag.as_deref())?)
                }
                Event::Alias(anchor) => Some((self.alias(position, anchor)?, 0, false)),
                Event::SequenceStart(anchor, tag) => {
                    self.begin(position, anchor, tag.as_deref(), Collection::Sequence(Vec::new()))?;
                    None
                }
                Event::MappingStart(anchor, tag) => {
                    let entries = Vec::new();
                    let mapping =
                        Collection::Mapping { entries, merges: Vec::new(), merge_line: 0, key: None };
                    self.begin(position, anchor, tag.as_deref(), mapping)?;
                    None
                }
                Event::SequenceEnd | Event::MappingEnd => self.end(),
                Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => None,
            };
            let Some((node, anchor, is_merge)) = complete else { continue };
            root = self.place(node, anchor, is_merge)?.or(root);
        }
        Ok(root.filter(|node| !node.is_null()))
    }

    fn scalar(
        &mut self,
        position: Position,
        text: &str,
        style: ScalarStyle,
        anchor: usize,
        tag: Option<&Tag>,
    ) -> Result<(Node, usize, bool), Stop> {
        self.check_tag(position, tag)?;
        self.pay(position, Cost { nodes: 1, bytes: text.len(), depth: 1 })?;
        let is_plain = style == ScalarStyle::Plain && tag.is_none();
        let is_null = is_plain && matches!(text, "" | "~" | "null" | "Null" | "NULL");
        let value = if is_null { Value::Null } else { Value::Scalar(text.to_owned()) };
        Ok((Node { position, value }, anchor, is_plain && text == "<<"))
    }

    fn alias(&mut self, position: Position, anchor: usize) -> Result<Node, Stop> {
        let Some(node) = self.anchors.get(&anchor) else {
            return Err(self.stop_with(
                position,
                "this alias stands inside what it refers to",
                "write it out",
            ));
        };
        let (node, cost) = (node.clone(), node.cost());
        self.pay(position, cost)?;
        Ok(node)
    }

    fn begin(
        &mut self,
        position: Position,
        anchor: usize,
        tag: Option<&Tag>,
        collection: Collection,
    ) -> Result<(), Stop> {
        self.check_tag(position, tag)?;
        self.pay(position, Cost { nodes: 1, bytes: 0, depth: 1 })?;
        self.open.push(Open { anchor, position, collection });
        Ok(())
    }

    fn end(&mut self) -> Option<(Node, usize, bool)> {
        let Open { anchor, position, collection } = self.open.pop()?;
        let value = match collection {
            Collection::Sequence(items) => Value::Sequence(items),
            Collection::Mapping { mut entries, merges, .. } => {
                self.merge(&mut entries, merges);
                Value::Mapping(entries)
            }
        };
        Some((Node { position, value }, anchor, false))
    }

    /// Entries of `<<` stand behind the mapping's own; of several, the first wins.
    fn merge(&mut self, entries: &mut Vec<Entry>, merges: Vec<Node>) {
        let mut parts = Vec::new();
        for merge in merges {
            match merge.value {
                Value::Mapping(inner) => parts.push(inner),
                Value::Null => {}
                Value::Sequence(items)
                    if items.iter().all(|item| matches!(item.value, Value::Mapping(_))) =>
                {
                    parts.extend(items.into_iter().filter_map(|item| match item.value {
                        Value::Mapping(inner) => Some(inner),
                        _ => None,
                    }));
                }
                _ => {
                    let message = "`<<` takes a mapping or a list of mappings".into();
                    let hint = "write `<<: *anchor`".into();
                    self.problems.add(Severity::Error, merge.position, message, Some(hint));
                }
            }
        }
        for entry in parts.into_iter().flatten() {
            if entries.iter().all(|own| own.key != entry.key) {
                entries.push(entry);
            }
        }
    }

    /// Puts a complete node where it belongs; returns it if it is the document.
    fn place(&mut self, node: Node, anchor: usize, is_merge: bool) -> Result<Option<Node>, Stop> {
        if anchor > 0 {
            let cost = node.cost();
            self.pay(node.position, Cost { depth: 1, ..cost })?;
            self.anchors.insert(anchor, node.clone());
        }
        let Some(open) = self.open.last_mut() else { return Ok(Some(node)) };
        match &mut open.collection {
            Collection::Sequence(items) => items.push(node),
            Collection::Mapping { entries, merges, merge_line, key } => match key.take() {
                None => {
                    let position = node.position;
                    let text = match node.value {
                        Value::Scalar(text) => text,
                        Value::Null => "null".to_owned(),
                        _ => {
                            let hint = "a key is a single value";
                            return Err(self.stop_with(position, "a list or a mapping can't be a key", hint));
                        }
                    };
                    *key = Some(Key { text, position, is_merge });
                }
                Some(key) if key.is_merge => {
                    let first = std::mem::replace(merge_line, key.position.line);
                    merges.push(node);
                    if first > 0 {
                        self.repeated(&key, first);
                    }
                }
                Some(key) if entries.len() >= KEYS_MAX => {
                    let message = format!("more than {KEYS_MAX} keys in one mapping");
                    return Err(self.stop_with(key.position, &message, "no Compose file needs that"));
                }
                Some(key) => {
                    let first = entries.iter().find(|entry| entry.key == key.text);
                    match first.map(|entry| entry.position.line) {
                        Some(line) => self.repeated(&key, line),
                        None => entries.push(Entry { key: key.text, position: key.position, value: node }),
                    }
                }
            },
        }
        Ok(None)
    }

    fn repeated(&mut self, key: &Key, first_line: usize) {
        let name = shortened(&key.text);
        let message = format!("`{name}` is here a second time, first on line {first_line}");
        let hint = "keep one of them".into();
        self.problems.add(Severity::Error, key.position, message, Some(hint));
    }

    fn check_tag(&mut self, position: Position, tag: Option<&Tag>) -> Result<(), Stop> {
        match tag {
            None => Ok(()),
            // `!` alone means a string, and so do the types of YAML's core here, where keys decide.
            Some(tag) if tag.is_yaml_core_schema() || tag.suffix.is_empty() => Ok(()),
            Some(tag) => {
                let message = format!("the tag `{}` is not understood", shortened(&tag.to_string()));
                Err(self.stop_with(position, &message, "remove it"))
            }
        }
    }

    fn pay(&mut self, position: Position, cost: Cost) -> Result<(), Stop> {
        self.nodes += cost.nodes;
        self.bytes += cost.bytes;
        if self.open.len() + cost.depth > DEPTH_MAX {
            let message = format!("nested more than {DEPTH_MAX} deep");
            return Err(self.stop_with(position, &message, "no Compose file needs that"));
        }
        if self.nodes > NODES_MAX || self.bytes > TEXT_BYTES_MAX {
            let message = format!("with its aliases written out the file has more than {NODES_MAX} values");
            return Err(self.stop_with(position, &message, "use fewer aliases"));
        }
        Ok(())
    }

    fn stop_with(&mut self, position: Position, message: &str, hint: &str) -> Stop {
        self.problems.add(Severity::Error, position, message.to_owned(), Some(hint.to_owned()));
        Stop
    }

    /// The scanner's own words, unless a tab explains it better.
    fn not_yaml(&mut self, error: &ScanError) -> Stop {
        let line = error.marker().line().max(1);
        let position = Position { line, column: error.marker().col() + 1 };
        // The scanner often notices a tab only on the next line.
        for number in [line, line.saturating_sub(1)] {
            let content = number.checked_sub(1).and_then(|skip| self.text.lines().nth(skip)).unwrap_or("");
            let blank = content.len() - content.trim_start().len();
            if let Some(column) = content[..blank].chars().position(|letter| letter == '\t') {
                let at = Position { line: number, column: column + 1 };
                return self.stop_with(at, "a tab indents this line", "YAML takes only spaces there");
            }
        }
        let message = format!("this is not YAML: {}", error.info());
        self.problems.add(Severity::Error, position, message, None);
        Stop
    }
}

fn position_of(span: Span) -> Position {
    Position { line: span.start.line().max(1), column: span.start.col() + 1 }
}
