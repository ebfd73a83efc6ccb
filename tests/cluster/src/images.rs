//! Container images from compiled programs, without a registry: one layer with the programs and the shared libraries they need, written as a
//! docker archive and imported into the node's containerd.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::node;
use crate::paths::{Profile, workspace};
use crate::process::run;
use crate::progress::step;
use crate::suite::cargo;

/// The user in every image: nobody's, and what `runAsNonRoot` wants to see.
pub(crate) const USER: u32 = 65532;

/// The certificate authorities that Debian trusts, here and in the image.
const AUTHORITIES: &str = "etc/ssl/certs/ca-certificates.crt";

/// An image to make.
pub(crate) struct Image {
    name: String,
    files: Vec<(PathBuf, String)>,
}

/// The full name of an image: what `NAME:dev` in a pod means to containerd.
pub(crate) fn reference(name: &str) -> String {
    format!("docker.io/library/{name}:dev")
}

/// Runs containerd's own client on the images that the kubelet sees.
pub(crate) fn ctr(args: &[&str]) -> Result<String> {
    run(Command::new("ctr").arg("--address").arg(node::socket()).args(["--namespace", "k8s.io"]).args(args))
}

impl Image {
    /// An image `NAME:dev` of programs (file here, path in the image). The first is the entry point.
    pub(crate) fn new(name: &str, files: Vec<(PathBuf, String)>) -> Image {
        Image { name: name.to_owned(), files }
    }

    /// All files by their path in the image: the programs, their libraries, and what programs expect of a system.
    fn contents(&self) -> Result<BTreeMap<String, (u32, Content)>> {
        let mut contents = BTreeMap::new();
        for (text, path) in [
            (format!("nonroot:x:{USER}:{USER}:nonroot:/:/none\n"), "etc/passwd"),
            (format!("nonroot:x:{USER}:\n"), "etc/group"),
            ("hosts: files dns\n".to_owned(), "etc/nsswitch.conf"),
        ] {
            contents.insert(path.to_owned(), (0o644, Content::Text(text)));
        }
        // As in every usual base image: a client of HTTPS refuses to start without any authority.
        let authorities = PathBuf::from(format!("/{AUTHORITIES}"));
        contents.insert(AUTHORITIES.to_owned(), (0o644, Content::File(authorities)));
        for (file, path) in &self.files {
            contents.insert(path.trim_start_matches('/').to_owned(), (0o755, Content::File(file.clone())));
            for library in libraries(file)? {
                let path = library.display().to_string().trim_start_matches('/').to_owned();
                contents.insert(path, (0o755, Content::File(library)));
            }
        }
        Ok(contents)
    }

    /// Writes the layer. The same files give the same bytes, so the digest tells whether anything changed.
    fn layer(&self, to: &Path) -> Result<(String, u64)> {
        let mut tar = tar::Builder::new(Hashing {
            inner: io::BufWriter::new(File::create(to)?),
            hash: Sha256::new(),
            size: 0,
        });
        let mut directory = header(tar::EntryType::Directory, 0o1777, 0);
        tar.append_data(&mut directory, "tmp/", io::empty())?;
        for (path, (mode, content)) in self.contents()? {
            match content {
                Content::Text(text) => {
                    let mut header = header(tar::EntryType::Regular, mode, text.len() as u64);
                    tar.append_data(&mut header, path, text.as_bytes())?;
                }
                Content::File(file) => {
                    let source =
                        File::open(&file).with_context(|| format!("cannot read {}", file.display()))?;
                    let mut header = header(tar::EntryType::Regular, mode, source.metadata()?.len());
                    tar.append_data(&mut header, path, source)?;
                }
            }
        }
        let mut out = tar.into_inner()?;
        out.flush()?;
        Ok((format!("{:x}", out.hash.finalize()), out.size))
    }
}

enum Content {
    Text(String),
    File(PathBuf),
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

/// A writer that hashes what passes.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The shared libraries of a program and their loader, with the paths under which it will look for them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot start ldd")?;
    // A static program is an error to ldd and needs nothing.
    if !output.status.success() {
        return Ok(Vec::new());
    }
    Ok(parse_ldd(&String::from_utf8_lossy(&output.stdout)))
}

/// Lines are `libc.so.6 => /lib/libc.so.6 (0x1234)`, `/lib64/ld-linux-x86-64.so.2 (0x1234)`, `linux-vdso.so.1 (0x1234)` or `statically linked`.
fn parse_ldd(text: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let line = line.trim();
        let file = line.split_once("=>").map_or(line, |(_, file)| file.trim()).split(' ').next()?;
        file.starts_with('/').then(|| PathBuf::from(file))
    };
    text.lines().filter_map(path).collect()
}

/// Makes an image and imports it into the node, unless the node has this very content.
///
/// # Errors
/// A file can't be read, or the node is not up.
pub(crate) fn import(image: &Image) -> Result<()> {
    let dir = Profile::Node.data().join("images").join(&image.name);
    fs::create_dir_all(&dir)?;
    let (digest, size) = image.layer(&dir.join("layer.tar"))?;
    let stamp = dir.join("imported");
    if fs::read_to_string(&stamp).is_ok_and(|old| old == digest) {
        return fs::remove_file(dir.join("layer.tar")).context("cannot remove a layer");
    }
    let entry: Vec<_> = image.files.iter().take(1).map(|(_, path)| path.clone()).collect();
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = json!({
        "architecture": architecture, "os": "linux",
        "config": {"User": format!("{USER}:{USER}"), "Entrypoint": entry,
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    fs::write(dir.join("config.json"), config.to_string())?;
    let manifest =
        json!([{"Config": "config.json", "RepoTags": [reference(&image.name)], "Layers": ["layer.tar"]}]);
    fs::write(dir.join("manifest.json"), manifest.to_string())?;
    let archive = dir.join("image.tar");
    let mut tar = tar::Builder::new(io::BufWriter::new(File::create(&archive)?));
    for file in ["manifest.json", "config.json", "layer.tar"] {
        tar.append_path_with_name(dir.join(file), file)?;
    }
    tar.into_inner()?.flush()?;
    ctr(&["images", "import", &archive.display().to_string()])?;
    for file in ["layer.tar", "image.tar"] {
        fs::remove_file(dir.join(file))?;
    }
    fs::write(stamp, digest)?;
    eprintln!("           image {}:dev, {:.1} MB", image.name, size as f64 / 1e6);
    Ok(())
}

/// Builds operator and runtime and gives their images to the node.
///
/// # Errors
/// The build fails, or the node is not up.
pub(crate) fn import_product() -> Result<()> {
    step("build operator and runtime", || {
        cargo(
            &[
                "build",
                "--quiet",
                "--release",
                "--package",
                "synthex-operator",
                "--package",
                "synthex-runtime",
            ],
            None,
        )
    })?;
    step("import images", || {
        import(&Image::new("synthex-operator", vec![compiled("release", "synthex-operator")]))?;
        let runtime = ["synthex-runtime", "synthex-load"].map(|name| compiled("release", name));
        import(&Image::new("synthex-runtime", runtime.to_vec()))
    })
}

/// Gives the image of the smoke tests' own server to the node.
///
/// # Errors
/// As of [`import_product`].
pub(crate) fn import_probe() -> Result<()> {
    cargo(&["build", "--quiet", "--package", "synthex-cluster", "--bin", "probe"], None)?;
    import(&Image::new("synthex-probe", vec![compiled("debug", "probe")]))
}

/// A program of this workspace and its place in the image.
fn compiled(profile: &str, name: &str) -> (PathBuf, String) {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from);
    (target.join(profile).join(name), format!("/usr/local/bin/{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_in_all_its_forms() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f1)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f2)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(parse_ldd(text), expected);
        assert_eq!(parse_ldd("\tstatically linked\n"), Vec::<PathBuf>::new());
    }

    #[test]
    fn the_same_files_give_the_same_layer() {
        let dir = std::env::temp_dir().join(format!("synthex-cluster-layer-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let program = dir.join("program");
        fs::write(&program, "one").unwrap();
        let image = Image::new("x", vec![(program.clone(), "/bin/program".into())]);
        let first = image.layer(&dir.join("a.tar")).unwrap();
        fs::write(&program, "one").unwrap();
        assert_eq!(image.layer(&dir.join("b.tar")).unwrap(), first);
        fs::write(&program, "two").unwrap();
        assert_ne!(image.layer(&dir.join("b.tar")).unwrap().0, first.0);
        fs::remove_dir_all(dir).unwrap();
    }
}
