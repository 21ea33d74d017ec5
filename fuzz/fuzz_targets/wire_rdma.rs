//! The messages that set up RDMA: any bytes are understood or refused, and what is understood is
//! what was written.

#![no_main]

use libfuzzer_sys::fuzz_target;
use stoa_transfer::rdma::wire::{
    self, ConnectData, GrantRow, OpenAnswer, OpenRequest, RDMA_MAGIC, RDMA_VERSION,
};

fuzz_target!(|data: &[u8]| {
    let _ = wire::parse_open_request(data);
    let _ = wire::parse_open_answer(data);
    let _ = wire::parse_connect_data(data);
    if let Ok((session, keys)) = wire::parse_session_request(data) {
        assert!(keys.len() <= wire::KEYS_MAX as usize);
        let again = wire::session_request(session, &keys);
        // The reserved field is written as zero and not looked at.
        assert_eq!(again[..12], data[..12]);
        assert_eq!(again[16..], data[16..]);
    }
    if let Ok(keys) = wire::parse_keys(data) {
        assert_eq!(wire::keys(&keys), data);
    }
    let rows = data.len() / GrantRow::BYTES;
    if let Ok(grants) = wire::parse_grants(data, rows) {
        assert_eq!(grants.len(), rows);
        for grant in grants.iter().flatten() {
            assert!(grant.address.checked_add(grant.length).is_some());
        }
        assert_eq!(
            wire::parse_grants(&wire::grants(&grants), rows).expect("it was written here"),
            grants
        );
    }
    assert!(wire::parse_grants(data, rows + 1).is_err());

    // Behind a good beginning.
    let mut sealed = data.to_vec();
    if sealed.len() >= 10 {
        sealed[..8].copy_from_slice(&RDMA_MAGIC);
        sealed[8..10].copy_from_slice(&RDMA_VERSION.to_le_bytes());
        let whole = sealed.len() == OpenRequest::BYTES;
        assert_eq!(wire::parse_open_request(&sealed).is_ok(), whole);
        let enough = sealed.len() >= ConnectData::BYTES;
        assert_eq!(wire::parse_connect_data(&sealed).is_ok(), enough);
    }
    if let Ok(answer) = wire::parse_open_answer(data) {
        let token = wire::Token([answer.token_a, answer.token_b]);
        let again = wire::open_answer(answer.session, token, answer.port);
        assert_eq!(again[..26], data[..26]);
        assert_eq!(data.len(), OpenAnswer::BYTES);
    }
});
