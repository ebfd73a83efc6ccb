//! Builds Kubernetes, etcd, CoreDNS and Prometheus from the pinned Go modules. Writes only to `target/cluster/bin`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::paths;
use crate::process::run;
use crate::progress::step;

const KUBERNETES: [&str; 6] =
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"];

/// One `go build`: what it is called, the module it runs in, and how.
struct Build {
    name: &'static str,
    module: PathBuf,
    programs: &'static [&'static str],
    args: Vec<String>,
}

/// Builds what is missing or older than the pinned versions. The first time takes minutes, later nothing.
///
/// # Errors
/// There is no Go, or the build fails (the first needs a way to a Go module proxy).
pub(crate) fn build() -> Result<()> {
    let module = paths::package().to_path_buf();
    let out = |name: &str| paths::bin(name).display().to_string();
    let mut kubernetes = vec!["-ldflags".to_owned(), linker_flags()?, "-o".to_owned(), out("") + "/"];
    kubernetes.extend(KUBERNETES.map(|name| format!("k8s.io/kubernetes/cmd/{name}")));
    let stripped = |program: &str, package: &str| {
        ["-ldflags", "-s -w", "-o", &out(program), package].map(str::to_owned).to_vec()
    };
    let prometheus = stripped("prometheus", "github.com/prometheus/prometheus/cmd/prometheus");
    let builds = [
        Build { name: "Kubernetes", module: module.clone(), programs: &KUBERNETES, args: kubernetes },
        // The package's own name is `server`, hence a build of its own with a name for the output.
        Build {
            name: "etcd",
            module: module.clone(),
            programs: &["etcd"],
            args: stripped("etcd", "go.etcd.io/etcd/server/v3"),
        },
        Build {
            name: "CoreDNS",
            module: module.join("dns"),
            programs: &["coredns"],
            args: stripped("coredns", "github.com/coredns/coredns"),
        },
        // Debian's has no Kubernetes discovery. Only that one of the many discoveries is built in.
        Build {
            name: "Prometheus",
            module: module.join("prometheus"),
            programs: &["prometheus"],
            args: [&["-tags", "remove_all_sd,enable_kubernetes_sd"].map(str::to_owned)[..], &prometheus]
                .concat(),
        },
    ];
    for build in builds {
        build.run()?;
    }
    pause(&module)
}

impl Build {
    fn run(&self) -> Result<()> {
        let stamp = paths::bin(&format!(".{}.stamp", self.name));
        let mut hash = Sha256::new();
        for file in ["go.mod", "go.sum"] {
            hash.update(fs::read(self.module.join(file))?);
        }
        hash.update(self.args.join("\n"));
        let key = format!("{:x}", hash.finalize());
        let built = self.programs.iter().all(|program| paths::bin(program).exists());
        if built && fs::read_to_string(&stamp).is_ok_and(|old| old == key) {
            return Ok(());
        }
        fs::create_dir_all(paths::bin(""))?;
        step(&format!("build {} (the first time takes minutes)", self.name), || {
            go(&self.module, &["build", "-trimpath"], &self.args)
        })?;
        fs::write(stamp, key).context("cannot write the stamp of a build")
    }
}

fn go(module: &Path, args: &[&str], more: &[String]) -> Result<String> {
    run(Command::new("go").args(args).args(more).current_dir(module).env("CGO_ENABLED", "0"))
        .context("Go 1.26 or newer must be in PATH, and the first build must reach a Go module proxy")
}

/// Without a version linked in, the programs call themselves v0.0.0 and kubectl complains. The version is the one in go.mod.
fn linker_flags() -> Result<String> {
    let text = fs::read_to_string(paths::package().join("go.mod"))?;
    let version = version(&text, "k8s.io/kubernetes").context("go.mod does not pin k8s.io/kubernetes")?;
    let mut parts = version.trim_start_matches('v').split('.');
    let (Some(major), Some(minor)) = (parts.next(), parts.next()) else {
        bail!("go.mod pins k8s.io/kubernetes to {version}, which is no version")
    };
    let set = |name: &str, value: &str| format!(" -X k8s.io/component-base/version.{name}={value}");
    Ok(format!("-s -w{}{}{}", set("gitVersion", version), set("gitMajor", major), set("gitMinor", minor)))
}

/// The version that a `require` line of a go.mod gives a module.
fn version<'a>(go_mod: &'a str, module: &str) -> Option<&'a str> {
    go_mod.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| *word == "require");
        (words.next() == Some(module)).then(|| words.next()).flatten()
    })
}

/// The container that holds a pod's namespaces: Kubernetes' own, 60 lines of C that come with the module.
fn pause(module: &Path) -> Result<()> {
    let program = paths::bin("pause");
    if program.exists() {
        return Ok(());
    }
    let source = go(module, &["list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes"], &[])?;
    let source = Path::new(source.trim()).join("build/pause/linux/pause.c");
    run(Command::new("cc").args(["-Os", "-static", "-s", "-o"]).arg(&program).arg(&source)).context(
        "cannot build pause; a C compiler with a static C library is needed (Debian: gcc, libc6-dev)",
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn the_version_comes_from_the_require_line() {
        let text = "module m\nreplace k8s.io/api => k8s.io/api v0.36.3\nrequire (\n\tk8s.io/kubernetes v1.36.3 // indirect\n)\n";
        assert_eq!(version(text, "k8s.io/kubernetes"), Some("v1.36.3"));
        assert_eq!(version("require k8s.io/kubernetes v1.2.3", "k8s.io/kubernetes"), Some("v1.2.3"));
        assert_eq!(version(text, "k8s.io/kube"), None);
    }
}
