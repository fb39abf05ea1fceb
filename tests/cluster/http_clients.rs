//! Stock clients and servers of HTTP on both sides of a route: curl, and Python's websockets and http.server.

use super::Scenario;
use super::network::{containers, named};
use super::stage::{Stage, until};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use tinydc::linux::netns;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "http-clients",
    proves: "stock clients through an HTTP route: WebSockets in clear and by TLS, a body over its limit is a 413 whichever \
                 way it is sent, the client's address is told on, and a route to nobody has a readable page",
    machines: 2,
    run: http_clients,
}];

const ECHO_PORT: &str = "9300";
const SINK_PORT: &str = "9301";
const LIMIT: Duration = Duration::from_secs(10);

/// Echoes by WebSocket, and says to a plain GET whom it was told of.
const ECHO: &str = r#"
import asyncio, http, sys
try:
    from websockets.legacy.server import serve
except ImportError:
    from websockets import serve
async def echo(socket):
    async for message in socket:
        await socket.send(message)
async def plain(path, headers):
    if "upgrade" not in headers.get("connection", "").lower():
        told = " ".join("%s=%s" % (name, headers.get(name)) for name in ("x-forwarded-for", "x-forwarded-proto", "host"))
        return http.HTTPStatus.OK, [], told.encode()
async def main():
    async with serve(echo, "0.0.0.0", int(sys.argv[1]), max_size=None, process_request=plain):
        await asyncio.Future()
asyncio.run(main())
"#;
/// Takes bodies to their end.
const SINK: &str = r#"
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline() or "0", 16):
                self.rfile.read(size + 2)
            self.rfile.readline()
        else:
            self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()
http.server.ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
"#;
/// A peer that hangs costs 3 s beyond the limit: closing takes up to three times `close_timeout`, by default 10 s.
const ECHO_CLIENT: &str = r#"
import asyncio, ssl, sys
try:
    from websockets.legacy.client import connect
except ImportError:
    from websockets import connect
async def main():
    address, root = sys.argv[1:3]
    for uri, port, tls in (("ws://ws.test/echo", 80, None), ("wss://ws.test/echo", 443, ssl.create_default_context(cafile=root))):
        async with connect(uri, host=address, port=port, ssl=tls, server_hostname=tls and "ws.test", max_size=None, close_timeout=1) as socket:
            for size in (0, 1, 125, 126, 65535, 65536, 1 << 20):
                await socket.send(bytes(size))
                assert await socket.recv() == bytes(size), size
            await socket.send("a word")
            assert await socket.recv() == "a word"
            await (await socket.ping())
        print(uri, "passed")
asyncio.run(asyncio.wait_for(main(), 30))
"#;

/// A program that ends with the scenario.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only for one that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn python(netns: &Path, words: &[&str]) -> Result<Child> {
    let mut command = Command::new("/usr/bin/python3");
    command.arg("-c").args(words).stdout(Stdio::piped()).stderr(Stdio::piped());
    netns::in_netns(netns, || command.spawn())
        .context("python3 is needed: apt-get install python3-websockets")
}

/// Runs a program beside a service's own, in its namespace.
fn serve(stage: &Stage, service: &str, program: &str, port: &str) -> Result<Running> {
    let (container, _) = containers(stage, "shop", service)?.into_iter().next().context("it runs")?;
    Ok(Running(python(&container, &[program, port])?))
}

/// A machine on the LAN that trusts the cluster's CA.
struct Client {
    lan: PathBuf,
    own: Ipv4Addr,
    root: String,
}

impl Client {
    /// What a node answers, headers included if asked for.
    fn curl(&self, node: Ipv4Addr, words: &[&str]) -> Result<String> {
        let to = format!("::{node}:");
        let fixed = ["-sS", "-m", "5", "--cacert", &self.root, "--connect-to", &to];
        let output = netns::in_netns(&self.lan, || Command::new("curl").args(fixed).args(words).output())?;
        Ok(text(&output))
    }

    fn is_told_on(&self, node: Ipv4Addr) -> Result<()> {
        for (scheme, url) in [("http", "http://ws.test/"), ("https", "https://ws.test/")] {
            let wanted = format!("x-forwarded-for={} x-forwarded-proto={scheme} host=ws.test", self.own);
            until(&format!("{url} says {wanted} at {node}"), LIMIT, || {
                Ok(self.curl(node, &[url])? == wanted)
            })?;
        }
        Ok(())
    }

    fn talks_by_websocket(&self, node: Ipv4Addr) -> Result<()> {
        let client = python(&self.lan, &[ECHO_CLIENT, &node.to_string(), &self.root])?;
        let output = client.wait_with_output()?;
        let said = format!("{}{}", text(&output), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success() && said.matches("passed").count() == 2, "at {node}: {said}");
        Ok(())
    }

    fn posts(&self, node: Ipv4Addr, header: &str, body: &str) -> Result<String> {
        let code = ["-o", "/dev/null", "-w", "%{http_code}", "-H", header, "--data-binary", body];
        self.curl(node, &[code.as_slice(), &["http://up.test/"]].concat())
    }

    /// Bodies of a known length and of an unknown one.
    fn is_limited(&self, node: Ipv4Addr, small: &str, big: &str) -> Result<()> {
        until("the sink listens", LIMIT, || Ok(self.posts(node, "x-first: 1", small)? == "200"))?;
        for header in ["content-type: text/plain", "transfer-encoding: chunked"] {
            for (body, wanted) in [(small, "200"), (big, "413")] {
                let code = self.posts(node, header, body)?;
                ensure!(code == wanted, "{header}, {body}: answered by {code}, not {wanted}");
            }
        }
        Ok(())
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn http_clients(stage: &mut Stage) -> Result<()> {
    stage.form(2)?;
    let routed = |service: &str, host: &str, port: &str| {
        let labels = format!(
            "    labels:\n      tinydc.http.host: {host}\n      tinydc.http.port: \"{port}\"\n      tinydc.http.tls: cluster\n      \
             tinydc.http.redirect: \"false\"\n      tinydc.http.body_max: 1m\n"
        );
        named(service, 1, &labels)
    };
    let services = [routed("echo", "ws.test", ECHO_PORT), routed("sink", "up.test", SINK_PORT)];
    stage.deploy(0, "shop", &format!("services:\n{}", services.concat()))?;
    let root = stage.lab.dir.join("ca.pem");
    fs::write(&root, stage.cli(0, &["ca"])?)?;
    let echo = serve(stage, "echo", ECHO, ECHO_PORT)?;
    let _sink = serve(stage, "sink", SINK, SINK_PORT)?;
    let lan = &stage.lab.lan;
    let client = Client { lan: lan.netns.clone(), own: lan.address(254), root: root.display().to_string() };
    let body = |name: &str, bytes: usize| -> Result<String> {
        let path = stage.lab.dir.join(name);
        fs::write(&path, vec![7; bytes])?;
        Ok(format!("@{}", path.display()))
    };
    let (small, big) = (body("small", 1 << 20)?, body("big", 2 << 20)?);
    for node in &stage.lab.nodes {
        client.is_told_on(node.address)?;
        client.talks_by_websocket(node.address)?;
        client.is_limited(node.address, &small, &big)?;
    }
    drop(echo);
    let address = stage.lab.nodes[1].address;
    let page = client.curl(address, &["-i", "http://ws.test/"])?;
    let is_readable = page.starts_with("HTTP/1.1 502") && page.contains("echo of app shop");
    ensure!(is_readable, "a page for people: {page}");
    stage.cli(0, &["scale", "shop/echo=0"])?;
    until("nobody serves it", LIMIT, || {
        Ok(client.curl(address, &["-i", "http://ws.test/"])?.starts_with("HTTP/1.1 503"))
    })
}
