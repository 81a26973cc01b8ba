//! Logging in: each way against a real broker and, for tokens, a real identity provider.

use crate::support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::secure::{
    CLIENT_SECRET, KEY_PASSWORD, NUMBER, ODD, TOKEN_LIFETIME, change_password, read, secure,
};
use support::*;

/// Settings of a job that logs in at `address`.
fn config(place: &Place, address: &str, properties: &Value, guarantee: &str) -> String {
    let kafka = json!({ "brokers": address, "properties": properties });
    let delivery = format!("{{ guarantee: {guarantee}, commit_interval: 500ms }}");
    let more = [("kafka", kafka.to_string()), ("delivery", delivery), ("log", "{ level: debug }".to_owned())];
    let more = more.iter().map(|(name, value)| (*name, value.as_str()));
    place.config(&NOOP.into_iter().chain(more).collect::<Vec<_>>())
}

fn with(base: &Value, more: Value) -> Value {
    let mut all = base.as_object().expect("an object").clone();
    all.extend(more.as_object().expect("an object").clone());
    Value::Object(all)
}

/// `kandle check` and `kandle drain` must succeed, and show nothing of `secret`.
fn works(name: &str, address: &str, properties: &Value, guarantee: &str, secret: &str) {
    let place = Place::on(&secure().plaintext, name, 1);
    place.produce((0..20).map(|i| Sent::ticket(0, i, "text")));
    // librdkafka logs its whole configuration, and each step of the login.
    let logged = with(properties, json!({ "debug": "conf,security" }));
    let config = file("kandle.yaml", &config(&place, address, &logged, guarantee));
    for command in ["check", "drain", "config"] {
        let arguments = if command == "config" { vec!["config", "show", "-c"] } else { vec![command, "-c"] };
        let (code, out, err) = finish(kandle().args(arguments).arg(&config.path), b"");
        assert_eq!(code, 0, "{name}: {command}: {out}{err}");
        assert!(
            secret.is_empty() || !format!("{out}{err}").contains(secret),
            "{name}: {command}: {out}{err}"
        );
    }
    assert_eq!(place.predictions(20).len(), 20, "{name}");
}

/// `kandle check` must fail and say `text`.
fn fails(name: &str, address: &str, properties: &Value, text: &str) {
    let place = Place::on(&secure().plaintext, name, 1);
    let config = file("kandle.yaml", &config(&place, address, properties, "at_least_once"));
    let (code, out, err) = finish(kandle().args(["check", "-c"]).arg(&config.path), b"");
    assert_eq!(code, 1, "{name}: {out}{err}");
    let brokers = out.lines().find(|line| line.starts_with("FAIL  brokers"));
    assert!(brokers.is_some_and(|line| line.contains(text)), "{name}: {text} is not in: {out}{err}");
}

#[test]
fn tls_with_a_private_ca() {
    let secure = secure();
    let ca = json!({ "security.protocol": "SSL", "ssl.ca.location": secure.files.text("ca.pem") });
    works("tls", &secure.tls, &ca, "exactly_once", "");
    let inline = json!({ "security.protocol": "ssl", "ssl.ca.pem": read(&secure.files.path("ca.pem")) });
    works("tls-inline", &secure.tls, &inline, "at_least_once", "");
    fails("tls-no-ca", &secure.tls, &json!({ "security.protocol": "SSL" }), "certificate verify failed");
}

#[test]
fn mutual_tls() {
    let (secure, files) = (secure(), &secure().files);
    let base = json!({ "security.protocol": "SSL", "ssl.ca.location": files.text("ca.pem") });
    let certificate = json!({ "ssl.certificate.location": files.text("client.pem") });
    let plain =
        with(&with(&base, certificate.clone()), json!({ "ssl.key.location": files.text("client.key") }));
    works("mutual", &secure.mutual, &plain, "exactly_once", "");
    let encrypted = json!({
        "ssl.key.location": files.text("client-encrypted.key"), "ssl.key.password": KEY_PASSWORD
    });
    works(
        "mutual-password",
        &secure.mutual,
        &with(&with(&base, certificate), encrypted),
        "at_least_once",
        KEY_PASSWORD,
    );
    let store =
        json!({ "ssl.keystore.location": files.text("client.p12"), "ssl.keystore.password": KEY_PASSWORD });
    works("mutual-store", &secure.mutual, &with(&base, store), "at_least_once", KEY_PASSWORD);
    let key = read(&files.path("client.key"));
    let inline = json!({ "ssl.certificate.pem": read(&files.path("client.pem")), "ssl.key.pem": key });
    let line = key.lines().nth(1).expect("a line of the key");
    works("mutual-inline", &secure.mutual, &with(&base, inline), "at_least_once", line);
    fails("mutual-none", &secure.mutual, &base, "");
}

fn sasl(mechanism: &str, user: &str, password: &str) -> Value {
    json!({
        "security.protocol": "SASL_SSL",
        "ssl.ca.location": secure().files.text("ca.pem"),
        "sasl.mechanism": mechanism,
        "sasl.username": user,
        "sasl.password": password,
    })
}

#[test]
fn plain_and_scram() {
    let secure = secure();
    works("plain", &secure.sasl, &sasl("PLAIN", "plain", NUMBER), "exactly_once", "");
    works("scram256", &secure.sasl, &sasl("SCRAM-SHA-256", "scram256", NUMBER), "at_least_once", "");
    works("scram512", &secure.sasl, &sasl("SCRAM-SHA-512", "scram512", ODD), "exactly_once", ODD);
    fails("scram-wrong", &secure.sasl, &sasl("SCRAM-SHA-512", "scram512", NUMBER), "uthentication failed");
    // As people write it: YAML without quotes.
    let place = Place::on(&secure.plaintext, "unquoted", 1);
    let text = config(&place, &secure.sasl, &sasl("PLAIN", "plain", "MARK"), "at_least_once");
    let text = file("kandle.yaml", &text.replace("\"MARK\"", NUMBER));
    let (code, out, err) = finish(kandle().args(["check", "-c"]).arg(&text.path), b"");
    assert_eq!(code, 0, "{out}{err}");
}

#[test]
fn a_rotated_password_is_used_without_a_restart() {
    let secure = secure();
    let place = Place::on(&secure.plaintext, "rotated", 1);
    let password = file("password", NUMBER);
    let properties = sasl("SCRAM-SHA-256", "rotated", &format!("${{file:{}}}", password.path.display()));
    let mut daemon = Daemon::start(&config(&place, &secure.sasl, &properties, "exactly_once"));
    place.produce([Sent::ticket(0, 0, "before")]);
    place.predictions(1);
    // The broker asks for another login every four seconds.
    change_password(&secure.plaintext, "SCRAM-SHA-256", "rotated", "another-secret");
    daemon.wait_log("uthentication failed");
    place.produce([Sent::ticket(0, 1, "while the password is wrong")]);
    std::fs::write(&password.path, "another-secret\n").expect("written");
    daemon.wait_log("the user name or password has changed");
    assert_eq!(place.predictions(2).len(), 2);
    let (_, status) = daemon.get("/status");
    daemon.stop();
    for shown in [daemon.log(), status] {
        assert!(!shown.contains("another-secret"), "{shown}");
    }
}

#[test]
fn a_changed_certificate_is_told() {
    let secure = secure();
    let place = Place::on(&secure.plaintext, "renewed", 1);
    let ca = file("ca.pem", &read(&secure.files.path("ca.pem")));
    let properties = json!({ "security.protocol": "SSL", "ssl.ca.location": ca.path.display().to_string() });
    let mut daemon = Daemon::start(&config(&place, &secure.tls, &properties, "at_least_once"));
    daemon.wait_log("partitions assigned");
    std::fs::write(&ca.path, read(&secure.files.path("client.pem"))).expect("written");
    let line = daemon.wait_log("restart kandle to use it");
    assert!(line.contains("ca.pem"), "{line}");
    daemon.stop();
}

fn oidc(secret: &str) -> Value {
    json!({
        "security.protocol": "SASL_SSL",
        "ssl.ca.location": secure().files.text("ca.pem"),
        "sasl.mechanism": "OAUTHBEARER",
        "sasl.oauthbearer.method": "oidc",
        "sasl.oauthbearer.client.id": "kandle",
        "sasl.oauthbearer.client.secret": secret,
        "sasl.oauthbearer.token.endpoint.url": secure().provider.token_url,
        "sasl.oauthbearer.scope": "kafka",
        "https.ca.location": secure().files.text("ca.pem"),
    })
}

/// One test, since they count the tokens of one identity provider, and pause it.
#[test]
fn tokens_of_an_identity_provider() {
    let secure = secure();
    works("oidc", &secure.oauth, &oidc(CLIENT_SECRET), "at_least_once", CLIENT_SECRET);
    fails("oidc-wrong", &secure.oauth, &oidc("wrong"), "answers 401 (invalid_client");
    let mut untrusted = oidc(CLIENT_SECRET);
    untrusted.as_object_mut().expect("an object").remove("https.ca.location");
    fails("oidc-untrusted", &secure.oauth, &untrusted, "UnknownIssuer");
    tokens_are_refreshed();
    a_token_expires_while_windows_are_in_flight();
}

fn tokens_are_refreshed() {
    let secure = secure();
    let place = Place::on(&secure.plaintext, "refreshed", 2);
    let before = secure.provider.tokens();
    let started = Instant::now();
    let mut daemon = Daemon::start(&config(&place, &secure.oauth, &oidc(CLIENT_SECRET), "exactly_once"));
    let mut sent = 0;
    until("three refreshes", || {
        place.produce([Sent::ticket(sent % 2, sent as usize, "text")]);
        sent += 1;
        (secure.provider.tokens() >= before + 4).then_some(())
    });
    assert_eq!(place.predictions(sent as usize).len(), sent as usize, "{}", daemon.log());
    daemon.stop();
    let log = daemon.log();
    assert!(!log.contains("got no access token") && !log.contains("uthentication failed"), "{log}");
    // All clients of the process share each token.
    let tokens = secure.provider.tokens() - before;
    let most = started.elapsed().as_secs() / (TOKEN_LIFETIME * 3 / 4) + 2;
    assert!(tokens as u64 <= most, "{tokens} tokens in {:?}", started.elapsed());
}

fn a_token_expires_while_windows_are_in_flight() {
    let secure = secure();
    for guarantee in ["exactly_once", "at_least_once"] {
        let place = Place::on(&secure.plaintext, "expired", 1);
        let mut daemon = Daemon::start(&config(&place, &secure.oauth, &oidc(CLIENT_SECRET), guarantee));
        place.produce((0..100).map(|i| Sent::ticket(0, i, "text")));
        place.predictions(1);
        secure.provider.pause();
        daemon.wait_log("got no access token");
        let paused = Instant::now();
        let mut sent = 100;
        // Long enough for the last token to expire and for the broker to close the connections.
        while paused.elapsed() < Duration::from_secs(2 * TOKEN_LIFETIME) {
            place.produce([Sent::ticket(0, sent, "text")]);
            sent += 1;
        }
        assert!(daemon.ended().is_none(), "{}", daemon.log());
        let (ready, _) = daemon.get("/readyz");
        assert_eq!(ready, 200, "it stays ready while Kafka is away");
        secure.provider.resume();
        let got = place.read(&place.output, "all predictions", |got| {
            got.iter().map(|got| got.source().1).collect::<BTreeSet<_>>().len() >= sent
        });
        assert_order(&got);
        if guarantee == "exactly_once" {
            assert_eq!(got.len(), sent);
        }
        daemon.stop();
    }
}
