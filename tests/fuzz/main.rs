//! Tier fuzz: bytes that nobody should send, for as long as one likes.
//!
//! Every target takes apart what it is fed and must end, neither panicking nor asking for memory that the
//! input does not account for. Inputs are mutations of what real clients sent (`testdata/yjs-updates.json` of the
//! core) and updates composed of well-formed structs. A target runs in a process of its own, with little memory, and
//! leaves its present input in a file, so that stack overflows, exhausted memory and endless loops are told
//! like a panic: with the input, made as small as it gets for panics, as hex. To see it again:
//!
//! ```text
//! COLLAB_FUZZ_INPUT=<hex> cargo test -p collab-tests --test fuzz <target>
//! ```
//!
//! Then it is put into `found/<target>.txt`, which every run begins with. `COLLAB_FUZZ_SECONDS` is the time for all
//! targets together, each has its share; `COLLAB_FUZZ_SEED` makes a run that is like an earlier one.
//!
//! Our own loop and not `bolero`: on a stable compiler that has no feedback from coverage either, and it
//! pins an older `indexmap` for the whole workspace.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a helper of a test fails as the test does, and says how to repeat it"
)]

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime};

mod random;
mod sessions;
mod targets;

use random::Random;

/// What the targets get together without `COLLAB_FUZZ_SECONDS`.
const SECONDS_DEFAULT: u64 = 12;
/// An input that takes longer has no end.
const HANGS_AFTER: Duration = Duration::from_secs(10);
/// Address space of a target: stacks and the allocator's own take a part of it.
const MEMORY_BYTES: u64 = 1 << 30;
/// How long an input that failed is made smaller.
const SHRINK_FOR: Duration = Duration::from_secs(10);

/// Something that takes bytes from outside.
struct Target {
    name: &'static str,
    /// Its part of the time; all together are [`SHARES`].
    share: u32,
    /// Makes the next input.
    generate: Generate,
    /// Panics when something is wrong. Answers whether the input was taken.
    check: fn(&[u8]) -> bool,
    /// Of a thousand inputs at least this many must be taken, or the rest of the target is not reached.
    taken_min: u64,
}

type Generate = Box<dyn Fn(&mut Random) -> Vec<u8>>;

const SHARES: u32 = 12;

/// One test per target, which runs it in a process of its own.
macro_rules! targets {
    ($($target:ident)*) => {
        $(#[test] fn $target() { run(targets::$target(), stringify!($target)); })*

        #[test]
        fn shares_are_parts_of_the_whole() {
            assert_eq!([$(targets::$target().share),*].iter().sum::<u32>(), SHARES);
        }
    };
}

targets! { scanner frames relay state_vector document stored_rows token }

/// The harness sees each way to fail.
mod broken {
    use super::{Target, run};

    #[test]
    #[should_panic(expected = "exit status: 1")]
    fn panics() {
        run(
            failing("broken::panics", |_| panic!("as it should")),
            "broken::panics",
        );
    }

    #[test]
    #[should_panic(expected = "COLLAB_FUZZ_INPUT=070707")]
    fn reserves() {
        let reserve = |_: &[u8]| !Vec::<u8>::with_capacity(1 << 31).is_empty();
        run(failing("broken::reserves", reserve), "broken::reserves");
    }

    #[test]
    #[should_panic(expected = "COLLAB_FUZZ_INPUT=070707")]
    fn recurses() {
        fn deeper(depth: u64) -> u64 {
            if depth == u64::MAX {
                return depth;
            }
            std::hint::black_box(depth) + deeper(depth + 1)
        }
        run(
            failing("broken::recurses", |_| deeper(0) == 1),
            "broken::recurses",
        );
    }

    fn failing(name: &'static str, check: fn(&[u8]) -> bool) -> Target {
        Target {
            name,
            share: 1,
            generate: Box::new(|_| vec![7; 3]),
            check,
            taken_min: 0,
        }
    }
}

fn run(target: Target, name: &'static str) {
    assert_eq!(target.name, name);
    if let Some(at_hand) = std::env::var_os("COLLAB_FUZZ_CHILD") {
        std::process::exit(i32::from(!target.hold(Path::new(&at_hand))));
    }
    let at_hand = std::env::temp_dir().join(format!("collab-fuzz-{}-{name}", std::process::id()));
    let status = Command::new("prlimit")
        .arg(format!("--as={MEMORY_BYTES}"))
        .arg("--core=0")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("COLLAB_FUZZ_CHILD", &at_hand)
        .env("RUST_BACKTRACE", "0")
        .status()
        .unwrap();
    let input = fs::read(&at_hand).unwrap_or_default();
    fs::remove_file(&at_hand).ok();
    match status.code() {
        Some(0) => {}
        Some(_) => panic!("{name}: {status}, as told above"),
        None => panic!("{}", report(name, &input, &status.to_string())),
    }
}

impl Target {
    /// Feeds the target until its time is over. `false`: it failed, and said so.
    fn hold(self, at_hand: &Path) -> bool {
        if let Ok(hex) = std::env::var("COLLAB_FUZZ_INPUT") {
            (self.check)(&bytes(&hex));
            return true;
        }
        let seed = std::env::var("COLLAB_FUZZ_SEED").map_or_else(
            |_| {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
                now.map_or(1, |now| now.as_secs() ^ u64::from(now.subsec_nanos()))
            },
            |seed| seed.parse().expect("a number"),
        );
        let mut random = Random::new(seed);
        let until = Instant::now() + self.time();
        let mut watched = Watched::new(self.name, at_hand);
        std::panic::set_hook(Box::new(|_| {}));
        let (mut inputs, mut taken) = (0, 0);
        for input in found(self.name) {
            if !self.survives(&mut watched, &input) {
                return false;
            }
        }
        while Instant::now() < until {
            let input = (self.generate)(&mut random);
            watched.now_at(&input);
            inputs += 1;
            let Ok(accepted) = catch_unwind(AssertUnwindSafe(|| (self.check)(&input))) else {
                self.fails_on(&mut watched, input);
                return false;
            };
            taken += u64::from(accepted);
        }
        println!("{}: {inputs} inputs, {taken} taken, seed {seed}", self.name);
        let enough = inputs * self.taken_min <= taken * 1_000;
        if !enough {
            eprintln!("{}: too few inputs are taken", self.name);
        }
        enough
    }

    fn time(&self) -> Duration {
        let seconds = std::env::var("COLLAB_FUZZ_SECONDS").map_or(SECONDS_DEFAULT, |seconds| {
            seconds.parse().expect("a number of seconds")
        });
        Duration::from_secs(seconds) * self.share / SHARES
    }

    fn survives(&self, watched: &mut Watched, input: &[u8]) -> bool {
        watched.now_at(input);
        let survives = catch_unwind(AssertUnwindSafe(|| (self.check)(input))).is_ok();
        if !survives {
            self.fails_on(watched, input.to_vec());
        }
        survives
    }

    /// Takes away what the failure does not need, and tells the rest.
    fn fails_on(&self, watched: &mut Watched, mut input: Vec<u8>) {
        let until = Instant::now() + SHRINK_FOR;
        let mut len = input.len() / 2;
        while 0 < len && Instant::now() < until {
            let mut at = 0;
            while at + len <= input.len() && Instant::now() < until {
                let mut smaller = input.clone();
                smaller.drain(at..at + len);
                watched.now_at(&smaller);
                if catch_unwind(AssertUnwindSafe(|| (self.check)(&smaller))).is_err() {
                    input = smaller;
                } else {
                    at += len;
                }
            }
            len /= 2;
        }
        let panic = catch_unwind(AssertUnwindSafe(|| (self.check)(&input))).err();
        let text = panic.and_then(|panic| {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            text.or_else(|| panic.downcast_ref::<String>().cloned())
        });
        eprintln!("{}", report(self.name, &input, &text.unwrap_or_default()));
    }
}

fn report(name: &str, input: &[u8], what: &str) -> String {
    let hex = hex(input);
    format!(
        "target {name} failed: {what}\nCOLLAB_FUZZ_INPUT={hex} cargo test -p collab-tests --test fuzz {name}"
    )
}

/// Inputs that failed once: a line each in hex, after `#` what they did.
fn found(name: &str) -> Vec<Vec<u8>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fuzz/found/{name}.txt"));
    let text = fs::read_to_string(file).unwrap_or_default();
    let lines = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim());
    lines.filter(|line| !line.is_empty()).map(bytes).collect()
}

/// The input at hand, where the parent can read it, under a limit of time.
struct Watched {
    file: File,
    count: Arc<AtomicU64>,
    _end: mpsc::Sender<()>,
}

impl Watched {
    fn new(name: &'static str, at_hand: &Path) -> Self {
        let file = File::create(at_hand).unwrap();
        let at_hand = at_hand.to_owned();
        let count = Arc::<AtomicU64>::default();
        let (end, ended) = mpsc::channel::<()>();
        let seen = count.clone();
        std::thread::spawn(move || {
            let mut last = 0;
            while ended.recv_timeout(HANGS_AFTER) == Err(mpsc::RecvTimeoutError::Timeout) {
                let now = seen.load(Ordering::Relaxed);
                if now == last && now != 0 {
                    let input = fs::read(&at_hand).unwrap();
                    eprintln!("{}", report(name, &input, "no end"));
                    std::process::exit(1);
                }
                last = now;
            }
        });
        Self {
            file,
            count,
            _end: end,
        }
    }

    fn now_at(&mut self, input: &[u8]) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.file.set_len(input.len() as u64).unwrap();
        self.file.write_all_at(input, 0).unwrap();
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("two hexadecimal digits");
    (0..hex.len()).step_by(2).map(digits).collect()
}
