//! Rotary position tables, in the same f32 steps as transformers so that angles round alike.
//!
//! Kinds without attention scaling only: plain, linear, and Llama 3's frequency mapping.

use super::json::{FieldError, Fields};

/// Base period where a configuration gives none.
const DEFAULT_THETA: f64 = 10_000.0;
/// Longest pretraining context that Llama 3's mapping may name, in tokens.
const ORIGINAL_CONTEXT_LIMIT: usize = 1 << 24;

/// How frequencies are stretched for contexts longer than those of pretraining.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// As pretrained.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: long wavelengths are divided, short ones kept, those between interpolated.
    Llama3 {
        /// Divisor of long wavelengths.
        factor: f64,
        /// Wavelengths above original context / this are long.
        low_freq_factor: f64,
        /// Wavelengths below original context / this are short.
        high_freq_factor: f64,
        /// Context of pretraining, in tokens.
        original_context: usize,
    },
}

/// A base's rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base period.
    pub theta: f64,
    /// Stretching of frequencies.
    pub scaling: RopeScaling,
}

/// Cosines and sines, `(positions, D/2)` each.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTables {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

impl RopeConfig {
    /// Reads `rope_theta` + `rope_scaling`, or `rope_parameters`; the former wins where both are
    /// filled, as in transformers.
    pub(super) fn read(fields: Fields<'_>, context: usize) -> Result<Self, FieldError> {
        let scaling = fields.nested("rope_scaling", "rope_scaling.")?;
        let parameters = fields.nested("rope_parameters", "rope_parameters.")?;
        let nested = scaling.filter(|fields| !fields.is_empty()).or(parameters);
        let outer_theta = read_theta(fields)?;
        let Some(nested) = nested else {
            let theta = outer_theta.unwrap_or(DEFAULT_THETA);
            return Ok(Self { theta, scaling: RopeScaling::None });
        };
        let theta = read_theta(nested)?.or(outer_theta).unwrap_or(DEFAULT_THETA);
        if nested.positive("partial_rotary_factor")?.is_some_and(|part| part != 1.0) {
            return Err(nested.fault("partial_rotary_factor", "only whole heads are rotated"));
        }
        Ok(Self { theta, scaling: read_scaling(nested, fields, context)? })
    }

    /// Inverse frequencies `(D/2)` in radians per position.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let plain = (0..head_dim / 2).map(|pair| {
            let exponent = (2 * pair) as f32 / head_dim as f32;
            // The power in f64 rounds to the nearest f32, as a good f32 power does.
            1.0 / (self.theta.powf(f64::from(exponent)) as f32)
        });
        match self.scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|freq| freq / factor as f32).collect(),
            RopeScaling::Llama3 { .. } => plain.map(|freq| self.llama3(freq)).collect(),
        }
    }

    fn llama3(&self, freq: f32) -> f32 {
        let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } =
            self.scaling
        else {
            return freq;
        };
        let original = original_context as f64;
        let wavelength = (2.0 * std::f64::consts::PI) as f32 / freq;
        let long = (original / low_freq_factor) as f32;
        let short = (original / high_freq_factor) as f32;
        if wavelength > long {
            freq / factor as f32
        } else if wavelength < short {
            freq
        } else {
            let span = (high_freq_factor - low_freq_factor) as f32;
            let smooth = (original as f32 / wavelength - low_freq_factor as f32) / span;
            (1.0 - smooth) * freq / factor as f32 + smooth * freq
        }
    }

    /// Tables for positions `0..positions`.
    pub fn tables(&self, head_dim: usize, positions: usize) -> RopeTables {
        let frequencies = self.inverse_frequencies(head_dim);
        let mut cos = Vec::with_capacity(positions * frequencies.len());
        let mut sin = Vec::with_capacity(positions * frequencies.len());
        for position in 0..positions {
            for frequency in &frequencies {
                // The angle rounds to f32 as in transformers; its cosine is then taken exactly.
                let angle = f64::from(position as f32 * frequency);
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
        RopeTables { cos, sin }
    }
}

/// Below 1 frequencies would grow beyond any wavelength that positions can tell apart.
fn read_theta(fields: Fields<'_>) -> Result<Option<f64>, FieldError> {
    match fields.positive("rope_theta")? {
        Some(theta) if theta < 1.0 => Err(fields.fault("rope_theta", "at least 1 is needed")),
        theta => Ok(theta),
    }
}

fn read_factor(fields: Fields<'_>) -> Result<f64, FieldError> {
    let factor = fields.need_positive("factor")?;
    if factor < 1.0 {
        return Err(fields.fault("factor", "at least 1 is needed"));
    }
    Ok(factor)
}

fn read_scaling(
    nested: Fields<'_>,
    outer: Fields<'_>,
    context: usize,
) -> Result<RopeScaling, FieldError> {
    let name = if nested.get("rope_type").is_some() { "rope_type" } else { "type" };
    match nested.text(name)? {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: read_factor(nested)? }),
        Some("llama3") => {
            const ORIGINAL: &str = "original_max_position_embeddings";
            let low_freq_factor = nested.need_positive("low_freq_factor")?;
            let high_freq_factor = nested.need_positive("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let reason = format!("it must exceed low_freq_factor {low_freq_factor}");
                return Err(nested.fault("high_freq_factor", &reason));
            }
            let original_context = match outer.count(ORIGINAL, ORIGINAL_CONTEXT_LIMIT)? {
                Some(original) => original,
                None => nested.count(ORIGINAL, ORIGINAL_CONTEXT_LIMIT)?.unwrap_or(context),
            };
            Ok(RopeScaling::Llama3 {
                factor: read_factor(nested)?,
                low_freq_factor,
                high_freq_factor,
                original_context,
            })
        }
        Some(_) => Err(nested.fault(name, "supported are default, linear and llama3")),
    }
}
