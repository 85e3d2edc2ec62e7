//! etcd in, typed updates out.
