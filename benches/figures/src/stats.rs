//! Medians, geometric means and intervals.

use serde::{Deserialize, Serialize};

/// A median with the bounds of its 90 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The median.
    pub median: f64,
    /// Lower bound.
    pub low: f64,
    /// Upper bound.
    pub high: f64,
}

/// The median of `values`; `None` for none.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// The geometric mean of positive `values`; `None` for none.
pub fn geomean(values: &[f64]) -> Option<f64> {
    (!values.is_empty())
        .then(|| (values.iter().map(|value| value.ln()).sum::<f64>() / values.len() as f64).exp())
}

/// The median of `values` with the order statistics that enclose it with a probability of at
/// least 90 %, whatever their distribution (the binomial interval of the sign test). With fewer
/// than five values the bounds are the extremes.
pub fn median_interval(values: &[f64]) -> Option<Interval> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    // The largest k with P(fewer than k of n fall below the median) at most 5 %.
    let mut tail = 0.0;
    let mut below = 0;
    for k in 0..n {
        tail += (ln_choose(n, k) - n as f64 * std::f64::consts::LN_2).exp();
        if tail > 0.05 {
            break;
        }
        below = k + 1;
    }
    let rank = below.saturating_sub(1);
    Some(Interval {
        median: median(values)?,
        low: sorted[rank],
        high: sorted[n - 1 - rank],
    })
}

fn ln_choose(n: usize, k: usize) -> f64 {
    (1..=k).map(|i| ((n - k + i) as f64 / i as f64).ln()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_even_and_none() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn fifteen_values_give_the_fourth_from_each_end() {
        // P(X <= 3) = 0.0176, P(X <= 4) = 0.0592 for n = 15: so the 4th and the 12th value.
        let values: Vec<f64> = (1..=15).map(f64::from).collect();
        let interval = median_interval(&values).unwrap();
        assert_eq!(
            interval,
            Interval {
                median: 8.0,
                low: 4.0,
                high: 12.0
            }
        );
        let few = median_interval(&[2.0, 1.0, 3.0]).unwrap();
        assert_eq!((few.low, few.high), (1.0, 3.0));
    }

    #[test]
    fn geometric_mean() {
        assert!((geomean(&[1.0, 4.0]).unwrap() - 2.0).abs() < 1e-12);
    }
}
