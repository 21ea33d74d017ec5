//! The `stoa` binary; everything is in the library.

use std::process::ExitCode;

/// What datafusion-cli uses too: queries allocate much and briefly.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    stoa_cli::main()
}
