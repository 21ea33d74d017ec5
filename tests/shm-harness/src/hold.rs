//! A reader that holds what it read once, until its standard input ends.

use std::path::Path;

use nix::unistd::{ForkResult, fork};
use stoa_shm::{CacheReader, ChunkBytes, ChunkKey};

use crate::content::wrong_bytes;

/// Opens every chunk, prints `holding N`, waits for the end of standard input, and prints
/// `intact N` if no byte has changed. With `forked`, a child does the holding and the process that
/// opened the chunks has exited before.
#[allow(unsafe_code)]
pub fn run(dir: &Path, forked: bool) -> bool {
    let held: Vec<(ChunkKey, ChunkBytes)> = {
        let snapshot = CacheReader::open(dir).snapshot();
        let open = |(file, entry): (&[u8], stoa_shm::Entry)| {
            let key = ChunkKey {
                file: file.into(),
                row_group: entry.row_group(),
                column: entry.column(),
            };
            Some((key, snapshot.open_chunk(&entry).ok()?))
        };
        snapshot.iter().filter_map(open).collect()
        // Only the chunks' own handles are left.
    };
    if forked {
        let opener = nix::unistd::getpid();
        // SAFETY: this process has one thread, so the child may do whatever this process may.
        match unsafe { fork() } {
            Ok(ForkResult::Parent { .. }) => return true,
            Ok(ForkResult::Child) => {}
            Err(_) => return false,
        }
        while nix::unistd::getppid() == opener {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    println!("holding {}", held.len());
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    let intact = held
        .iter()
        .filter(|(key, bytes)| wrong_bytes(key, bytes) == 0)
        .count();
    println!("intact {intact}");
    intact == held.len()
}
