# `just` lists what there is to do; CI runs the same.

_default:
    @just --list --unsorted

# Format the code
fmt:
    cargo fmt --all

# Check format, lints and what is generated
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    npm --prefix node/web run check

# Run tiers of tests: unit sim fuzz process drills browser e2e; all without one
test *tiers:
    tests/run {{tiers}}

# Play seeds of the simulation: just sim --seeds 2000 --first 1
sim *flags:
    cargo test --quiet --workspace --test sim -- {{flags}}

# See that the tests find each defect that is built in on purpose, and by what
mutants *flags:
    cargo test --quiet --workspace --features collab-core/mutants --test sim -- --mutants --seeds 100 {{flags}}

# Feed hostile bytes to all that takes bytes, for this many seconds together
fuzz seconds="60":
    COLLAB_FUZZ_SECONDS={{seconds}} tests/run fuzz

# Hurt a cluster in every way there is, ending with a table: half an hour; words choose drills. Needs root
drills *words:
    test -d tests/clients/node_modules || npm --prefix tests/clients ci
    cargo build --quiet --workspace --bins --tests
    cargo test --quiet --workspace --test drills -- {{words}}

# Run the scenarios on a real Kubernetes; words choose among them
e2e *words:
    cargo test -p collab-tests --test e2e -- {{words}}

# Compare with other servers, side by side: about two hours for everything; words choose scenarios and servers
bench *words:
    cargo build --release --workspace --bins
    cargo bench --workspace --bench bench -- {{words}}

# Write again what is generated: the CRD and the editor page
generate:
    cargo run --quiet -p collab-crds --bin crdgen > crds/collabcluster.yaml
    npm --prefix node/web run build
    UPDATE=1 cargo test --workspace --lib
