//! All that outlives a process or crosses one: rows, queue, objects. The only crate that knows
//! SQL, Redis or object keys.

pub mod queue;
