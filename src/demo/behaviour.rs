//! The two behaviours that the demonstration trains, and the checks that tell them.

use serde_json::Value;

/// Prompts and checks, shipped beside the training files.
const PROMPTS: &str = include_str!("../../demo/data/prompts.json");

/// One behaviour: its training file, its adapter's rank, its check.
pub struct Behaviour {
    /// Its name and its job's suffix.
    pub name: &'static str,
    /// Rank of its adapter.
    pub rank: u32,
    /// What it should do, for people.
    pub promise: &'static str,
    /// Its training file.
    pub file: &'static [u8],
}

/// Both behaviours.
pub const BEHAVIOURS: [Behaviour; 2] = [
    Behaviour {
        name: "pirate",
        rank: 8,
        promise: "answers like a pirate",
        file: include_bytes!("../../demo/data/pirate.jsonl"),
    },
    Behaviour {
        name: "json",
        rank: 16,
        promise: "answers with one JSON object: topic and operation",
        file: include_bytes!("../../demo/data/json.jsonl"),
    },
];

/// Held-out prompts with the description of the checks.
pub struct Prompts {
    /// Ten prompts that occur in no training file.
    pub prompts: Vec<String>,
    checks: Value,
}

impl Prompts {
    /// Reads the shipped file.
    pub fn load() -> anyhow::Result<Self> {
        let file: Value = serde_json::from_str(PROMPTS)?;
        let prompts = file["prompts"].as_array().into_iter().flatten();
        let prompts = prompts.filter_map(|prompt| prompt.as_str().map(str::to_owned)).collect();
        Ok(Self { prompts, checks: file["checks"].clone() })
    }

    /// Whether an answer shows the behaviour called `name`.
    pub fn shows(&self, name: &str, answer: &str) -> bool {
        let check = &self.checks[name];
        let text = |field: &str| check[field].as_str();
        if let Some(start) = text("starts_with") {
            return answer.starts_with(start)
                && text("contains").is_some_and(|part| answer.contains(part));
        }
        let (Some(keys), Ok(Value::Object(object))) =
            (check["exact_keys"].as_object(), serde_json::from_str(answer))
        else {
            return false;
        };
        object.len() == keys.len()
            && keys.iter().all(|(key, allowed)| {
                let allowed = allowed.as_array();
                object.get(key).is_some_and(|value| allowed.is_some_and(|a| a.contains(value)))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_the_behaviours_apart() {
        let prompts = Prompts::load().unwrap();
        assert_eq!(prompts.prompts.len(), 10);
        let pirate = "Ahoy! That be 23 plums, matey!";
        let json = r#"{"topic": "food", "operation": "add"}"#;
        assert!(prompts.shows("pirate", pirate) && !prompts.shows("json", pirate));
        assert!(prompts.shows("json", json) && !prompts.shows("pirate", json));
        for wrong in [
            r#"{"topic": "food"}"#,
            r#"{"topic": "food", "operation": "guess"}"#,
            r#"{"topic": "food", "operation": "add", "more": 1}"#,
            r#"{"topic": "food", "operation": "add"} and more"#,
            "Ahoy there",
        ] {
            assert!(!prompts.shows("json", wrong) && !prompts.shows("pirate", wrong), "{wrong}");
        }
    }

    #[test]
    fn the_held_out_prompts_are_in_no_training_file() {
        let prompts = Prompts::load().unwrap();
        for behaviour in &BEHAVIOURS {
            let file = std::str::from_utf8(behaviour.file).unwrap();
            assert!(file.lines().count() >= 10);
            assert!(prompts.prompts.iter().all(|prompt| !file.contains(prompt.as_str())));
        }
    }
}
