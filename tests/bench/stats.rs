//! Figures of one run.

use std::fmt;

/// Values in µs, in buckets of 1/16 of their power of two.
#[derive(Clone, Default)]
pub(crate) struct Histogram {
    buckets: Vec<u64>,
    count: u64,
}

impl Histogram {
    pub(crate) fn record(&mut self, micros: u64) {
        let bucket = bucket_of(micros);
        if self.buckets.len() <= bucket {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
        self.count += 1;
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The value in ms that `share` of the values do not exceed; not a number without values.
    pub(crate) fn ms(&self, share: f64) -> f64 {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_sign_loss,
            clippy::cast_possible_truncation,
            reason = "counts are small"
        )]
        let rank = (self.count as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if 0 < *count && rank <= seen {
                return micros_of(bucket) / 1_000.0;
            }
        }
        f64::NAN
    }
}

fn bucket_of(micros: u64) -> usize {
    if micros < 16 {
        return usize::try_from(micros).unwrap_or(usize::MAX);
    }
    let power = 63 - micros.leading_zeros() as usize;
    let part = usize::try_from(micros >> (power - 4)).unwrap_or(usize::MAX) & 15;
    (power - 3) * 16 + part
}

/// The middle of a bucket.
#[expect(clippy::cast_precision_loss, reason = "sixteenths are all it knows")]
fn micros_of(bucket: usize) -> f64 {
    if bucket < 16 {
        return bucket as f64;
    }
    let (power, part) = (bucket / 16 + 3, bucket % 16);
    ((16 + part) as f64 + 0.5) * ((power - 4) as f64).exp2()
}

/// Figures by name, in the order in which they were measured.
#[derive(Clone, Default)]
pub(crate) struct Figures(pub(crate) Vec<(&'static str, f64)>);

impl Figures {
    pub(crate) fn set(&mut self, name: &'static str, value: f64) {
        self.0.push((name, value));
    }

    pub(crate) fn get(&self, name: &str) -> Option<f64> {
        self.0
            .iter()
            .find(|(other, _)| *other == name)
            .map(|(_, value)| *value)
    }

    /// Of several rounds the median of each figure.
    pub(crate) fn median(rounds: &[Self]) -> Self {
        let Some(first) = rounds.first() else {
            return Self::default();
        };
        let median = |name: &'static str| {
            let mut values: Vec<f64> = rounds
                .iter()
                .filter_map(|round| round.get(name))
                .filter(|value| !value.is_nan())
                .collect();
            values.sort_by(f64::total_cmp);
            (
                name,
                values.get(values.len() / 2).copied().unwrap_or(f64::NAN),
            )
        };
        Self(first.0.iter().map(|(name, _)| median(name)).collect())
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.0 {
            write!(f, "  {name} {}", short(*value))?;
        }
        Ok(())
    }
}

/// Three significant digits.
pub(crate) fn short(value: f64) -> String {
    match value.abs() {
        _ if value.is_nan() => "–".to_owned(),
        magnitude if 100.0 <= magnitude => format!("{value:.0}"),
        magnitude if 10.0 <= magnitude => format!("{value:.1}"),
        magnitude if 1.0 <= magnitude => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}
