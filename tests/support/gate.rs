//! What stands before a company's schema registry: TLS with a private CA, and a login. Hands requests on to a registry.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};

use super::registry::Registry;
use super::secure::Certificates;

/// Whom it lets through.
#[derive(Clone, Default)]
pub struct Rules {
    /// The value of `Authorization`; `None`: everybody.
    pub authorization: Option<String>,
    /// Clients must have a certificate of the tests' CA.
    pub mutual: bool,
    /// Paths that the registry does not know, each with one that it does.
    pub paths: Vec<(String, String)>,
}

/// Starts a gate, which lasts as long as this process. Returns the address to use instead of the registry's.
pub fn gate(registry: &Registry, files: &Certificates, rules: Rules) -> String {
    let upstream = registry.url.trim_start_matches("http://");
    let (host, path) = upstream.split_once('/').expect("an address with a path");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let (host, config) = (host.to_owned(), Arc::new(config(files, rules.mutual)));
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let connection = ServerConnection::new(Arc::clone(&config)).expect("a configuration");
            let (host, rules) = (host.clone(), rules.clone());
            // A client that does not trust the certificate ends its connection.
            std::thread::spawn(move || drop(answer(StreamOwned::new(connection, stream), &host, &rules)));
        }
    });
    format!("https://localhost:{port}/{path}")
}

fn config(files: &Certificates, mutual: bool) -> ServerConfig {
    let certificates = |name: &str| {
        let all: Result<Vec<_>, _> =
            CertificateDer::pem_file_iter(files.path(name)).expect("a file").collect();
        all.expect("certificates")
    };
    let provider = Arc::new(default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .expect("versions");
    let builder = if mutual {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(certificates("ca.pem"));
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
        builder.with_client_cert_verifier(verifier.expect("a verifier"))
    } else {
        builder.with_no_client_auth()
    };
    let key = PrivateKeyDer::from_pem_file(files.path("server.key")).expect("a key");
    builder.with_single_cert(certificates("server.pem"), key).expect("a certificate and its key")
}

/// One request and its answer.
fn answer(
    mut client: StreamOwned<ServerConnection, TcpStream>,
    host: &str,
    rules: &Rules,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte)?;
        request.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&request).into_owned();
    let header = |name: &str| {
        let find = |line: &str| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        };
        head.lines().find_map(find)
    };
    let length = header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    client.read_exact(&mut body)?;
    if rules.authorization.is_some() && header("authorization") != rules.authorization {
        let refusal = "{\"error_code\":40101,\"message\":\"Unauthorized\"}";
        write!(
            client,
            "HTTP/1.1 401 Unauthorized\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{refusal}",
            refusal.len()
        )?;
    } else {
        let mut head = head.replacen("\r\n", "\r\nConnection: close\r\n", 1);
        for (from, to) in &rules.paths {
            head = head.replacen(&format!("{from} HTTP"), &format!("{to} HTTP"), 1);
        }
        let mut registry = TcpStream::connect(host)?;
        registry.write_all(head.as_bytes())?;
        registry.write_all(&body)?;
        let mut answer = Vec::new();
        registry.read_to_end(&mut answer)?;
        client.write_all(&answer)?;
    }
    client.conn.send_close_notify();
    client.flush()
}
