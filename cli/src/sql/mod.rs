//! `stoa sql`: datafusion-cli, embedded, with the cached tables in it.

mod args;
mod files;
mod session;

use std::num::NonZeroUsize;
use std::sync::Arc;

use datafusion::config::ConfigOptions;
use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::memory_pool::{
    FairSpillPool, GreedyMemoryPool, MemoryPool, TrackConsumersPool,
};
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::logical_expr::ExplainFormat;
use datafusion::prelude::{SessionConfig, SessionContext};
use datafusion_cli::catalog::DynamicObjectStoreCatalog;
use datafusion_cli::functions::{
    ListFilesCacheFunc, MetadataCacheFunc, ParquetMetadataFunc, StatisticsCacheFunc,
};
use datafusion_cli::object_storage::StdinCarriesCommands;
use datafusion_cli::object_storage::instrumented::InstrumentedObjectStoreRegistry;
use datafusion_cli::pool_type::PoolType;
use datafusion_cli::print_options::PrintOptions;
use datafusion_cli::{DATAFUSION_CLI_VERSION, exec};
use stoa_datafusion::{Embedded, Stoa, StoaOptions};

pub use args::{SqlArgs, without_comments_as_flags};
use session::CliSession;

use crate::context::Context;
use crate::error::{Error, Result, chain};

/// Runs the prompt, or the commands and files that were given.
pub async fn run(args: SqlArgs, context: &Context) -> Result<()> {
    if let Some(directory) = &args.data_path {
        std::env::set_current_dir(directory).map_err(|error| {
            Error::while_doing(format!("cannot change to {}", directory.display()), error)
        })?;
    }
    if !args.quiet {
        println!(
            "Stoa v{}, DataFusion CLI v{DATAFUSION_CLI_VERSION}",
            env!("CARGO_PKG_VERSION")
        );
    }
    let attached = Attached::start(context).await?;
    let result = execute(args, context, &attached).await;
    attached.end().await;
    result
}

async fn execute(args: SqlArgs, context: &Context, attached: &Attached) -> Result<()> {
    let registry = Arc::new(
        InstrumentedObjectStoreRegistry::new().with_profile_mode(args.object_store_profiling),
    );
    let runtime = runtime_env(&args)
        .with_object_store_registry(registry.clone())
        .build_arc()
        .map_err(failed)?;
    let session = SessionContext::new_with_config_rt(session_config(&args, context)?, runtime);
    attached.stoa.register(&session).await.map_err(failed)?;
    let session = with_cli_features(session).await?;
    let session = cli_session(session, &attached.stoa, context)?;
    let mut print = PrintOptions {
        format: args.format,
        quiet: args.quiet,
        maxrows: args.maxrows,
        color: args.color,
        instrumented_registry: registry,
    };
    if args.is_prompt() {
        let rc = args.rc.unwrap_or_else(|| startup_files(context));
        // What fails there is said; the prompt is there for the rest.
        if let Err(error) = files::run_files(&session, &rc, &print).await {
            eprintln!("{error}");
        }
        return exec::exec_from_repl(&session, &mut print)
            .await
            .map_err(|error| Error::while_doing("the prompt ended", error));
    }
    if !args.file.is_empty() {
        files::run_files(&session, &args.file, &print).await?;
    }
    if !args.command.is_empty() {
        exec::exec_from_commands(&session, args.command, &print)
            .await
            .map_err(failed)?;
    }
    Ok(())
}

/// What to say where a query process of a cluster has no cache beside it: the worker of this host
/// may have been given a directory of its own.
fn without_cache(context: &Context) -> Option<String> {
    let cache = &context.config.cache;
    let told = cache
        .remote
        .as_ref()
        .is_some_and(|remote| !remote.peers.is_empty());
    (cache.enabled && !told && !cache.location.is_dir()).then(|| {
        format!(
            "no worker of this host has its cache at {}, so everything is read from the origin; \
             name a worker's directory with --set cache.location=…, or workers elsewhere with \
             --set cache.remote.peers=…",
            cache.location.display()
        )
    })
}

/// The cache as this process sees it, with what has to end orderly.
struct Attached {
    stoa: Stoa,
    embedded: Option<Embedded>,
}

impl Attached {
    /// With etcd a query process reads what this machine's worker published; without, it runs the
    /// cache itself, or shares the one that another process runs.
    async fn start(context: &Context) -> Result<Attached> {
        if context.is_embedded() {
            let embedded = context.embedded_to_read().await?;
            return Ok(Attached {
                stoa: embedded.stoa(),
                embedded: Some(embedded),
            });
        }
        if let Some(advice) = without_cache(context) {
            tracing::warn!("{advice}");
        }
        let reader = context.reader();
        // Queries need nothing of etcd: without it, only what no worker published yet is unknown.
        let records = match context.records().await {
            Ok(records) => Some(records),
            Err(error) => {
                tracing::warn!(%error, "going on with what is in shared memory");
                None
            }
        };
        Ok(Attached {
            stoa: Stoa::with_reader(reader, records),
            embedded: None,
        })
    }

    async fn end(self) {
        drop(self.stoa);
        if let Some(embedded) = self.embedded {
            embedded.shutdown().await;
        }
    }
}

fn session_config(args: &SqlArgs, context: &Context) -> Result<SessionConfig> {
    let mut options = ConfigOptions::from_env().map_err(failed)?;
    let unset = |variable: &str| !context.machine.environment.contains_key(variable);
    // What datafusion-cli shows, unless the environment says otherwise.
    if unset("DATAFUSION_EXPLAIN_FORMAT") {
        options.explain.format = ExplainFormat::Tree;
    }
    if unset("DATAFUSION_FORMAT_NULL") {
        options.format.null = "NULL".into();
    }
    let mut stoa = StoaOptions::default();
    stoa.enabled = context.config.cache.enabled;
    stoa.cache_parquet_scans = context.config.cache.parquet;
    options.extensions.insert(stoa);
    let mut config = SessionConfig::from(options).with_information_schema(true);
    if let Some(rows) = args.batch_size {
        config = config.with_batch_size(rows as usize);
    }
    if args.stdin_carries_commands() {
        config = config.with_extension(Arc::new(StdinCarriesCommands));
    }
    Ok(config)
}

fn runtime_env(args: &SqlArgs) -> RuntimeEnvBuilder {
    let mut builder = RuntimeEnvBuilder::new();
    if let Some(bytes) = args.memory_limit {
        builder = builder.with_memory_pool(memory_pool(
            bytes,
            &args.mem_pool_type,
            NonZeroUsize::new(args.top_memory_consumers),
        ));
    }
    if let Some(bytes) = args.disk_limit {
        let disk = DiskManagerBuilder::default()
            .with_mode(DiskManagerMode::OsTmpDirectory)
            .with_max_temp_directory_size(bytes as u64);
        builder = builder.with_disk_manager_builder(disk);
    }
    builder
}

fn memory_pool(bytes: usize, kind: &PoolType, track: Option<NonZeroUsize>) -> Arc<dyn MemoryPool> {
    match (kind, track) {
        (PoolType::Greedy, None) => Arc::new(GreedyMemoryPool::new(bytes)),
        (PoolType::Greedy, Some(top)) => {
            Arc::new(TrackConsumersPool::new(GreedyMemoryPool::new(bytes), top))
        }
        (PoolType::Fair, None) => Arc::new(FairSpillPool::new(bytes)),
        (PoolType::Fair, Some(top)) => {
            Arc::new(TrackConsumersPool::new(FairSpillPool::new(bytes), top))
        }
    }
}

/// What datafusion-cli adds to a session: files and URLs as tables, and its table functions.
async fn with_cli_features(session: SessionContext) -> Result<SessionContext> {
    let session = session.enable_url_table();
    session.refresh_catalogs().await.map_err(failed)?;
    session.register_catalog_list(Arc::new(DynamicObjectStoreCatalog::new(
        session.state().catalog_list().clone(),
        session.state_weak_ref(),
    )));
    let caches = session.runtime_env().cache_manager.clone();
    session.register_udtf("parquet_metadata", Arc::new(ParquetMetadataFunc {}));
    session.register_udtf(
        "metadata_cache",
        Arc::new(MetadataCacheFunc::new(caches.clone())),
    );
    session.register_udtf(
        "statistics_cache",
        Arc::new(StatisticsCacheFunc::new(caches.clone())),
    );
    session.register_udtf(
        "list_files_cache",
        Arc::new(ListFilesCacheFunc::new(caches)),
    );
    Ok(session)
}

/// The session with the stores of stoa.toml in it, for tables that are not Stoa's.
fn cli_session(session: SessionContext, stoa: &Stoa, context: &Context) -> Result<CliSession> {
    let stores = stoa.reader().origin().stores();
    for root in context.config.stores.keys() {
        let url = url::Url::parse(root)
            .map_err(|error| Error::Usage(format!("store.\"{root}\": {error}")))?;
        session.register_object_store(&url, stores.get(root)?);
    }
    Ok(CliSession::new(
        session,
        stoa.clone(),
        context.config.stores.clone(),
    ))
}

fn startup_files(context: &Context) -> Vec<String> {
    let home = context.machine.environment.get("HOME");
    home.map(|home| format!("{home}/.datafusionrc"))
        .filter(|path| std::path::Path::new(path).exists())
        .into_iter()
        .collect()
}

fn failed(error: datafusion::error::DataFusionError) -> Error {
    Error::Failed(chain(&error))
}
