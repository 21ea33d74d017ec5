use std::sync::Arc;

use arrow::array::*;
use arrow::buffer::{Buffer, MutableBuffer};
use arrow::datatypes::*;
use proptest::prelude::*;

use super::*;
use crate::{Chunk, FORM_ARROW, encode_arrow};

/// Bytes at a 64-byte boundary, as they are in a segment.
pub(crate) fn aligned(bytes: &[u8]) -> Bytes {
    let mut buffer = MutableBuffer::with_capacity(bytes.len());
    buffer.extend_from_slice(bytes);
    let buffer: Buffer = buffer.into();
    struct Owned(Buffer);
    impl AsRef<[u8]> for Owned {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    Bytes::from_owner(Owned(buffer))
}

fn packed(array: &ArrayRef) -> PackedChunk {
    let bytes = aligned(&encode_packed(std::slice::from_ref(array), array.data_type()).unwrap());
    validate_packed(bytes.clone(), array.data_type()).unwrap();
    PackedChunk::open(bytes, array.data_type()).unwrap()
}

/// Blocks, filtered blocks and statistics of a packed array are those of the array.
fn assert_reads_back(array: &ArrayRef) {
    let chunk = packed(array);
    assert_eq!(chunk.rows(), array.len());
    let mut at = 0;
    for block in 0..chunk.blocks() {
        let rows = chunk.block_rows(block);
        let expected = array.slice(at, rows);
        let found = chunk.block(block).unwrap();
        assert_eq!(&found, &expected, "{}", chunk.encoding());
        found.to_data().validate_full().unwrap();
        for step in [1, 2, 5, 61, 700] {
            let keep = BooleanBuffer::from_iter((0..rows).map(|row| row % step == step / 2));
            let found = chunk.filtered(block, &keep).unwrap();
            let keep = BooleanArray::new(keep, None);
            let expected = arrow::compute::filter(&expected, &keep).unwrap();
            assert_eq!(&found, &expected, "{} every {step}", chunk.encoding());
        }
        at += rows;
    }
    assert_eq!(at, array.len());
    assert_eq!(chunk.statistics().null_count, array.logical_null_count());
}

fn integer_types() -> Vec<DataType> {
    use DataType::*;
    vec![
        Int8,
        Int16,
        Int32,
        Int64,
        UInt8,
        UInt16,
        UInt32,
        UInt64,
        Date32,
        Date64,
        Time32(TimeUnit::Second),
        Time64(TimeUnit::Nanosecond),
        Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        Duration(TimeUnit::Millisecond),
        Decimal32(9, 2),
        Decimal64(18, 2),
        Decimal128(38, 2),
        Decimal256(76, 2),
    ]
}

/// The values as integers of a type, cut to what it holds.
fn integers(values: &[Option<i128>], data_type: &DataType) -> ArrayRef {
    let wide = Decimal256Array::from_iter(values.iter().map(|v| v.map(i256::from_i128)));
    match data_type {
        DataType::Decimal256(p, s) => Arc::new(wide.with_precision_and_scale(*p, *s).unwrap()),
        _ => {
            let width = data_type.primitive_width().unwrap();
            let mut bytes = MutableBuffer::new(values.len() * width);
            for value in values {
                bytes.extend_from_slice(&value.unwrap_or(77).to_le_bytes()[..width]);
            }
            let nulls = NullBuffer::from_iter(values.iter().map(|v| v.is_some()));
            let nulls = Some(nulls).filter(|n| n.null_count() > 0);
            integers::array(data_type, values.len(), bytes.into(), nulls).unwrap()
        }
    }
}

fn values() -> impl Strategy<Value = Vec<Option<i128>>> {
    let value = prop_oneof![
        6 => (-40i128..60).boxed(),
        2 => any::<i32>().prop_map(i128::from).boxed(),
        1 => any::<i128>().boxed(),
        1 => prop::sample::select(vec![i128::MIN, i128::MAX, i64::MIN.into(), i64::MAX.into(), 0, -1]).boxed(),
    ];
    let some = prop::collection::vec(prop::option::weighted(0.9, value), 0..300);
    (some, prop::sample::select(vec![1usize, 1, 1, 40])).prop_map(|(values, times)| {
        let all: Vec<_> = std::iter::repeat_n(values, times).flatten().collect();
        all
    })
}

/// Operands to compare the values of an array with: some of its own, and some beside them.
fn operands(array: &ArrayRef) -> Vec<Scalar<ArrayRef>> {
    let mut operands: Vec<ArrayRef> = (0..array.len())
        .step_by((array.len() / 4).max(1))
        .map(|at| array.slice(at, 1))
        .collect();
    if integers::width(array.data_type()).is_some() {
        for value in [i128::MIN, -1, 0, 1, 9, 1000, i128::MAX] {
            operands.push(integers(&[Some(value)], array.data_type()));
        }
    }
    match array.data_type() {
        DataType::Float64 => {
            for value in [f64::NAN, -0.0, 0.0, 0.25, f64::INFINITY, -f64::NAN] {
                operands.push(Arc::new(Float64Array::from(vec![value])));
            }
        }
        DataType::Utf8View => {
            for value in ["", "a", "word 3", "word number seventeen", "\u{10ffff}"] {
                operands.push(Arc::new(StringViewArray::from(vec![value])));
            }
        }
        _ => {}
    }
    operands.push(new_null_array(array.data_type(), 1));
    operands.into_iter().map(Scalar::new).collect()
}

/// Pieces of text to look for: of the values, and others.
fn pieces(array: &ArrayRef) -> Vec<Comparison> {
    let Some(values) = array.as_string_view_opt() else {
        return vec![];
    };
    let mut pieces: Vec<String> = ["", "a", "aa", "abab", "ä", "word 1", "\u{10ffff}"]
        .map(str::to_owned)
        .to_vec();
    for value in values.iter().flatten().step_by((array.len() / 6).max(1)) {
        let characters: Vec<char> = value.chars().collect();
        let third = characters.len() / 3;
        pieces.push(value.to_owned());
        pieces.push(characters[third..characters.len() - third].iter().collect());
        pieces.push(characters[third..].iter().collect());
    }
    let pieces = pieces.into_iter();
    pieces
        .flat_map(|text| {
            let twice = vec![text.clone(), text.clone()];
            [false, true].into_iter().flat_map(move |negated| {
                [vec![text.clone()], twice.clone()]
                    .map(|texts| Comparison::Contains { texts, negated })
            })
        })
        .collect()
}

/// Every predicate on packed values says what Arrow's kernels say of the array.
fn assert_compares(array: &ArrayRef) {
    let chunk = Chunk::Packed(packed(array));
    let operands = operands(array);
    let operators = [
        Operator::Eq,
        Operator::NotEq,
        Operator::Lt,
        Operator::LtEq,
        Operator::Gt,
        Operator::GtEq,
    ];
    let mut comparisons = vec![Comparison::IsNull, Comparison::IsNotNull];
    for (at, value) in operands.iter().enumerate() {
        for op in operators {
            comparisons.push(Comparison::Compare {
                op,
                value: value.clone(),
            });
        }
        let bound = |op, value: &Scalar<ArrayRef>| Comparison::Compare {
            op,
            value: value.clone(),
        };
        let other = &operands[(at + 2) % operands.len()];
        for (low, high) in [
            (Operator::GtEq, Operator::Lt),
            (Operator::Gt, Operator::LtEq),
            (Operator::NotEq, Operator::LtEq),
        ] {
            comparisons.push(Comparison::All(vec![bound(low, value), bound(high, other)]));
        }
    }
    let lists: Vec<ArrayRef> = operands.iter().map(|v| v.clone().into_inner()).collect();
    for lists in [
        &lists[..],
        &lists[..lists.len().min(2)],
        &lists[lists.len() - 1..],
    ] {
        let lists: Vec<&dyn Array> = lists.iter().map(|list| list.as_ref()).collect();
        comparisons.push(Comparison::In {
            values: arrow::compute::concat(&lists).unwrap(),
        });
    }
    let is_odd = |values: &ArrayRef| {
        let hashes = (0..values.len())
            .map(|at| values.is_null(at) || format!("{:?}", values.slice(at, 1)).len() % 2 == 1);
        Some(BooleanArray::from_iter(hashes.map(Some)))
    };
    comparisons.push(Comparison::OnDictionary(Arc::new(is_odd)));
    comparisons.extend(pieces(array));
    for comparison in &comparisons {
        let prepared = chunk.prepare(comparison);
        if let Comparison::Compare {
            op: Operator::Eq,
            value,
        } = comparison
        {
            let exists = kernel(comparison, array).true_count() > 0;
            assert!(!exists || chunk.may_contain(value), "{value:?}");
            if exists {
                assert!(prepared.as_ref().is_none_or(|p| !p.is_never()));
            }
        }
        let Some(prepared) = prepared else {
            continue;
        };
        let mut at = 0;
        for block in 0..chunk.blocks() {
            let part = array.slice(at, chunk.block_rows(block));
            at += part.len();
            let expected = kernel(comparison, &part);
            let found = prepared.evaluate(block).unwrap();
            assert_eq!(found.len(), expected.len());
            for row in 0..part.len() {
                assert_eq!(
                    found.value(row),
                    expected.is_valid(row) && expected.value(row),
                    "{comparison:?} of {:?}, {}",
                    part.slice(row, 1),
                    chunk.encoding()
                );
            }
        }
    }
}

/// As a pattern of `LIKE` that nothing but this text matches.
fn escaped(text: &str) -> String {
    let special = |c: char| ['%', '_', '\\'].contains(&c);
    let escape = |c| [special(c).then_some('\\'), Some(c)];
    text.chars().flat_map(escape).flatten().collect()
}

/// Floats as SQL compares them.
fn zeros_alike(values: ArrayRef) -> ArrayRef {
    match values.data_type() {
        DataType::Float32 => Arc::new(
            values
                .as_primitive::<Float32Type>()
                .unary::<_, Float32Type>(|v| v + 0.0),
        ),
        DataType::Float64 => Arc::new(
            values
                .as_primitive::<Float64Type>()
                .unary::<_, Float64Type>(|v| v + 0.0),
        ),
        _ => values,
    }
}

/// Somebody may choose values that all have one hash: then there is no dictionary of them.
#[test]
fn values_of_one_hash_have_no_dictionary() {
    let low = 0x9e37_79b9_7f4a_7c15_i128;
    let value = |i: i32| (i128::from(i % 5000) << 64) | low;
    let mut distinct = dictionary::Distinct::new();
    distinct.block((0..BLOCK_ROWS as i32).map(value), None);
    assert!(distinct.is_flooded);
    assert!(distinct.values.len() < 2000, "{}", distinct.values.len());
    let array = Decimal128Array::from_iter_values((0..20_000).map(value));
    let array: ArrayRef = Arc::new(array.with_precision_and_scale(38, 0).unwrap());
    assert_reads_back(&array);
}

/// A header may claim any number of values.
#[test]
fn a_dictionary_of_too_many_values_is_refused() {
    let texts = (0..3000).map(|i| format!("word {}", i % 30));
    let array: ArrayRef = Arc::new(StringViewArray::from_iter_values(texts));
    let bytes = encode_packed(std::slice::from_ref(&array), array.data_type()).unwrap();
    let count = 30u32.to_le_bytes();
    let places = bytes[..128].windows(4).enumerate();
    let places: Vec<usize> = places
        .filter_map(|(at, word)| (word == count).then_some(at))
        .collect();
    assert!(!places.is_empty());
    for at in places {
        let mut hostile = bytes.clone();
        hostile[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        let chunk = PackedChunk::open(aligned(&hostile), array.data_type());
        assert!(chunk.and_then(|chunk| chunk.block(0)).is_err());
    }
}

/// Whatever the encoding: a constant, a dictionary, values as they are.
#[test]
fn both_zeros_are_the_same_to_a_comparison() {
    let many = (0..3000).map(|i| [-0.0, f64::from(i) / 3.0][(i % 2) as usize]);
    let arrays: [Vec<f64>; 3] = [
        vec![-0.0; 3000],
        [-0.0, 1.5, 0.0].repeat(1000),
        many.collect(),
    ];
    for values in arrays {
        let array: ArrayRef = Arc::new(Float64Array::from(values.clone()));
        let chunk = packed(&array);
        for zero in [0.0, -0.0] {
            let value = || Scalar::new(Arc::new(Float64Array::from(vec![zero])) as ArrayRef);
            assert!(chunk.may_contain(&value()));
            type Holds = fn(f64) -> bool;
            let expected: [(Operator, Holds); 6] = [
                (Operator::Eq, |v| v == 0.0),
                (Operator::NotEq, |v| v != 0.0),
                (Operator::Lt, |v| v < 0.0),
                (Operator::LtEq, |v| v <= 0.0),
                (Operator::Gt, |v| v > 0.0),
                (Operator::GtEq, |v| v >= 0.0),
            ];
            for (op, holds) in expected {
                let comparison = Comparison::Compare { op, value: value() };
                let Some(prepared) = chunk.prepare(&comparison) else {
                    continue;
                };
                let expected = BooleanBuffer::from_iter(values.iter().map(|v| holds(*v)));
                assert_eq!(prepared.evaluate(0).unwrap(), expected, "{op:?} {zero}");
            }
        }
    }
}

fn kernel(comparison: &Comparison, values: &ArrayRef) -> BooleanArray {
    use arrow::compute::kernels::cmp;
    match comparison {
        Comparison::Compare { op, value } => {
            let value = Scalar::new(zeros_alike(value.clone().into_inner()));
            let values = &zeros_alike(Arc::clone(values));
            match op {
                Operator::Eq => cmp::eq(values, &value),
                Operator::NotEq => cmp::neq(values, &value),
                Operator::Lt => cmp::lt(values, &value),
                Operator::LtEq => cmp::lt_eq(values, &value),
                Operator::Gt => cmp::gt(values, &value),
                Operator::GtEq => cmp::gt_eq(values, &value),
            }
            .unwrap()
        }
        Comparison::All(all) => {
            let mut hits = BooleanArray::new(BooleanBuffer::new_set(values.len()), None);
            for comparison in all {
                hits = arrow::compute::and_kleene(&hits, &kernel(comparison, values)).unwrap();
            }
            hits
        }
        Comparison::In { values: list } => {
            let mut hits = BooleanArray::new(BooleanBuffer::new_unset(values.len()), None);
            for at in (0..list.len()).filter(|at| list.is_valid(*at)) {
                let one = Scalar::new(list.slice(at, 1));
                hits = arrow::compute::or_kleene(&hits, &cmp::eq(values, &one).unwrap()).unwrap();
            }
            hits
        }
        Comparison::Contains { texts, negated } => {
            let hits = match texts.as_slice() {
                [text] => arrow::compute::contains(values, &StringViewArray::new_scalar(text)),
                texts => {
                    let escaped = texts.iter().map(|text| escaped(text));
                    let pattern = format!("%{}%", escaped.collect::<Vec<_>>().join("%"));
                    arrow::compute::like(values, &StringViewArray::new_scalar(pattern))
                }
            };
            let hits = hits.unwrap();
            match negated {
                true => arrow::compute::not(&hits).unwrap(),
                false => hits,
            }
        }
        Comparison::IsNull => arrow::compute::is_null(values).unwrap(),
        Comparison::IsNotNull => arrow::compute::is_not_null(values).unwrap(),
        Comparison::OnDictionary(evaluate) => evaluate(values).unwrap(),
    }
}

fn floats(values: &[Option<i128>]) -> Vec<ArrayRef> {
    let specials = [
        f64::NAN,
        -f64::NAN,
        -0.0,
        f64::INFINITY,
        f64::MIN_POSITIVE,
        0.1 + 0.2,
    ];
    let double = |v: i128, most: i128| match v.rem_euclid(most) {
        7 => specials[(v / most).rem_euclid(6) as usize],
        _ => (v as i64 as f64) / 100.0,
    };
    let of = |most| {
        let doubles = values.iter().map(|v| v.map(|v| double(v, most)));
        Float64Array::from_iter(doubles)
    };
    let (many, few) = (of(8), of(i128::MAX));
    let narrow =
        |array: &Float64Array| Float32Array::from_iter(array.iter().map(|v| v.map(|v| v as f32)));
    let thirds = few.iter().map(|v| v.map(|v| v / 3.0));
    vec![
        Arc::new(narrow(&many)),
        Arc::new(narrow(&few)),
        Arc::new(Float64Array::from_iter(thirds)),
        Arc::new(many),
        Arc::new(few),
    ]
}

fn texts(values: &[Option<i128>]) -> Vec<ArrayRef> {
    let words = values.iter().map(|v| v.map(|v| format!("word {}", v % 30)));
    let unique = values.iter().enumerate().map(|(at, v)| {
        v.map(|v| match v.rem_euclid(5) {
            0 => String::new(),
            1 => format!("ä{v}"),
            _ => format!("the value number {at} is {v} and some words more"),
        })
    });
    let noise = values.iter().enumerate().map(|(at, v)| {
        v.map(|v| {
            (v ^ (at as i128) << 70)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_ac1d)
                .to_le_bytes()
        })
    });
    let noise: Vec<_> = noise.collect();
    let constant = values.iter().map(|_| Some("always the same words"));
    vec![
        Arc::new(StringViewArray::from_iter(words.clone())),
        Arc::new(BinaryViewArray::from_iter(words)),
        Arc::new(StringViewArray::from_iter(unique.clone())),
        Arc::new(BinaryViewArray::from_iter(unique)),
        Arc::new(BinaryViewArray::from_iter(
            noise.iter().map(|v| v.as_ref().map(|v| &v[..])),
        )),
        Arc::new(StringViewArray::from_iter(constant)),
    ]
}

/// Types that are plain inside, and booleans.
fn others(values: &[Option<i128>]) -> Vec<ArrayRef> {
    let longs = Int64Array::from_iter(values.iter().map(|v| v.map(|v| v as i64)));
    let booleans = BooleanArray::from_iter(values.iter().map(|v| v.map(|v| v % 3 == 0)));
    let lists = ListArray::from_iter_primitive::<Int32Type, _, _>(
        values
            .iter()
            .map(|v| v.map(|v| (0..v.rem_euclid(4) as i32).map(Some).collect::<Vec<_>>())),
    );
    let strings = StringArray::from_iter(values.iter().map(|v| v.map(|v| v.to_string())));
    let fixed = FixedSizeBinaryArray::try_from_sparse_iter_with_size(
        values.iter().map(|v| v.map(|v| v.to_le_bytes())),
        16,
    );
    let fields = Fields::from(vec![
        Field::new("a", DataType::Int64, true),
        Field::new("b", DataType::Boolean, true),
    ]);
    let nested: Vec<ArrayRef> = vec![Arc::new(longs), Arc::new(booleans.clone())];
    let intervals = values
        .iter()
        .map(|v| v.map(|v| IntervalMonthDayNano::new(v as i32, (v % 3) as i32, v as i64)));
    vec![
        Arc::new(booleans),
        Arc::new(lists),
        Arc::new(strings),
        Arc::new(fixed.unwrap()),
        Arc::new(StructArray::new(fields, nested, None)),
        Arc::new(IntervalMonthDayNanoArray::from_iter(intervals)),
        Arc::new(BooleanArray::from(vec![Some(true); values.len()])),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_floats_read_back(values in values()) {
        for array in floats(&values) {
            assert_reads_back(&array);
        }
    }

    #[test]
    fn any_text_reads_back(values in values()) {
        for array in texts(&values) {
            assert_reads_back(&array);
        }
    }

    #[test]
    fn any_other_values_read_back(values in values()) {
        for array in others(&values) {
            assert_reads_back(&array);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn any_comparison_of_integers_is_that_of_arrow(values in values()) {
        for data_type in integer_types() {
            assert_compares(&integers(&values, &data_type));
        }
    }

    #[test]
    fn any_comparison_of_floats_and_text_is_that_of_arrow(values in values()) {
        for array in floats(&values).iter().chain(&texts(&values)) {
            assert_compares(array);
        }
        assert_compares(&(Arc::new(BooleanArray::from_iter(values.iter().map(|v| v.map(|v| v % 3 == 0)))) as ArrayRef));
    }

    /// Occurrences overlap, end values, and reach over their ends here.
    #[test]
    fn any_text_is_found_where_it_is(
        values in prop::collection::vec(prop::option::weighted(0.95, "[ab]{0,30}"), 1..2500),
        noise in prop::option::weighted(0.5, prop::collection::vec("[ -~]{0,12}", 2500)),
    ) {
        let values = values.iter().enumerate().map(|(at, value)| match (value, &noise) {
            (Some(value), Some(noise)) => Some(format!("{value}{}", noise[at])),
            (value, _) => value.clone(),
        });
        let array: ArrayRef = Arc::new(StringViewArray::from_iter(values));
        let chunk = Chunk::Packed(packed(&array));
        let bytes = encode_arrow(std::slice::from_ref(&array), array.data_type()).unwrap();
        let plain = Chunk::open(FORM_ARROW, aligned(&bytes), array.data_type()).unwrap();
        for texts in [
            "a", "ab", "aa", "aba", "bbb", "aabaa", "abababab", "b ", "!", "baz",
            "a%b", "ab%ba", "aa%a", "bbb%a%bb", "aabaa%aa", "!%a", "ab%baz",
        ] {
            for negated in [false, true] {
                let texts = texts.split('%').map(str::to_owned).collect();
                let comparison = Comparison::Contains { texts, negated };
                let Some(prepared) = chunk.prepare(&comparison) else {
                    panic!("{comparison:?} in {}", chunk.encoding());
                };
                let expected = kernel(&comparison, &array);
                let expected: BooleanBuffer = expected.iter().map(|hit| hit == Some(true)).collect();
                prop_assert_eq!(prepared.evaluate(0).unwrap(), expected.clone(), "{:?}", comparison);
                if let Some(prepared) = plain.prepare(&comparison) {
                    prop_assert_eq!(prepared.evaluate(0).unwrap(), expected, "{:?}", comparison);
                }
            }
        }
    }

    #[test]
    fn damage_is_an_error_and_never_a_panic(
        values in values(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut arrays = floats(&values);
        arrays.extend(texts(&values));
        arrays.extend(others(&values));
        arrays.push(integers(&values, &DataType::Decimal128(38, 2)));
        arrays.push(integers(&values, &DataType::Int32));
        for array in arrays {
            let mut bytes = encode_packed(std::slice::from_ref(&array), array.data_type()).unwrap();
            for (at, with) in &damage {
                let at = at.index(bytes.len());
                bytes[at] ^= with;
            }
            exercise(aligned(&bytes), array.data_type());
        }
    }
}

/// Does all that a reader does; whatever it finds is fine, as long as it returns.
fn exercise(bytes: Bytes, data_type: &DataType) {
    let valid = validate_packed(bytes.clone(), data_type).is_ok();
    let Ok(chunk) = PackedChunk::open(bytes, data_type) else {
        return;
    };
    let _ = (chunk.encoding(), chunk.statistics(), chunk.zones());
    for block in 0..chunk.blocks().min(4) {
        let rows = chunk.block_rows(block);
        let values = chunk.block(block);
        assert!(!valid || values.is_ok());
        let keep = BooleanBuffer::from_iter((0..rows).map(|row| row % 9 == 1));
        let _ = chunk.filtered(block, &keep);
        let null = Scalar::new(new_null_array(data_type, 1));
        for comparison in [
            Comparison::IsNull,
            Comparison::Compare {
                op: Operator::GtEq,
                value: null,
            },
            Comparison::OnDictionary(Arc::new(|values: &ArrayRef| {
                Some(BooleanArray::from(vec![true; values.len()]))
            })),
            Comparison::Contains {
                texts: vec!["a".to_owned()],
                negated: false,
            },
            Comparison::Contains {
                texts: vec!["a".to_owned(), "b".to_owned()],
                negated: true,
            },
        ] {
            if let Some(prepared) = chunk.prepare(&comparison) {
                let _ = prepared.evaluate(block);
            }
        }
    }
}

#[test]
fn the_encoding_follows_the_values() {
    let rows = 40_000i64;
    let noise = |i: i64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15_u64 as i64);
    let cases: Vec<(&str, ArrayRef)> = vec![
        (
            "constant",
            Arc::new(Int64Array::from_iter_values((0..rows).map(|_| 5))),
        ),
        (
            "integers",
            Arc::new(Int64Array::from_iter_values(
                (0..rows).map(|i| i * 7 % 1000),
            )),
        ),
        (
            "dictionary of 13",
            Arc::new(Int64Array::from_iter_values(
                (0..rows).map(|i| noise(noise(i).rem_euclid(13))),
            )),
        ),
        (
            "floats",
            Arc::new(Float64Array::from_iter_values(
                (0..rows).map(|i| (i * 7 % 9973) as f64 / 100.0),
            )),
        ),
        (
            "plain",
            Arc::new(Float64Array::from_iter_values(
                (0..rows).map(|i| f64::from_bits(noise(i) as u64 >> 2)),
            )),
        ),
        (
            "dictionary of 30",
            Arc::new(StringViewArray::from_iter_values(
                (0..rows).map(|i| format!("word {}", i % 30)),
            )),
        ),
        (
            "compressed text",
            Arc::new(StringViewArray::from_iter_values(
                (0..rows).map(|i| format!("some words and the number {i}")),
            )),
        ),
        (
            "text",
            Arc::new(BinaryViewArray::from_iter_values(
                (0..rows).map(|i| noise(noise(i)).to_le_bytes()),
            )),
        ),
        (
            "bits",
            Arc::new(BooleanArray::from_iter((0..rows).map(|i| Some(i % 3 == 0)))),
        ),
        (
            "constant",
            new_null_array(&DataType::Utf8View, rows as usize),
        ),
    ];
    for (expected, array) in cases {
        let chunk = packed(&array);
        assert!(
            chunk.encoding().starts_with(expected),
            "{} is not {expected}",
            chunk.encoding()
        );
        assert_reads_back(&array);
        assert_compares(&array.slice(0, 3000));
    }
}

#[test]
fn views_of_a_dictionary_point_into_the_chunk() {
    let count = if cfg!(miri) { 500 } else { 20_000 };
    let words = (0..count).map(|i| format!("a word longer than twelve bytes {}", i % 9));
    let array: ArrayRef = Arc::new(StringViewArray::from_iter_values(words));
    let bytes = aligned(&encode_packed(std::slice::from_ref(&array), &DataType::Utf8View).unwrap());
    let inside = bytes.as_ptr_range();
    let chunk = PackedChunk::open(bytes.clone(), &DataType::Utf8View).unwrap();
    for block in 0..chunk.blocks() {
        let found = chunk.block(block).unwrap();
        let buffers = found.as_string_view().data_buffers();
        assert!(inside.contains(&buffers[0].as_ptr()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_integers_read_back(values in values()) {
        for data_type in integer_types() {
            assert_reads_back(&integers(&values, &data_type));
        }
    }
}

#[test]
fn chunks_of_any_size_read_back() {
    for rows in [0, 1, 2, 1023, 1024, 1025, 8191, 8192, 8193, 20_000] {
        let some: ArrayRef = Arc::new(Int32Array::from_iter(
            (0..rows).map(|i| (i % 7 != 3).then_some(i * 31 % 1000)),
        ));
        assert_reads_back(&some);
        assert_reads_back(&new_null_array(&DataType::Int32, rows as usize));
        assert_reads_back(&new_null_array(&DataType::Null, rows as usize));
    }
}

/// What reads without checks of its own, small enough for an interpreter that sees every access.
#[test]
fn text_of_every_encoding_reads_back_and_is_searched() {
    let count = if cfg!(miri) { 300 } else { 20_000 };
    let of = |value: &dyn Fn(usize) -> String| -> ArrayRef {
        let values = (0..count).map(|i| (i % 11 != 5).then(|| value(i)));
        Arc::new(StringViewArray::from_iter(values))
    };
    let whole = (0..count).map(|i| format!("no nulls {i}, com of 1{i}1"));
    let arrays: [ArrayRef; 4] = [
        Arc::new(StringViewArray::from_iter_values(whole)),
        of(&|i| {
            format!(
                "{}{}",
                "common words in all of them ".repeat(i % 3),
                i * 7919 % 10_007
            )
        }),
        of(&|i| "short".chars().cycle().skip(i % 5).take(i % 7).collect()),
        of(&|i| {
            char::from_u32(0x400 + (i * 31 % 199) as u32)
                .unwrap_or('x')
                .to_string()
                .repeat(9)
        }),
    ];
    for array in &arrays {
        let chunk = Chunk::Packed(packed(array));
        let bytes = encode_arrow(std::slice::from_ref(array), array.data_type()).unwrap();
        let plain = Chunk::open(FORM_ARROW, aligned(&bytes), array.data_type()).unwrap();
        let keep: BooleanBuffer = (0..chunk.block_rows(0)).map(|row| row % 9 == 1).collect();
        let kept = BooleanArray::new(keep.clone(), None);
        let first = array.slice(0, chunk.block_rows(0));
        assert_eq!(&chunk.block(0).unwrap(), &first, "{}", chunk.encoding());
        let expected = arrow::compute::filter(&first, &kept).unwrap();
        assert_eq!(&chunk.filtered(0, &keep).unwrap(), &expected);
        for texts in ["words", "o", "com%of", "1%1"] {
            let texts = texts.split('%').map(str::to_owned).collect();
            let comparison = Comparison::Contains {
                texts,
                negated: false,
            };
            let expected = kernel(&comparison, &first);
            let expected: BooleanBuffer = expected.iter().map(|hit| hit == Some(true)).collect();
            for chunk in [&chunk, &plain] {
                if let Some(test) = chunk.prepare(&comparison) {
                    assert_eq!(test.evaluate(0).unwrap(), expected, "{comparison:?}");
                }
            }
        }
    }
}

#[test]
fn a_chunk_opens_in_the_form_it_has() {
    let array: ArrayRef = Arc::new(Int64Array::from_iter_values(0..10_000));
    let arrays = std::slice::from_ref(&array);
    for (form, bytes) in [
        (
            crate::FORM_ARROW,
            crate::encode_arrow(arrays, &DataType::Int64).unwrap(),
        ),
        (
            crate::FORM_PACKED,
            encode_packed(arrays, &DataType::Int64).unwrap(),
        ),
    ] {
        let chunk = Chunk::open(form, aligned(&bytes), &DataType::Int64).unwrap();
        assert_eq!(
            (chunk.form(), chunk.rows(), chunk.blocks()),
            (form, 10_000, 2)
        );
        assert_eq!(&chunk.block(1).unwrap(), &array.slice(8192, 1808));
        let statistics = chunk.statistics();
        let bound = |b: &Option<Scalar<ArrayRef>>| {
            let (array, _) = b.as_ref().unwrap().get();
            array.as_primitive::<Int64Type>().value(0)
        };
        assert!(statistics.exact);
        assert_eq!((bound(&statistics.min), bound(&statistics.max)), (0, 9999));
        let distinct = statistics.distinct.as_ref().unwrap().estimate();
        assert!((9000..11_000).contains(&distinct), "{distinct}");
        let zones = chunk.zones().unwrap();
        assert_eq!(zones.mins.as_primitive::<Int64Type>().values(), &[0, 8192]);
        assert_eq!(
            zones.maxs.as_primitive::<Int64Type>().values(),
            &[8191, 9999]
        );
        assert_eq!(zones.row_counts.values(), &[8192, 1808]);
        let scalar = |v| Scalar::new(Arc::new(Int64Array::from(vec![v])) as ArrayRef);
        assert!(chunk.may_contain(&scalar(5)) && !chunk.may_contain(&scalar(-1)));
    }
    let error = Chunk::open(3, aligned(&[]), &DataType::Int64).unwrap_err();
    assert_eq!(
        error.to_string(),
        "form 3 has no chunks to open; expected 1 (arrow) or 2 (packed)"
    );
}

/// One chunk of every encoding, whose bytes are kept: a change of the format shows, and so does a
/// codec that writes the same values in other bytes.
fn golden() -> Vec<(&'static str, ArrayRef)> {
    let rows = 9000i64;
    let noise = |i: i64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15_u64 as i64);
    let some = |i: &i64| i % 11 != 5;
    let decimals = Decimal128Array::from_iter((0..rows).map(|i| {
        Some(i)
            .filter(some)
            .map(|i| i128::from(noise(i) as u16) - 9000)
    }));
    let sorted = (0..rows).map(|i| i * 40 + noise(i).rem_euclid(7));
    let runs = (0..rows).map(|i| noise(i / 100) >> 40);
    let repeated = (0..rows).map(|i| noise(noise(i).rem_euclid(13)));
    let floats = (0..rows).map(|i| match i % 1000 {
        17 => f64::NAN,
        _ => noise(i).rem_euclid(9973) as f64 / 100.0,
    });
    let words = (0..rows).map(|i| Some(format!("word {}", noise(i).rem_euclid(30))));
    let text = (0..rows).map(|i| {
        Some(i)
            .filter(some)
            .map(|i| format!("some words and the number {i}"))
    });
    let random = (0..rows).map(|i| noise(noise(i)).to_le_bytes());
    vec![
        (
            "plain",
            Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(
                (0..40).map(|i| Some((0..i % 3).map(Some).collect::<Vec<_>>())),
            )),
        ),
        (
            "constant",
            Arc::new(Int32Array::from(vec![42; rows as usize])),
        ),
        (
            "bits",
            Arc::new(BooleanArray::from_iter(
                (0..rows).map(|i| Some(i).filter(some).map(|i| i % 3 == 0)),
            )),
        ),
        (
            "integers",
            Arc::new(decimals.with_precision_and_scale(15, 2).unwrap()),
        ),
        (
            "differences",
            Arc::new(Int64Array::from_iter_values(sorted)),
        ),
        ("runs", Arc::new(Int64Array::from_iter_values(runs))),
        (
            "dictionary",
            Arc::new(Int64Array::from_iter_values(repeated)),
        ),
        ("floats", Arc::new(Float64Array::from_iter_values(floats))),
        (
            "dictionary_of_text",
            Arc::new(StringViewArray::from_iter(words)),
        ),
        (
            "compressed_text",
            Arc::new(StringViewArray::from_iter(text)),
        ),
        ("text", Arc::new(BinaryViewArray::from_iter_values(random))),
    ]
}

#[test]
fn chunks_of_the_released_format_read_back_and_are_written_alike() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for (name, array) in golden() {
        let path = directory.join(format!("packed-1-{name}.bin"));
        let written = encode_packed(std::slice::from_ref(&array), array.data_type()).unwrap();
        if std::env::var_os("STOA_WRITE_GOLDEN").is_some() {
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(&path, &written).unwrap();
        }
        let kept = std::fs::read(&path).unwrap_or_else(|error| {
            panic!(
                "{}: {error}; written with STOA_WRITE_GOLDEN=1",
                path.display()
            )
        });
        let bytes = aligned(&kept);
        validate_packed(bytes.clone(), array.data_type()).unwrap();
        let chunk = PackedChunk::open(bytes, array.data_type()).unwrap();
        let mut at = 0;
        for block in 0..chunk.blocks() {
            let found = chunk.block(block).unwrap();
            assert_eq!(&found, &array.slice(at, found.len()), "{name}");
            at += found.len();
        }
        let encoding = name.split('_').next_back().unwrap_or(name);
        let expected = match name {
            "differences" | "runs" => "integers",
            "dictionary_of_text" => "dictionary",
            "compressed_text" => "compressed text",
            _ => encoding,
        };
        assert!(
            chunk.encoding().starts_with(expected),
            "{name}: {}",
            chunk.encoding()
        );
        assert!(
            kept == written,
            "{name} is written in other bytes than before"
        );
    }
}
