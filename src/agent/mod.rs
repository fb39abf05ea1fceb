//! Observe, reconcile, execute on one node.
