//! The second binary, `kubectl-synthex`; all of it is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    synthex_operator::cli::main()
}
