//! Addresses change; nobody types anything.

use super::Scenario;
use super::stage::{Stage, until, web};
use anyhow::Result;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "renumber",
    proves: "one node gets another address; then all three wake up in another subnet: cluster and apps are back",
    machines: 3,
    run: renumber,
}];

fn renumber(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    stage.deploy(0, "shop", &web(8080, 3, "a"))?;
    stage.wait_up(0, "shop", 3, Duration::from_secs(10))?;
    // A leased address that changes under a running daemon.
    move_to(stage, 2, Ipv4Addr::new(10, 99, 0, 77))?;
    let begin = Instant::now();
    until("it is heard at its new address", Duration::from_secs(30), || {
        let node = stage.lab.nodes[0].get("/v1/nodes/pi3")?;
        Ok(node["address"] == "10.99.0.77" && node["state"] == "up" && stage.label(2, "pi3", "moved").is_ok())
    })?;
    stage.note("one node renumbered → heard again", begin);
    served(stage)?;
    for node in &mut stage.lab.nodes {
        node.stop()?;
    }
    stage.lab.lan.add_own_address(Ipv4Addr::new(10, 98, 0, 254))?;
    for index in 0..3 {
        move_to(stage, index, Ipv4Addr::new(10, 98, 0, index as u8 + 1))?;
    }
    let begin = Instant::now();
    for node in &mut stage.lab.nodes {
        node.start()?;
    }
    until("a write is accepted", Duration::from_secs(60), || Ok(stage.label(1, "pi1", "site").is_ok()))?;
    stage.note("all renumbered and started → next write", begin);
    stage.wait_up(0, "shop", 3, Duration::from_secs(20))?;
    served(stage)?;
    stage.note("all serve at their new addresses", begin);
    stage.agree()
}

/// Every node that runs an instance serves at the address it has now.
fn served(stage: &Stage) -> Result<()> {
    until("all nodes with an instance serve", Duration::from_secs(20), || {
        let rows = stage.rows(0, "shop")?;
        let up: Vec<_> = rows.iter().filter(|row| row.is_up()).collect();
        for row in &up {
            stage.http(stage.lab.node(&row.node)?.address, 8080)?;
        }
        Ok(up.len() == 3)
    })
}

fn move_to(stage: &mut Stage, index: usize, new: Ipv4Addr) -> Result<()> {
    let node = &mut stage.lab.nodes[index];
    stage.lab.lan.renumber(&node.netns, node.address, new)?;
    node.address = new;
    Ok(())
}
