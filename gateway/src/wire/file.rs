//! Files: purposes and the reply object.

use serde::Serialize;
use storage::db::FileRow;
use utoipa::ToSchema;

use crate::error::{ApiError, ApiResult};
use crate::wire::fields::not_one_of;

/// `file`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FileObject {
    /// `file-…`.
    pub id: String,
    /// Always `file`.
    pub object: &'static str,
    /// Size.
    pub bytes: i64,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds; absent: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<i64>,
    /// Name the client gave.
    pub filename: String,
    /// `fine-tune`, `batch`, `user_data` or `fine-tune-results`.
    pub purpose: String,
    /// Always `processed`.
    pub status: &'static str,
}

impl From<FileRow> for FileObject {
    fn from(row: FileRow) -> FileObject {
        FileObject {
            id: row.id,
            object: "file",
            bytes: row.bytes,
            created_at: row.created_at,
            expires_at: row.expires_at,
            filename: row.filename,
            purpose: row.purpose,
            status: "processed",
        }
    }
}

/// Reply to a deletion.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Deleted {
    /// What was deleted.
    pub id: String,
    /// `file` or `model`.
    pub object: &'static str,
    /// Always true.
    pub deleted: bool,
}

/// What a file may be uploaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Training or validation examples.
    FineTune,
    /// Requests of a batch.
    Batch,
    /// Anything.
    UserData,
}

impl Purpose {
    /// The word in requests and rows.
    pub fn as_str(self) -> &'static str {
        match self {
            Purpose::FineTune => "fine-tune",
            Purpose::Batch => "batch",
            Purpose::UserData => "user_data",
        }
    }

    /// Lines are checked at upload.
    pub fn is_lines(self) -> bool {
        self != Purpose::UserData
    }

    /// Parses the form field.
    pub fn parse(word: &str) -> ApiResult<Purpose> {
        const KNOWN: [Purpose; 3] = [Purpose::FineTune, Purpose::Batch, Purpose::UserData];
        const ELSEWHERE: [&str; 3] = ["assistants", "vision", "evals"];
        if let Some(purpose) = KNOWN.into_iter().find(|purpose| purpose.as_str() == word) {
            return Ok(purpose);
        }
        if ELSEWHERE.contains(&word) {
            let message = format!("Files with purpose '{word}' are not supported.");
            return Err(ApiError::unsupported_value("purpose", message));
        }
        Err(not_one_of("purpose", word, &KNOWN.map(Purpose::as_str)))
    }
}
