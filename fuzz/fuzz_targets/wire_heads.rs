//! Hello, request and response heads, rows, and texts: any bytes are understood or refused, and
//! what is understood is what was written.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stoa_transfer::wire::{
    self, FrameHeader, FrameLimits, Hello, ReadRow, RequestHead, ResponseHead,
};
use twox_hash::XxHash3_64;

fn seal(bytes: &mut [u8]) {
    let at = bytes.len() - 8;
    let check = XxHash3_64::oneshot(&bytes[..at]);
    bytes[at..].copy_from_slice(&check.to_le_bytes());
}

fuzz_target!(|data: &[u8]| {
    if let Some(bytes) = data.first_chunk::<{ Hello::BYTES }>() {
        let mut bytes = *bytes;
        let _ = Hello::parse(&bytes);
        bytes[..12].copy_from_slice(&Hello::new(0, 0).to_bytes()[..12]);
        seal(&mut bytes);
        let hello = Hello::parse(&bytes).expect("the magic, version and check are right");
        assert_eq!(hello.to_bytes(), bytes);
    }
    let limits = FrameLimits::default();
    if let Some(bytes) = data.first_chunk::<{ FrameHeader::BYTES }>() {
        let mut bytes = *bytes;
        seal(&mut bytes);
        if let Ok(RequestHead::Reads { first, rows, .. }) = RequestHead::parse(&bytes, limits) {
            assert!((1..=wire::READS_PER_FRAME_MAX).contains(&rows));
            assert!(first.checked_add(u64::from(rows)).is_some());
        }
        if let Ok(RequestHead::Call { body_bytes, .. }) = RequestHead::parse(&bytes, limits) {
            assert!(body_bytes <= wire::CALL_BYTES_MAX);
        }
        if let Ok(head) = ResponseHead::parse(&bytes, limits) {
            assert!(head.body_bytes() <= wire::READ_BYTES_MAX);
        }
    }
    match wire::parse_rows(data) {
        Ok(rows) => {
            let rows: Vec<ReadRow> = rows.collect();
            assert_eq!(rows.len() * ReadRow::BYTES, data.len());
            if (1..=wire::READS_PER_FRAME_MAX as usize).contains(&rows.len()) {
                let frame = wire::reads_frame(0, 0, &rows);
                assert_eq!(&frame[FrameHeader::BYTES..], data);
            }
        }
        Err(_) => assert!(!data.len().is_multiple_of(ReadRow::BYTES)),
    }
    assert!(!wire::message(data).contains(char::is_control));
});
