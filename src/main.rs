//! x
fn main() {
    use kube::CustomResourceExt;
    println!("{}", serde_saphyr::to_string(&synthex_operator::api::OptimizationRollout::crd()).unwrap());
}
