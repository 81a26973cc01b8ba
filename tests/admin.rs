//! The admin server with a certificate and a token.

use crate::support;

use std::net::TcpStream;
use std::time::Duration;

use serde_json::json;
use support::secure::Certificates;
use support::*;
use ureq::tls::{RootCerts, TlsConfig};

/// A client that trusts one CA.
fn client(files: &Certificates) -> ureq::Agent {
    let ca = std::fs::read(files.path("ca.pem")).expect("a file");
    let ca = ureq::tls::Certificate::from_pem(&ca).expect("a certificate");
    let tls = TlsConfig::builder().root_certs(RootCerts::new_with_certs(&[ca])).build();
    let config = ureq::Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        .max_idle_connections(0)
        .timeout_global(Some(Duration::from_secs(5)));
    config.build().into()
}

/// Status, challenge and body of a GET; `None` if there is no connection.
fn get(
    client: &ureq::Agent,
    address: &str,
    path: &str,
    authorization: Option<&str>,
) -> Option<(u16, String, String)> {
    let port = address.rsplit(':').next().expect("a port");
    let mut request = client.get(format!("https://localhost:{port}{path}"));
    if let Some(value) = authorization {
        request = request.header("authorization", value);
    }
    let mut answer = request.call().ok()?;
    let challenge =
        answer.headers().get("www-authenticate").map(|value| format!("{value:?}")).unwrap_or_default();
    let body = answer.body_mut().read_to_string().ok()?;
    Some((answer.status().as_u16(), challenge, body))
}

fn config(place: &Place, server: serde_json::Value) -> String {
    let server = server.to_string();
    place.config(&NOOP.into_iter().chain([("server", server.as_str())]).collect::<Vec<_>>())
}

#[test]
fn a_certificate_and_a_token_guard_the_pages_but_not_the_probes() {
    let (first, second) = (Certificates::make(), Certificates::make());
    let token = file("token", "hunter2\n");
    let place = Place::new("admin", 1);
    let server = json!({
        "listen": "127.0.0.1:0",
        "cert": first.text("server.pem"),
        "key": first.text("server.key"),
        "token": format!("${{file:{}}}", token.path.display()),
    });
    let config = config(&place, server);
    let shown = file("kandle.yaml", &config);
    let (_, out, _) = finish(kandle().args(["config", "show", "-c"]).arg(&shown.path), b"");
    assert!(out.contains("token:") && !out.contains("hunter2"), "{out}");

    let mut daemon = Daemon::start(&config);
    let address = daemon.address();
    let trusts_first = client(&first);
    until("readiness", || {
        get(&trusts_first, &address, "/readyz", None).filter(|(status, ..)| *status == 200)
    });
    assert_eq!(get(&trusts_first, &address, "/livez", None).expect("an answer").0, 200);
    for wrong in [None, Some("Bearer wrong"), Some("Bearer hunter22"), Some("Basic hunter2"), Some("hunter2")]
    {
        for path in ["/metrics", "/status"] {
            let (status, challenge, body) = get(&trusts_first, &address, path, wrong).expect("an answer");
            assert_eq!((status, challenge.as_str()), (401, "\"Bearer\""), "{path} {wrong:?}");
            assert!(!body.contains("kandle_"), "{body}");
        }
    }
    let (status, _, body) =
        get(&trusts_first, &address, "/metrics", Some("Bearer hunter2")).expect("an answer");
    assert!(status == 200 && body.contains("kandle_window_records"), "{status}: {body}");
    assert_eq!(get(&trusts_first, &address, "/status", Some("Bearer hunter2")).expect("an answer").0, 200);
    assert_eq!(get(&trusts_first, &address, "/none", None).expect("an answer").0, 404);

    // Plain HTTP is no way in, and a client that says nothing holds up no other.
    assert!(http(&address, "/metrics").is_none_or(|answer| !answer.contains("kandle_")));
    let silent: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(&address).expect("connected")).collect();
    assert_eq!(get(&trusts_first, &address, "/livez", None).expect("an answer").0, 200);
    drop(silent);

    // Rotated: first a file that cannot be used, then both.
    let trusts_second = client(&second);
    assert!(get(&trusts_second, &address, "/livez", None).is_none(), "another CA");
    std::fs::copy(second.path("server.pem"), first.path("server.pem")).expect("copied");
    daemon.wait_log("the admin server keeps its old certificate");
    assert_eq!(get(&trusts_first, &address, "/livez", None).expect("an answer").0, 200);
    std::fs::copy(second.path("server.key"), first.path("server.key")).expect("copied");
    until("the new certificate", || get(&trusts_second, &address, "/livez", None));
    assert!(get(&trusts_first, &address, "/livez", None).is_none(), "the old certificate is gone");
    std::fs::write(&token.path, "other").expect("written");
    until("the new token", || {
        get(&trusts_second, &address, "/metrics", Some("Bearer other")).filter(|(status, ..)| *status == 200)
    });
    assert_eq!(get(&trusts_second, &address, "/metrics", Some("Bearer hunter2")).expect("an answer").0, 401);
    let log = daemon.log();
    assert!(!log.contains("hunter2") && !log.contains("Bearer"), "{log}");
    daemon.stop();
}

#[test]
fn a_certificate_that_cannot_be_used_ends_the_start() {
    let files = Certificates::make();
    let place = Place::new("admin-wrong", 1);
    let start = |cert: &str, key: &str| {
        let server = json!({ "listen": "127.0.0.1:0", "cert": cert, "key": key });
        let mut daemon = Daemon::start(&config(&place, server));
        (daemon.wait().code(), daemon.log())
    };
    let (cert, key) = (files.text("server.pem"), files.text("server.key"));
    for (cert, key, said) in [
        ("/none.pem", key.as_str(), "server.cert /none.pem"),
        (&key, &key, "there is no certificate in it"),
        (&cert, &files.text("client-encrypted.key"), "no private key without a password"),
        (&cert, &files.text("client.key"), "server.cert"),
    ] {
        let (code, log) = start(cert, key);
        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains(said), "{said}: {log}");
    }
}
