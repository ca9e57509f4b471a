-- Of every job: how many claims ended with their worker.
SELECT fruitless_claims FROM jobs;
