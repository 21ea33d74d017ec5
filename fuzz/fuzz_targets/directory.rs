//! The directory of what workers hold, as it lies in shared memory and comes from peers: bytes from
//! nothing, and a well-formed one with some bytes changed and its checks made right again, because
//! a fuzzer does not guess hashes. Whatever it is, it is refused or read to its end.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stoa_fuzz::{Input, directory, reseal, walk};
use stoa_shm::Directory;

fuzz_target!(|data: &[u8]| {
    let Some((choice, rest)) = data.split_first() else {
        return;
    };
    if choice % 8 == 0 {
        let mut bytes = rest.to_vec();
        reseal(&mut bytes);
        if let Ok(found) = Directory::parse(bytes) {
            walk(&found);
        }
        return;
    }
    let mut input = Input::new(rest);
    let (mut bytes, held) = directory(&mut input);
    let changed = input.change(&mut bytes);
    if choice % 2 == 0 {
        reseal(&mut bytes);
    }
    let Ok(found) = Directory::parse(bytes) else {
        assert!(changed);
        return;
    };
    walk(&found);
    for (file, row_group, column, worker, location) in &held {
        let mut holders = found.lookup(file, *row_group, *column);
        let is_it = holders.any(|holder| {
            holder.worker.id == worker.as_str() && holder.location == *location
        });
        assert!(is_it || changed);
    }
    assert_eq!(found.lookup(b"nobody has it", 0, 0).count(), 0);
});
