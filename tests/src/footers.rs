//! Footers of Parquet files, read, changed and written back: what other writers say, and what they
//! leave out.
//!
//! Pages stay where they are, the footer alone is written anew. What is not touched is written as it
//! was read, known to anybody or not. Only for files that were written by tests: what is no footer
//! ends in a panic.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::{Result, Tried};

/// A value of Thrift's compact encoding.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// True or false.
    Bool(bool),
    /// A number of one byte.
    Byte(u8),
    /// A number of 16 bits.
    I16(i64),
    /// A number of 32 bits.
    I32(i64),
    /// A number of 64 bits.
    I64(i64),
    /// A floating-point number's bytes.
    Double([u8; 8]),
    /// Bytes or text.
    Binary(Vec<u8>),
    /// The type of the elements as the encoding numbers it, and the elements.
    List(u8, Vec<Value>),
    /// Fields by their ids.
    Struct(Fields),
}

/// The fields of a struct.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fields(BTreeMap<i64, Value>);

const TRUE: u8 = 1;
const FALSE: u8 = 2;
const BYTE: u8 = 3;
const I16: u8 = 4;
const I32: u8 = 5;
const I64: u8 = 6;
const DOUBLE: u8 = 7;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

impl Value {
    /// Text as Thrift keeps it.
    pub fn text(text: &str) -> Value {
        Value::Binary(text.as_bytes().to_vec())
    }

    fn kind(&self) -> u8 {
        match self {
            Value::Bool(true) => TRUE,
            Value::Bool(false) => FALSE,
            Value::Byte(_) => BYTE,
            Value::I16(_) => I16,
            Value::I32(_) => I32,
            Value::I64(_) => I64,
            Value::Double(_) => DOUBLE,
            Value::Binary(_) => BINARY,
            Value::List(..) => LIST,
            Value::Struct(_) => STRUCT,
        }
    }
}

impl Fields {
    /// A field, if it is there.
    pub fn get(&self, id: i64) -> Option<&Value> {
        self.0.get(&id)
    }

    /// Puts a field in the place of what was there.
    pub fn set(&mut self, id: i64, value: Value) {
        self.0.insert(id, value);
    }

    /// Takes fields out.
    pub fn remove(&mut self, ids: &[i64]) {
        for id in ids {
            self.0.remove(id);
        }
    }

    fn fields(&mut self, id: i64) -> &mut Fields {
        match self.0.get_mut(&id) {
            Some(Value::Struct(fields)) => fields,
            other => panic!("field {id} is {other:?}, expected a struct"),
        }
    }

    fn structs(&mut self, id: i64) -> Vec<&mut Fields> {
        let Some(Value::List(_, elements)) = self.0.get_mut(&id) else {
            panic!("field {id} is no list");
        };
        let structs = elements.iter_mut().map(|element| match element {
            Value::Struct(fields) => fields,
            other => panic!("an element of field {id} is {other:?}, expected a struct"),
        });
        structs.collect()
    }
}

/// A file's `FileMetaData`, to be changed.
#[derive(Debug)]
pub struct Footer {
    path: PathBuf,
    pages: Vec<u8>,
    metadata: Fields,
}

impl Footer {
    /// Reads the footer of a file.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(path: &Path) -> Result<Footer> {
        let mut bytes = std::fs::read(path).tried(|| format!("reading {}", path.display()))?;
        let tail = bytes.len() - 8;
        let length = bytes[tail..tail + 4].try_into().expect("four bytes");
        let start = tail - u32::from_le_bytes(length) as usize;
        let metadata = Walk {
            bytes: &bytes[start..tail],
            at: 0,
        }
        .fields();
        bytes.truncate(start);
        Ok(Footer {
            path: path.to_owned(),
            pages: bytes,
            metadata,
        })
    }

    /// Writes the file with the footer as it is now.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self) -> Result<()> {
        let mut bytes = self.pages.clone();
        write_fields(&mut bytes, &self.metadata);
        let length = (bytes.len() - self.pages.len()) as u32;
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(b"PAR1");
        std::fs::write(&self.path, bytes).tried(|| format!("writing {}", self.path.display()))
    }

    /// The whole: 6 is who wrote it, 7 are the orders of columns.
    pub fn metadata(&mut self) -> &mut Fields {
        &mut self.metadata
    }

    /// The elements of the schema, in order.
    pub fn schema(&mut self) -> Vec<&mut Fields> {
        self.metadata.structs(2)
    }

    /// The first element of the schema of that name.
    ///
    /// # Panics
    /// If there is none.
    pub fn element(&mut self, name: &str) -> &mut Fields {
        let named = Value::text(name);
        let mut elements = self.schema().into_iter();
        elements
            .find(|element| element.get(4) == Some(&named))
            .expect("a column of that name")
    }

    /// How many row groups there are.
    pub fn row_groups(&mut self) -> usize {
        self.metadata.structs(4).len()
    }

    /// The `ColumnMetaData` of every chunk of a row group, in the order of the leaves.
    ///
    /// # Panics
    /// If there is no such row group.
    pub fn chunks(&mut self, row_group: usize) -> Vec<&mut Fields> {
        let group = self.metadata.structs(4).swap_remove(row_group);
        let chunks = group.structs(1).into_iter();
        chunks.map(|chunk| chunk.fields(3)).collect()
    }

    /// The `ColumnMetaData` of a leaf, by its dotted path.
    ///
    /// # Panics
    /// If there is no such chunk.
    pub fn chunk(&mut self, row_group: usize, path: &str) -> &mut Fields {
        let parts = path.split('.').map(Value::text).collect();
        let path = Value::List(BINARY, parts);
        let mut chunks = self.chunks(row_group).into_iter();
        chunks
            .find(|chunk| chunk.get(3) == Some(&path))
            .expect("a column of that path")
    }

    /// The statistics of a leaf: 1 and 2 are the deprecated maximum and minimum, 3 the nulls, 5 and 6
    /// maximum and minimum, 7 and 8 whether these are exact.
    ///
    /// # Panics
    /// If there are none.
    pub fn statistics(&mut self, row_group: usize, path: &str) -> &mut Fields {
        self.chunk(row_group, path).fields(12)
    }
}

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Walk<'_> {
    fn byte(&mut self) -> u8 {
        self.at += 1;
        self.bytes[self.at - 1]
    }

    fn take(&mut self, count: usize) -> &[u8] {
        self.at += count;
        &self.bytes[self.at - count..self.at]
    }

    fn varint(&mut self) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = self.byte();
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                return value;
            }
        }
    }

    fn zigzag(&mut self) -> i64 {
        let value = self.varint();
        (value >> 1) as i64 ^ -((value & 1) as i64)
    }

    fn value(&mut self, kind: u8, in_list: bool) -> Value {
        match kind {
            TRUE | FALSE if in_list => Value::Bool(self.byte() == TRUE),
            TRUE | FALSE => Value::Bool(kind == TRUE),
            BYTE => Value::Byte(self.byte()),
            I16 => Value::I16(self.zigzag()),
            I32 => Value::I32(self.zigzag()),
            I64 => Value::I64(self.zigzag()),
            DOUBLE => Value::Double(self.take(8).try_into().expect("eight bytes")),
            BINARY => {
                let length = self.varint() as usize;
                Value::Binary(self.take(length).to_vec())
            }
            LIST => {
                let head = self.byte();
                let kind = head & 0x0f;
                let count = match head >> 4 {
                    15 => self.varint(),
                    count => u64::from(count),
                };
                Value::List(kind, (0..count).map(|_| self.value(kind, true)).collect())
            }
            STRUCT => Value::Struct(self.fields()),
            other => panic!("type {other} in a footer"),
        }
    }

    fn fields(&mut self) -> Fields {
        let mut fields = Fields::default();
        let mut last = 0;
        loop {
            let head = self.byte();
            if head & 0x0f == 0 {
                return fields;
            }
            last = match head >> 4 {
                0 => self.zigzag(),
                delta => last + i64::from(delta),
            };
            let value = self.value(head & 0x0f, false);
            fields.0.insert(last, value);
        }
    }
}

fn write_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn write_zigzag(out: &mut Vec<u8>, value: i64) {
    write_varint(out, ((value << 1) ^ (value >> 63)) as u64);
}

fn write_value(out: &mut Vec<u8>, value: &Value, in_list: bool) {
    match value {
        Value::Bool(_) if in_list => out.push(value.kind()),
        Value::Bool(_) => {}
        Value::Byte(byte) => out.push(*byte),
        Value::I16(number) | Value::I32(number) | Value::I64(number) => write_zigzag(out, *number),
        Value::Double(bytes) => out.extend_from_slice(bytes),
        Value::Binary(bytes) => {
            write_varint(out, bytes.len() as u64);
            out.extend_from_slice(bytes);
        }
        Value::List(kind, elements) => {
            match elements.len() {
                count @ 0..15 => out.push((count as u8) << 4 | kind),
                count => {
                    out.push(0xf0 | kind);
                    write_varint(out, count as u64);
                }
            }
            for element in elements {
                write_value(out, element, true);
            }
        }
        Value::Struct(fields) => write_fields(out, fields),
    }
}

fn write_fields(out: &mut Vec<u8>, fields: &Fields) {
    let mut last = 0;
    for (id, value) in &fields.0 {
        match id - last {
            delta @ 1..16 => out.push((delta as u8) << 4 | value.kind()),
            _ => {
                out.push(value.kind());
                write_zigzag(out, *id);
            }
        }
        write_value(out, value, false);
        last = *id;
    }
    out.push(0);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
    use parquet::arrow::ArrowWriter;

    use super::*;

    #[test]
    fn what_is_not_touched_is_written_as_it_was_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.parquet");
        let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(0..100));
        let texts: ArrayRef = Arc::new(StringArray::from_iter(
            (0..100).map(|i| (i % 3 > 0).then(|| format!("t{i}"))),
        ));
        let batch = RecordBatch::try_from_iter([("id", ids), ("text", texts)]).unwrap();
        let file = std::fs::File::create(&path).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let before = std::fs::read(&path).unwrap();
        let mut footer = Footer::read(&path).unwrap();
        footer.save().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), before);

        let nulls = footer.statistics(0, "text").get(3).cloned();
        assert_eq!(nulls, Some(Value::I64(34)));
        footer.statistics(0, "text").remove(&[3]);
        // An id that is far from the one before it.
        footer
            .element("id")
            .set(2555, Value::Struct(Fields::default()));
        footer.save().unwrap();
        let mut again = Footer::read(&path).unwrap();
        assert_eq!(again.metadata(), footer.metadata());
        assert_eq!(again.statistics(0, "text").get(3), None);
        assert_eq!(again.row_groups(), 1);
    }
}
