//! `memory.evict`: how close the container is to its memory limit.
//!
//! Reads control groups of both versions and the kernel's own word on stalls; frees nothing itself. The limit is
//! always that of the container or of a group around it, never the machine's: where there is none, there is no pressure.

use std::path::{Path, PathBuf};

/// Version 1 says "no limit" as the largest multiple of a page, whatever the page's size.
const NO_LIMIT: u64 = 1 << 62;
/// Groups around ours that are looked at: far more than any container sees.
const MAX_LEVELS: usize = 16;

/// The control groups that bound this process's memory, the innermost first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cgroup {
    levels: Vec<PathBuf>,
    version: Version,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Version {
    V1,
    #[default]
    V2,
}

/// How it stands with memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Reading {
    /// Bytes in use in the group that is closest to its limit, page cache that can be dropped not counted.
    pub(crate) used: u64,
    /// That group's limit in bytes; `None`: there is no limit anywhere.
    pub(crate) limit: Option<u64>,
    /// Share of the last ten seconds in which some thread waited for memory, where the kernel tells.
    pub(crate) stall: Option<f64>,
}

impl Reading {
    /// Share of the limit in use; zero without a limit.
    pub(crate) fn ratio(&self) -> f64 {
        self.limit.map_or(0.0, |limit| self.used as f64 / limit.max(1) as f64)
    }
}

impl Cgroup {
    /// The groups of this process.
    pub(crate) fn of_this_process() -> Self {
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::find(Path::new("/sys/fs/cgroup"), &own)
    }

    /// The groups below `root` that `own`, the text of `/proc/self/cgroup`, names.
    fn find(root: &Path, own: &str) -> Self {
        let (version, path) = place(own);
        let root = match version {
            Version::V1 => root.join("memory"),
            Version::V2 => root.to_owned(),
        };
        // In a container the path may be the machine's, while the container's own group is mounted as the root.
        let levels = Path::new(path)
            .ancestors()
            .filter_map(|level| level.strip_prefix("/").ok())
            .take(MAX_LEVELS)
            .map(|level| root.join(level))
            .filter(|level| level.is_dir())
            .collect();
        Self { levels, version }
    }

    /// `None` where the kernel tells nothing.
    pub(crate) fn read(&self) -> Option<Reading> {
        let innermost = self.levels.first()?;
        let stall = (self.version == Version::V2)
            .then(|| std::fs::read_to_string(innermost.join("memory.pressure")).ok())
            .flatten()
            .and_then(|text| stall(&text));
        let readings = self.levels.iter().filter_map(|level| self.level(level));
        let closest = readings.max_by(|a, b| a.ratio().total_cmp(&b.ratio()))?;
        Some(Reading { stall, ..closest })
    }

    fn level(&self, level: &Path) -> Option<Reading> {
        let read = |file: &str| std::fs::read_to_string(level.join(file)).ok();
        let (usage, limits, inactive) = match self.version {
            Version::V1 => ("memory.usage_in_bytes", &["memory.limit_in_bytes"][..], "total_inactive_file"),
            Version::V2 => ("memory.current", &["memory.high", "memory.max"][..], "inactive_file"),
        };
        let usage: u64 = read(usage)?.trim().parse().ok()?;
        let inactive = read("memory.stat").and_then(|text| stat(&text, inactive)).unwrap_or(0);
        let limit = limits.iter().filter_map(|file| limit(&read(file)?)).min();
        Some(Reading { used: usage.saturating_sub(inactive), limit, stall: None })
    }
}

/// The version that counts memory, and the group's path, from the text of `/proc/self/cgroup`.
fn place(own: &str) -> (Version, &str) {
    let lines = || own.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let v1 = lines().find(|(controllers, _)| controllers.split(',').any(|name| name == "memory"));
    match v1 {
        Some((_, path)) => (Version::V1, path),
        None => (Version::V2, lines().find(|(none, _)| none.is_empty()).map_or("/", |(_, path)| path)),
    }
}

/// A limit in bytes; `None` for no limit.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|limit| *limit < NO_LIMIT)
}

/// A line of `memory.stat`, in bytes.
fn stat(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Share of the last ten seconds in which some thread waited.
fn stall(text: &str) -> Option<f64> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let percent = some.split(' ').find_map(|field| field.strip_prefix("avg10="))?;
    percent.parse().ok().map(|percent: f64| percent / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        for (own, version, path) in [
            ("0::/\n", Version::V2, "/"),
            ("0::/kubepods.slice/pod1/abc\n", Version::V2, "/kubepods.slice/pod1/abc"),
            ("12:cpu,cpuacct:/a\n4:memory:/b\n0::/c\n", Version::V1, "/b"),
            ("4:hugetlb,memory:/x:y\n", Version::V1, "/x:y"),
            ("4:hugetlb:/a\n", Version::V2, "/"),
            ("", Version::V2, "/"),
            ("nonsense", Version::V2, "/"),
        ] {
            assert_eq!(place(own), (version, path), "{own}");
        }
    }

    #[test]
    fn limits() {
        for (text, expected) in [
            ("max\n", None),
            ("9223372036854771712\n", None),
            ("18446744073709551615", None),
            ("268435456\n", Some(268_435_456)),
            ("0\n", Some(0)),
            ("", None),
            ("-1", None),
        ] {
            assert_eq!(limit(text), expected, "{text}");
        }
    }

    #[test]
    fn stats_and_stalls() {
        let text = "anon 5\ninactive_file_x 7\ninactive_file 4096\ntotal_inactive_file 8192\n";
        assert_eq!(stat(text, "inactive_file"), Some(4096));
        assert_eq!(stat(text, "total_inactive_file"), Some(8192));
        assert_eq!(stat("", "inactive_file"), None);
        let text = "some avg10=12.50 avg60=1.00 avg300=0.00 total=1\nfull avg10=99.00 avg60=0.00 total=0\n";
        assert_eq!(stall(text), Some(0.125));
        assert_eq!(stall("full avg10=1.00"), None);
        assert_eq!(stall("some avg60=1.00"), None);
    }

    /// Lays out control groups as the kernel does, and reads them.
    fn read(own: &str, files: &[(&str, &str)]) -> Option<Reading> {
        let root = tempfile::tempdir().expect("a folder");
        for (path, content) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("below the root")).expect("made");
            std::fs::write(path, content).expect("written");
        }
        Cgroup::find(root.path(), own).read()
    }

    #[test]
    fn readings() {
        let v2 = |used, limit, stall| Some(Reading { used, limit, stall });
        for (what, own, files, expected) in [
            (
                "version 2, in a container, page cache not counted",
                "0::/\n",
                &[("memory.current", "1000"), ("memory.max", "2000"), ("memory.stat", "inactive_file 300")][..],
                v2(700, Some(2000), None),
            ),
            (
                "the lower of two limits, and a stall",
                "0::/\n",
                &[
                    ("memory.current", "1000"),
                    ("memory.high", "1500"),
                    ("memory.max", "2000"),
                    ("memory.pressure", "some avg10=50.00 total=9"),
                ],
                v2(1000, Some(1500), Some(0.5)),
            ),
            (
                "no limit is no pressure",
                "0::/\n",
                &[("memory.current", "1000"), ("memory.high", "max"), ("memory.max", "max")],
                v2(1000, None, None),
            ),
            (
                "the pod is closer to its limit than the container",
                "0::/pod/container\n",
                &[
                    ("pod/memory.current", "900"),
                    ("pod/memory.max", "1000"),
                    ("pod/container/memory.current", "500"),
                    ("pod/container/memory.max", "1000"),
                ],
                v2(900, Some(1000), None),
            ),
            (
                "the machine's path, the container's mount",
                "0::/kubepods/elsewhere\n",
                &[("memory.current", "5"), ("memory.max", "10")],
                v2(5, Some(10), None),
            ),
            (
                "version 1",
                "4:memory:/docker/abc\n0::/\n",
                &[
                    ("memory/memory.usage_in_bytes", "4000"),
                    ("memory/memory.limit_in_bytes", "8000"),
                    ("memory/memory.stat", "inactive_file 1\ntotal_inactive_file 1000"),
                ],
                v2(3000, Some(8000), None),
            ),
            (
                "version 1 without a limit",
                "4:memory:/\n",
                &[
                    ("memory/memory.usage_in_bytes", "4000"),
                    ("memory/memory.limit_in_bytes", "9223372036854771712"),
                ],
                v2(4000, None, None),
            ),
            (
                "page cache above usage",
                "0::/\n",
                &[("memory.current", "1"), ("memory.stat", "inactive_file 2")],
                v2(0, None, None),
            ),
            ("nothing to read", "0::/\n", &[], None),
            ("nonsense", "0::/\n", &[("memory.current", "much")], None),
        ] {
            assert_eq!(read(own, files), expected, "{what}");
        }
    }

    #[test]
    fn this_machine_is_read_without_an_error() {
        if let Some(reading) = Cgroup::of_this_process().read() {
            assert!(reading.ratio() >= 0.0 && reading.ratio().is_finite());
        }
    }
}
