//! `galerne operator`: Kubernetes.

use clap::{Args, Subcommand};
use galerne_operator::run::{Options, run};

use crate::args::{self, ClusterTlsArgs, EtcdAccessArgs};

/// Looks after the GalerneClusters of a Kubernetes cluster: the one that it runs in, or that KUBECONFIG names.
///
/// Of several operators one acts: the one that holds a Lease.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct OperatorCommand {
    #[command(subcommand)]
    action: Option<Action>,
    /// Look after the clusters of these namespaces only, separated by commas.
    #[arg(long, value_name = "NAMESPACES", value_delimiter = ',')]
    namespaces: Vec<String>,
    /// Namespace of the lease; by default the one that the operator runs in.
    #[arg(long, value_name = "NAMESPACE")]
    lease_namespace: Option<String>,
    /// Name of this operator among those that wait for the lease; by default the machine's.
    #[arg(long, value_name = "NAME")]
    identity: Option<String>,
    /// Image of galerne, for clusters that name none.
    #[arg(long, value_name = "IMAGE", default_value = concat!("galerne:", env!("CARGO_PKG_VERSION")))]
    image: String,
    /// Address of metrics and health; port 0 takes a free one and prints it, `off` has none.
    #[arg(long, default_value = "127.0.0.1:8003", value_name = "ADDR", value_parser = crate::router::admin)]
    admin: String,
    /// How the clusters' etcds are spoken to, where they speak TLS or want to know who asks.
    #[command(flatten)]
    etcd: EtcdAccessArgs,
    /// With what clusters are spoken to that have certificates, as one of them.
    #[command(flatten)]
    cluster: ClusterTlsArgs,
}

#[derive(Subcommand)]
enum Action {
    /// Prints what Kubernetes must know of GalerneClusters: `galerne operator crd | kubectl apply --server-side -f -`.
    Crd,
}

impl OperatorCommand {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        if let Some(Action::Crd) = self.action {
            print!("{}", galerne_operator::api::crd_yaml());
            return Ok(());
        }
        let config = crate::kube::config().await?;
        let here = config.default_namespace.clone();
        let client = ::kube::Client::try_from(config)?;
        let admin = match self.admin.as_str() {
            crate::router::NO_ADMIN => None,
            address => Some(args::listen(address, "--admin").await?),
        };
        if let Some(admin) = &admin {
            println!("admin on http://{}", admin.local_addr()?);
        }
        let options = Options {
            namespaces: self.namespaces,
            lease_namespace: self.lease_namespace.unwrap_or(here),
            identity: self.identity.unwrap_or_else(|| args::host_name(std::net::Ipv4Addr::LOCALHOST.into())),
            image: self.image,
            etcd: self.etcd.access(),
            cluster_tls: self.cluster.files(),
            admin,
        };
        run(client, options, args::shutdown_on_signal()?).await?;
        Ok(())
    }
}
