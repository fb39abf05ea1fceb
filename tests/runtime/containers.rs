//! Containers end to end: start, exit, stop, exec, adoption, limits.

use std::process::Stdio;
use std::time::{Duration, Instant};

use tinydc::runtime::{
    Access, Bind, CheckEnd, ContainerEnd, ContainerId, ContainerSpec, ContainerState, ExecRequest,
    ExecStreams, KeepLogs, LeaseEnd, Runtime, RuntimeConfig, Seed, Tmpfs,
};

use crate::node::{Node, add_file, busybox_layer, docker_archive, eventually};

#[test]
fn exit_codes_and_signals_are_told() {
    let node = Node::with_busybox("exit");
    let (exit, lines) = node.run_to_end("ok", "echo out; echo err >&2; exit 7");
    assert_eq!((exit.code, exit.signal, exit.is_oom_killed), (7, None, false));
    assert!(lines.contains(&"out".to_owned()) && lines.contains(&"!err".to_owned()), "{lines:?}");
    let killed = node.run(&node.spec("killed", "sleep 100"));
    node.runtime.signal(&killed, libc::SIGKILL).unwrap();
    let exit = node.end(&killed);
    assert_eq!((exit.code, exit.signal, exit.is_oom_killed), (137, Some(9), false));
    assert!(exit.finished_at_ms >= exit.started_at_ms && exit.started_at_ms > 0);
}

#[test]
fn a_container_can_be_started_again_with_what_it_wrote() {
    let node = Node::with_busybox("again");
    let id = node.run(&node.spec("again", "cat /tmp/count; echo x >>/tmp/count; echo done"));
    node.end(&id);
    for _ in 0..2 {
        node.runtime.start(&id, None).unwrap();
        node.end(&id);
    }
    assert_eq!(node.lines(&id).iter().filter(|line| *line == "x").count(), 3, "{:?}", node.lines(&id));
}

/// Set in the process that is to be killed: the node's tag and folders.
const STARTER: &str = "TINYDC_TEST_STARTER";

#[test]
fn a_killed_starter_loses_no_container_and_no_exit() {
    if let Ok(text) = std::env::var(STARTER) {
        return start_and_wait_to_be_killed(&text);
    }
    let node = Node::with_busybox("adopt");
    let running = node.spec("running", "echo up; while :; do sleep 1; done");
    let ending = node.spec("ending", "while [ ! -e /tmp/go ]; do sleep 0.05; done; exit 3");
    let gone = node.spec("gone", "while [ ! -e /tmp/go ]; do sleep 0.05; done; exit 4");
    for spec in [&running, &ending, &gone] {
        node.runtime.create(spec).unwrap();
    }
    let (config, name) = (&node.config, "containers::a_killed_starter_loses_no_container_and_no_exit");
    let text = format!("{}\n{}\n{}", config.node_tag, config.data_dir.display(), config.run_dir.display());
    let starter = std::process::Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact"])
        .env(STARTER, text)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut starter = Killed(starter);
    let pids = || -> Vec<_> {
        let running = |state| match state {
            ContainerState::Running { main, .. } => Some(main),
            _ => None,
        };
        node.runtime.adopt().unwrap().into_iter().filter_map(|status| running(status.state)).collect()
    };
    eventually("three containers run", || pids().len() == 3);
    let before = pids();
    starter.0.kill().unwrap();
    starter.0.wait().unwrap();
    assert_eq!(pids(), before, "the same processes after the daemon's death");
    // One ends while nobody looks, one while somebody does.
    std::fs::write(node.runtime.instance_dir(&gone.id).join("rootfs/tmp/go"), "").unwrap();
    eventually("it ended", || !matches!(node.runtime.state(&gone.id), ContainerState::Running { .. }));
    assert_eq!(node.end(&gone.id).code, 4);
    let check = node.runtime.check(&ending.id, &shell("touch /tmp/go"), Duration::from_secs(10)).unwrap();
    assert_eq!(check.end, CheckEnd::Exited(0));
    assert_eq!(node.end(&ending.id).code, 3);
    let end = node.runtime.stop(&running.id, libc::SIGTERM, Duration::from_millis(200)).unwrap();
    assert!(matches!(end, ContainerEnd::Exited(exit) if exit.signal == Some(9)), "{end:?}");
    assert_eq!(node.lines(&running.id), ["up"]);
}

/// Killed when the test ends, also by a panic.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_and_wait_to_be_killed(text: &str) {
    let words: Vec<&str> = text.split('\n').collect();
    let config = RuntimeConfig {
        node_tag: words[0].into(),
        data_dir: words[1].into(),
        run_dir: words[2].into(),
        program: Some(env!("CARGO_BIN_EXE_tinydc").into()),
    };
    let runtime = Runtime::open(config).unwrap();
    for status in runtime.list().unwrap() {
        runtime.start(&status.id, None).unwrap();
    }
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn a_killed_shim_leaves_no_container_behind() {
    let node = Node::with_busybox("lost");
    let id = node.run(&node.spec("lost", "while :; do sleep 1; done"));
    let ContainerState::Running { main, .. } = node.runtime.state(&id) else { panic!("not running") };
    let text = std::fs::read_to_string(node.config.run_dir.join("shim/lost/processes")).unwrap();
    let shim: i32 = text.split(' ').nth(2).unwrap().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::SIGKILL).unwrap();
    eventually("the shim is gone", || node.runtime.state(&id) == ContainerState::Lost);
    node.runtime.adopt().unwrap();
    eventually("the container is gone", || !main.is_alive());
    node.runtime.start(&id, None).unwrap();
    assert!(matches!(node.runtime.state(&id), ContainerState::Running { .. }), "it can be started again");
}

#[test]
fn out_of_memory_is_told_from_other_kills() {
    let node = Node::with_busybox("oom");
    let mut spec = node.spec("oom", "tail /dev/zero");
    spec.memory_bytes_max = Some(16 << 20);
    let exit = {
        let id = node.run(&spec);
        node.end(&id)
    };
    assert!(exit.is_oom_killed && exit.oom_kills > 0, "{exit:?}");
    let mut spec = node.spec("child", "tail /dev/zero; echo survived; exit 4");
    spec.memory_bytes_max = Some(16 << 20);
    let id = node.run(&spec);
    let exit = node.end(&id);
    assert!(exit.oom_kills > 0, "{exit:?}");
    assert!(!exit.is_oom_killed || exit.code == 137, "{exit:?}");
}

#[test]
fn the_total_memory_of_all_containers_is_capped() {
    let node = Node::with_busybox("total");
    node.runtime.set_total_memory_max(Some(24 << 20)).unwrap();
    let id = node.run(&node.spec("big", "tail /dev/zero"));
    assert!(node.end(&id).is_oom_killed);
    node.runtime.set_total_memory_max(None).unwrap();
}

#[test]
fn a_trapped_signal_is_followed_by_a_kill_of_everything() {
    let node = Node::with_busybox("stop");
    let polite =
        node.run(&node.spec("polite", "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.1; done"));
    eventually("up", || node.lines(&polite).contains(&"up".to_owned()));
    let end = node.runtime.stop(&polite, libc::SIGTERM, Duration::from_secs(10)).unwrap();
    assert!(matches!(end, ContainerEnd::Exited(exit) if exit.code == 5), "{end:?}");
    let deaf =
        node.run(&node.spec("deaf", "trap '' TERM; sleep 1000 & echo up; while :; do sleep 0.1; done"));
    eventually("up", || node.lines(&deaf).contains(&"up".to_owned()));
    let begun = Instant::now();
    let end = node.runtime.stop(&deaf, libc::SIGTERM, Duration::from_millis(300)).unwrap();
    assert!(matches!(end, ContainerEnd::Exited(exit) if exit.signal == Some(9)), "{end:?}");
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert!(node.runtime.stats(&deaf).is_none_or(|usage| usage.processes == 0));
    node.runtime.remove(&deaf, KeepLogs::Yes).unwrap();
    assert!(node.lines(&deaf).contains(&"up".to_owned()), "the log outlives its container");
    assert_eq!(node.runtime.list().unwrap().len(), 1);
    assert_eq!(node.runtime.kept_logs().unwrap(), std::slice::from_ref(&deaf));
    node.runtime.sweep().unwrap();
    assert_eq!(node.runtime.kept_logs().unwrap().len(), 1, "a sweep keeps them");
    node.runtime.remove(&deaf, KeepLogs::No).unwrap();
    assert!(node.runtime.kept_logs().unwrap().is_empty());
}

fn shell(script: &str) -> ExecRequest {
    ExecRequest { command: vec!["sh".into(), "-c".into(), script.into()], ..ExecRequest::default() }
}

#[test]
fn a_command_has_the_containers_rights_and_no_more() {
    let node = Node::with_busybox("exec");
    let mut spec = node.spec("exec", "while :; do sleep 1; done");
    spec.env = vec![("COLOUR".into(), "red".into())];
    spec.user = Some("web".into());
    spec.working_dir = Some("/srv/here".into());
    let id = node.run(&spec);
    let run = |script: &str| {
        let check = node.runtime.check(&id, &shell(script), Duration::from_secs(10)).unwrap();
        (check.end, String::from_utf8(check.output).unwrap())
    };
    assert_eq!(
        run("echo $COLOUR; pwd; id -u; id -g; id -G; exit 9"),
        (CheckEnd::Exited(9), "red\n/srv/here\n33\n44\n44 50\n".into())
    );
    let status = run("grep -E 'Seccomp:|NoNewPrivs|CapEff' /proc/self/status | tr -s '\\t ' ' '").1;
    assert!(status.contains("NoNewPrivs: 1") && status.contains("Seccomp: 2"), "{status}");
    assert!(status.contains("CapEff: 0000000000000000"), "an ordinary user has no capability: {status}");
    let root = ExecRequest {
        user: Some("root".into()),
        ..shell("id -u; unshare -m true; mount -t tmpfs x /tmp; mknod /tmp/sda b 8 0")
    };
    let check = node.runtime.check(&id, &root, Duration::from_secs(10)).unwrap();
    let output = String::from_utf8(check.output).unwrap();
    assert!(output.starts_with("0\n"), "{output}");
    assert_eq!(
        output.matches("not permitted").count() + output.matches("ermission denied").count(),
        3,
        "{output}"
    );
}

#[test]
fn a_check_that_hangs_is_killed_with_its_children() {
    let node = Node::with_busybox("check");
    let id = node.run(&node.spec("check", "while :; do sleep 1; done"));
    let begun = Instant::now();
    let check = node.runtime.check(&id, &shell("echo begun; sleep 777"), Duration::from_millis(300)).unwrap();
    assert_eq!((check.end, check.output), (CheckEnd::TimedOut, b"begun\n".to_vec()));
    assert!(begun.elapsed() < Duration::from_secs(5));
    let left = node.runtime.check(&id, &shell("ps"), Duration::from_secs(10)).unwrap();
    assert!(!String::from_utf8(left.output).unwrap().contains("sleep 777"));
    let missing = ExecRequest { command: vec!["/no/such".into()], ..ExecRequest::default() };
    let error = node.runtime.check(&id, &missing, Duration::from_secs(10)).unwrap_err();
    assert!(error.to_string().contains("/no/such"), "{error}");
}

#[test]
fn a_terminal_carries_input_output_and_size() {
    use std::io::{Read, Write};
    let node = Node::with_busybox("tty");
    let id = node.run(&node.spec("tty", "while :; do sleep 1; done"));
    let request = ExecRequest { command: vec!["sh".into()], ..ExecRequest::default() };
    let mut handle =
        node.runtime.exec(&id, &request, ExecStreams::Terminal { rows: 33, columns: 99 }).unwrap();
    let mut terminal = std::fs::File::from(handle.terminal.take().expect("a terminal"));
    terminal.write_all(b"stty size; exit 6\n").unwrap();
    let mut seen = Vec::new();
    // The end of a terminal is EIO.
    let _ = terminal.read_to_end(&mut seen);
    assert!(String::from_utf8_lossy(&seen).contains("33 99"), "{}", String::from_utf8_lossy(&seen));
    assert_eq!(handle.wait(Duration::from_secs(10)).unwrap(), Some(6));
    let mut spec = node.spec("ttymain", "stty size; test -t 0 && test -t 1 && echo interactive");
    spec.has_terminal = true;
    let id = node.run(&spec);
    assert_eq!(node.end(&id).code, 0, "{:?}", node.lines(&id));
    assert!(node.lines(&id).iter().any(|line| line.trim_end() == "interactive"), "{:?}", node.lines(&id));
}

#[test]
fn streams_of_a_command_are_the_callers() {
    use std::io::{Read, Write};
    let node = Node::with_busybox("pipes");
    let id = node.run(&node.spec("pipes", "while :; do sleep 1; done"));
    let (mut from_child, stdout) = std::io::pipe().unwrap();
    let (stdin, mut to_child) = std::io::pipe().unwrap();
    let streams =
        ExecStreams::Given { stdin: Stdio::from(stdin), stdout: Stdio::from(stdout), stderr: Stdio::null() };
    let request = ExecRequest { command: vec!["cat".into()], ..ExecRequest::default() };
    let mut handle = node.runtime.exec(&id, &request, streams).unwrap();
    to_child.write_all(b"through the container").unwrap();
    drop(to_child);
    let mut seen = String::new();
    from_child.read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "through the container");
    assert_eq!(smol::block_on(handle.finished()).unwrap(), 0);
}

#[test]
fn a_container_sees_a_world_of_its_own() {
    let node = Node::with_busybox("world");
    let mut spec = node.spec(
        "world",
        "hostname; echo $HOME $HOSTNAME; cat /etc/hosts; ls /proc | grep -c '^[0-9]'; \
         grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status | tr -s '\\t ' ' '; \
         echo x >/proc/sys/kernel/hostname; cat /proc/kcore | wc -c; mount | grep -c cgroup; \
         cat /proc/self/oom_score_adj; grep -E 'Sig(Ign|Blk)' /proc/self/status | tr -s '\\t ' ' '; stat -c %a /dev/null",
    );
    spec.hostname = "web-host".into();
    node.runtime.create(&spec).unwrap();
    std::fs::write(node.runtime.instance_dir(&spec.id).join("hosts"), "10.0.0.1 friend\n").unwrap();
    node.runtime.start(&spec.id, None).unwrap();
    node.end(&spec.id);
    let lines = node.lines(&spec.id);
    let plain: Vec<&String> = lines.iter().filter(|line| !line.starts_with('!')).collect();
    assert_eq!(&plain[..3], ["web-host", "/root web-host", "10.0.0.1 friend"], "{lines:?}");
    assert!(
        lines.contains(&"NoNewPrivs: 1".to_owned()) && lines.contains(&"Seccomp: 2".to_owned()),
        "{lines:?}"
    );
    assert!(lines.iter().any(|line| line.contains("Read-only file system")), "{lines:?}");
    for name in ["SigIgn: ", "SigBlk: "] {
        let mask = lines.iter().find_map(|line| line.strip_prefix(name)).unwrap();
        // Only the ordinary signals: those above 31 belong to the C library.
        assert_eq!(u64::from_str_radix(mask, 16).unwrap() & 0x7fff_ffff, 0, "{lines:?}");
    }
    assert!(lines.contains(&"CapEff: 00000000a00425fb".to_owned()), "Docker's set without MKNOD: {lines:?}");
}

#[test]
fn a_named_volume_is_seeded_once_and_kept() {
    let node = Node::with_busybox("volume");
    let volume = node.folder().join("volume");
    std::fs::create_dir(&volume).unwrap();
    let bind = Bind {
        source: volume.clone(),
        destination: "/data".into(),
        access: Access::ReadWrite,
        seed: Seed::FromImageOnce,
    };
    for (id, script) in
        [("one", "cat /data/seed.txt; echo; echo new >/data/seed.txt"), ("two", "cat /data/seed.txt")]
    {
        let mut spec = node.spec(id, script);
        spec.binds = vec![bind.clone()];
        let id = node.run(&spec);
        assert_eq!(node.end(&id).code, 0);
        let expected = if id.as_str() == "one" { "from the image" } else { "new" };
        assert_eq!(node.lines(&id)[0], expected);
        node.runtime.remove(&id, KeepLogs::No).unwrap();
    }
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(volume.join("seed.txt")).unwrap().permissions().mode() & 0o777, 0o640);
}

#[test]
fn what_cannot_start_says_why_and_leaves_nothing() {
    let node = Node::with_busybox("fail");
    let mut spec = node.spec("fail", "");
    spec.command = Some(vec!["/no/such/program".into()]);
    node.runtime.create(&spec).unwrap();
    let error = node.runtime.start(&spec.id, None).unwrap_err().to_string();
    assert!(error.contains("/no/such/program"), "{error}");
    assert_eq!(node.runtime.state(&spec.id), ContainerState::Created);
    spec.id = ContainerId::parse("nouser").unwrap();
    spec.user = Some("nobody-here".into());
    let error = node.runtime.create(&spec).unwrap_err();
    assert!(format!("{error:?}").contains("nobody-here"));
    assert!(!node.runtime.instance_dir(&spec.id).exists());
}

#[test]
fn a_sweep_takes_orphans_and_nothing_else() {
    let node = Node::with_busybox("sweep");
    let kept = node.run(&node.spec("kept", "while :; do sleep 1; done"));
    let orphan = node.run(&node.spec("orphan", "while :; do sleep 1; done"));
    let ContainerState::Running { main, .. } = node.runtime.state(&orphan) else { panic!("not running") };
    std::fs::remove_file(node.runtime.instance_dir(&orphan).join("container.json")).unwrap();
    let swept = node.runtime.sweep().unwrap();
    assert_eq!(swept.cgroups, [format!("tinydc-{}/orphan", node.config.node_tag)]);
    eventually("the orphan is gone", || !main.is_alive());
    assert!(matches!(node.runtime.state(&kept), ContainerState::Running { .. }));
    // A power cut may leave a description cut short: it makes no container and blocks nothing.
    let cut = node.runtime.instance_dir(&ContainerId::parse("cut").unwrap());
    std::fs::create_dir(&cut).unwrap();
    std::fs::write(cut.join("container.json"), "{\"id\":").unwrap();
    assert_eq!(node.runtime.list().unwrap().len(), 1);
    node.runtime.collect_garbage(Default::default).unwrap();
    node.runtime.sweep().unwrap();
    assert!(!cut.exists());
    assert_eq!(node.runtime.sweep().unwrap(), Default::default(), "a second sweep finds nothing");
}

#[test]
fn a_container_joins_the_network_namespace_it_is_given() {
    let node = Node::with_busybox("netns");
    let path = node.folder().join("netns");
    tinydc::linux::netns::create(&path).unwrap();
    // A socket bound there is seen by the container, and by nobody here.
    let held = tinydc::linux::netns::in_netns(&path, || {
        use std::os::linux::net::SocketAddrExt;
        let name = std::os::unix::net::SocketAddr::from_abstract_name("tinydc-netns-test")?;
        std::os::unix::net::UnixListener::bind_addr(&name)
    });
    let _held = held.unwrap();
    assert!(!std::fs::read_to_string("/proc/net/unix").unwrap().contains("tinydc-netns-test"));
    let script =
        "grep -c tinydc-netns-test /proc/net/unix; cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
    let mut spec = node.spec("netns", script);
    spec.netns = Some(path.clone());
    let id = node.run(&spec);
    assert_eq!((node.end(&id).code, node.lines(&id)), (0, vec!["1".to_owned(), "0".to_owned()]));
    tinydc::linux::netns::remove(&path).unwrap();
    assert!(!path.exists());
}

#[test]
fn binds_and_tmpfs_are_what_the_spec_says() {
    let node = Node::with_busybox("binds");
    let shared = node.folder().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("file"), "content").unwrap();
    let script = "cat /ro/file; echo; (echo x >/ro/new); (echo y >/rw/new); \
                  (echo z >/scratch/new) && cat /scratch/new; (echo q >/etc/q)";
    let mut spec = node.spec("binds", script);
    spec.is_rootfs_read_only = true;
    let bind = |destination: &str, access| Bind {
        source: shared.clone(),
        destination: destination.into(),
        access,
        seed: Seed::Never,
    };
    spec.binds = vec![bind("/ro", Access::ReadOnly), bind("/rw", Access::ReadWrite)];
    spec.tmpfs = vec![Tmpfs { destination: "/scratch".into(), size_bytes_max: Some(1 << 20) }];
    let id = node.run(&spec);
    node.end(&id);
    let lines = node.lines(&id);
    assert!(lines.contains(&"content".to_owned()) && lines.contains(&"z".to_owned()), "{lines:?}");
    assert_eq!(lines.iter().filter(|line| line.contains("Read-only file system")).count(), 2, "{lines:?}");
    assert_eq!(std::fs::read_to_string(shared.join("new")).unwrap(), "y\n");
}

#[test]
fn limits_hold_and_use_is_measured() {
    let node = Node::with_busybox("limits");
    let script = "dd if=/dev/zero of=/dev/shm/x bs=1M count=8 2>/dev/null; while :; do :; done";
    let mut spec = node.spec("limits", script);
    (spec.cpu_millis_max, spec.pids_max, spec.memory_bytes_max) = (Some(200), Some(20), Some(64 << 20));
    let id = node.run(&spec);
    let used = || node.runtime.stats(&id).expect("it runs");
    eventually("8 MiB are in use", || used().memory_bytes > 8 << 20);
    let (before, begun) = (used().cpu_usec, Instant::now());
    eventually("0.4 s of processor time", || used().cpu_usec - before > 400_000);
    assert!(
        begun.elapsed() > Duration::from_millis(1500),
        "a fifth of a processor, not {:?}",
        begun.elapsed()
    );
    let forks = shell("for i in $(seq 1 40); do sleep 5 & done; wait");
    let check = node.runtime.check(&id, &forks, Duration::from_secs(20)).unwrap();
    assert!(String::from_utf8(check.output).unwrap().contains("fork"), "the 21st process is refused");
}

#[test]
fn an_image_of_127_layers_runs() {
    let node = Node::new("layers127");
    let mut layers = vec![busybox_layer()];
    for number in 1..127 {
        let mut tar = tar::Builder::new(Vec::new());
        add_file(&mut tar, "number", number.to_string().as_bytes(), 0o644);
        layers.push(tar.into_inner().unwrap());
    }
    let config = serde_json::json!({ "Cmd": ["sh", "-c", "cat /number; echo"] });
    let loaded = node.load(&docker_archive("deep:1", &layers, config)).unwrap();
    let image = node.runtime.images().image(&loaded[0].digest).unwrap().unwrap();
    let config = node.runtime.images().config(&image).unwrap().config;
    let id = node.run(&ContainerSpec::new(ContainerId::parse("deep").unwrap(), config, image.layers));
    assert_eq!((node.end(&id).code, node.lines(&id)), (0, vec!["126".to_owned()]));
}

#[test]
fn a_container_ends_when_its_lease_does() {
    let node = Node::with_busybox("lease");
    let in_ms = |ms| LeaseEnd(tinydc::linux::clock::boot_ms() + ms);
    let begin = Instant::now();
    let ids: Vec<ContainerId> = ["left", "renewed", "free"]
        .into_iter()
        .map(|name| {
            let spec = node.spec(name, "trap '' TERM; while :; do sleep 1; done");
            node.runtime.create(&spec).unwrap();
            node.runtime.start(&spec.id, (name != "free").then(|| in_ms(1_500))).unwrap();
            spec.id
        })
        .collect();
    node.runtime.renew_lease(&ids[1], in_ms(60_000)).unwrap();
    assert!(node.runtime.renew_lease(&ids[2], in_ms(1)).is_err(), "a container without a lease got one");
    let exit = node.end(&ids[0]);
    let took = begin.elapsed();
    assert_eq!(exit.signal, Some(9));
    assert!((Duration::from_millis(1_400)..Duration::from_secs(8)).contains(&took), "{took:?}");
    assert!(node.lines(&ids[0]).iter().any(|line| line.starts_with("#ended: exclusive")));
    for id in &ids[1..] {
        assert!(matches!(node.runtime.state(id), ContainerState::Running { .. }), "{id}");
    }
    node.runtime.renew_lease(&ids[1], in_ms(0)).unwrap();
    assert_eq!(node.end(&ids[1]).signal, Some(9));
    // What can't be started in time is not started.
    let late = node.runtime.start(&ids[0], Some(in_ms(0))).unwrap_err().to_string();
    assert!(late.contains("lease ended"), "{late}");
}

#[test]
fn an_init_reaps_passes_signals_on_and_ends_as_its_program_does() {
    let node = Node::with_busybox("init");
    // A program that never waits for the children that fall to the first process.
    let orphans = "for n in 1 2 3 4 5; do (sleep 0.1 & ) ; done; sleep 1; ";
    let zombies = "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l";
    let end = |name: &str, has_init, script: String| {
        let mut spec = node.spec(name, &script);
        spec.has_init = has_init;
        node.run(&spec);
        let exit = node.end(&spec.id);
        (exit, node.lines(&spec.id))
    };
    let (exit, lines) = end("tidy", true, format!("{orphans} {zombies}; cat /proc/1/comm; exit 7"));
    assert_eq!(exit.code, 7, "{lines:?}");
    assert_eq!(lines[0], "0", "zombies are left: {lines:?}");
    let (exit, lines) = end("killed", true, "kill -9 $$".into());
    assert_eq!(exit.code, 137, "{lines:?}");
    let (exit, lines) = end("missing", true, "exec /bin/nothing".into());
    assert_eq!(exit.code, 127, "{lines:?}");

    let mut spec =
        node.spec("asked", "trap 'echo asked; exit 5' TERM; echo up; while :; do sleep 0.05; done");
    spec.has_init = true;
    let id = node.run(&spec);
    // The program is not the first process, and what the first one is cannot be looked at from inside.
    let looked = "test $(cat /proc/1/comm) = tinydc-init && test $(ls /proc/1/fd | wc -l) = 3 && \
                  ! cat /proc/1/exe >/dev/null 2>&1";
    let check = node.runtime.check(&id, &shell(looked), Duration::from_secs(10)).unwrap();
    assert_eq!(check.end, CheckEnd::Exited(0), "{}", String::from_utf8_lossy(&check.output));
    let end = node.runtime.stop(&id, libc::SIGTERM, Duration::from_secs(10)).unwrap();
    assert!(matches!(end, ContainerEnd::Exited(exit) if exit.code == 5), "{end:?}");
    assert_eq!(node.lines(&id), ["up", "asked"]);
}

#[test]
fn without_an_init_orphans_stay_zombies() {
    let node = Node::with_busybox("noinit");
    // What the test above relies on: the kernel gives orphans to the first process, and this one reaps none.
    let script = "for n in 1 2 3; do (sleep 0.1 & ) ; done; exec sleep 100";
    let id = node.run(&node.spec("zombies", script));
    let zombies = "sleep 0.5; test $(grep -l '^State:.Z' /proc/[0-9]*/status | wc -l) = 3";
    let check = node.runtime.check(&id, &shell(zombies), Duration::from_secs(10)).unwrap();
    assert_eq!(check.end, CheckEnd::Exited(0), "{check:?}");
}
