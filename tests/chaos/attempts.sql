-- How often each job was claimed: once to check its files, the other times to train it.
SELECT id || ' was claimed ' || attempt || ' times, ' || total_steps || ' steps, '
    || (finished_at - created_at) || ' s' FROM jobs ORDER BY sequence;
