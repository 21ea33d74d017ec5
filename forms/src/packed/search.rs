//! Looking for pieces of text in a block of text, without unpacking it.
//!
//! In text as it is, by `memmem` over all values at once. In compressed text, by the automaton of
//! Knuth, Morris and Pratt ("Fast pattern matching in strings", 1977) with one step for a code
//! instead of one for a byte: what a symbol does to each state is worked out once a chunk.
//!
//! Both look at the values of a block as if they were one text. An occurrence that reaches over
//! the end of a value is found too, and told apart by looking at its value alone.
//!
//! Of several pieces, one behind the other, the first is looked for so; values that have it are
//! unpacked for the others.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{AsArray, BooleanBufferBuilder};
use arrow::buffer::BooleanBuffer;
use arrow::datatypes::DataType;
use memchr::memmem::Finder;

use super::bits::Scratch;
use super::text::{self, Block, ESCAPE, Symbols};
use crate::Result;
use crate::comparison::InOrder;

/// Longest text that is looked for in compressed text: with a state before and one within an
/// escape for each of its bytes, 7 bits tell states apart.
const NEEDLE_BYTES_MAX: usize = 63;
/// The flag of a step in which an occurrence ended.
const FOUND: u16 = 1 << 15;
/// Parts of a block that are looked through side by side: a step waits for the one before it.
const LANES: usize = 4;
/// Codes that a lane reads at once.
const WORD: usize = 8;

/// Texts to be looked for in the blocks of one chunk, each behind the one before it.
#[derive(Clone, Debug)]
pub(super) struct Search {
    first: First,
    all: Arc<InOrder>,
}

#[derive(Clone, Debug)]
enum First {
    /// In text as it is.
    Plain,
    /// In codes of the chunk's symbols.
    Compressed(Arc<Steps>),
}

impl Search {
    /// `None` where decoding and comparing is better: for nothing, or for very long texts.
    pub(super) fn new(texts: &[String], symbols: Option<&Symbols>) -> Option<Self> {
        let first = texts.first()?.as_bytes();
        if first.is_empty() || first.len() > NEEDLE_BYTES_MAX {
            return None;
        }
        Some(Self {
            first: match symbols {
                None => First::Plain,
                Some(symbols) => First::Compressed(Arc::new(Steps::new(first, symbols))),
            },
            all: Arc::new(InOrder::new(texts)),
        })
    }

    /// The values of a block that have the texts in them.
    ///
    /// # Errors
    /// [`crate::Error::Corrupt`] where the block's lengths do not fit its data, or what is unpacked
    /// is not what the block says.
    pub(super) fn rows(
        &self,
        block: &Block<'_>,
        symbols: Option<&Symbols>,
        scratch: &mut Scratch,
    ) -> Result<BooleanBuffer> {
        let starts = block.starts(scratch)?;
        let values = Values {
            data: block.values(),
            starts: &starts,
        };
        let mut hits = BooleanBufferBuilder::new(values.len());
        hits.append_n(values.len(), false);
        match &self.first {
            First::Plain => values.find(self.all.first(), |row| hits.set_bit(row, true)),
            First::Compressed(steps) => steps.find(&values, |row| hits.set_bit(row, true)),
        }
        let hits = hits.finish();
        if self.all.len() == 1 {
            return Ok(hits);
        }
        let rows: Vec<u32> = hits.set_indices_u32().collect();
        let views = block.gather(symbols, &rows, scratch)?;
        let found = text::array(&DataType::BinaryView, views.views, [views.data], None)?;
        let mut hits = BooleanBufferBuilder::new(values.len());
        hits.append_n(values.len(), false);
        for (row, value) in rows.iter().zip(found.as_binary_view().iter()) {
            let value = value.unwrap_or_default();
            hits.set_bit(*row as usize, self.all.are_in(value));
        }
        Ok(hits.finish())
    }
}

/// Values that lie one after the other: `starts` has the start of each, and the end of the last.
struct Values<'a> {
    data: &'a [u8],
    starts: &'a [u32],
}

impl<'a> Values<'a> {
    fn len(&self) -> usize {
        self.starts.len() - 1
    }

    fn range(&self, row: usize) -> Range<usize> {
        self.starts[row] as usize..self.starts[row + 1] as usize
    }

    fn value(&self, row: usize) -> &'a [u8] {
        &self.data[self.range(row)]
    }

    /// The value with the byte at `place`, which is not before value `from`.
    fn row_of(&self, place: usize, from: usize) -> usize {
        let mut row = from;
        while self.starts[row + 1] as usize <= place {
            row += 1;
        }
        row
    }

    fn find(&self, finder: &Finder<'_>, mut hit: impl FnMut(usize)) {
        let (mut from, mut row) = (0, 0);
        while let Some(found) = finder.find(&self.data[from..]) {
            let start = from + found;
            row = self.row_of(start, row);
            let end = self.range(row).end;
            from = if start + finder.needle().len() <= end {
                hit(row);
                end
            } else {
                start + 1
            };
        }
    }

    /// The first value that starts at `place` or behind it; the number of values where none does.
    fn first_at(&self, place: usize) -> usize {
        let starts = &self.starts[..self.len()];
        starts.partition_point(|start| (*start as usize) < place)
    }
}

/// The automaton: for each state and code the next state, and whether the text was found.
///
/// States 0 to n - 1 say how many bytes of the text, of n, the data end with; states n to 2n - 1
/// the same behind an escape.
pub(super) struct Steps {
    /// At `state << 8 | code`: the next state in bits 8 to 14, and [`FOUND`].
    next: Box<[u16; 1 << 15]>,
}

impl std::fmt::Debug for Steps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Steps").finish_non_exhaustive()
    }
}

impl Steps {
    fn new(needle: &[u8], symbols: &Symbols) -> Self {
        let borders = borders(needle);
        let feed = |mut state: usize, bytes: &[u8]| {
            let mut found = false;
            for byte in bytes {
                while state > 0 && needle[state] != *byte {
                    state = borders[state];
                }
                state += usize::from(needle[state] == *byte);
                if state == needle.len() {
                    found = true;
                    state = borders[state];
                }
            }
            ((state as u16) << 8) | if found { FOUND } else { 0 }
        };
        let mut next = vec![0u16; 1 << 15];
        let escapes = needle.len();
        for state in 0..escapes {
            for code in 0..=u8::MAX {
                let at = usize::from(code);
                next[(state << 8) | at] = match code {
                    ESCAPE => ((escapes + state) as u16) << 8,
                    code => {
                        let (symbol, length) = symbols.symbol(code);
                        feed(state, &symbol[..length])
                    }
                };
                next[((escapes + state) << 8) | at] = feed(state, &[code]);
            }
        }
        let next = next.into_boxed_slice().try_into();
        Self {
            next: next.unwrap_or_else(|_| unreachable!("it has that length")),
        }
    }

    #[inline(always)]
    fn step(&self, state: u16, code: u8) -> u16 {
        self.next[usize::from((state & !FOUND) | u16::from(code))]
    }

    /// Whether the text is in a value.
    fn is_in(&self, codes: &[u8]) -> bool {
        let mut state = 0;
        codes.iter().any(|code| {
            state = self.step(state, *code);
            state & FOUND != 0
        })
    }

    fn find(&self, values: &Values<'_>, mut hit: impl FnMut(usize)) {
        // Lanes begin with a value, so that no occurrence in one is cut.
        let firsts: [usize; LANES] =
            std::array::from_fn(|lane| values.first_at(values.data.len() * lane / LANES));
        let begin = |lane: usize| match firsts.get(lane) {
            Some(first) => values.starts[*first] as usize,
            None => values.data.len(),
        };
        let mut last = [None; LANES];
        let mut tell = |lane: usize, place: usize| {
            let row = values.row_of(place, last[lane].unwrap_or(firsts[lane]));
            if last[lane].replace(row) != Some(row) && self.is_in(values.value(row)) {
                hit(row);
            }
        };
        let lanes: [&[u8]; LANES] =
            std::array::from_fn(|lane| &values.data[begin(lane)..begin(lane + 1)]);
        let words = lanes.map(|lane| lane.as_chunks::<WORD>().0);
        let common = words.iter().map(|words| words.len()).min().unwrap_or(0);
        let mut states = [0u16; LANES];
        for at in 0..common {
            let mut codes = words.map(|words| u64::from_le_bytes(words[at]));
            for byte in 0..WORD {
                let mut any = 0;
                for (state, codes) in states.iter_mut().zip(&mut codes) {
                    *state = self.step(*state, *codes as u8);
                    *codes >>= 8;
                    any |= *state;
                }
                if any & FOUND != 0 {
                    for (lane, state) in states.iter().enumerate() {
                        if state & FOUND != 0 {
                            tell(lane, begin(lane) + at * WORD + byte);
                        }
                    }
                }
            }
        }
        for (lane, codes) in lanes.iter().enumerate() {
            let mut state = states[lane];
            for (at, code) in codes.iter().enumerate().skip(common * WORD) {
                state = self.step(state, *code);
                if state & FOUND != 0 {
                    tell(lane, begin(lane) + at);
                }
            }
        }
    }
}

/// For each length of a beginning of `needle`, the longest shorter beginning that ends it too.
fn borders(needle: &[u8]) -> Vec<usize> {
    let mut borders = vec![0; needle.len() + 1];
    let mut length = 0;
    for at in 1..needle.len() {
        while length > 0 && needle[length] != needle[at] {
            length = borders[length];
        }
        length += usize::from(needle[length] == needle[at]);
        borders[at + 1] = length;
    }
    borders
}
