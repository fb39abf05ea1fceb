//! Says what on this machine, or on its LAN, is in the way of the cluster's network, when it comes.
//!
//! Input: the kernel's rules, routes and addresses, at the start and every minute. Output: a warning for each obstacle that
//! was not there before, with what helps. `tinydc net` looks anew whenever it is asked.

use crate::network::foreign::{Obstacle, obstacles};
use crate::replica::Handle;
use std::time::Duration;
use tracing::{info, warn};

const LOOK_EVERY: Duration = Duration::from_secs(60);

pub async fn watch(replica: Handle) {
    let mut known: Vec<Obstacle> = Vec::new();
    loop {
        let state = replica.state();
        let ranges = state.cluster().map(|cluster| (cluster.container_range, cluster.vip_range));
        let look = move || {
            ranges
                .map(|(containers, vips)| obstacles(containers, vips, state.ula_prefix()))
                .unwrap_or_default()
        };
        let found = crate::tasks::unblock(look).await;
        for new in found.iter().filter(|one| !known.contains(one)) {
            warn!(remedy = new.remedy, "in the way of the cluster's network: {}", new.text);
        }
        if found.is_empty() && !known.is_empty() {
            info!("nothing is in the way of the cluster's network any more");
        }
        known = found;
        async_io::Timer::after(LOOK_EVERY).await;
    }
}
