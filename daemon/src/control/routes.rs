//! The routes of the control API.

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use skimmer_client::{
    ApiError, Mount, MountRequest, PrefetchReport, PrefetchRequest, PrepareRequest, Prepared, PreparedQuery,
    Recording, RecordingQuery, ScrubReport, ScrubRequest, ShutdownReport, ShutdownRequest, StatusReport,
    UmountQuery,
};

use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::{Api, Stop};
use crate::exposition::Format;
use crate::mounts::{Failure, Kind};

/// Largest request body taken, bytes.
const BODY_LIMIT: usize = 1 << 20;

/// What the document says of itself.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "skimmerd",
        description = "The control API: HTTP/1.1 with JSON on a unix socket, /run/skimmer/skimmerd.sock unless told \
                       otherwise. Paths are absolute, sizes are bytes, times are seconds since the epoch.",
    ),
    servers((url = "http://skimmerd", description = "Any host name will do: the socket decides.")),
)]
struct Document;

fn described() -> (Router<Api>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(status))
        .routes(routes!(mounts, mount, umount))
        .routes(routes!(prepared, prepare, release))
        .routes(routes!(prefetch))
        .routes(routes!(scrubbed, scrub, stop_scrub))
        .routes(routes!(recording))
        .routes(routes!(shutdown))
        .routes(routes!(reload))
        .routes(routes!(metrics))
        .split_for_parts()
}

/// The OpenAPI document, as JSON.
pub fn document() -> String {
    described().1.to_pretty_json().unwrap_or_default()
}

/// All routes.
pub fn router(api: Api) -> Router {
    described().0.fallback(unknown).layer(axum::extract::DefaultBodyLimit::max(BODY_LIMIT)).with_state(api)
}

/// `/metrics` and nothing else.
pub(super) fn metrics_alone(api: Api) -> Router {
    Router::new().route("/metrics", axum::routing::get(metrics)).fallback(unknown).with_state(api)
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

/// The daemon, its attach modes, mounts and blobs.
#[utoipa::path(
    get,
    path = "/v1/status",
    responses((status = 200, description = "The state.", body = StatusReport), (status = "default", description = "What failed, where, and what to do.", body = ApiError)),
)]
async fn status(State(api): State<Api>) -> Result<Json<StatusReport>, Refusal> {
    Ok(Json(api.mounts.status().await?))
}

/// Lists the mounts, by target.
#[utoipa::path(
    get,
    path = "/v1/mounts",
    responses((status = 200, description = "Live mounts.", body = Vec<Mount>), (status = "default", description = "What failed, where, and what to do.", body = ApiError)),
)]
async fn mounts(State(api): State<Api>) -> Json<Vec<Mount>> {
    Json(api.mounts.list())
}

/// Mounts an image; answers when it can be read.
#[utoipa::path(
    post,
    path = "/v1/mounts",
    request_body = MountRequest,
    responses((status = 200, description = "The mount, which can be used.", body = Mount), (status = "default", description = "What failed, where, and what to do.", body = ApiError)),
)]
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

/// Takes a mount away.
#[utoipa::path(
    delete,
    path = "/v1/mounts",
    params(UmountQuery),
    responses((status = 200, description = "The mount that is gone.", body = Mount), (status = "default", description = "What failed, where, and what to do.", body = ApiError)),
)]
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

/// Lists images that others mount, by name.
#[utoipa::path(
    get,
    path = "/v1/prepared",
    responses((status = 200, description = "Prepared images.", body = Vec<Prepared>), (status = "default", description = "What failed, where, and what to do.", body = ApiError)),
)]
async fn prepared(State(api): State<Api>) -> Json<Vec<Prepared>> {
    Json(api.mounts.prepared())
}

/// Makes an image ready to be mounted by others; it is released when its last mount goes.
#[utoipa::path(
    post,
    path = "/v1/prepared",
    request_body = PrepareRequest,
    responses((status = 200, description = "How to mount it.", body = Prepared), (status = "default", description = "What failed, where, and what to do.", body = ApiError)),
)]
async fn prepare(
    State(api): State<Api>,
    body: Result<Json<PrepareRequest>, JsonRejection>,
) -> Result<Json<Prepared>, Refusal> {
    let Json(request) = body?;
    let work = tokio::spawn(async move {
        let prepared = api.mounts.prepare_for_others(request).await?;
        tracing::info!(image = %prepared.image, mode = %prepared.mode, "prepared");
        Ok::<_, Failure>(prepared)
    });
    Ok(Json(work.await.map_err(Failure::from)??))
}

/// Gives up a prepared image that is not mounted.
#[utoipa::path(
    delete,
    path = "/v1/prepared",
    params(PreparedQuery),
    responses((status = 200, description = "What was released.", body = Prepared), (status = "default", description = "What failed, where, and what to do.", body = ApiError)),
)]
async fn release(
    State(api): State<Api>,
    query: Result<Query<PreparedQuery>, QueryRejection>,
) -> Result<Json<Prepared>, Refusal> {
    let Query(query) = query?;
    let work = tokio::spawn(async move { api.mounts.release_prepared(&query.image).await });
    Ok(Json(work.await.map_err(Failure::from)??))
}

/// Fetches files of a mounted image, or all of it, before they are read.
#[utoipa::path(
    post,
    path = "/v1/prefetch",
    request_body = PrefetchRequest,
    responses((status = 200, description = "What it needs, and what of it was missing.", body = PrefetchReport), (status = "default", description = "What failed, where, and what to do.", body = ApiError)),
)]
async fn prefetch(
    State(api): State<Api>,
    body: Result<Json<PrefetchRequest>, JsonRejection>,
) -> Result<Json<PrefetchReport>, Refusal> {
    let Json(request) = body?;
    Ok(Json(api.mounts.prefetch(&request).await?))
}

/// How far the scrub is, or what the last one came to.
#[utoipa::path(
    get,
    path = "/v1/scrub",
    responses((status = 200, description = "What was read and found.", body = ScrubReport)),
)]
async fn scrubbed(State(api): State<Api>) -> Json<ScrubReport> {
    Json(api.mounts.scrubbing().report())
}

/// Reads the cache again, compares it with the digests and repairs it; answers at its end.
#[utoipa::path(
    post,
    path = "/v1/scrub",
    request_body = ScrubRequest,
    responses((status = 200, description = "What was read, found and repaired.", body = ScrubReport), (status = "default", description = "What failed, where, and what to do.", body = ApiError)),
)]
async fn scrub(
    State(api): State<Api>,
    body: Result<Json<ScrubRequest>, JsonRejection>,
) -> Result<Json<ScrubReport>, Refusal> {
    let Json(request) = body?;
    // A task of its own: it goes on when the caller hangs up.
    let work = tokio::spawn(async move { api.mounts.scrub(request).await });
    Ok(Json(work.await.map_err(Failure::from)??))
}

/// Ends the scrub that runs, after the chunk that it reads.
#[utoipa::path(
    delete,
    path = "/v1/scrub",
    responses((status = 200, description = "What it came to so far.", body = ScrubReport)),
)]
async fn stop_scrub(State(api): State<Api>) -> Json<ScrubReport> {
    api.mounts.scrubbing().stop();
    Json(api.mounts.scrubbing().report())
}

/// What was read and fetched through a mount that is recorded.
#[utoipa::path(
    get,
    path = "/v1/recordings",
    params(RecordingQuery),
    responses((status = 200, description = "Reads and fetches since the mount.", body = Recording), (status = "default", description = "What failed, where, and what to do.", body = ApiError)),
)]
async fn recording(
    State(api): State<Api>,
    query: Result<Query<RecordingQuery>, QueryRejection>,
) -> Result<Json<Recording>, Refusal> {
    let Query(query) = query?;
    Ok(Json(api.mounts.recording(&query.target).await?))
}

/// Ends the daemon; with `umount` everything, else mounts and keeper stay.
#[utoipa::path(
    post,
    path = "/v1/shutdown",
    request_body = ShutdownRequest,
    responses((status = 200, description = "What was taken down, and what stays.", body = ShutdownReport), (status = "default", description = "What failed, where, and what to do.", body = ApiError)),
)]
async fn shutdown(
    State(api): State<Api>,
    body: Result<Json<ShutdownRequest>, JsonRejection>,
) -> Result<Json<ShutdownReport>, Refusal> {
    let Json(request) = body?;
    let report = tokio::spawn(async move {
        if request.umount
            && let Some(snapshotter) = &api.snapshotter
        {
            let internal =
                |error: skimmer_snapshotter::Error| Failure::new(Kind::Internal, error.to_string());
            // Their overlays would keep the images' superblocks, and nobody would serve those.
            if let Some(refusal) = stood_on(&snapshotter.standing_on_images().await.map_err(internal)?) {
                return Err(refusal);
            }
        }
        let report = api.mounts.take_down(request.umount).await?;
        api.stop.send_replace(Some(if report.keeper_stopped { Stop::Everything } else { Stop::Daemon }));
        Ok::<_, Failure>(report)
    });
    Ok(Json(report.await.map_err(Failure::from)??))
}

/// Why not everything can be unmounted, when containers have snapshots that stand on images.
fn stood_on(keys: &[String]) -> Option<Failure> {
    let first = keys.first()?;
    let more = keys.len() - 1;
    let others = if more > 0 { format!(" and {more} more") } else { String::new() };
    let failure =
        Failure::new(Kind::Conflict, format!("containers stand on images: snapshot {first}{others}"));
    Some(failure.remedy("remove those containers first, stopped ones too"))
}

/// Starts the daemon's program anew in the same process: with the configuration, and the version, that lie on disk now.
/// Mounts and keeper stay; requests wait at the sockets of a service manager meanwhile.
#[utoipa::path(
    post,
    path = "/v1/reload",
    responses((status = 204, description = "It begins."), (status = "default", description = "What failed, where, and what to do.", body = ApiError)),
)]
async fn reload(State(api): State<Api>) -> Result<StatusCode, Refusal> {
    let checked = tokio::task::spawn_blocking(api.check).await.map_err(Failure::from)?;
    checked.map_err(|why| Failure::new(Kind::BadRequest, why).remedy("the daemon goes on as before"))?;
    api.stop.send_replace(Some(Stop::Again));
    Ok(StatusCode::NO_CONTENT)
}

/// The metrics.
#[utoipa::path(
    get,
    path = "/metrics",
    responses((status = 200, description = "Prometheus' text format, prefix `skimmer_`, base units; OpenMetrics when it is asked for.", body = String, content_type = "text/plain"), (status = "default", description = "What failed, where, and what to do.", body = ApiError)),
)]
async fn metrics(State(api): State<Api>, headers: HeaderMap) -> Response {
    let format = Format::accepted(headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()));
    match format.encode(&api.registry) {
        Ok(text) => ([(header::CONTENT_TYPE, format.content_type())], text).into_response(),
        Err(error) => Refusal(Failure::new(Kind::Internal, error.to_string())).into_response(),
    }
}

async fn unknown(method: axum::http::Method, uri: axum::http::Uri) -> Refusal {
    Refusal(Failure::new(Kind::NotFound, format!("{method} {}: there is no such call", uri.path())))
}
