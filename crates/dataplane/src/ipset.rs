//! IP sets.
