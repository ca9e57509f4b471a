//! Which request of which gateway a number of the engine stands for.

use crate::engine::command::RequestKey;
use std::collections::HashMap;

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

/// Requests in this worker.
#[derive(Debug, Default)]
pub struct Routes {
    by_key: HashMap<RequestKey, Route>,
    by_id: HashMap<String, RequestKey>,
    next: RequestKey,
}

impl Routes {
    /// Adds a request. A second placement of the same request replaces the first, whose number is
    /// returned for cancellation.
    pub fn add(&mut self, route: Route) -> (RequestKey, Option<RequestKey>) {
        let key = self.next;
        self.next += 1;
        let old = self.by_id.insert(route.request_id.clone(), key);
        if let Some(old) = old {
            self.by_key.remove(&old);
        }
        self.by_key.insert(key, route);
        (key, old)
    }

    /// A request by its number.
    pub fn get(&self, key: RequestKey) -> Option<&Route> {
        self.by_key.get(&key)
    }

    /// Removes a request by its id.
    pub fn cancel(&mut self, request_id: &str) -> Option<RequestKey> {
        let key = self.by_id.remove(request_id)?;
        self.by_key.remove(&key);
        Some(key)
    }

    /// Removes a request that is over.
    pub fn remove(&mut self, key: RequestKey) -> Option<Route> {
        let route = self.by_key.remove(&key)?;
        self.by_id.remove(&route.request_id);
        Some(route)
    }

    /// One choice ended; removes the request with its last.
    pub fn choice_ended(&mut self, key: RequestKey) {
        if let Some(route) = self.by_key.get_mut(&key) {
            route.open = route.open.saturating_sub(1);
            if route.open == 0 {
                self.remove(key);
            }
        }
    }

    /// Removes all requests of a gateway that is gone.
    pub fn drop_gateway(&mut self, gateway: &str) -> Vec<RequestKey> {
        let of_it = |(_, route): &(&RequestKey, &Route)| route.gateway == gateway;
        let keys: Vec<RequestKey> = self.by_key.iter().filter(of_it).map(|(key, _)| *key).collect();
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(id: &str, gateway: &str, open: usize) -> Route {
        Route { request_id: id.into(), attempt: 0, gateway: gateway.into(), open }
    }

    #[test]
    fn a_second_placement_replaces_the_first() {
        let mut routes = Routes::default();
        let (first, none) = routes.add(route("r", "g", 1));
        let (second, old) = routes.add(route("r", "g", 1));
        assert_eq!((none, old), (None, Some(first)));
        assert!(routes.get(first).is_none());
        routes.remove(second);
        assert!(routes.len() == 0 && routes.cancel("r").is_none());
    }

    #[test]
    fn ends_with_its_last_choice_or_its_gateway() {
        let mut routes = Routes::default();
        let (key, _) = routes.add(route("a", "g", 2));
        routes.choice_ended(key);
        assert!(routes.get(key).is_some());
        routes.choice_ended(key);
        assert!(routes.len() == 0);
        let (gone, _) = routes.add(route("b", "g", 1));
        let (kept, _) = routes.add(route("c", "h", 1));
        assert_eq!(routes.drop_gateway("g"), vec![gone]);
        assert!(routes.get(kept).is_some());
    }
}
