//! A Kafka with every way to log in: certificates of a CA of its own, users with passwords, an identity provider.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use super::kafka::{Kafka, Options, free_ports};
use super::{http, root};

/// Passwords that a careless reader of configurations would change.
pub const NUMBER: &str = "0123456";
pub const ODD: &str = r##"pa$s#w"o'r\d: {x}"##;
/// Password of the private key and of the key store.
pub const KEY_PASSWORD: &str = "k$y #1";
pub const CLIENT_SECRET: &str = "cl$ent #secret";

/// Seconds that a token lives.
pub const TOKEN_LIFETIME: u64 = 5;

/// The addresses of one broker.
pub struct Secure {
    /// Without any login, for the tests' own clients.
    pub plaintext: String,
    /// TLS.
    pub tls: String,
    /// TLS with a client's certificate.
    pub mutual: String,
    /// SASL over TLS: PLAIN (user `plain`), SCRAM-SHA-256 (`scram256`, `rotated`), SCRAM-SHA-512 (`scram512`).
    pub sasl: String,
    /// OAUTHBEARER over TLS; clients must log in again before their token expires.
    pub oauth: String,
    pub provider: Provider,
    pub files: Certificates,
}

/// The broker of this test process.
pub fn secure() -> &'static Secure {
    static SECURE: OnceLock<Secure> = OnceLock::new();
    SECURE.get_or_init(Secure::start)
}

/// Files in PEM, made by openssl.
pub struct Certificates(PathBuf);

impl Certificates {
    pub fn make() -> Self {
        // Kept for as long as the machine keeps temporary files: the broker reads them until the process ends.
        let made = Self(
            tempfile::Builder::new().prefix("kandle-certificates").tempdir().expect("a directory").keep(),
        );
        let new = |name: &str, subject: &str| {
            let (key, request) = (made.text(&format!("{name}.key")), made.text(&format!("{name}.csr")));
            openssl(&format!("req -newkey rsa:2048 -nodes -keyout {key} -out {request} -subj {subject}"));
            let extensions = made.path(&format!("{name}.ext"));
            std::fs::write(&extensions, "subjectAltName=DNS:localhost,IP:127.0.0.1\n").expect("written");
            openssl(&format!(
                "x509 -req -in {request} -CA {ca} -CAkey {ca_key} -CAcreateserial -days 2 -extfile {} -out {}",
                extensions.display(),
                made.text(&format!("{name}.pem")),
                ca = made.text("ca.pem"),
                ca_key = made.text("ca.key"),
            ));
        };
        let (ca, ca_key) = (made.text("ca.pem"), made.text("ca.key"));
        openssl(&format!(
            "req -x509 -newkey rsa:2048 -nodes -keyout {ca_key} -out {ca} -subj /CN=tests -days 2"
        ));
        new("server", "/CN=localhost");
        new("client", "/CN=client");
        let store = std::fs::read_to_string(made.path("server.key")).expect("a key")
            + &std::fs::read_to_string(made.path("server.pem")).expect("a certificate");
        std::fs::write(made.path("server-store.pem"), store).expect("written");
        std::fs::write(made.path("password"), KEY_PASSWORD).expect("written");
        let (key, certificate) = (made.text("client.key"), made.text("client.pem"));
        let password = made.text("password");
        openssl(&format!(
            "pkcs8 -topk8 -v2 aes-256-cbc -in {key} -passout file:{password} -out {}",
            made.text("client-encrypted.key")
        ));
        openssl(&format!(
            "pkcs12 -export -inkey {key} -in {certificate} -certfile {ca} -passout file:{password} -out {}",
            made.text("client.p12")
        ));
        made
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }
}

fn openssl(arguments: &str) {
    let done = Command::new("openssl").args(arguments.split(' ')).output().expect("openssl runs");
    assert!(done.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}

/// oidc-provider, with a client `kandle`.
pub struct Provider {
    /// Of /token, with a certificate of the tests' CA.
    pub token_url: String,
    address: String,
    /// It ends when its standard input closes, with this process.
    _process: Child,
}

impl Provider {
    fn start(files: &Certificates) -> Self {
        let installed = root().join(".cache/oidc");
        let ours = root().join("tests/support/oidc");
        if !installed.join("node_modules/oidc-provider").exists() {
            std::fs::create_dir_all(&installed).expect("a directory");
            for name in ["package.json", "package-lock.json"] {
                std::fs::copy(ours.join(name), installed.join(name)).expect("copied");
            }
            let npm =
                Command::new("npm").args(["ci", "--no-audit", "--no-fund"]).current_dir(&installed).status();
            assert!(npm.expect("npm runs").success(), "npm ci failed in {}", installed.display());
        }
        // Modules are found from the script's own folder.
        std::fs::copy(ours.join("server.mjs"), installed.join("server.mjs")).expect("copied");
        let port = free_ports();
        let mut process = Command::new("node")
            .arg(installed.join("server.mjs"))
            .args([
                &port.to_string(),
                &(port + 1).to_string(),
                &files.text("server.key"),
                &files.text("server.pem"),
            ])
            .args([CLIENT_SECRET, &TOKEN_LIFETIME.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("node runs");
        let mut lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        let ready = lines.find(|line| line.as_ref().is_ok_and(|line| line == "ready"));
        assert!(ready.is_some(), "the identity provider ended");
        Self {
            token_url: format!("https://localhost:{}/token", port + 1),
            address: format!("127.0.0.1:{port}"),
            _process: process,
        }
    }

    /// How many tokens it has issued.
    pub fn tokens(&self) -> usize {
        let answer = http(&self.address, "/test/tokens").expect("an answer");
        answer.rsplit("\r\n").next().and_then(|body| body.trim().parse().ok()).expect("a number")
    }

    /// No more tokens from now on.
    pub fn pause(&self) {
        http(&self.address, "/test/pause").expect("an answer");
    }

    pub fn resume(&self) {
        http(&self.address, "/test/resume").expect("an answer");
    }
}

impl Secure {
    fn start() -> Self {
        let files = Certificates::make();
        let provider = Provider::start(&files);
        let (first, second) = (free_ports(), free_ports());
        let [tls, mutual, sasl, oauth] = [first, first + 1, second, second + 1];
        let modules = "org.apache.kafka.common.security";
        let properties = |port: u16| {
            let lines = format!(
                "listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller},TLS://127.0.0.1:{tls},MUTUAL://127.0.0.1:{mutual},SASL://127.0.0.1:{sasl},OAUTH://127.0.0.1:{oauth}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},TLS://localhost:{tls},MUTUAL://localhost:{mutual},SASL://localhost:{sasl},OAUTH://localhost:{oauth}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,TLS:SSL,MUTUAL:SSL,SASL:SASL_SSL,OAUTH:SASL_SSL
ssl.keystore.type=PEM
ssl.keystore.location={store}
ssl.truststore.type=PEM
ssl.truststore.location={ca}
listener.name.mutual.ssl.client.auth=required
allow.everyone.if.no.acl.found=false
super.users=User:ANONYMOUS;User:CN=client;User:plain;User:scram256;User:scram512;User:rotated;User:kandle
listener.name.sasl.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.sasl.plain.sasl.jaas.config={modules}.plain.PlainLoginModule required user_plain=\"{NUMBER}\" user_limited=\"{NUMBER}\";
listener.name.sasl.scram-sha-256.sasl.jaas.config={modules}.scram.ScramLoginModule required;
listener.name.sasl.scram-sha-512.sasl.jaas.config={modules}.scram.ScramLoginModule required;
listener.name.sasl.scram-sha-256.connections.max.reauth.ms=4000
listener.name.oauth.sasl.enabled.mechanisms=OAUTHBEARER
listener.name.oauth.oauthbearer.sasl.jaas.config={modules}.oauthbearer.OAuthBearerLoginModule required;
listener.name.oauth.oauthbearer.sasl.server.callback.handler.class={modules}.oauthbearer.OAuthBearerValidatorCallbackHandler
listener.name.oauth.oauthbearer.sasl.oauthbearer.jwks.endpoint.url=http://{idp}/jwks
listener.name.oauth.oauthbearer.sasl.oauthbearer.expected.audience=kafka
listener.name.oauth.oauthbearer.connections.max.reauth.ms=60000",
                controller = port + 1,
                store = files.text("server-store.pem"),
                ca = files.text("ca.pem"),
                idp = provider.address,
            );
            let scram = |mechanism: &str, user: &str, password: &str| {
                // The tool takes what is between the outer quotes as it is.
                format!("--add-scram\n{mechanism}=[name={user},password=\"{password}\"]")
            };
            let users = [
                scram("SCRAM-SHA-256", "scram256", NUMBER),
                scram("SCRAM-SHA-512", "scram512", ODD),
                scram("SCRAM-SHA-256", "rotated", NUMBER),
            ];
            Options {
                properties: lines,
                format_arguments: users.join("\n"),
                java_options: format!(
                    "-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls=http://{}/jwks",
                    provider.address
                ),
                ..Options::default()
            }
        };
        let plaintext = Kafka::start_for_process_with(properties);
        let at = |port: u16| format!("localhost:{port}");
        Self {
            plaintext,
            tls: at(tls),
            mutual: at(mutual),
            sasl: at(sasl),
            oauth: at(oauth),
            provider,
            files,
        }
    }
}

/// Changes a SCRAM user's password.
pub fn change_password(brokers: &str, mechanism: &str, user: &str, password: &str) {
    let change = format!("{mechanism}=[password={password}]");
    super::kafka::tool(
        "kafka.admin.ConfigCommand",
        &[
            "--bootstrap-server",
            brokers,
            "--alter",
            "--entity-type",
            "users",
            "--entity-name",
            user,
            "--add-config",
            &change,
        ],
    );
}

pub fn read(path: &Path) -> String {
    std::fs::read_to_string(path).expect("a file")
}
