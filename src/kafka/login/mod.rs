//! How clients log in, beyond what librdkafka does by itself: access tokens (OpenID Connect, Amazon MSK with IAM) and
//! passwords in files that change while kandle runs.
//!
//! [`create`] makes every client of the process. Clients that log in the same way share one [`Credentials`], whose
//! thread fetches tokens and gives them to all of its clients, long before the old one expires. So no thread that polls
//! Kafka ever waits for an identity provider, and a client has its token before it is polled for the first time.
//!
//! librdkafka does TLS, PLAIN, SCRAM and the exchange with the broker.

mod credentials;
#[cfg(feature = "msk-iam")]
mod msk_iam;
mod oidc;
mod rules;
mod token;

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::PathBuf;

use rdkafka::ClientConfig;
use rdkafka::admin::AdminClient;
use rdkafka::client::ClientContext;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaResult;
use rdkafka::producer::{BaseProducer, Producer, ProducerContext};
use rdkafka::types::RDKafka;

use crate::settings::Settings;

use credentials::{Credentials, Registration};
pub use rules::{check, is_own, reason};

/// Amazon MSK with IAM, as its documentation for other clients calls it. librdkafka has no such mechanism: it is
/// OAUTHBEARER with a signed request for a token.
const AWS_MSK_IAM: &str = "AWS_MSK_IAM";

/// The two names that librdkafka has for the mechanism.
const MECHANISM: [&str; 2] = ["sasl.mechanism", "sasl.mechanisms"];

/// Prefix under which a [`ClientConfig`] carries a property as it is written, with its placeholders.
const TEMPLATE: &str = "kandle.template.";

/// The sections whose properties a client gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `kafka.properties` alone.
    Both,
    /// `kafka.properties` and `input.properties`.
    Input,
    /// `kafka.properties` and `output.properties`.
    Output,
}

/// Sets the user's properties.
pub fn configure(config: &mut ClientConfig, settings: &Settings, side: Side) {
    let own = match side {
        Side::Both => None,
        Side::Input => Some(("input.properties", &settings.input.properties)),
        Side::Output => Some(("output.properties", &settings.output.properties)),
    };
    for (section, properties) in [("kafka.properties", &settings.kafka.properties)].into_iter().chain(own) {
        for (name, value) in properties {
            config.set(name, &value.0);
            let carried = format!("{TEMPLATE}{name}");
            match settings.templates.get(&format!("{section}.{name}")) {
                Some(template) => config.set(carried, template),
                // An earlier section's.
                None => config.remove(&carried),
            };
        }
    }
}

/// A client of the brokers. Dereferences to rdkafka's.
pub struct Client<T> {
    /// Declared first: the credentials must forget the client before it is destroyed.
    _login: Option<Registration>,
    client: T,
}

impl<T> Deref for Client<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.client
    }
}

/// Creates a client. It connects later, so brokers or identity providers that are away cause no error here.
///
/// # Errors
/// librdkafka refuses the configuration.
pub fn create<T, C>(config: &ClientConfig, context: C) -> KafkaResult<Client<T>>
where
    C: ClientContext,
    T: FromClientConfigAndContext<C> + Native,
{
    let method = Method::of(config);
    let client: T = plain(config).create_with_context(context)?;
    let login = match method.needs_help() {
        // SAFETY: a `Client` drops the registration before the client.
        true => Some(unsafe { Credentials::of(method)?.register(client.native()) }),
        false => None,
    };
    Ok(Client { _login: login, client })
}

/// Clients of librdkafka.
pub trait Native {
    fn native(&self) -> *mut RDKafka;
}

impl<C: ConsumerContext> Native for BaseConsumer<C> {
    fn native(&self) -> *mut RDKafka {
        self.client().native_ptr()
    }
}

impl<C: ProducerContext> Native for BaseProducer<C> {
    fn native(&self) -> *mut RDKafka {
        self.client().native_ptr()
    }
}

impl<C: ClientContext> Native for AdminClient<C> {
    fn native(&self) -> *mut RDKafka {
        self.inner().native_ptr()
    }
}

/// What librdkafka is given: without the properties that only kandle reads.
fn plain(config: &ClientConfig) -> ClientConfig {
    let mut plain = config.clone();
    for name in config.config_map().into_keys() {
        if is_own(name) || name.starts_with(TEMPLATE) {
            plain.remove(name);
        }
    }
    if mechanism(|name| config.get(name)) == AWS_MSK_IAM {
        for name in MECHANISM {
            plain.remove(name);
        }
        plain.set(MECHANISM[0], "OAUTHBEARER").set("security.protocol", "SASL_SSL");
    }
    plain
}

/// The mechanism in capital letters; librdkafka's default is GSSAPI.
fn mechanism<'a>(get: impl Fn(&str) -> Option<&'a str>) -> String {
    MECHANISM.iter().find_map(|name| get(name)).unwrap_or("GSSAPI").to_ascii_uppercase()
}

/// How a client logs in, as far as it concerns kandle. Equal methods share their [`Credentials`].
#[derive(Debug, Clone, PartialEq, Eq)]
struct Method {
    kind: Kind,
    /// Files that librdkafka reads only when a client is created.
    files: Vec<PathBuf>,
}

#[derive(Clone, PartialEq, Eq)]
enum Kind {
    /// librdkafka needs no help.
    Unaided,
    /// A user name and a password that come from files.
    Password { username: Text, password: Text },
    /// OpenID Connect: properties, and those that contain placeholders as they are written.
    Oidc(BTreeMap<String, Text>),
    #[cfg(feature = "msk-iam")]
    MskIam { region: String },
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The values are secrets.
        f.write_str(match self {
            Self::Unaided => "Unaided",
            Self::Password { .. } => "Password",
            Self::Oidc(_) => "Oidc",
            #[cfg(feature = "msk-iam")]
            Self::MskIam { .. } => "MskIam",
        })
    }
}

/// A property's value when the settings were read, and how it is written if it has placeholders.
#[derive(Clone, PartialEq, Eq)]
struct Text {
    value: String,
    template: Option<String>,
}

impl Text {
    /// The value now: files named by placeholders are read again.
    ///
    /// # Errors
    /// A file cannot be read.
    fn now(&self) -> Result<String, String> {
        match &self.template {
            Some(template) => crate::settings::interpolate(template),
            None => Ok(self.value.clone()),
        }
    }

    fn is_in_file(&self) -> bool {
        self.template.as_ref().is_some_and(|template| template.contains("${file:"))
    }
}

impl Method {
    fn of(config: &ClientConfig) -> Self {
        let protocol = config.get("security.protocol").unwrap_or_default().to_ascii_uppercase();
        let mechanism = mechanism(|name| config.get(name));
        let text = |name: &str| {
            let value = config.get(name)?.to_owned();
            Some(Text { value, template: config.get(&format!("{TEMPLATE}{name}")).map(str::to_owned) })
        };
        let is_sasl = protocol.starts_with("SASL_") || mechanism == AWS_MSK_IAM;
        let kind = match (mechanism.as_str(), text("sasl.username"), text("sasl.password")) {
            _ if !is_sasl => Kind::Unaided,
            #[cfg(feature = "msk-iam")]
            (AWS_MSK_IAM, ..) => {
                let region = msk_iam::region(config.get("bootstrap.servers").unwrap_or_default());
                Kind::MskIam { region: region.unwrap_or_default() }
            }
            ("OAUTHBEARER", ..) if rules::is_oidc(|name| config.get(name)) => {
                let own = config.config_map().into_keys().filter(|name| is_own(name));
                Kind::Oidc(own.filter_map(|name| Some((name.to_owned(), text(name)?))).collect())
            }
            (_, Some(username), Some(password)) if username.is_in_file() || password.is_in_file() => {
                Kind::Password { username, password }
            }
            _ => Kind::Unaided,
        };
        let files =
            ["ssl.ca.location", "ssl.certificate.location", "ssl.key.location", "ssl.keystore.location"];
        let files = files.iter().filter_map(|name| config.get(name)).map(PathBuf::from);
        Self { kind, files: files.filter(|path| path.is_file()).collect() }
    }

    fn needs_help(&self) -> bool {
        self.kind != Kind::Unaided || !self.files.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pairs: &[(&str, &str)]) -> ClientConfig {
        let mut config = ClientConfig::new();
        for (name, value) in pairs {
            config.set(*name, *value);
        }
        config
    }

    #[test]
    fn librdkafka_gets_only_what_it_knows() {
        let own = config(&[
            ("security.protocol", "sasl_ssl"),
            ("sasl.mechanisms", "oauthbearer"),
            ("sasl.oauthbearer.method", "oidc"),
            ("sasl.oauthbearer.client.id", "me"),
            ("kandle.template.sasl.oauthbearer.client.secret", "${file:/secret}"),
            ("client.rack", "a"),
        ]);
        let plain = plain(&own);
        let names: Vec<&str> = plain.config_map().into_keys().collect();
        assert_eq!(names, ["client.rack", "sasl.mechanisms", "security.protocol"]);
        assert!(matches!(Method::of(&own).kind, Kind::Oidc(_)));
        assert!(!format!("{:?}", Method::of(&own)).contains("me\""));
    }

    #[test]
    fn a_password_is_watched_only_if_it_is_in_a_file() {
        let login = [
            ("security.protocol", "SASL_PLAINTEXT"),
            ("sasl.mechanism", "SCRAM-SHA-256"),
            ("sasl.username", "u"),
            ("sasl.password", "p"),
        ];
        assert!(!Method::of(&config(&login)).needs_help());
        let mut in_file = config(&login);
        in_file.set("kandle.template.sasl.password", "${file:/secret}");
        assert!(matches!(Method::of(&in_file).kind, Kind::Password { .. }));
        in_file.set("security.protocol", "SSL");
        assert!(!Method::of(&in_file).needs_help(), "there is no login with SASL");
    }
}
