//! TLS of the admin server: connections are handed on once their handshake is done. The certificate's files are read again
//! while it runs, so that one that is rotated needs no restart.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use axum::serve::Listener;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::server::TlsStream;

use super::{READ_AGAIN, ServerError};
use crate::settings;

/// How long a client may take for the handshake, and how many may be at it.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const HANDSHAKES: usize = 64;

/// The certificate's files, and what was last read from them.
pub(super) struct Certificate {
    files: [PathBuf; 2],
    read: [Vec<u8>; 2],
    config: Arc<ServerConfig>,
}

impl Certificate {
    /// `None` without `server.cert`.
    ///
    /// # Errors
    /// A file cannot be read, or the key is not that of the certificate.
    pub fn of(server: &settings::Server) -> Result<Option<Self>, ServerError> {
        let (Some(cert), Some(key)) = (&server.cert, &server.key) else { return Ok(None) };
        let read = [read("cert", cert)?, read("key", key)?];
        let files = [cert.clone(), key.clone()];
        let config = Arc::new(config(&files, &read)?);
        Ok(Some(Self { files, read, config }))
    }

    /// Reads the files again. `None` if they are unchanged.
    fn changed(&mut self) -> Result<Option<Arc<ServerConfig>>, ServerError> {
        let read = [read("cert", &self.files[0])?, read("key", &self.files[1])?];
        if read == self.read {
            return Ok(None);
        }
        // What cannot be used is not tried again either, until it changes.
        self.read = read;
        self.config = Arc::new(config(&self.files, &self.read)?);
        Ok(Some(Arc::clone(&self.config)))
    }
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, ServerError> {
    std::fs::read(path).map_err(|error| refused(key, path, &error))
}

fn refused(key: &'static str, path: &Path, reason: &dyn std::fmt::Display) -> ServerError {
    ServerError::Certificate { key, path: path.to_owned(), reason: reason.to_string() }
}

fn config([cert, key]: &[PathBuf; 2], [chain, secret]: &[Vec<u8>; 2]) -> Result<ServerConfig, ServerError> {
    let chain = CertificateDer::pem_slice_iter(chain).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| refused("cert", cert, &error))?;
    if chain.is_empty() {
        return Err(refused("cert", cert, &"there is no certificate in it"));
    }
    let secret = PrivateKeyDer::from_pem_slice(secret).map_err(|error| {
        refused("key", key, &format!("it has no private key without a password: {error}"))
    })?;
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder =
        builder.with_safe_default_protocol_versions().map_err(|error| refused("cert", cert, &error))?;
    let config = builder.with_no_client_auth().with_single_cert(chain, secret);
    let mut config = config.map_err(|error| refused("cert", cert, &error))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Connections whose handshake is done.
pub(super) struct TlsListener {
    address: SocketAddr,
    connections: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
}

impl TlsListener {
    /// Accepts connections for as long as the listener lives. A client that is slow holds up no other.
    pub fn start(listener: TcpListener, address: SocketAddr, certificate: Certificate) -> Self {
        let current = Arc::new(RwLock::new(Arc::clone(&certificate.config)));
        tokio::spawn(follow(certificate, Arc::clone(&current)));
        let (ready, connections) = mpsc::channel(1);
        tokio::spawn(accept(listener, current, ready));
        Self { address, connections }
    }
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.connections.recv().await {
            Some(connection) => connection,
            // The task that accepts ends only with the runtime.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        Ok(self.address)
    }
}

async fn accept(
    mut listener: TcpListener,
    current: Arc<RwLock<Arc<ServerConfig>>>,
    ready: mpsc::Sender<(TlsStream<TcpStream>, SocketAddr)>,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        // axum's way to accept, which bridges errors such as too many open files.
        let (stream, from) = Listener::accept(&mut listener).await;
        let Ok(permit) = Arc::clone(&handshakes).acquire_owned().await else { return };
        let config = Arc::clone(&current.read().unwrap_or_else(|e| e.into_inner()));
        let ready = ready.clone();
        tokio::spawn(async move {
            let handshake = TlsAcceptor::from(config).accept(stream);
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
                Ok(Ok(stream)) => {
                    drop(permit);
                    let _ = ready.send((stream, from)).await;
                }
                Ok(Err(error)) => tracing::debug!(%from, %error, "admin server: a TLS handshake failed"),
                Err(_) => tracing::debug!(%from, "admin server: a TLS handshake timed out"),
            }
        });
    }
}

/// Follows the certificate's files. What cannot be used leaves the old certificate in place.
async fn follow(mut certificate: Certificate, current: Arc<RwLock<Arc<ServerConfig>>>) {
    let mut failed = None;
    loop {
        tokio::time::sleep(READ_AGAIN).await;
        match certificate.changed() {
            Ok(None) => {}
            Ok(Some(config)) => {
                *current.write().unwrap_or_else(|e| e.into_inner()) = config;
                tracing::info!("the admin server has a new certificate");
                failed = None;
            }
            Err(error) => {
                let error = error.to_string();
                if failed.as_ref() != Some(&error) {
                    tracing::warn!(error, "the admin server keeps its old certificate");
                }
                failed = Some(error);
            }
        }
    }
}
