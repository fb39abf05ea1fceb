//! Boards of two architectures in one cluster, and images for both, for one and for the other.

use crate::Case;
use crate::cluster::{deploy_to, form_with, guest_binary, load_archive};
use crate::field::{Field, until};
use crate::image::multi_platform;
use anyhow::{Result, ensure};
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[Case {
    name: "mixed",
    proves: "boards with ARM processors join a PC's cluster: of one image for both each runs its own, and an image for one \
             goes nowhere else",
    run: mixed,
}];

/// Three that must stand on three boards, each behind the port of its own board.
const BOTH: &str = "\
services:
  web:
    image: both:1
    ports: [{target: 8080, published: 8081, mode: host}]
    deploy: {replicas: 3, resources: {reservations: {memory: 8M}}}
";

fn arm_binary() -> PathBuf {
    std::env::var_os("TINYDC_GUEST_BINARY_ARM")
        .map_or("target/cross/aarch64/aarch64-unknown-linux-musl/dist/tinydc".into(), PathBuf::from)
}

fn mixed(field: &mut Field) -> Result<()> {
    form_with(field, &["qemu-aarch64", "qemu-aarch64"])?;
    let (pc, arm) = (("amd64", guest_binary()), ("arm64", arm_binary()));
    load_archive(field, &multi_platform("both:1", &[pc.clone(), arm.clone()])?)?;
    let listed = field.laptop(&["image", "ls"])?;
    ensure!(listed.contains("amd64 arm64"), "{listed}");
    let begin = Instant::now();
    deploy_to(field, "shop", BOTH, &["pi1", "pi2", "pi3"])?;
    field.note("one image for both, deployed", begin);
    for (number, architecture) in [(11, "(amd64)"), (12, "(arm64)"), (13, "(arm64)")] {
        let mut page = String::new();
        until("the board's own port answers", Duration::from_secs(30), || {
            page = field.http(field.address(number), 8081, "/")?;
            Ok(true)
        })?;
        ensure!(page.contains(architecture), "guest {number} runs its own: {page}");
        field.remark(page.trim().to_string());
    }

    // Both come in by the PC, which can't run the second.
    load_archive(field, &multi_platform("pc:1", &[pc])?)?;
    load_archive(field, &multi_platform("arm:1", &[arm])?)?;
    let begin = Instant::now();
    for (app, replicas, where_to) in
        [("pc", "replicas: 2", ["pi1", "pi1"]), ("arm", "replicas: 2", ["pi2", "pi3"])]
    {
        let text = format!(
            "services:\n  web:\n    image: {app}:1\n    \
             deploy: {{{replicas}, resources: {{reservations: {{memory: 8M}}}}}}\n"
        );
        deploy_to(field, app, &text, &where_to)?;
    }
    field.note("two images for one each, deployed", begin);
    until("a second board has each image whole, for both architectures", Duration::from_secs(60), || {
        let images = field.laptop_json(&["image", "ls"])?;
        let images = images["images"].as_array().cloned().unwrap_or_default();
        Ok(images.len() == 3
            && images.iter().all(|image| image["nodes"].as_array().is_some_and(|nodes| nodes.len() == 2)))
    })
}
