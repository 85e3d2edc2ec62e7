//! Log format, metric types, HTTP endpoints.
