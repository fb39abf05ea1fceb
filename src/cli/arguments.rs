//! What was typed, brought into the form that argh reads.
//!
//! argv → global options and words: `--a=b` becomes `--a b`, `-it` becomes `-i -t`, and `--context`, `--host`,
//! `--json`, `--data-dir` are taken out wherever they stand. Never touched: what follows `--`, what follows `exec NAME`
//! (the command), and the value of an option.
//!
//! Invariant: a command's own options reach it as typed (`the_command_of_exec_is_never_touched`).

use std::ffi::OsString;
use std::path::PathBuf;

use super::failure::Failure;

/// Options that stand before or after any verb.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Globals {
    pub context: Option<String>,
    pub host: Option<String>,
    pub data_dir: Option<PathBuf>,
    pub is_json: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Arguments {
    pub globals: Globals,
    /// The verb and its own words.
    pub words: Vec<String>,
}

/// Long options that take a value, of all verbs: none is a switch elsewhere. `--code` is one with `token`, and takes the
/// code with `context create`.
const VALUED: &[&str] = &[
    "--board",
    "--config",
    "--container-range",
    "--env",
    "--file",
    "--name",
    "--port",
    "--replace",
    "--ssh-key",
    "--tail",
    "--timeout",
    "--user",
    "--valid",
    "--vip-range",
    "--workdir",
];

/// Short options that take a value depend on the verb: `deploy -f FILE`, but `logs -f`.
fn has_value(verb: &str, letter: char) -> bool {
    match verb {
        "deploy" | "up" | "down" | "rm" => letter == 'f',
        "logs" => letter == 'n',
        "exec" => matches!(letter, 'e' | 'u' | 'w'),
        _ => false,
    }
}

struct Reader {
    words: std::vec::IntoIter<String>,
    globals: Globals,
    read: Vec<String>,
}

pub fn read(args: &[OsString]) -> Result<Arguments, Failure> {
    let words = args.iter().map(|arg| {
        arg.clone().into_string().map_err(|arg| Failure::usage(format!("{arg:?} is not UTF-8 text")))
    });
    let words: Vec<String> = words.collect::<Result<_, _>>()?;
    let mut reader = Reader { words: words.into_iter(), globals: Globals::default(), read: Vec::new() };
    reader.run()?;
    Ok(Arguments { globals: reader.globals, words: reader.read })
}

impl Reader {
    fn run(&mut self) -> Result<(), Failure> {
        let mut operands = 0;
        while let Some(word) = self.words.next() {
            let verb = self.read.first().cloned().unwrap_or_default();
            if word == "--" {
                self.take_rest(word);
            } else if word == "-" {
                // argh takes a lone dash for an option unless `--` stands before it.
                self.read.push("--".into());
                self.take_rest(word);
            } else if let Some(name) = word.strip_prefix("--") {
                self.take_long(&verb, name)?;
            } else if let Some(letters) = word.strip_prefix('-') {
                self.take_short(&verb, letters)?;
            } else {
                operands += 1;
                let is_exec_name = verb == "exec" && operands == 2;
                if is_exec_name {
                    self.take_command(word);
                } else {
                    self.read.push(word);
                }
            }
        }
        Ok(())
    }

    fn take_rest(&mut self, first: String) {
        self.read.push(first);
        self.read.extend(self.words.by_ref());
    }

    /// `exec [options] NAME [--] COMMAND…`: options end before the name, one `--` after it is dropped.
    fn take_command(&mut self, name: String) {
        self.read.push("--".into());
        self.read.push(name);
        if let Some(word) = self.words.next().filter(|word| word != "--") {
            self.read.push(word);
        }
        self.read.extend(self.words.by_ref());
    }

    fn value(&mut self, option: &str, joined: Option<&str>) -> Result<String, Failure> {
        match joined {
            Some(value) => Ok(value.into()),
            None => self.words.next().ok_or_else(|| Failure::usage(format!("{option} needs a value"))),
        }
    }

    fn take_long(&mut self, verb: &str, name: &str) -> Result<(), Failure> {
        let (name, joined) = match name.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (name, None),
        };
        let option = format!("--{name}");
        match name {
            "context" => self.globals.context = Some(self.value(&option, joined)?),
            "host" => self.globals.host = Some(self.value(&option, joined)?),
            "data-dir" => self.globals.data_dir = Some(self.value(&option, joined)?.into()),
            "json" if joined.is_none() => self.globals.is_json = true,
            _ if VALUED.contains(&option.as_str()) || (verb == "context" && name == "code") => {
                let value = self.value(&option, joined)?;
                self.read.extend([option, value]);
            }
            _ if joined.is_some() => return Err(Failure::usage(format!("{option} takes no value"))),
            _ => self.read.push(option),
        }
        Ok(())
    }

    fn take_short(&mut self, verb: &str, letters: &str) -> Result<(), Failure> {
        let mut rest = letters.chars();
        while let Some(letter) = rest.next() {
            let option = format!("-{letter}");
            if has_value(verb, letter) {
                let joined = Some(rest.as_str()).filter(|rest| !rest.is_empty());
                let joined = joined.map(|value| value.strip_prefix('=').unwrap_or(value));
                let value = self.value(&option, joined)?;
                self.read.extend([option, value]);
                return Ok(());
            }
            self.read.push(option);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(typed: &str, expected: &str) {
        let args: Vec<OsString> = typed.split_whitespace().map(OsString::from).collect();
        let words = read(&args).unwrap().words.join(" ");
        assert_eq!(words, expected, "{typed}");
    }

    #[test]
    fn joined_options_are_taken_apart() {
        check("deploy --file=a.yaml -d", "deploy --file a.yaml -d");
        check("deploy -fa.yaml", "deploy -f a.yaml");
        check("deploy -f -it", "deploy -f -it");
        check("deploy --name --json", "deploy --name --json");
        check("logs -ft web", "logs -f -t web");
        check("logs -fn5 web", "logs -f -n 5 web");
        check("logs --tail=5 web", "logs --tail 5 web");
        check("scale web=3", "scale web=3");
        check("node label pi1 disk=ssd gpu-", "node label pi1 disk=ssd gpu-");
        check("image load -", "image load -- -");
        check("token --user ann --code", "token --user ann --code");
        check("context create a --code=493112", "context create a --code 493112");
    }

    #[test]
    fn the_command_of_exec_is_never_touched() {
        check("exec -it web sh -c --a=b -it", "exec -i -t -- web sh -c --a=b -it");
        check("exec -it web -- sh --json -it", "exec -i -t -- web sh --json -it");
        check("exec -e A=b --user=1 web -- -- x", "exec -e A=b --user 1 -- web -- x");
        check("exec web", "exec -- web");
        check("exec -- web --a=b", "exec -- web --a=b");
    }

    #[test]
    fn global_options_stand_anywhere_but_in_a_command() {
        let args: Vec<OsString> =
            ["--context=home", "ps", "--json", "shop", "--data-dir", "/d"].map(OsString::from).into();
        let read_back = read(&args).unwrap();
        assert_eq!(read_back.words, ["ps", "shop"]);
        let expected = Globals {
            context: Some("home".into()),
            data_dir: Some("/d".into()),
            is_json: true,
            ..Globals::default()
        };
        assert_eq!(read_back.globals, expected);
        check("ps -- --json", "ps -- --json");
    }

    #[test]
    fn a_missing_or_unwanted_value_is_a_usage_error() {
        for typed in [&["ps", "--context"][..], &["deploy", "-f"], &["rm", "--yes=1"], &["ps", "--json=1"]] {
            let args: Vec<OsString> = typed.iter().map(OsString::from).collect();
            assert_eq!(read(&args).unwrap_err().exit.number(), 2, "{typed:?}");
        }
    }
}
