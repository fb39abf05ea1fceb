//! A real registry and a real web server.

use super::Scenario;
use super::people::Laptop;
use super::stage::{Stage, until};
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tinydc::cli::lab;
use tinydc::linux::netns;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "registry",
    proves: "an nginx image, pushed by skopeo to Debian's docker-registry, is pulled and serves through its published port; \
             logs -f, exec, ps and status show it from another node and from a laptop",
    machines: 3,
    run: registry,
}];

const CONF: &str = "user root; daemon off; error_log /dev/stderr notice; pid /tmp/nginx.pid; events {}
http { access_log /dev/stdout; client_body_temp_path /tmp/b; proxy_temp_path /tmp/p; fastcgi_temp_path /tmp/f;
uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;
server { listen 80; location / { default_type text/plain; return 200 \"welcome to nginx\\n\"; } } }
";

/// A child that ends with the scenario.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // Gone already is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Debian's nginx: installed, or unpacked by tests/run.
fn nginx() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-packages/usr/sbin/nginx");
    let found = [PathBuf::from("/usr/sbin/nginx"), root].into_iter().find(|path| path.exists());
    found.context("there is no nginx: `tests/run cluster` fetches Debian's package, or apt-get install nginx")
}

fn nginx_image() -> Result<Vec<u8>> {
    let (nginx, busybox) = (nginx()?, PathBuf::from("/bin/busybox"));
    let passwd = b"root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n";
    lab::image_with(
        "nginx:debian",
        &[(&nginx, "/usr/sbin/nginx"), (&busybox, "/bin/busybox"), (&busybox, "/bin/sh")],
        &["/usr/sbin/nginx".into(), "-c".into(), "/etc/nginx/nginx.conf".into()],
        &[
            ("/etc/nginx/nginx.conf", CONF.as_bytes(), 0o644),
            ("/etc/passwd", passwd, 0o644),
            ("/etc/group", b"root:x:0:\nnogroup:x:65534:\n", 0o644),
            ("/tmp/.keep", b"", 0o644),
            ("/var/log/nginx/.keep", b"", 0o644),
            ("/var/lib/nginx/.keep", b"", 0o644),
        ],
    )
}

fn start_registry(stage: &Stage, host: &str) -> Result<Guard> {
    let folder = stage.lab.dir.join("registry");
    fs::create_dir_all(folder.join("data"))?;
    let config = folder.join("config.yml");
    let text = format!(
        "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp: {{addr: \"{host}\"}}\n",
        folder.join("data").display()
    );
    fs::write(&config, text)?;
    let log = File::create(folder.join("log"))?;
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(&config).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let child = netns::in_netns(&stage.lab.lan.netns, || command.spawn());
    Ok(Guard(child.context("start docker-registry; apt-get install docker-registry")?))
}

fn push(stage: &Stage, archive: &Path, to: &str) -> Result<()> {
    let mut command = Command::new("skopeo");
    command.args(["--insecure-policy", "copy", "--dest-tls-verify=false"]);
    command.arg(format!("docker-archive:{}", archive.display())).arg(format!("docker://{to}"));
    let output = netns::in_netns(&stage.lab.lan.netns, || command.output());
    let output = output.context("run skopeo; apt-get install skopeo")?;
    ensure!(output.status.success(), "skopeo: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn registry(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let host = "10.99.0.254:5000";
    let _registry = start_registry(stage, host)?;
    let archive = stage.lab.dir.join("nginx.tar");
    fs::write(&archive, nginx_image()?)?;
    until("the registry takes the image", Duration::from_secs(20), || {
        push(stage, &archive, &format!("{host}/web/nginx:1")).map(|()| true)
    })?;
    let yaml = format!(
        "services:\n  web:\n    image: {host}/web/nginx:1\n    ports: [\"8088:80\"]\n    stop_grace_period: 1s\n    \
         deploy: {{placement: {{constraints: [\"node.hostname == pi3\"]}}}}\n"
    );
    // Without leave a registry on the LAN must speak TLS.
    let path = stage.write_compose("site", &yaml)?.display().to_string();
    let refused = stage.try_cli(1, &["deploy", "-f", &path, "--name", "site", "--timeout", "20s"])?;
    ensure!(!refused.status.success(), "a registry without TLS was asked without leave");
    stage.cli(1, &["settings", "insecure_registries", host])?;
    let begin = Instant::now();
    stage.deploy(1, "site", &yaml)?;
    stage.note("deployed from a registry", begin);
    let address = stage.lab.nodes[2].address;
    stage.wait_http(address, 8088, "welcome to nginx", Duration::from_secs(5))?;
    let ann = Laptop::new(stage, "ann", 100)?;
    ann.enrol(stage, &["--user", "ann"])?;
    for (from, said) in [
        ("another node", [stage.cli(0, &["ps"])?, stage.cli(0, &["status"])?]),
        ("a laptop", [ann.cli(&["ps"])?, ann.cli(&["status"])?]),
    ] {
        ensure!(said[0].contains("site/web.1") && said[0].contains("running"), "ps from {from}: {}", said[0]);
        ensure!(said[1].contains("nginx:1") && said[1].contains("1/1"), "status from {from}: {}", said[1]);
    }
    ensure!(stage.cli(0, &["exec", "site/web", "busybox", "echo", "in"])? == "in\n");
    ensure!(ann.cli(&["exec", "site/web", "busybox", "echo", "in"])? == "in\n");
    follow(stage)?;
    let images = stage.lab.nodes[0].get("/v1/images")?;
    let all = images["images"].as_array().cloned().unwrap_or_default();
    ensure!(all.iter().any(|image| image["source"] == "registry"), "{images}");
    Ok(())
}

/// `logs -f` from another node shows a request while it is made.
fn follow(stage: &mut Stage) -> Result<()> {
    let mut command = Command::new(&stage.lab.program);
    command.arg("--host").arg(format!("unix://{}", stage.lab.nodes[0].socket().display()));
    command
        .args(["logs", "-f", "site/web"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = Guard(command.spawn()?);
    let output = child.0.stdout.take().context("its output is a pipe")?;
    let (sender, lines) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(|line| line.ok()) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let address = stage.lab.nodes[2].address;
    let begin = Instant::now();
    let mut seen = Vec::new();
    let found = until("logs -f shows a new request", Duration::from_secs(10), || {
        stage.http(address, 8088)?;
        if let Ok(line) = lines.recv_timeout(Duration::from_millis(300)) {
            seen.push(line);
        }
        Ok(seen.iter().filter(|line| line.contains("GET / ")).count() >= 3)
    });
    stage.note("three requests seen by logs -f", begin);
    drop(child);
    if reader.join().is_err() {
        bail!("the reader of logs -f panicked");
    }
    found.with_context(|| format!("{seen:?}"))
}
