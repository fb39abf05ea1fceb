//! Several boards: a cluster by token, an app from a laptop, a plug that is pulled.

use crate::Case;
use crate::field::{Field, until};
use crate::guest::Setup;
use crate::readme::{self, Step};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[
    Case {
        name: "three-boards",
        proves: "README's first cluster of three boards, word for word: a token in tinydc.toml, a laptop that deploys; and \
                 when a plug is pulled its instances run elsewhere",
        run: three_boards,
    },
    Case {
        name: "by-code",
        proves: "boards without any token: the first founds a cluster and its code gives a laptop access, the second is \
                 taken in by the code on its screen, and Enter on a third founds no second cluster",
        run: by_code,
    },
    Case {
        name: "limits",
        proves: "limits hold on a board (cgroup v2): what takes too much memory is killed alone and named",
        run: limits,
    },
];

/// What `images/build` put into the guests: also the container image of the tests.
pub fn guest_binary() -> PathBuf {
    std::env::var_os("TINYDC_GUEST_BINARY")
        .map_or("target/cross/x86_64/x86_64-unknown-linux-musl/dist/tinydc".into(), PathBuf::from)
}

/// The token in a line that the prompt printed.
pub fn token_in(said: &str, start: &str) -> Result<String> {
    let word = said.split_whitespace().find(|word| word.starts_with(start));
    Ok(word.with_context(|| format!("a token {start}… in: {said}"))?.to_string())
}

/// The laptop gets its context from the prompt of a board, as a person would copy it. A board that founds a cluster
/// looks for one of that name first.
pub fn give_laptop_a_context(field: &mut Field, index: usize, name: &str) -> Result<()> {
    let mut token = String::new();
    until("the board gives a token for a laptop", Duration::from_secs(30), || {
        let said = field.guests[index].type_line(name, "token --user ada")?;
        token = token_in(&said, "tdc-user-")?;
        Ok(true)
    })?;
    field.laptop(&["context", "create", "home", &token]).map(drop)
}

/// An image as `docker save` would write it, on the laptop.
fn write_hello(field: &Field) -> Result<()> {
    let words = ["/tinydc".to_string(), "hello".to_string()];
    let image = tinydc::cli::lab::image_of("hello:1", &guest_binary(), &words, &[])?;
    fs::write(field.laptop_dir().join("hello.tar"), image).context("write the image")
}

pub fn load_hello(field: &Field) -> Result<()> {
    write_hello(field)?;
    field.laptop(&["image", "load", "hello.tar"]).map(drop)
}

pub fn nodes_up(field: &Field) -> Result<usize> {
    let nodes = field.laptop_json(&["node", "ls"])?;
    Ok(nodes["nodes"].as_array().map_or(0, |all| all.iter().filter(|node| node["state"] == "up").count()))
}

/// Nodes on which instances of an app run, one for each instance.
pub fn places(field: &Field, app: &str) -> Result<Vec<String>> {
    let status = field.laptop_json(&["status"])?;
    let services = status["services"].as_array().cloned().unwrap_or_default();
    let instances = services
        .iter()
        .filter(|service| service["app"] == app)
        .flat_map(|service| service["instances"].as_array().cloned().unwrap_or_default());
    let is_up =
        |row: &Value| row["desired"] == "run" && matches!(row["phase"].as_str(), Some("running" | "healthy"));
    Ok(instances.filter(is_up).filter_map(|row| row["node"].as_str().map(String::from)).collect())
}

/// Deploys, and waits until an app's instances run on these boards. Tried again while a busy emulator has no leader.
pub fn deploy_to(field: &Field, app: &str, text: &str, boards: &[&str]) -> Result<()> {
    fs::write(field.laptop_dir().join("compose.yaml"), text)?;
    let limit = Duration::from_secs(180);
    until(&format!("{app} is taken"), limit, || {
        field.laptop(&["deploy", "--name", app, "--detach"]).map(|_| true)
    })?;
    let mut spread = Vec::new();
    let waited = until("it runs", limit, || {
        spread = places(field, app)?;
        spread.sort();
        Ok(spread == boards)
    });
    waited.with_context(|| format!("{app} runs on {spread:?}, not {boards:?}"))
}

/// The same for an image, from an archive beside the laptop's contexts.
pub fn load_archive(field: &Field, archive: &[u8]) -> Result<()> {
    fs::write(field.laptop_dir().join("image.tar"), archive)?;
    until("the image is loaded", Duration::from_secs(120), || {
        field.laptop(&["image", "load", "image.tar"]).map(|_| true)
    })
}

pub fn add_founder(field: &mut Field) -> Result<usize> {
    field.serve_dhcp(10, 3600)?;
    field.add(Setup::new("name = \"pi1\"\nbootstrap = true\n"))
}

/// Until it serves the laptop, which has its context.
pub fn start_founder(field: &mut Field) -> Result<()> {
    let begin = Instant::now();
    field.start(0)?;
    field.guests[0].wait_ready()?;
    field.guests[0].wait_said("eth0: address", Duration::from_secs(20))?;
    field.note("the first board is ready", begin);
    give_laptop_a_context(field, 0, "pi1")
}

/// A founder and `count - 1` boards that join by its token; the laptop has its context.
pub fn form(field: &mut Field, count: u8) -> Result<()> {
    form_with(field, &vec!["qemu-x86_64"; usize::from(count) - 1])
}

/// The same, with boards of these kinds beside the founder.
pub fn form_with(field: &mut Field, boards: &[&'static str]) -> Result<()> {
    let begin = Instant::now();
    add_founder(field)?;
    start_founder(field)?;
    if boards.is_empty() {
        return Ok(());
    }
    let token = token_in(&field.guests[0].type_line("pi1", "token")?, "tdc-join-")?;
    for (number, board) in (2..).zip(boards) {
        let settings = format!("name = \"pi{number}\"\njoin = \"{token}\"\n");
        let index = field.add(Setup { board, ..Setup::new(&settings) })?;
        field.start(index)?;
    }
    until("all nodes are up", Duration::from_secs(150), || Ok(nodes_up(field)? == boards.len() + 1))?;
    field.note("all boards are members", begin);
    Ok(())
}

/// As README says it; `…` after the begin of a token stands for the one that was printed last.
fn follow_readme(field: &mut Field) -> Result<String> {
    const TOKENS: [&str; 2] = ["tdc-join-", "tdc-user-"];
    let begin = Instant::now();
    let mut tokens = BTreeMap::new();
    let filled = |text: &str, tokens: &BTreeMap<&str, String>| {
        tokens.iter().fold(text.to_string(), |text, (start, token)| text.replace(&format!("{start}…"), token))
    };
    let mut deployed = String::new();
    for step in readme::steps()? {
        match step {
            Step::Card(text) => {
                let index = field.add(Setup::new(&filled(&text, &tokens)))?;
                field.start(index)?;
            }
            Step::Compose(text) => fs::write(field.laptop_dir().join("compose.yaml"), text)?,
            Step::Typed { board, line } => {
                let index = board.trim_start_matches("pi").parse::<usize>().context("a board's number")? - 1;
                field.guests[index].wait_ready()?;
                // The first board looks for a cluster of its name before it founds one.
                until(&format!("{board} answers to {line}"), Duration::from_secs(30), || {
                    let said = field.guests[index].type_line(&board, &line)?;
                    for start in TOKENS {
                        if let Ok(token) = token_in(&said, start) {
                            tokens.insert(start, token);
                        }
                    }
                    Ok(!said.contains("error"))
                })?;
            }
            Step::OnLaptop(words) => {
                let words = filled(&words, &tokens);
                let words: Vec<&str> = words.split_whitespace().collect();
                if words == ["image", "load", "hello.tar"] {
                    write_hello(field)?;
                }
                let said = field.laptop(&words)?;
                match words[..] {
                    ["node", "ls"] => {
                        until("all three are up", Duration::from_secs(150), || Ok(nodes_up(field)? == 3))?;
                        field.note("three boards are a cluster", begin);
                    }
                    ["deploy", ..] => deployed = said,
                    _ => {}
                }
            }
        }
    }
    field.note("and run an app", begin);
    Ok(deployed)
}

fn three_boards(field: &mut Field) -> Result<()> {
    field.serve_dhcp(10, 3600)?;
    fs::create_dir_all(field.laptop_dir())?;
    let said = follow_readme(field)?;
    ensure!(said.contains("8080"), "deploy ends with the addresses to open: {said}");
    for index in 1..3 {
        field.guests[index].wait_said("the token in tinydc.toml was used", Duration::from_secs(30))?;
    }
    let mut spread = places(field, "shop")?;
    spread.sort();
    ensure!(spread == ["pi1", "pi2", "pi3"], "one on each: {spread:?}");
    for number in 11..=13 {
        let page = field.http(field.address(number), 8080, "/")?;
        ensure!(!page.is_empty(), "the published port answers on every board");
    }

    let begin = Instant::now();
    field.guests[2].kill();
    until("three instances run on two boards", Duration::from_secs(60), || {
        let places = places(field, "shop")?;
        Ok(places.len() == 3 && !places.contains(&"pi3".to_string()))
    })?;
    field.note("a plug pulled: its instance runs elsewhere", begin);
    let text = field.guests[2].settings()?;
    ensure!(!text.contains("tdc-join-") && text.contains("# join:"), "the card keeps no token: {text}");

    let begin = Instant::now();
    field.start(2)?;
    field.guests[2].wait_ready()?;
    until("the board is back", Duration::from_secs(60), || Ok(nodes_up(field)? == 3))?;
    field.note("the board is back", begin);
    Ok(())
}

/// The six digits after a word of what a board says.
fn code_after(said: &str, word: &str) -> Result<String> {
    let code: String = said.split(word).nth(1).unwrap_or_default().trim_start().chars().take(6).collect();
    ensure!(code.len() == 6 && code.bytes().all(|byte| byte.is_ascii_digit()), "a code after {word}: {said}");
    Ok(code)
}

fn by_code(field: &mut Field) -> Result<()> {
    field.serve_dhcp(10, 3600)?;
    let begin = Instant::now();
    field.add(Setup::new("name = \"pi1\"\nbootstrap = true\n"))?;
    field.start(0)?;
    field.guests[0].wait_ready()?;
    let mut said = String::new();
    until("the first board shows a code for a laptop", Duration::from_secs(60), || {
        said = field.guests[0].type_line("pi1", "join")?;
        Ok(said.contains("A laptop gets"))
    })?;
    let (host, code) = (field.address(11).to_string(), code_after(&said, "--code")?);
    field.laptop(&["context", "create", "home", "--host", &host, "--code", &code])?;
    until("the laptop reaches it", Duration::from_secs(10), || Ok(nodes_up(field)? == 1))?;
    field.note("a cluster of one, and a laptop", begin);

    for name in ["pi2", "pi3"] {
        let index = field.add(Setup::new(&format!("name = \"{name}\"\n")))?;
        field.start(index)?;
    }
    let begin = Instant::now();
    for index in 1..3 {
        field.guests[index].wait_ready()?;
        field.guests[index].wait_said("eth0: address", Duration::from_secs(20))?;
    }
    field.note("two more boards are ready", begin);
    let code = code_after(&field.guests[1].type_line("pi2", "join")?, "Its code:")?;
    let begin = Instant::now();
    field.laptop(&["node", "accept", &code])?;
    until("it is a member", Duration::from_secs(30), || Ok(nodes_up(field)? == 2))?;
    field.note("node accept → a member", begin);

    // On the screen that offers it.
    let screen = field.guests[2].type_line("pi3", "")?;
    // The emulated serial line doubles a letter now and then.
    ensure!(screen.contains("found one here:"), "{screen}");
    field.guests[2].type_last("")?;
    field.guests[2].wait_for("looking for a cluster", Duration::from_secs(20))?;
    field.guests[2].wait_for("A cluster called home answers", Duration::from_secs(20))?;
    let said = field.guests[2].type_line("pi3", "join")?;
    ensure!(said.contains("belongs to no cluster"), "it founded one");
    field.laptop(&["node", "accept", &code_after(&said, "Its code:")?])?;
    until("it is a member, too", Duration::from_secs(30), || Ok(nodes_up(field)? == 3))
}

const HUNGRY: &str = "\
services:
  web:
    image: hello:1
    deploy: {replicas: 1}
  hungry:
    image: hello:1
    command: [\"hello\", \"--eat\", \"200\"]
    entrypoint: [\"/tinydc\"]
    restart: on-failure
    deploy:
      replicas: 1
      resources:
        limits: {memory: 24M}
";

fn limits(field: &mut Field) -> Result<()> {
    form(field, 1)?;
    load_hello(field)?;
    fs::write(field.laptop_dir().join("compose.yaml"), HUNGRY)?;
    // It never settles, so deploying it fails; what counts is why.
    let refused = field.laptop(&["deploy", "--name", "diner", "--timeout", "30s"]);
    until("the kill is told with its limit", Duration::from_secs(40), || {
        let told = field.laptop(&["ps", "diner"])?.to_lowercase();
        Ok(told.contains("memory"))
    })?;
    field.remark(format!("deploy: {}", refused.unwrap_or_else(|error| format!("{error:#}"))));
    until("its neighbour runs on", Duration::from_secs(20), || {
        let status = field.laptop_json(&["status"])?;
        let services = status["services"].as_array().cloned().unwrap_or_default();
        Ok(services.iter().any(|one| one["name"] == "web" && one["running"] == 1))
    })?;
    let modules = field.guests[0].type_line("pi1", "report")?;
    ensure!(modules.contains("cgroups") && modules.contains("memory"), "{modules}");
    Ok(())
}
