//! Access tokens by OpenID Connect: the client credentials grant (RFC 6749, section 4.4), with the properties that
//! librdkafka and Kafka's Java clients have for it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::Text;
use super::rules::{self, CA_LOCATION, CA_PEM, EXTENSIONS, SCOPE, TOKEN_URL, URL_ENCODE};
use super::token::{Token, TokenError};
use crate::pem::Pem;

const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of an identity provider's answer that are read.
const LARGEST_ANSWER: u64 = 1 << 20;

/// Asks one identity provider for tokens.
pub(super) struct Provider {
    properties: BTreeMap<String, Text>,
}

/// RFC 6749, sections 5.1 and 5.2.
#[derive(Deserialize)]
struct Answer {
    access_token: Option<String>,
    /// Seconds: a number, or a text that holds one.
    expires_in: Option<serde_json::Value>,
    error: Option<String>,
    error_description: Option<String>,
}

/// The claims of a JSON Web Token that say how long it is valid, in seconds since 1970, and for whom.
#[derive(Default, Deserialize)]
struct Claims {
    exp: Option<f64>,
    sub: Option<String>,
}

impl Provider {
    pub fn new(properties: BTreeMap<String, Text>) -> Self {
        Self { properties }
    }

    /// The property's value now, under the first of its names that is set.
    fn value(&self, names: &[&str]) -> Result<String, TokenError> {
        match names.iter().find_map(|name| self.properties.get(*name)) {
            Some(text) => text.now().map_err(TokenError::Secret),
            None => Ok(String::new()),
        }
    }

    /// Asks for a token. The connection, the certificates and the secret are new each time, so that what was rotated
    /// is picked up.
    ///
    /// # Errors
    /// There is no answer, or none with a token.
    pub fn fetch(&self) -> Result<Token, TokenError> {
        let url = self.value(&[TOKEN_URL])?;
        let id = self.value(&rules::CLIENT_ID)?;
        let secret = self.value(&rules::CLIENT_SECRET)?;
        let scope = self.value(&[SCOPE])?;
        let encode = |text: &str| match self.properties.get(URL_ENCODE).is_some_and(|on| on.value == "true") {
            true => utf8_percent_encode(text, NON_ALPHANUMERIC).to_string(),
            false => text.to_owned(),
        };
        let basic = STANDARD.encode(format!("{}:{}", encode(&id), encode(&secret)));
        let mut form = vec![("grant_type", "client_credentials")];
        if !scope.is_empty() {
            form.push(("scope", &scope));
        }
        let agent = ureq::Agent::new_with_config(
            ureq::Agent::config_builder()
                .timeout_global(Some(REQUEST_TIMEOUT))
                .http_status_as_error(false)
                // A redirect would send the secret elsewhere.
                .max_redirects(0)
                .max_redirects_will_error(false)
                .tls_config(TlsConfig::builder().root_certs(self.roots()?).build())
                .build(),
        );
        let unreachable =
            |e: ureq::Error| TokenError::Unreachable { url: url.clone(), reason: e.to_string() };
        let mut answer = agent
            .post(&url)
            .header("Authorization", format!("Basic {basic}"))
            .header("Accept", "application/json")
            .send_form(form)
            .map_err(unreachable)?;
        let status = answer.status().as_u16();
        let body =
            answer.body_mut().with_config().limit(LARGEST_ANSWER).read_to_vec().map_err(unreachable)?;
        let mut token = read(&url, status, &body, &id)?;
        token.extensions = rules::extensions(&self.value(&[EXTENSIONS])?).unwrap_or_default();
        Ok(token)
    }

    /// The certificates to trust: those of `https.ca.location` or `https.ca.pem`, else Mozilla's.
    fn roots(&self) -> Result<RootCerts, TokenError> {
        let (location, pem) = (self.value(&[CA_LOCATION])?, self.value(&[CA_PEM])?);
        if !pem.is_empty() {
            return Ok(RootCerts::new_with_certs(&certificates(CA_PEM, pem.as_bytes())?));
        }
        if location.is_empty() {
            return Ok(RootCerts::WebPki);
        }
        let unreadable = |e: std::io::Error| TokenError::Certificate {
            key: CA_LOCATION,
            reason: format!("{location}: {e}"),
        };
        let path = Path::new(&location);
        let mut all = Vec::new();
        if path.is_dir() {
            for entry in std::fs::read_dir(path).map_err(unreadable)? {
                let path = entry.map_err(unreadable)?.path();
                if path.is_file() {
                    all.extend(certificates(CA_LOCATION, &std::fs::read(path).map_err(unreadable)?)?);
                }
            }
        } else {
            all = certificates(CA_LOCATION, &std::fs::read(path).map_err(unreadable)?)?;
        }
        if all.is_empty() {
            let reason = format!("{location} has no certificate in PEM");
            return Err(TokenError::Certificate { key: CA_LOCATION, reason });
        }
        Ok(RootCerts::new_with_certs(&all))
    }
}

fn certificates(key: &'static str, pem: &[u8]) -> Result<Vec<Certificate<'static>>, TokenError> {
    match Pem::parse(pem) {
        Ok(pem) => Ok(pem.certificates),
        Err(e) => Err(TokenError::Certificate { key, reason: e.to_string() }),
    }
}

/// Reads an identity provider's answer. `id`: whom the token names if it does not say so itself.
fn read(url: &str, status: u16, body: &[u8], id: &str) -> Result<Token, TokenError> {
    let answer = |problem| TokenError::Answer { url: url.to_owned(), problem };
    let parsed: Option<Answer> = serde_json::from_slice(body).ok();
    if !(200..300).contains(&status) {
        let told = |a: Answer| Some([a.error?, a.error_description.unwrap_or_default()].join(" "));
        let reason = parsed.and_then(told).map(|told| format!(" ({})", told.trim_end())).unwrap_or_default();
        return Err(TokenError::Refused { url: url.to_owned(), status, reason });
    }
    let parsed = parsed.ok_or_else(|| answer("is not JSON"))?;
    let value = parsed.access_token.ok_or_else(|| answer("has no access_token"))?;
    // Not every token is a JSON Web Token.
    let claims: Claims = value
        .split('.')
        .nth(1)
        .and_then(|payload| URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok())
        .and_then(|payload| serde_json::from_slice(&payload).ok())
        .unwrap_or_default();
    let seconds = |value: &serde_json::Value| value.as_f64().or_else(|| value.as_str()?.parse().ok());
    // By our own clock, if possible: `exp` is by the provider's.
    let expires = match (parsed.expires_in.as_ref().and_then(seconds), claims.exp) {
        (Some(lifetime), _) => Duration::try_from_secs_f64(lifetime).map(|after| SystemTime::now() + after),
        (None, Some(exp)) => Duration::try_from_secs_f64(exp).map(|at| SystemTime::UNIX_EPOCH + at),
        (None, None) => {
            return Err(answer("has no expires_in, and the token no exp: its lifetime is unknown"));
        }
    };
    let expires = expires.map_err(|_| answer("has a lifetime that is not a number of seconds"))?;
    let principal = claims.sub.unwrap_or_else(|| id.to_owned());
    Ok(Token { value, principal, expires, extensions: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jwt(claims: &str) -> String {
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims))
    }

    fn answer(body: &str) -> Result<Token, TokenError> {
        read("http://idp/token", 200, body.as_bytes(), "me")
    }

    #[test]
    fn a_lifetime_is_read_from_the_answer_or_from_the_token() {
        let opaque = answer(r#"{"access_token":"opaque","expires_in":3600,"token_type":"Bearer"}"#).unwrap();
        assert_eq!((opaque.value.as_str(), opaque.principal.as_str()), ("opaque", "me"));
        assert!((3590..=3600).contains(&opaque.lifetime().as_secs()));
        let text = answer(r#"{"access_token":"opaque","expires_in":"60"}"#).unwrap();
        assert!((50..=60).contains(&text.lifetime().as_secs()), "Azure writes a text");
        let token = jwt(r#"{"sub":"kandle","exp":4102444800}"#);
        let claimed = answer(&format!(r#"{{"access_token":"{token}"}}"#)).unwrap();
        assert_eq!(claimed.principal, "kandle");
        assert_eq!(claimed.expires, SystemTime::UNIX_EPOCH + Duration::from_secs(4_102_444_800));
        assert!(!format!("{claimed:?}").contains(&token), "tokens are secrets");
    }

    #[test]
    fn answers_without_a_token_say_why() {
        let said = |status, body: &str| {
            read("http://idp/token", status, body.as_bytes(), "me").unwrap_err().to_string()
        };
        let refused = said(401, r#"{"error":"invalid_client","error_description":"unknown client"}"#);
        assert!(
            refused.starts_with("http://idp/token answers 401 (invalid_client unknown client)"),
            "{refused}"
        );
        assert_eq!(said(502, "<html>"), "http://idp/token answers 502", "the provider's own error");
        assert!(said(200, "<html>").contains("is not JSON"));
        assert!(said(200, "{}").contains("has no access_token"));
        assert!(said(200, r#"{"access_token":"x"}"#).contains("lifetime is unknown"));
        assert!(said(200, r#"{"access_token":"x","expires_in":-5}"#).contains("not a number of seconds"));
    }
}
