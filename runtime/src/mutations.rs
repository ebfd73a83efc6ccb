//! For tests: texts that are almost right, which find more faults in a parser than noise does.

use proptest::prelude::*;

const PIECES: &[&[u8]] = &[b"\"", b"{", b"[", b":", b",", b"\\u", b"\xff", b"-", b"1e999", b"*a", b"&a"];

/// One of `texts`, with up to six small changes: bytes replaced, taken out, put in, repeated, or the end cut off.
pub(crate) fn of(texts: &'static [&'static str]) -> impl Strategy<Value = Vec<u8>> {
    let change = (any::<prop::sample::Index>(), 0_u8..5, any::<u8>(), 1_usize..40);
    let piece = prop::sample::select(PIECES);
    (prop::sample::select(texts), prop::collection::vec((change, piece), 0..6)).prop_map(|(text, changes)| {
        let mut bytes = text.as_bytes().to_vec();
        for ((at, what, byte, count), piece) in changes {
            let at = at.index(bytes.len() + 1);
            let end = (at + count).min(bytes.len());
            match what {
                0 if at < bytes.len() => bytes[at] = byte,
                1 => drop(bytes.drain(at..end)),
                2 => drop(bytes.splice(at..at, piece.iter().copied())),
                3 => {
                    let again = bytes[at..end].to_vec();
                    drop(bytes.splice(at..at, again));
                }
                _ => bytes.truncate(at),
            }
        }
        bytes
    })
}
