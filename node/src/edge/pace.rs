//! How fast a client may go, and whether it is still there.

use std::time::Duration;

use tokio::time::Instant;

/// A bucket of `BURST` tokens that fills by itself. Who takes more than there is goes into debt and waits.
#[derive(Clone, Debug)]
pub(super) struct Pace<const PER_SECOND: u32, const BURST: u32> {
    tokens: f64,
    at: Instant,
}

impl<const PER_SECOND: u32, const BURST: u32> Pace<PER_SECOND, BURST> {
    /// A full bucket.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            tokens: BURST.into(),
            at: now,
        }
    }

    /// Takes tokens. `false`: there were not as many.
    pub(super) fn take(&mut self, tokens: u32, now: Instant) -> bool {
        let waited = now.saturating_duration_since(self.at).as_secs_f64();
        let filled = waited * f64::from(PER_SECOND);
        // Whoever does not wait for its debt to be paid must not fall into it without end.
        let burst = f64::from(BURST);
        let left = (self.tokens + filled).min(burst) - f64::from(tokens);
        self.tokens = left.max(-burst);
        self.at = self.at.max(now);
        0.0 <= self.tokens
    }

    /// When the debt is paid; in the past if there is none.
    pub(super) fn even_at(&self) -> Instant {
        let debt = (-self.tokens).max(0.0) / f64::from(PER_SECOND);
        self.at + Duration::from_secs_f64(debt)
    }
}

/// What a look at a client tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pulse {
    /// It was heard not long ago.
    Well,
    /// It was silent for a while: ask.
    Silent,
    /// It does not answer.
    Gone,
}

/// How a client is that was last heard so long ago, if `silent` of silence make a question due and `gone` are too much.
pub(super) fn pulse(unheard: Duration, silent: Duration, gone: Duration) -> Pulse {
    if gone <= unheard {
        Pulse::Gone
    } else if silent <= unheard {
        Pulse::Silent
    } else {
        Pulse::Well
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_what_is_beyond_it_waits() {
        let now = Instant::now();
        let mut pace = Pace::<10, 50>::new(now);
        assert!((0..50).all(|_| pace.take(1, now)));
        assert_eq!(pace.even_at(), now);
        assert!(!pace.take(20, now));
        assert_eq!(pace.even_at(), now + Duration::from_secs(2));
        // It never fills to more than a burst.
        let later = now + Duration::from_hours(1);
        assert!(pace.take(50, later) && !pace.take(1, later));
    }

    #[test]
    fn who_is_silent_is_asked_and_then_given_up() {
        let pulse = |seconds| {
            let [silent, gone] = [15, 30].map(Duration::from_secs);
            pulse(Duration::from_secs(seconds), silent, gone)
        };
        assert_eq!(
            [0, 14, 15, 29, 30].map(pulse),
            [
                Pulse::Well,
                Pulse::Well,
                Pulse::Silent,
                Pulse::Silent,
                Pulse::Gone
            ]
        );
    }
}
