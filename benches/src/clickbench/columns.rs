//! The 105 columns: what each holds, and how often.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, Date32Array, Int16Array, Int32Array, Int64Array, StringBuilder,
    TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, TimeUnit};

use super::rows::{Row, zipf};
use super::text;

/// One column of the table.
pub(super) struct Column {
    pub(super) name: &'static str,
    values: Values,
}

/// What a column holds.
enum Values {
    /// The same small number in every row.
    Always(i16),
    /// The same text in every row.
    Same(&'static str),
    Small(fn(&Row) -> i16),
    Int(fn(&Row) -> i32),
    Big(fn(&Row) -> i64),
    Text(fn(&Row, &mut String)),
    Day(fn(&Row) -> i32),
    /// Seconds since 1970.
    Time(fn(&Row) -> i64),
}

impl Column {
    /// The column in the schema.
    pub(super) fn field(&self) -> Field {
        let data_type = match self.values {
            Values::Always(_) | Values::Small(_) => DataType::Int16,
            Values::Int(_) => DataType::Int32,
            Values::Big(_) => DataType::Int64,
            Values::Same(_) | Values::Text(_) => DataType::Utf8,
            Values::Day(_) => DataType::Date32,
            Values::Time(_) => DataType::Timestamp(TimeUnit::Microsecond, None),
        };
        Field::new(self.name, data_type, false)
    }

    /// The column's values in these rows.
    pub(super) fn array(&self, rows: &[Row]) -> ArrayRef {
        match self.values {
            Values::Always(value) => Arc::new(Int16Array::from_value(value, rows.len())),
            Values::Small(of) => Arc::new(Int16Array::from_iter_values(rows.iter().map(of))),
            Values::Int(of) => Arc::new(Int32Array::from_iter_values(rows.iter().map(of))),
            Values::Big(of) => Arc::new(Int64Array::from_iter_values(rows.iter().map(of))),
            Values::Day(of) => Arc::new(Date32Array::from_iter_values(rows.iter().map(of))),
            Values::Time(of) => {
                let micros = rows.iter().map(|row| of(row) * 1_000_000);
                Arc::new(TimestampMicrosecondArray::from_iter_values(micros))
            }
            Values::Same(text) => strings(rows, |_, out| out.push_str(text)),
            Values::Text(of) => strings(rows, of),
        }
    }
}

fn strings(rows: &[Row], of: impl Fn(&Row, &mut String)) -> ArrayRef {
    let mut builder = StringBuilder::new();
    let mut value = String::new();
    for row in rows {
        value.clear();
        of(row, &mut value);
        builder.append_value(&value);
    }
    Arc::new(builder.finish())
}

/// One of `values`, each as often in a thousand as it says; the last one for the rest.
fn pick<T: Copy>(random: u64, values: &[(T, u64)]) -> T {
    let mut left = random % 1000;
    for (value, often) in values {
        if left < *often {
            return *value;
        }
        left -= often;
    }
    values[values.len() - 1].0
}

/// `value` so often in a thousand, else the other.
fn rarely<T>(random: u64, often: u64, value: T, other: T) -> T {
    if random % 1000 < often { value } else { other }
}

/// A time on the network in milliseconds, mostly unknown.
fn timing(random: u64) -> i32 {
    rarely(random, 300, zipf(random >> 10, 30_000, 0.8) as i32, 0)
}

fn search_engine(row: &Row) -> i16 {
    match row.phrase {
        Some(phrase) => pick(
            row.visit_draw(20),
            &[(2, 700), (3, 200), (1 + (phrase % 80) as i16, 100)],
        ),
        None => 0,
    }
}

fn advertised(row: &Row) -> i16 {
    pick(row.draw(21), &[(2, 5), (13, 1), (0, 994)])
}

fn traffic_source(row: &Row) -> i16 {
    match row.is_from_elsewhere() {
        true => pick(
            row.visit_draw(22),
            &[(-1, 300), (6, 200), (1, 300), (0, 200)],
        ),
        false if row.phrase.is_some() => 2,
        false => pick(row.draw(22), &[(-1, 150), (1, 50), (0, 800)]),
    }
}

fn mobile_phone(row: &Row) -> i16 {
    // Six of a hundred users, each with one model.
    match row.user_draw(23) % 100 {
        0..6 => 1 + zipf(row.user_draw(24), 44, 0.9) as i16,
        _ => 0,
    }
}

fn resolution(row: &Row) -> (i16, i16) {
    let sizes = [
        ((1368, 768), 300),
        ((1024, 768), 150),
        ((1280, 1024), 150),
        ((1638, 1658), 100),
        ((1917, 879), 100),
        ((1440, 900), 80),
        ((1680, 1050), 60),
        ((320, 480), 60),
    ];
    pick(row.user_draw(25), &sizes)
}

fn rarely_text(row: &Row, column: u64, often: u64, out: &mut String) {
    if row.visit_draw(column) % 1000 < often {
        text::words(out, zipf(row.visit_draw(column + 500), 300, 0.9), 1);
    }
}

const fn of(name: &'static str, values: Values) -> Column {
    Column { name, values }
}

/// All columns, in the order of the original.
pub(super) const COLUMNS: [Column; 105] = {
    use Values::*;
    [
        of("watch_id", Big(|row| (row.draw(1) >> 1) as i64)),
        of(
            "java_enable",
            Small(|row| rarely(row.user_draw(2), 800, 1, 0)),
        ),
        of(
            "title",
            Text(|row, out| {
                if row.draw(3) % 100 < 85 {
                    text::title(out, row.counter as u64, row.page);
                }
            }),
        ),
        of("good_event", Always(1)),
        of("event_time", Time(|row| row.second)),
        of("event_date", Day(Row::day)),
        of("counter_id", Int(|row| row.counter)),
        of("client_ip", Int(|row| row.user_draw(8) as i32)),
        of(
            "region_id",
            Int(|row| match zipf(row.user_draw(9), 5000, 1.3) {
                0 => 229,
                rank => rank as i32,
            }),
        ),
        of("user_id", Big(Row::user_id)),
        of(
            "counter_class",
            Small(|row| pick(row.counter as u64, &[(1, 150), (-1, 50), (0, 800)])),
        ),
        of(
            "os",
            Small(|row| {
                pick(
                    row.user_draw(12),
                    &[(2, 400), (44, 350), (5, 100), (113, 50), (42, 100)],
                )
            }),
        ),
        of(
            "user_agent",
            Small(|row| {
                pick(
                    row.user_draw(13),
                    &[(5, 250), (82, 200), (2, 150), (7, 100), (3, 300)],
                )
            }),
        ),
        of(
            "url",
            Text(|row, out| text::url(out, row.counter as u64, row.page)),
        ),
        of("referer", Text(Row::referer)),
        of("is_refresh", Small(|row| rarely(row.draw(16), 120, 1, 0))),
        of(
            "referer_category_id",
            Small(|row| rarely(row.visit_draw(17), 120, (row.visit % 16_000) as i16, 0)),
        ),
        of(
            "referer_region_id",
            Int(|row| {
                rarely(
                    row.visit_draw(18),
                    250,
                    zipf(row.visit, 3000, 1.2) as i32,
                    0,
                )
            }),
        ),
        of(
            "url_category_id",
            Small(|row| ((row.counter as u64 * 7919) % 16_000) as i16),
        ),
        of(
            "url_region_id",
            Int(|row| (row.counter as u64 % 300) as i32),
        ),
        of("resolution_width", Small(|row| resolution(row).0)),
        of("resolution_height", Small(|row| resolution(row).1)),
        of(
            "resolution_depth",
            Small(|row| pick(row.user_draw(26), &[(37, 600), (23, 350), (15, 50)])),
        ),
        of(
            "flash_major",
            Small(|row| pick(row.user_draw(27), &[(15, 700), (13, 100), (0, 200)])),
        ),
        of(
            "flash_minor",
            Small(|row| pick(row.user_draw(28), &[(7, 600), (8, 100), (0, 300)])),
        ),
        of(
            "flash_minor2",
            Text(|row, out| {
                out.push_str(pick(
                    row.user_draw(29),
                    &[("700", 500), ("800", 100), ("D0", 50), ("", 350)],
                ))
            }),
        ),
        of(
            "net_major",
            Small(|row| pick(row.user_draw(30), &[(2, 300), (3, 250), (4, 100), (0, 350)])),
        ),
        of(
            "net_minor",
            Small(|row| pick(row.user_draw(31), &[(0, 800), (5, 200)])),
        ),
        of(
            "user_agent_major",
            Small(|row| {
                pick(
                    row.user_draw(32),
                    &[(16, 300), (22, 200), (9, 200), (11, 100), (30, 200)],
                )
            }),
        ),
        of(
            "user_agent_minor",
            Text(|row, out| {
                out.push_str(pick(
                    row.user_draw(33),
                    &[
                        ("D\u{fffd}", 400),
                        ("nA", 300),
                        ("66", 100),
                        ("53", 100),
                        ("C8", 100),
                    ],
                ))
            }),
        ),
        of(
            "cookie_enable",
            Small(|row| rarely(row.user_draw(34), 10, 0, 1)),
        ),
        of(
            "javascript_enable",
            Small(|row| rarely(row.user_draw(35), 5, 0, 1)),
        ),
        of("is_mobile", Small(|row| i16::from(mobile_phone(row) != 0))),
        of("mobile_phone", Small(mobile_phone)),
        of(
            "mobile_phone_model",
            Text(|row, out| {
                if mobile_phone(row) != 0 {
                    text::words(out, zipf(row.user_draw(24), 160, 0.9), 1);
                }
            }),
        ),
        of("params", Text(|row, out| rarely_text(row, 36, 15, out))),
        of(
            "ip_network_id",
            Int(|row| (row.user_draw(37) % 4_000_000) as i32),
        ),
        of("traffic_source_id", Small(traffic_source)),
        of("search_engine_id", Small(search_engine)),
        of(
            "search_phrase",
            Text(|row, out| {
                if let Some(phrase) = row.phrase {
                    text::words(out, phrase, super::rows::phrase_words(phrase));
                }
            }),
        ),
        of("adv_engine_id", Small(advertised)),
        of("is_artificial", Small(|row| rarely(row.draw(42), 3, 1, 0))),
        of(
            "window_client_width",
            Small(|row| (resolution(row).0 - (row.user_draw(43) % 100) as i16).max(0)),
        ),
        of(
            "window_client_height",
            Small(|row| (resolution(row).1 - (row.user_draw(44) % 300) as i16).max(0)),
        ),
        of(
            "client_time_zone",
            Small(|row| {
                pick(
                    row.user_draw(45),
                    &[(135, 600), (157, 150), (117, 100), (-1, 150)],
                )
            }),
        ),
        of(
            "client_event_time",
            Time(|row| row.second + (row.user_draw(46) % 7200) as i64 - 3600),
        ),
        of(
            "silverlight_version1",
            Small(|row| pick(row.user_draw(47), &[(5, 400), (0, 600)])),
        ),
        of(
            "silverlight_version2",
            Small(|row| pick(row.user_draw(47), &[(1, 400), (0, 600)])),
        ),
        of(
            "silverlight_version3",
            Int(|row| pick(row.user_draw(47), &[(19_832, 400), (0, 600)])),
        ),
        of("silverlight_version4", Always(0)),
        of(
            "page_charset",
            Text(|row, out| {
                out.push_str(pick(
                    row.counter as u64,
                    &[("windows", 500), ("utf-8", 480), ("", 20)],
                ))
            }),
        ),
        of(
            "code_version",
            Int(|row| {
                pick(
                    row.counter as u64 / 7,
                    &[(1601, 700), (1941, 200), (291, 100)],
                )
            }),
        ),
        of("is_link", Small(|row| rarely(row.draw(53), 25, 1, 0))),
        of("is_download", Small(|row| rarely(row.draw(54), 3, 1, 0))),
        of("is_not_bounce", Small(|row| rarely(row.draw(55), 60, 1, 0))),
        of("f_uniq_id", Big(|row| (row.user_draw(56) >> 1) as i64)),
        of(
            "original_url",
            Text(|row, out| {
                if row.draw(57) % 100 < 60 {
                    text::url(out, row.counter as u64, row.page);
                }
            }),
        ),
        of("hid", Int(|row| (row.draw(58) >> 33) as i32)),
        of("is_old_counter", Always(0)),
        of("is_event", Small(|row| rarely(row.draw(60), 20, 1, 0))),
        of("is_parameter", Small(|row| rarely(row.draw(61), 10, 1, 0))),
        of(
            "dont_count_hits",
            Small(|row| rarely(row.draw(62), 80, 1, 0)),
        ),
        of(
            "with_hash",
            Small(|row| rarely(row.counter as u64, 100, 1, 0)),
        ),
        of(
            "hit_color",
            Text(|row, out| {
                out.push_str(pick(
                    row.draw(64),
                    &[("5", 600), ("T", 200), ("Y", 100), ("E", 100)],
                ))
            }),
        ),
        of(
            "local_event_time",
            Time(|row| row.second + 3600 * (row.user_draw(65) % 9) as i64),
        ),
        of(
            "age",
            Small(|row| {
                pick(
                    row.user_draw(66),
                    &[(31, 250), (22, 200), (55, 150), (50, 100), (0, 300)],
                )
            }),
        ),
        of(
            "sex",
            Small(|row| pick(row.user_draw(67), &[(1, 350), (2, 350), (0, 300)])),
        ),
        of(
            "income",
            Small(|row| pick(row.user_draw(68), &[(2, 300), (3, 200), (1, 100), (0, 400)])),
        ),
        of(
            "interests",
            Small(|row| rarely(row.user_draw(69), 700, (row.user >> 49) as i16, 0)),
        ),
        of(
            "robotness",
            Small(|row| pick(row.user_draw(70), &[(0, 850), (1, 50), (39, 100)])),
        ),
        of("remote_ip", Int(|row| row.user_draw(71) as i32)),
        of(
            "window_name",
            Int(|row| rarely(row.visit_draw(72), 300, row.visit as i32, -1)),
        ),
        of(
            "opener_name",
            Int(|row| rarely(row.visit_draw(73), 150, row.visit as i32, -1)),
        ),
        of(
            "history_length",
            Small(|row| zipf(row.draw(74), 50, 0.8) as i16),
        ),
        of(
            "browser_language",
            Text(|row, out| {
                out.push_str(pick(
                    row.user_draw(75),
                    &[("S\u{fffd}", 800), ("m\u{fffd}", 50), ("en", 150)],
                ))
            }),
        ),
        of(
            "browser_country",
            Text(|row, out| {
                out.push_str(pick(
                    row.user_draw(76),
                    &[("\u{fffd}\u{c}", 850), ("\u{fffd}W", 50), ("KI", 100)],
                ))
            }),
        ),
        of("social_network", Same("")),
        of("social_action", Same("")),
        of("http_error", Small(|row| rarely(row.draw(79), 1, 404, 0))),
        of("send_timing", Int(|row| timing(row.draw(80)))),
        of("dns_timing", Int(|row| timing(row.draw(81)))),
        of("connect_timing", Int(|row| timing(row.draw(82)))),
        of("response_start_timing", Int(|row| timing(row.draw(83)))),
        of("response_end_timing", Int(|row| timing(row.draw(84)))),
        of("fetch_timing", Int(|row| timing(row.draw(85)))),
        of(
            "social_source_network_id",
            Small(|row| pick(row.visit_draw(86), &[(1, 3), (2, 2), (0, 995)])),
        ),
        of(
            "social_source_page",
            Text(|row, out| rarely_text(row, 87, 2, out)),
        ),
        of(
            "param_price",
            Big(|row| rarely(row.draw(88), 1, (row.random % 100_000) as i64, 0)),
        ),
        of("param_order_id", Same("")),
        of("param_currency", Same("NH\u{1c}")),
        of("param_currency_id", Always(0)),
        of(
            "openstat_service_name",
            Text(|row, out| rarely_text(row, 92, 4, out)),
        ),
        of(
            "openstat_campaign_id",
            Text(|row, out| rarely_text(row, 93, 4, out)),
        ),
        of(
            "openstat_ad_id",
            Text(|row, out| rarely_text(row, 94, 4, out)),
        ),
        of(
            "openstat_source_id",
            Text(|row, out| rarely_text(row, 95, 4, out)),
        ),
        of("utm_source", Text(|row, out| rarely_text(row, 96, 15, out))),
        of("utm_medium", Text(|row, out| rarely_text(row, 97, 15, out))),
        of(
            "utm_campaign",
            Text(|row, out| rarely_text(row, 98, 15, out)),
        ),
        of("utm_content", Text(|row, out| rarely_text(row, 99, 8, out))),
        of("utm_term", Text(|row, out| rarely_text(row, 100, 8, out))),
        of("from_tag", Text(|row, out| rarely_text(row, 101, 12, out))),
        of(
            "has_gclid",
            Small(|row| rarely(row.visit_draw(102), 10, 1, 0)),
        ),
        of(
            "referer_hash",
            Big(|row| {
                let mut referer = String::new();
                row.referer(&mut referer);
                text::hash(&referer)
            }),
        ),
        of(
            "url_hash",
            Big(|row| {
                let mut url = String::new();
                text::url(&mut url, row.counter as u64, row.page);
                text::hash(&url)
            }),
        ),
        of("cl_id", Always(0)),
    ]
};
