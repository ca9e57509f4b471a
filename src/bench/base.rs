//! The base that is measured: random weights of a known shape, or files.

use super::args::CommonArgs;
use crate::embedded;
use anyhow::{Context, bail};
use kernels::Device;
use std::path::PathBuf;
use worker::base::{BaseConfig, BaseFiles, BaseWeights, SHAPES};

/// Seed of random weights.
const SEED: u64 = 1;

/// See the module.
pub struct Base {
    /// Name in reports.
    pub name: String,
    source: Source,
}

enum Source {
    Files(BaseFiles, Option<PathBuf>),
    Random(BaseConfig),
}

impl Base {
    /// What the command line names.
    pub fn open(args: &CommonArgs) -> anyhow::Result<Self> {
        if let Some(shape) = &args.random_weights {
            let source = Source::Random(shape_named(shape)?);
            return Ok(Self { name: shape.clone(), source });
        }
        let (name, source) = match &args.base_model {
            None => (embedded::NAME.to_owned(), Source::Files(embedded::open()?, None)),
            Some(folder) => {
                let files = BaseFiles::open(folder)
                    .with_context(|| format!("the base in {} cannot be used", folder.display()))?;
                (folder.display().to_string(), Source::Files(files, Some(folder.clone())))
            }
        };
        Ok(Self { name, source })
    }

    /// Its shapes.
    pub fn config(&self) -> &BaseConfig {
        match &self.source {
            Source::Files(files, _) => files.config(),
            Source::Random(config) => config,
        }
    }

    /// Its weights on the device.
    pub fn weights<D: Device>(
        &self,
        device: &D,
        max_positions: usize,
    ) -> anyhow::Result<BaseWeights<D>> {
        match &self.source {
            Source::Files(files, _) => Ok(BaseWeights::load(device, files, max_positions)?),
            Source::Random(config) => Ok(BaseWeights::random(device, config, SEED, max_positions)?),
        }
    }

    /// Bytes of its weight files.
    pub fn file_bytes(&self) -> anyhow::Result<u64> {
        match &self.source {
            Source::Files(_, None) => Ok(embedded::weight_bytes()),
            Source::Files(_, Some(folder)) => {
                let mut bytes = 0;
                for entry in folder.read_dir()? {
                    let entry = entry?;
                    if entry.path().extension().is_some_and(|extension| extension == "safetensors")
                    {
                        bytes += entry.metadata()?.len();
                    }
                }
                Ok(bytes)
            }
            Source::Random(_) => bail!("random weights are in no file; name a folder"),
        }
    }
}

fn shape_named(name: &str) -> anyhow::Result<BaseConfig> {
    let known = || format!("--random-weights: '{name}' is none of {}", SHAPES.join(", "));
    BaseConfig::of_shape(name).with_context(known)
}
