//! Metrics, under the names that dashboards for vLLM and for OpenTelemetry's generative AI expect, and some of our own.
//!
//! Counters and histograms are of the requests that went through this router; what is said of groups is what their
//! leaders report, the same at every router.

mod fleet;
mod instruments;
mod meter;
mod model;
mod page;
mod process;

use std::sync::{Arc, Mutex, PoisonError};

pub(crate) use self::fleet::Loads;
pub(crate) use self::meter::Meter;
pub(crate) use self::model::ModelMetrics;
pub(crate) use self::page::CONTENT_TYPE;
use self::page::Page;
use crate::again::Again;
use crate::demand::Demand;
use crate::groups::Groups;

/// Everything that `/metrics` tells.
#[derive(Default)]
pub(crate) struct Metrics {
    models: Mutex<Vec<Arc<ModelMetrics>>>,
    /// What the leaders report.
    pub(crate) loads: Loads,
    /// What is told to whoever decides how many groups there should be.
    pub(crate) demand: Arc<Demand>,
}

impl Metrics {
    /// The metrics of one model, to be asked for once. `context`: tokens of a prompt and its answer, at most.
    pub(crate) fn of_model(&self, name: &str, context: usize) -> Arc<ModelMetrics> {
        let metrics = Arc::new(ModelMetrics::new(name, context, self.demand.clone()));
        self.models.lock().unwrap_or_else(PoisonError::into_inner).push(metrics.clone());
        metrics
    }

    /// The page of [`CONTENT_TYPE`], with the gauges as they stand now.
    pub(crate) fn encode(&self, groups: &Groups, again: &Again) -> String {
        let models = self.models.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
        let mut page = Page::default();
        fleet::write(&mut page, &names, &groups.list(), &self.loads);
        model::write(&mut page, &models);
        let help = "Requests that are refused because groups were lost on them.";
        page.family("galerne_router_banned_requests", "gauge", help);
        page.sample(&[], again.banned());
        process::write(&mut page);
        page.into_text()
    }
}
