//! Holds the benches of what needs no engine: `cargo bench -p stoa-micro`.

#![forbid(unsafe_code)]
