//! Kerberos: a real KDC (Debian's krb5-kdc), a broker that takes only its tickets, the daemon with a keytab.
//! `cargo test --features failpoints,kerberos --test kerberos`.

use crate::support;

use std::process::{Child, Command, Stdio};

use serde_json::json;
use support::kafka::{Kafka, Options, free_ports};
use support::*;

const REALM: &str = "TEST.LOCAL";

/// A KDC with the principals `kafka/localhost` and `kandle`, and a keytab for each.
struct Kdc {
    folder: tempfile::TempDir,
    /// It ends when its standard input closes, with this process.
    _process: Child,
}

impl Kdc {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a directory");
        let port = free_ports();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let client = format!(
            "[libdefaults]\n default_realm = {REALM}\n dns_lookup_kdc = false\n dns_lookup_realm = false\n \
             dns_canonicalize_hostname = false\n rdns = false\n udp_preference_limit = 1\n\
             [realms]\n {REALM} = {{\n  kdc = 127.0.0.1:{port}\n }}\n"
        );
        let server = format!(
            "[kdcdefaults]\n kdc_listen = 127.0.0.1:{port}\n kdc_tcp_listen = 127.0.0.1:{port}\n\
             [realms]\n {REALM} = {{\n  database_name = {}\n  key_stash_file = {}\n  acl_file = {}\n }}\n",
            at("principal"),
            at("stash"),
            at("acl"),
        );
        std::fs::write(at("krb5.conf"), client).expect("written");
        std::fs::write(at("kdc.conf"), server).expect("written");
        let with = |program: &str, arguments: &[&str]| {
            let done = Command::new(program)
                .args(arguments)
                .env("KRB5_CONFIG", at("krb5.conf"))
                .env("KRB5_KDC_PROFILE", at("kdc.conf"))
                .env("PATH", format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default()))
                .output()
                .unwrap_or_else(|error| panic!("{program}: {error}: install krb5-kdc and krb5-admin-server"));
            assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
        };
        with("kdb5_util", &["create", "-s", "-r", REALM, "-P", "master"]);
        for (principal, keytab) in [("kafka/localhost", "kafka.keytab"), ("kandle", "kandle.keytab")] {
            with("kadmin.local", &["-q", &format!("addprinc -randkey {principal}")]);
            with("kadmin.local", &["-q", &format!("ktadd -k {} {principal}", at(keytab))]);
        }
        let process = Command::new("sh")
            .args(["-c", "krb5kdc -n & pid=$!; read -r _; kill $pid"])
            .env("KRB5_CONFIG", at("krb5.conf"))
            .env("KRB5_KDC_PROFILE", at("kdc.conf"))
            .env("PATH", format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default()))
            .stdin(Stdio::piped())
            .spawn()
            .expect("sh runs");
        until("the KDC", || std::net::TcpStream::connect(("127.0.0.1", port)).ok());
        Self { folder, _process: process }
    }

    fn at(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// For clients: where the KDC is, and where tickets are kept.
    fn environment(&self) -> [(&'static str, String); 2] {
        [("KRB5_CONFIG", self.at("krb5.conf")), ("KRB5CCNAME", format!("FILE:{}", self.at("tickets")))]
    }
}

#[test]
fn a_keytab_logs_the_daemon_in() {
    let kdc = Kdc::start();
    let kerberos = free_ports();
    let plaintext = Kafka::start_for_process_with(|port| {
        Options {
        properties: format!(
            "listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller},KERBEROS://127.0.0.1:{kerberos}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},KERBEROS://localhost:{kerberos}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,KERBEROS:SASL_PLAINTEXT
listener.name.kerberos.sasl.enabled.mechanisms=GSSAPI
listener.name.kerberos.sasl.kerberos.service.name=kafka
listener.name.kerberos.gssapi.sasl.jaas.config=com.sun.security.auth.module.Krb5LoginModule required useKeyTab=true storeKey=true keyTab=\"{keytab}\" principal=\"kafka/localhost@{REALM}\";",
            controller = port + 1,
            keytab = kdc.at("kafka.keytab"),
        ),
        java_options: format!("-Djava.security.krb5.conf={}", kdc.at("krb5.conf")),
        ..Options::default()
    }
    });
    let place = Place::on(&plaintext, "kerberos", 1);
    let config = |keytab: &str| {
        let kafka = json!({ "brokers": format!("localhost:{kerberos}"), "properties": {
            "security.protocol": "SASL_PLAINTEXT",
            "sasl.mechanism": "GSSAPI",
            "sasl.kerberos.service.name": "kafka",
            "sasl.kerberos.principal": format!("kandle@{REALM}"),
            "sasl.kerberos.keytab": kdc.at(keytab),
        }});
        let kafka = kafka.to_string();
        place.config(&NOOP.into_iter().chain([("kafka", kafka.as_str())]).collect::<Vec<_>>())
    };
    let check = |keytab: &str| {
        let file = file("kandle.yaml", &config(keytab));
        finish(kandle().args(["check", "-c"]).arg(&file.path).envs(kdc.environment()), b"")
    };
    let (code, out, err) = check("none.keytab");
    assert_eq!(code, 1, "{out}{err}");
    let (code, out, err) = check("kandle.keytab");
    assert_eq!(code, 0, "{out}{err}");

    place.produce((0..5).map(|id| Sent::ticket(0, id, "text")));
    let mut daemon = Daemon::start_with(&config("kandle.keytab"), |command| {
        command.envs(kdc.environment());
    });
    assert_eq!(place.predictions(5).len(), 5);
    daemon.stop();
}
