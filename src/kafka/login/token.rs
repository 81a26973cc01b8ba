//! An access token, and why there is none.

use std::fmt;
use std::time::{Duration, SystemTime};

/// An access token for OAUTHBEARER (RFC 7628).
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Token {
    pub value: String,
    /// Whom the token names; for librdkafka's log.
    pub principal: String,
    pub expires: SystemTime,
    /// SASL extensions, key and value.
    pub extensions: Vec<(String, String)>,
}

impl Token {
    /// How long it is valid from now on.
    pub fn lifetime(&self) -> Duration {
        self.expires.duration_since(SystemTime::now()).unwrap_or_default()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("principal", &self.principal).finish_non_exhaustive()
    }
}

/// Why there is no token. The texts hold no secret.
#[derive(Debug, thiserror::Error)]
pub(super) enum TokenError {
    #[error("{url}: {reason}")]
    Unreachable { url: String, reason: String },
    #[error("{url} answers {status}{reason}{}", hint(*.status))]
    Refused { url: String, status: u16, reason: String },
    #[error("the answer of {url} {problem}")]
    Answer { url: String, problem: &'static str },
    #[error("{0}")]
    Secret(String),
    #[error("{key}: {reason}")]
    Certificate { key: &'static str, reason: String },
    #[cfg(feature = "msk-iam")]
    #[error("no AWS credentials that sign a token: {0}")]
    Aws(String),
}

/// What to do after a refusal; an error of the provider's own (5xx) passes.
fn hint(status: u16) -> &'static str {
    match status {
        400..500 => ": check sasl.oauthbearer.client.id, its secret and scope",
        _ => "",
    }
}
