//! A walk through Thrift's compact encoding that believes nothing.
//!
//! The Parquet parser trusts some counts of a footer enough to allocate for them, and descends as
//! deep as the schema says it is: a crafted footer could end the process, which no `catch_unwind`
//! holds. So every footer is walked here first. What passes has no count larger than what is
//! really there, and bounded depth. The walk allocates next to nothing.

/// Structs, lists and maps within each other, in any Thrift value of a footer.
const DEPTH_MAX: usize = 64;
/// Columns within each other in a schema.
const SCHEMA_DEPTH_MAX: usize = 64;
/// Row groups that the format's 16-bit ordinals can number.
const ROW_GROUPS_MAX: usize = i16::MAX as usize;

/// What the walk saw on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FooterShape {
    /// Whether the file says that one of its columns is encrypted.
    pub(crate) encrypted: bool,
}

/// Walks a `FileMetaData`.
pub(crate) fn check_footer(bytes: &[u8]) -> Result<FooterShape, String> {
    let mut walk = Walk { bytes, at: 0 };
    let mut shape = FooterShape::default();
    let mut schema = SchemaDepth::default();
    walk.fields(|walk, id, kind| {
        match (id, kind) {
            // list<SchemaElement>
            (2, LIST) => walk.structs(usize::MAX, |walk| {
                let mut children = 0;
                walk.fields(|walk, id, kind| {
                    if (id, kind) == (5, I32) {
                        children = walk.zigzag()?;
                        Ok(())
                    } else {
                        walk.skip(kind, DEPTH_MAX)
                    }
                })?;
                schema.element(children)
            }),
            // list<RowGroup>
            (4, LIST) => walk.structs(ROW_GROUPS_MAX, |walk| {
                walk.fields(|walk, id, kind| match (id, kind) {
                    // list<ColumnChunk>
                    (1, LIST) => walk.structs(usize::MAX, |walk| {
                        walk.fields(|walk, id, kind| {
                            // crypto_metadata, encrypted_column_metadata
                            shape.encrypted |= matches!(id, 8 | 9);
                            walk.skip(kind, DEPTH_MAX)
                        })
                    }),
                    _ => walk.skip(kind, DEPTH_MAX),
                })
            }),
            // Among them encryption_algorithm: where no column is encrypted, it signs the footer.
            _ => walk.skip(kind, DEPTH_MAX),
        }
    })?;
    schema.end()?;
    Ok(shape)
}

/// Walks one struct, such as a page index, which has to fill `bytes`.
pub(crate) fn check_struct(bytes: &[u8]) -> Result<(), String> {
    let mut walk = Walk { bytes, at: 0 };
    walk.skip(STRUCT, DEPTH_MAX)?;
    if walk.at != bytes.len() {
        return Err(format!("{} bytes after the end", bytes.len() - walk.at));
    }
    Ok(())
}

/// The `num_bytes` of a Bloom filter's header, its first field.
pub(crate) fn bloom_filter_bytes(header: &[u8]) -> Result<u64, String> {
    let mut walk = Walk {
        bytes: header,
        at: 0,
    };
    if walk.byte()? != (1 << 4 | I32) {
        return Err("a Bloom filter's header starts with its size".into());
    }
    let bytes = walk.zigzag()?;
    u64::try_from(bytes).map_err(|_| format!("{bytes} bytes"))
}

/// Checks that a schema, flattened depth first, is one tree of bounded depth.
#[derive(Default)]
struct SchemaDepth {
    /// How many children each ancestor still lacks.
    missing: Vec<i64>,
    seen: bool,
}

impl SchemaDepth {
    fn element(&mut self, children: i64) -> Result<(), String> {
        match self.missing.last_mut() {
            Some(missing) => *missing -= 1,
            None if self.seen => return Err("schema with a second root".into()),
            None => self.seen = true,
        }
        if children < 0 {
            return Err(format!("schema element with {children} children"));
        }
        if children > 0 {
            self.missing.push(children);
        }
        if self.missing.len() > SCHEMA_DEPTH_MAX {
            return Err(format!("schema deeper than {SCHEMA_DEPTH_MAX}"));
        }
        while self.missing.last() == Some(&0) {
            self.missing.pop();
        }
        Ok(())
    }

    fn end(&self) -> Result<(), String> {
        match self.missing.last() {
            Some(missing) => Err(format!("schema lacks {missing} elements")),
            None if !self.seen => Err("no schema".into()),
            None => Ok(()),
        }
    }
}

const STOP: u8 = 0;
const TRUE: u8 = 1;
const FALSE: u8 = 2;
const BYTE: u8 = 3;
const I16: u8 = 4;
const I32: u8 = 5;
const I64: u8 = 6;
const DOUBLE: u8 = 7;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const SET: u8 = 10;
const MAP: u8 = 11;
const STRUCT: u8 = 12;
const UUID: u8 = 13;

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Walk<'_> {
    fn byte(&mut self) -> Result<u8, String> {
        let byte = *self.bytes.get(self.at).ok_or("it ends too early")?;
        self.at += 1;
        Ok(byte)
    }

    fn pass(&mut self, bytes: u64) -> Result<(), String> {
        let left = self.left();
        if bytes > left as u64 {
            return Err(format!("a value of {bytes} bytes where {left} are left"));
        }
        self.at += bytes as usize;
        Ok(())
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number of more than 64 bits".into())
    }

    fn zigzag(&mut self) -> Result<i64, String> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// Calls `each` with every field's id and type until the struct's end; `each` consumes the
    /// field's value.
    fn fields(
        &mut self,
        mut each: impl FnMut(&mut Self, i64, u8) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut id = 0;
        loop {
            let header = self.byte()?;
            let kind = header & 0x0f;
            if kind == STOP {
                return Ok(());
            }
            id = match header >> 4 {
                0 => self.zigzag()?,
                delta => id + i64::from(delta),
            };
            if !(i64::from(i16::MIN)..=i64::from(i16::MAX)).contains(&id) {
                return Err(format!("field {id}"));
            }
            each(self, id, kind)?;
        }
    }

    /// Element type and count of a list whose elements can be there.
    fn list(&mut self) -> Result<(u8, usize), String> {
        let header = self.byte()?;
        let count = match header >> 4 {
            15 => self.varint()?,
            count => u64::from(count),
        };
        let left = self.left();
        if count > left as u64 {
            return Err(format!(
                "a list of {count} elements where {left} bytes are left"
            ));
        }
        Ok((header & 0x0f, count as usize))
    }

    fn structs(
        &mut self,
        count_max: usize,
        mut each: impl FnMut(&mut Self) -> Result<(), String>,
    ) -> Result<(), String> {
        let (kind, count) = self.list()?;
        if count > count_max {
            return Err(format!("{count} row groups, expected at most {count_max}"));
        }
        if count > 0 && kind != STRUCT {
            return Err(format!("a list of type {kind}, expected structs"));
        }
        (0..count).try_for_each(|_| each(self))
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Result<(), String> {
        let Some(deeper) = depth.checked_sub(1) else {
            return Err(format!("values deeper than {DEPTH_MAX}"));
        };
        match kind {
            TRUE | FALSE => Ok(()),
            BYTE => self.pass(1),
            I16 | I32 | I64 => self.varint().map(|_| ()),
            DOUBLE => self.pass(8),
            BINARY => {
                let length = self.varint()?;
                self.pass(length)
            }
            LIST | SET => {
                let (kind, count) = self.list()?;
                (0..count).try_for_each(|_| self.skip_element(kind, deeper))
            }
            MAP => {
                let count = self.varint()?;
                if count == 0 {
                    return Ok(());
                }
                let kinds = self.byte()?;
                if count > self.left() as u64 {
                    return Err(format!("a map of {count} entries"));
                }
                (0..count).try_for_each(|_| {
                    self.skip_element(kinds >> 4, deeper)?;
                    self.skip_element(kinds & 0x0f, deeper)
                })
            }
            STRUCT => self.fields(|walk, _, kind| walk.skip(kind, deeper)),
            UUID => self.pass(16),
            kind => Err(format!("a value of unknown type {kind}")),
        }
    }

    /// As [`skip`](Self::skip), but a boolean takes a byte within a list.
    fn skip_element(&mut self, kind: u8, depth: usize) -> Result<(), String> {
        match kind {
            TRUE | FALSE => self.pass(1),
            kind => self.skip(kind, depth),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A footer of one field.
    fn footer(id: u8, kind: u8, value: &[u8]) -> Vec<u8> {
        [&[id << 4 | kind], value, &[STOP]].concat()
    }

    /// A schema element with `children` children and no name.
    fn element(children: u8) -> Vec<u8> {
        vec![5 << 4 | I32, children << 1, STOP]
    }

    fn schema(elements: &[Vec<u8>]) -> Vec<u8> {
        let mut value = vec![0xf0 | STRUCT, elements.len() as u8];
        value.extend(elements.concat());
        footer(2, LIST, &value)
    }

    proptest! {
        #[test]
        fn any_bytes_are_walked_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            check_footer(&bytes).ok();
            check_struct(&bytes).ok();
            bloom_filter_bytes(&bytes).ok();
        }
    }

    #[test]
    fn counts_larger_than_what_is_there_are_refused() {
        // A list of 2^31 - 1 row groups in a footer of a dozen bytes.
        let count = [0xf0 | STRUCT, 0xff, 0xff, 0xff, 0xff, 0x07];
        let error = check_footer(&footer(4, LIST, &count)).unwrap_err();
        assert_eq!(
            error,
            "a list of 2147483647 elements where 1 bytes are left"
        );
        let error = check_footer(&footer(6, BINARY, &[0xff, 0x01])).unwrap_err();
        assert_eq!(error, "a value of 255 bytes where 1 are left");
    }

    #[test]
    fn a_schema_is_one_tree_of_bounded_depth() {
        assert!(check_footer(&schema(&[element(1), element(0)])).is_ok());
        let lacking = check_footer(&schema(&[element(5), element(0)])).unwrap_err();
        assert_eq!(lacking, "schema lacks 4 elements");
        let second = check_footer(&schema(&[element(0), element(0)])).unwrap_err();
        assert_eq!(second, "schema with a second root");
        let mut deep = vec![element(1); 100];
        deep.push(element(0));
        assert_eq!(
            check_footer(&schema(&deep)).unwrap_err(),
            "schema deeper than 64"
        );
    }

    #[test]
    fn values_nest_only_so_deep() {
        let mut value = vec![1 << 4 | STRUCT; 200];
        value.extend([STOP; 201]);
        assert_eq!(check_struct(&value).unwrap_err(), "values deeper than 64");
    }

    #[test]
    fn encryption_is_seen_in_columns() {
        let root = schema(&[element(0)]);
        let rest = &root[..root.len() - 1];
        assert!(!check_footer(&root).unwrap().encrypted);
        // Field 8 after field 2, an empty struct: an algorithm that signs the footer.
        let algorithm = [rest, &[6 << 4 | STRUCT, STOP, STOP]].concat();
        assert!(!check_footer(&algorithm).unwrap().encrypted);
        // Field 4 after field 2: one row group of one column chunk with field 8.
        let chunk = [
            1 << 4 | LIST,
            1 << 4 | STRUCT,
            8 << 4 | STRUCT,
            STOP,
            STOP,
            STOP,
        ];
        let column = [rest, &[2 << 4 | LIST, 1 << 4 | STRUCT], &chunk, &[STOP]].concat();
        assert!(check_footer(&column).unwrap().encrypted);
    }
}
