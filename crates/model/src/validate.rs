//! Validation of internal records (datastore.md section 5).
