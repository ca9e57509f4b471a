//! One suite for rows, run on SQLite always and on Postgres when `LOQUETIER_TEST_POSTGRES_URL`
//! names a server (`tests/postgres.sh start DIR` prints one); beside it the suites of objects and
//! of the queue, the latter in one process always and over Redis when `LOQUETIER_TEST_REDIS_URL`
//! names a server (`tests/redis.sh start DIR` prints one).

mod adapters;
mod claims;
mod files;
mod jobs;
mod keys;
mod objects;
mod opening;
mod queue;
mod queue_rig;
mod races;
mod redis_only;
mod redis_server;
mod rig;
mod writes;
