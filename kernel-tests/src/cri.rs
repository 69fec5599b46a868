//! A client of the container runtime interface: what a kubelet would ask.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

/// The messages, as generated.
mod wire {
    #![allow(
        missing_docs,
        unreachable_pub,
        unused_qualifications,
        clippy::allow_attributes_without_reason,
        reason = "generated"
    )]
    tonic::include_proto!("runtime.v1");
}
use wire::image_service_client::ImageServiceClient;
use wire::runtime_service_client::RuntimeServiceClient;

/// For pulls and starts on a busy host.
const PATIENCE: Duration = Duration::from_secs(120);

/// A connection to the runtime.
pub struct Cri {
    runtime: Runtime,
    channel: Channel,
    /// Who is asked for images.
    images: Channel,
}

/// User and password.
pub type Login<'a> = (&'a str, &'a str);

/// A running pod without a network of its own.
pub struct Pod {
    id: String,
    config: wire::PodSandboxConfig,
}

impl Pod {
    /// What the runtime calls it.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl Cri {
    /// Connects to the runtime's socket, and to the one that is asked for images (`imageServiceEndpoint`).
    ///
    /// # Errors
    /// Nobody answers.
    pub fn connect(socket: &Path, images: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let connect = |socket: &Path| -> Result<Channel> {
            let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?.timeout(PATIENCE);
            Ok(runtime.block_on(endpoint.connect())?)
        };
        let (channel, images) = (connect(socket)?, connect(images)?);
        Ok(Self { runtime, channel, images })
    }

    /// Pulls an image.
    ///
    /// # Errors
    /// What the runtime says.
    pub fn pull(&self, image: &str, login: Option<Login<'_>>) -> Result<()> {
        let auth = login.map(|(user, password)| wire::AuthConfig {
            username: user.to_owned(),
            password: password.to_owned(),
        });
        let ask = wire::PullImageRequest { image: Some(spec(image)), auth, sandbox_config: None };
        let pulled = self.runtime.block_on(ImageServiceClient::new(self.images.clone()).pull_image(ask));
        pulled.with_context(|| format!("pulling {image}"))?;
        Ok(())
    }

    /// Removes an image.
    ///
    /// # Errors
    /// What the runtime says.
    pub fn remove_image(&self, image: &str) -> Result<()> {
        let ask = wire::RemoveImageRequest { image: Some(spec(image)) };
        self.runtime.block_on(ImageServiceClient::new(self.images.clone()).remove_image(ask))?;
        Ok(())
    }

    /// Starts a pod on the host's network.
    ///
    /// # Errors
    /// What the runtime says.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        let metadata = wire::PodSandboxMetadata {
            name: name.to_owned(),
            uid: name.to_owned(),
            namespace: "test".to_owned(),
            attempt: 0,
        };
        let namespace_options = wire::NamespaceOption { network: wire::NamespaceMode::Node.into() };
        let security_context =
            wire::LinuxSandboxSecurityContext { namespace_options: Some(namespace_options) };
        let linux = wire::LinuxPodSandboxConfig { security_context: Some(security_context) };
        let config = wire::PodSandboxConfig { metadata: Some(metadata), linux: Some(linux) };
        let ask = wire::RunPodSandboxRequest { config: Some(config.clone()) };
        let made = self.runtime.block_on(self.pods().run_pod_sandbox(ask)).context("starting a pod")?;
        Ok(Pod { id: made.into_inner().pod_sandbox_id, config })
    }

    /// Starts a container in a pod; returns its id.
    ///
    /// # Errors
    /// What the runtime says.
    pub fn container(&self, pod: &Pod, name: &str, image: &str, command: &[&str]) -> Result<String> {
        let config = wire::ContainerConfig {
            metadata: Some(wire::ContainerMetadata { name: name.to_owned() }),
            image: Some(spec(image)),
            command: command.iter().map(|&word| word.to_owned()).collect(),
        };
        let ask = wire::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let made =
            self.runtime.block_on(self.pods().create_container(ask)).context("creating a container")?;
        let id = made.into_inner();
        self.runtime.block_on(self.pods().start_container(id.clone())).context("starting a container")?;
        Ok(id.container_id)
    }

    /// Runs a command in a container; returns what it printed.
    ///
    /// # Errors
    /// It fails: the message has what it said.
    pub fn exec(&self, container: &str, command: &[&str]) -> Result<Vec<u8>> {
        let ask = wire::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: i64::try_from(PATIENCE.as_secs())?,
        };
        let done = self.runtime.block_on(self.pods().exec_sync(ask))?.into_inner();
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(done.exit_code == 0, "{command:?} ended with {}: {said}", done.exit_code);
        Ok(done.stdout)
    }

    /// Ends a pod with all its containers.
    ///
    /// # Errors
    /// What the runtime says.
    pub fn remove_pod(&self, pod: &str) -> Result<()> {
        let id = wire::PodSandboxId { pod_sandbox_id: pod.to_owned() };
        self.runtime.block_on(self.pods().stop_pod_sandbox(id.clone())).context("stopping a pod")?;
        self.runtime.block_on(self.pods().remove_pod_sandbox(id)).context("removing a pod")?;
        Ok(())
    }

    fn pods(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }
}

fn spec(image: &str) -> wire::ImageSpec {
    wire::ImageSpec { image: image.to_owned() }
}
