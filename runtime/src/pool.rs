//! `memory.objectPool`: byte buffers that wait for the next query.
//!
//! Pure memory: no clock, no I/O. A buffer is emptied before it enters the pool, so that nothing of one requester
//! can reach the next, and one above the size limit is freed instead, so that the pool cannot grow to the largest
//! query ever seen. The pool holds `max_objects` buffers and `max_objects × retain_max` bytes at the very most.

use std::{
    cell::Cell,
    ops::{Deref, DerefMut},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread::available_parallelism,
};

use bytes::Bytes;
use prometheus_client::metrics::counter::Counter;

/// Most shards: more would only scatter the buffers.
const MAX_SHARDS: usize = 16;

/// A bounded set of empty buffers.
#[derive(Debug)]
pub(crate) struct BufferPool {
    shards: Box<[Shard]>,
    retain_max: usize,
    hit: Counter,
    miss: Counter,
}

/// One thread's share. The alignment keeps two threads' locks off one cache line (and the neighbour it prefetches).
#[derive(Debug)]
#[repr(align(128))]
struct Shard {
    capacity: usize,
    inner: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    buffers: Vec<Vec<u8>>,
    /// Fewest buffers since the last trim: those were never needed.
    low: usize,
}

impl BufferPool {
    pub(crate) fn new(max_objects: usize, retain_max: usize, hit: Counter, miss: Counter) -> Self {
        let shards = available_parallelism().map_or(1, usize::from).clamp(1, MAX_SHARDS).min(max_objects);
        let shards = (0..shards)
            .map(|i| Shard {
                capacity: max_objects / shards + usize::from(i < max_objects % shards),
                inner: Mutex::default(),
            })
            .collect();
        Self { shards, retain_max, hit, miss }
    }

    /// An empty buffer: a used one where one waits, else a new one.
    pub(crate) fn take(self: &Arc<Self>) -> Buffer {
        let own = thread_index();
        // The neighbour too, since tasks move between threads and give back elsewhere; never waits for a lock.
        for i in 0..2.min(self.shards.len()) {
            let shard = &self.shards[(own + i) % self.shards.len()];
            let Ok(mut free) = shard.inner.try_lock() else { continue };
            if let Some(bytes) = free.buffers.pop() {
                free.low = free.low.min(free.buffers.len());
                drop(free);
                self.hit.inc();
                return Buffer { bytes, pool: Some(self.clone()) };
            }
        }
        self.miss.inc();
        Buffer { bytes: Vec::new(), pool: Some(self.clone()) }
    }

    fn put(&self, mut bytes: Vec<u8>) {
        if bytes.capacity() == 0 || bytes.capacity() > self.retain_max {
            return;
        }
        bytes.clear();
        let own = thread_index();
        for i in 0..2.min(self.shards.len()) {
            let shard = &self.shards[(own + i) % self.shards.len()];
            let Ok(mut free) = shard.inner.try_lock() else { continue };
            if free.buffers.len() < shard.capacity {
                free.buffers.push(bytes);
                return;
            }
        }
    }

    /// Frees half of the buffers that nobody needed since the last call.
    pub(crate) fn trim(&self) {
        for shard in &self.shards {
            let mut free = shard.inner.lock().unwrap_or_else(PoisonError::into_inner);
            let keep = free.buffers.len() - free.low.min(free.buffers.len()).div_ceil(2);
            // The oldest are at the front; the back is warm in the processor's cache.
            let surplus = free.buffers.len() - keep;
            drop(free.buffers.drain(..surplus));
            free.low = free.buffers.len();
        }
    }

    /// Buffers that wait, and their bytes.
    pub(crate) fn size(&self) -> (usize, usize) {
        self.shards.iter().fold((0, 0), |(objects, bytes), shard| {
            let free = shard.inner.lock().unwrap_or_else(PoisonError::into_inner);
            (objects + free.buffers.len(), bytes + free.buffers.iter().map(Vec::capacity).sum::<usize>())
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
    use super::*;

    fn pool(max_objects: usize, retain_max: usize) -> Arc<BufferPool> {
        Arc::new(BufferPool::new(max_objects, retain_max, Counter::default(), Counter::default()))
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
        assert_eq!((pool.hit.get(), pool.miss.get()), (1, 1));
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
        assert_eq!(pool.hit.get() + pool.miss.get(), 8_000);
    }
}
