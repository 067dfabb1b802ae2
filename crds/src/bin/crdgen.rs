//! Prints the definition of CollabCluster: `cargo run -p collab-crds --bin crdgen > crds/collabcluster.yaml`.

use std::io::Write as _;

fn main() -> std::io::Result<()> {
    std::io::stdout().write_all(collab_crds::definition().as_bytes())
}
