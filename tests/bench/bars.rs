//! What a server should reach, as ratios to others of the same run.

use std::collections::BTreeMap;

use crate::servers::Kind;
use crate::stats::{Figures, short};

type Medians = BTreeMap<(&'static str, Kind), Figures>;

/// A bound on a figure of ours.
struct Bar {
    scenario: &'static str,
    figure: &'static str,
    bound: Bound,
}

enum Bound {
    /// At most this.
    AtMost(f64),
    /// At most so many times the smallest of the rivals.
    TimesBestRival(f64),
    /// At most so many times the raw server's.
    TimesRaw(f64),
    /// At most so many times that of the raw server with the same store.
    TimesRawWithStore(f64),
    /// At most so many times the figure of one server.
    Times(f64, Kind),
    /// At least so many times the largest of the rivals.
    AtLeastTimesBestRival(f64),
}

const BARS: [Bar; 31] = [
    Bar {
        scenario: "propagate",
        figure: "p50 ms",
        bound: Bound::Times(1.0, Kind::YSweet),
    },
    Bar {
        scenario: "propagate",
        figure: "p99 ms",
        bound: Bound::Times(1.0, Kind::YSweet),
    },
    Bar {
        scenario: "propagate",
        figure: "CPU µs/delivery",
        bound: Bound::TimesRaw(1.4),
    },
    // What the storage costs by itself is no reserve of the server's.
    Bar {
        scenario: "propagate",
        figure: "p99 ms",
        bound: Bound::TimesRawWithStore(1.0),
    },
    Bar {
        scenario: "propagate",
        figure: "CPU µs/delivery",
        bound: Bound::TimesRawWithStore(1.4),
    },
    Bar {
        scenario: "propagate",
        figure: "ack p50 ms",
        bound: Bound::AtMost(1.0),
    },
    Bar {
        scenario: "propagate",
        figure: "ack p99 ms",
        bound: Bound::AtMost(3.0),
    },
    Bar {
        scenario: "propagate",
        figure: "ack beyond it ms",
        bound: Bound::AtMost(0.3),
    },
    Bar {
        scenario: "saturate",
        figure: "deliveries/s",
        bound: Bound::AtLeastTimesBestRival(2.0),
    },
    Bar {
        scenario: "fan-out",
        figure: "last p50 ms",
        bound: Bound::TimesRaw(1.15),
    },
    Bar {
        scenario: "join-5",
        figure: "50 joined, last ms",
        bound: Bound::TimesRaw(4.0),
    },
    Bar {
        scenario: "join-18",
        figure: "50 joined, last ms",
        bound: Bound::TimesRaw(4.0),
    },
    Bar {
        scenario: "join-18",
        figure: "extra memory MB",
        bound: Bound::AtMost(100.0),
    },
    Bar {
        scenario: "join-5",
        figure: "cold open ms",
        bound: Bound::TimesBestRival(0.3),
    },
    Bar {
        scenario: "join-18",
        figure: "cold open ms",
        bound: Bound::TimesBestRival(0.3),
    },
    Bar {
        scenario: "join-18",
        figure: "reconnect ms",
        bound: Bound::AtMost(5.0),
    },
    Bar {
        scenario: "upload",
        figure: "upload s",
        bound: Bound::TimesBestRival(1.0),
    },
    Bar {
        scenario: "idle",
        figure: "KB/connection",
        bound: Bound::AtMost(5.0),
    },
    Bar {
        scenario: "idle",
        figure: "KB/document",
        bound: Bound::AtMost(5.0),
    },
    Bar {
        scenario: "leave",
        figure: "ratio",
        bound: Bound::AtMost(1.2),
    },
    Bar {
        scenario: "presence",
        figure: "p50 ms",
        bound: Bound::TimesBestRival(1.0),
    },
    Bar {
        scenario: "presence",
        figure: "p99 ms",
        bound: Bound::TimesBestRival(1.0),
    },
    Bar {
        scenario: "presence",
        figure: "cores",
        bound: Bound::TimesBestRival(1.0),
    },
    Bar {
        scenario: "kill",
        figure: "lost",
        bound: Bound::AtMost(0.0),
    },
    Bar {
        scenario: "kill",
        figure: "first served ms",
        bound: Bound::AtMost(15.0),
    },
    // Where that was taken, the best other needed 10.6 ms.
    Bar {
        scenario: "kill",
        figure: "first served ms",
        bound: Bound::TimesBestRival(1.4),
    },
    Bar {
        scenario: "kill",
        figure: "all served ms",
        bound: Bound::TimesBestRival(1.0),
    },
    Bar {
        scenario: "documents",
        figure: "ratio",
        bound: Bound::AtMost(1.2),
    },
    Bar {
        scenario: "sizes",
        figure: "ratio",
        bound: Bound::AtMost(1.5),
    },
    Bar {
        scenario: "workers",
        figure: "ratio",
        bound: Bound::AtMost(1.1),
    },
    Bar {
        scenario: "workers",
        figure: "p99 ratio",
        bound: Bound::AtMost(1.2),
    },
];

/// A line per bar and server of ours: met or not, and by how much.
pub(crate) fn judge(medians: &Medians) -> Vec<String> {
    let mut lines = Vec::new();
    for bar in &BARS {
        for kind in Kind::ALL.into_iter().filter(|kind| kind.is_ours()) {
            let figure = |kind| {
                medians
                    .get(&(bar.scenario, kind))
                    .and_then(|figures| figures.get(bar.figure))
            };
            let Some(value) = figure(kind) else { continue };
            let rivals: Vec<f64> = Kind::ALL
                .into_iter()
                .filter(|kind| kind.is_rival())
                .filter_map(figure)
                .collect();
            let least = rivals.iter().copied().reduce(f64::min);
            let most = rivals.iter().copied().reduce(f64::max);
            let (bound, what) = match bar.bound {
                Bound::AtMost(bound) => (Some(bound), "fixed".to_owned()),
                Bound::TimesBestRival(times) => (
                    least.map(|least| times * least),
                    format!("{times} × the best other"),
                ),
                Bound::TimesRaw(times) => (
                    figure(Kind::Raw).map(|raw| times * raw),
                    format!("{times} × raw"),
                ),
                Bound::TimesRawWithStore(times) => {
                    let raw = if kind == Kind::Sqlite {
                        Kind::RawSqlite
                    } else {
                        Kind::RawPostgres
                    };
                    let bound = figure(raw).map(|raw| times * raw);
                    (bound, format!("{times} × {}", raw.name()))
                }
                Bound::Times(times, other) => (
                    figure(other).map(|other| times * other),
                    format!("{times} × {}", other.name()),
                ),
                Bound::AtLeastTimesBestRival(times) => (
                    most.map(|most| times * most),
                    format!("{times} × the best other"),
                ),
            };
            let Some(bound) = bound else { continue };
            let (met, sign) = match bar.bound {
                Bound::AtLeastTimesBestRival(_) => (bound <= value, '≥'),
                _ => (value <= bound, '≤'),
            };
            let verdict = if met { "met    " } else { "NOT met" };
            lines.push(format!(
                "{verdict} {:10} {:20} {:16} {} {sign} {} ({what})",
                bar.scenario,
                bar.figure,
                kind.name(),
                short(value),
                short(bound)
            ));
        }
    }
    lines
}
