//! `memory.cacheTtl`: answers of experts, kept for a while, within bounds of age, number and bytes.
//!
//! Our own, although libraries abound: the time to live, exact bounds on entries and bytes at every step, and dropping
//! a share of the oldest would each be a layer of ours on top of one (moka cannot change its capacity at run time,
//! quick_cache knows no time), and what is left to take from it is a map and a queue.
//!
//! Pure: the caller passes the time. The key is the expert, with all of its configuration that decides an answer, and
//! a SHA-256 of the whole query as JSON, requester included, so an answer is only ever given to an identical request.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::metrics::counter::Counter;
use serde_json::value::RawValue;

/// The baseline cache is bounded by its four hours alone in the measurements that it stands for. A service must not
/// die of it, so it has this cap, far above what those four hours hold at common rates.
pub(crate) const BASELINE_MAX_ENTRIES: usize = 1_000_000;
/// As [`BASELINE_MAX_ENTRIES`], in bytes.
pub(crate) const BASELINE_MAX_BYTES: usize = 256 << 20;

/// Bytes of book-keeping per entry: key, map slot with its spare room, queue slot, allocator rounding.
const OVERHEAD: usize = 224;

/// What is asked of whom.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// The expert's name, kind, URL, tool, argument and model.
    pub(crate) expert: Arc<str>,
    /// SHA-256 of the query as JSON.
    pub(crate) body: [u8; 32],
}

/// Bounds of a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) ttl: Duration,
    pub(crate) max_entries: usize,
    pub(crate) max_bytes: usize,
}

/// Entries that were dropped, by why.
#[derive(Debug, Clone, Default)]
pub(crate) struct Evictions {
    /// Too old.
    pub(crate) ttl: Counter,
    /// Above the bounds.
    pub(crate) capacity: Counter,
    /// The container was short of memory.
    pub(crate) pressure: Counter,
}

#[derive(Debug)]
pub(crate) struct Cache {
    pub(crate) bounds: Bounds,
    evictions: Evictions,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<Key, Entry>,
    /// Keys in the order of insertion, which is that of expiry but for second chances. As long as the map.
    order: VecDeque<Key>,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    answer: Arc<RawValue>,
    since: Instant,
    /// Asked for since it was put or last spared: worth a second chance.
    hot: bool,
}

fn cost(answer: &RawValue) -> usize {
    answer.get().len() + OVERHEAD
}

impl Inner {
    fn drop_front(&mut self) {
        if let Some(entry) = self.order.pop_front().and_then(|key| self.entries.remove(&key)) {
            self.bytes -= cost(&entry.answer);
        }
    }

    fn drop_expired(&mut self, ttl: Duration, now: Instant, dropped: &Counter) {
        while let Some(entry) = self.order.front().and_then(|key| self.entries.get(key)) {
            if now.saturating_duration_since(entry.since) < ttl {
                break;
            }
            self.drop_front();
            dropped.inc();
        }
    }

    /// Drops the oldest that nobody asked for again, or that is too old. Each is spared once, so this ends after one
    /// round over all entries.
    fn drop_oldest(&mut self, ttl: Duration, now: Instant) {
        loop {
            let spare = self.order.front().and_then(|key| self.entries.get_mut(key)).is_some_and(|entry| {
                let expired = now.saturating_duration_since(entry.since) >= ttl;
                std::mem::take(&mut entry.hot) && !expired
            });
            if !spare {
                return self.drop_front();
            }
            self.order.rotate_left(1);
        }
    }

    /// A cache that was full once need not hold its table for ever.
    fn shrink(&mut self) {
        if self.entries.capacity() > 64 + 4 * self.entries.len() {
            self.entries.shrink_to_fit();
            self.order.shrink_to_fit();
        }
    }
}

impl Cache {
    pub(crate) fn new(bounds: Bounds, evictions: Evictions) -> Self {
        Self { bounds, evictions, inner: Mutex::default() }
    }

    /// The answer, unless it is older than the time to live.
    pub(crate) fn get(&self, key: &Key, now: Instant) -> Option<Arc<RawValue>> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = inner.entries.get_mut(key)?;
        if now.saturating_duration_since(entry.since) >= self.bounds.ttl {
            return None;
        }
        entry.hot = true;
        Some(entry.answer.clone())
    }

    /// Keeps an answer, and drops what is too old or, above the bounds, the oldest that nobody asked for again. An
    /// answer that is larger than the whole cache is not kept.
    pub(crate) fn put(&self, key: Key, answer: Arc<RawValue>, now: Instant) {
        let size = cost(&answer);
        if size > self.bounds.max_bytes {
            return;
        }
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let inner = &mut *inner;
        inner.drop_expired(self.bounds.ttl, now, &self.evictions.ttl);
        inner.bytes += size;
        match inner.entries.get_mut(&key) {
            // Two equal queries at once: the place in the queue stays, the newer answer counts.
            Some(entry) => {
                inner.bytes -= cost(&entry.answer);
                *entry = Entry { answer, since: now, hot: entry.hot };
            }
            None => {
                inner.order.push_back(key.clone());
                inner.entries.insert(key, Entry { answer, since: now, hot: false });
            }
        }
        while inner.entries.len() > self.bounds.max_entries || inner.bytes > self.bounds.max_bytes {
            inner.drop_oldest(self.bounds.ttl, now);
            self.evictions.capacity.inc();
        }
    }

    /// Drops a share of the entries, since memory is short.
    pub(crate) fn evict(&self, fraction: f64, now: Instant) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let count = (inner.entries.len() as f64 * fraction).ceil() as usize;
        for _ in 0..count.min(inner.entries.len()) {
            inner.drop_oldest(self.bounds.ttl, now);
            self.evictions.pressure.inc();
        }
        inner.shrink();
    }

    /// Drops what is too old, for times when nothing is put.
    pub(crate) fn sweep(&self, now: Instant) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.drop_expired(self.bounds.ttl, now, &self.evictions.ttl);
        inner.shrink();
    }

    /// Entries and bytes.
    pub(crate) fn size(&self) -> (usize, usize) {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        (inner.entries.len(), inner.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(expert: &str, n: u64) -> Key {
        let mut body = [0; 32];
        body[..8].copy_from_slice(&n.to_le_bytes());
        Key { expert: expert.into(), body }
    }

    fn answer(size: usize) -> Arc<RawValue> {
        let text = format!("\"{}\"", "x".repeat(size.saturating_sub(2)));
        Arc::from(RawValue::from_string(text).expect("JSON"))
    }

    fn cache(ttl: u64, max_entries: usize, max_bytes: usize) -> Cache {
        Cache::new(Bounds { ttl: Duration::from_secs(ttl), max_entries, max_bytes }, Evictions::default())
    }

    #[test]
    fn an_answer_is_never_older_than_its_time() {
        let cache = cache(60, 10, 1 << 20);
        let start = Instant::now();
        cache.put(key("a", 1), answer(10), start);
        assert!(cache.get(&key("a", 1), start + Duration::from_millis(59_999)).is_some());
        assert!(cache.get(&key("a", 1), start + Duration::from_secs(60)).is_none());
        cache.sweep(start + Duration::from_secs(60));
        assert_eq!(cache.size(), (0, 0));
    }

    #[test]
    fn only_the_same_expert_and_body_hit() {
        let cache = cache(60, 10, 1 << 20);
        let now = Instant::now();
        cache.put(key("a", 1), answer(10), now);
        assert!(cache.get(&key("b", 1), now).is_none());
        assert!(cache.get(&key("a", 2), now).is_none());
    }

    #[test]
    fn bounds_hold_at_every_step() {
        let cache = cache(60, 20, 20_000);
        let start = Instant::now();
        for i in 0..5_000_u64 {
            let now = start + Duration::from_millis(i * 37);
            cache.put(key("a", i.wrapping_mul(i) % 301), answer((i as usize * 131) % 4_000), now);
            cache.get(&key("a", i % 7), now);
            let (entries, bytes) = cache.size();
            assert!(entries <= 20 && bytes <= 20_000, "{entries} {bytes}");
            let inner = cache.inner.lock().expect("no panic");
            assert_eq!(inner.order.len(), inner.entries.len());
            assert_eq!(inner.bytes, inner.entries.values().map(|e| cost(&e.answer)).sum::<usize>());
        }
    }

    #[test]
    fn an_answer_above_the_whole_cache_is_not_kept() {
        let cache = cache(60, 20, 65_536);
        cache.put(key("a", 1), answer(70_000), Instant::now());
        assert_eq!(cache.size(), (0, 0));
    }

    #[test]
    fn pressure_takes_its_share_from_the_oldest_that_nobody_asked_for() {
        for (entries, fraction, left) in
            [(0, 0.5, 0), (1, 0.01, 0), (10, 0.2, 8), (100, 0.25, 75), (7, 1.0, 0)]
        {
            let cache = cache(60, 1_000, 1 << 20);
            let now = Instant::now();
            for i in 0..entries {
                cache.put(key("a", i), answer(10), now);
            }
            cache.get(&key("a", 0), now);
            cache.evict(fraction, now);
            assert_eq!(cache.size().0, left);
            assert_eq!(cache.evictions.pressure.get(), entries - left as u64);
            assert_eq!(cache.get(&key("a", 0), now).is_some(), left > 0 && entries > 1);
        }
    }

    #[test]
    fn what_is_asked_for_stays_longer() {
        let cache = cache(60, 10, 1 << 20);
        let now = Instant::now();
        for i in 0..100 {
            cache.put(key("a", i), answer(10), now);
            assert!(cache.get(&key("a", 0), now).is_some(), "{i}");
        }
    }
}
