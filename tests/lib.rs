//! What tests of several crates together share.

#![allow(clippy::unwrap_used, reason = "a test helper that meets something unexpected fails its test")]

pub mod rule_text;
