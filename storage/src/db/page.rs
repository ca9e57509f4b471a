//! Pages of a list: strictly after an item, in a total order, with an exact `has_more`.

/// Direction of a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Newest (or highest) first.
    #[default]
    Descending,
    /// Oldest first.
    Ascending,
}

/// Which part of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Id of the item before the page; absent: from the start. An id that is not in the list
    /// (unknown, foreign, deleted) is [`crate::Error::UnknownCursor`].
    pub after: Option<String>,
    /// Most rows to return; the caller has checked its bounds.
    pub limit: u32,
    /// Direction.
    pub order: Order,
}

impl Page {
    /// The newest `limit` items.
    pub fn first(limit: u32) -> Self {
        Self { after: None, limit, order: Order::Descending }
    }

    /// `ORDER BY` and comparison of the page's order.
    pub(super) fn direction(&self) -> (&'static str, &'static str) {
        match self.order {
            Order::Descending => ("DESC", "<"),
            Order::Ascending => ("ASC", ">"),
        }
    }

    /// A sequence number before every item in the page's order.
    pub(super) fn before_all(&self) -> i64 {
        match self.order {
            Order::Descending => i64::MAX,
            Order::Ascending => i64::MIN,
        }
    }

    /// One row more than asked for tells whether there is more.
    pub(super) fn rows_to_read(&self) -> i64 {
        i64::from(self.limit) + 1
    }
}

/// One page.
#[derive(Clone, Debug, PartialEq)]
pub struct Listing<T> {
    /// At most the page's limit.
    pub rows: Vec<T>,
    /// Whether the list goes on after the last row; exact.
    pub has_more: bool,
}

impl<T> Listing<T> {
    /// From up to `limit + 1` rows.
    pub(super) fn cut(mut rows: Vec<T>, page: &Page) -> Self {
        let limit = page.limit as usize;
        let has_more = rows.len() > limit;
        rows.truncate(limit);
        Self { rows, has_more }
    }
}
