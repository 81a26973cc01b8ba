//! Requests to the registry: addresses, login, TLS, and what an answer's status means.

use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use ureq::Agent;
use ureq::http::{Request, Response};
use ureq::tls::{ClientCert, RootCerts, TlsConfig};

use super::RegistryError;
use crate::pem::Pem;
use crate::settings::Registry;

/// Largest answer in bytes.
const MAX_ANSWER: u64 = 16 << 20;
/// What is said of a 404 that is not about a schema.
pub(super) const NO_SUCH_PATH: &str =
    "status 404, not from a schema registry: the address may lack a path, as in /apis/ccompat/v7";
const CONTENT_TYPE: &str = "application/vnd.schemaregistry.v1+json";

pub(super) struct Http {
    agent: Agent,
    /// Without a slash at the end.
    urls: Vec<String>,
    /// Index of the address that answered last.
    current: AtomicUsize,
    authorization: Option<String>,
}

/// The body of an error.
#[derive(Deserialize)]
struct ApiError {
    error_code: u32,
    #[serde(default)]
    message: String,
}

impl Http {
    pub fn new(settings: &Registry) -> Result<Self, RegistryError> {
        let mut tls = TlsConfig::builder();
        if let Some(ca) = &settings.ca {
            tls = tls.root_certs(RootCerts::new_with_certs(&pem("ca", ca)?.certificates));
        }
        if let (Some(cert), Some(key)) = (&settings.cert, &settings.key) {
            let chain = pem("cert", cert)?.certificates;
            let key = pem("key", key)?.keys.into_iter().next();
            let key = key.ok_or_else(|| setting("key", "there is no private key in it"))?;
            tls = tls.client_cert(Some(ClientCert::new_with_certs(&chain, key)));
        }
        let agent = Agent::config_builder()
            .timeout_global(Some(settings.timeout.0))
            .http_status_as_error(false)
            .user_agent(concat!("kandle/", env!("CARGO_PKG_VERSION")))
            .tls_config(tls.build())
            .build()
            .into();
        let authorization = match (&settings.token, &settings.username, &settings.password) {
            (Some(token), ..) => Some(format!("Bearer {token}")),
            (None, Some(name), Some(password)) => {
                Some(format!("Basic {}", STANDARD.encode(format!("{name}:{password}"))))
            }
            _ => None,
        };
        let urls = settings.url.0.iter().map(|url| url.trim_end_matches('/').to_owned()).collect();
        Ok(Self { agent, urls, current: AtomicUsize::new(0), authorization })
    }

    pub fn name(&self) -> String {
        self.urls.join(", ")
    }

    /// `what` is requested, for messages.
    pub fn get<T: DeserializeOwned>(&self, path: &str, what: &str) -> Result<T, RegistryError> {
        self.request("GET", path, None, what)
    }

    pub fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &serde_json::Value,
        what: &str,
    ) -> Result<T, RegistryError> {
        self.request("POST", path, Some(body.to_string()), what)
    }

    /// The error for an answer that cannot be used.
    pub fn unusable(&self, reason: &str) -> RegistryError {
        let at = self.current.load(Ordering::Relaxed);
        away(&self.urls[at % self.urls.len()], reason)
    }

    /// Asks each address in turn, first the one that answered last, until one is not away.
    fn request<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<String>,
        what: &str,
    ) -> Result<T, RegistryError> {
        let first = self.current.load(Ordering::Relaxed);
        let mut last = None;
        for i in 0..self.urls.len() {
            let at = (first + i) % self.urls.len();
            match self.request_at(&self.urls[at], method, path, body.clone(), what) {
                Err(error @ RegistryError::Away { .. }) => last = last.or(Some(error)),
                answer => {
                    self.current.store(at, Ordering::Relaxed);
                    return answer;
                }
            }
        }
        Err(last.unwrap_or_else(|| away("", "no address is set")))
    }

    fn request_at<T: DeserializeOwned>(
        &self,
        url: &str,
        method: &str,
        path: &str,
        body: Option<String>,
        what: &str,
    ) -> Result<T, RegistryError> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{url}{path}"))
            .header("accept", format!("{CONTENT_TYPE}, application/json"));
        if let Some(authorization) = &self.authorization {
            request = request.header("authorization", authorization);
        }
        let sent = match body {
            None => request.body(()).map(|request| self.agent.run(request)),
            Some(body) => {
                request.header("content-type", CONTENT_TYPE).body(body).map(|request| self.agent.run(request))
            }
        };
        let answer = sent.map_err(|e| away(url, &e.to_string()))?;
        let mut answer: Response<ureq::Body> = answer.map_err(|e| away(url, &e.to_string()))?;
        let status = answer.status().as_u16();
        let text = answer.body_mut().with_config().limit(MAX_ANSWER).read_to_vec();
        let text = text.map_err(|e| away(url, &e.to_string()))?;
        if (200..300).contains(&status) {
            return serde_json::from_slice(&text)
                .map_err(|e| away(url, &format!("{what}: the answer is not of a schema registry: {e}")));
        }
        Err(failure(url, what, status, &text))
    }
}

/// What an error's status and body mean.
fn failure(url: &str, what: &str, status: u16, body: &[u8]) -> RegistryError {
    let error = serde_json::from_slice::<ApiError>(body).ok();
    let (code, message) = match error {
        Some(error) => (error.error_code, error.message),
        None => (0, String::from_utf8_lossy(body).trim().chars().take(200).collect()),
    };
    let (url, what) = (url.to_owned(), what.to_owned());
    match status {
        // Only the registry's own codes: a proxy's 404 says nothing about a schema.
        404 if code / 100 == 404 => RegistryError::NotFound { url, what, message },
        404 => away(&url, NO_SUCH_PATH),
        401 | 403 | 409 | 422 => RegistryError::Refused { url, what, status, message },
        _ => away(&url, format!("status {status} {message}").trim_end()),
    }
}

fn away(url: &str, reason: &str) -> RegistryError {
    RegistryError::Away { url: url.to_owned(), reason: reason.to_owned() }
}

fn setting(key: &'static str, message: impl Into<String>) -> RegistryError {
    RegistryError::Setting { key, message: message.into() }
}

/// The certificates and private keys of a PEM file, or of its text.
fn pem(key: &'static str, value: &str) -> Result<Pem, RegistryError> {
    let read;
    let text: &[u8] = if value.trim_start().starts_with("-----BEGIN") {
        value.as_bytes()
    } else {
        read = std::fs::read(value).map_err(|e| setting(key, format!("{value}: {e}")))?;
        &read
    };
    let pem = Pem::parse(text).map_err(|e| setting(key, e.to_string()))?;
    if key != "key" && pem.certificates.is_empty() {
        return Err(setting(key, "there is no certificate in it"));
    }
    Ok(pem)
}

/// Characters that are encoded in a part of a path: all but the unreserved ones (RFC 3986, 2.3).
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

pub(super) fn encode(part: &str) -> String {
    utf8_percent_encode(part, ENCODED).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_has_the_kind_that_its_status_and_code_say() {
        let of = |status, body: &str| failure("http://r", "schema id 7", status, body.as_bytes());
        let not_found = of(404, r#"{"error_code":40403,"message":"Schema not found"}"#);
        assert!(matches!(&not_found, RegistryError::NotFound { .. }), "{not_found}");
        assert_eq!(
            not_found.to_string(),
            "the schema registry http://r has no schema id 7: Schema not found"
        );
        assert!(matches!(of(404, "<html>"), RegistryError::Away { .. }), "a proxy's page");
        assert!(matches!(of(404, r#"{"error_code":404}"#), RegistryError::Away { .. }), "no such path");
        for status in [401, 403, 409, 422] {
            assert!(matches!(of(status, "{}"), RegistryError::Refused { .. }), "{status}");
        }
        for status in [408, 429, 500, 502, 503, 301] {
            assert!(matches!(of(status, ""), RegistryError::Away { .. }), "{status}");
        }
    }

    #[test]
    fn subjects_are_encoded() {
        assert_eq!(encode("orders-value_1.x~"), "orders-value_1.x~");
        assert_eq!(encode("a/b c:é"), "a%2Fb%20c%3A%C3%A9");
    }

    #[test]
    fn keys_and_certificates_are_named_in_errors() {
        let of = |registry: Registry| Http::new(&registry).err().map(|error| error.to_string());
        let base =
            || Registry { url: crate::settings::Urls(vec!["https://r".to_owned()]), ..Registry::default() };
        assert_eq!(of(base()), None);
        let missing = of(Registry { ca: Some("/none.pem".to_owned()), ..base() });
        assert!(missing.is_some_and(|message| message.starts_with("registry.ca: /none.pem: ")));
        let empty = Some("-----BEGIN X-----".to_owned());
        assert!(
            of(Registry { ca: empty, ..base() }).is_some_and(|message| message.starts_with("registry.ca: "))
        );
    }
}
