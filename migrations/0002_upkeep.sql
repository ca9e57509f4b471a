-- What one process at a time does for all: who does it and until when, when it is due again, and
-- where the last one stopped. Times are the database's, in milliseconds.
CREATE TABLE duties (
    name TEXT NOT NULL PRIMARY KEY,
    owner TEXT,
    attempt BIGINT NOT NULL,
    lease_until BIGINT NOT NULL,
    due_ms BIGINT NOT NULL,
    place TEXT
);
INSERT INTO duties (name, attempt, lease_until, due_ms)
    VALUES ('rows', 0, 0, 0), ('objects', 0, 0, 0);

-- Facts about the whole database. `compatible_since`: the oldest release that can use this schema,
-- by the number of its last step; a step that takes something away raises it.
CREATE TABLE settings (
    name TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
);
INSERT INTO settings (name, value) VALUES ('compatible_since', '1');

-- Sizes of a base's modules as JSON, as its worker wrote them: what an adapter must fit.
ALTER TABLE bases ADD COLUMN modules TEXT;

CREATE INDEX files_by_expiry ON files (expires_at);
CREATE INDEX adapters_by_object ON adapters (object);
