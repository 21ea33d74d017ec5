//! The two calls by which workers say what they hold: any bytes are understood or refused, what is
//! understood is what was written, and whoever fetches page by page from somebody who answers
//! anything ends with a directory or an error, never with more memory than was announced.

#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use stoa_fuzz::{Input, directory, walk};
use stoa_shm::ChunkKey;
use stoa_shm::holdings::{
    Fetched, HoldingsFetch, HoldingsReply, HoldingsRequest, LOCATE_CHUNKS_MAX, LocateReply,
    LocateRequest, Scope, Standing,
};

/// Any bytes, with and without the format that all messages begin with.
fn parse_anything(data: &[u8]) {
    let formatted: Vec<u8> = [&1u16.to_le_bytes()[..], data].concat();
    for bytes in [data, &formatted] {
        if let Ok(request) = HoldingsRequest::parse(bytes) {
            assert_eq!(HoldingsRequest::parse(&request.to_bytes()), Ok(request));
        }
        if let Ok(reply) = HoldingsReply::parse(bytes) {
            assert!(reply.offset + reply.page.len() as u64 <= reply.total_bytes);
            assert_eq!(HoldingsReply::parse(&reply.to_bytes()), Ok(reply));
        }
        if let Ok(request) = LocateRequest::parse(bytes) {
            assert!(request.chunks.len() <= LOCATE_CHUNKS_MAX);
            assert_eq!(LocateRequest::parse(&request.to_bytes()), Ok(request));
        }
        // As many as the bytes say, which the reader would have asked for.
        let said = bytes.get(4..8).map_or(0, |said| {
            u32::from_le_bytes([said[0], said[1], said[2], said[3]]) as usize
        });
        for expected in [said, said % 7, 0] {
            if let Ok(reply) = LocateReply::parse(bytes, expected) {
                assert_eq!(reply.standings.len(), expected);
                assert_eq!(LocateReply::parse(&reply.to_bytes(), expected), Ok(reply));
            }
        }
    }
}

/// A well-formed request to locate, and its answer, with some bytes changed.
fn locate(input: &mut Input<'_>) {
    let chunk = |input: &mut Input<'_>| ChunkKey {
        file: Arc::from(vec![input.byte(); usize::from(input.byte() % 9)]),
        row_group: u32::from(input.byte()),
        column: u32::from(input.byte()),
    };
    let count = usize::from(input.byte() % 20);
    let request = LocateRequest {
        chunks: (0..count).map(|_| chunk(input)).collect(),
    };
    let mut bytes = request.to_bytes();
    if !input.change(&mut bytes) {
        assert_eq!(LocateRequest::parse(&bytes).as_ref(), Ok(&request));
    } else if let Ok(changed) = LocateRequest::parse(&bytes) {
        assert_eq!(LocateRequest::parse(&changed.to_bytes()), Ok(changed));
    }
    let standing = |input: &mut Input<'_>| match input.byte() % 3 {
        0 => Standing::Absent,
        1 => Standing::Loading,
        _ => Standing::Held(input.location()),
    };
    let reply = LocateReply {
        incarnation: input.number(),
        unsettled: input.byte() % 2 == 1,
        progress: input.number(),
        standings: (0..count).map(|_| standing(input)).collect(),
    };
    let mut bytes = reply.to_bytes();
    if !input.change(&mut bytes) {
        assert_eq!(LocateReply::parse(&bytes, count).as_ref(), Ok(&reply));
    } else if let Ok(changed) = LocateReply::parse(&bytes, count) {
        assert_eq!(LocateReply::parse(&changed.to_bytes(), count), Ok(changed));
    }
}

/// Pages of changing directories, of any size and order, some of their heads changed.
fn fetch(input: &mut Input<'_>) {
    let states = [directory(input).0, directory(input).0];
    let since = u64::from(input.byte() % 4);
    let mut fetch = HoldingsFetch::new(Scope::Own, since, 0);
    for _ in 0..40 {
        let request = HoldingsRequest::parse(&fetch.request()).expect("we wrote it");
        let state = usize::from(input.byte() % 2);
        let whole = HoldingsReply::of(&request, 1 + state as u64, &states[state]);
        let shorter = usize::from(u16::from_le_bytes([input.byte(), input.byte()]));
        let page = match input.byte() % 4 {
            0 => whole.page,
            _ => &whole.page[..shorter.min(whole.page.len())],
        };
        let mut bytes = HoldingsReply { page, ..whole }.to_bytes();
        let (head, _) = bytes.split_at_mut(32);
        input.change(head);
        if input.byte() % 16 == 15 {
            bytes = HoldingsReply::unchanged(since).to_bytes();
        }
        match fetch.take(&bytes) {
            Ok(Fetched::More) => {}
            Ok(Fetched::Unchanged) => return,
            Ok(Fetched::Whole(found)) => return walk(&found),
            Err(_) => return,
        }
        if input.is_empty() {
            return;
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, rest)) = data.split_first() else {
        return;
    };
    let mut input = Input::new(rest);
    match choice % 3 {
        0 => parse_anything(rest),
        1 => locate(&mut input),
        _ => fetch(&mut input),
    }
});
