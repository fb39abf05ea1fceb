//! A board's network: no DHCP server, an address that changes, a cable that is pulled, a static address, a clock of 1970.

use crate::Case;
use crate::cluster::{form, nodes_up};
use crate::field::{Field, until};
use crate::guest::{START_LIMIT, Setup};
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[
    Case {
        name: "no-dhcp",
        proves: "a board without a DHCP server comes up, says so, and takes an address when one appears",
        run: no_dhcp,
    },
    Case {
        name: "readdressed",
        proves: "a router hands out other addresses while a cluster of two runs: the boards find each other again",
        run: readdressed,
    },
    Case {
        name: "static-1970",
        proves: "a board with a static address and a clock of 1970 starts at a time that has been, and founds a cluster",
        run: static_1970,
    },
];

fn no_dhcp(field: &mut Field) -> Result<()> {
    let index = field.add(Setup::new("name = \"pi1\"\nbootstrap = true\n"))?;
    field.start(index)?;
    field.guests[index].wait_ready()?;
    field.guests[index].wait_member("pi1")?;
    let screen = field.guests[index].type_line("pi1", "")?;
    ensure!(
        screen.contains("no address yet") && screen.contains("home"),
        "a cluster of one without a network: {screen}"
    );
    let begin = Instant::now();
    field.serve_dhcp(10, 3600)?;
    field.guests[index].wait_for("eth0: address 10.97.0.11/24", Duration::from_secs(45))?;
    field.note("a server appears: an address", begin);
    field.set_cable(index, false)?;
    field.guests[index].wait_for("eth0: gives up 10.97.0.11", Duration::from_secs(20))?;
    let begin = Instant::now();
    field.set_cable(index, true)?;
    field.guests[index].wait_for("eth0: address 10.97.0.11/24", Duration::from_secs(20))?;
    field.note("a cable plugged in again: an address", begin);
    Ok(())
}

fn readdressed(field: &mut Field) -> Result<()> {
    form(field, 2)?;
    // Short leases under the old addresses first, so that the change is noticed soon.
    field.serve_dhcp(10, 120)?;
    for index in 0..2 {
        field.set_cable(index, false)?;
        field.guests[index].wait_for("gives up", Duration::from_secs(20))?;
        field.set_cable(index, true)?;
        field.guests[index].wait_for("eth0: address", Duration::from_secs(20))?;
    }
    field.serve_dhcp(100, 120)?;
    let begin = Instant::now();
    for index in 0..2 {
        let line = format!("eth0: address 10.97.0.{}/24", 101 + index);
        field.guests[index].wait_for(&line, Duration::from_secs(150))?;
    }
    field.note("both have their new addresses", begin);
    until("the boards find each other again", Duration::from_secs(60), || {
        let said = field.guests[0].type_line("pi1", "node ls")?;
        Ok(said.matches(" up ").count() == 2)
    })?;
    field.note("a cluster again", begin);
    Ok(())
}

fn static_1970(field: &mut Field) -> Result<()> {
    let settings =
        "name = \"pi1\"\nbootstrap = true\naddress = \"10.97.0.77/24\"\ngateway = \"10.97.0.254\"\n";
    let index = field.add(Setup::new(settings))?;
    field.guests[index].set_machine_words(&["-rtc", "base=1970-01-01"]);
    field.start(index)?;
    let guest = &mut field.guests[index];
    let clock = guest.wait_said(" clock ", START_LIMIT)?;
    ensure!(clock.contains("lifted"), "{clock}");
    guest.wait_said("eth0: address 10.97.0.77/24", Duration::from_secs(20))?;
    guest.wait_ready()?;
    let version = guest.type_line("pi1", "status")?;
    ensure!(version.contains("pi1"), "{version}");
    field.remark(clock);
    crate::cluster::give_laptop_a_context(field, index, "pi1")?;
    ensure!(nodes_up(field)? == 1, "a laptop with the right time is served by a board with a wrong one");
    Ok(())
}
