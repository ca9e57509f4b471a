//! The one binary: reads the command line and starts what it names.

mod adapter_check;
mod bench;
mod cli;
mod demo;
mod device;
mod embedded;
mod keys;
mod production;
mod server;

use clap::Parser;
use cli::{Cli, Command, KernelsCommand};
use kernels::cuda::compile::{self, Arch, Compiled};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::anyhow!("the runtime cannot start: {error}")),
    };
    match runtime.block_on(run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Openapi => print!("{}", gateway::openapi_json()),
        Command::Keys(command) => keys::run(command).await?,
        Command::Migrate { database_url } => production::migrate(&database_url).await?,
        Command::Worker(args) if args.drain => production::drain(&args).await?,
        Command::Gateway(args) => {
            log_to_stderr(&cli.log, cli.log_json)?;
            production::gateway(args).await?;
        }
        Command::Worker(args) => {
            log_to_stderr(&cli.log, cli.log_json)?;
            production::worker(args).await?;
        }
        Command::Kernels(KernelsCommand::Compile { arch, out }) => compile_kernels(&arch, out)?,
        Command::Serve(args) => {
            log_to_stderr(&cli.log, cli.log_json)?;
            server::serve(args).await?;
        }
        Command::Bench(args) => {
            log_to_stderr(if cli.log == "info" { "warn" } else { &cli.log }, cli.log_json)?;
            tokio::task::spawn_blocking(move || bench::run(&args)).await??;
        }
        Command::Demo(args) => {
            // The demonstration writes to the terminal itself; only trouble is logged.
            let quiet = if cli.log == "info" { "warn" } else { &cli.log };
            log_to_stderr(quiet, cli.log_json)?;
            demo::run(args).await?;
        }
    }
    Ok(())
}

fn compile_kernels(archs: &[Arch], out: Option<PathBuf>) -> anyhow::Result<()> {
    let folder = out.unwrap_or_else(compile::cache_folder);
    for arch in archs {
        let start = Instant::now();
        let Compiled { compiled, cached } = compile::compile_all(arch, &folder)?;
        let seconds = start.elapsed().as_secs_f64();
        let folder = folder.display();
        println!(
            "{arch}: {compiled} files compiled, {cached} in the cache, {seconds:.1} s, {folder}"
        );
    }
    Ok(())
}

fn log_to_stderr(filter: &str, json: bool) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| anyhow::anyhow!("--log: '{filter}' is no filter: {error}"))?;
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    if json {
        logs.json().init();
    } else {
        logs.init();
    }
    Ok(())
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("loquetier: {error:#}");
    ExitCode::FAILURE
}
