//! The gRPC face: `galerne.v1.Galerne`, the dialects of vLLM's routers, health and reflection.

mod access;
mod body;
mod call;
mod deadline;
mod errors;
mod galerne;
mod inference;
mod vllm_engine;

use std::sync::Arc;

use galerne_wire::DESCRIPTOR_SET;
use galerne_wire::v1::galerne_server::GalerneServer;
use galerne_wire::vllm::control_server::ControlServer;
use galerne_wire::vllm::grpc::engine::vllm_engine_server::VllmEngineServer;
use galerne_wire::vllm::inference_server::InferenceServer;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tonic_reflection::server::Builder;

use self::call::Names;
pub(crate) use self::errors::head_refused;
use crate::inside::Inside;
use crate::serve::{Router, RouterError};
use crate::server::{self, Protocol};

/// Serves until `stop`, and then until the running answers have ended.
pub(crate) async fn serve(
    router: Arc<Router>,
    listener: TcpListener,
    inside: Option<Inside>,
    stop: CancellationToken,
) -> Result<(), RouterError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let (v1, v1alpha) = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection");
    let reflection = described().with_service_name(v1).build_v1().map_err(RouterError::Reflection)?;
    let older = described().with_service_name(v1alpha).build_v1alpha().map_err(RouterError::Reflection)?;
    let bytes_max = router.limits.body_bytes_max;
    let names = Arc::new(Names::default());
    let galerne = GalerneServer::new(galerne::Service(router.clone()));
    let inference = Arc::new(inference::Service::new(router.clone(), names.clone()));
    let engine = VllmEngineServer::new(vllm_engine::Service::new(router.clone(), names));
    let routes = Routes::new(galerne.max_decoding_message_size(bytes_max))
        .add_service(InferenceServer::from_arc(inference.clone()).max_decoding_message_size(bytes_max))
        .add_service(ControlServer::from_arc(inference).max_decoding_message_size(bytes_max))
        .add_service(engine.max_decoding_message_size(bytes_max))
        .add_service(health)
        .add_service(reflection)
        .add_service(older) // many clients ask for nothing else
        .prepare();
    let open = routes.into_axum_router();
    let routes = access::guarded(open.clone(), &router);
    let served = {
        let (places, limits) = (router.grpc_places.clone(), router.limits.clone());
        server::serve(
            listener,
            Protocol::Http2,
            places,
            limits,
            routes,
            router.tls.grpc.clone(),
            stop.clone(),
        )
    };
    let served_inside = async {
        let Some(inside) = inside else { return };
        server::serve_inside(inside, router.limits.clone(), open, stop.clone()).await;
    };
    tokio::join!(served, served_inside, report_health(&router, reporter, &stop));
    Ok(())
}

/// What reflection tells of.
fn described() -> Builder<'static> {
    let builder = Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name("grpc.health.v1.Health");
    HEALTH_OF[1..].iter().fold(builder, |all, name| all.with_service_name(*name))
}

/// Keeps `grpc.health.v1` in step with the fleet until `stop`.
async fn report_health(router: &Router, mut reporter: HealthReporter, stop: &CancellationToken) {
    let (mut seen, mut draining) = (router.groups.watch(), router.traffic.watch());
    loop {
        let status = if router.ready().is_ok() { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in HEALTH_OF {
            reporter.set_service_status(service, status).await;
        }
        tokio::select! {
            () = router.groups.changed(&mut seen) => {}
            Ok(()) = draining.changed() => {}
            () = stop.cancelled() => break,
        }
    }
    for service in HEALTH_OF {
        reporter.clear_service_status(service).await; // ends the streams that watch it, so that the server can end
    }
}

/// Services of which health is told; the empty name is the server as a whole.
const HEALTH_OF: [&str; 5] = [
    "",
    <GalerneServer<galerne::Service> as NamedService>::NAME,
    <InferenceServer<inference::Service> as NamedService>::NAME,
    <ControlServer<inference::Service> as NamedService>::NAME,
    <VllmEngineServer<vllm_engine::Service> as NamedService>::NAME,
];
