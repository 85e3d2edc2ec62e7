//! Builders, fakes, namespaces and servers for tests.
