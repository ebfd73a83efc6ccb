//! Secrets: where they are read from, and how they get into requests without ever getting into a log.
//!
//! The only module that reads secret files and variables. Their values have no `Debug`.

use std::{fmt, io::Read};

use arc_swap::ArcSwap;
use hyper::header::{AUTHORIZATION, HeaderName, HeaderValue};

use crate::config::{self, Source};

/// Largest secret that is read, in bytes.
const MAX_SECRET: u64 = 64 << 10;

/// Reads a secret. The error tells the place and the reason, never the content.
pub(crate) fn read(source: &Source) -> Result<String, String> {
    match source {
        Source::Env(name) => std::env::var(name).map_err(|error| match error {
            std::env::VarError::NotPresent => {
                format!("the environment variable {name} is not set; set it, or name another")
            }
            std::env::VarError::NotUnicode(_) => format!("the environment variable {name} is no UTF-8 text"),
        }),
        Source::File(path) => {
            let mut text = String::new();
            let read = std::fs::File::open(path)
                .and_then(|file| file.take(MAX_SECRET + 1).read_to_string(&mut text))
                .map_err(|error| format!("the file {path} cannot be read: {error}"))?;
            if read as u64 > MAX_SECRET {
                return Err(format!("the file {path} is larger than {MAX_SECRET} bytes"));
            }
            Ok(text)
        }
    }
}

/// A header that lets the runtime in at an expert.
pub(crate) struct Credential {
    config: config::Credential,
    name: HeaderName,
    value: ArcSwap<HeaderValue>,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Credential {
    pub(crate) fn new(config: &config::Credential) -> Result<Self, String> {
        let name: HeaderName =
            config.header.parse().map_err(|_| format!("{:?} is not a header", config.header))?;
        let value = ArcSwap::from_pointee(Self::value(config, &name)?);
        Ok(Self { config: config.clone(), name, value })
    }

    fn value(config: &config::Credential, name: &HeaderName) -> Result<HeaderValue, String> {
        let secret = read(&config.from)?;
        let secret = secret.trim();
        if secret.is_empty() {
            return Err("the secret is empty".to_owned());
        }
        let text = if *name == AUTHORIZATION { format!("Bearer {secret}") } else { secret.to_owned() };
        let mut value = HeaderValue::try_from(text)
            .map_err(|_| "the secret has characters that no header can carry".to_owned())?;
        value.set_sensitive(true);
        Ok(value)
    }

    pub(crate) fn header(&self) -> (HeaderName, HeaderValue) {
        (self.name.clone(), HeaderValue::clone(&self.value.load()))
    }

    /// Reads the secret again; the old one stays where that fails.
    pub(crate) fn refresh(&self) -> Result<(), String> {
        if matches!(self.config.from, Source::File(_)) {
            let new = Self::value(&self.config, &self.name)?;
            if new != **self.value.load() {
                self.value.store(new.into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credential(path: &str, header: &str) -> Result<Credential, String> {
        Credential::new(&config::Credential {
            from: Source::File(path.to_owned()),
            header: header.to_owned(),
        })
    }

    #[test]
    fn a_secret_file_is_trimmed_rotated_and_never_shown() {
        let path = std::env::temp_dir().join(format!("synthex-secret-{}", std::process::id()));
        let text = path.to_str().expect("UTF-8");
        std::fs::write(&path, " s3cret\n").expect("written");
        let bearer = credential(text, "authorization").expect("read");
        assert_eq!(bearer.header().1, "Bearer s3cret");
        assert_eq!(credential(text, "x-api-key").expect("read").header().1, "s3cret");
        assert!(!format!("{bearer:?} {:?}", bearer.header()).contains("s3cret"));

        std::fs::write(&path, "n3w").expect("written");
        bearer.refresh().expect("read again");
        assert_eq!(bearer.header().1, "Bearer n3w");
        for (content, words) in [(&b"\n"[..], "empty"), (b"a\nb", "characters"), (b"\xff", "UTF-8")] {
            std::fs::write(&path, content).expect("written");
            let error = bearer.refresh().expect_err("refused");
            assert!(error.contains(words), "{error}");
            assert_eq!(bearer.header().1, "Bearer n3w", "the old one stays");
        }
        std::fs::remove_file(&path).expect("removed");
        assert!(credential(text, "x-api-key").expect_err("gone").contains(text));
    }

    #[test]
    fn a_variable_that_is_not_set_is_named() {
        let error = read(&Source::Env("SYNTHEX_NO_SUCH_VARIABLE".to_owned())).expect_err("not set");
        assert!(error.contains("SYNTHEX_NO_SUCH_VARIABLE"), "{error}");
    }
}
