//! HTTP routes beside Debian's nginx as a proxy: the same backend, the same client (wrk), the same machine, in turn.

use super::network::{container, deploy_services};
use super::{Row, lab, load_hello, service};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tinydc::linux::netns;

const HOST: &str = "bench.test";
const BACKEND_PORT: u16 = 8081;
const NGINX_HTTP: u16 = 8090;
const NGINX_HTTPS: u16 = 8443;
const ROUNDS: usize = 5;

pub fn ingress() -> Result<Vec<Row>> {
    let lab = lab(3)?;
    load_hello(&lab)?;
    let mut spec = service(1, false)?;
    spec["placement"] = serde_json::json!({ "constraints": [{ "subject": "NodeName", "must_equal": true, "value": "pi2" }],
        "instances_per_node_max": null, "spread_over": [] });
    spec["labels"] = serde_json::json!({
        "tinydc.http.host": HOST, "tinydc.http.port": BACKEND_PORT.to_string(),
        "tinydc.http.tls": "cluster", "tinydc.http.redirect": "false",
    });
    deploy_services(&lab, serde_json::json!({ "serve": spec }))?;
    let (backend, address, _) = container(&lab, 1, "serve")?;
    let folder = lab.dir.join("nginx");
    fs::create_dir_all(&folder)?;
    let _backend = Nginx::start(&folder, "backend", &backend, &backend_conf())?;
    let proxy = Nginx::start(&folder, "proxy", &lab.nodes[0].netns, &proxy_conf(&folder, address)?)?;
    let places = Places { folder, lan: lab.lan.netns.clone(), node: lab.nodes[0].address };
    let daemon = lab.nodes[0].pid().context("the daemon runs")?;
    let mut rows = Vec::new();
    for (is_tls, ours, theirs) in [(false, 80, NGINX_HTTP), (true, 443, NGINX_HTTPS)] {
        let mut found = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
        for _ in 0..ROUNDS {
            for (which, port, pids) in [(0, ours, vec![daemon]), (1, theirs, proxy.pids()?)] {
                let before = cpu_seconds(&pids)?;
                let (count, seconds) = places.load(is_tls, port)?;
                found[which].0.push(count / seconds);
                found[which].1.push(count / (cpu_seconds(&pids)? - before).max(0.01));
            }
        }
        let [ours, theirs] = found.map(|(speed, per_cpu)| (median(speed), median(per_cpu)));
        let names = match is_tls {
            false => ["ingress: HTTP requests/s", "ingress: HTTP requests per CPU second"],
            true => ["ingress: HTTPS requests/s", "ingress: HTTPS requests per CPU second"],
        };
        rows.push(Row::new(names[0], ours.0, "1/s").beside(Some(("nginx", theirs.0))));
        rows.push(Row::new(names[0], ours.0 / theirs.0, "× nginx"));
        rows.push(Row::new(names[1], ours.1, "1/CPU s").beside(Some(("nginx", theirs.1))));
        rows.push(Row::new(names[1], ours.1 / theirs.1, "× nginx"));
    }
    Ok(rows)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn backend_conf() -> String {
    format!(
        "server {{ listen {BACKEND_PORT}; location / {{ default_type text/plain; return 200 \"hello\\n\"; }} }}"
    )
}

/// As people set nginx up in front of one backend: connections to it kept, one worker.
fn proxy_conf(folder: &Path, backend: Ipv4Addr) -> Result<String> {
    let names = vec![HOST.to_string()];
    let made = rcgen::generate_simple_self_signed(names)?;
    let (certificate, key) = (folder.join("proxy.crt"), folder.join("proxy.key"));
    fs::write(&certificate, made.cert.pem())?;
    fs::write(&key, made.signing_key.serialize_pem())?;
    Ok(format!(
        "upstream backend {{ server {backend}:{BACKEND_PORT}; keepalive 32; }}
server {{ listen {NGINX_HTTP}; listen {NGINX_HTTPS} ssl; server_name {HOST};
ssl_certificate {}; ssl_certificate_key {};
location / {{ proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection \"\";
proxy_set_header Host $host; proxy_set_header X-Forwarded-For $remote_addr; }} }}",
        certificate.display(),
        key.display()
    ))
}

struct Nginx(Child);

impl Nginx {
    fn start(folder: &Path, name: &str, netns: &Path, servers: &str) -> Result<Nginx> {
        let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-packages/usr/sbin/nginx");
        let program = [PathBuf::from("/usr/sbin/nginx"), unpacked].into_iter().find(|path| path.exists());
        let program = program.context("there is no nginx; apt-get install nginx-light wrk")?;
        let own = folder.join(name);
        fs::create_dir_all(&own)?;
        let conf = own.join("nginx.conf");
        let at = own.display();
        let text = format!(
            "user root; daemon off; worker_processes 1; error_log {at}/error.log; pid {at}/pid;
events {{ worker_connections 512; }}
http {{ access_log off; keepalive_requests 10000000; client_body_temp_path {at}/a; proxy_temp_path {at}/b;
fastcgi_temp_path {at}/c; uwsgi_temp_path {at}/d; scgi_temp_path {at}/e; {servers} }}"
        );
        fs::write(&conf, text)?;
        let log = own.clone();
        let child = netns::in_netns(netns, move || {
            Command::new(program).arg("-c").arg(conf).arg("-p").arg(log).stderr(Stdio::null()).spawn()
        })?;
        std::thread::sleep(Duration::from_millis(500));
        Ok(Nginx(child))
    }

    /// Master and worker.
    fn pids(&self) -> Result<Vec<u32>> {
        let master = self.0.id();
        let children = fs::read_to_string(format!("/proc/{master}/task/{master}/children"))?;
        let mut all = vec![master];
        all.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        ensure!(all.len() == 2, "nginx has one worker: {all:?}");
        Ok(all)
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        // The master ends its worker; one that is gone already is reaped.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

fn cpu_seconds(pids: &[u32]) -> Result<f64> {
    const TICKS_PER_SECOND: f64 = 100.0;
    let mut ticks = 0u64;
    for pid in pids {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, rest) = stat.rsplit_once(')').context("a process has a name")?;
        let used = rest.split_whitespace().skip(11).take(2).filter_map(|one| one.parse::<u64>().ok());
        ticks += used.sum::<u64>();
    }
    Ok(ticks as f64 / TICKS_PER_SECOND)
}

struct Places {
    folder: PathBuf,
    lan: PathBuf,
    node: Ipv4Addr,
}

impl Places {
    /// Requests answered, and in how many seconds.
    fn load(&self, is_tls: bool, port: u16) -> Result<(f64, f64)> {
        let hosts = self.folder.join("hosts");
        fs::write(&hosts, format!("{} {HOST}\n", self.node))?;
        let scheme = if is_tls { "https" } else { "http" };
        // The name must be known to wrk alone: it is what the certificate is chosen by.
        let line = format!(
            "mount --bind {} /etc/hosts && exec wrk -t1 -c16 -d2s {scheme}://{HOST}:{port}/",
            hosts.display()
        );
        let begin = Instant::now();
        let outcome = netns::in_netns(&self.lan, move || {
            Command::new("unshare").args(["--mount", "sh", "-c", &line]).output()
        })
        .context("run wrk; apt-get install wrk")?;
        let text = String::from_utf8_lossy(&outcome.stdout).into_owned();
        let seconds = begin.elapsed().as_secs_f64().min(2.1);
        ensure!(outcome.status.success(), "wrk: {text}{}", String::from_utf8_lossy(&outcome.stderr));
        ensure!(!text.contains("Non-2xx") && !text.contains("Socket errors"), "wrk on {port}: {text}");
        let count =
            text.lines().find_map(|line| line.trim().split_once(" requests in ")?.0.parse::<f64>().ok());
        Ok((count.with_context(|| format!("wrk counts requests: {text}"))?, seconds))
    }
}
