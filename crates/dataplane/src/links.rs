//! Link monitor.
