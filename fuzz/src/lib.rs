//! What fuzz targets share.

use std::collections::HashSet;

use stoa_shm::directory::DirectoryBuilder;
use stoa_shm::{ChunkLocation, Directory, HoldingWorker, SegmentId};
use twox_hash::XxHash3_64;

/// Turns what the fuzzer says into a stream of frames: most of them with a right check, because a
/// fuzzer does not guess hashes, and with as long a body as there are bytes for.
pub fn frames(mut data: &[u8]) -> Vec<u8> {
    let mut stream = Vec::new();
    while let Some((shape, rest)) = data.split_first() {
        let Some((header, rest)) = rest.split_at_checked(24) else {
            stream.extend_from_slice(rest);
            break;
        };
        let mut frame = [0; 40];
        frame[..16].copy_from_slice(&header[..16]);
        // Small bodies, mostly: the rest of the length only sometimes.
        frame[16..18].copy_from_slice(&header[16..18]);
        if shape & 0x40 != 0 {
            frame[18..24].copy_from_slice(&header[18..24]);
        }
        // Requests with small numbers, mostly: others were never asked.
        if shape & 0x20 == 0 {
            frame[8] &= 7;
            frame[9..16].fill(0);
        }
        frame[24..32].copy_from_slice(&stoa_transfer::conformance::INCARNATION.to_le_bytes());
        let check = XxHash3_64::oneshot(&frame[..32]) ^ u64::from(shape & 0x80 != 0);
        frame[32..].copy_from_slice(&check.to_le_bytes());
        stream.extend_from_slice(&frame);
        let wanted = usize::from(u16::from_le_bytes([frame[16], frame[17]]));
        let (body, rest) = rest.split_at(wanted.min(rest.len()));
        stream.extend_from_slice(body);
        data = rest;
    }
    stream
}

/// What the fuzzer says, taken off from the front; zeros when it has said all.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// Begins with these bytes.
    pub fn new(bytes: &'a [u8]) -> Input<'a> {
        Input(bytes)
    }

    /// Whether it has said all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((byte, rest)) => {
                self.0 = rest;
                *byte
            }
            None => 0,
        }
    }

    /// The next eight bytes.
    pub fn number(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// Where a chunk lies, mostly where one can.
    pub fn location(&mut self) -> ChunkLocation {
        ChunkLocation {
            segment: SegmentId(u64::from(self.byte())),
            offset: 128 + 64 * u64::from(self.byte()),
            length: u64::from(self.byte()),
            form: self.byte() % 4,
            checksum: u64::from(self.byte()),
            rows: u32::from(self.byte()),
        }
    }

    /// Changes some of `bytes`; whether any is another now.
    pub fn change(&mut self, bytes: &mut [u8]) -> bool {
        let mut changed = false;
        for _ in 0..self.byte() % 8 {
            let at = usize::from(u16::from_le_bytes([self.byte(), self.byte()]));
            let mask = self.byte();
            if !bytes.is_empty() {
                bytes[at % bytes.len()] ^= mask;
                changed |= mask != 0;
            }
        }
        changed
    }
}

/// A chunk in a directory: file, row group, column, the worker's id, and where it has it.
pub type HeldChunk = (Vec<u8>, u32, u32, String, ChunkLocation);

/// The bytes of a well-formed directory, and what is in it.
pub fn directory(input: &mut Input<'_>) -> (Vec<u8>, Vec<HeldChunk>) {
    let mut builder = DirectoryBuilder::new();
    let workers = 1 + u32::from(input.byte() % 4);
    for worker in 0..workers {
        builder.worker(HoldingWorker {
            id: format!("worker-{worker}"),
            incarnation: u64::from(input.byte()),
            addresses: vec![format!("10.0.0.{worker}:1"); usize::from(input.byte() % 3)],
        });
    }
    let mut held = Vec::new();
    let mut seen = HashSet::new();
    for _ in 0..input.byte() % 40 {
        let worker = u32::from(input.byte()) % workers;
        let file = vec![b'f', input.byte() % 5];
        let (row_group, column) = (u32::from(input.byte() % 8), u32::from(input.byte() % 8));
        let location = input.location();
        if seen.insert((worker, file.clone(), row_group, column)) {
            builder.chunk(worker, &file, row_group, column, location);
            let id = format!("worker-{worker}");
            held.push((file, row_group, column, id, location));
        }
    }
    let bytes = builder.build(1 + u64::from(input.byte()));
    (bytes.expect("a directory of few chunks"), held)
}

/// Reads everything that is in a directory.
pub fn walk(directory: &Directory) {
    for worker in directory.workers() {
        assert!(worker.id.len() + worker.addresses.len() < 1 << 20);
    }
    let mut chunks = 0;
    for (file, row_group, column, holders) in directory.chunks() {
        chunks += 1;
        for holder in &holders {
            let at = holder.location;
            assert!(at.offset.checked_add(at.length).is_some());
        }
        // What is found by its name is what is found in passing, or nothing: the slot of the same
        // name that a lookup meets first may be another.
        let _ = directory.lookup(file, row_group, column).count();
    }
    let _ = (chunks, directory.chunk_count(), directory.revision(), format!("{directory:?}"));
}

fn read<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let mut number = [0; 8];
    number[..N].copy_from_slice(bytes.get(at..at.checked_add(N)?)?);
    Some(u64::from_le_bytes(number))
}

/// Makes the checks of a directory right for whatever its fields are, as far as they lie in it. The
/// offsets are those of `docs/format.md`.
pub fn reseal(bytes: &mut [u8]) {
    const HEADER: usize = 192;
    if bytes.len() < HEADER {
        return;
    }
    let total = bytes.len() as u64;
    bytes[24..32].copy_from_slice(&total.to_le_bytes());
    seal(bytes, 0, HEADER, 0);
    let offset = |bytes: &[u8], at: usize| read::<8>(bytes, at).unwrap_or(0) as usize;
    let count = |bytes: &[u8], at: usize| read::<4>(bytes, at).unwrap_or(0) as usize;
    let row = |from: usize, at: usize, row_bytes: usize| {
        let start = from.checked_add(at.checked_mul(row_bytes)?)?;
        Some((start, start.checked_add(row_bytes)?))
    };
    let (files, file_slots) = (offset(bytes, 32), count(bytes, 40));
    let (chunks, chunk_slots) = (offset(bytes, 48), count(bytes, 56));
    let (holders, holder_rows) = (offset(bytes, 64), count(bytes, 72));
    let (workers, worker_rows) = (offset(bytes, 80), count(bytes, 88));
    let inside = |place: Option<(usize, usize)>| {
        place.filter(|(_, end)| *end as u64 <= total).map(|(start, _)| start)
    };
    for at in 0..file_slots {
        let Some(start) = inside(row(files, at, 32)) else {
            break;
        };
        seal(bytes, start, 32, 0);
    }
    for at in 0..chunk_slots {
        let Some(start) = inside(row(chunks, at, 32)) else {
            break;
        };
        let file = count(bytes, start);
        let key_hash = inside(row(files, file, 32)).and_then(|file| read::<8>(bytes, file + 8));
        let key_hash = key_hash.unwrap_or(0);
        seal(bytes, start, 32, key_hash);
        let (row_group, column) = (count(bytes, start + 4), count(bytes, start + 8));
        let first = count(bytes, start + 12);
        let many = read::<2>(bytes, start + 16).unwrap_or(0) as usize;
        let seed = chunk_hash(key_hash, row_group as u64, column as u64);
        for holder in first..first.saturating_add(many).min(holder_rows) {
            let Some(start) = inside(row(holders, holder, 64)) else {
                break;
            };
            seal(bytes, start, 64, seed);
        }
    }
    for at in 0..worker_rows {
        let Some(start) = inside(row(workers, at, 64)) else {
            break;
        };
        let (id, length) = (offset(bytes, start), count(bytes, start + 8));
        let id = id.checked_add(length).and_then(|end| bytes.get(id..end));
        let seed = id.map_or(0, XxHash3_64::oneshot);
        seal(bytes, start, 64, seed);
    }
}

/// Writes the check of a structure into its last eight bytes.
fn seal(bytes: &mut [u8], start: usize, length: usize, seed: u64) {
    let at = start + length - 8;
    let check = XxHash3_64::oneshot_with_seed(seed, &bytes[start..at]);
    bytes[at..at + 8].copy_from_slice(&check.to_le_bytes());
}

/// The hash of a chunk's name, as `docs/format.md` describes it.
fn chunk_hash(file_key_hash: u64, row_group: u64, column: u64) -> u64 {
    let place = row_group << 32 | column;
    let product = u128::from(file_key_hash ^ 0x9e37_79b9_7f4a_7c15)
        * u128::from(place ^ 0xd1b5_4a32_d192_ed03);
    product as u64 ^ (product >> 64) as u64
}
