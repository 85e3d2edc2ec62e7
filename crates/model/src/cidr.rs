//! CIDR-or-IP text as Calico writes and reads it (datastore.md J-5, J-6).
