//! Repository chores: architecture checks.
