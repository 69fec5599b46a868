//! The kubelet's image service, passed on to containerd: only so do we see the login that a pod's pull has.
//!
//! containerd uses it for the pull alone and tells it to no snapshotter, but data is read as long as containers run.
//! Calls go through as they are; of a pull the request is looked at (CRI `runtime/v1`, `PullImageRequest`).

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, Limited};
use prost::Message as _;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::api::cri::{AuthConfig, PullImageRequest};
use crate::images::Login;
use crate::{Containerd, Images};

/// The method that has a login.
const PULL: &str = "/runtime.v1.ImageService/PullImage";
/// Largest request for a pull, and largest answer to one, bytes; gRPC's own usual limit.
const MAX_BYTES: usize = 4 << 20;
/// Bytes before a message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// Passes calls on.
#[derive(Clone)]
pub(crate) struct ImageService {
    containerd: Channel,
    images: Arc<dyn Images>,
}

impl ImageService {
    /// Calls go to that containerd, logins to `images`.
    pub(crate) fn new(containerd: &Containerd, images: Arc<dyn Images>) -> Result<Self, crate::Error> {
        Ok(Self { containerd: containerd.patient()?, images })
    }

    async fn pass(self, request: Request<Body>) -> Result<Response<Body>, Status> {
        if request.uri().path() == PULL {
            return self.pull(request).await;
        }
        self.forward(request).await
    }

    async fn forward(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let mut channel = self.containerd.clone();
        let gone = |error| Status::unavailable(format!("skimmer: containerd does not answer: {error}"));
        std::future::poll_fn(|context| tower_service::Service::poll_ready(&mut channel, context))
            .await
            .map_err(gone)?;
        tower_service::Service::call(&mut channel, request).await.map_err(gone)
    }

    async fn pull(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (head, body) = request.into_parts();
        let body = Limited::new(body, MAX_BYTES).collect().await;
        let body = body.map_err(|error| Status::invalid_argument(format!("reading the pull: {error}")))?;
        let body = body.to_bytes();
        let login = login(&body);
        if let Some((image, login)) = &login {
            self.images.pulling(image, login).await;
        }
        let request = Request::from_parts(head, Body::new(Full::new(body)));
        let answer = self.answer(request).await;
        if let Some((image, login)) = login {
            let succeeded = answer.as_ref().is_ok_and(|(_, succeeded)| *succeeded);
            self.images.pulled(&image, &login, succeeded).await;
        }
        answer.map(|(answer, _)| answer)
    }

    /// containerd's answer, and whether it is a success.
    async fn answer(&self, request: Request<Body>) -> Result<(Response<Body>, bool), Status> {
        let (head, body) = self.forward(request).await?.into_parts();
        let body = Limited::new(body, MAX_BYTES).collect().await;
        let body = body.map_err(|error| Status::unavailable(format!("containerd's answer: {error}")))?;
        // A call without an answer has its status among the first headers.
        let status = body.trailers().and_then(Status::from_header_map);
        let status = status.or_else(|| Status::from_header_map(&head.headers));
        let succeeded = status.is_some_and(|status| status.code() == Code::Ok);
        Ok((Response::from_parts(head, Body::new(body)), succeeded))
    }
}

impl NamedService for ImageService {
    const NAME: &'static str = "runtime.v1.ImageService";
}

impl tower_service::Service<Request<Body>> for ImageService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let this = self.clone();
        // A kubelet that hangs up must not leave a login of a pull whose end nobody saw.
        let done = tokio::spawn(this.pass(request));
        Box::pin(async move {
            let done = done.await.unwrap_or_else(|error| Err(Status::internal(error.to_string())));
            Ok(done.unwrap_or_else(Status::into_http))
        })
    }
}

/// Image and login of a pull's body. None for what cannot be read: containerd says what is wrong with it.
fn login(body: &Bytes) -> Option<(String, Login)> {
    let (prefix, message) = body.split_at_checked(PREFIX)?;
    if prefix.first() != Some(&0) {
        tracing::warn!("a pull came compressed: its login is not known for later reads");
        return None;
    }
    let pull = PullImageRequest::decode(message).ok()?;
    let image = pull.image?.image;
    let login = known(pull.auth?, &image)?;
    Some((image, login))
}

/// What containerd would use of it (`ParseAuth` in its CRI plugin).
fn known(auth: AuthConfig, image: &str) -> Option<Login> {
    let AuthConfig { username, password, auth, server_address, identity_token } = auth;
    if !server_address.is_empty() {
        let server = server_address.split_once("://").map_or(server_address.as_str(), |(_, rest)| rest);
        let server = server.split_once('/').map_or(server, |(host, _)| host);
        let host = image.split_once('/').map_or("", |(host, _)| host);
        let hub = |host: &str| matches!(host, "docker.io" | "index.docker.io" | "registry-1.docker.io");
        if server != host && !(hub(server) && (hub(host) || !host.contains(['.', ':']))) {
            return None;
        }
    }
    if !username.is_empty() {
        return Some(Login { username, password });
    }
    if !identity_token.is_empty() {
        return Some(Login { username: String::new(), password: identity_token });
    }
    let text = String::from_utf8(STANDARD.decode(auth).ok()?).ok()?;
    let (username, password) = text.split_once(':')?;
    let password = password.trim_matches('\0').to_owned();
    Some(Login { username: username.to_owned(), password })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test panics")]
    use super::*;
    use crate::api::cri::ImageSpec;

    fn body(auth: AuthConfig) -> Bytes {
        let image = ImageSpec { image: "h.io:5000/team/app:1".to_owned() };
        let message = PullImageRequest { image: Some(image), auth: Some(auth) }.encode_to_vec();
        let mut body = vec![0];
        body.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
        body.extend(message);
        body.into()
    }

    fn found(auth: AuthConfig) -> Option<(String, String)> {
        login(&body(auth)).map(|(_, login)| (login.username, login.password))
    }

    #[test]
    fn logins_are_read_as_containerd_reads_them() {
        let pair = |user: &str, password: &str| Some((user.to_owned(), password.to_owned()));
        let named = AuthConfig { username: "me".into(), password: "pw".into(), ..Default::default() };
        assert_eq!(found(named.clone()), pair("me", "pw"));
        assert_eq!(login(&body(named.clone())).unwrap().0, "h.io:5000/team/app:1");
        let encoded = |text: &str| AuthConfig { auth: STANDARD.encode(text), ..Default::default() };
        assert_eq!(found(encoded("me:p:w\0")), pair("me", "p:w"));
        assert_eq!(found(encoded("nothing")), None);
        assert_eq!(found(AuthConfig { auth: "%".into(), ..Default::default() }), None);
        let token = AuthConfig { identity_token: "t".into(), ..Default::default() };
        assert_eq!(found(token), pair("", "t"));
        assert_eq!(found(AuthConfig::default()), None);
        for (server, ours) in [("h.io:5000", true), ("https://h.io:5000/v1/", true), ("h.io", false)] {
            let auth = AuthConfig { server_address: server.into(), ..named.clone() };
            assert_eq!(found(auth).is_some(), ours, "{server}");
        }
    }

    #[test]
    fn what_is_no_pull_has_no_login() {
        let whole = body(AuthConfig { username: "me".into(), ..Default::default() });
        for length in 0..whole.len() {
            // Cut anywhere: no panic, and never another image's login.
            let cut = login(&whole.slice(..length));
            assert!(cut.is_none_or(|(image, _)| image == "h.io:5000/team/app:1"), "{length}");
        }
        let mut compressed = whole.to_vec();
        compressed[0] = 1;
        assert!(login(&compressed.into()).is_none());
        assert!(login(&Bytes::from_static(&[0, 0, 0, 0, 1, 0xff])).is_none());
    }
}
