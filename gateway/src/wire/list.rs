//! Lists: the envelope, and the query strings that page through them.

use axum::extract::Query as AxumQuery;
use axum::http::Uri;
use serde::Serialize;
use storage::db::{Order, Page};
use utoipa::ToSchema;

use crate::error::{ApiError, ApiResult};
use crate::wire::fields::{integer, not_one_of};

/// `{"object":"list","data":[…],"has_more":…}`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct List<T: ToSchema> {
    /// Always `list`.
    pub object: &'static str,
    /// The page.
    pub data: Vec<T>,
    /// Whether there is more after it; exact.
    pub has_more: bool,
}

impl<T: ToSchema> List<T> {
    /// Of a page.
    pub fn new(data: Vec<T>, has_more: bool) -> List<T> {
        List { object: "list", data, has_more }
    }
}

/// A list that also names the ends of its page.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct EndedList<T: ToSchema> {
    /// Always `list`.
    pub object: &'static str,
    /// The page.
    pub data: Vec<T>,
    /// Id of the first item.
    pub first_id: Option<String>,
    /// Id of the last item.
    pub last_id: Option<String>,
    /// Whether there is more after it; exact.
    pub has_more: bool,
}

/// A list without pages.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct WholeList<T: ToSchema> {
    /// Always `list`.
    pub object: &'static str,
    /// All of it.
    pub data: Vec<T>,
}

/// A decoded query string.
#[derive(Clone, Debug)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Decodes; 400 if it is not UTF-8 after percent-decoding.
    pub fn parse(uri: &Uri) -> ApiResult<Query> {
        AxumQuery::try_from_uri(uri)
            .map(|AxumQuery(pairs)| Query(pairs))
            .map_err(|_| ApiError::refused("We could not parse the query string."))
    }

    /// First value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// All pairs.
    pub fn pairs(&self) -> &[(String, String)] {
        &self.0
    }

    /// `after`, `limit` and `order`.
    pub fn page(&self, default: u32, max: u32, ordered: bool) -> ApiResult<Page> {
        let limit = match self.get("limit") {
            None => default,
            Some(text) => {
                let value = serde_json::from_str(text)
                    .unwrap_or_else(|_| serde_json::Value::String(text.to_owned()));
                integer(&value, "limit", 1, i64::from(max))? as u32
            }
        };
        let order = match self.get("order").filter(|_| ordered) {
            None | Some("desc") => Order::Descending,
            Some("asc") => Order::Ascending,
            Some(other) => return Err(not_one_of("order", other, &["asc", "desc"])),
        };
        let after = self.get("after").map(str::to_owned);
        if after.as_deref().is_some_and(|after| after.contains('\0')) {
            return Err(ApiError::invalid_value("after", "Invalid 'after'."));
        }
        Ok(Page { after, limit, order })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(query: &str) -> ApiResult<Page> {
        let uri: Uri = format!("/v1/files?{query}").parse().unwrap();
        Query::parse(&uri)?.page(20, 100, true)
    }

    #[test]
    fn limits_have_bounds() {
        assert_eq!(page("").unwrap().limit, 20);
        assert_eq!(page("limit=100").unwrap().limit, 100);
        for bad in ["limit=0", "limit=101", "limit=x", "limit=", "limit=1.5", "limit=-1"] {
            let error = page(bad).unwrap_err().reply().error;
            assert_eq!(error.param.as_deref(), Some("limit"), "{bad}");
        }
    }

    #[test]
    fn order_and_cursor() {
        let page = page("order=asc&after=file-1").unwrap();
        assert_eq!(page.order, Order::Ascending);
        assert_eq!(page.after.as_deref(), Some("file-1"));
        assert!(self::page("order=up").is_err());
        assert!(self::page("after=%00").is_err());
    }
}
