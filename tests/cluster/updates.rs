//! Deploying again: what stays, what is replaced, what a failure leaves.

use super::Scenario;
use super::stage::{IMAGE, Stage, until, web};
use super::watcher::Watcher;
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};
use tinydc::cli::lab;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "update",
        proves: "an unchanged deploy keeps every pid; a change replaces one instance at a time without a gap; a failing \
                 update stops with its reason and the old instances keep serving",
        machines: 3,
        run: update,
    },
    Scenario {
        name: "content",
        proves: "files beside the Compose file travel along to the node that runs the service, and a change of them is \
                 deployed",
        machines: 3,
        run: content,
    },
    Scenario {
        name: "retries",
        proves: "a write that is sent again with its key is done once, and the retry gets the first answer",
        machines: 1,
        run: retries,
    },
];

fn update(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    stage.deploy(0, "shop", &web(8080, 2, "old"))?;
    stage.wait_up(0, "shop", 2, Duration::from_secs(10))?;
    let before = stage.pids(0, "shop")?;
    let begin = Instant::now();
    let said = stage.deploy(1, "shop", &web(8080, 2, "old"))?;
    stage.note("unchanged deploy", begin);
    ensure!(stage.pids(0, "shop")? == before, "an unchanged deploy keeps pids; it said {said}");

    let addresses = stage.lab.nodes.iter().map(|node| node.address).collect();
    let watcher = Watcher::start(stage, addresses, 8080)?;
    let begin = Instant::now();
    stage.deploy(2, "shop", &web(8080, 2, "new"))?;
    stage.note("changed deploy of two instances", begin);
    let seen = watcher.stop()?;
    stage.remark(format!("longest gap {} ms", seen.longest_gap.as_millis()));
    ensure!(seen.longest_gap < Duration::from_secs(2), "the update left a gap: {seen:?}");
    ensure!(seen.texts.len() == 2, "both versions were seen in turn: {seen:?}");
    let after = stage.pids(0, "shop")?;
    ensure!(after.len() == 2 && after.values().all(|pid| !before.values().any(|old| old == pid)));

    let broken = web(8080, 2, "broken").replace(
        "    stop_grace",
        "    command: [\"sh\", \"-c\", \"echo no luck; exit 3\"]\n    entrypoint: []\n    stop_grace",
    );
    let path = stage.write_compose("shop", &broken)?.display().to_string();
    let begin = Instant::now();
    let refused = stage.cli_refused(0, &["deploy", "-f", &path, "--name", "shop", "--timeout", "90s"], 1)?;
    stage.note("failing update noticed", begin);
    ensure!(refused.contains("no luck"), "the failed instance's last lines are shown: {refused}");
    let status = stage.lab.nodes[0].get("/v1/status?app=shop")?;
    ensure!(status["services"][0]["update"] == "failed", "{}", status["services"][0]["update"]);
    until("an old instance still serves", Duration::from_secs(5), || {
        let texts = stage.lab.nodes.iter().filter_map(|node| stage.http(node.address, 8080).ok());
        Ok(texts.into_iter().any(|text| text.contains("hello from new")))
    })?;
    let up = stage.rows(0, "shop")?.into_iter().filter(|row| row.is_up()).count();
    ensure!(up >= 1, "old instances keep running");
    Ok(())
}

fn content(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    std::fs::write(stage.lab.dir.join("word.txt"), "first\n")?;
    let yaml = format!(
        "services:\n  web:\n    image: {IMAGE}\n    environment: {{NAME: x}}\n    stop_grace_period: 1s\n    \
         volumes: [\"./word.txt:/etc/word.txt:ro\"]\n    deploy: {{placement: {{constraints: [\"node.hostname == pi3\"]}}}}\n"
    );
    stage.deploy(0, "notes", &yaml)?;
    let read = |stage: &Stage| stage.cli(1, &["exec", "notes/web", "cat", "/etc/word.txt"]);
    ensure!(read(stage)? == "first\n", "the file is there: {}", read(stage)?);
    std::fs::write(stage.lab.dir.join("word.txt"), "second\n")?;
    stage.deploy(1, "notes", &yaml)?;
    ensure!(read(stage)? == "second\n", "its change is there: {}", read(stage)?);
    Ok(())
}

fn retries(stage: &mut Stage) -> Result<()> {
    stage.form(1)?;
    let socket = stage.lab.nodes[0].socket();
    let ask = |key: u128, method: &str, path: &str, body: &str| -> Result<serde_json::Value> {
        let headers = format!("idempotency-key: {key:032x}\r\n");
        lab::ask_with(&socket, method, path, &headers, body.as_bytes())?.json()
    };
    let token = ask(1, "POST", "/v1/tokens", "")?;
    let again = ask(1, "POST", "/v1/tokens", "")?;
    ensure!(token["token"].is_string() && token == again, "a retry made another token: {token}, {again}");
    ensure!(ask(2, "POST", "/v1/tokens", "")?["token"] != token["token"], "another wish got the same token");
    // The first try, a later wish, then the retry: the later wish stands.
    let cases = [
        (
            "POST",
            "/v1/nodes/pi1/labels",
            r#"{"set":{"a":"1"},"remove":[]}"#,
            r#"{"set":{"a":"2"},"remove":[]}"#,
        ),
        ("PUT", "/v1/settings/timers", r#"{"value":"fast"}"#, r#"{"value":"card"}"#),
    ];
    for (number, (method, path, first, later)) in cases.into_iter().enumerate() {
        let key = 16 * (number as u128 + 1);
        ask(key, method, path, first)?;
        ask(key + 1, method, path, later)?;
        ask(key, method, path, first)?;
        let refused = ask(key, method, path, later).map(|_| ());
        ensure!(refused.is_err_and(|error| error.to_string().contains("another request")), "{path}");
    }
    ask(64, "POST", "/v1/nodes/pi1/drain", "")?;
    ask(65, "POST", "/v1/nodes/pi1/activate", "")?;
    ask(64, "POST", "/v1/nodes/pi1/drain", "")?;
    let node = stage.lab.nodes[0].get("/v1/nodes/pi1")?;
    ensure!(node["labels"]["a"] == "2" && node["state"] == "up", "a retry was done again: {node}");
    let settings = stage.lab.nodes[0].get("/v1/settings")?.to_string();
    ensure!(!settings.contains(r#""value":"fast""#), "a retry was done again: {settings}");
    // A token that is gone is gone for the first try only: its retry gets the first answer.
    let path = format!("/v1/tokens/{}", token["id"].as_str().unwrap_or_default());
    ask(80, "DELETE", &path, "")?;
    ask(80, "DELETE", &path, "")?;
    ensure!(ask(81, "DELETE", &path, "").is_err(), "a second wish to remove it finds nothing");
    Ok(())
}
