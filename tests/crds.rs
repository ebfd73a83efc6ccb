//! The committed CRD is the one that the code generates.

use kube::CustomResourceExt;
use synthex_operator::api::OptimizationRollout;

#[test]
fn the_committed_crd_is_the_generated_one() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/crds/optimizationrollouts.synthex.io.yaml");
    let generated = serde_saphyr::to_string(&OptimizationRollout::crd()).unwrap();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(file, &generated).unwrap();
    }
    let committed = std::fs::read_to_string(file).unwrap();
    assert!(committed == generated, "{file} is out of date; run: UPDATE=1 cargo test --test crds");
}
