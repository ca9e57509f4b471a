//! What a request is aimed at: the weights that a model's name means, and what placement needs
//! beside them.

use storage::db::Resolved;
use storage::queue::message::Target;

/// What placement needs beside the request itself.
#[derive(Clone, Debug, Default)]
pub struct Hints {
    /// Fingerprint the adapter was made for.
    pub base_fingerprint: Option<String>,
    /// Worker that owns the job.
    pub owner: Option<String>,
    /// The model as the client names it, for accounts.
    pub model: String,
}

/// A resolved model.
#[derive(Clone, Debug)]
pub struct Aim {
    /// Base model name.
    pub base: String,
    /// What runs on it.
    pub target: Target,
    /// For placement.
    pub hints: Hints,
}

impl Aim {
    /// At what the name `model` was resolved to.
    pub fn at(resolved: Resolved, model: String) -> Aim {
        match resolved {
            Resolved::Base(row) => {
                let hints = Hints { model, ..Hints::default() };
                Aim { base: row.name, target: Target::Base, hints }
            }
            Resolved::Adapter(row) => {
                let hints = Hints {
                    base_fingerprint: Some(row.base_fingerprint),
                    owner: None,
                    model: row.model.clone(),
                };
                let target =
                    Target::Adapter { adapter_id: row.id, model: row.model, object: row.object };
                Aim { base: row.base, target, hints }
            }
            Resolved::Job(row) => {
                let base_fingerprint = Some(row.base_fingerprint);
                let hints = Hints { base_fingerprint, owner: row.owner, model };
                Aim { base: row.base, target: Target::Job { job_id: row.id }, hints }
            }
        }
    }
}
