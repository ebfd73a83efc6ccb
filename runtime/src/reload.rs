//! Hot reload: notices that the configuration file changed, and hands its content over.
//!
//! Watches the directory, since the kubelet and most editors replace the file (the kubelet by swapping the symlink
//! `..data`) and a watch on the file itself would go on watching the old one. Where watching does not work the content
//! is compared every few seconds.

use std::{
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::{EventKind, RecursiveMode, Watcher, event::AccessKind};
use tokio::{sync::Notify, time::timeout};

use crate::{
    config::MAX_FILE,
    state::{Applied, Runtime},
};

/// How often the content is compared, whatever the watch says.
const POLL: Duration = Duration::from_secs(5);
/// Writers that truncate and write make several events: the file is read when it was quiet for so long.
const SETTLE: Duration = Duration::from_millis(20);
/// A directory in which something changes all the time must not put the reading off for ever.
const MOST_SETTLE: Duration = Duration::from_millis(100);

/// Reads a configuration file, but never more than one byte above what is taken.
pub(crate) fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    std::fs::File::open(path)?.take(MAX_FILE as u64 + 1).read_to_end(&mut content)?;
    Ok(content)
}

/// Applies each new content of the file, for ever.
pub(crate) async fn watch(runtime: Arc<Runtime>, path: PathBuf) {
    let changed = Arc::new(Notify::new());
    let _watcher = watcher(&path, changed.clone())
        .inspect_err(|error| {
            tracing::warn!(%error, "cannot watch the configuration's directory; it is read every {POLL:?} instead");
        })
        .ok();
    loop {
        // First of all, since the file may have changed between the start and the watch.
        let from = path.clone();
        let applied = match tokio::task::spawn_blocking(move || read(&from)).await {
            Ok(Ok(content)) => runtime.apply(&content),
            Ok(Err(error)) => runtime.reject(String::new(), format!("the file cannot be read: {error}")),
            // The runtime is being shut down.
            Err(_) => return,
        };
        match applied {
            Applied::New(generation) => {
                tracing::info!(generation, hash = runtime.snapshot().hash, "configuration applied");
            }
            Applied::Rejected(reason) => {
                let hash = &runtime.snapshot().hash;
                tracing::error!(path = %path.display(), in_force = hash, reason, "configuration refused; the old one stays");
            }
            Applied::Same | Applied::StillRejected => {}
        }
        if timeout(POLL, changed.notified()).await.is_ok() {
            let quiet = async { while timeout(SETTLE, changed.notified()).await.is_ok() {} };
            // Read it anyway when the time is over: half a file is refused, and the rest makes another event.
            let _ = timeout(MOST_SETTLE, quiet).await;
        }
    }
}

fn watcher(path: &Path, changed: Arc<Notify>) -> notify::Result<notify::RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading is an event too.
        let read = |kind| matches!(kind, EventKind::Access(access) if !matches!(access, AccessKind::Close(notify::event::AccessMode::Write)));
        if !event.is_ok_and(|event| read(event.kind)) {
            changed.notify_one();
        }
    })?;
    // A bare file name has the empty parent, which means the working directory.
    let directory = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    watcher.watch(directory, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}
