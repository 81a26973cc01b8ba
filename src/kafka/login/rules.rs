//! The properties of logging in that kandle reads itself, and the rules between them.

use std::collections::BTreeMap;

use rdkafka::ClientConfig;
use rdkafka::consumer::BaseConsumer;
use rdkafka::error::{KafkaError, KafkaResult};

use super::{AWS_MSK_IAM, MECHANISM, mechanism, plain};
use crate::kafka::consumer::ReaderContext;
use crate::settings::authority;

const METHOD: &str = "sasl.oauthbearer.method";
const GRANT_TYPE: &str = "sasl.oauthbearer.grant.type";
/// Each with its other name in librdkafka.
pub(super) const CLIENT_ID: [&str; 2] =
    ["sasl.oauthbearer.client.id", "sasl.oauthbearer.client.credentials.client.id"];
pub(super) const CLIENT_SECRET: [&str; 2] =
    ["sasl.oauthbearer.client.secret", "sasl.oauthbearer.client.credentials.client.secret"];
pub(super) const TOKEN_URL: &str = "sasl.oauthbearer.token.endpoint.url";
pub(super) const SCOPE: &str = "sasl.oauthbearer.scope";
pub(super) const EXTENSIONS: &str = "sasl.oauthbearer.extensions";
/// As in Kafka's Java clients: percent-encode id and secret in the request's header (RFC 6749, section 2.3.1).
pub(super) const URL_ENCODE: &str = "sasl.oauthbearer.header.urlencode";
pub(super) const CA_LOCATION: &str = "https.ca.location";
pub(super) const CA_PEM: &str = "https.ca.pem";

const OWN: [&str; 12] = [
    METHOD,
    GRANT_TYPE,
    CLIENT_ID[0],
    CLIENT_ID[1],
    CLIENT_SECRET[0],
    CLIENT_SECRET[1],
    TOKEN_URL,
    SCOPE,
    EXTENSIONS,
    URL_ENCODE,
    CA_LOCATION,
    CA_PEM,
];

/// Whether kandle reads this property itself. librdkafka, built without libcurl, refuses it.
pub fn is_own(name: &str) -> bool {
    OWN.contains(&name)
}

/// Whether tokens come from an identity provider.
pub(super) fn is_oidc<'a>(get: impl Fn(&str) -> Option<&'a str>) -> bool {
    get(METHOD).is_some_and(|method| method.eq_ignore_ascii_case("oidc"))
}

/// Checks how a client with these properties logs in. Returns names and messages; the messages hold no value of a
/// secret property.
pub fn check(properties: &BTreeMap<&str, &str>, brokers: &str) -> Vec<(String, String)> {
    let get = |name: &str| properties.get(name).copied();
    let named = MECHANISM.into_iter().find(|name| get(name).is_some());
    let at = |name: &str, message: &str| vec![(name.to_owned(), message.to_owned())];
    let protocol = get("security.protocol").unwrap_or_default().to_ascii_uppercase();
    let mechanism = mechanism(get);
    if let (AWS_MSK_IAM, Some(name)) = (mechanism.as_str(), named) {
        return check_msk_iam(name, &protocol, brokers);
    }
    if !protocol.starts_with("SASL_") {
        return Vec::new();
    }
    // The property that chose the mechanism.
    let chosen = named.unwrap_or("security.protocol");
    if mechanism == "GSSAPI" && !cfg!(feature = "kerberos") {
        return at(
            chosen,
            "GSSAPI (Kerberos) needs a kandle that was built with the cargo feature kerberos; GSSAPI is also the \
             default, so set sasl.mechanism for another one",
        );
    }
    if mechanism == "OAUTHBEARER" {
        let problems = check_oauth(get, chosen);
        if !problems.is_empty() {
            return problems;
        }
    }
    // Let librdkafka check the rest: some mechanisms need more properties. Without brokers it connects to nothing.
    let mut config = ClientConfig::new();
    config.set("security.protocol", "SASL_PLAINTEXT").set("log_level", "0");
    for (name, value) in properties.iter().filter(|(name, _)| name.contains("sasl.")) {
        // Properties that do not exist are reported elsewhere.
        if is_own(name) || ClientConfig::new().set(*name, *value).create_native_config().is_ok() {
            config.set(*name, *value);
        }
    }
    let made: KafkaResult<BaseConsumer<ReaderContext>> = plain(&config).create_with_context(ReaderContext);
    made.err().map_or_else(Vec::new, |error| at(chosen, &reason(error)))
}

/// librdkafka's message, without the value, which may be a secret.
pub fn reason(error: KafkaError) -> String {
    match error {
        KafkaError::ClientConfig(_, reason, ..) | KafkaError::ClientCreation(reason) => reason,
        error => error.to_string(),
    }
}

fn check_msk_iam(name: &str, protocol: &str, brokers: &str) -> Vec<(String, String)> {
    let at = |name: &str, message: &str| vec![(name.to_owned(), message.to_owned())];
    #[cfg(not(feature = "msk-iam"))]
    {
        let _ = (protocol, brokers);
        at(name, "AWS_MSK_IAM needs a kandle that was built with the cargo feature msk-iam")
    }
    #[cfg(feature = "msk-iam")]
    {
        if !protocol.is_empty() && protocol != "SASL_SSL" {
            return at("security.protocol", "must be SASL_SSL, or not set, with AWS_MSK_IAM");
        }
        if super::msk_iam::region(brokers).is_none() {
            return at(
                name,
                "the region is unknown: kafka.brokers has no name that ends with .kafka.REGION.amazonaws.com; set the \
                 environment variable AWS_REGION",
            );
        }
        Vec::new()
    }
}

fn check_oauth<'a>(get: impl Fn(&str) -> Option<&'a str>, chosen: &str) -> Vec<(String, String)> {
    let at = |name: &str, message: String| vec![(name.to_owned(), message)];
    if let Some(method) = get(METHOD).filter(|method| !method.eq_ignore_ascii_case("default"))
        && !is_oidc(&get)
    {
        return at(METHOD, format!("{method:?} is not supported; allowed: oidc"));
    }
    if !is_oidc(&get) {
        let unsecured = get("enable.sasl.oauthbearer.unsecure.jwt");
        if unsecured.is_some_and(|on| on.eq_ignore_ascii_case("true")) {
            return Vec::new();
        }
        return at(chosen, format!("OAUTHBEARER needs {METHOD}: oidc, which says where tokens come from"));
    }
    if let Some(grant) = get(GRANT_TYPE)
        && grant != "client_credentials"
    {
        return at(GRANT_TYPE, format!("{grant:?} is not supported; allowed: client_credentials"));
    }
    let needed = [&CLIENT_ID[..], &CLIENT_SECRET[..], &[TOKEN_URL]];
    let missing = needed.iter().filter(|names| names.iter().all(|name| get(name).is_none_or(str::is_empty)));
    let missing: Vec<&str> = missing.map(|names| names[0]).collect();
    if !missing.is_empty() {
        return at(METHOD, format!("oidc needs {}", missing.join(", ")));
    }
    for names in [CLIENT_ID, CLIENT_SECRET] {
        if names.iter().all(|name| get(name).is_some()) {
            return at(names[1], format!("is the same property as {}: write one name", names[0]));
        }
    }
    if let Some(url) = get(TOKEN_URL) {
        match authority(url) {
            None => {
                let message = "is not an address such as https://login.example.com/oauth2/token";
                return at(TOKEN_URL, message.to_owned());
            }
            Some(authority) if authority.contains('@') => {
                let message = format!("holds a user: set {} and {} instead", CLIENT_ID[0], CLIENT_SECRET[0]);
                return at(TOKEN_URL, message);
            }
            Some(_) => {}
        }
    }
    if let Some(on) = get(URL_ENCODE).filter(|on| !["true", "false"].contains(on)) {
        return at(URL_ENCODE, format!("{on:?} is neither true nor false"));
    }
    if get(CA_LOCATION).is_some() && get(CA_PEM).is_some() {
        return at(CA_PEM, format!("and {CA_LOCATION} exclude each other"));
    }
    match get(EXTENSIONS).map(extensions) {
        Some(Err(message)) => at(EXTENSIONS, message),
        None | Some(Ok(_)) => Vec::new(),
    }
}

/// Parses SASL extensions, `key=value,key=value` (RFC 7628, section 3.1).
///
/// # Errors
/// A part is no `key=value`, or its key does not only have letters, or is `auth`.
pub(super) fn extensions(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut pairs = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let pair = part.split_once('=').filter(|(key, value)| {
            !key.is_empty()
                && key.chars().all(|c| c.is_ascii_alphabetic())
                && *key != "auth"
                && !value.is_empty()
        });
        let Some((key, value)) = pair else {
            return Err(format!("{part:?} is not key=value with a key of letters"));
        };
        pairs.push((key.to_owned(), value.to_owned()));
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_are_pairs() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let read = extensions("logicalCluster=lkc-1, identityPoolId=pool-a=b").unwrap();
        assert_eq!(read, [pair("logicalCluster", "lkc-1"), pair("identityPoolId", "pool-a=b")]);
        assert!(extensions("").unwrap().is_empty());
        for wrong in ["a", "=b", "a1=b", "auth=x", "a="] {
            assert!(extensions(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn each_problem_names_its_property() {
        let problem = |pairs: &[(&'static str, &'static str)]| {
            let mut all: BTreeMap<&str, &str> =
                [("security.protocol", "SASL_SSL"), ("sasl.mechanism", "OAUTHBEARER"), (METHOD, "oidc")]
                    .into();
            all.extend(pairs.iter().copied());
            check(&all, "b:1").into_iter().next().map(|(name, message)| format!("{name} {message}"))
        };
        let whole = [(CLIENT_ID[0], "me"), (CLIENT_SECRET[0], "s"), (TOKEN_URL, "https://idp/token")];
        let with = |name, value| problem(&[&whole[..], &[(name, value)]].concat()).unwrap_or_default();
        assert_eq!(problem(&whole), None);
        assert!(problem(&whole[..1]).unwrap().contains("client.secret, sasl.oauthbearer.token.endpoint.url"));
        assert!(with(METHOD, "default").starts_with("sasl.mechanism OAUTHBEARER needs"));
        assert!(with(METHOD, "odic").starts_with(METHOD));
        assert!(with(GRANT_TYPE, "urn:ietf:params:oauth:grant-type:jwt-bearer").starts_with(GRANT_TYPE));
        assert!(with(TOKEN_URL, "idp/token").starts_with(TOKEN_URL));
        assert!(with(TOKEN_URL, "https://u:p@idp/token").contains("holds a user"));
        assert!(with(EXTENSIONS, "x").starts_with(EXTENSIONS));
        assert!(with(CLIENT_SECRET[1], "t").starts_with(CLIENT_SECRET[1]));
        assert!(with(URL_ENCODE, "yes").starts_with(URL_ENCODE));
    }
}
