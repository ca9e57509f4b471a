//! `adapter_config.json`: what of PEFT's many fields an adapter may set, and the text we write.

use kernels::Module;
use serde_json::{Value, json};

use super::layout::{AdapterShape, RANK_LIMIT, module_name};
use super::peft::PeftError;
use crate::base::json::{FieldError, Fields, object};

/// Fields that change what PEFT computes in a way the device operations do not have.
const REFUSED: [(&str, &str); 21] = [
    ("use_dora", "DoRA is not supported"),
    ("use_qalora", "QA-LoRA is not supported"),
    ("use_bdlora", "BD-LoRA is not supported"),
    ("lora_bias", "a bias on LoRA matrices is not supported"),
    ("fan_in_fan_out", "transposed weights are not supported"),
    ("rank_pattern", "one rank for all modules is needed"),
    ("alpha_pattern", "one alpha for all modules is needed"),
    ("modules_to_save", "replaced modules are not supported, the base is shared"),
    ("layers_pattern", "the layers of a decoder are needed"),
    ("layer_replication", "replicated layers are not supported"),
    ("trainable_token_indices", "changed embeddings are not supported, the base is shared"),
    ("target_parameters", "only linear modules can be targets"),
    ("alora_invocation_tokens", "activated LoRA is not supported"),
    ("megatron_config", "Megatron layers are not supported"),
    ("velora_config", "VeLoRA is not supported"),
    ("monteclora_config", "MonteCLoRA is not supported"),
    ("arrow_config", "Arrow routing is not supported"),
    ("kasa_config", "KaSA is not supported"),
    ("use_lora_fa", "LoRA-FA is not supported"),
    ("use_mora", "MoRA is not supported"),
    ("ensure_weight_tying", "changed embeddings are not supported, the base is shared"),
];

/// What an adapter's configuration says beside its weights.
pub(super) struct PeftConfig {
    pub(super) rank: usize,
    pub(super) alpha: f64,
    pub(super) use_rslora: bool,
    base_name: Option<String>,
    /// Entries of `target_modules` where it is a list.
    targets: Option<Vec<String>>,
}

/// Reads the configuration of an adapter for a base of `layers` layers.
pub(super) fn read_config(text: &[u8], layers: usize) -> Result<PeftConfig, FieldError> {
    let map = object(text)?;
    let fields = Fields::new(&map);
    if fields.text("peft_type")? != Some("LORA") {
        return Err(fields.fault("peft_type", "only LORA is supported"));
    }
    if !matches!(fields.text("task_type")?, None | Some("CAUSAL_LM")) {
        return Err(fields.fault("task_type", "only CAUSAL_LM is supported"));
    }
    if !matches!(fields.text("bias")?, None | Some("none")) {
        return Err(fields.fault("bias", "only none is supported"));
    }
    for (name, reason) in REFUSED {
        fields.refuse_set(name, reason)?;
    }
    refuse_changed_base(fields)?;
    refuse_some_layers(fields, layers)?;
    Ok(PeftConfig {
        rank: fields.need_count("r", RANK_LIMIT)?,
        alpha: fields.need_positive("lora_alpha")?,
        use_rslora: fields.flag("use_rslora")?,
        base_name: fields.text("base_model_name_or_path")?.map(str::to_owned),
        targets: targets(fields)?,
    })
}

/// Some initialisations take part of the base into the adapter; loaded, PEFT does so again.
fn refuse_changed_base(fields: Fields<'_>) -> Result<(), FieldError> {
    const NAME: &str = "init_lora_weights";
    match fields.get(NAME) {
        None | Some(Value::Bool(_)) => Ok(()),
        Some(Value::String(name)) if ["gaussian", "orthogonal", "eva"].contains(&&**name) => Ok(()),
        Some(_) => Err(fields.fault(NAME, "it changes the base, which is shared")),
    }
}

fn refuse_some_layers(fields: Fields<'_>, layers: usize) -> Result<(), FieldError> {
    const NAME: &str = "layers_to_transform";
    let all = match fields.get(NAME) {
        None => true,
        Some(Value::Array(list)) => {
            (0..layers as u64).all(|layer| list.iter().any(|one| one.as_u64() == Some(layer)))
        }
        Some(_) => layers == 1,
    };
    if all { Ok(()) } else { Err(fields.fault(NAME, "all layers are needed")) }
}

fn targets(fields: Fields<'_>) -> Result<Option<Vec<String>>, FieldError> {
    const NAME: &str = "target_modules";
    match fields.get(NAME) {
        // A string is a pattern or "all-linear": the weights say what it met.
        None | Some(Value::String(_)) => Ok(None),
        Some(Value::Array(list)) => {
            let names = list.iter().map(|name| name.as_str().map(str::to_owned));
            let names: Option<Vec<String>> = names.collect();
            names.map(Some).ok_or_else(|| fields.fault(NAME, "a list of strings is needed"))
        }
        Some(_) => Err(fields.fault(NAME, "a list of strings or a string is needed")),
    }
}

impl PeftConfig {
    /// Compares a list of target modules with those that have weights.
    pub(super) fn check_targets(&self, found: &[Module]) -> Result<(), PeftError> {
        let Some(listed) = &self.targets else { return Ok(()) };
        let fault = |reason: String| {
            PeftError::Field(FieldError { field: "target_modules".into(), reason })
        };
        for module in Module::ALL {
            let name = module_name(module);
            let plain = listed.iter().any(|entry| entry == name);
            let meets = |entry: &String| entry.strip_suffix(name).is_some_and(|s| s.ends_with('.'));
            let any = plain || listed.iter().any(meets);
            match found.contains(&module) {
                true if !any => {
                    return Err(fault(format!("does not list {name}, which has weights")));
                }
                false if plain => return Err(fault(format!("lists {name}, which has no weights"))),
                _ => {}
            }
        }
        Ok(())
    }

    /// What is odd but harmless.
    pub(super) fn warnings(&self, base_name: &str) -> Vec<String> {
        match &self.base_name {
            Some(name) if name != base_name => {
                vec![format!("the adapter was made for base {name:?}, here it is {base_name:?}")]
            }
            _ => Vec::new(),
        }
    }

    /// The text for an adapter of ours: keys sorted, as PEFT writes them.
    pub(super) fn text(shape: &AdapterShape, dropout: f64, base_name: &str) -> String {
        let mut names: Vec<_> = shape.targets.iter().map(|module| module_name(*module)).collect();
        names.sort_unstable();
        // PEFT declares alpha as an integer and computes with whatever number it finds.
        let whole = shape.alpha.fract() == 0.0 && shape.alpha.abs() < 2f64.powi(53);
        let alpha = if whole { json!(shape.alpha as i64) } else { json!(shape.alpha) };
        let config = json!({
            "alpha_pattern": {},
            "auto_mapping": null,
            "base_model_name_or_path": base_name,
            "bias": "none",
            "exclude_modules": null,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": alpha,
            "lora_bias": false,
            "lora_dropout": dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": shape.rank,
            "rank_pattern": {},
            "revision": null,
            "target_modules": names,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": shape.use_rslora,
        });
        format!("{config:#}\n")
    }
}
