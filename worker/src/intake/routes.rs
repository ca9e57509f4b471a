//! Which request of which gateway a number of the engine stands for, as plain data.

use crate::engine::command::RequestKey;
use std::collections::HashMap;
use storage::queue::message::{Item, Update};

/// Where a request's answers go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// `chatcmpl-…` or `cmpl-…`.
    pub request_id: String,
    /// Placement number.
    pub attempt: u32,
    /// The gateway that asked.
    pub gateway: String,
    /// Choices that have not ended.
    pub open: usize,
}

/// Outcome of adding a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// Run it under this number, in place of an earlier attempt to be cancelled.
    New {
        /// Its number.
        key: RequestKey,
        /// Number of the earlier attempt.
        replaced: Option<RequestKey>,
    },
    /// The same attempt or a later one is here already.
    Late,
}

/// Requests in this worker.
#[derive(Debug, Default)]
pub struct Routes {
    by_key: HashMap<RequestKey, Route>,
    by_id: HashMap<String, RequestKey>,
    next: RequestKey,
}

impl Routes {
    /// Adds a request. A later placement of the same request replaces an earlier one; a repeated
    /// one, or one that was held up on its way, is left out.
    pub fn add(&mut self, route: Route) -> Added {
        let old = self.by_id.get(&route.request_id).copied();
        if let Some(old) = old.and_then(|old| self.by_key.get(&old))
            && old.attempt >= route.attempt
        {
            return Added::Late;
        }
        let key = self.next;
        self.next += 1;
        if let Some(old) = old {
            self.by_key.remove(&old);
        }
        self.by_id.insert(route.request_id.clone(), key);
        self.by_key.insert(key, route);
        Added::New { key, replaced: old }
    }

    /// Addresses what happened to a request, to its gateway; with its last word the request is
    /// forgotten. Nothing for one that was cancelled meanwhile.
    pub fn address(&mut self, key: RequestKey, update: Update) -> Option<(String, Item)> {
        let route = self.by_key.get(&key)?;
        let gateway = route.gateway.clone();
        let (request_id, attempt) = (route.request_id.clone(), route.attempt);
        match &update {
            Update::Moved | Update::Failed(_) => {
                self.remove(key);
            }
            Update::Tokens { finish: Some(_), .. } => self.choice_ended(key),
            Update::Tokens { finish: None, .. } | Update::Admitted { .. } => {}
        }
        Some((gateway, Item { request_id, attempt, update }))
    }

    /// A request by its number.
    pub fn get(&self, key: RequestKey) -> Option<&Route> {
        self.by_key.get(&key)
    }

    /// Removes a request by its id, unless it is of a later attempt.
    pub fn cancel(&mut self, request_id: &str, attempt: u32) -> Option<RequestKey> {
        let key = *self.by_id.get(request_id)?;
        if self.by_key.get(&key)?.attempt > attempt {
            return None;
        }
        self.remove(key)?;
        Some(key)
    }

    /// Removes a request that is over.
    pub fn remove(&mut self, key: RequestKey) -> Option<Route> {
        let route = self.by_key.remove(&key)?;
        self.by_id.remove(&route.request_id);
        Some(route)
    }

    /// One choice ended; removes the request with its last.
    fn choice_ended(&mut self, key: RequestKey) {
        if let Some(route) = self.by_key.get_mut(&key) {
            route.open = route.open.saturating_sub(1);
            if route.open == 0 {
                self.remove(key);
            }
        }
    }

    /// Divides the requests here now from those that come later.
    pub fn mark(&self) -> RequestKey {
        self.next
    }

    /// Removes the requests of a gateway that was gone after `mark` was taken. Later ones are left:
    /// the gateway is back, and would wait for them for ever.
    pub fn drop_gateway(&mut self, gateway: &str, mark: RequestKey) -> Vec<RequestKey> {
        let of_it = |(key, route): &(&RequestKey, &Route)| **key < mark && route.gateway == gateway;
        let mut keys: Vec<RequestKey> =
            self.by_key.iter().filter(of_it).map(|(key, _)| *key).collect();
        keys.sort_unstable();
        for key in &keys {
            self.remove(*key);
        }
        keys
    }

    /// The gateways that wait for something.
    pub fn gateways(&self) -> Vec<String> {
        let mut gateways: Vec<String> =
            self.by_key.values().map(|route| route.gateway.clone()).collect();
        gateways.sort_unstable();
        gateways.dedup();
        gateways
    }

    /// Requests in this worker.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// No request is here.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use storage::queue::message::Finish;

    fn route(id: &str, attempt: u32, gateway: &str, open: usize) -> Route {
        Route { request_id: id.into(), attempt, gateway: gateway.into(), open }
    }

    fn added(routes: &mut Routes, route: Route) -> RequestKey {
        match routes.add(route) {
            Added::New { key, .. } => key,
            Added::Late => panic!("left out"),
        }
    }

    fn end() -> Update {
        let (first, tokens, text) = (0, Vec::new(), String::new());
        Update::Tokens { choice: 0, first, tokens, text, finish: Some(Finish::Stop) }
    }

    #[test]
    fn a_later_placement_replaces_an_earlier_one_and_never_the_reverse() {
        let mut routes = Routes::default();
        let first = added(&mut routes, route("r", 1, "g", 1));
        for late in [0, 1] {
            assert_eq!(routes.add(route("r", late, "g", 1)), Added::Late);
        }
        let Added::New { key, replaced } = routes.add(route("r", 2, "g", 1)) else {
            panic!("left out")
        };
        assert_eq!(replaced, Some(first));
        assert_eq!(routes.address(first, end()), None);
        assert_eq!(routes.cancel("r", 1), None, "a cancel that came late");
        assert_eq!(routes.cancel("r", 2), Some(key));
        assert!(routes.is_empty() && routes.cancel("r", 2).is_none());
    }

    #[test]
    fn ends_with_its_last_choice_or_word() {
        let mut routes = Routes::default();
        let key = added(&mut routes, route("a", 3, "g", 2));
        let item = Item { request_id: "a".into(), attempt: 3, update: end() };
        assert_eq!(routes.address(key, end()), Some(("g".to_owned(), item)));
        assert!(routes.get(key).is_some());
        assert!(routes.address(key, end()).is_some());
        assert!(routes.is_empty());
        let key = added(&mut routes, route("b", 0, "g", 2));
        assert!(routes.address(key, Update::Moved).is_some());
        assert!(routes.is_empty());
    }

    #[test]
    fn a_gateway_takes_only_its_earlier_requests_along() {
        let mut routes = Routes::default();
        let gone = added(&mut routes, route("b", 0, "g", 1));
        let kept = added(&mut routes, route("c", 0, "h", 1));
        let mark = routes.mark();
        let later = added(&mut routes, route("d", 0, "g", 1));
        assert_eq!(routes.drop_gateway("g", mark), vec![gone]);
        assert!(routes.get(kept).is_some() && routes.get(later).is_some());
    }
}
