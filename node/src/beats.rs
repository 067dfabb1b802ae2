//! Times that many things share when they are looked at later: a process that has to wake up for each of ten thousand
//! spends more on that than on the looks.

use std::time::Duration;

use tokio::time::Instant;

const BEAT: Duration = Duration::from_millis(20);

/// The beats of one clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beats {
    first: Instant,
}

impl Beats {
    /// They begin now.
    pub(crate) fn begin() -> Self {
        Self {
            first: Instant::now(),
        }
    }

    /// The next beat at this time or after it.
    pub(crate) fn after(self, time: Instant) -> Instant {
        let passed = time.saturating_duration_since(self.first).as_nanos();
        let over = u64::try_from(passed % BEAT.as_nanos()).unwrap_or_default();
        match Duration::from_nanos(over) {
            Duration::ZERO => time,
            over => time + BEAT.saturating_sub(over),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_due_within_a_beat_is_due_together() {
        let beats = Beats::begin();
        let at = |micros| beats.first + Duration::from_micros(micros);
        for (micros, beat) in [
            (0, 0),
            (1, 20_000),
            (19_999, 20_000),
            (20_000, 20_000),
            (20_001, 40_000),
        ] {
            assert_eq!(beats.after(at(micros)), at(beat), "{micros} µs");
        }
        tokio::time::advance(Duration::from_hours(1)).await;
        let late = beats.after(Instant::now() + Duration::from_micros(1));
        assert_eq!(late, at(3_600_020_000));
    }
}
