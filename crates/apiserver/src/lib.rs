//! As much of a Kubernetes API server as the operator's tests need, in memory: HTTP, resource versions and conflicts, server-side
//! apply with owned fields, watches with bookmarks and an end of history, status and scale subresources, finalizers, owner
//! references, evictions against budgets, quotas of objects, defaults and checks of the kinds that the operator makes, custom
//! resources by their definitions, and what there is of a version of an API group.
//!
//! It is a test's other half and must not be what makes the test pass: `tests/facts` holds its answers against what the API's
//! documentation says, and those facts and the operator's suite are asked of a real API server as well (KUBECONFIG). What it does not
//! do: authentication, admission, JSON patches, strategic merges, and of CEL what our rules do not say.

mod apply;
mod cel;
mod change;
mod collect;
mod controllers;
mod defaults;
mod kinds;
mod request;
mod routes;
mod schema;
mod selector;
mod status;
mod store;
mod validate;
mod watch;

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;

pub use controllers::Controllers;
pub use store::{Counts, Store};

/// A running API server.
pub struct ApiServer {
    /// Where it listens.
    pub address: SocketAddr,
    /// What it holds.
    pub store: Arc<Store>,
    served: JoinHandle<()>,
}

impl ApiServer {
    /// Starts one on a free port of loopback.
    ///
    /// # Errors
    /// When there is no free port.
    pub async fn start() -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let store = Arc::new(Store::new());
        let routes = routes::routes(store.clone());
        let served = tokio::spawn(async move {
            // It ends with the task.
            let _ = axum::serve(listener, routes).await;
        });
        Ok(Self { address, store, served })
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.served.abort();
    }
}
