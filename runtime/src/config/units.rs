//! Durations as in Go ("90s", "1h30m") and byte sizes ("64MiB"), read and written.
//!
//! Pure text to value: no clock, no I/O. Both directions are here so that what is shown can be fed back in.

/// Serde adapter for [`std::time::Duration`] as a Go-style string.
pub mod duration {
    use std::{fmt, time::Duration};

    use serde::{Deserializer, Serializer, de};

    const UNITS: [(&str, u64); 6] = [
        ("h", 3_600_000_000_000),
        ("m", 60_000_000_000),
        ("s", 1_000_000_000),
        ("ms", 1_000_000),
        ("us", 1_000),
        ("ns", 1),
    ];

    /// Reads a duration such as `90s`, `1h30m`, `250ms` or `0`. Negative values, values without a unit and values
    /// above 292 years are errors, and the error says what to write.
    pub fn parse(text: &str) -> Result<Duration, String> {
        let wrong = || {
            format!(
                "\"{text}\" is not a duration; write a number with a unit, such as 250ms, 90s, 30m or 1h30m"
            )
        };
        if text == "0" {
            return Ok(Duration::ZERO);
        }
        if text.starts_with('-') {
            return Err(format!("\"{text}\" is negative; a duration must be 0s or longer"));
        }
        let mut rest = text;
        let mut nanos: u64 = 0;
        if rest.is_empty() {
            return Err(wrong());
        }
        while !rest.is_empty() {
            let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
            let (number, tail) = rest.split_at(end);
            let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(end);
            let scale = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, n)| *n).ok_or_else(wrong)?;
            nanos = scaled(number, scale).and_then(|n| nanos.checked_add(n)).ok_or_else(wrong)?;
            rest = tail;
        }
        if nanos > i64::MAX as u64 { Err(wrong()) } else { Ok(Duration::from_nanos(nanos)) }
    }

    /// A decimal number times `scale`, exact for whole numbers and cut to whole units of 1 for fractions.
    pub(super) fn scaled(number: &str, scale: u64) -> Option<u64> {
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.len() > 9 || (number.contains('.') && fraction.is_empty()) {
            return None;
        }
        let mut value = whole.parse::<u64>().ok()?.checked_mul(scale)?;
        if !fraction.is_empty() {
            let part = u128::from(fraction.parse::<u64>().ok()?) * u128::from(scale);
            let part = part / 10_u128.pow(u32::try_from(fraction.len()).ok()?);
            value = value.checked_add(u64::try_from(part).ok()?)?;
        }
        Some(value)
    }

    /// Writes a duration in the largest whole units: `1h30m`, `250ms`, `0s`.
    pub fn format(value: Duration) -> String {
        let mut left = u64::try_from(value.as_nanos()).unwrap_or(u64::MAX);
        let mut text = String::new();
        for (unit, scale) in UNITS {
            if left >= scale {
                text.push_str(&format!("{}{unit}", left / scale));
                left %= scale;
            }
        }
        if text.is_empty() { "0s".to_owned() } else { text }
    }

    /// For `#[schemars(schema_with = …)]`.
    pub fn schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "examples": ["250ms", "90s", "1h30m"]})
    }

    /// For `#[serde(with = …)]`.
    pub fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format(*value))
    }

    /// For `#[serde(with = …)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Duration;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration such as 250ms, 90s or 30m")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Duration, E> {
                parse(text).map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, n: u64) -> Result<Duration, E> {
                parse(&n.to_string()).map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Duration, E> {
                parse(&n.to_string()).map_err(E::custom)
            }

            fn visit_f64<E: de::Error>(self, n: f64) -> Result<Duration, E> {
                parse(&n.to_string()).map_err(E::custom)
            }
        }
        from.deserialize_any(Visitor)
    }

    /// For fields that may be absent.
    pub mod option {
        use std::time::Duration;

        use serde::{Deserialize, Deserializer, Serializer};

        /// For `#[serde(with = …)]`.
        pub fn serialize<S: Serializer>(value: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
            match value {
                Some(value) => super::serialize(value, to),
                None => to.serialize_none(),
            }
        }

        /// For `#[serde(with = …)]`.
        pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
            #[derive(Deserialize)]
            struct Text(#[serde(with = "super")] Duration);
            Ok(Option::<Text>::deserialize(from)?.map(|Text(value)| value))
        }
    }
}

/// Serde adapter for byte sizes: an integer, or a string with a unit (`16KiB`, `64MiB`).
pub mod bytes {
    use std::fmt;

    use serde::{Deserializer, Serializer, de};

    const UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

    /// Reads a size in bytes such as `64MiB`, `1.5KiB`, `512B` or `4096`.
    pub fn parse(text: &str) -> Result<u64, String> {
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let unit = if unit.is_empty() { "B" } else { unit };
        UNITS
            .iter()
            .find(|(name, _)| *name == unit)
            .and_then(|(_, scale)| super::duration::scaled(number, *scale))
            .ok_or_else(|| {
                format!("\"{text}\" is not a size; write bytes as an integer, or with a unit: 512B, 16KiB, 64MiB, 1GiB")
            })
    }

    /// Writes a size in the largest unit that leaves a whole number: `16KiB`, `1025B`.
    pub fn format(value: u64) -> String {
        UNITS
            .iter()
            .find(|(_, scale)| value >= *scale && value.is_multiple_of(*scale))
            .map_or_else(|| format!("{value}B"), |(unit, scale)| format!("{}{unit}", value / scale))
    }

    /// For `#[schemars(schema_with = …)]`.
    pub fn schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": ["string", "integer"], "examples": ["16KiB", "64MiB", 4096]})
    }

    /// For `#[serde(with = …)]`.
    pub fn serialize<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format(*value))
    }

    /// For `#[serde(with = …)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = u64;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as 4096, 16KiB or 64MiB")
            }

            fn visit_u64<E: de::Error>(self, n: u64) -> Result<u64, E> {
                Ok(n)
            }

            fn visit_i64<E: de::Error>(self, n: i64) -> Result<u64, E> {
                parse(&n.to_string()).map_err(E::custom)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
                parse(text).map_err(E::custom)
            }
        }
        from.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{bytes, duration};

    #[test]
    fn durations() {
        for (text, millis) in [
            ("0", Some(0)),
            ("0s", Some(0)),
            ("250ms", Some(250)),
            ("90s", Some(90_000)),
            ("1h30m", Some(5_400_000)),
            ("1.5s", Some(1_500)),
            ("", None),
            ("90", None),
            ("-1s", None),
            ("1x", None),
            ("s", None),
            ("1.s", None),
            (".5s", None),
            ("1..5s", None),
            ("99999999999999h", None),
            ("9999999h", None),
            ("１s", None),
        ] {
            assert_eq!(duration::parse(text).ok(), millis.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn sizes() {
        for (text, size) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("16KiB", Some(16_384)),
            ("1.5KiB", Some(1536)),
            ("64MiB", Some(64 << 20)),
            ("1GiB", Some(1 << 30)),
            ("", None),
            ("MiB", None),
            ("-1", None),
            ("1 MiB", None),
            ("1MB", None),
            ("99999999999GiB", None),
        ] {
            assert_eq!(bytes::parse(text).ok(), size, "{text}");
        }
    }

    #[test]
    fn what_is_shown_can_be_read_again() {
        for nanos in [0, 1, 999, 1_000_000, 1_500_000_000, 5_400_000_000_000, 86_399_999_999_999] {
            let value = Duration::from_nanos(nanos);
            assert_eq!(duration::parse(&duration::format(value)), Ok(value));
        }
        for size in [0, 1, 1023, 1024, 1025, 64 << 20, (1 << 30) + 1] {
            assert_eq!(bytes::parse(&bytes::format(size)), Ok(size));
        }
    }
}
