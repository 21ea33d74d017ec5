//! Large values in bounded parts: split, digest, join.
//!
//! A request to etcd holds 1.5 MiB. Plans and layout documents are split into parts of at most
//! [`PART_BYTES_MAX`]; a pointer written last names how many there are and fixes their content by
//! a digest, so that a reader never takes a mixture for a plan.

use std::hash::Hasher;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::PartPointer;

/// The most bytes in one part.
pub const PART_BYTES_MAX: usize = 512 << 10;

/// A chunk within a plan: file (a position in the plan's `files`), row group, column, form.
pub type PlanChunk = (u32, u32, u32, String);

/// What one worker is to hold of a table, most wanted first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerPlan {
    /// The identities of the files that the chunks speak of.
    pub files: Vec<Value>,
    /// The chunks in priority order; `.0` is a position in `files`.
    pub chunks: Vec<PlanChunk>,
}

/// One part of a worker's plan: the value of `cache_location/{table}:{version}/{worker}/{plan}.{part}`.
///
/// The whole is the concatenation of all parts' `files` and `chunks`, in the order of `part`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlanPart {
    /// Table and version, such as `tpch.lineitem:1`.
    pub table_version: String,
    /// The plan's number.
    pub plan: u64,
    /// The worker.
    pub worker: String,
    /// This part's number, from 0.
    pub part: u32,
    /// This part's files.
    #[serde(default)]
    pub files: Vec<Value>,
    /// This part's chunks; `.0` is a position in the whole plan's files.
    #[serde(default)]
    pub chunks: Vec<PlanChunk>,
}

/// A plan as it is written: the parts' bytes, and the pointer that names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedPlan {
    /// Names the parts and fixes their content.
    pub pointer: PartPointer,
    /// The parts in order, each at most [`PART_BYTES_MAX`] long.
    pub parts: Vec<Vec<u8>>,
}

/// Splits a worker's plan into parts of at most `part_bytes_max`.
///
/// Fails with [`Error::TooLarge`] when a single file identity is larger than a part, and with
/// [`Error::DamagedPlan`] when a chunk names a file that is not there.
pub fn split_plan(
    table_version: &str,
    plan: u64,
    worker: &str,
    whole: &WorkerPlan,
    part_bytes_max: usize,
) -> Result<EncodedPlan> {
    check_files(table_version, worker, whole)?;
    let empty = |part| PlanPart {
        table_version: table_version.to_owned(),
        plan,
        worker: worker.to_owned(),
        part,
        files: Vec::new(),
        chunks: Vec::new(),
    };
    // A part's own text with the largest part number, so that no number can make it longer.
    let frame = encode(&empty(u32::MAX)).len();
    let mut done: Vec<PlanPart> = Vec::new();
    let mut part = empty(0);
    let mut bytes = frame;
    // Items weigh their text and a comma.
    let mut make_room = |part: &mut PlanPart, weight: usize| -> Result<()> {
        if frame + weight > part_bytes_max {
            return Err(Error::TooLarge {
                what: "bytes of one entry of a plan",
                found: weight as u64,
                limit: part_bytes_max.saturating_sub(frame) as u64,
            });
        }
        if bytes + weight > part_bytes_max {
            let next = empty(done.len() as u32 + 1);
            done.push(std::mem::replace(part, next));
            bytes = frame;
        }
        bytes += weight;
        Ok(())
    };
    for file in &whole.files {
        make_room(&mut part, encode(file).len() + 1)?;
        part.files.push(file.clone());
    }
    for chunk in &whole.chunks {
        make_room(&mut part, encode(chunk).len() + 1)?;
        part.chunks.push(chunk.clone());
    }
    done.push(part);
    let parts: Vec<Vec<u8>> = done.iter().map(encode).collect();
    Ok(EncodedPlan {
        pointer: pointer_to(&parts),
        parts,
    })
}

/// Joins the parts that a pointer names, given in order, and checks them against it.
///
/// Fails with [`Error::DamagedPlan`] on any difference.
pub fn join_plan(
    table_version: &str,
    plan: u64,
    worker: &str,
    pointer: &PartPointer,
    parts: &[Vec<u8>],
) -> Result<WorkerPlan> {
    let damaged = |reason: String| damaged(table_version, worker, reason);
    check_parts(pointer, parts).map_err(damaged)?;
    let mut whole = WorkerPlan::default();
    for (number, bytes) in parts.iter().enumerate() {
        let part: PlanPart = serde_json::from_slice(bytes)
            .map_err(|error| damaged(format!("part {number} is not a plan part: {error}")))?;
        let found = (
            part.table_version.as_str(),
            part.plan,
            part.worker.as_str(),
            part.part,
        );
        let expected = (table_version, plan, worker, number as u32);
        if found != expected {
            return Err(damaged(format!(
                "part {number} says it is {found:?}, expected {expected:?}"
            )));
        }
        whole.files.extend(part.files);
        whole.chunks.extend(part.chunks);
    }
    check_files(table_version, worker, &whole)?;
    Ok(whole)
}

/// The pointer to these parts.
pub fn pointer_to<P: AsRef<[u8]>>(parts: &[P]) -> PartPointer {
    PartPointer {
        parts: parts.len() as u32,
        digest: digest(parts),
    }
}

/// Says how the parts differ from what the pointer names.
pub(crate) fn check_parts<P: AsRef<[u8]>>(
    pointer: &PartPointer,
    parts: &[P],
) -> Result<(), String> {
    if parts.len() as u64 != u64::from(pointer.parts) {
        return Err(format!("found {} of {} parts", parts.len(), pointer.parts));
    }
    let found = digest(parts);
    if found != pointer.digest {
        return Err(format!("digest is {found}, expected {}", pointer.digest));
    }
    Ok(())
}

/// xxh3-64 of the parts, each preceded by its length in 8 little-endian bytes.
pub fn digest<P: AsRef<[u8]>>(parts: &[P]) -> String {
    let mut hasher = twox_hash::XxHash3_64::new();
    for part in parts {
        let bytes = part.as_ref();
        hasher.write(&(bytes.len() as u64).to_le_bytes());
        hasher.write(bytes);
    }
    format!("{:016x}", hasher.finish())
}

/// Cuts a text into pieces of at most `bytes_max`, between characters.
pub(crate) fn split_text(text: &str, bytes_max: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while rest.len() > bytes_max {
        let cut = rest.floor_char_boundary(bytes_max);
        // A limit below one character's width would never advance.
        assert!(
            cut > 0,
            "part limit {bytes_max} is smaller than a character"
        );
        let (piece, tail) = rest.split_at(cut);
        pieces.push(piece);
        rest = tail;
    }
    pieces.push(rest);
    pieces
}

fn check_files(table_version: &str, worker: &str, whole: &WorkerPlan) -> Result<()> {
    match whole
        .chunks
        .iter()
        .find(|chunk| chunk.0 as usize >= whole.files.len())
    {
        None => Ok(()),
        Some(chunk) => Err(damaged(
            table_version,
            worker,
            format!(
                "a chunk names file {}, but there are {}",
                chunk.0,
                whole.files.len()
            ),
        )),
    }
}

fn damaged(table_version: &str, worker: &str, reason: String) -> Error {
    Error::DamagedPlan {
        table_version: table_version.to_owned(),
        worker: worker.to_owned(),
        reason,
    }
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    // Our own types with string keys: serialising them cannot fail.
    serde_json::to_vec(value).expect("records serialise to JSON")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn plan(files: u32, chunks: u32) -> WorkerPlan {
        WorkerPlan {
            files: (0..files)
                .map(|i| json!({"store": "s3://b", "path": format!("p/{i}")}))
                .collect(),
            chunks: (0..chunks)
                .map(|i| (i % files, i / 7, i % 16, "arrow".to_owned()))
                .collect(),
        }
    }

    #[test]
    fn a_changed_missing_or_swapped_part_is_noticed() {
        let whole = plan(20, 500);
        let encoded = split_plan("s.t:1", 4, "w", &whole, 1024).unwrap();
        assert!(encoded.parts.len() > 3);
        let join = |parts: &[Vec<u8>]| join_plan("s.t:1", 4, "w", &encoded.pointer, parts);
        assert_eq!(join(&encoded.parts).unwrap(), whole);

        let mut missing = encoded.parts.clone();
        missing.pop();
        let text = join(&missing).unwrap_err().to_string();
        assert!(
            text.starts_with("plan of s.t:1 for worker w is damaged: found"),
            "{text}"
        );

        let mut swapped = encoded.parts.clone();
        swapped.swap(1, 2);
        assert!(
            join(&swapped)
                .unwrap_err()
                .to_string()
                .contains("digest is")
        );

        let mut changed = encoded.parts.clone();
        changed[1][40] ^= 1;
        assert!(matches!(join(&changed), Err(Error::DamagedPlan { .. })));

        // Right bytes under the wrong name: another worker's plan.
        let other = join_plan("s.t:1", 4, "v", &encoded.pointer, &encoded.parts);
        assert!(other.unwrap_err().to_string().contains("says it is"));
    }

    #[test]
    fn a_chunk_of_no_file_is_refused() {
        let whole = WorkerPlan {
            files: vec![],
            chunks: vec![(0, 0, 0, "arrow".into())],
        };
        let error = split_plan("s.t:1", 1, "w", &whole, PART_BYTES_MAX).unwrap_err();
        assert!(
            error.to_string().contains("names file 0, but there are 0"),
            "{error}"
        );
    }

    #[test]
    fn one_entry_larger_than_a_part_is_refused() {
        let whole = WorkerPlan {
            files: vec![json!("x".repeat(2000))],
            chunks: vec![],
        };
        let error = split_plan("s.t:1", 1, "w", &whole, 1024).unwrap_err();
        assert!(matches!(
            error,
            Error::TooLarge {
                what: "bytes of one entry of a plan",
                ..
            }
        ));
    }

    proptest! {
        #[test]
        fn plans_read_back_and_parts_are_bounded(
            files in 1u32..60, chunks in 0u32..400, limit in 300usize..4000, worker in ".{0,20}",
        ) {
            let whole = plan(files, chunks);
            let encoded = split_plan("s.t:1", u64::MAX, &worker, &whole, limit + worker.len() * 8).unwrap();
            for part in &encoded.parts {
                prop_assert!(part.len() <= limit + worker.len() * 8);
            }
            let joined = join_plan("s.t:1", u64::MAX, &worker, &encoded.pointer, &encoded.parts).unwrap();
            prop_assert_eq!(joined, whole);
        }

        #[test]
        fn texts_read_back(text in ".*", limit in 4usize..50) {
            let pieces = split_text(&text, limit);
            prop_assert!(pieces.iter().all(|piece| piece.len() <= limit));
            prop_assert_eq!(pieces.concat(), text);
        }

        #[test]
        fn joining_anything_never_panics(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..64), 0..4)) {
            let _ = join_plan("s.t:1", 1, "w", &pointer_to(&parts), &parts);
        }
    }
}
