//! Who may ask, and how often: API keys and rate limits.
//!
//! Keys are kept and compared as SHA-256 digests only, each comparison in constant time, and all of them whatever the
//! first ones say. They must therefore be long and random, as keys that a program makes are; a person's password is not.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use hyper::{HeaderMap, header::AUTHORIZATION};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::{
    config::{RateLimit, Server, Source},
    secrets,
};

/// Most keys: each request is compared with all of them.
const MAX_KEYS: usize = 1_000;

/// Why a request is not let in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Denied {
    /// It has no key, or none that is known.
    Key,
    /// It must wait so long.
    Rate(Duration),
}

/// The rules of one configuration.
#[derive(Debug)]
pub(crate) struct Admission {
    keys: Option<Keys>,
    rate: Option<RateLimit>,
    /// Bounds all together where there are no keys.
    all: Bucket,
    base: Instant,
}

#[derive(Debug)]
struct Keys {
    source: Source,
    table: ArcSwap<Vec<Key>>,
}

struct Key {
    name: String,
    digest: [u8; 32],
    bucket: Arc<Bucket>,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Admission {
    pub(crate) fn new(server: &Server, now: Instant) -> Result<Self, String> {
        let keys = server.api_keys.as_ref().map(|source| {
            let table = ArcSwap::from_pointee(parse(&secrets::read(source)?)?);
            Ok::<_, String>(Keys { source: source.clone(), table })
        });
        Ok(Self {
            keys: keys.transpose()?,
            rate: server.rate_limit.clone(),
            all: Bucket::default(),
            base: now,
        })
    }

    pub(crate) fn admit(&self, headers: &HeaderMap, now: Instant) -> Result<(), Denied> {
        let Some(keys) = &self.keys else { return self.take(&self.all, now) };
        let presented: [u8; 32] = Sha256::digest(presented(headers).ok_or(Denied::Key)?).into();
        let table = keys.table.load();
        let mut found = None;
        for key in table.iter() {
            if bool::from(key.digest.ct_eq(&presented)) {
                found = Some(key);
            }
        }
        self.take(&found.ok_or(Denied::Key)?.bucket, now)
    }

    fn take(&self, bucket: &Bucket, now: Instant) -> Result<(), Denied> {
        let Some(rate) = &self.rate else { return Ok(()) };
        let now = u64::try_from(now.saturating_duration_since(self.base).as_nanos()).unwrap_or(u64::MAX);
        bucket.take(rate, now).map_err(Denied::Rate)
    }

    /// Reads the keys again; the old ones stay where that fails. Who keeps its key keeps its bucket.
    pub(crate) fn refresh(&self) {
        let Some(Keys { source: source @ Source::File(_), table }) = &self.keys else { return };
        match secrets::read(source).and_then(|text| parse(&text)) {
            Ok(mut new) => {
                let old = table.load();
                for key in &mut new {
                    if let Some(old) = old.iter().find(|old| old.digest == key.digest) {
                        key.bucket = old.bucket.clone();
                    }
                }
                table.store(new.into());
            }
            Err(reason) => tracing::warn!(reason, "the API keys are not renewed; the old ones stay"),
        }
    }
}

/// The key that a request shows: `authorization: Bearer <key>`, or `x-api-key: <key>`.
fn presented(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(AUTHORIZATION).map(|value| value.as_bytes()).and_then(|value| {
        let (scheme, key) = value.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
    });
    bearer.or_else(|| headers.get("x-api-key").map(|value| value.as_bytes())).map(<[u8]>::trim_ascii)
}

/// Reads lines of `name:digest`. The error names the line and never shows what might be a key.
fn parse(text: &str) -> Result<Vec<Key>, String> {
    let mut keys: Vec<Key> = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let key = line.split_once(':').and_then(|(name, digest)| {
            let digest = digest.trim();
            let hex = digest.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            let mut key = Key { name: name.trim().to_owned(), digest: [0; 32], bucket: Arc::default() };
            if !hex || digest.len() != 64 || key.name.is_empty() {
                return None;
            }
            for (i, byte) in key.digest.iter_mut().enumerate() {
                *byte = u8::from_str_radix(&digest[2 * i..2 * i + 2], 16).ok()?;
            }
            Some(key)
        });
        let key = key.ok_or_else(|| {
            format!(
                "line {} of the keys is not name:digest, with the lower-case hex SHA-256 of the key",
                i + 1
            )
        })?;
        if keys.iter().any(|other| other.name == key.name || other.digest == key.digest) {
            return Err(format!("line {} of the keys has a name or a key that is there already", i + 1));
        }
        if keys.len() == MAX_KEYS {
            return Err(format!("there are more than {MAX_KEYS} keys"));
        }
        keys.push(key);
    }
    if keys.is_empty() {
        return Err("there is no key, so that nobody could ask; add a line name:digest".to_owned());
    }
    Ok(keys)
}

/// A token bucket in one number (GCRA): the time, in nanoseconds, at which the bucket is full again.
#[derive(Debug, Default)]
struct Bucket(AtomicU64);

impl Bucket {
    /// Takes a token at `now`; where there is none, the error is the time until there is.
    fn take(&self, rate: &RateLimit, now: u64) -> Result<(), Duration> {
        let each = 1_000_000_000 / u64::from(rate.per_second.max(1));
        let most = each * u64::from(rate.burst.max(1) - 1);
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full| {
            let full = full.max(now);
            (full - now <= most).then_some(full + each)
        });
        taken.map(drop).map_err(|full| Duration::from_nanos(full.saturating_sub(now + most)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn digest(key: &str) -> String {
        Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn admission(keys: Option<&str>, rate: Option<RateLimit>) -> Admission {
        let table = |text| ArcSwap::from_pointee(parse(text).expect("keys"));
        let keys = keys.map(|text| Keys { source: Source::Env("X".to_owned()), table: table(text) });
        Admission { keys, rate, all: Bucket::default(), base: Instant::now() }
    }

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name.parse().expect("a name"), value.parse().expect("a value"))])
    }

    #[test]
    fn only_a_known_key_opens() {
        let text = format!("# ours\nweb:{}\n\nbatch: {} \n", digest("k1"), digest("k2"));
        let admission = admission(Some(&text), None);
        for (headers, expected) in [
            (headers("authorization", "Bearer k1"), Ok(())),
            (headers("authorization", "bearer  k2"), Ok(())),
            (headers("x-api-key", "k2"), Ok(())),
            (headers("authorization", "Bearer k3"), Err(Denied::Key)),
            (headers("authorization", "Basic k1"), Err(Denied::Key)),
            (headers("authorization", "Bearer"), Err(Denied::Key)),
            (headers("authorization", &format!("Bearer {}", digest("k1"))), Err(Denied::Key)),
            (HeaderMap::new(), Err(Denied::Key)),
        ] {
            assert_eq!(admission.admit(&headers, Instant::now()), expected, "{headers:?}");
        }
    }

    #[test]
    fn keys_are_refused_without_being_shown() {
        let good = digest("k");
        for (text, words) in [
            ("".to_owned(), "no key"),
            ("# none".to_owned(), "no key"),
            ("sk-secret".to_owned(), "line 1"),
            (format!("a:{good}\nb:sk-secret"), "line 2"),
            (format!(":{good}"), "line 1"),
            (format!("a:{}", good.to_uppercase()), "line 1"),
            (format!("a:é{}", &good[2..]), "line 1"),
            (format!("a:{good}\na:{}", digest("l")), "line 2"),
            (format!("a:{good}\nb:{good}"), "line 2"),
        ] {
            let error = parse(&text).expect_err("refused");
            assert!(error.contains(words) && !error.contains("sk-secret"), "{error}");
        }
    }

    #[test]
    fn a_burst_and_then_the_rate() {
        let rate = RateLimit { per_second: 10, burst: 3 };
        let bucket = Bucket::default();
        for _ in 0..3 {
            assert_eq!(bucket.take(&rate, 1), Ok(()));
        }
        assert_eq!(bucket.take(&rate, 1), Err(Duration::from_millis(100)));
        assert_eq!(bucket.take(&rate, 50_000_001), Err(Duration::from_millis(50)));
        assert_eq!(bucket.take(&rate, 100_000_001), Ok(()));
        assert!(bucket.take(&rate, 100_000_001).is_err());
    }

    #[test]
    fn each_key_has_a_bucket_of_its_own() {
        let text = format!("a:{}\nb:{}", digest("a"), digest("b"));
        let admission = admission(Some(&text), Some(RateLimit { per_second: 1, burst: 1 }));
        let now = Instant::now();
        for key in ["a", "b"] {
            assert_eq!(admission.admit(&headers("x-api-key", key), now), Ok(()));
            assert!(matches!(admission.admit(&headers("x-api-key", key), now), Err(Denied::Rate(_))));
        }
        // Who is not known takes nothing from those who are.
        assert_eq!(admission.admit(&headers("x-api-key", "c"), now), Err(Denied::Key));
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_reader_of_keys(text in "(\\PC|\n|:|[0-9a-f]{64}){0,40}") {
            let _ = parse(&text);
        }

        #[test]
        fn never_more_than_rate_and_burst(
            per_second in 1_u32..2_000_000, burst in 1_u32..50, steps in proptest::collection::vec(0_u64..200_000_000, 1..200)
        ) {
            let (rate, bucket) = (RateLimit { per_second, burst }, Bucket::default());
            let (mut now, mut taken) = (0_u64, 0_u64);
            for step in steps {
                now += step;
                taken += u64::from(bucket.take(&rate, now).is_ok());
            }
            let each = 1_000_000_000 / u64::from(per_second);
            prop_assert!(taken <= u64::from(burst) + now / each);
        }
    }
}
