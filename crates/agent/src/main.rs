//! The per-host agent.
fn main(){}
