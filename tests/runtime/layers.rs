//! Images, friendly and hostile: archives, registries, layers that try to leave their root.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tinydc::runtime::images::{
    BlobRequest, Digest, FetchError, FetchRequest, KeepRequest, LAYER_UNPACKED_BYTES_MAX, LayerBlobs,
    Platform, SourceError,
};
use tinydc::runtime::reference::ImageReference;
use tinydc::runtime::registry::{PullRequest, RegistryClient, RegistryConfig};
use tinydc::runtime::{ContainerId, ContainerSpec};

use crate::node::{Node, add_file, add_kind, busybox_layer, docker_archive, eventually};

type Tar = tar::Builder<Vec<u8>>;

fn layer(build: impl FnOnce(&mut Tar)) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    build(&mut tar);
    tar.into_inner().unwrap()
}

/// Loads an image of these layers; the folder of its last layer, or the whole error.
fn unpacked(node: &Node, layers: &[Vec<u8>]) -> Result<PathBuf, String> {
    let archive = docker_archive("test:1", layers, serde_json::json!({}));
    match node.load(&archive) {
        Ok(_) => Ok(node.runtime.images().layer_path(&Digest::of(layers.last().unwrap()))),
        Err(error) => Err(format!("{error:?}")),
    }
}

#[test]
fn a_layer_cannot_write_outside_its_root() {
    let node = Node::new("escape");
    let outside = node.folder().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "secret").unwrap();
    let target = outside.to_str().unwrap().to_owned();

    let refused = [
        layer(|tar| add_kind(tar, "../evil", tar::EntryType::Directory, None)),
        layer(|tar| add_kind(tar, "a/../../evil", tar::EntryType::Directory, None)),
        layer(|tar| add_kind(tar, "evil", tar::EntryType::Link, Some("../../../../etc/passwd"))),
        layer(|tar| add_kind(tar, "evil", tar::EntryType::Link, Some(&format!("{target}/secret")))),
        layer(|tar| add_kind(tar, ".wh...", tar::EntryType::Regular, None)),
    ];
    for (number, layer) in refused.iter().enumerate() {
        assert!(unpacked(&node, std::slice::from_ref(layer)).is_err(), "case {number}");
    }

    // Links to the outside may stand in an image; what is written through them lands inside.
    let through = layer(|tar| {
        add_kind(tar, "door", tar::EntryType::Symlink, Some(&target));
        add_kind(tar, "up", tar::EntryType::Symlink, Some("../../../../../../.."));
        add_file(tar, "up/abs", b"1", 0o644);
        add_file(tar, "/rooted", b"2", 0o644);
        add_kind(tar, "proc-self", tar::EntryType::Symlink, Some("/proc/self/root"));
    });
    let root = unpacked(&node, &[through]).unwrap();
    assert!(root.join("abs").is_file() && root.join("rooted").is_file());
    let inside = layer(|tar| {
        add_kind(tar, "door", tar::EntryType::Symlink, Some(&target));
        add_file(tar, "door/planted", b"evil", 0o644);
    });
    let result = unpacked(&node, &[inside]);
    assert!(result.is_err() || result.unwrap().join(&target[1..]).join("planted").exists());
    let names: Vec<_> =
        std::fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["secret"], "nothing came, nothing went");
    assert_eq!(std::fs::metadata(outside.join("secret")).unwrap().nlink(), 1, "no hard link was made");
}

#[test]
fn an_entry_replaces_a_link_instead_of_following_it() {
    let node = Node::new("replace");
    let victim = node.folder().join("victim");
    std::fs::write(&victim, "before").unwrap();
    let root = unpacked(
        &node,
        &[layer(|tar| {
            add_kind(tar, "file", tar::EntryType::Symlink, Some(victim.to_str().unwrap()));
            add_file(tar, "file", b"after", 0o644);
        })],
    )
    .unwrap();
    assert_eq!(std::fs::read(&victim).unwrap(), b"before");
    assert_eq!(std::fs::read(root.join("file")).unwrap(), b"after");
}

#[test]
fn devices_are_left_out_and_set_id_bits_kept() {
    let node = Node::new("devices");
    let root = unpacked(
        &node,
        &[layer(|tar| {
            add_kind(tar, "dev/sda", tar::EntryType::Block, None);
            add_kind(tar, "dev/mem", tar::EntryType::Char, None);
            add_kind(tar, "pipe", tar::EntryType::Fifo, None);
            add_file(tar, "su", b"#!", 0o4755);
        })],
    )
    .unwrap();
    assert_eq!(std::fs::read_dir(root.join("dev")).unwrap().count(), 0);
    assert!(std::fs::metadata(root.join("pipe")).unwrap().file_type().is_fifo());
    assert_eq!(std::fs::metadata(root.join("su")).unwrap().mode() & 0o7777, 0o4755);
}

#[test]
fn whiteouts_hide_lower_layers_only() {
    let node = Node::new("whiteout");
    let base = layer(|tar| {
        for path in ["gone", "dir/a", "dir/b", "kept"] {
            add_file(tar, path, b"base", 0o644);
        }
    });
    let top = layer(|tar| {
        add_file(tar, ".wh.gone", b"", 0o644);
        add_file(tar, "dir/new", b"top", 0o644);
        add_file(tar, "dir/.wh..wh..opq", b"", 0o644);
        add_file(tar, "own", b"top", 0o644);
        add_file(tar, ".wh.own", b"", 0o644);
    });
    let layers = [busybox_layer(), base, top];
    let archive = docker_archive(
        "w:1",
        &layers,
        serde_json::json!({ "Cmd": ["sh", "-c", "ls / /dir; cat /own; echo"] }),
    );
    let loaded = node.load(&archive).unwrap();
    let image = node.runtime.images().image(&loaded[0].digest).unwrap().unwrap();
    let config = node.runtime.images().config(&image).unwrap().config;
    let spec = ContainerSpec::new(ContainerId::parse("w").unwrap(), config, image.layers);
    let id = node.run(&spec);
    assert_eq!(node.end(&id).code, 0);
    let lines = node.lines(&id);
    for (name, is_there) in
        [("gone", false), ("a", false), ("b", false), ("new", true), ("kept", true), ("top", true)]
    {
        assert_eq!(lines.iter().any(|line| line == name), is_there, "{name}: {lines:?}");
    }
}

fn long_name_entry(tar: &mut Tar, path: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNULongName);
    header.set_size(path.len() as u64);
    header.set_cksum();
    tar.append(&header, path).unwrap();
    add_file(tar, "x", b"", 0o644);
}

#[test]
fn bombs_are_stopped_before_they_fill_anything() {
    let node = Node::new("bombs");
    let deep = "d/".repeat(10_000) + "f";
    let error = unpacked(&node, &[layer(|tar| long_name_entry(tar, deep.as_bytes()))]).unwrap_err();
    assert!(error.contains("BadPath"), "{error}");
    let error = unpacked(&node, &[layer(|tar| long_name_entry(tar, &vec![b'a'; 2 << 20]))]).unwrap_err();
    assert!(error.contains("HeaderTooLong"), "{error}");

    // 64 MiB of zeros in 64 kB, with a bound of 8 MiB.
    let zeros = layer(|tar| add_file(tar, "zeros", &vec![0u8; 64 << 20], 0o644));
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&zeros).unwrap();
    let image = Blobs::image(&[(gzip.finish().unwrap(), Digest::of(&zeros))]);
    let error = image.fetch(&node, 8 << 20).unwrap_err();
    assert!(error.contains("more than the 8388608 bytes allowed"), "{error}");
    assert_nothing_left(&node);
}

/// An image in memory, as a hostile registry could serve it.
struct Blobs {
    digest: Digest,
    blobs: Vec<(Digest, Vec<u8>)>,
}

impl Blobs {
    fn image(layers: &[(Vec<u8>, Digest)]) -> Blobs {
        let diff_ids: Vec<String> = layers.iter().map(|(_, diff_id)| diff_id.to_string()).collect();
        let config = serde_json::json!({
            "architecture": Platform::host().architecture, "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        })
        .to_string()
        .into_bytes();
        let describe = |bytes: &[u8]| {
            serde_json::json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": Digest::of(bytes).to_string(), "size": bytes.len() })
        };
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "config": describe(&config),
            "layers": layers.iter().map(|(bytes, _)| describe(bytes)).collect::<Vec<_>>(),
        })
        .to_string()
        .into_bytes();
        let digest = Digest::of(&manifest);
        let mut blobs = vec![(digest.clone(), manifest), (Digest::of(&config), config)];
        blobs.extend(layers.iter().map(|(bytes, _)| (Digest::of(bytes), bytes.clone())));
        Blobs { digest, blobs }
    }

    fn fetch(&self, node: &Node, unpacked_bytes_max: u64) -> Result<(), String> {
        let platform = Platform::host();
        let request = FetchRequest {
            digest: &self.digest,
            name: None,
            platform: &platform,
            layer_blobs: LayerBlobs::Drop,
            layer_unpacked_bytes_max: unpacked_bytes_max,
        };
        let mut source = |wanted: &BlobRequest| -> Result<Box<dyn Read>, SourceError> {
            let found = self.blobs.iter().find(|(digest, _)| *digest == wanted.digest);
            Ok(Box::new(std::io::Cursor::new(found.ok_or("no such blob")?.1.clone())))
        };
        node.runtime
            .images()
            .fetch(&request, &mut source, &mut |_| {})
            .map(|_| ())
            .map_err(|e| format!("{e:?}"))
    }
}

fn assert_nothing_left(node: &Node) {
    for folder in ["layers", "tmp", "images"] {
        let left: Vec<_> = std::fs::read_dir(node.config.data_dir.join(folder)).unwrap().collect();
        assert!(left.is_empty(), "{folder}: {left:?}");
    }
}

#[test]
fn every_byte_must_match_its_digest() {
    let plain = layer(|tar| add_file(tar, "file", b"content", 0o644));
    let other = layer(|tar| add_file(tar, "other", b"content", 0o644));
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&other).unwrap();
    let good =
        Blobs::image(&[(plain.clone(), Digest::of(&plain)), (gzip.finish().unwrap(), Digest::of(&other))]);
    for blob in 0..good.blobs.len() {
        for damage in ["flipped", "cut", "longer"] {
            let node = Node::new("digest");
            let mut bad = Blobs { digest: good.digest.clone(), blobs: good.blobs.clone() };
            let bytes = &mut bad.blobs[blob].1;
            match damage {
                // In a gzip header this is the time: it unpacks to the same tar.
                "flipped" => bytes[5] ^= 1,
                "cut" => bytes.truncate(bytes.len() - 1),
                _ => bytes.push(b' '),
            }
            assert!(bad.fetch(&node, LAYER_UNPACKED_BYTES_MAX).is_err(), "blob {blob} {damage}");
            // What came before the damaged blob may stay; it was good.
            let layers = std::fs::read_dir(node.config.data_dir.join("layers")).unwrap().count();
            assert!(layers <= blob.saturating_sub(2), "blob {blob} {damage}: {layers} layers");
            good.fetch(&node, LAYER_UNPACKED_BYTES_MAX).expect("a good source mends it");
        }
    }
    let node = Node::new("diffid");
    let lying = Blobs::image(&[(plain, Digest::of(b"something else"))]);
    assert!(lying.fetch(&node, LAYER_UNPACKED_BYTES_MAX).unwrap_err().contains("DiffIdMismatch"));
    assert_nothing_left(&node);
}

#[test]
fn archives_that_lie_or_hold_no_image_are_refused() {
    let node = Node::new("archives");
    let renamed = layer(|tar| {
        add_file(tar, &format!("blobs/sha256/{}", "0".repeat(64)), b"{}", 0o644);
        add_file(tar, "index.json", b"{\"manifests\":[]}", 0o644);
    });
    let unknown = layer(|tar| add_file(tar, "readme", b"hello", 0o644));
    let missing = layer(|tar| {
        add_file(tar, "manifest.json", br#"[{"Config":"../../etc/passwd","Layers":["x"]}]"#, 0o644);
    });
    for (archive, expected) in [
        (renamed, "WrongBlob"),
        (unknown, "NotAnImage"),
        (missing, "MissingFile"),
        (b"junk".repeat(300), "ReadArchive"),
    ] {
        let error = format!("{:?}", node.load(&archive).unwrap_err());
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn the_same_docker_archive_gives_the_same_digest_on_every_node() {
    let archive = docker_archive("web:1", &[busybox_layer()], serde_json::json!({ "Cmd": ["sh"] }));
    let (one, two) = (Node::new("same1"), Node::new("same2"));
    let loaded = one.load(&archive).unwrap();
    let again = two.load(&archive).unwrap();
    assert_eq!((&loaded[0].digest, loaded.len()), (&again[0].digest, again.len()));
    assert_eq!(loaded[0].names, ["web:1"]);
    assert!(loaded[0].is_runnable_here);
    assert!(one.runtime.images().missing_blobs(&loaded[0].digest).unwrap().is_empty(), "it can be handed on");
}

#[test]
fn a_peer_hands_on_an_image_and_garbage_goes() {
    let (from, to) = (Node::with_busybox("peer1"), Node::new("peer2"));
    let digest = from.runtime.images().list().unwrap()[0].digest.clone();
    let platform = Platform::host();
    let request = FetchRequest {
        digest: &digest,
        name: Some("docker.io/library/busybox:test"),
        platform: &platform,
        layer_blobs: LayerBlobs::Keep,
        layer_unpacked_bytes_max: LAYER_UNPACKED_BYTES_MAX,
    };
    let store = from.runtime.images();
    let mut source = |blob: &BlobRequest| -> Result<Box<dyn Read>, SourceError> {
        Ok(Box::new(store.open_blob(&blob.digest)?))
    };
    to.runtime.images().fetch(&request, &mut source, &mut |_| {}).unwrap();
    assert!(to.runtime.images().missing_blobs(&digest).unwrap().is_empty());

    let id = from.run(&from.spec("user", "sleep 100"));
    let none = BTreeSet::new;
    let collected = from.runtime.collect_garbage(none).unwrap();
    assert_eq!((collected.images, collected.layers), (1, 0), "a running container keeps its layers");
    from.runtime.stop(&id, libc::SIGKILL, std::time::Duration::ZERO).unwrap();
    from.runtime.remove(&id, tinydc::runtime::KeepLogs::No).unwrap();
    assert_eq!(from.runtime.collect_garbage(none).unwrap().layers, 1);
    assert_eq!(to.runtime.collect_garbage(|| BTreeSet::from([digest])).unwrap(), Default::default());
}

/// Debian's registry on loopback.
struct Registry {
    process: Child,
    port: u16,
}

impl Registry {
    fn start(folder: &Path) -> Registry {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = folder.join("registry.yml");
        let root = folder.join("registry");
        let text = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n",
            root.display()
        );
        std::fs::write(&config, text).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("apt-get install docker-registry");
        eventually("the registry answers", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        Registry { process, port }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn skopeo(args: &[&str]) {
    let status = Command::new("skopeo").args(["--insecure-policy", "copy", "--quiet"]).args(args).status();
    assert!(status.expect("apt-get install skopeo").success(), "skopeo copy {args:?}");
}

#[test]
fn an_image_travels_through_skopeo_a_registry_and_an_oci_archive() {
    let node = Node::new("registry");
    let registry = Registry::start(node.folder());
    let path = |name: &str| node.folder().join(name).display().to_string();
    let archive =
        docker_archive("app:1", &[busybox_layer()], serde_json::json!({ "Cmd": ["echo", "pulled"] }));
    std::fs::write(path("app.tar"), &archive).unwrap();
    let name = format!("127.0.0.1:{}/team/app:1", registry.port);
    skopeo(&[
        "--dest-tls-verify=false",
        &format!("docker-archive:{}", path("app.tar")),
        &format!("docker://{name}"),
    ]);

    let client = RegistryClient::new(RegistryConfig::default()).unwrap();
    let (image, platform) = (ImageReference::parse(&name).unwrap(), Platform::host());
    let resolved = client.resolve(&image).unwrap();
    // Of an image without an index its configuration tells.
    assert_eq!(resolved.platforms[0].architecture, platform.architecture);
    let request = PullRequest {
        image: &image,
        digest: &resolved.digest,
        platform: &platform,
        layer_blobs: LayerBlobs::Drop,
    };
    let mut steps = 0;
    let pulled = client.pull(node.runtime.images(), &request, &mut |_| steps += 1).unwrap();
    assert!(steps > 0 && pulled.names.contains(&name), "{pulled:?}");
    let config = node.runtime.images().config(&pulled).unwrap().config;
    let id = node.run(&ContainerSpec::new(ContainerId::parse("pulled").unwrap(), config, pulled.layers));
    assert_eq!((node.end(&id).code, node.lines(&id)), (0, vec!["pulled".to_owned()]));

    let missing = ImageReference::parse(&name.replace("app:1", "nothing:1")).unwrap();
    let error = format!("{:?}", client.resolve(&missing).unwrap_err());
    assert!(error.contains("NotFound"), "{error}");

    skopeo(&[
        &format!("docker-archive:{}", path("app.tar")),
        &format!("oci-archive:{}:app:1", path("oci.tar")),
    ]);
    let other = Node::new("oci");
    let loaded = other.load(&std::fs::read(path("oci.tar")).unwrap()).unwrap();
    assert_eq!((loaded.len(), loaded[0].is_runnable_here), (1, true), "{loaded:?}");
}

#[test]
fn an_image_for_other_machines_is_kept_for_them() {
    let node = Node::new("foreign");
    let archive = docker_archive("a:1", &[busybox_layer()], serde_json::json!({}));
    let foreign = Platform { architecture: "riscv64".into(), variant: None };
    let loaded = node.runtime.images().load(archive.as_slice(), &foreign).unwrap();
    assert!(!loaded[0].is_runnable_here);
    assert!(node.runtime.images().missing_blobs(&loaded[0].digest).unwrap().is_empty());
    let image = node.runtime.images().image(&loaded[0].digest).unwrap().unwrap();
    assert_eq!((image.manifest, image.layers.len()), (None, 0));
}

/// An OCI layout of one image for two platforms. Some tools name an index in `index.json`, others write it there.
fn two_platforms(is_flat: bool, left_out: Option<&str>) -> Vec<u8> {
    let mut blobs: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |bytes: Vec<u8>| -> serde_json::Value {
        let digest = Digest::of(&bytes);
        let described = serde_json::json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest.to_string(), "size": bytes.len() });
        blobs.push((format!("blobs/sha256/{}", digest.hex()), bytes));
        described
    };
    let mut manifests = Vec::new();
    for architecture in [Platform::host().architecture.as_str(), "riscv64"] {
        let layer = layer(|tar| add_file(tar, "machine", architecture.as_bytes(), 0o644));
        let diff_id = Digest::of(&layer).to_string();
        let config = serde_json::json!({ "architecture": architecture, "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": [diff_id] } });
        let (config, layer) = (add(config.to_string().into_bytes()), add(layer));
        let manifest = serde_json::json!({ "schemaVersion": 2, "config": config, "layers": [layer] });
        let mut described = match left_out == Some(architecture) {
            // Named, but not in the archive.
            true => config,
            false => add(manifest.to_string().into_bytes()),
        };
        if left_out == Some(architecture) {
            described["digest"] = Digest::of(b"somewhere else").to_string().into();
        }
        described["platform"] = serde_json::json!({ "architecture": architecture, "os": "linux" });
        if is_flat {
            described["annotations"] = serde_json::json!({ "org.opencontainers.image.ref.name": "both:1" });
        }
        manifests.push(described);
    }
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": manifests }).to_string().into_bytes();
    let top = match is_flat {
        true => index,
        false => {
            let mut named = add(index);
            named["annotations"] = serde_json::json!({ "io.containerd.image.name": "both:1" });
            serde_json::json!({ "schemaVersion": 2, "manifests": [named] }).to_string().into_bytes()
        }
    };
    layer(|tar| {
        blobs.iter().for_each(|(path, bytes)| add_file(tar, path, bytes, 0o644));
        add_file(tar, "index.json", &top, 0o644);
    })
}

#[test]
fn an_image_for_two_platforms_is_one_image_and_handed_on_for_both() {
    let foreign = Platform { architecture: "riscv64".into(), variant: None };
    for is_flat in [false, true] {
        let [one, two, three] = ["both1", "both2", "both3"].map(Node::new);
        let loaded = one.load(&two_platforms(is_flat, None)).unwrap();
        assert_eq!(
            (loaded.len(), loaded[0].names.clone()),
            (1, vec!["both:1".to_owned()]),
            "flat: {is_flat}"
        );
        assert!(loaded[0].is_runnable_here);
        let digest = &loaded[0].digest;
        let platforms = one.runtime.images().platforms(digest).unwrap();
        assert_eq!(platforms.len(), 2, "{platforms:?}");

        // The second keeps it for others, the third is such another and asks only the second.
        let from = |node: &Node| {
            let folder = node.config.data_dir.join("blobs/sha256");
            move |blob: &BlobRequest| -> Result<Box<dyn Read>, SourceError> {
                Ok(Box::new(std::fs::File::open(folder.join(blob.digest.hex()))?))
            }
        };
        let manifests: Vec<Digest> = platforms.iter().map(|(_, manifest)| manifest.clone()).collect();
        let keep = |bytes_max| KeepRequest { digest, name: Some("both:1"), manifests: &manifests, bytes_max };
        let refused = two.runtime.images().keep(&keep(100), &mut from(&one));
        assert!(matches!(refused, Err(FetchError::NoSpace { bytes_max: 100, .. })), "{refused:?}");
        two.runtime.images().keep(&keep(1 << 20), &mut from(&one)).unwrap();
        assert_eq!(two.runtime.images().platforms(digest).unwrap(), platforms);
        let kept = two.runtime.collect_garbage(|| BTreeSet::from([digest.clone()])).unwrap();
        assert_eq!(kept, Default::default(), "what is kept for others stays");
        let request = FetchRequest {
            digest,
            name: Some("both:1"),
            platform: &foreign,
            layer_blobs: LayerBlobs::Drop,
            layer_unpacked_bytes_max: LAYER_UNPACKED_BYTES_MAX,
        };
        let images = three.runtime.images();
        let image = images.fetch(&request, &mut from(&two), &mut |_| {}).unwrap();
        let machine = std::fs::read_to_string(images.layer_path(&image.layers[0]).join("machine")).unwrap();
        assert_eq!(machine, "riscv64");
    }
}

#[test]
fn what_can_be_had_of_an_image_is_kept_without_the_rest() {
    let one = Node::new("kept1");
    let digest = one.load(&two_platforms(false, None)).unwrap()[0].digest.clone();
    let platforms = |node: &Node| node.runtime.images().platforms(&digest).unwrap();
    let manifests: Vec<Digest> = platforms(&one).into_iter().map(|(_, manifest)| manifest).collect();
    let request = KeepRequest { digest: &digest, name: None, manifests: &manifests, bytes_max: 1 << 20 };
    for (lacking, held) in [(Some(0), 1), (Some(1), 1), (None, 2)] {
        let mut source = |blob: &BlobRequest| -> Result<Box<dyn Read>, SourceError> {
            match lacking {
                Some(number) if blob.digest == manifests[number] => Err("on a node that is down".into()),
                _ => Ok(Box::new(one.runtime.images().open_blob(&blob.digest)?)),
            }
        };
        let two = Node::new("kept2");
        let kept = two.runtime.images().keep(&request, &mut source);
        assert_eq!((kept.is_ok(), platforms(&two).len()), (lacking.is_none(), held));
    }
}

#[test]
fn what_was_loaded_stays_until_something_else_keeps_it() {
    let node = Node::new("held");
    let archive = docker_archive("a:1", &[busybox_layer()], serde_json::json!({}));
    let loaded = node.load(&archive).unwrap();
    assert_eq!(node.runtime.collect_garbage(BTreeSet::new).unwrap(), Default::default());
    drop(loaded);
    assert_eq!(node.runtime.collect_garbage(BTreeSet::new).unwrap().images, 1);
}

#[test]
fn an_image_has_only_the_platforms_whose_parts_the_archive_holds() {
    let own = Platform::host().architecture;
    for (left_out, rest, runs_here) in [("riscv64", own.as_str(), true), (own.as_str(), "riscv64", false)] {
        let node = Node::new("parts");
        let loaded = node.load(&two_platforms(false, Some(left_out))).unwrap();
        assert_eq!(loaded[0].is_runnable_here, runs_here);
        let platforms = node.runtime.images().platforms(&loaded[0].digest).unwrap();
        assert_eq!(platforms.len(), 1, "{platforms:?}");
        assert_eq!(platforms[0].0.architecture, rest);
    }
}
