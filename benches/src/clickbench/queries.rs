//! The 43 queries: the shapes of ClickBench's, in its order, over our column names.

use crate::suite::{Certain, Query};

use super::rows;

/// Columns of an answer that are certain; see [`Certain`].
const ALL: Certain = Certain::All;
const fn columns(columns: &'static [usize]) -> Certain {
    Certain::Columns(columns)
}
const COUNT: Certain = Certain::Columns(&[]);

/// What a page view of the fixed counter is.
const VIEWS: &str = "counter_id = 62 and event_date >= '2013-07-01' and event_date <= '2013-07-31'";

const QUERIES: [(&str, Certain); 43] = [
    ("select count(*) from hits", ALL),
    ("select count(*) from hits where adv_engine_id <> 0", ALL),
    (
        "select sum(adv_engine_id), count(*), avg(resolution_width) from hits",
        ALL,
    ),
    ("select avg(user_id) from hits", ALL),
    ("select count(distinct user_id) from hits", ALL),
    ("select count(distinct search_phrase) from hits", ALL),
    ("select min(event_date), max(event_date) from hits", ALL),
    (
        "select adv_engine_id, count(*) from hits where adv_engine_id <> 0 group by adv_engine_id order by count(*) desc",
        ALL,
    ),
    (
        "select region_id, count(distinct user_id) as u from hits group by region_id order by u desc limit 10",
        columns(&[1]),
    ),
    (
        "select region_id, sum(adv_engine_id), count(*) as c, avg(resolution_width), count(distinct user_id) from hits group by region_id order by c desc limit 10",
        columns(&[2]),
    ),
    (
        "select mobile_phone_model, count(distinct user_id) as u from hits where mobile_phone_model <> '' group by mobile_phone_model order by u desc limit 10",
        columns(&[1]),
    ),
    (
        "select mobile_phone, mobile_phone_model, count(distinct user_id) as u from hits where mobile_phone_model <> '' group by mobile_phone, mobile_phone_model order by u desc limit 10",
        columns(&[2]),
    ),
    (
        "select search_phrase, count(*) as c from hits where search_phrase <> '' group by search_phrase order by c desc limit 10",
        columns(&[1]),
    ),
    (
        "select search_phrase, count(distinct user_id) as u from hits where search_phrase <> '' group by search_phrase order by u desc limit 10",
        columns(&[1]),
    ),
    (
        "select search_engine_id, search_phrase, count(*) as c from hits where search_phrase <> '' group by search_engine_id, search_phrase order by c desc limit 10",
        columns(&[2]),
    ),
    (
        "select user_id, count(*) from hits group by user_id order by count(*) desc limit 10",
        columns(&[1]),
    ),
    (
        "select user_id, search_phrase, count(*) from hits group by user_id, search_phrase order by count(*) desc limit 10",
        columns(&[2]),
    ),
    (
        "select user_id, search_phrase, count(*) from hits group by user_id, search_phrase limit 10",
        COUNT,
    ),
    (
        "select user_id, extract(minute from event_time) as m, search_phrase, count(*) from hits group by user_id, m, search_phrase order by count(*) desc limit 10",
        columns(&[3]),
    ),
    ("select user_id from hits where user_id = {user_id}", ALL),
    ("select count(*) from hits where url like '%google%'", ALL),
    (
        "select search_phrase, min(url), count(*) as c from hits where url like '%google%' and search_phrase <> '' group by search_phrase order by c desc limit 10",
        columns(&[2]),
    ),
    (
        "select search_phrase, min(url), min(title), count(*) as c, count(distinct user_id) from hits where title like '%Google%' and url not like '%.google.%' and search_phrase <> '' group by search_phrase order by c desc limit 10",
        columns(&[3]),
    ),
    (
        "select * from hits where url like '%google%' order by event_time limit 10",
        columns(&[4]),
    ),
    (
        "select search_phrase from hits where search_phrase <> '' order by event_time limit 10",
        COUNT,
    ),
    (
        "select search_phrase from hits where search_phrase <> '' order by search_phrase limit 10",
        ALL,
    ),
    (
        "select search_phrase from hits where search_phrase <> '' order by event_time, search_phrase limit 10",
        ALL,
    ),
    (
        "select counter_id, avg(length(url)) as l, count(*) as c from hits where url <> '' group by counter_id having count(*) > {having} order by l desc limit 25",
        ALL,
    ),
    (
        r"select regexp_replace(referer, '^https?://(?:www\.)?([^/]+)/.*$', '\1') as k, avg(length(referer)) as l, count(*) as c, min(referer) from hits where referer <> '' group by k having count(*) > {having} order by l desc limit 25",
        ALL,
    ),
    ("select {sums} from hits", ALL),
    (
        "select search_engine_id, client_ip, count(*) as c, sum(is_refresh), avg(resolution_width) from hits where search_phrase <> '' group by search_engine_id, client_ip order by c desc limit 10",
        columns(&[2]),
    ),
    (
        "select watch_id, client_ip, count(*) as c, sum(is_refresh), avg(resolution_width) from hits where search_phrase <> '' group by watch_id, client_ip order by c desc limit 10",
        columns(&[2]),
    ),
    (
        "select watch_id, client_ip, count(*) as c, sum(is_refresh), avg(resolution_width) from hits group by watch_id, client_ip order by c desc limit 10",
        columns(&[2]),
    ),
    (
        "select url, count(*) as c from hits group by url order by c desc limit 10",
        columns(&[1]),
    ),
    (
        "select 1, url, count(*) as c from hits group by 1, url order by c desc limit 10",
        columns(&[2]),
    ),
    (
        "select client_ip, client_ip - 1, client_ip - 2, client_ip - 3, count(*) as c from hits group by client_ip, client_ip - 1, client_ip - 2, client_ip - 3 order by c desc limit 10",
        columns(&[4]),
    ),
    (
        "select url, count(*) as views from hits where {views} and dont_count_hits = 0 and is_refresh = 0 and url <> '' group by url order by views desc limit 10",
        columns(&[1]),
    ),
    (
        "select title, count(*) as views from hits where {views} and dont_count_hits = 0 and is_refresh = 0 and title <> '' group by title order by views desc limit 10",
        columns(&[1]),
    ),
    (
        "select url, count(*) as views from hits where {views} and is_refresh = 0 and is_link <> 0 and is_download = 0 group by url order by views desc limit 10 offset 1000",
        columns(&[1]),
    ),
    (
        "select traffic_source_id, search_engine_id, adv_engine_id, case when (search_engine_id = 0 and adv_engine_id = 0) then referer else '' end as src, url as dst, count(*) as views from hits where {views} and is_refresh = 0 group by traffic_source_id, search_engine_id, adv_engine_id, src, dst order by views desc limit 10 offset 1000",
        columns(&[5]),
    ),
    (
        "select url_hash, event_date, count(*) as views from hits where {views} and is_refresh = 0 and traffic_source_id in (-1, 6) and referer_hash = {referer_hash} group by url_hash, event_date order by views desc limit 10 offset 100",
        columns(&[2]),
    ),
    (
        "select window_client_width, window_client_height, count(*) as views from hits where {views} and is_refresh = 0 and dont_count_hits = 0 and url_hash = {url_hash} group by window_client_width, window_client_height order by views desc limit 10 offset 10000",
        columns(&[2]),
    ),
    (
        "select date_trunc('minute', event_time) as m, count(*) as views from hits where counter_id = 62 and event_date >= '2013-07-14' and event_date <= '2013-07-15' and is_refresh = 0 and dont_count_hits = 0 group by date_trunc('minute', event_time) order by date_trunc('minute', event_time) limit 10 offset 1000",
        ALL,
    ),
];

/// All of them for a table of so many rows, numbered from 0 as the original's.
pub fn queries(rows: u64) -> Vec<Query> {
    let sums: Vec<String> = (0..90)
        .map(|i| match i {
            0 => "sum(resolution_width)".to_owned(),
            i => format!("sum(resolution_width + {i})"),
        })
        .collect();
    // Of 100 million rows, groups of more than 100,000 are wanted.
    let constants = [
        ("{sums}", sums.join(", ")),
        ("{views}", VIEWS.to_owned()),
        ("{having}", (rows / 1000).to_string()),
        ("{user_id}", rows::frequent_user(rows).to_string()),
        ("{url_hash}", rows::frequent_url_hash().to_string()),
        ("{referer_hash}", rows::frequent_referer_hash().to_string()),
    ];
    QUERIES
        .iter()
        .zip(0..)
        .map(|((sql, certain), number)| {
            let replaced = constants
                .iter()
                .fold(sql.to_string(), |sql, (name, value)| {
                    sql.replace(name, value)
                });
            Query {
                number,
                sql: replaced,
                certain: *certain,
            }
        })
        .collect()
}
