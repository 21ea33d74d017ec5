//! Rows before they are columns: visits of users to sites, hit by hit.

use super::text;

/// The counter of the fixed queries, a frequent one as in the original.
pub(super) const COUNTER: i32 = 62;

/// 1 July 2013, as seconds and as days since 1970.
const FIRST_SECOND: i64 = 1_372_636_800;
const DAY_SECONDS: i64 = 86_400;
const DAYS: u64 = 31;

/// Counters of the table.
const COUNTERS: u64 = 6500;

/// Rows for each user that may occur. Few have most visits, so that one that does occur has six or
/// seven hits on average, as in the original.
const ROWS_A_USER: u64 = 2;

/// One hit, as far as columns share it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    /// Random, another one a row.
    pub(super) random: u64,
    /// Random, the same in a visit.
    pub(super) visit: u64,
    /// Random, the same for a user.
    pub(super) user: u64,
    /// The site's counter.
    pub(super) counter: i32,
    /// The page that is shown.
    pub(super) page: u64,
    /// The page before it in the visit; `None` for the first one.
    pub(super) before: Option<u64>,
    /// Seconds since 1970.
    pub(super) second: i64,
    /// Where a phrase was searched for, which one.
    pub(super) phrase: Option<u64>,
}

impl Row {
    /// A random number of the row for one column.
    pub(super) fn draw(&self, column: u64) -> u64 {
        mix(self.random ^ column.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    /// A random number of the visit for one column.
    pub(super) fn visit_draw(&self, column: u64) -> u64 {
        mix(self.visit ^ column.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    /// A random number of the user for one column.
    pub(super) fn user_draw(&self, column: u64) -> u64 {
        mix(self.user ^ column.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    /// The day since 1970.
    pub(super) fn day(&self) -> i32 {
        (self.second / DAY_SECONDS) as i32
    }

    /// The user's number: positive, and not small.
    pub(super) fn user_id(&self) -> i64 {
        user_id(self.user)
    }

    /// Where the hit came from; empty for every sixth.
    pub(super) fn referer(&self, out: &mut String) {
        match (self.before, self.phrase) {
            (Some(_), _) if self.draw(5) % 100 < 17 => {}
            (Some(page), _) => text::url(out, self.counter as u64, page),
            (None, Some(phrase)) => {
                out.push_str("http://yandex.ru/yandsearch?text=");
                text::words(out, phrase, phrase_words(phrase));
            }
            (None, None) if self.visit_draw(3) % 100 < 40 => {
                text::url(out, zipf(self.visit_draw(4), 500, 1.2), 0);
            }
            (None, None) => {}
        }
    }

    /// Whether an earlier page of another site led here.
    pub(super) fn is_from_elsewhere(&self) -> bool {
        self.before.is_none() && self.phrase.is_none()
    }
}

/// Words of a phrase.
pub(super) fn phrase_words(phrase: u64) -> u64 {
    1 + mix(phrase) % 5
}

fn user_id(user: u64) -> i64 {
    (mix(user ^ 0xACE) >> 1) as i64
}

/// The rows of a file of a table of `table_rows` rows, in the order of the original: by counter, day,
/// user and time.
pub(super) fn of_file(file: u64, rows: usize, table_rows: u64) -> Vec<Row> {
    let users = users(table_rows);
    let phrases = (table_rows / 16).max(1);
    let mut visits: Vec<(i32, i64, u64, u64)> = Vec::new();
    let mut planned = 0;
    let mut number = 0;
    while planned < rows {
        let random = mix(mix(file ^ 0xF11E) ^ number);
        number += 1;
        let counter = counter(zipf(mix(random ^ 1), COUNTERS, 1.05));
        let user = zipf(mix(random ^ 2), users, 0.6);
        let day = mix(random ^ 3) % DAYS;
        let second = FIRST_SECOND + day as i64 * DAY_SECONDS + (mix(random ^ 4) % 80_000) as i64;
        visits.push((counter, second, user, random));
        planned += hits(random);
    }
    visits.sort_unstable_by_key(|(counter, second, user, _)| {
        (*counter, second / DAY_SECONDS, *user, *second)
    });
    let mut out = Vec::with_capacity(rows);
    for (counter, mut second, user, random) in visits {
        let phrase = (mix(random ^ 5) % 100 < 78).then(|| zipf(mix(random ^ 6), phrases, 0.9));
        let mut before = None;
        for hit in 0..hits(random) as u64 {
            let draw = mix(random ^ (hit << 8));
            let page = page(counter, draw);
            out.push(Row {
                random: draw,
                visit: random,
                user: mix(user),
                counter,
                page,
                before,
                second,
                phrase: phrase.filter(|_| hit == 0),
            });
            before = Some(page);
            second += (mix(draw) % 120) as i64;
        }
    }
    out.truncate(rows);
    out
}

/// Hits of a visit: 1 to 11, 6 on average.
fn hits(visit: u64) -> usize {
    1 + (mix(visit ^ 7) % 11) as usize
}

/// The counter of a rank: the most frequent one is that of the queries.
fn counter(rank: u64) -> i32 {
    match rank {
        0 => COUNTER,
        rank => 1000 + (mix(rank) % 200_000) as i32,
    }
}

/// A page of a site: few are seen often.
fn page(counter: i32, random: u64) -> u64 {
    zipf(mix(random ^ 8), 200 + mix(counter as u64) % 5000, 1.1)
}

/// A user with a few visits.
pub(super) fn frequent_user(table_rows: u64) -> i64 {
    // Of Zipf's ranks, this one has about eight visits, whatever the number of users.
    user_id(mix(users(table_rows) / 1000))
}

fn users(table_rows: u64) -> u64 {
    (table_rows / ROWS_A_USER).max(1)
}

/// The hash of the address that the fixed counter's most frequent page has.
pub(super) fn frequent_url_hash() -> i64 {
    let mut url = String::new();
    text::url(&mut url, COUNTER as u64, 0);
    text::hash(&url)
}

/// The hash of the most frequent referer of another site.
pub(super) fn frequent_referer_hash() -> i64 {
    let mut url = String::new();
    text::url(&mut url, 0, 0);
    text::hash(&url)
}

/// A number that looks random, out of one that need not: SplitMix64's finalizer.
pub(super) fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A rank from 0 to `count - 1`, distributed by Zipf with exponent `s`, which is not 1: the inverse
/// of the continuous distribution function.
pub(super) fn zipf(random: u64, count: u64, s: f64) -> u64 {
    let uniform = (random >> 11) as f64 / (1_u64 << 53) as f64;
    let power = 1.0 - s;
    let whole = ((count as f64 + 1.0).powf(power) - 1.0) / power;
    let rank = (1.0 + uniform * whole * power).powf(1.0 / power);
    (rank as u64).clamp(1, count) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_ranks_are_frequent() {
        let mut counts = [0_u32; 100];
        for i in 0..10_000 {
            counts[zipf(mix(i), 100, 1.05) as usize] += 1;
        }
        assert!(counts[0] > 3 * counts[9] && counts[9] > counts[99]);
        assert!(counts.iter().sum::<u32>() == 10_000);
        assert_eq!(zipf(u64::MAX, 5, 0.9), 4);
        assert_eq!(zipf(0, 5, 0.9), 0);
    }
}
