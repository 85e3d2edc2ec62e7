//! From stored resources to internal records (datastore.md sections 3, 4).
