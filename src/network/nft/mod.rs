//! nftables by nfnetlink: messages and expressions, and the one table `tinydc` made of them.

mod message;
pub mod table;

pub use message::Family;
pub use table::{Neighbours, Shape, Table};
