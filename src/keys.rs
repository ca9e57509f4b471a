//! `loquetier keys`: works on the rows alone, beside a running server.

use crate::cli::{KeysCommand, RowsArgs};
use anyhow::bail;
use storage::db::Role;
use storage::{Db, Storage};

/// Carries out one command and prints its result.
pub async fn run(command: KeysCommand) -> anyhow::Result<()> {
    match command {
        KeysCommand::Create { org, operator, rows } => {
            check_org(&org)?;
            let role = if operator { Role::Operator } else { Role::Member };
            let (row, secret) = open(&rows).await?.keys().create(&org, role).await?;
            eprintln!("key {} for {}; it is shown only this once:", row.id, row.org);
            println!("{secret}");
        }
        KeysCommand::List { org, rows } => {
            for key in open(&rows).await?.keys().list(org.as_deref()).await? {
                let state = if key.revoked_at.is_some() { "revoked" } else { "active" };
                println!("{}\t{}\t{:?}\t{}\t{state}", key.id, key.org, key.role, key.hint);
            }
        }
        KeysCommand::Revoke { id, rows } => {
            if !open(&rows).await?.keys().revoke(&id).await? {
                bail!("there is no active key '{id}'");
            }
            println!("revoked {id}");
        }
    }
    Ok(())
}

async fn open(rows: &RowsArgs) -> anyhow::Result<Db> {
    Ok(match &rows.database_url {
        Some(url) => Db::open_shared(url).await?,
        None => Storage::open_rows(&rows.data_dir).await?,
    })
}

/// Organizations become part of model names, so they hold no `:` and no `/`.
fn check_org(org: &str) -> anyhow::Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if org.is_empty() || org.len() > 64 || !org.bytes().all(plain) {
        bail!("--org: '{org}' must be 1 to 64 of A-Z a-z 0-9 - _ .");
    }
    Ok(())
}
