//! What a client may ask, and the body that experts are sent.
//!
//! Pure: bytes in, bytes out. There are two ways to the same bytes. The flat one reads the request in place and
//! renders the body once, for all experts to share. The baseline builds a tree of owned fields, copies it for each
//! expert and renders each copy: it is what `memory.objectPool` is compared with.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error as _, MapAccess, Visitor},
    ser::SerializeMap,
};
use serde_json::value::RawValue;

/// Deepest nesting of JSON that is passed on.
pub(crate) const MAX_DEPTH: usize = 64;

/// A query as the client wrote it, its text still in the request's own buffer.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Query<'a> {
    #[serde(borrow)]
    pub(crate) title: Cow<'a, str>,
    #[serde(borrow)]
    pub(crate) content: Cow<'a, str>,
    #[serde(borrow)]
    pub(crate) requester: Cow<'a, str>,
    /// Names of the experts to ask; absent: all.
    #[serde(borrow, default)]
    pub(crate) experts: Option<Vec<Cow<'a, str>>>,
    /// Neither answer from the cache nor put the answers there.
    #[serde(default)]
    pub(crate) no_cache: bool,
    #[serde(borrow, default)]
    metadata: Option<Fields<Cow<'a, str>, &'a RawValue>>,
    #[serde(borrow, default)]
    tags: Option<Vec<Cow<'a, str>>>,
}

/// A JSON object whose keys keep their order and whose values keep their spelling, so that both ways render alike.
#[derive(Debug, Clone)]
struct Fields<K, V>(Vec<(K, V)>);

impl<'de: 'a, 'a> Deserialize<'de> for Fields<Cow<'a, str>, &'a RawValue> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        /// `Cow` alone would copy; this borrows where the text has no escapes.
        #[derive(Deserialize)]
        struct Key<'a>(#[serde(borrow)] Cow<'a, str>);
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields<Cow<'de, str>, &'de RawValue>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some((Key(key), value)) = map.next_entry::<Key<'de>, &'de RawValue>()? {
                    if depth(value.get()) > MAX_DEPTH {
                        return Err(A::Error::custom(format!(
                            "metadata is nested deeper than {MAX_DEPTH} levels"
                        )));
                    }
                    fields.push((key, value));
                }
                Ok(Fields(fields))
            }
        }
        from.deserialize_map(Object)
    }
}

impl<K: AsRef<str>, V: Serialize> Serialize for Fields<K, V> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key.as_ref(), value)?;
        }
        map.end()
    }
}

/// Deepest nesting of a valid JSON text.
pub(crate) fn depth(json: &str) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0_usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// What experts are sent, in this order of fields.
#[derive(Serialize)]
struct Body<'a, S, F> {
    title: &'a str,
    content: &'a str,
    requester: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<&'a F>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tags: Option<&'a Vec<S>>,
}

fn render<S: Serialize, F: Serialize>(body: &Body<'_, S, F>, to: &mut Vec<u8>) {
    // Strings, objects with string keys and raw JSON written to memory: serde_json has no error for these.
    let written = serde_json::to_writer(to, body);
    debug_assert!(written.is_ok());
}

impl<'a> Query<'a> {
    /// Reads a request body. The error is for the client.
    pub(crate) fn parse(body: &'a [u8]) -> Result<Self, String> {
        // A list would be read as well, as the fields in their order.
        if body.trim_ascii_start().first() == Some(&b'[') {
            return Err("the body is not a query: it is a list, and must be an object".to_owned());
        }
        serde_json::from_slice(body).map_err(|error| format!("the body is not a query: {error}"))
    }

    /// Appends the body that every expert is sent.
    pub(crate) fn render(&self, to: &mut Vec<u8>) {
        let Self { title, content, requester, experts: _, no_cache: _, metadata, tags } = self;
        let body = Body { title, content, requester, metadata: metadata.as_ref(), tags: tags.as_ref() };
        render(&body, to);
    }

    /// The baseline's tree: every field an allocation of its own.
    pub(crate) fn to_tree(&self) -> Tree {
        let owned = |text: &Cow<'_, str>| text.clone().into_owned();
        Tree {
            title: owned(&self.title),
            content: owned(&self.content),
            requester: owned(&self.requester),
            metadata: self.metadata.as_ref().map(|Fields(fields)| {
                Fields(fields.iter().map(|(key, value)| (owned(key), (*value).to_owned())).collect())
            }),
            tags: self.tags.as_ref().map(|tags| tags.iter().map(owned).collect()),
        }
    }
}

/// A query as a tree of owned fields.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    title: String,
    content: String,
    requester: String,
    metadata: Option<Fields<String, Box<RawValue>>>,
    tags: Option<Vec<String>>,
}

impl Tree {
    /// Appends the body that an expert is sent.
    pub(crate) fn render(&self, to: &mut Vec<u8>) {
        let Self { title, content, requester, metadata, tags } = self;
        let body = Body { title, content, requester, metadata: metadata.as_ref(), tags: tags.as_ref() };
        render(&body, to);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mutations;

    const WHOLE: &str = r#"{"requester": "me", "content": "a \"b\" \u00e9", "title": "t",
        "experts": ["alpha"], "noCache": true, "tags": ["x", "y\n"],
        "metadata": {"z": 1.00, "a": {"deep": [1, 2]}, "é\t": null, "z": "twice"}}"#;

    #[test]
    fn both_ways_render_the_same_body() {
        for text in [
            WHOLE,
            r#"{"title":"","content":"","requester":""}"#,
            r#"{"title":"","content":"","requester":"","metadata":{},"tags":[]}"#,
        ] {
            let query = Query::parse(text.as_bytes()).expect("valid");
            let (mut flat, mut tree) = (Vec::new(), Vec::new());
            query.render(&mut flat);
            query.to_tree().clone().render(&mut tree);
            assert_eq!(flat, tree);
        }
    }

    #[test]
    fn the_body_keeps_spelling_and_order() {
        let mut body = Vec::new();
        Query::parse(WHOLE.as_bytes()).expect("valid").render(&mut body);
        let expected = concat!(
            r#"{"title":"t","content":"a \"b\" é","requester":"me","#,
            r#""metadata":{"z":1.00,"a":{"deep": [1, 2]},"é\t":null,"z":"twice"},"tags":["x","y\n"]}"#
        );
        assert_eq!(String::from_utf8(body).expect("UTF-8"), expected);
    }

    #[test]
    fn refused() {
        let deep = format!(
            r#"{{"title":"","content":"","requester":"","metadata":{{"a":{}1{}}}}}"#,
            "[".repeat(100_000),
            "]".repeat(100_000)
        );
        for (body, words) in [
            (&b""[..], "EOF"),
            (b"null", "struct Query"),
            (b"{}", "missing field"),
            (br#"["","",""]"#, "must be an object"),
            (br#"{"title":"","content":"","requester":1}"#, "string"),
            (br#"{"title":"","content":"","requester":"","nocache":true}"#, "noCache"),
            (br#"{"title":"","content":"","requester":"","metadata":[]}"#, "a JSON object"),
            (br#"{"title":"","content":"","requester":""} x"#, "trailing"),
            (b"{\"title\":\"\xff\",\"content\":\"\",\"requester\":\"\"}", "unicode"),
            (deep.as_bytes(), "nested deeper"),
        ] {
            let error = Query::parse(body).expect_err("refused");
            assert!(error.contains(words), "{words:?} is not in {error:?}");
        }
    }

    #[test]
    fn depth_counts_brackets_outside_strings() {
        for (json, expected) in
            [("1", 0), ("[]", 1), (r#"{"a":[{}]}"#, 3), (r#""[[[""#, 0), (r#"["\"[["]"#, 1)]
        {
            assert_eq!(depth(json), expected, "{json}");
        }
    }

    const BODIES: &[&str] = &[
        WHOLE,
        r#"{"title":"","content":"\ud83d\ude00","requester":"r","metadata":{"a":[[[{}]]],"b":1e400}}"#,
    ];

    proptest! {
        /// Whatever the bytes: a query that both ways render to the same JSON, or an error.
        #[test]
        fn any_body_is_read_or_refused(
            body in prop_oneof![3 => mutations::of(BODIES), 1 => prop::collection::vec(any::<u8>(), 0..200)]
        ) {
            match Query::parse(&body) {
                Ok(query) => {
                    let (mut flat, mut tree) = (Vec::new(), Vec::new());
                    query.render(&mut flat);
                    query.to_tree().clone().render(&mut tree);
                    prop_assert_eq!(&flat, &tree);
                    let text = std::str::from_utf8(&flat).expect("UTF-8");
                    prop_assert!(depth(text) <= MAX_DEPTH + 1);
                    let (again, mut same) = (Query::parse(&flat).expect("a query"), Vec::new());
                    again.render(&mut same);
                    prop_assert_eq!(&flat, &same);
                }
                Err(error) => prop_assert!(!error.is_empty()),
            }
        }
    }
}
