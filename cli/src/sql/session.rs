//! The session as datafusion-cli's code sees it: object stores of stoa.toml win over the ones that
//! it would make from the environment.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use datafusion::common::config::ConfigFileType;
use datafusion::dataframe::DataFrame;
use datafusion::error::DataFusionError;
use datafusion::execution::TaskContext;
use datafusion::execution::context::SessionState;
use datafusion::logical_expr::{DdlStatement, LogicalPlan};
use datafusion::prelude::SessionContext;
use datafusion_cli::cli_context::CliSessionContext;
use datafusion_cli::object_storage::AwsOptions;
use object_store::ObjectStore;
use stoa_datafusion::Stoa;
use stoa_origin::Stores;
use url::Url;

use crate::config::StoreOption;

/// Options of stores by root URL, as in stoa.toml.
type Configured = BTreeMap<String, BTreeMap<&'static str, StoreOption>>;

/// A session context whose object stores come from stoa.toml where it names them.
pub(super) struct CliSession {
    session: SessionContext,
    stoa: Stoa,
    stores: Stores,
    configured: Configured,
}

impl CliSession {
    pub(super) fn new(session: SessionContext, stoa: Stoa, configured: Configured) -> Self {
        CliSession {
            session,
            stores: stoa.reader().origin().stores().clone(),
            stoa,
            configured,
        }
    }
}

#[async_trait]
impl CliSessionContext for CliSession {
    fn task_ctx(&self) -> Arc<TaskContext> {
        self.session.task_ctx()
    }

    fn session_state(&self) -> SessionState {
        let mut state = self.session.state();
        // datafusion-cli reads the options of a CREATE EXTERNAL TABLE before our factory does, to
        // look for those of its store, and refuses options of a format where it knows none. Those
        // of STORED AS STOA are Parquet's; formats that it knows it sets itself.
        let options = state.table_options_mut();
        options.set_config_format(ConfigFileType::PARQUET);
        state
    }

    fn register_object_store(
        &self,
        url: &Url,
        object_store: Arc<dyn ObjectStore>,
    ) -> Option<Arc<dyn ObjectStore + 'static>> {
        let ours = root_of(url)
            .filter(|root| self.configured.contains_key(root))
            .and_then(|root| self.stores.get(&root).ok());
        self.session
            .register_object_store(url, ours.unwrap_or(object_store))
    }

    fn register_table_options_extension_from_scheme(&self, scheme: &str) {
        match aws_options(&self.configured).filter(|_| scheme == "s3") {
            // Without region and keys, datafusion-cli asks AWS for them before it registers
            // anything, which fails or stalls where the bucket is not on AWS.
            Some(options) => self.session.register_table_options_extension(options),
            None => CliSessionContext::register_table_options_extension_from_scheme(
                &self.session,
                scheme,
            ),
        }
    }

    async fn execute_logical_plan(&self, plan: LogicalPlan) -> Result<DataFrame, DataFusionError> {
        let LogicalPlan::Ddl(DdlStatement::DropTable(mut command)) = plan else {
            return self.session.execute_logical_plan(plan).await;
        };
        // What is ours is dropped here; what the session has registered of it, by the session.
        if self.stoa.drop_table(&self.session, &command.name).await? {
            command.if_exists = true;
        }
        let plan = LogicalPlan::Ddl(DdlStatement::DropTable(command));
        self.session.execute_logical_plan(plan).await
    }
}

/// The root URL of a store, in the spelling of stoa.toml.
fn root_of(url: &Url) -> Option<String> {
    let host = url.host_str()?;
    let port = url.port().map_or(String::new(), |port| format!(":{port}"));
    Some(format!("{}://{host}{port}", url.scheme()))
}

/// Region and keys of the first S3 store of stoa.toml, which SQL's OPTIONS may override.
fn aws_options(configured: &Configured) -> Option<AwsOptions> {
    let (_, options) = configured
        .iter()
        .find(|(root, _)| root.starts_with("s3://"))?;
    let text = |name: &str| options.get(name).map(|option| option.reveal().to_string());
    Some(AwsOptions {
        access_key_id: text("access_key_id"),
        secret_access_key: text("secret_access_key"),
        session_token: text("session_token"),
        // S3-compatible servers take any.
        region: text("region").or_else(|| text("endpoint").map(|_| "us-east-1".into())),
        ..AwsOptions::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_spelled_as_in_the_configuration() {
        let root = |text: &str| root_of(&Url::parse(text).unwrap());
        assert_eq!(root("s3://bucket/dir/x").as_deref(), Some("s3://bucket"));
        assert_eq!(
            root("http://127.0.0.1:9000/x").as_deref(),
            Some("http://127.0.0.1:9000")
        );
        assert_eq!(root("file:///data/x"), None);
    }

    #[test]
    fn only_configured_s3_stores_change_what_datafusion_cli_does() {
        let mut configured = Configured::new();
        assert!(aws_options(&configured).is_none());
        let options = BTreeMap::from([
            ("endpoint", StoreOption::Plain("http://127.0.0.1:1".into())),
            ("access_key_id", StoreOption::Plain("key".into())),
        ]);
        configured.insert("s3://bucket".into(), options);
        let found = aws_options(&configured).unwrap();
        assert_eq!(found.region.as_deref(), Some("us-east-1"));
        assert_eq!(found.access_key_id.as_deref(), Some("key"));
    }
}
