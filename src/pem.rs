//! Certificates and private keys in PEM, for the connections that kandle makes without librdkafka.

use ureq::tls::{Certificate, PemItem, PrivateKey, parse_pem};

/// What a PEM text holds.
pub struct Pem {
    pub certificates: Vec<Certificate<'static>>,
    pub keys: Vec<PrivateKey<'static>>,
}

impl Pem {
    /// # Errors
    /// A part is not valid.
    pub fn parse(text: &[u8]) -> Result<Self, ureq::Error> {
        let (mut certificates, mut keys) = (Vec::new(), Vec::new());
        for item in parse_pem(text) {
            match item? {
                PemItem::Certificate(certificate) => certificates.push(certificate),
                PemItem::PrivateKey(key) => keys.push(key),
                _ => {}
            }
        }
        Ok(Self { certificates, keys })
    }
}
