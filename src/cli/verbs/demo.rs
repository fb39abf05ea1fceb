//! `demo`: shows what tinydc is, on one machine.

use argh::FromArgs;

use super::super::demo::{self, DemoOptions};
use super::super::failure::Failure;

/// Make a cluster out of this machine, deploy an app, kill its busiest node and watch it heal. Takes root.
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "demo",
    help_triggers("-h", "--help"),
    example = "sudo tinydc demo --nodes 5 --exit"
)]
pub struct Demo {
    /// how many machines to make: 3 (the default) to 9
    #[argh(option, default = "3")]
    nodes: u8,
    /// kill nothing
    #[argh(switch)]
    no_chaos: bool,
    /// end when it has been shown, instead of staying up until Ctrl-C
    #[argh(switch)]
    exit: bool,
}

impl Demo {
    pub fn run(&self) -> anyhow::Result<()> {
        let options = DemoOptions { nodes: self.nodes, has_chaos: !self.no_chaos, exits: self.exit };
        match demo::run(&options)? {
            true => Ok(()),
            false => Err(Failure::refused("the demo did not show what it promises").into()),
        }
    }
}
