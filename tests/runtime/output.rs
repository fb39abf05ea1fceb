//! What containers write: order, following, rotation, silence.

use std::time::Duration;

use tinydc::runtime::logs::{FollowEvent, LogRequest};

use crate::node::{Node, eventually};

#[test]
fn a_follower_sees_lines_before_they_reach_a_disk() {
    let node = Node::with_busybox("follow");
    let id = node.run(
        &node.spec("follow", "echo first; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo second; exit 0"),
    );
    eventually("first", || node.lines(&id).contains(&"first".to_owned()));
    let mut reader = node.runtime.logs(&id, LogRequest { follow: true, ..LogRequest::default() }).unwrap();
    let mut seen = Vec::new();
    reader
        .backlog(&mut |record| {
            seen.push(String::from_utf8(record.text).unwrap());
            true
        })
        .unwrap();
    assert_eq!(seen, ["first"]);
    assert_eq!(reader.next_live(Duration::from_millis(50)).unwrap(), FollowEvent::Idle);
    std::fs::write(node.runtime.instance_dir(&id).join("rootfs/tmp/go"), "").unwrap();
    loop {
        match reader.next_live(Duration::from_secs(10)).unwrap() {
            FollowEvent::Records(records) => {
                seen.extend(records.into_iter().map(|r| String::from_utf8(r.text).unwrap()))
            }
            FollowEvent::Ended => break,
            FollowEvent::Idle => panic!("nothing came: {seen:?}"),
        }
    }
    assert_eq!(seen, ["first", "second"]);
    let logs = node.runtime.instance_dir(&id).join("logs");
    assert_eq!(std::fs::read_dir(&logs).unwrap().count(), 0, "a few lines reach no disk before 30 s");
    assert_eq!(node.lines(&id), ["first", "second"], "and are not lost");
}

#[test]
fn a_loud_container_is_bounded_and_complete_up_to_the_cap() {
    let node = Node::with_busybox("loud");
    let (exit, lines) = node.run_to_end("loud", "seq 1 200000; printf 'no newline'");
    assert_eq!(exit.code, 0);
    let numbers: Vec<&String> = lines.iter().filter(|line| line.parse::<u64>().is_ok()).collect();
    assert_eq!(numbers.last().map(|line| line.as_str()), Some("200000"));
    assert_eq!(numbers.len(), 200_000, "4 MiB are below every bound");
    let id =
        node.run(&node.spec("louder", "yes 0123456789012345678901234567890123456789 | head -c 40000000"));
    assert_eq!(node.end(&id).code, 0, "a container never waits for its log");
    let logs = node.runtime.instance_dir(&id).join("logs");
    let bytes: u64 =
        std::fs::read_dir(&logs).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes <= 20 << 20, "{bytes}");
    let notes: Vec<String> = node.lines(&id).into_iter().filter(|line| line.starts_with('#')).collect();
    assert!(notes[0].contains("more than 20 MiB") && notes[1].contains("dropped"), "{notes:?}");
}

#[test]
fn an_idle_container_writes_nothing() {
    let node = Node::with_busybox("idle");
    let id = node.run(&node.spec("idle", "echo once; sleep 1000"));
    eventually("once", || node.lines(&id).contains(&"once".to_owned()));
    let text = std::fs::read_to_string(node.config.run_dir.join("shim/idle/processes")).unwrap();
    let shim = text.split(' ').nth(2).unwrap().to_owned();
    let counters = |file: &str, key: &str| -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{shim}/{file}")).unwrap();
        text.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().parse().unwrap()
    };
    eventually("the 30 s flush", || {
        std::thread::sleep(Duration::from_secs(2));
        node.runtime.instance_dir(&id).join("logs/current").exists()
    });
    let before = (counters("io", "write_bytes:"), counters("status", "voluntary_ctxt_switches:"));
    std::thread::sleep(Duration::from_secs(3));
    let after = (counters("io", "write_bytes:"), counters("status", "voluntary_ctxt_switches:"));
    assert_eq!(after, before, "no write and no wake-up");
}
