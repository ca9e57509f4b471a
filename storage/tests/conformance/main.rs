//! One suite for rows, run on SQLite always and on Postgres when `LOQUETIER_TEST_POSTGRES_URL`
//! names a server (`tests/postgres.sh start DIR` prints one); beside it the suites of objects and
//! of the in-process queue.

mod adapters;
mod claims;
mod files;
mod jobs;
mod keys;
mod objects;
mod opening;
mod queue;
mod races;
mod rig;
mod writes;
