//! Configuration parameters and how layers of them resolve.
