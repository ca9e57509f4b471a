//! The pages of figures agree with the figures kept: both are made by `./dev bench-report`.

use std::path::Path;
use std::process::Command;

#[test]
fn pages_agree_with_the_figures() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the root");
    let check = Command::new("python3")
        .args(["-B", "bench/report.py", "--check"])
        .current_dir(root)
        .output()
        .expect("python3 is needed to check bench/RESULTS.md");
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
}
