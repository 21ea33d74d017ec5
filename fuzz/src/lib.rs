//! What fuzz targets share.

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
