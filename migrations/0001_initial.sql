-- One text for SQLite and Postgres: BIGINT, DOUBLE PRECISION and TEXT only; 0/1 for booleans,
-- JSON as text; times are Unix seconds, or milliseconds where the name says _ms or lease.

-- List numbers. The inserting transaction raises its list's value and so holds that row until it
-- commits: numbers become visible in their order, and a page cannot miss a late one. This stands
-- in for AUTOINCREMENT and SERIAL, which differ between the two and commit out of order.
CREATE TABLE sequences (
    name TEXT NOT NULL PRIMARY KEY,
    value BIGINT NOT NULL
);
INSERT INTO sequences (name, value)
    VALUES ('adapters', 0), ('api_keys', 0), ('files', 0), ('jobs', 0);

CREATE TABLE bases (
    name TEXT NOT NULL PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    context BIGINT NOT NULL,
    created_at BIGINT NOT NULL
);

-- Only hashes; `lookup` is the start of the hash.
CREATE TABLE api_keys (
    id TEXT NOT NULL PRIMARY KEY,
    sequence BIGINT NOT NULL UNIQUE,
    org TEXT NOT NULL,
    role TEXT NOT NULL,
    lookup TEXT NOT NULL,
    secret_hash TEXT NOT NULL UNIQUE,
    hint TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    revoked_at BIGINT
);
CREATE INDEX api_keys_by_lookup ON api_keys (lookup);

-- Deleted rows stay: ids are never used again.
CREATE TABLE files (
    id TEXT NOT NULL PRIMARY KEY,
    sequence BIGINT NOT NULL UNIQUE,
    org TEXT NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT,
    deleted_at BIGINT
);
CREATE INDEX files_by_org ON files (org, sequence);

CREATE TABLE jobs (
    id TEXT NOT NULL PRIMARY KEY,
    sequence BIGINT NOT NULL UNIQUE,
    org TEXT NOT NULL,
    model TEXT NOT NULL,
    base TEXT NOT NULL,
    base_fingerprint TEXT NOT NULL,
    parent TEXT,
    training_file TEXT NOT NULL REFERENCES files (id),
    validation_file TEXT REFERENCES files (id),
    suffix TEXT,
    seed BIGINT NOT NULL,
    request TEXT NOT NULL,
    resolved TEXT,
    metadata TEXT,
    status TEXT NOT NULL,
    intent TEXT,
    owner TEXT,
    attempt BIGINT NOT NULL DEFAULT 0,
    lease_until BIGINT NOT NULL DEFAULT 0,
    event_sequence BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    started_at BIGINT,
    finished_at BIGINT,
    trained_tokens BIGINT,
    estimated_finish BIGINT,
    fine_tuned_model TEXT,
    result_file TEXT,
    error TEXT,
    step BIGINT NOT NULL DEFAULT 0,
    total_steps BIGINT
);
CREATE INDEX jobs_by_org ON jobs (org, sequence);
CREATE INDEX jobs_by_status ON jobs (status, base, sequence);
CREATE INDEX jobs_by_training_file ON jobs (training_file);
CREATE INDEX jobs_by_validation_file ON jobs (validation_file);

CREATE TABLE job_metadata (
    job TEXT NOT NULL REFERENCES jobs (id),
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (job, name)
);

-- `event_key` is the step, the attempt, or 0: what makes a repeated event the same event.
CREATE TABLE events (
    id TEXT NOT NULL PRIMARY KEY,
    job TEXT NOT NULL REFERENCES jobs (id),
    sequence BIGINT NOT NULL,
    kind TEXT NOT NULL,
    event_key BIGINT NOT NULL,
    level TEXT NOT NULL,
    event_type TEXT NOT NULL,
    message TEXT NOT NULL,
    data TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    UNIQUE (job, kind, event_key),
    UNIQUE (job, sequence)
);

CREATE TABLE adapters (
    id TEXT NOT NULL PRIMARY KEY,
    sequence BIGINT NOT NULL UNIQUE,
    org TEXT NOT NULL,
    model TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    base TEXT NOT NULL,
    base_fingerprint TEXT NOT NULL,
    rank BIGINT NOT NULL,
    alpha DOUBLE PRECISION NOT NULL,
    use_rslora BIGINT NOT NULL,
    target_modules TEXT NOT NULL,
    bytes BIGINT NOT NULL,
    version BIGINT NOT NULL,
    object TEXT NOT NULL,
    job TEXT REFERENCES jobs (id),
    step BIGINT,
    created_at BIGINT NOT NULL,
    pinned BIGINT NOT NULL,
    last_used_at BIGINT,
    deleted_at BIGINT
);
CREATE INDEX adapters_by_org ON adapters (org, sequence);

CREATE TABLE checkpoints (
    id TEXT NOT NULL PRIMARY KEY,
    job TEXT NOT NULL REFERENCES jobs (id),
    step BIGINT NOT NULL,
    model TEXT NOT NULL,
    metrics TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    UNIQUE (job, step)
);

CREATE TABLE resume_points (
    job TEXT NOT NULL REFERENCES jobs (id),
    step BIGINT NOT NULL,
    attempt BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (job, step)
);

CREATE TABLE usage (
    org TEXT NOT NULL,
    model TEXT NOT NULL,
    hour BIGINT NOT NULL,
    requests BIGINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    trained_tokens BIGINT NOT NULL,
    PRIMARY KEY (org, model, hour)
);

CREATE TABLE idempotency (
    org TEXT NOT NULL,
    route TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    body_hash TEXT NOT NULL,
    object_id TEXT NOT NULL,
    expires_ms BIGINT NOT NULL,
    PRIMARY KEY (org, route, idempotency_key)
);
CREATE INDEX idempotency_by_expiry ON idempotency (expires_ms);
