//! One suite for rows, run on SQLite always and on Postgres when `LOQUETIER_TEST_POSTGRES_URL`
//! names a server (`tests/postgres.sh start DIR` prints one); one for objects, on disk always and
//! in S3 when `LOQUETIER_TEST_S3_URL` names a bucket (`tests/s3.sh start DIR` prints one); one for
//! the queue, in one process always and over Redis when `LOQUETIER_TEST_REDIS_URL` names a server
//! (`tests/redis.sh start DIR` prints one).

mod adapters;
mod claims;
mod duties;
mod files;
mod jobs;
mod keys;
mod object_rig;
mod objects;
mod objects_away;
mod opening;
mod postgres_away;
mod queue;
mod queue_rig;
mod races;
mod redis_link;
mod redis_only;
mod redis_server;
mod redis_tls;
mod rig;
mod s3_faults;
mod sweep;
mod sweep_random;
mod upgrades;
mod writes;
