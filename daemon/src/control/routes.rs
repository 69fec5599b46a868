//! The routes of the control API.

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use skimmer_client::{
    ApiError, Mount, MountRequest, PrefetchReport, PrefetchRequest, Recording, RecordingQuery,
    ShutdownReport, ShutdownRequest, StatusReport, UmountQuery,
};

use super::{Api, Stop};
use crate::mounts::{Failure, Kind};

/// Largest request body taken, bytes.
const BODY_LIMIT: usize = 1 << 20;

/// All routes.
pub fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/mounts", get(mounts).post(mount).delete(umount))
        .route("/v1/prefetch", post(prefetch))
        .route("/v1/recordings", get(recording))
        .route("/v1/shutdown", post(shutdown))
        .route("/metrics", get(metrics))
        .fallback(unknown)
        .layer(axum::extract::DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(api)
}

/// A failure on its way out as JSON.
struct Refusal(Failure);

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self(failure)
    }
}

impl From<JsonRejection> for Refusal {
    fn from(rejection: JsonRejection) -> Self {
        Self(Failure::new(Kind::BadRequest, rejection.body_text()))
    }
}

impl From<QueryRejection> for Refusal {
    fn from(rejection: QueryRejection) -> Self {
        Self(Failure::new(Kind::BadRequest, rejection.body_text()))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Self(failure) = self;
        let status = match failure.kind {
            Kind::BadRequest => StatusCode::BAD_REQUEST,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::Conflict => StatusCode::CONFLICT,
            Kind::BadImage => StatusCode::UNPROCESSABLE_ENTITY,
            Kind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Kind::Source => StatusCode::BAD_GATEWAY,
            Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        tracing::info!(status = status.as_u16(), "refused: {}", failure.message);
        (status, Json(ApiError { error: failure.message, remedy: failure.remedy })).into_response()
    }
}

async fn status(State(api): State<Api>) -> Result<Json<StatusReport>, Refusal> {
    Ok(Json(api.mounts.status().await?))
}

async fn mounts(State(api): State<Api>) -> Json<Vec<Mount>> {
    Json(api.mounts.list())
}

async fn mount(
    State(api): State<Api>,
    body: Result<Json<MountRequest>, JsonRejection>,
) -> Result<Json<Mount>, Refusal> {
    let Json(request) = body?;
    // A task of its own: a caller who hangs up must not leave half a mount.
    let work = tokio::spawn(async move {
        let mount = api.mounts.mount(request).await?;
        tracing::info!(image = %mount.image, target = %mount.target.display(), mode = %mount.mode, "mounted");
        Ok::<_, Failure>(mount)
    });
    Ok(Json(work.await.map_err(Failure::from)??))
}

async fn umount(
    State(api): State<Api>,
    query: Result<Query<UmountQuery>, QueryRejection>,
) -> Result<Json<Mount>, Refusal> {
    let Query(query) = query?;
    let work = tokio::spawn(async move {
        let mount = api.mounts.umount(&query.target, query.detach).await?;
        tracing::info!(target = %mount.target.display(), "unmounted");
        Ok::<_, Failure>(mount)
    });
    Ok(Json(work.await.map_err(Failure::from)??))
}

async fn prefetch(
    State(api): State<Api>,
    body: Result<Json<PrefetchRequest>, JsonRejection>,
) -> Result<Json<PrefetchReport>, Refusal> {
    let Json(request) = body?;
    Ok(Json(api.mounts.prefetch(&request).await?))
}

async fn recording(
    State(api): State<Api>,
    query: Result<Query<RecordingQuery>, QueryRejection>,
) -> Result<Json<Recording>, Refusal> {
    let Query(query) = query?;
    Ok(Json(api.mounts.recording(&query.target).await?))
}

async fn shutdown(
    State(api): State<Api>,
    body: Result<Json<ShutdownRequest>, JsonRejection>,
) -> Result<Json<ShutdownReport>, Refusal> {
    let Json(request) = body?;
    let report = tokio::spawn(async move {
        let report = api.mounts.take_down(request.umount).await?;
        api.stop.send_replace(Some(if report.keeper_stopped { Stop::Everything } else { Stop::Daemon }));
        Ok::<_, Failure>(report)
    });
    Ok(Json(report.await.map_err(Failure::from)??))
}

async fn metrics(State(api): State<Api>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &api.registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => Refusal(Failure::new(Kind::Internal, error.to_string())).into_response(),
    }
}

async fn unknown(method: axum::http::Method, uri: axum::http::Uri) -> Refusal {
    Refusal(Failure::new(Kind::NotFound, format!("{method} {}: there is no such call", uri.path())))
}
