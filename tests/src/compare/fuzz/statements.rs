//! Statements that are made up over made-up tables. Every answer is determined: a limit comes with an
//! order by the row's number.

use arrow::datatypes::DataType;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::super::answer::Agreement;
use super::tables::{PARTITION, Table};
use super::values::constant;

/// A statement and how answers to it have to agree.
#[derive(Clone, Debug)]
pub(super) struct Made {
    /// The statement.
    pub(super) sql: String,
    /// How the answers have to agree.
    pub(super) agreement: Agreement,
}

/// A column that can be asked for.
#[derive(Clone, Debug)]
struct Asked {
    name: String,
    of: DataType,
    numbers: u64,
}

const VALUES: Agreement = Agreement {
    ordered: false,
    exact: true,
};
const SUMS: Agreement = Agreement {
    ordered: false,
    exact: false,
};
const SORTED: Agreement = Agreement {
    ordered: true,
    exact: false,
};

/// Makes a statement up.
pub(super) fn make(rng: &mut StdRng, tables: &[Table]) -> Made {
    let Some(table) = tables.choose(rng) else {
        return Made {
            sql: "select 1".to_owned(),
            agreement: VALUES,
        };
    };
    let other = tables.choose(rng).unwrap_or(table);
    let made = match rng.random_range(0..14) {
        0..=2 => filtered(rng, table),
        3 | 4 => aggregated(rng, table),
        5 | 6 => grouped(rng, table),
        7 | 8 => sorted(rng, table),
        9 | 10 => joined(rng, table, other),
        11 | 12 => with_subquery(rng, table, other),
        _ => match rng.random_range(0..3) {
            0 => windows(rng, table),
            1 => together(rng, table, other),
            _ => limited(rng, table),
        },
    };
    Made {
        sql: made.0,
        agreement: made.1,
    }
}

fn filtered(rng: &mut StdRng, table: &Table) -> (String, Agreement) {
    let columns = some_columns(rng, table, 4);
    let filter = filter(rng, table);
    let list = columns.join(", ");
    (format!("select {list} from {}{filter}", table.name), VALUES)
}

fn aggregated(rng: &mut StdRng, table: &Table) -> (String, Agreement) {
    let list = aggregates(rng, table, 4, true).join(", ");
    let filter = if rng.random_bool(0.3) {
        String::new()
    } else {
        filter(rng, table)
    };
    (format!("select {list} from {}{filter}", table.name), SUMS)
}

fn grouped(rng: &mut StdRng, table: &Table) -> (String, Agreement) {
    let keys = some_columns(rng, table, 2);
    let list = aggregates(rng, table, 3, false).join(", ");
    let filter = filter(rng, table);
    let keys = keys.join(", ");
    let having = match rng.random_range(0..4) {
        0 => " having count(*) > 2",
        1 => " having max(id) > 30",
        _ => "",
    };
    let sql = format!(
        "select {keys}, {list} from {}{filter} group by {keys}{having}",
        table.name
    );
    (sql, SUMS)
}

fn sorted(rng: &mut StdRng, table: &Table) -> (String, Agreement) {
    let keys = some_columns(rng, table, 2);
    let keys = keys.iter().map(|key| {
        let direction = ["", " asc", " desc"].choose(rng).unwrap_or(&"");
        let nulls = ["", " nulls first", " nulls last"]
            .choose(rng)
            .unwrap_or(&"");
        format!("{key}{direction}{nulls}")
    });
    let keys: Vec<_> = keys.collect();
    let last = ["id", "id desc"].choose(rng).unwrap_or(&"id");
    let (filter, list) = (filter(rng, table), some_columns(rng, table, 3).join(", "));
    let limit = match rng.random_range(0..5) {
        0 => String::new(),
        1 => format!(
            " limit {} offset {}",
            rng.random_range(1..20),
            rng.random_range(0..30)
        ),
        _ => format!(" limit {}", rng.random_range(1..30)),
    };
    let sql = format!(
        "select id, {list} from {}{filter} order by {}, {last}{limit}",
        table.name,
        keys.join(", ")
    );
    (sql, SORTED)
}

fn joined(rng: &mut StdRng, left: &Table, right: &Table) -> (String, Agreement) {
    let kinds = [
        "join",
        "left join",
        "right join",
        "full join",
        "left semi join",
        "left anti join",
        "right semi join",
        "right anti join",
    ];
    let (one, other) = partners(rng, left, right);
    let kind = *kinds.choose(rng).unwrap_or(&"join");
    let mut on = format!("a.{one} = b.{other}");
    if rng.random_bool(0.3) {
        on.push_str(" and a.id <> b.id");
    }
    // Few enough rows on one side that no join grows beyond what there is time for.
    let bound = rng.random_range(1..40);
    let bounded = rng.random_range(0..2);
    let sides = [left, right].into_iter().enumerate().map(|(side, table)| {
        let name = &table.name;
        if side == bounded {
            format!("(select * from {name} where id < {bound})")
        } else if rng.random_bool(0.5) {
            format!("(select * from {name}{})", filter(rng, table))
        } else {
            name.clone()
        }
    });
    let sides: Vec<_> = sides.collect();
    let (list, agreement) = if kind.contains("semi") || kind.contains("anti") {
        let side = if kind.starts_with("left") { "a" } else { "b" };
        (format!("{side}.id"), VALUES)
    } else if rng.random_bool(0.5) {
        (
            "count(*), sum(a.id), min(b.id), count(b.id)".to_owned(),
            VALUES,
        )
    } else {
        ("a.id, b.id".to_owned(), VALUES)
    };
    let (a, b) = (&sides[0], &sides[1]);
    (
        format!("select {list} from {a} a {kind} {b} b on {on}"),
        agreement,
    )
}

fn with_subquery(rng: &mut StdRng, table: &Table, other: &Table) -> (String, Agreement) {
    let (one, partner) = partners(rng, table, other);
    let inner = filter(rng, other);
    let name = &other.name;
    let condition = match rng.random_range(0..7) {
        0 | 1 => format!("{one} in (select {partner} from {name}{inner})"),
        2 => {
            let and = if inner.is_empty() { " where" } else { " and" };
            format!("{one} not in (select {partner} from {name}{inner}{and} {partner} is not null)")
        }
        3 => format!(
            "exists (select 1 from {name} b where b.{partner} = {}.{one})",
            table.name
        ),
        4 => format!(
            "not exists (select 1 from {name} b where b.{partner} = {}.{one})",
            table.name
        ),
        5 => format!("{one} = (select max({partner}) from {name}{inner})"),
        _ => format!("{one} >= (select min({partner}) from {name}{inner})"),
    };
    let outer = filter(rng, table);
    let and = if outer.is_empty() { " where" } else { " and" };
    let list = if rng.random_bool(0.5) {
        "id"
    } else {
        "count(*), max(id)"
    };
    // What comes before is kept together, since it may have an `or`.
    let outer = outer.replacen(" where ", " where (", 1);
    let close = if outer.is_empty() { "" } else { ")" };
    (
        format!(
            "select {list} from {}{outer}{close}{and} {condition}",
            table.name
        ),
        VALUES,
    )
}

fn windows(rng: &mut StdRng, table: &Table) -> (String, Agreement) {
    let by = some_columns(rng, table, 1).join("");
    let argument = some_columns(rng, table, 1).join("");
    let function = match rng.random_range(0..5) {
        0 => "row_number()".to_owned(),
        1 => format!("lag({argument})"),
        2 => format!("count({argument})"),
        3 => format!("max({argument})"),
        _ => "sum(id)".to_owned(),
    };
    let sql = format!(
        "select id, {function} over (partition by {by} order by id) from {}{}",
        table.name,
        filter(rng, table)
    );
    (sql, SUMS)
}

fn together(rng: &mut StdRng, table: &Table, other: &Table) -> (String, Agreement) {
    let (one, partner) = partners(rng, table, other);
    let kind = ["union all", "union", "except", "intersect"]
        .choose(rng)
        .unwrap_or(&"union");
    let sql = format!(
        "select {one} from {}{} {kind} select {partner} from {}{}",
        table.name,
        filter(rng, table),
        other.name,
        filter(rng, other)
    );
    (sql, SUMS)
}

fn limited(rng: &mut StdRng, table: &Table) -> (String, Agreement) {
    let column = some_columns(rng, table, 1).join("");
    let sql = format!(
        "select count(*) from (select {column} from {}{} limit {})",
        table.name,
        filter(rng, table),
        rng.random_range(0..50)
    );
    (sql, VALUES)
}

/// A column of each table of one type, to be compared; their numbers where there is nothing else.
fn partners(rng: &mut StdRng, one: &Table, other: &Table) -> (String, String) {
    let mut pairs = vec![("id".to_owned(), "id".to_owned())];
    for a in asked(one) {
        for b in asked(other) {
            // Constants hide nothing and join with everything.
            if a.of == b.of && is_key(&a.of) && a.name != "id" {
                pairs.push((a.name.clone(), b.name.clone()));
            }
        }
    }
    pairs.choose(rng).cloned().unwrap_or_default()
}

fn is_key(of: &DataType) -> bool {
    !matches!(of, DataType::List(_) | DataType::Struct(_))
}

fn asked(table: &Table) -> Vec<Asked> {
    let columns = table.columns.iter().map(|column| Asked {
        name: column.name.clone(),
        of: column.of.clone(),
        numbers: column.numbers,
    });
    columns.collect()
}

/// Names of up to so many columns, each once.
fn some_columns(rng: &mut StdRng, table: &Table, most: usize) -> Vec<String> {
    let mut names: Vec<_> = table
        .columns
        .iter()
        .map(|column| column.name.clone())
        .collect();
    if table.partitioned {
        names.push(PARTITION.to_owned());
    }
    let count = rng.random_range(1..=most.min(names.len()));
    names.choose_multiple(rng, count).cloned().collect()
}

/// Aggregates of columns. Where there are groups, none of the least and largest of floating-point
/// numbers: of a group with NaN in it DataFusion 55.2 gives what the order of its rows makes of it.
fn aggregates(rng: &mut StdRng, table: &Table, most: usize, all_rows: bool) -> Vec<String> {
    let columns = asked(table);
    let mut made = vec![];
    for _ in 0..rng.random_range(1..=most) {
        let Some(column) = columns.choose(rng) else {
            break;
        };
        let name = &column.name;
        let text = match rng.random_range(0..7) {
            0 => "count(*)".to_owned(),
            1 => format!("count({name})"),
            2 if is_key(&column.of) => format!("count(distinct {name})"),
            // A sum of integers may wrap, which is the same in any order.
            3 if column.of.is_numeric() && !column.of.is_floating() => format!("sum({name})"),
            4 if column.of.is_floating() => format!("sum({name})"),
            5 if is_key(&column.of) && (all_rows || !column.of.is_floating()) => {
                format!("max({name})")
            }
            _ if is_key(&column.of) && (all_rows || !column.of.is_floating()) => {
                format!("min({name})")
            }
            _ => format!("count({name})"),
        };
        if !made.contains(&text) {
            made.push(text);
        }
    }
    made
}

/// ` where …`, or nothing now and then.
fn filter(rng: &mut StdRng, table: &Table) -> String {
    if rng.random_bool(0.15) {
        return String::new();
    }
    let mut text = format!(" where {}", condition(rng, table, 2));
    for _ in 0..rng.random_range(0..2) {
        let next = condition(rng, table, 1);
        text.push_str(&format!(" and {next}"));
    }
    text
}

fn condition(rng: &mut StdRng, table: &Table, depth: u32) -> String {
    if depth > 0 && rng.random_bool(0.2) {
        let (one, other) = (
            condition(rng, table, depth - 1),
            condition(rng, table, depth - 1),
        );
        return format!("({one} or {other})");
    }
    if depth > 0 && rng.random_bool(0.1) {
        return format!("not ({})", condition(rng, table, depth - 1));
    }
    if table.partitioned && rng.random_bool(0.15) {
        let value = ["1", "2", "33", "4"].choose(rng).unwrap_or(&"1");
        return format!("{PARTITION} = '{value}'");
    }
    let columns = asked(table);
    let Some(column) = columns.choose(rng) else {
        return "true".to_owned();
    };
    let name = column.name.clone();
    if column.name == "id" {
        let bound = rng.random_range(0..=table.rows);
        let operator = ["<", ">=", "=", "<>"].choose(rng).unwrap_or(&"<");
        return format!("{name} {operator} {bound}");
    }
    let plain = rng.random_bool(0.6);
    let value = |rng: &mut StdRng| {
        let special = rng.random_bool(0.2);
        let n = rng.random_range(0..if special { 6 } else { column.numbers + 2 });
        constant(&column.of, n, plain, table.floats)
    };
    match (rng.random_range(0..9), &column.of) {
        (0, _) => format!("{name} is null"),
        (1, _) => format!("{name} is not null"),
        (2, DataType::Utf8 | DataType::LargeUtf8 | DataType::Dictionary(_, _)) => {
            let pattern = [
                "%k1%", "prefix%", "%🐎", "k_", "x%2", "%", "", "K\\_%", "%1%2%",
            ]
            .choose(rng)
            .unwrap_or(&"%");
            let not = if rng.random_bool(0.2) { "not " } else { "" };
            let like = if rng.random_bool(0.2) {
                "ilike"
            } else {
                "like"
            };
            format!("{name} {not}{like} '{pattern}'")
        }
        (_, DataType::List(_)) => {
            let length = rng.random_range(0..4);
            format!("array_length({name}) > {length}")
        }
        (_, DataType::Struct(_)) => {
            let number = rng.random_range(-20..60);
            format!("{name}['a'] >= {number}")
        }
        (3, _) => {
            let values: Vec<_> = (0..rng.random_range(1..6))
                .filter_map(|_| value(rng))
                .collect();
            let not = if rng.random_bool(0.2) { "not " } else { "" };
            format!("{name} {not}in ({})", values.join(", "))
        }
        (4, _) => match (value(rng), value(rng)) {
            (Some(low), Some(high)) => format!("{name} between {low} and {high}"),
            _ => format!("{name} is not null"),
        },
        (5, _) => match value(rng) {
            Some(value) => {
                let not = if rng.random_bool(0.5) { "not " } else { "" };
                format!("{name} is {not}distinct from {value}")
            }
            None => format!("{name} is null"),
        },
        _ => match value(rng) {
            Some(value) => {
                let operator = ["=", "=", "<", "<=", ">", ">=", "<>"]
                    .choose(rng)
                    .unwrap_or(&"=");
                format!("{name} {operator} {value}")
            }
            None => format!("{name} is not null"),
        },
    }
}
