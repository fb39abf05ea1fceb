//! One node for one test: a runtime with its own tag, and images made of busybox.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tinydc::runtime::images::{Digest, ImageConfig, Loaded, Platform};
use tinydc::runtime::logs::{LineEnd, LogRequest, Stream};
use tinydc::runtime::{ContainerEnd, ContainerId, ContainerSpec, ExitRecord, Runtime, RuntimeConfig};

static NEXT: AtomicU32 = AtomicU32::new(0);

pub struct Node {
    pub runtime: Runtime,
    pub config: RuntimeConfig,
    folder: PathBuf,
    image: Option<Digest>,
}

impl Node {
    pub fn new(name: &str) -> Node {
        require();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("tinydc-rt-{}-{number}-{name}", std::process::id()));
        let tag = format!("{:05x}{:03x}", std::process::id() & 0xf_ffff, number & 0xfff);
        let config = RuntimeConfig {
            node_tag: tag,
            data_dir: folder.join("data"),
            run_dir: folder.join("run"),
            program: Some(env!("CARGO_BIN_EXE_tinydc").into()),
        };
        let runtime = Runtime::open(config.clone()).expect("open the runtime");
        Node { runtime, config, folder, image: None }
    }

    pub fn with_busybox(name: &str) -> Node {
        let mut node = Node::new(name);
        let layer = busybox_layer();
        let archive = docker_archive("busybox:test", &[layer], serde_json::json!({ "Cmd": ["sh"] }));
        let loaded = node.load(&archive).expect("load busybox");
        node.image = Some(loaded[0].digest.clone());
        node
    }

    pub fn load(&self, archive: &[u8]) -> Result<Vec<Loaded>, tinydc::runtime::images::LoadError> {
        self.runtime.images().load(archive, &Platform::host())
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A container that runs a shell script.
    pub fn spec(&self, id: &str, script: &str) -> ContainerSpec {
        let digest = self.image.as_ref().expect("a node with busybox");
        let image = self.runtime.images().image(digest).unwrap().expect("busybox is loaded");
        let config: ImageConfig = self.runtime.images().config(&image).unwrap().config;
        let mut spec = ContainerSpec::new(ContainerId::parse(id).unwrap(), config, image.layers);
        spec.command = Some(vec!["sh".into(), "-c".into(), script.into()]);
        spec
    }

    pub fn run(&self, spec: &ContainerSpec) -> ContainerId {
        self.runtime.create(spec).expect("create the container");
        self.runtime.start(&spec.id, None).expect("start the container");
        spec.id.clone()
    }

    pub fn end(&self, id: &ContainerId) -> ExitRecord {
        let mut watch = self.runtime.watch(id).unwrap();
        match watch.wait_timeout(Duration::from_secs(20)).unwrap() {
            Some(ContainerEnd::Exited(exit)) => exit,
            other => panic!("{id} did not exit: {other:?}; its log ends {:?}", self.lines(id).last()),
        }
    }

    pub fn run_to_end(&self, id: &str, script: &str) -> (ExitRecord, Vec<String>) {
        let id = self.run(&self.spec(id, script));
        (self.end(&id), self.lines(&id))
    }

    /// The log's lines, with `!` before those of stderr and `#` before tinydc's own.
    pub fn lines(&self, id: &ContainerId) -> Vec<String> {
        let mut reader = self.runtime.logs(id, LogRequest::default()).unwrap();
        let (mut lines, mut line) = (Vec::new(), String::new());
        reader
            .backlog(&mut |record| {
                if line.is_empty() {
                    line.push_str(match record.stream {
                        Stream::Stdout => "",
                        Stream::Stderr => "!",
                        Stream::Note => "#",
                    });
                }
                line.push_str(&String::from_utf8_lossy(&record.text));
                if record.end == LineEnd::Ended {
                    lines.push(std::mem::take(&mut line));
                }
                true
            })
            .unwrap();
        lines
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = self.runtime.erase() {
            eprintln!("clean up: {error:?}");
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Fails with the remedy when this machine lacks something.
fn require() {
    assert!(nix::unistd::geteuid().is_root(), "run as root: these tests start real containers");
    let file_systems = std::fs::read_to_string("/proc/filesystems").unwrap();
    assert!(
        file_systems.contains("overlay"),
        "the kernel lacks overlayfs; `modprobe overlay` or CONFIG_OVERLAY_FS"
    );
    assert!(Path::new("/bin/busybox").exists(), "apt-get install busybox-static");
}

/// Waits for `condition` with a deadline.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    // The slowest is the log's flush after 30 s.
    let deadline = Instant::now() + Duration::from_secs(45);
    while !condition() {
        assert!(Instant::now() < deadline, "not within 45 s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

// ---- archives

pub fn file_header(path: &str, size: usize, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    // Raw: the crate refuses absolute paths and `..`, which hostile archives hold.
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_size(size as u64);
    header.set_mode(mode);
    header.set_mtime(1_700_000_000);
    header.set_uid(0);
    header.set_gid(0);
    header.set_cksum();
    header
}

pub fn add_file(tar: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8], mode: u32) {
    tar.append(&file_header(path, content.len(), mode), content).unwrap();
}

pub fn add_kind(tar: &mut tar::Builder<Vec<u8>>, path: &str, kind: tar::EntryType, link: Option<&str>) {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    if let Some(link) = link {
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    }
    header.set_entry_type(kind);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header.set_mtime(1_700_000_000);
    header.set_cksum();
    tar.append(&header, std::io::empty()).unwrap();
}

pub fn busybox_layer() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for folder in ["bin", "etc", "tmp", "data"] {
        add_kind(&mut tar, folder, tar::EntryType::Directory, None);
    }
    add_file(&mut tar, "bin/busybox", &std::fs::read("/bin/busybox").unwrap(), 0o755);
    let applets = "sh cat echo ls sleep id mount mknod mkdir touch env pwd kill dd head tail seq yes stty unshare \
                   chown hostname stat wc grep true false tr ps test readlink sysctl ping cp rm";
    for applet in applets.split_whitespace() {
        add_kind(&mut tar, &format!("bin/{applet}"), tar::EntryType::Symlink, Some("busybox"));
    }
    add_file(&mut tar, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nweb:x:33:44:web:/srv:/bin/sh\n", 0o644);
    add_file(&mut tar, "etc/group", b"root:x:0:\nweb:x:44:\nvideo:x:50:web\n", 0o644);
    add_file(&mut tar, "data/seed.txt", b"from the image", 0o640);
    tar.into_inner().unwrap()
}

/// What `docker save` writes.
pub fn docker_archive(name: &str, layers: &[Vec<u8>], config: serde_json::Value) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
    let document = serde_json::json!({
        "architecture": Platform::host().architecture,
        "os": "linux",
        "config": config,
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let mut tar = tar::Builder::new(Vec::new());
    let mut paths = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        paths.push(format!("{number:02}/layer.tar"));
        add_file(&mut tar, &paths[number], layer, 0o644);
    }
    add_file(&mut tar, "config.json", document.to_string().as_bytes(), 0o644);
    let manifest = serde_json::json!([{ "Config": "config.json", "RepoTags": [name], "Layers": paths }]);
    add_file(&mut tar, "manifest.json", manifest.to_string().as_bytes(), 0o644);
    tar.into_inner().unwrap()
}
