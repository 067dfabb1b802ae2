//! Rebuilds when a migration was added, because they are embedded.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
