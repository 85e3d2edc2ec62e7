//! Exactly what is stored in etcd (datastore.md sections 2, 3).
