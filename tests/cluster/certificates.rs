//! HTTPS: certificates that were given, of the cluster's own CA, and ordered from an authority.

use super::Scenario;
use super::secrets::learner;
use super::stage::{IMAGE, Stage, until};
use anyhow::{Context, Result, ensure};
use rcgen::{CertificateParams, KeyPair};
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use tinydc::linux::netns;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "https-given",
        proves: "a certificate in a secret is shown for its host on every node, also without the cluster key; one for another host \
                 or without its key is refused; plain requests are redirected; an unknown name gets no certificate",
        machines: 4,
        run: given,
    },
    Scenario {
        name: "https-cluster",
        proves: "hosts get certificates of the cluster's CA, which curl trusts by `tinydc ca`: on every node, by HTTP/2, \
                 after the leader died, and after a node came back",
        machines: 4,
        run: cluster,
    },
    Scenario {
        name: "https-acme",
        proves: "Pebble, a real ACME server, issues for a host that leads to any node; why it does not is told; the certificate \
                 outlives the leader that ordered it",
        machines: 3,
        run: acme,
    },
];

const LIMIT: Duration = Duration::from_secs(15);

fn web(labels: &str) -> String {
    format!(
        "services:\n  web:\n    image: {IMAGE}\n    environment: {{NAME: web}}\n    stop_grace_period: 1s\n    labels:\n{labels}"
    )
}

/// `  - tinydc.http.KEY=VALUE` for each.
fn labels(pairs: &[(&str, &str)]) -> String {
    let port = [("port", "8080")];
    let all = pairs.iter().chain(&port);
    all.map(|(key, value)| format!("      - tinydc.http.{key}={value}\n")).collect()
}

/// What curl says on the LAN, with a host's name led to this address.
fn curl(stage: &Stage, address: Ipv4Addr, words: &[&str]) -> Result<Output> {
    let to = format!("::{address}:");
    let output = netns::in_netns(&stage.lab.lan.netns, || {
        Command::new("curl").args(["-sS", "-m", "3", "--connect-to", &to]).args(words).output()
    })?;
    Ok(output)
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Until this host is served by HTTPS there, with a certificate of this root.
fn wait_https(stage: &Stage, address: Ipv4Addr, root: &Path, host: &str) -> Result<()> {
    let (root, url) = (root.display().to_string(), format!("https://{host}/"));
    until(&format!("{url} is served at {address}"), LIMIT, || {
        let output = curl(stage, address, &["--cacert", &root, &url])?;
        ensure!(output.status.success(), "{}", text(&output));
        Ok(text(&output).contains("hello from web"))
    })
}

/// Signed by itself, with its key.
fn pair(names: &[&str]) -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    Ok((CertificateParams::new(names)?.self_signed(&key)?.pem(), key.serialize_pem()))
}

fn addresses(stage: &Stage) -> Vec<(String, Ipv4Addr)> {
    stage
        .lab
        .nodes
        .iter()
        .filter(|node| node.is_running())
        .map(|node| (node.name.clone(), node.address))
        .collect()
}

fn given(stage: &mut Stage) -> Result<()> {
    stage.form(4)?;
    let learner = learner(stage)?;
    let index = stage.lab.nodes.iter().position(|node| node.name == learner).context("the learner")?;
    let yaml = web(&labels(&[("host", "shop.test"), ("tls", "web-cert")]));
    let path = stage.write_compose("shop", &yaml)?.display().to_string();
    let deploy = ["deploy", "-f", &path, "--name", "shop"];
    let refused = stage.cli_refused(0, &deploy, 1)?;
    ensure!(refused.contains("tinydc secret set web-cert FILE"), "{refused}");
    let (other, other_key) = pair(&["other.test"])?;
    for (content, wanted) in [
        (other.clone(), "no certificate with its key"),
        (format!("{other}{other_key}"), "is not for shop.test: it is for other.test"),
    ] {
        fs::write(stage.lab.dir.join("pem"), content)?;
        stage.cli(index, &["secret", "set", "web-cert", "pem"])?;
        // By a node that can't look into it.
        let refused = stage.cli_refused(index, &deploy, 1)?;
        ensure!(refused.contains(wanted), "{refused}");
    }
    let (first, first_key) = pair(&["shop.test"])?;
    let root = stage.lab.dir.join("first.pem");
    fs::write(&root, &first)?;
    fs::write(stage.lab.dir.join("pem"), format!("{first}{first_key}"))?;
    stage.cli(0, &["secret", "set", "web-cert", "pem"])?;
    stage.cli(0, &deploy)?;
    for (_, address) in addresses(stage) {
        wait_https(stage, address, &root, "shop.test")?;
        let unknown = curl(stage, address, &["-k", "https://nobody.test/"])?;
        ensure!(unknown.status.code() == Some(35), "a handshake without a certificate: {}", text(&unknown));
        let plain = curl(stage, address, &["-D", "-", "-o", "/dev/null", "http://shop.test/a?b"])?;
        ensure!(text(&plain).contains("location: https://shop.test/a?b"), "{}", text(&plain));
    }
    // Another one takes its place without a deploy; one that does not fit is refused.
    fs::write(stage.lab.dir.join("pem"), format!("{other}{other_key}"))?;
    let refused = stage.cli_refused(0, &["secret", "set", "web-cert", "pem"], 1)?;
    ensure!(refused.contains("is not for shop.test"), "{refused}");
    let (second, second_key) = pair(&["shop.test", "www.shop.test"])?;
    let root = stage.lab.dir.join("second.pem");
    fs::write(&root, &second)?;
    fs::write(stage.lab.dir.join("pem"), format!("{second}{second_key}"))?;
    stage.cli(0, &["secret", "set", "web-cert", "pem"])?;
    for (_, address) in addresses(stage) {
        wait_https(stage, address, &root, "shop.test")?;
    }
    let refused = stage.cli_refused(0, &["secret", "rm", "web-cert"], 1)?;
    ensure!(refused.contains("used by shop/web"), "{refused}");
    stage.deploy(
        0,
        "shop",
        &yaml.replace("tls=web-cert", "tls=web-cert\n      - tinydc.http.redirect=false"),
    )?;
    let address = stage.lab.nodes[index].address;
    until("plain requests are served", LIMIT, || {
        Ok(text(&curl(stage, address, &["http://shop.test/"])?).contains("hello from web"))
    })
}

fn cluster(stage: &mut Stage) -> Result<()> {
    stage.form(4)?;
    let learner = learner(stage)?;
    let yaml = web(&labels(&[("host", "shop.test"), ("tls", "cluster")]));
    stage.deploy(0, "shop", &yaml)?;
    let root = stage.lab.dir.join("ca.pem");
    fs::write(&root, stage.cli(1, &["ca"])?)?;
    for (_, address) in addresses(stage) {
        wait_https(stage, address, &root, "shop.test")?;
    }
    let root_text = root.display().to_string();
    let address = stage.lab.node(&learner)?.address;
    let words = ["--cacert", &root_text, "-o", "/dev/null", "-w", "%{http_version}", "https://shop.test/"];
    let version = curl(stage, address, &words)?;
    ensure!(text(&version) == "2", "HTTP/2 by ALPN: {}", text(&version));
    let shown = stage.cli(0, &["net"])?;
    let line = shown.lines().find(|line| line.contains("shop.test")).context("net shows the host")?;
    ensure!(line.contains("shop/web") && line.contains("cluster") && line.contains("20"), "{shown}");
    stage.remark(line.trim().to_owned());
    let checked = stage.cli(0, &["net", "check", "shop/web"])?;
    ensure!(checked.contains("shop.test shows a certificate (cluster)"), "{checked}");
    stage.remark(checked);

    let leader = stage.lab.leader()?;
    stage.lab.kill_node(leader)?;
    for (_, address) in addresses(stage) {
        wait_https(stage, address, &root, "shop.test")?;
    }
    let running = stage.running()?;
    stage.wait_up(running, "shop", 1, LIMIT)?;
    // A node that holds no key and has forgotten what it was told.
    let index = stage.lab.nodes.iter().position(|node| node.name == learner).context("the learner")?;
    stage.lab.nodes[index].kill_daemon()?;
    stage.lab.nodes[index].start()?;
    wait_https(stage, address, &root, "shop.test")?;
    ensure!(stage.cli(running, &["ca"])? == fs::read_to_string(&root)?, "the CA stays");
    Ok(())
}

/// A program on the LAN that ends with the scenario.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only for one that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run_on_lan(stage: &Stage, command: &mut Command, log: &str) -> Result<Running> {
    let file = fs::File::create(stage.lab.dir.join(log))?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let child = netns::in_netns(&stage.lab.lan.netns, || command.spawn());
    Ok(Running(child.with_context(|| format!("run {command:?}; tests/run installs it"))?))
}

/// Pebble on the LAN, which finds hosts by a name server there. Returns the root of its own HTTPS.
fn run_pebble(stage: &Stage) -> Result<(Running, PathBuf)> {
    let folder = stage.lab.dir.join("pebble");
    fs::create_dir_all(&folder)?;
    let own = stage.lab.lan.address(254).to_string();
    let (certificate, key) = pair(&[&own])?;
    let root = folder.join("root.pem");
    fs::write(&root, certificate)?;
    fs::write(folder.join("key.pem"), key)?;
    let config = serde_json::json!({ "pebble": {
        "listenAddress": "0.0.0.0:14000",
        "managementListenAddress": "0.0.0.0:15000",
        "certificate": root,
        "privateKey": folder.join("key.pem"),
        "httpPort": 80,
        "tlsPort": 443,
    }});
    fs::write(folder.join("config.json"), config.to_string())?;
    let mut command = Command::new("pebble");
    command.arg("-config").arg(folder.join("config.json")).args(["-dnsserver", "127.0.0.1:53"]);
    command.env("PEBBLE_VA_NOSLEEP", "1");
    let pebble = run_on_lan(stage, &mut command, "pebble.log")?;
    let own = stage.lab.lan.address(254);
    until("Pebble listens", LIMIT, || {
        Ok(curl(stage, own, &["-k", "https://pebble:14000/dir"])?.status.success())
    })?;
    Ok((pebble, root))
}

fn acme(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let own = stage.lab.lan.address(254);
    let (_pebble, pebble_root) = run_pebble(stage)?;
    fs::copy(&pebble_root, stage.lab.dir.join("acme-ca.pem"))?;
    stage.cli(0, &["secret", "set", "acme-ca", "acme-ca.pem"])?;
    stage.cli(0, &["settings", "acme_ca", "acme-ca"])?;
    stage.cli(0, &["settings", "acme_email", "me@example.org"])?;
    stage.cli(0, &["settings", "acme_directory", &format!("https://{own}:14000/dir")])?;
    let traefik = "      - \"traefik.http.routers.web.rule=Host(`shop.test`)\"\n      \
                   - traefik.http.routers.web.tls.certresolver=le\n      \
                   - traefik.http.services.web.loadbalancer.server.port=8080\n";
    let yaml = web(traefik);
    stage.deploy(0, "shop", &yaml)?;
    // Nobody knows the name yet.
    until("the reason is told", Duration::from_secs(40), || {
        let output = stage.try_cli(1, &["net", "check", "shop/web"])?;
        let said = text(&output);
        Ok(said.contains("shows no certificate (acme)") && said.contains("shop.test was not proved"))
    })?;
    let said = text(&stage.try_cli(1, &["net", "check", "shop/web"])?);
    let line = said.lines().find(|line| line.contains("was not proved")).unwrap_or_default();
    stage.remark(line.trim().to_owned());
    let applied = stage.applied(0)?;
    let mut command = Command::new("/usr/sbin/dnsmasq");
    // A node that does not lead: every node answers for the proof.
    let follower = (stage.lab.leader()? + 1) % 3;
    let answer = format!("--address=/shop.test/{}", stage.lab.nodes[follower].address);
    command.args([
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--conf-file=/dev/null",
        "--pid-file=",
    ]);
    command.args(["--bind-interfaces", "--listen-address=127.0.0.1", &answer]);
    let _names = run_on_lan(stage, &mut command, "dnsmasq.log")?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(stage.applied(0)? == applied, "while it pauses nothing is written");
    stage.deploy(0, "shop", &yaml)?;
    let root = stage.lab.dir.join("issued-by.pem");
    let url = format!("https://{own}:15000/roots/0");
    let fetched = curl(stage, own, &["-k", "-o", &root.display().to_string(), &url])?;
    ensure!(fetched.status.success(), "{}", text(&fetched));
    for (_, address) in addresses(stage) {
        wait_https(stage, address, &root, "shop.test")?;
    }
    let shown = stage.cli(0, &["net"])?;
    let line = shown.lines().find(|line| line.contains("shop.test")).context("net shows the host")?;
    stage.remark(line.trim().to_owned());
    let leader = stage.lab.leader()?;
    stage.lab.kill_node(leader)?;
    for (_, address) in addresses(stage) {
        wait_https(stage, address, &root, "shop.test")?;
    }
    let events = stage.cli(stage.running()?, &["events"])?;
    let issued = events.lines().filter(|line| line.contains("shop.test has a certificate")).count();
    ensure!(issued == 1, "ordered once: {events}");
    Ok(())
}
