//! The admin server: /metrics, /livez, /readyz, /status.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;

use super::{Health, Metrics};

#[derive(Clone)]
struct Shared {
    metrics: Arc<Metrics>,
    health: Arc<Health>,
}

/// Binds `listen` and serves for as long as the runtime lives. Returns the bound address.
pub async fn serve(listen: &str, metrics: Arc<Metrics>, health: Arc<Health>) -> std::io::Result<SocketAddr> {
    let listener = tokio::net::TcpListener::bind(listen).await?;
    let address = listener.local_addr()?;
    let app = Router::new()
        .route("/metrics", get(metrics_page))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .with_state(Shared { metrics, health });
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, app).await {
            tracing::error!(%error, "the admin server failed");
        }
    });
    tracing::info!(%address, "admin server listens");
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
