//! Times that many things share when they are looked at later: a process that has to wake up for each of ten thousand
//! spends more on that than on the looks.

use std::time::Duration;

use tokio::time::Instant;

const BEAT: Duration = Duration::from_millis(20);

/// The next beat at this time or after it. `first` is one, too.
pub(crate) fn beat_after(first: Instant, time: Instant) -> Instant {
    let passed = time.saturating_duration_since(first).as_nanos();
    let over = u64::try_from(passed % BEAT.as_nanos()).unwrap_or_default();
    match Duration::from_nanos(over) {
        Duration::ZERO => time,
        over => time + BEAT.saturating_sub(over),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_due_within_a_beat_is_due_together() {
        let first = Instant::now();
        let at = |micros| first + Duration::from_micros(micros);
        for (micros, beat) in [
            (0, 0),
            (1, 20_000),
            (19_999, 20_000),
            (20_000, 20_000),
            (20_001, 40_000),
        ] {
            assert_eq!(beat_after(first, at(micros)), at(beat), "{micros} µs");
        }
        tokio::time::advance(Duration::from_hours(1)).await;
        let late = beat_after(first, Instant::now() + Duration::from_micros(1));
        assert_eq!(late, at(3_600_020_000));
    }
}
