//! How far a load is, table by table.

use stoa_metastore::{LeftOut, TableState};

use crate::diff::{Decision, Want};

/// Where a wanted chunk stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// On its way.
    Pending,
    /// Published; holds so many bytes.
    Published(u64),
    /// Not there, for the time being.
    LeftOut,
}

/// Counts of one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableTally {
    /// Chunks wanted.
    pub chunks_total: u64,
    /// Their bytes, as estimated until they are known.
    pub bytes_total: u64,
    /// Chunks published.
    pub chunks_done: u64,
    /// Their bytes.
    pub bytes_done: u64,
    /// Chunks that were held before.
    pub kept: u64,
    /// Chunks that were fetched.
    pub fetched: u64,
    /// Chunks that did not fit or could not be had.
    pub left_out: u64,
    /// Those of them that did not fit.
    pub no_room: u64,
    /// Their bytes, as planned.
    pub left_out_bytes: u64,
    /// The same by what was encoded of their columns so far.
    pub left_out_expected_bytes: u64,
    /// Why, for the first of them.
    pub reason: Option<String>,
}

impl TableTally {
    /// Whether every wanted chunk is published or left out.
    pub fn is_settled(&self) -> bool {
        self.chunks_done + self.left_out >= self.chunks_total
    }

    /// Whether every wanted chunk is published.
    pub fn is_complete(&self) -> bool {
        self.chunks_done >= self.chunks_total
    }

    /// Writes the counts into what the worker reports of the table.
    pub fn report(&self, state: &mut TableState) {
        state.chunks_total = self.chunks_total;
        state.bytes_total = self.bytes_total;
        state.chunks_done = self.chunks_done;
        state.bytes_done = self.bytes_done;
        state.left_out = LeftOut {
            chunks: self.left_out,
            bytes: self.left_out_bytes,
            expected_bytes: self.left_out_expected_bytes,
            no_room: self.no_room,
            reason: self.reason.clone(),
        };
    }
}

/// The counts of all tables of one load.
#[derive(Clone, Debug)]
pub struct Tally {
    tables: Vec<TableTally>,
    standing: Vec<Standing>,
    /// Bytes of each want as the plan counted them.
    planned: Vec<u64>,
}

impl Tally {
    /// Counts what was decided. `planned` are the bytes that the plan counted each want with,
    /// `size` says what a held chunk has in bytes.
    pub fn new(
        tables: usize,
        wants: &[Want],
        planned: Vec<u64>,
        decision: &Decision,
        size: impl Fn(usize) -> u64,
        left_out_reason: &str,
        blocked_reason: impl Fn(usize) -> String,
    ) -> Tally {
        let mut tally = Tally {
            tables: vec![TableTally::default(); tables],
            standing: vec![Standing::Pending; wants.len()],
            planned,
        };
        for want in wants {
            tally.each(want, |table| {
                table.chunks_total += 1;
                table.bytes_total += want.bytes;
            });
        }
        for &at in &decision.keep {
            tally.published(&wants[at], at, size(at));
            tally.each(&wants[at], |table| table.kept += 1);
        }
        for &at in &decision.left_out {
            tally.no_room(&wants[at], at, left_out_reason);
        }
        for &at in &decision.blocked {
            tally.left_out(&wants[at], at, &blocked_reason(at));
        }
        tally
    }

    fn each(&mut self, want: &Want, change: impl Fn(&mut TableTally)) {
        for table in std::iter::once(&want.table).chain(&want.also) {
            change(&mut self.tables[*table]);
        }
    }

    /// The chunk was fetched and stored; it is not published yet.
    pub fn fetched(&mut self, want: &Want) {
        self.each(want, |table| table.fetched += 1);
    }

    /// The chunk is published with that many bytes.
    pub fn published(&mut self, want: &Want, at: usize, bytes: u64) {
        if let Standing::Published(_) = self.standing[at] {
            return;
        }
        self.standing[at] = Standing::Published(bytes);
        self.each(want, |table| {
            table.chunks_done += 1;
            table.bytes_done += bytes;
            table.bytes_total = (table.bytes_total + bytes).saturating_sub(want.bytes);
        });
    }

    /// The chunk has no room.
    pub fn no_room(&mut self, want: &Want, at: usize, reason: &str) {
        if self.standing[at] == Standing::Pending {
            self.left_out(want, at, reason);
            self.each(want, |table| table.no_room += 1);
        }
    }

    /// The chunk is not to be had.
    pub fn left_out(&mut self, want: &Want, at: usize, reason: &str) {
        if self.standing[at] != Standing::Pending {
            return;
        }
        self.standing[at] = Standing::LeftOut;
        let planned = self.planned.get(at).copied().unwrap_or(want.bytes);
        self.each(want, |table| {
            table.left_out += 1;
            table.left_out_bytes += planned;
            table.left_out_expected_bytes += want.bytes;
            table.reason.get_or_insert_with(|| reason.to_owned());
        });
    }

    /// The counts of one table.
    pub fn table(&self, table: usize) -> &TableTally {
        &self.tables[table]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use stoa_layout::Form;
    use stoa_shm::ChunkKey;

    use super::*;

    fn want(table: usize, also: Vec<usize>, row_group: u32) -> Want {
        Want {
            key: ChunkKey {
                file: Arc::from(&b"f"[..]),
                row_group,
                column: 0,
            },
            table,
            also,
            file: 0,
            form: Form::Arrow,
            bytes: 100,
            compressed_bytes: 30,
            decoded_bytes: 100,
        }
    }

    #[test]
    fn a_load_is_counted_to_its_end() {
        let wants = [want(0, vec![1], 0), want(0, vec![], 1), want(1, vec![], 2)];
        let decision = Decision {
            keep: vec![0],
            fetch: vec![1],
            left_out: vec![2],
            ..Decision::default()
        };
        let planned = vec![100, 100, 900];
        let mut tally = Tally::new(
            2,
            &wants,
            planned,
            &decision,
            |_| 80,
            "no room",
            |_| String::new(),
        );
        let second = tally.table(1);
        assert_eq!((second.left_out, second.no_room), (1, 1));
        assert_eq!(
            (second.left_out_bytes, second.left_out_expected_bytes),
            (900, 100)
        );
        let first = tally.table(0).clone();
        assert_eq!(
            (first.chunks_total, first.chunks_done, first.kept),
            (2, 1, 1)
        );
        assert_eq!((first.bytes_total, first.bytes_done), (180, 80));
        assert!(!first.is_settled());
        assert!(tally.table(1).is_settled() && !tally.table(1).is_complete());
        assert_eq!(tally.table(1).reason.as_deref(), Some("no room"));

        tally.fetched(&wants[1]);
        tally.published(&wants[1], 1, 150);
        tally.published(&wants[1], 1, 150);
        let first = tally.table(0);
        assert_eq!(
            (first.chunks_done, first.bytes_done, first.bytes_total),
            (2, 230, 230)
        );
        assert!(first.is_complete());
        assert_eq!(tally.table(1).chunks_done, 1);
    }
}
