//! `memory.objectPool`: byte buffers that wait for the next query.
//!
//! Pure memory: no clock, no I/O. A buffer is emptied before it enters the pool, so that nothing of one requester
//! can reach the next, and one above the size limit is freed instead, so that the pool cannot grow to the largest
//! query ever seen. Both the number of buffers that wait and their bytes are bounded.

use std::{
    cell::Cell,
    ops::{Deref, DerefMut},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::available_parallelism,
};

use bytes::Bytes;
use prometheus_client::metrics::counter::Counter;

/// Most shards: more would only scatter the buffers.
const MAX_SHARDS: usize = 16;

/// Bounds of a pool.
#[derive(Debug, Clone)]
pub(crate) struct Bounds {
    pub(crate) max_objects: usize,
    pub(crate) max_bytes: usize,
    /// Largest buffer that is kept, in bytes.
    pub(crate) retain_max: usize,
}

/// What became of buffers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    /// Taken: a used one.
    pub(crate) hit: Counter,
    /// Taken: a new one.
    pub(crate) miss: Counter,
    /// Given back and kept.
    pub(crate) kept: Counter,
    /// Given back and freed, since the pool was full, busy or switched off.
    pub(crate) full: Counter,
    /// Given back and freed, since it was too large.
    pub(crate) large: Counter,
}

/// A bounded set of empty buffers.
#[derive(Debug)]
pub(crate) struct BufferPool {
    shards: Box<[Shard]>,
    retain_max: usize,
    retired: AtomicBool,
    counts: Counts,
}

/// One thread's share. The alignment keeps two threads' locks off one cache line (and the neighbour it prefetches).
#[derive(Debug)]
#[repr(align(128))]
struct Shard {
    max_objects: usize,
    max_bytes: usize,
    inner: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    buffers: Vec<Vec<u8>>,
    /// Capacity of all of them.
    bytes: usize,
    /// Fewest buffers since the last trim: those were never needed.
    low: usize,
}

impl BufferPool {
    pub(crate) fn new(bounds: &Bounds, counts: Counts) -> Self {
        let Bounds { max_objects, max_bytes, retain_max } = *bounds;
        // Each shard can hold the largest buffer at least, or it would be of no use.
        let most = max_objects.min(max_bytes / retain_max.max(1)).clamp(1, MAX_SHARDS);
        let shards = available_parallelism().map_or(1, usize::from).clamp(1, most);
        let shards = (0..shards)
            .map(|i| Shard {
                max_objects: max_objects / shards + usize::from(i < max_objects % shards),
                max_bytes: max_bytes / shards,
                inner: Mutex::default(),
            })
            .collect();
        Self { shards, retain_max, retired: AtomicBool::new(false), counts }
    }

    /// An empty buffer: a used one where one waits, else a new one.
    pub(crate) fn take(self: &Arc<Self>) -> Buffer {
        let own = thread_index();
        // The neighbour too, since tasks move between threads and give back elsewhere; never waits for a lock.
        for i in 0..2.min(self.shards.len()) {
            let shard = &self.shards[(own + i) % self.shards.len()];
            let Ok(mut free) = shard.inner.try_lock() else { continue };
            if let Some(bytes) = free.buffers.pop() {
                free.bytes -= bytes.capacity();
                free.low = free.low.min(free.buffers.len());
                drop(free);
                self.counts.hit.inc();
                return Buffer { bytes, pool: Some(self.clone()) };
            }
        }
        self.counts.miss.inc();
        Buffer { bytes: Vec::new(), pool: Some(self.clone()) }
    }

    fn put(&self, mut bytes: Vec<u8>) {
        let size = bytes.capacity();
        if size == 0 {
            return;
        }
        if size > self.retain_max {
            self.counts.large.inc();
            return;
        }
        bytes.clear();
        let own = thread_index();
        for i in 0..2.min(self.shards.len()) {
            let shard = &self.shards[(own + i) % self.shards.len()];
            let Ok(mut free) = shard.inner.try_lock() else { continue };
            // Looked at under the lock, so that nothing enters after `retire` went through the shards.
            if self.retired.load(Ordering::Acquire) {
                break;
            }
            if free.buffers.len() < shard.max_objects && free.bytes + size <= shard.max_bytes {
                free.bytes += size;
                free.buffers.push(bytes);
                drop(free);
                self.counts.kept.inc();
                return;
            }
        }
        self.counts.full.inc();
    }

    /// Frees all buffers that wait.
    pub(crate) fn drain(&self) {
        for shard in &self.shards {
            *shard.inner.lock().unwrap_or_else(PoisonError::into_inner) = Free::default();
        }
    }

    /// Frees all buffers that wait now, and those that are given back later.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
        self.drain();
    }

    /// Frees half of the buffers that nobody needed since the last call.
    pub(crate) fn trim(&self) {
        for shard in &self.shards {
            let mut free = shard.inner.lock().unwrap_or_else(PoisonError::into_inner);
            let keep = free.buffers.len() - free.low.min(free.buffers.len()).div_ceil(2);
            // The oldest are at the front; the back is warm in the processor's cache.
            let surplus = free.buffers.len() - keep;
            let freed: usize = free.buffers.drain(..surplus).map(|buffer| buffer.capacity()).sum();
            free.bytes -= freed;
            free.low = free.buffers.len();
        }
    }

    /// Buffers that wait, and their bytes.
    pub(crate) fn size(&self) -> (usize, usize) {
        self.shards.iter().fold((0, 0), |(objects, bytes), shard| {
            let free = shard.inner.lock().unwrap_or_else(PoisonError::into_inner);
            (objects + free.buffers.len(), bytes + free.bytes)
        })
    }
}

/// A number that stays the same for a thread, spread evenly over the threads.
fn thread_index() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static INDEX: Cell<Option<usize>> = const { Cell::new(None) });
    INDEX.with(|index| {
        index.get().unwrap_or_else(|| {
            let new = NEXT.fetch_add(1, Ordering::Relaxed);
            index.set(Some(new));
            new
        })
    })
}

/// A growing buffer that goes back to its pool, emptied, when it and all [`Bytes`] made of it are gone. Without a
/// pool it is a plain vector.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    pool: Option<Arc<BufferPool>>,
}

impl Buffer {
    /// The content, to be shared without copying.
    pub(crate) fn freeze(mut self) -> Bytes {
        match self.pool {
            Some(_) => Bytes::from_owner(self),
            None => Bytes::from(std::mem::take(&mut self.bytes)),
        }
    }
}

impl Deref for Buffer {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            pool.put(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool(max_objects: usize, retain_max: usize) -> Arc<BufferPool> {
        let bounds = Bounds { max_objects, max_bytes: max_objects * retain_max, retain_max };
        Arc::new(BufferPool::new(&bounds, Counts::default()))
    }

    #[test]
    fn a_buffer_comes_back_empty() {
        let pool = pool(4, 1024);
        let mut buffer = pool.take();
        buffer.extend_from_slice(b"secret of one requester");
        let shared = buffer.freeze();
        let copy = shared.clone();
        drop(shared);
        assert_eq!(pool.size().0, 0, "still in use");
        drop(copy);
        assert_eq!(pool.size().0, 1);
        let again = pool.take();
        assert!(again.is_empty() && again.capacity() > 0);
        assert_eq!((pool.counts.hit.get(), pool.counts.miss.get()), (1, 1));
    }

    #[test]
    fn bounded_by_objects_and_bytes() {
        for max in [1, 2, 3, 7, 128] {
            let pool = pool(max, 1024);
            let many: Vec<_> = (0..4 * max)
                .map(|i| {
                    let mut buffer = pool.take();
                    buffer.resize(1 + (i * 97) % 3000, 7);
                    buffer
                })
                .collect();
            drop(many);
            let (objects, bytes) = pool.size();
            assert!(objects >= 1 && objects <= max, "{objects} of {max}");
            assert!(bytes <= max * 1024);
        }
    }

    #[test]
    fn large_buffers_are_refused() {
        let pool = pool(4, 1024);
        let mut buffer = pool.take();
        buffer.resize(1025, 0);
        drop(buffer);
        assert_eq!(pool.size(), (0, 0));
        assert_eq!(pool.counts.large.get(), 1);
    }

    /// What may happen to a pool and its buffers.
    #[derive(Debug, Clone)]
    enum Act {
        Take,
        Write(usize, u8, usize),
        Freeze(usize),
        Copy(usize),
        Give(usize),
        Trim,
        Drain,
    }

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        let act = prop_oneof![
            4 => Just(Act::Take),
            4 => (any::<usize>(), 1..=255_u8, 0..1500_usize).prop_map(|(i, byte, n)| Act::Write(i, byte, n)),
            2 => any::<usize>().prop_map(Act::Freeze),
            2 => any::<usize>().prop_map(Act::Copy),
            4 => any::<usize>().prop_map(Act::Give),
            1 => Just(Act::Trim),
            1 => Just(Act::Drain),
        ];
        prop::collection::vec(act, 0..300)
    }

    proptest! {
        /// Whatever happens: a buffer that is taken is empty, what was written stays as it is for as long as somebody
        /// holds it, and the bounds hold.
        #[test]
        fn nothing_of_one_requester_is_seen_by_the_next(
            acts in acts(), max_objects in 1..8_usize, max_bytes in 1024..8192_usize,
        ) {
            let bounds = Bounds { max_objects, max_bytes, retain_max: 1024 };
            let pool = Arc::new(BufferPool::new(&bounds, Counts::default()));
            let (mut owned, mut shared) = (Vec::<(Buffer, Vec<u8>)>::new(), Vec::<(Bytes, Vec<u8>)>::new());
            for act in acts {
                match act {
                    Act::Take => {
                        let buffer = pool.take();
                        prop_assert!(buffer.is_empty());
                        owned.push((buffer, Vec::new()));
                    }
                    Act::Write(i, byte, n) if !owned.is_empty() => {
                        let i = i % owned.len();
                        let (buffer, expected) = &mut owned[i];
                        buffer.extend(std::iter::repeat_n(byte, n));
                        expected.extend(std::iter::repeat_n(byte, n));
                    }
                    Act::Freeze(i) if !owned.is_empty() => {
                        let (buffer, expected) = owned.swap_remove(i % owned.len());
                        shared.push((buffer.freeze(), expected));
                    }
                    Act::Copy(i) if !shared.is_empty() => shared.push(shared[i % shared.len()].clone()),
                    Act::Give(i) if i % 2 == 0 && !owned.is_empty() => drop(owned.swap_remove(i % owned.len())),
                    Act::Give(i) if !shared.is_empty() => drop(shared.swap_remove(i % shared.len())),
                    Act::Trim => pool.trim(),
                    Act::Drain => {
                        pool.drain();
                        prop_assert_eq!(pool.size(), (0, 0));
                    }
                    _ => {}
                }
                let (objects, bytes) = pool.size();
                prop_assert!(objects <= max_objects && bytes <= max_bytes, "{} {}", objects, bytes);
                prop_assert!(owned.iter().all(|(buffer, expected)| **buffer == *expected));
                prop_assert!(shared.iter().all(|(bytes, expected)| bytes == expected));
            }
            // Switched off while buffers are out: they are freed when they come back.
            pool.retire();
            drop((owned, shared));
            prop_assert_eq!(pool.size(), (0, 0));
        }
    }

    #[test]
    fn trim_frees_what_nobody_needs() {
        let pool = pool(64, 1024);
        drop(
            (0..16)
                .map(|_| {
                    let mut b = pool.take();
                    b.push(1);
                    b
                })
                .collect::<Vec<_>>(),
        );
        let before = pool.size().0;
        for _ in 0..8 {
            pool.trim();
        }
        assert!(before > 0);
        assert_eq!(pool.size().0, 0);
    }

    #[test]
    fn threads_share_one_pool_within_its_bounds() {
        let pool = pool(8, 1024);
        std::thread::scope(|scope| {
            for t in 0..4_u8 {
                let pool = &pool;
                scope.spawn(move || {
                    for _ in 0..2_000 {
                        let mut buffer = pool.take();
                        assert!(buffer.is_empty());
                        buffer.extend_from_slice(&[t; 100]);
                        let shared = buffer.freeze();
                        assert!(shared.iter().all(|b| *b == t));
                    }
                });
            }
        });
        assert!(pool.size().0 <= 8);
        let Counts { hit, miss, kept, full, large } = &pool.counts;
        assert_eq!(hit.get() + miss.get(), 8_000);
        assert_eq!(kept.get() + full.get() + large.get(), 8_000);
    }
}
