-- One line for each row that should be otherwise once all jobs are over and all clients have gone.
SELECT 'a job is not over: ' || id || ', ' || status FROM jobs
    WHERE status NOT IN ('succeeded', 'cancelled');
SELECT 'a job is still held: ' || id || ' by ' || COALESCE(owner, 'nobody')
    FROM jobs WHERE owner IS NOT NULL OR lease_until <> 0 OR intent IS NOT NULL;
-- Those of a cancelled job are the sweeper's.
SELECT 'a resume point is left: ' || job || ' at step ' || step FROM resume_points
    WHERE job NOT IN (SELECT id FROM jobs WHERE status = 'cancelled');
-- A job that was cancelled on its way from a resume point has told of steps beyond it.
SELECT 'steps without an event: ' || jobs.id || ', ' || COUNT(events.id) || ' of ' || jobs.step
    FROM jobs LEFT JOIN events ON events.job = jobs.id AND events.kind = 'step'
    GROUP BY jobs.id HAVING COUNT(events.id) < jobs.step
    OR (jobs.status <> 'cancelled' AND COUNT(events.id) > jobs.step);
SELECT 'steps without a trace: ' || id || ', ' || step || ' of ' || total_steps
    FROM jobs WHERE status = 'succeeded' AND step <> total_steps;
SELECT 'an event twice: ' || job || ', ' || message
    FROM events GROUP BY job, kind, event_key, message HAVING COUNT(*) > 1;
SELECT 'events out of order: ' || job || ', step ' || event_key
    FROM (SELECT job, event_key, LAG(event_key) OVER (PARTITION BY job ORDER BY sequence) AS before
          FROM events WHERE kind = 'step') AS steps
    WHERE before >= event_key;
SELECT 'an event beyond its job''s count: ' || events.id
    FROM events JOIN jobs ON jobs.id = events.job WHERE events.sequence > event_sequence;
SELECT 'a checkpoint without its adapter: ' || model FROM checkpoints
    WHERE model NOT IN (SELECT model FROM adapters);
SELECT 'an adapter without its checkpoint: ' || model FROM adapters
    WHERE model NOT IN (SELECT model FROM checkpoints);
SELECT 'a job without its adapter: ' || id FROM jobs
    WHERE status = 'succeeded'
    AND (fine_tuned_model IS NULL OR fine_tuned_model NOT IN (SELECT model FROM adapters));
SELECT 'a file that no job names: ' || id FROM files
    WHERE id NOT IN (SELECT training_file FROM jobs)
    AND id NOT IN (SELECT result_file FROM jobs WHERE result_file IS NOT NULL);
SELECT 'an idempotency key: ' || idempotency_key FROM idempotency;
