//! Who may read the pages of the admin server: whoever has the bearer token (RFC 6750).

use std::hint::black_box;
use std::sync::{Arc, RwLock};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::READ_AGAIN;
use crate::settings::interpolate;

/// The token that is asked for, as its SHA-256.
pub(super) struct Access {
    expected: RwLock<[u8; 32]>,
    /// The token with its placeholders; `None` if it cannot change.
    written: Option<String>,
}

impl Access {
    /// `None`: everybody may read. `written`: the token with its placeholders, if it has any.
    pub fn new(token: Option<&str>, written: Option<&str>) -> Option<Self> {
        let expected = RwLock::new(digest(token?.as_bytes()));
        Some(Self { expected, written: written.map(str::to_owned) })
    }

    /// Follows a token whose file changes. A file that cannot be read leaves the token as it is.
    pub async fn read_again(self: Arc<Self>) {
        let Some(written) = &self.written else { return };
        loop {
            tokio::time::sleep(READ_AGAIN).await;
            let Ok(token) = interpolate(written) else { continue };
            let new = digest(token.as_bytes());
            let mut expected = self.expected.write().unwrap_or_else(|e| e.into_inner());
            // An empty file is one that is being written.
            if *expected != new && !token.is_empty() {
                *expected = new;
                tracing::info!("server.token has changed: the old one is no longer accepted");
            }
        }
    }

    fn allows(&self, headers: &HeaderMap) -> bool {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| bearer(value.as_bytes()));
        let expected = self.expected.read().unwrap_or_else(|e| e.into_inner());
        given.is_some_and(|token| equal(&digest(token), &expected))
    }
}

fn digest(token: &[u8]) -> [u8; 32] {
    Sha256::digest(token).into()
}

/// Compares in a time that does not depend on where the two differ.
fn equal(one: &[u8; 32], other: &[u8; 32]) -> bool {
    let difference = one.iter().zip(other).fold(0, |sum, (one, other)| black_box(sum | (one ^ other)));
    difference == 0
}

/// The token in the value of `Authorization`.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

/// Answers with 401 to requests without the token.
pub(super) async fn check(State(access): State<Arc<Access>>, request: Request, next: Next) -> Response {
    if access.allows(request.headers()) {
        return next.run(request).await;
    }
    let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
    (StatusCode::UNAUTHORIZED, challenge, "a bearer token is needed: server.token\n").into_response()
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn only_the_token_opens() {
        let access = Access::new(Some("s3cret"), None).unwrap();
        let allows = |value: &'static [u8]| {
            access.allows(&HeaderMap::from_iter([(
                header::AUTHORIZATION,
                HeaderValue::from_bytes(value).unwrap(),
            )]))
        };
        assert!(allows(b"Bearer s3cret"));
        assert!(allows(b"bearer  s3cret "), "the scheme has no case");
        for wrong in [
            &b"Bearer s3cre"[..],
            b"Bearer s3cret2",
            b"Bearer S3CRET",
            b"Bearer ",
            b"Bearer",
            b"Basic s3cret",
            b"s3cret",
            b"",
        ] {
            assert!(!allows(wrong), "{}", String::from_utf8_lossy(wrong));
        }
        assert!(!access.allows(&HeaderMap::new()));
        assert!(Access::new(None, None).is_none());
    }

    #[test]
    fn digests_that_differ_anywhere_are_not_equal() {
        let one = digest(b"x");
        assert!(equal(&one, &one));
        for at in 0..32 {
            let mut other = one;
            other[at] ^= 1;
            assert!(!equal(&one, &other), "{at}");
        }
    }
}
