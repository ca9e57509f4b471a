//! Finds a base's chat template and the tokens it may name, in the files of a Hugging Face
//! folder. Does not compile or render.

use std::io::ErrorKind;
use std::path::Path;

use serde_json::Value;

use super::template::TemplateError;

/// Largest file read; real ones stay below 1 MB.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Named tokens that templates may use.
const NAMED_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Template text and named tokens of one base.
#[derive(Debug, Default, PartialEq)]
pub struct TemplateSource {
    /// The template; of several, the one named `default`.
    pub default: String,
    /// The one named `tool_use`, rendered when there are tools.
    pub tool_use: Option<String>,
    /// (variable, text) such as `("bos_token", "<s>")`.
    pub tokens: Vec<(String, String)>,
}

impl TemplateSource {
    /// From a folder; none when it has no template.
    pub fn read(folder: &Path) -> Result<Option<Self>, TemplateError> {
        let config = read_file(&folder.join("tokenizer_config.json"))?;
        let jinja = read_file(&folder.join("chat_template.jinja"))?;
        Self::parse(config.as_deref(), jinja.as_deref())
    }

    /// From the bytes of `tokenizer_config.json` and `chat_template.jinja`, which has priority.
    pub fn parse(
        config: Option<&[u8]>,
        jinja: Option<&[u8]>,
    ) -> Result<Option<Self>, TemplateError> {
        let fault = |message: String| TemplateError::Invalid(message);
        let config: Value = match config {
            None => Value::Null,
            Some(bytes) => serde_json::from_slice(bytes)
                .map_err(|error| fault(format!("tokenizer_config.json: {error}")))?,
        };
        let mut source = Self { tokens: named_tokens(&config), ..Self::default() };
        match (jinja, &config["chat_template"]) {
            (Some(bytes), _) => {
                source.default = std::str::from_utf8(bytes)
                    .map_err(|error| fault(format!("chat_template.jinja: {error}")))?
                    .to_owned();
            }
            (None, Value::Null) => return Ok(None),
            (None, Value::String(template)) => source.default = template.clone(),
            (None, Value::Array(list)) => source.take_named(list)?,
            (None, _) => {
                return Err(fault("chat_template is neither a string nor a list".into()));
            }
        }
        Ok(Some(source))
    }

    fn take_named(&mut self, list: &[Value]) -> Result<(), TemplateError> {
        let find = |name: &str| {
            let entry = list.iter().find(|entry| entry["name"] == name)?;
            entry["template"].as_str().map(str::to_owned)
        };
        self.default = find("default").ok_or_else(|| {
            TemplateError::Invalid("chat_template is a list without a \"default\"".into())
        })?;
        self.tool_use = find("tool_use");
        Ok(())
    }
}

fn named_tokens(config: &Value) -> Vec<(String, String)> {
    let text = |name: &str| {
        let value = &config[name];
        value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
    };
    NAMED_TOKENS.iter().filter_map(|name| Some(((*name).to_owned(), text(name)?))).collect()
}

/// The bytes of a file, or none when it is not there.
fn read_file(path: &Path) -> Result<Option<Vec<u8>>, TemplateError> {
    let fault = |why: String| TemplateError::Invalid(format!("{}: {why}", path.display()));
    match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fault(error.to_string())),
        Ok(found) if found.len() > FILE_BYTES_MAX => return Err(fault("too large".into())),
        Ok(_) => {}
    }
    std::fs::read(path).map(Some).map_err(|error| fault(error.to_string()))
}
