//! The admin server: /metrics, /livez, /readyz, /status. With a certificate it speaks HTTPS only. With a token it answers
//! nobody else, except that probes need none.

mod access;
mod tls;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use super::{Health, Metrics};
use crate::settings;
use access::Access;
use tls::{Certificate, TlsListener};

/// Interval at which the files of the certificate, the key and the token are read again.
const READ_AGAIN: Duration = Duration::from_secs(2);

/// Why there is no admin server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("server.listen {listen}: {error}")]
    Listen { listen: String, error: std::io::Error },
    #[error("server.{key} {path}: {reason}", path = .path.display())]
    Certificate { key: &'static str, path: PathBuf, reason: String },
}

#[derive(Clone)]
struct Shared {
    metrics: Arc<Metrics>,
    health: Arc<Health>,
}

/// Binds `server.listen` and serves for as long as the runtime lives. Returns the bound address. `token`: `server.token` as
/// it is written, with its placeholders, if it has any: the token may change while kandle runs.
///
/// # Errors
/// The address cannot be bound, or the certificate and its key cannot be used.
pub async fn serve(
    server: &settings::Server,
    token: Option<&str>,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
) -> Result<SocketAddr, ServerError> {
    let failed = |error| ServerError::Listen { listen: server.listen.clone(), error };
    let certificate = Certificate::of(server)?;
    let listener = TcpListener::bind(&server.listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let probes = Router::new().route("/livez", get(livez)).route("/readyz", get(readyz));
    let mut pages = Router::new().route("/metrics", get(metrics_page)).route("/status", get(status));
    if let Some(access) = Access::new(server.token.as_deref(), token) {
        let guard = Arc::new(access);
        tokio::spawn(Arc::clone(&guard).read_again());
        pages = pages.route_layer(from_fn_with_state(guard, access::check));
    }
    let app = probes.merge(pages).with_state(Shared { metrics, health });
    let tls = certificate.is_some();
    tokio::spawn(async move {
        let served = match certificate {
            Some(certificate) => axum::serve(TlsListener::start(listener, address, certificate), app).await,
            None => axum::serve(listener, app).await,
        };
        if let Err(error) = served {
            tracing::error!(%error, "the admin server failed");
        }
    });
    tracing::info!(tls, %address, "admin server listens");
    Ok(address)
}

async fn metrics_page(State(shared): State<Shared>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
    if accept.contains("application/openmetrics-text") {
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        return ([(header::CONTENT_TYPE, kind)], shared.metrics.openmetrics()).into_response();
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], shared.metrics.text())
        .into_response()
}

async fn livez(State(shared): State<Shared>) -> Response {
    match shared.health.stalled() {
        None => (StatusCode::OK, "ok\n").into_response(),
        Some(stage) => (StatusCode::SERVICE_UNAVAILABLE, format!("stalled in {stage}\n")).into_response(),
    }
}

async fn readyz(State(shared): State<Shared>) -> Response {
    match shared.health.is_ready() {
        true => (StatusCode::OK, "ok\n").into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not yet in the group\n").into_response(),
    }
}

async fn status(State(shared): State<Shared>) -> Response {
    Json(shared.health.status()).into_response()
}
