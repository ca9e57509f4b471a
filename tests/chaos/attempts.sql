-- How often each job was claimed: once to check its files, the other times to train it.
SELECT id || ' was claimed ' || attempt || ' times, ' || step || ' of '
    || COALESCE(total_steps, 0) || ' steps, ' || COALESCE(finished_at - created_at, 0) || ' s'
    FROM jobs ORDER BY sequence;
