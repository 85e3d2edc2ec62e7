//! Kernel settings.
