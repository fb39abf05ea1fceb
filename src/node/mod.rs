//! Builds everything in order and stops it in reverse.

use std::path::PathBuf;

#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// `None`: `/etc/tinydc.toml`, if it exists.
    pub config: Option<PathBuf>,
    pub data_dir: Option<PathBuf>,
}

/// Runs the daemon until it is told to stop.
pub fn run(_options: RunOptions) -> anyhow::Result<()> {
    anyhow::bail!("the daemon is not built yet")
}
